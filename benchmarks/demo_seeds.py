"""The demo over several seeds: does aligning take the expert's gain and keep the rest, and how much does that vary?

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--work runs/demo_seeds] [--output benchmarks/results]

Each seed is a `dae demo` of its own: another untrained base, other orders of rows, other adapters; the world and its
held-out documents are the same. A finished seed is not run again. Writes demo.json and demo.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

MODELS = ("base", "expert", "next-token", "student")


def main() -> None:
    """Run what is missing, then write both result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    results = [run_demo(arguments.work / f"seed-{seed}", seed) for seed in arguments.seeds]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "demo.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "demo.md").write_text(as_markdown(results), encoding="utf-8")


def run_demo(folder: Path, seed: int) -> dict[str, Any]:
    """results.json of one seed, made by the command a user types."""
    if not (folder / "results.json").is_file():
        command = [sys.executable, "-m", "dae", "demo", "--output", str(folder), "--seed", str(seed)]
        subprocess.run(command, check=True)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results


def spread(values: Sequence[float], factor: float = 100.0) -> str:
    """`93.1 (91.0..95.2)`: mean, smallest and largest over the seeds, in per cent."""
    low, high = factor * min(values), factor * max(values)
    return f"{factor * sum(values) / len(values):.1f} ({low:.1f}..{high:.1f})"


def as_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Headlines by seed, then accuracy by skill over the seeds."""
    seeds = ", ".join(str(result["seed"]) for result in results)
    made = f"{date.today().isoformat()}, `python benchmarks/demo_seeds.py`, seeds {seeds}, world SHA-256 "
    lines = [
        "# The demo over seeds",
        "",
        f"{made}`{results[0]['world_sha256'][:12]}`.",
        "In brackets: 95 % intervals over documents (first table), smallest and largest over seeds (second table).",
        "",
        "| model | measure | on | " + " | ".join(f"seed {result['seed']}" for result in results) + " | mean |",
        "|---|---|---|" + "---|" * (len(results) + 1),
    ]
    for place, line in enumerate(results[0]["headlines"]):
        estimates = [result["headlines"][place]["estimate"] for result in results]
        factor = 100 if line["measure"] == "gap closed" else 1
        cells = [
            f"{factor * e['value']:.1f} ({factor * e['low']:.1f}..{factor * e['high']:.1f})" if e else "undefined"
            for e in estimates
        ]
        known = [factor * e["value"] for e in estimates if e]
        mean = f"{sum(known) / len(known):.1f}" if len(known) == len(estimates) else "undefined"
        lines.append(f"| {line['model']} | {line['measure']}, % | {line['group']} | {' | '.join(cells)} | {mean} |")
    lines += ["", "| held-out accuracy, % (chance 25) | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    for task in results[0]["documents"]:
        cells = [spread([result["scores"][model][task] for result in results]) for model in MODELS]
        lines.append(f"| {task.removeprefix('world_')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
