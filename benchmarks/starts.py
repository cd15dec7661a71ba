"""Where a student starts, and what it is trained with: the base or the line to its expert, DAE or next-token loss.

    export OMP_NUM_THREADS=1
    python benchmarks/starts.py                                      # prints the commands that are still to be run
    python benchmarks/starts.py | xargs -d '\\n' -P 2 -n 1 sh -c     # runs them, two at a time
    python benchmarks/starts_kl.py                                   # measures how far the students are from the base
    python benchmarks/starts.py --write                              # writes the results from what is there

Call the second line again until the first one prints nothing: other seeds wait for the learning rates and coefficients,
which are chosen on validation documents with the first seed. From the repository's root. Needs three demos (`dae demo
--output runs/demo_seeds/seed-N --seed N`), each with what benchmarks/trade_off_inputs.py adds, ../shared, and
runs/real_pair/{category-lora-expert, questions-lora-expert, general.jsonl} of benchmarks/recipes/real_pair.yaml.
`--pair` prints or writes one pair alone; other pairs' results stay. `--rates` takes learning rates and coefficients
that an earlier record's search chose, instead of a search; what that record lacks is searched.

World: accuracy on the demo's four groups. Category: accuracy on titles, bits per byte on stories. Questions: bits per
byte on both. Every way has the rows, batch size and schedule of the pair's recipe; what differs is in the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.starts_pooled import read_pooled
from benchmarks.starts_tables import TITLES, markdown, results
from benchmarks.starts_ways import REAL, SEEDS, Run, Way, chosen, scores_file, ways_at_rates_of
from benchmarks.trade_off import DEMOS, LIMIT
from kd.runs.files import write_text_durably

RECIPES = "benchmarks/recipes"
LAMBDAS = {"dae": 1, "ntp": 0}


def command(run: Run) -> str:
    """What makes and scores a student, in one line of the shell."""
    return world_command(run) if run.way.pair == "world" else real_command(run)


def world_command(run: Run) -> str:
    way = run.way
    if way.merge:
        recipe, keys = "starts_world_merge.yaml", [f"method={way.merge}", f"weight={run.rate!r}"]
    else:
        recipe, keys = "trade_off/world_align.yaml", trained_keys(run, "shop")
    words = ["dae", "run", f"../../../{RECIPES}/{recipe}", f"output=starts/{run.name}"]
    return f"(cd {DEMOS}/seed-{run.seed} && {shlex.join(words + [f'stages.student.{key}' for key in keys])})"


def real_command(run: Run) -> str:
    way = run.way
    if way.merge:
        words = ["dae", "merge", "weights", "--base", "../shared/models/stories260k"]
        words += ["--expert", f"runs/real_pair/{way.pair}-lora-expert", "--output", str(run.folder)]
        words += [f"method={way.merge}", f"weight={run.rate!r}"]
    else:
        words = ["dae", "align", "--recipe", f"{RECIPES}/starts_{way.pair}.yaml", "--output", str(run.folder)]
        words += trained_keys(run, "domain")
    scoring = ["python", "benchmarks/real_pair_scores.py", str(run.folder), str(scores_file(run.folder.name))]
    scoring += ["--limit", str(LIMIT), "--tasks", REAL[way.pair], "real_stories"]
    return f"{shlex.join(words)} && {shlex.join(scoring)}"


def trained_keys(run: Run, expert: str) -> list[str]:
    way = run.way
    start = way.start if way.start in ("base", "auto") else f"{{{expert}: {way.start}}}"
    keys = [f"start={start}", f"lambda={LAMBDAS[way.loss]}", f"train.max_steps={way.steps}"]
    keys += [f"train.learning_rate={run.rate!r}", f"seed={run.seed}"]
    keys += [] if way.budget is None else [f"budget.general={way.budget!r}"]
    return keys + (["lora=null"] if way.all_weights else [])


def missing_runs(ways: Sequence[Way]) -> list[Run]:
    """What is to be run: the rates of the first seed, then the other seeds at the chosen rate."""
    wanted: list[Run] = []
    for way in ways:
        wanted += [Run(way, rate, SEEDS[0]) for rate in way.rates]
        rate, complete = chosen(way)
        if rate is not None and complete:
            wanted += [Run(way, rate, seed) for seed in way.seeds[0 if way.rate_of else 1 :]]
    return [run for run in wanted if not run.is_scored]


def main() -> None:
    """Print what is missing, or write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results from what is there")
    parser.add_argument("--pair", choices=TITLES, help="this one alone")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the results go")
    parser.add_argument("--rates", type=Path, metavar="JSON", help="take the rates of this earlier starts.json")
    given = parser.parse_args()
    ways = [way for way in ways_at_rates_of(given.rates) if given.pair in (None, way.pair)]
    if not given.write:
        print("\n".join(map(command, missing_runs(ways))))
        return
    earlier = given.output / "starts.json"
    known = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else None
    record = results(ways, known, given.rates.name if given.rates else "")
    write_text_durably(given.output / "starts.json", json.dumps(record, indent=1) + "\n")
    write_text_durably(given.output / "starts.md", markdown(read_pooled(given.output)))


if __name__ == "__main__":
    main()
