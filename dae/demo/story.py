"""`dae demo`: all stages on a made-up world. It runs the commands that it prints.

Skills that occur in the alignment rows show whether alignment works; the others show what transfers.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from dae.demo import world
from kd.errors import UserError

EXPERT = "shop"


def demo(output: Path, seed: int, run_command: Callable[[Sequence[str]], None]) -> None:
    """Write the world, its four models and the report to `output`. Finished parts are skipped.

    run_command: runs one command of `dae` (without the word `dae`) in this process.
    """
    notes = Console(stderr=True, highlight=False)
    folder = output / "world"
    digest = world.write_world(folder)
    if digest != world.SHA256:
        raise UserError(
            f"{folder}: this world differs from the fixed one (SHA-256 {digest[:12]}); its numbers are not comparable."
        )
    notes.print(f"[bold]A made-up world[/] in {folder} (SHA-256 {digest[:12]}): general skills, and a shop.")
    start = output / "start"
    if not (start / "config.json").is_file():
        from dae.demo.model import save_untrained

        save_untrained(start, seed)
    recipes = copy_recipes(output / "recipes")
    for title, command in commands(output, recipes, seed):
        notes.print(f"\n[bold]{title}[/]\n[dim]$[/] {shlex.join(command)}", soft_wrap=True)
        run_command(command[1:])
    console = Console(highlight=False)
    console.print("\nThe same on your own checkpoints:\n")
    for line in (
        "dae sft    --base CKPT --data shop.jsonl --output expert",
        "dae align  --base CKPT --expert expert --general-data general.jsonl --output student",
        "dae report --base CKPT --expert expert --student student --suite SUITE.yaml --output report",
    ):
        console.print(f"  {line}", soft_wrap=True)


def copy_recipes(folder: Path) -> Path:
    """Copy the demo's recipes next to its runs, so that the printed commands work."""
    here = Path(__file__).resolve().parents[1]
    for source in (here / "_recipes" / "demo", here.parent / "recipes" / "demo"):
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True)
            return folder
    raise FileNotFoundError("the demo's recipes are not installed")


def commands(output: Path, recipes: Path, seed: int) -> list[tuple[str, list[str]]]:
    """(title, command) for each of the four models and the report."""
    data, base, expert = output / "world", str(output / "base"), str(output / "expert")
    untrained, general, shop = str(output / "start"), str(data / "general_train.jsonl"), str(data / "shop_expert.jsonl")

    def dae(stage: str, recipe: str, *flags: str) -> list[str]:
        return ["dae", stage, "--recipe", str(recipes / f"{recipe}.yaml"), *flags, *([f"seed={seed}"] if seed else [])]

    aligning = ["--base", base, "--expert", f"{EXPERT}={expert}", "--reference", base]
    aligning += ["--domain-data", f"{EXPERT}={data / 'shop_align.jsonl'}"]
    aligning += ["--general-data", str(data / "general_align.jsonl")]
    report = ["dae", "report", "--base", base, "--expert", expert, "--student", str(output / "student")]
    report += ["--compare", f"next-token={output / 'next-token'}", "--suite", str(recipes / "eval.yaml")]
    report += [f"metadata.world={data}", "--output", str(output / "report")]
    shares = [f"data.{EXPERT}.0.share=0.7", "data.general.0.share=0.3"]
    return [
        (
            "1. The base: general skills, nothing about the shop",
            dae("sft", "base", "--base", untrained, "--data", general, "--output", base),
        ),
        (
            "2. The expert: the base trained on shop rows alone. It learns the shop and forgets general skills",
            dae("sft", "expert", "--base", base, "--data", shop, "--output", expert),
        ),
        (
            "3. The student: matches the expert on shop rows and the base on general rows",
            dae("align", "align", *aligning, "--output", str(output / "student"), *shares),
        ),
        (
            "4. For comparison: next-token loss on the same mixed rows, without teachers",
            dae("align", "align", *aligning, "--output", str(output / "next-token"), *shares, "lambda=0"),
        ),
        ("5. The report: gains and losses on held-out documents", report),
    ]
