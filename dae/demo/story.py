"""`dae demo`: the whole story on the embedded world. It runs the very commands that it prints.

Skills that are also in the alignment rows say whether aligning works; those that are not say what carries over.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dae.demo import world
from kd.errors import UserError

if TYPE_CHECKING:
    from dae_eval.harness import TaskScores
    from dae_eval.scores import Estimate

EXPERT = "shop"
MODELS = ("base", "expert", "reference", "next-token", "student")
STAGES = ("base", "expert", "student", "next-token")
GROUPS: Mapping[str, Sequence[str]] = {
    "shop, aligned": world.ALIGNED_KINDS,
    "shop, not aligned": world.UNALIGNED_KINDS,
    "general, aligned": world.ALIGNED_SKILLS,
    "general, not aligned": world.UNALIGNED_SKILLS,
}

Scores = Mapping[str, Mapping[str, "TaskScores"]]  # model -> task -> scores


@dataclass(frozen=True)
class Headline:
    """One of the two numbers for one model, with its 95 % interval; None where it is undefined."""

    model: str
    measure: str
    group: str
    estimate: Estimate | None


def demo(output: Path, seed: int, run_command: Callable[[Sequence[str]], None]) -> None:
    """Make the world and its four models under `output`, score them, print one table. Finished parts stay.

    run_command: runs one command of `dae` (without the word `dae`) in this process.
    """
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    folder = output / "world"
    digest = world.write_world(folder)
    if digest != world.SHA256:
        raise UserError(
            f"{folder}: this world is not the fixed one (SHA-256 {digest[:12]}); its numbers cannot be compared."
        )
    notes.print(f"[bold]A made-up world[/] in {folder} (SHA-256 {digest[:12]}): general skills, and a shop.")
    start = output / "start"
    if not (start / "config.json").is_file():
        write_untrained_model(start, seed)
    recipes = copy_recipes(output / "recipes")
    for title, command in commands(output, recipes, seed):
        notes.print(f"\n[bold]{title}[/]\n[dim]$[/] {shlex.join(command)}", soft_wrap=True)
        run_command(command[1:])
    notes.print("\n[bold]Held-out documents[/]: lm-eval, multiple choice, base and adapters on one backbone")
    with notes.status("scoring") as status:
        scores = score_models(output, lambda name: status.update(f"scoring {name}"))
    found = headlines(scores)
    (output / "results.json").write_text(json.dumps(as_json(scores, found, seed), indent=2) + "\n", encoding="utf-8")
    show(console, scores, found)
    console.print(f"All numbers are in {output / 'results.json'}. The same on your own checkpoints:\n")
    console.print("  dae sft --base CKPT --data shop.jsonl --output expert", soft_wrap=True)
    console.print(
        "  dae align --base CKPT --expert expert --general-data general.jsonl --output student", soft_wrap=True
    )


def write_untrained_model(folder: Path, seed: int) -> None:
    """A small Llama with random weights and the world's tokenizer: where the demo's base starts."""
    from dae.demo.model import save_untrained

    save_untrained(folder, seed)


def copy_recipes(folder: Path) -> Path:
    """The demo's recipes, beside its runs, so that the printed commands work from where they were printed."""
    here = Path(__file__).resolve().parents[1]
    for source in (here / "_recipes" / "demo", here.parent / "recipes" / "demo"):
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True)
            return folder
    raise FileNotFoundError("the demo's recipes are not installed")


def commands(output: Path, recipes: Path, seed: int) -> list[tuple[str, list[str]]]:
    """(what it is, the command) for each of the four models."""
    data, base, expert = output / "world", str(output / "base"), str(output / "expert")

    def dae(stage: str, recipe: str, *flags: str) -> list[str]:
        return ["dae", stage, "--recipe", str(recipes / f"{recipe}.yaml"), *flags, *([f"seed={seed}"] if seed else [])]

    aligning = ["--base", base, "--expert", f"{EXPERT}={expert}", "--reference", base]
    aligning += ["--domain-data", f"{EXPERT}={data / 'shop_align.jsonl'}"]
    aligning += ["--general-data", str(data / "general_align.jsonl")]
    shares = [f"data.{EXPERT}.0.share=0.7", "data.general.0.share=0.3"]
    return [
        (
            "1. A base that has general skills and knows no shop",
            dae(
                "sft",
                "base",
                "--base",
                str(output / "start"),
                "--data",
                str(data / "general_train.jsonl"),
                "--output",
                base,
            ),
        ),
        (
            "2. An expert: the base trained on shop rows alone. It learns the shop and forgets the rest",
            dae("sft", "expert", "--base", base, "--data", str(data / "shop_expert.jsonl"), "--output", expert),
        ),
        (
            "3. The student: matches the expert on shop rows and the base on general rows",
            dae("align", "align", *aligning, "--output", str(output / "student"), *shares),
        ),
        (
            "4. For comparison, next-token loss on the same mixed rows, without teachers",
            dae("align", "align", *aligning, "--output", str(output / "next-token"), *shares, "lambda=0"),
        ),
    ]


