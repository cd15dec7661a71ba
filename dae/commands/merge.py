"""`dae merge moe | weights | to-lora`: parse, call one function, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe
from kd.config.data_recipe import ROUTE_NAME
from kd.config.loading import load_recipe
from kd.errors import UserError

merge_app = typer.Typer(
    no_args_is_help=True,
    help="Checkpoints from checkpoints, without training: mixtures, weight merges, LoRA from full.",
)

Assignments = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any key of the recipe")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML; flags and KEY=VALUE go over it")
]
Output = Annotated[str | None, typer.Option(metavar="DIR", help="run folder")]


@merge_app.command()
def moe(
    assignments: Assignments = None,
    base: Annotated[str | None, typer.Option(metavar="CKPT", help="gives attention, norms and embeddings")] = None,
    expert: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]CKPT", help="gives its MLPs; repeats; prompts are in the recipe")
    ] = None,
    gate: Annotated[str | None, typer.Option(help="hidden, cheap_embed or random (default: hidden)")] = None,
    output: Output = None,
    recipe: RecipeFile = None,
) -> None:
    """Make a mixture of experts, such as a 2x7B, from dense checkpoints."""
    flags, names = expert_flags(expert or [])
    flags |= {"base": base, "gate": gate, "output": output}
    loaded = load_recipe(MoeRecipe, recipe, flags, assignments or [], names)

    from dae.merging.mixture import merge_moe

    result = merge_moe(loaded)
    summary = result.summary
    typer.echo(
        f"{result.path}: finished, {summary['experts']} experts, {summary['experts_per_token']} a token, "
        f"{summary['parameters']:,} parameters"
    )
    for name, share in summary["carried"].items():
        told = "is the base" if share is None else f"{share:.1%} of its squared difference to the base is in its MLPs"
        typer.echo(f"  expert {name}: {told}")


@merge_app.command()
def weights(
    assignments: Assignments = None,
    method: Annotated[str | None, typer.Option(help="linear, slerp, task_arithmetic, ties or dare_ties")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="CKPT", help="what task vectors are counted from and adapters stand on")
    ] = None,
    reference: Annotated[str | None, typer.Option(metavar="CKPT", help="the general model (default: the base)")] = None,
    expert: Annotated[str | None, typer.Option(metavar="CKPT", help="the domain's model: checkpoint or LoRA")] = None,
    output: Output = None,
    recipe: RecipeFile = None,
) -> None:
    """Merge reference and expert by arithmetic on their weights: weight=.., density=.., seed=.. as KEY=VALUE."""
    flags = {"method": method, "base": base, "reference": reference, "expert": expert, "output": output}
    loaded = load_recipe(WeightsRecipe, recipe, flags, assignments or [])

    from dae.merging.weights import merge_weights

    result = merge_weights(loaded)
    summary = result.summary
    typer.echo(
        f"{result.path}: finished, {summary['method']}, weight {summary['weight']:g}, "
        f"{summary['parameters']:,} parameters"
    )


@merge_app.command("to-lora")
def to_lora(
    assignments: Assignments = None,
    reference: Annotated[str | None, typer.Option(metavar="CKPT", help="what the adapter is to stand on")] = None,
    expert: Annotated[str | None, typer.Option(metavar="CKPT", help="the fully fine-tuned checkpoint")] = None,
    rank: Annotated[int | None, typer.Option(help="rank of every matrix")] = None,
    energy: Annotated[
        float | None, typer.Option(help="or: share of the squared difference to keep, such as 0.99")
    ] = None,
    output: Output = None,
    recipe: RecipeFile = None,
) -> None:
    """Make a LoRA adapter of a fully fine-tuned expert, so that it can share the backbone."""
    flags = {"reference": reference, "expert": expert, "rank": rank, "energy": energy, "output": output}
    loaded = load_recipe(ToLoraRecipe, recipe, flags, assignments or [])

    from dae.merging.to_lora import to_lora as run

    result = run(loaded)
    summary = result.summary
    ranks = summary["rank"]
    typer.echo(
        f"{result.path}: finished, {summary['matrices']} matrices, rank {ranks['lowest']} to {ranks['highest']}, "
        f"{summary['energy_kept']:.2%} of their squared difference kept"
    )
    for kind, share in summary["by_kind"].items():
        typer.echo(f"  {kind:<12} {share:.2%}")
    norms = ", ".join(f"{kind} {norm:.3g}" for kind, norm in summary["left_out"].items())
    typer.echo(f"  not carried: {summary['left_out_share']:.2%} of the whole (norms of the differences: {norms})")


def expert_flags(experts: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`--expert [NAME=]PATH` as dotted keys, and each key's flag for messages. Nameless ones are numbered from 0."""
    flags: dict[str, Any] = {}
    names: dict[str, str] = {}
    for place, text in enumerate(experts):
        name, equals, path = text.partition("=")
        if not (equals and ROUTE_NAME.fullmatch(name)):
            name, path = str(place), text
        key = f"experts.{name}.path"
        if key in flags:
            raise UserError(f"--expert {text}: names two experts alike")
        flags[key], names[key] = path, "--expert"
    return flags, names
