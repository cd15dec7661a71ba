"""`dae keys`: every key of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer
from dae_eval.suites import Suite

from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe
from dae.rank_teachers.recipe import RankRecipe
from dae.sampling.recipe import SampleRecipe
from dae.stages import STAGES
from kd.config.problems import one_of
from kd.config.schema import Frozen
from kd.errors import UserError


def schemas() -> dict[str, type[Frozen]]:
    """Every recipe by the name of its command."""
    return {
        **{name: entry.recipe for name, entry in STAGES.items()},
        "sample": SampleRecipe,
        "rank-teachers": RankRecipe,
        "merge-moe": MoeRecipe,
        "merge-weights": WeightsRecipe,
        "merge-to-lora": ToLoraRecipe,
        "suite": Suite,
    }


def keys(recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help=one_of(list(schemas())))] = "align") -> None:
    """List every key of a recipe with type, default and meaning."""
    known = schemas()
    if recipe not in known:
        raise UserError(f"{recipe}: unknown recipe; expected {one_of(list(known))}")
    from rich.console import Console
    from rich.markup import escape

    from kd.config.key_docs import key_docs

    console = Console(highlight=False)
    for doc in key_docs(known[recipe]):
        default = "required" if doc.default == "required" else f"default {doc.default}"
        console.print(f"[bold]{escape(doc.key)}[/]  {escape(doc.type)}, {escape(default)}", soft_wrap=True)
        console.print(f"    {escape(doc.meaning)}", soft_wrap=True)
