"""The demo over several seeds: does aligning take the expert's gain and keep the rest, and how much does that vary?

    for seed in 0 1 2; do dae demo --output runs/demo_seeds/seed-$seed --seed $seed; done
    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--work runs/demo_seeds] [--output benchmarks/results]

Each seed is a `dae demo` of its own: another untrained base, other orders of rows, other adapters; the world and its
held-out documents are the same. Writes demo.json and demo.md from the finished reports.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from dae.demo import world

MODELS = ("base", "expert", "next-token", "student")
STUDENTS = ("student", "next-token")


def main() -> None:
    """Write both result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    results = [read_demo(arguments.work / f"seed-{seed}", seed) for seed in arguments.seeds]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "demo.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "demo.md").write_text(as_markdown(results), encoding="utf-8")


def read_demo(folder: Path, seed: int) -> dict[str, Any]:
    """What the report of one seed says."""
    path = folder / "report" / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    students = {each["name"]: each for each in (report["student"], *report["others"])}
    tasks = [
        {key: task[key] for key in ("task", "group", "kind", "n", "scores", "difference")} for task in report["tasks"]
    ]
    return {"seed": seed, "world_sha256": world.SHA256, "word": report["word"], "students": students, "tasks": tasks}


def spread(values: Sequence[float], factor: float = 100.0) -> str:
    """`93.1 (91.0..95.2)`: mean, smallest and largest over the seeds, in per cent."""
    low, high = factor * min(values), factor * max(values)
    return f"{factor * sum(values) / len(values):.1f} ({low:.1f}..{high:.1f})"


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Verdicts and their lines by seed, then groups and skills over the seeds."""
    seeds = [str(result["seed"]) for result in results]
    made = f"{date.today().isoformat()}, `python benchmarks/demo_seeds.py`, seeds {', '.join(seeds)}, world SHA-256 "
    lines = [
        "# The demo over seeds",
        "",
        f"{made}`{results[0]['world_sha256'][:12]}`.",
        "On the skills and kinds of question that alignment rows ask. In brackets: 95 % intervals over documents.",
        "",
        f"| model | line | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        "|---|---|" + "---|" * (len(results) + 1),
        f"| student | verdict | {' | '.join(result['word'] for result in results)} | |",
    ]
    for name in STUDENTS:
        lines += [
            verdict_row(name, "gap closed, %", [result["students"][name]["gap"]["closed"] for result in results], 100),
            verdict_row(
                name, "retention, %", [result["students"][name]["retention"]["ratio"] for result in results], 1
            ),
            verdict_row(
                name,
                "retention, points",
                [result["students"][name]["retention"]["difference"] for result in results],
                1,
            ),
        ]
    lines += [
        "",
        "Every group, smallest and largest over the seeds in brackets. Gap closed of shop groups, retention of general",
        "ones, in per cent, from the groups' mean scores.",
        "",
    ]
    lines += [f"| group | {' | '.join(STUDENTS)} |", "|---|" + "---|" * len(STUDENTS)]
    for group in dict.fromkeys(task["group"] for task in results[0]["tasks"]):
        values = [[share_of_group(result, group, name) for result in results] for name in STUDENTS]
        lines.append(f"| {group} | {' | '.join(spread(each) for each in values)} |")
    lines += ["", "| held-out accuracy, % (chance 25) | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    for task in results[0]["tasks"]:
        same = [next(t for t in result["tasks"] if t["task"] == task["task"]) for result in results]
        cells = [spread([each["scores"][model] for each in same]) for model in MODELS]
        lines.append(f"| {task['task'].removeprefix('world_')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdict_row(name: str, what: str, estimates: Sequence[dict[str, float] | None], factor: float) -> str:
    """One line of the first table."""
    cells = [
        f"{factor * e['value']:.1f} ({factor * e['low']:.1f}..{factor * e['high']:.1f})" if e else "undefined"
        for e in estimates
    ]
    known = [factor * e["value"] for e in estimates if e]
    mean = f"{sum(known) / len(known):.1f}" if len(known) == len(estimates) else "undefined"
    return f"| {name} | {what} | {' | '.join(cells)} | {mean} |"


def share_of_group(result: dict[str, Any], group: str, name: str) -> float:
    """Of a shop group the gap closed, of a general group the retention; 1 is all of it."""
    scores = [task["scores"] for task in result["tasks"] if task["group"] == group]
    if group.startswith("shop"):
        gained = sum(score["expert"] - score["base"] for score in scores)
        return float(sum(score[name] - score["base"] for score in scores) / gained)
    return float(sum(score[name] / score["reference"] for score in scores) / len(scores))


if __name__ == "__main__":
    main()
