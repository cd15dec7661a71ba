"""The command of each training stage (`dae align`, ...): train, or only check with `--check`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dae.checking.processes import Scaling, asked_scaling
from dae.commands.recipe_command import recipe_command
from dae.stages import STAGES, StageEntry
from kd.config.stage_recipe import StageRecipe
from kd.errors import UserError
from kd.runs.provenance import HELD_OUT

if TYPE_CHECKING:
    from kd.stages.run_stage import RunResult

KEY_SWITCHES = {"merge": Annotated[bool | None, typer.Option("--merge", help="also write merged full weights")]}
SECONDS_FOR_FIRST_RANK = 10  # to end with its message, and the launcher to end the others
ProcessesOption = Annotated[
    int | None, typer.Option("--processes", metavar="N", help="with --check: also for N processes; needs --plan")
]
PlanOption = Annotated[
    str | None, typer.Option("--plan", metavar="PLAN", help="of these processes: ddp, or fsdp2, which splits weights")
]
SWITCHES = {
    "check": Annotated[bool | None, typer.Option("--check", help="only check, as `dae check` does; train nothing")],
    "load_weights": Annotated[
        bool | None, typer.Option("--weights", help="with --check: load the weights and measure where training starts")
    ],
    "processes": ProcessesOption,
    "plan": PlanOption,
}


def stage_command(name: str) -> Callable[..., None]:
    entry = STAGES[name]

    def run(
        recipe: StageRecipe, check: bool | None, load_weights: bool | None, processes: int | None, plan: str | None
    ) -> None:
        if check:
            check_stage(entry, recipe, bool(load_weights), asked_scaling(processes, plan))
            return
        for option, value in (("--weights", load_weights), ("--processes", processes), ("--plan", plan)):
            if value:
                raise UserError(f"{option}: works with --check only: dae check {name} ... {option}")
        run_stage(entry, recipe)

    return recipe_command(entry.recipe, run, SWITCHES, KEY_SWITCHES)


def run_stage(entry: StageEntry, recipe: StageRecipe) -> None:
    from kd.stages.run_stage import run_stage

    report_run(run_stage(entry.load(), recipe))


def check_stage(
    entry: StageEntry, recipe: StageRecipe, load_weights: bool = False, scaling: Scaling | None = None
) -> None:
    """Show what a run of this recipe would do. Raises UserError with everything that would stop it."""
    from dae.checking.check import check

    check(entry.load(), recipe, load_weights=load_weights, scaling=scaling)


def report_run(result: RunResult) -> None:
    """Print a finished run's folder, and each route's divergence from its teacher before and after training."""
    if not is_first_rank():
        return
    summary = result.summary
    typer.echo(f"{result.path}: finished, {summary['steps']} steps")
    for route in summary["rows"]:
        if not route.startswith(HELD_OUT):
            typer.echo(f"  {route:<12} {route_line(route, summary)}")
    if "budget" in summary:
        typer.echo(f"  {'budget':<12} {budget_line(summary['budget'])}")


def budget_line(budget: Mapping[str, Any]) -> str:
    """Whether a route's budget was met, by how much, and where that was measured."""
    if budget["kl"] is None:
        return f"{budget['route']}: not measured ({budget['measured_on']})"
    share = budget["kl"] / budget["nats"] - 1
    verdict = f"met, {-share:.0%} below" if budget["met"] else f"not met, {share:.0%} above"
    return f"{budget['route']} KL {nats(budget['kl'])} of {budget['nats']:g} nats: {verdict} ({budget['measured_on']})"


def route_line(route: str, summary: Mapping[str, Any]) -> str:
    """One route's result. `last` holds the newest value of each metric, which need not be from the last step."""
    last, evaluated = summary["last"], summary["held_out"]
    if f"{route}/kl" in last:
        line = f"KL to its teacher {nats(summary['initial_kl'].get(route, 0.0))} -> {nats(last[f'{route}/kl'])}"
    elif f"{route}/ntp" in last:
        line = f"next-token loss {nats(last[f'{route}/ntp'])}"
    else:
        line = "no logged step had any of its rows"
    measured = evaluated.get(f"eval_{route}_kl", evaluated.get(f"eval_{route}_ntp"))
    return line if measured is None else f"{line}; eval set {nats(measured)}"


def nats(value: float) -> str:
    """Three digits; no minus sign on what rounds to 0."""
    return f"{round(value, 3) + 0.0:.3f}"


def is_first_rank() -> bool:
    """Whether this process prints for the run (torchrun and accelerate number their processes)."""
    return os.environ.get("RANK", "0") == "0"


def says_errors() -> bool:
    """Whether this process prints the error that ends it: the first rank, and a rank that fails without the first.

    torchrun and accelerate end all processes once one has ended, so that another rank's end could come before the first
    rank's message. It waits to be ended.
    """
    if is_first_rank():
        return True
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    time.sleep(SECONDS_FOR_FIRST_RANK)
    return True
