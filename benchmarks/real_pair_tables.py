"""The tables of benchmarks/real_pair.py, from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TITLES = {
    "real_category": "title to category",
    "real_hetpqa": "hetPQA",
    "real_hetpqa_unshared": "hetPQA, new evidence",
    "real_epqa": "ePQA",
    "real_stories": "stories",
    "real_story_endings": "story endings",
}
BIT_TASKS = {"real_hetpqa", "real_epqa", "real_stories"}
ENDINGS, STORIES = "real_story_endings", "real_stories"

NOTES = """## How to read it

- Base and reference are one checkpoint. An expert is one run (seed 0). A student's figure is the mean over seeds, with
  the lowest and the highest seed in parentheses; seeds differ in the order of rows and, with LoRA, in where the adapter
  starts.
- `next-token loss, same rows` is the same command with `lambda=0`: same rows, steps, learning rate and route weights.
- Learning rates (LoRA 5e-3, all weights 3e-3) are those of the experts in `../shared/README.md`, here for experts and
  both kinds of student alike. No grid was searched for either, and no held-out score was used to choose anything.
- Gap closed: (student - base) / (expert - base) over the set's domain tasks, on accuracy or on bits per byte. `over the
  reference`: bits per byte on stories above the reference's (0 is no loss). Retention: accuracy on story endings, in
  per cent of the reference's. In brackets: 95 % interval by paired bootstrap over documents, of the students' mean over
  seeds; it says nothing of other seeds, and takes documents as independent, also those that share a product.
- `new evidence` leaves out the 243 hetPQA documents whose evidence text is also that of a training row.
- Bits per byte: -log2 p(completion | prompt) over the bytes of all completions, by lm-eval, which encodes jointly and
  cuts prompts that do not fit the context of 512 tokens on the left. The end token is not scored. Stories: the first
  900 characters, which fit in one window, given <s>. Not comparable with the bits in `../shared/README.md`: scored with
  the end token and with the completion encoded by itself, this base comes to 4.03 on hetPQA and 3.21 on ePQA (there:
  4.13 and 3.12). Most of the distance to the figures here is an end token that this base never expects.
- Story endings: chance is 25 %; with 324 documents an interval is several points wide.
- General rows of `questions` are `../shared/data/general/reference_samples.jsonl`; those of `category` were written by
  `dae sample`."""


def markdown(record: Mapping[str, Any]) -> str:
    """The tables, how to read them, and the commands."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    written = f"{record['date']}, CPU, {versions}. Written by `benchmarks/real_pair.py`."
    parts = ["# The main job on a real pretrained model", written]
    for name in dict.fromkeys(result["set"] for result in record["results"]):
        results = [result for result in record["results"] if result["set"] == name]
        parts += [f"## {name}", set_table(results), difference_table(results)]
    parts += [NOTES, "## Commands", "\n".join(["```", *record["commands"], "```"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def set_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for the base, then expert, DAE and next-token loss for each kind of student."""
    tasks = [task for task in TITLES if task in results[0]["rows"]["base"]["scores"]]
    domain = [task for task in tasks if task not in (STORIES, ENDINGS)]
    titles = [
        *(title(task) for task in domain),
        "gap closed",
        title(STORIES),
        "over the reference",
        title(ENDINGS),
        "retention",
    ]
    lines = [("model", *titles), ("---",) * (len(titles) + 1)]
    shown = {"expert": "expert", "dae": "DAE", "ntp": "next-token loss, same rows"}
    lines.append(("base = reference", *cells(domain, "base", results[0]["rows"]["base"])))
    for result in results:
        kind = "LoRA" if result["student"] == "lora" else "all weights"
        for role, words in shown.items():
            if role in result["rows"]:
                seeds = "" if role == "expert" else f" ({seeds_of(result['runs'][role])})"
                lines.append((f"{words}, {kind}{seeds}", *cells(domain, role, result["rows"][role])))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seeds_of(runs: Sequence[str]) -> str:
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


def title(task: str) -> str:
    """A task's column: what it is and its unit."""
    return f"{TITLES[task]}, {'bits per byte' if is_bits(task) else 'accuracy'}"


def is_bits(task: str) -> bool:
    """Tasks whose scores are minus bits per byte."""
    return task.removesuffix("_unshared") in BIT_TASKS


def cells(domain: Sequence[str], role: str, row: Mapping[str, Any]) -> list[str]:
    """A line of a set's table: scores as mean (lowest to highest seed), the rest with its interval over documents."""
    scores = {task: over_seeds([-v if is_bits(task) else v for v in values]) for task, values in row["scores"].items()}
    closed, over, kept = row["gap_closed"], row["stories_bits_per_byte_over_reference"], row["story_endings_retention"]
    by_definition = {"base": "0 %", "expert": "100 %"}
    is_base = role == "base"
    return [
        *(scores[task] for task in domain),
        by_definition.get(role) or interval(closed, 100, 1, " %"),
        scores[STORIES],
        "" if is_base else interval(over, 1, 3),
        scores[ENDINGS],
        "" if is_base else interval(kept, 1, 1, " %"),
    ]


def over_seeds(values: Sequence[float]) -> str:
    """Mean, and from lowest to highest where there are several."""
    mean = f"{float(np.mean(values)):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def interval(estimate: Mapping[str, float] | None, factor: float, digits: int, unit: str = "") -> str:
    """`value [low, high]`; a dash where it is undefined."""
    if estimate is None:
        return "-"
    value, low, high = (f"{factor * estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def difference_table(results: Sequence[Mapping[str, Any]]) -> str:
    """DAE against next-token loss on the same rows: positive is in favour of DAE, for accuracies and bits alike."""
    compared = [result for result in results if "dae_minus_ntp" in result]
    if not compared:
        return ""
    tasks = [task for task in TITLES if task in compared[0]["dae_minus_ntp"]]
    lines = [("DAE better by", *(title(task) for task in tasks)), ("---",) * (len(tasks) + 1)]
    for result in compared:
        kind = "LoRA" if result["student"] == "lora" else "all weights"
        lines.append((kind, *(interval(result["dae_minus_ntp"][task], 1, 3) for task in tasks)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
