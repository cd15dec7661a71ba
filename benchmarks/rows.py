"""Fewer rows, wrong labels: what DAE and next-token loss make of the same alignment rows, on real ones.

    export OMP_NUM_THREADS=1
    python benchmarks/rows.py                                        # writes rows, prints the commands still to be run
    python benchmarks/rows.py | xargs -d '\\n' -P 2 -n 1 sh -c     # runs them, two at a time
    python benchmarks/rows.py --write                                # writes the results from what is there

From the repository's root, with the inputs that benchmarks/starts.py needs for its category pair. The expert is the
same in all of them: it was trained on all rows, with their labels as they are. Both losses start on the line, for 300
steps, and keep the checkpoint with the lowest loss of their own on an eval set, whose labels are wrong as often as
those of the training rows. Of the learning rates, each takes the one with its lower loss on the eval set.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real_pair_scores import LEVEL, RESAMPLES, SHARED, completion_bytes
from benchmarks.starts import LAMBDAS
from benchmarks.starts_tables import table
from benchmarks.starts_ways import LOSSES
from benchmarks.trade_off import LIMIT
from kd.runs.files import write_text_durably

WORK = Path("runs/rows")
ROWS = SHARED / "data/ecom/train_category.jsonl"
GENERAL = Path("runs/real_pair/general.jsonl")
EVAL_ROWS = 400
GENERAL_EVAL_ROWS = 200
TASKS = ("real_category", "real_stories")
SEED = 0
STEPS, RATES = 300, (5e-4, 1.5e-3)


@dataclass(frozen=True)
class Variant:
    """What alignment rows there are: one in `part` of all, of which a share has the label of another row."""

    name: str
    part: int = 1
    wrong: float = 0.0

    @property
    def folder(self) -> Path:
        return WORK / f"part{self.part}-wrong{self.wrong:g}"


VARIANTS = (
    Variant("all rows"),
    Variant("1 row in 10", part=10),
    Variant("1 row in 30", part=30),
    Variant("10 % wrong labels", wrong=0.1),
    Variant("30 % wrong labels", wrong=0.3),
)


# -- rows and commands -------------------------------------------------------------------------------------------------


def write_rows(variant: Variant, rows: Sequence[dict[str, Any]], general: Sequence[dict[str, Any]]) -> None:
    """The variant's rows.jsonl and eval.jsonl, and general rows in two files; the same at every call."""
    rng = np.random.default_rng(SEED)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    held_out, training = shuffled[:EVAL_ROWS], shuffled[EVAL_ROWS:]
    training = training[: len(training) // variant.part]
    files = {
        "rows.jsonl": with_wrong_labels(training, variant.wrong, rng),
        "eval.jsonl": with_wrong_labels(held_out, variant.wrong, rng),
        "general.jsonl": general[GENERAL_EVAL_ROWS:],
        "general_eval.jsonl": general[:GENERAL_EVAL_ROWS],
    }
    variant.folder.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        write_text_durably(variant.folder / name, lines)


def with_wrong_labels(rows: Sequence[dict[str, Any]], share: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A share of the rows gets the completion of a row drawn at random that has another one."""
    found = [dict(row) for row in rows]
    for i in rng.permutation(len(rows))[: round(share * len(rows))]:
        others = [row["completion"] for row in rows if row["completion"] != rows[i]["completion"]]
        found[i]["completion"] = others[rng.integers(len(others))]
    return found


def student_of(variant: Variant, loss: str, rate: float) -> Path:
    return variant.folder / f"{loss}-lr{rate:g}"


def scores_of(variant: Variant, loss: str, rate: float) -> Path:
    return variant.folder / f"{loss}-lr{rate:g}.json"


def command(variant: Variant, loss: str, rate: float) -> str:
    """What trains and scores a student, in one line of the shell."""
    folder = variant.folder
    words = ["dae", "align", "--recipe", "benchmarks/recipes/starts_category.yaml"]
    words += ["--output", str(student_of(variant, loss, rate)), "start=auto", f"lambda={LAMBDAS[loss]}"]
    words += [f"data.domain.0.path={folder}/rows.jsonl", f"data.general.0.path={folder}/general.jsonl"]
    words += [f"data.eval.domain={folder}/eval.jsonl", f"data.eval.general={folder}/general_eval.jsonl"]
    words += [f"train.max_steps={STEPS}", f"train.learning_rate={rate!r}", "train.save_steps=50", f"seed={SEED}"]
    scoring = ["python", "benchmarks/real_pair_scores.py", str(student_of(variant, loss, rate))]
    scoring += [str(scores_of(variant, loss, rate)), "--limit", str(LIMIT), "--tasks", *TASKS]
    return f"{shlex.join(words)} && {shlex.join(scoring)}"


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(scores: Path) -> dict[str, NDArray[np.float64]]:
    """[D] right or wrong of each title, and [D, 2] bits and bytes of each story."""
    tasks = json.loads(scores.read_text(encoding="utf-8"))["tasks"]
    category_D, bits_D = (np.array([each["score"] for each in tasks[task]["documents"]]) for task in TASKS)
    bytes_D = completion_bytes(SHARED, "real_stories")[: len(bits_D)]
    return {"category": category_D, "stories": np.stack([bits_D, bytes_D], axis=1)}


def mean_of(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per cent right, or bits per byte. values: [..., D] or [..., D, 2]."""
    if name == "category":
        return 100 * values.mean(axis=-1)
    sums: NDArray[np.float64] = values.sum(axis=-2)
    return sums[..., 0] / sums[..., 1]


def best_rate(variant: Variant, loss: str) -> float | None:
    """Of the rates that were run, the one with the lowest eval loss of its result; None where none was."""
    done = [rate for rate in RATES if scores_of(variant, loss, rate).is_file()]
    return min(done, key=lambda rate: eval_loss(student_of(variant, loss, rate)), default=None)


def eval_loss(student: Path) -> float:
    summary = json.loads((student / "run.json").read_text(encoding="utf-8"))["summary"]
    return float(summary["held_out"]["eval_loss"])


def difference(name: str, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, float]:
    """Ours minus theirs on the same documents, with the 95 % interval of a paired bootstrap."""
    drawn_RD = np.random.default_rng(SEED).integers(len(ours), size=(RESAMPLES, len(ours)))
    resampled_R = mean_of(name, ours[drawn_RD]) - mean_of(name, theirs[drawn_RD])
    low, high = np.quantile(resampled_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(mean_of(name, ours) - mean_of(name, theirs))
    return {"value": value, "low": float(low), "high": float(high)}


def results() -> dict[str, Any]:
    """Means of every student that is scored, and DAE minus next-token loss where both are."""
    lines = []
    for variant in VARIANTS:
        rates = {loss: rate for loss in LOSSES if (rate := best_rate(variant, loss)) is not None}
        found = {loss: figures(scores_of(variant, loss, rate)) for loss, rate in rates.items()}
        line: dict[str, Any] = {"rows": variant.name, "rates": rates}
        line["tried"] = {loss: [rate for rate in RATES if scores_of(variant, loss, rate).is_file()] for loss in LOSSES}
        for loss, of in found.items():
            line[loss] = {name: float(mean_of(name, values)) for name, values in of.items()}
        if found.keys() == LOSSES.keys():
            pair = (found["dae"], found["ntp"])
            line["dae_minus_ntp"] = {name: difference(name, pair[0][name], pair[1][name]) for name in pair[0]}
        lines.append(line)
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "steps": STEPS, "lines": lines}


NOTES = """Category: per cent right of 600 held-out titles (standard error about 1.9 points). Stories: bits per byte,
lower is better. One seed; the interval is over documents. Titles to categories with LoRA; both losses from the same
start on the line, 300 steps, best checkpoint by the own loss on an eval set of 400 rows. The expert saw all rows, those
of the eval set too. Learning rate: the one with the lower eval loss, of those tried."""


def markdown(record: Mapping[str, Any]) -> str:
    """One line for each kind of rows."""
    head = ["rows", *(f"{name}: category, stories (learning rate)" for name in LOSSES.values())]
    head += ["DAE minus next-token loss: category", "stories"]
    rows = []
    for line in record["lines"]:
        cells = [means_in_words(line, loss) if loss in line else "" for loss in LOSSES]
        apart = line.get("dae_minus_ntp", {})
        cells += [signed(apart[name], digits) if apart else "" for name, digits in (("category", 1), ("stories", 3))]
        rows.append([line["rows"], *cells])
    title = f"# Fewer rows, wrong labels\n\n{record['date']}, CPU. Written by `benchmarks/rows.py`."
    return "\n\n".join([title, table(head, rows), NOTES]) + "\n"


def means_in_words(line: Mapping[str, Any], loss: str) -> str:
    """`72.3, 1.408 (0.0015; 0.0005 tried)`."""
    means, rate = line[loss], line["rates"][loss]
    others = "".join(f"; {other:g} tried" for other in line["tried"][loss] if other != rate)
    return f"{means['category']:.1f}, {means['stories']:.3f} ({rate:g}{others})"


def signed(estimate: Mapping[str, float], digits: int) -> str:
    """`+1.5 (-0.2 to +3.1)`."""
    value, low, high = (f"{estimate[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def main() -> None:
    """Write rows and print what is missing, or write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results from what is there")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the results go")
    given = parser.parse_args()
    if given.write:
        record = results()
        write_text_durably(given.output / "rows.json", json.dumps(record, indent=1) + "\n")
        write_text_durably(given.output / "rows.md", markdown(record))
        return
    rows, general = ([json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in (ROWS, GENERAL))
    for variant in VARIANTS:
        write_rows(variant, rows, general)
    wanted = [(variant, loss, rate) for variant in VARIANTS for loss in LOSSES for rate in RATES]
    print("\n".join(command(*each) for each in wanted if not scores_of(*each).is_file()))


if __name__ == "__main__":
    main()
