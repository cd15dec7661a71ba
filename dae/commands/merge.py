"""`dae merge moe | weights | to-lora`."""

from __future__ import annotations

import typer

from dae.commands.recipe_command import recipe_command
from dae.merging.recipe import MoeRecipe, ToLoraRecipe, WeightsRecipe


def merge_app() -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Merge checkpoints without training.")
    app.command("moe")(recipe_command(MoeRecipe, moe))
    app.command("weights")(recipe_command(WeightsRecipe, weights))
    app.command("to-lora")(recipe_command(ToLoraRecipe, to_lora))
    return app


def moe(recipe: MoeRecipe) -> None:
    from dae.merging.mixture import merge_moe

    result = merge_moe(recipe)
    summary = result.summary
    typer.echo(
        f"{result.path}: finished, {summary['experts']} experts, {summary['experts_per_token']} per token, "
        f"{summary['parameters']:,} parameters"
    )
    for name, share in summary["carried"].items():
        words = "is the base" if share is None else f"{share:.1%} of its squared difference to the base is in its MLPs"
        typer.echo(f"  expert {name}: {words}")


def weights(recipe: WeightsRecipe) -> None:
    from dae.merging.weights import merge_weights

    result = merge_weights(recipe)
    summary = result.summary
    typer.echo(
        f"{result.path}: finished, {summary['method']}, weight {summary['weight']:g}, "
        f"{summary['parameters']:,} parameters"
    )


def to_lora(recipe: ToLoraRecipe) -> None:
    from dae.merging.to_lora import to_lora

    result = to_lora(recipe)
    summary = result.summary
    ranks = summary["rank"]
    typer.echo(
        f"{result.path}: finished, {summary['matrices']} matrices, rank {ranks['lowest']} to {ranks['highest']}, "
        f"{summary['energy_kept']:.2%} of their squared difference kept"
    )
    for kind, share in summary["by_kind"].items():
        typer.echo(f"  {kind:<12} {share:.2%}")
    norms = ", ".join(f"{kind} {norm:.3g}" for kind, norm in summary["left_out"].items())
    typer.echo(f"  left out: {summary['left_out_share']:.2%} of the whole (norms of the differences: {norms})")