def score_models(output: Path, tell: Callable[[str], None]) -> dict[str, dict[str, TaskScores]]:
    """Score the base and the three adapters on every skill, all on one backbone. The reference is the base."""
    import torch
    from dae_eval.harness import TASKS, score_tasks
    from transformers import AutoTokenizer

    from kd.roles import Backbone, LoadSettings, Role, add_frozen_adapter, load_model, speaking_as

    base = str(output / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    backbone = Backbone(base, load_model(base, LoadSettings(torch.float32)))
    adapters = {name: add_frozen_adapter(backbone, str(output / name)) for name in STAGES[1:]}
    tasks = [f"world_{skill}" for skills in GROUPS.values() for skill in skills]
    scores: dict[str, dict[str, TaskScores]] = {}
    for name in STAGES:
        tell(name)
        with speaking_as(Role(name, backbone.model, adapters.get(name))) as model:
            scores[name] = score_tasks(
                model, tokenizer, tasks, include_path=TASKS / "world", metadata={"world": str(output / "world")}
            )
    scores["reference"] = scores["base"]
    return scores


def headlines(scores: Scores) -> list[Headline]:
    """Gap closed and retention of the student and of next-token loss: skills in the alignment rows, and the others."""
    from dae_eval.scores import gap_closed, paired, retention

    found = []
    for model in ("next-token", "student"):
        for group, skills in GROUPS.items():
            chosen = [{f"world_{s}": scores[name][f"world_{s}"] for s in skills} for name in ("base", "expert", model)]
            base, expert, student = paired(*chosen)
            if group.startswith("shop"):
                found.append(Headline(model, "gap closed", group, gap_closed(base, expert, student)))
            else:
                found.append(Headline(model, "retention", group, retention(base, student)))
    return found


def show(console: Console, scores: Scores, found: Sequence[Headline]) -> None:
    """One table in 80 columns: accuracy of every model on every skill, then the two numbers."""
    table = Table(
        title="Right answers on held-out documents, in per cent", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("")
    for name in ("chance", *MODELS):
        table.add_column(name, justify="right")
    for group, skills in GROUPS.items():
        table.add_row(f"[bold]{group}[/]")
        for skill in skills:
            means = [scores[model][f"world_{skill}"].mean for model in MODELS]
            table.add_row(f"  {skill}", *(f"{100 * value:.1f}" for value in (world.CHANCE, *means)))
    console.print(table)
    console.print(
        "reference = base: the same weights. aligned: in the rows that the student was trained on; not aligned: what "
        "the expert or the base knows and no alignment row asks. In brackets: 95 % intervals.\n"
    )
    for model in ("student", "next-token"):
        console.print(f"[bold]{model}[/]")
        for line in found:
            if line.model == model:
                console.print(f"  {line.measure:<11}  {line.group:<22}{in_words(line)}")
    console.print()


def in_words(line: Headline) -> str:
    """`93.1 %  (91.0 to 95.2)`: the estimate with its 95 % interval, in per cent."""
    if line.estimate is None:
        return "undefined"
    factor = 100 if line.measure == "gap closed" else 1
    value, low, high = (factor * v for v in (line.estimate.value, line.estimate.low, line.estimate.high))
    return f"{value:6.1f} %  ({low:.1f} to {high:.1f})"


def as_json(scores: Scores, found: Sequence[Headline], seed: int) -> dict[str, Any]:
    """What results.json holds: scores on 0..1 per model and skill, and the headlines."""
    return {
        "seed": seed,
        "world_sha256": world.SHA256,
        "documents": {task: len(task_scores.documents) for task, task_scores in scores["base"].items()},
        "scores": {model: {task: s.mean for task, s in scores[model].items()} for model in MODELS},
        "headlines": [asdict(line) for line in found],
    }
