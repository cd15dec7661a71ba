"""The options `--processes` and `--plan` of `dae check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kd.errors import UserError

ScalingPlan = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Scaling:
    """A number of processes and how they share a run: `ddp` or `fsdp2`."""

    processes: int
    plan: ScalingPlan

    @property
    def name(self) -> str:
        return self.plan.upper()


def asked_scaling(processes: int | None, plan: str | None) -> Scaling | None:
    """The two options, checked together; None without them. Raises UserError."""
    if processes is None and plan is None:
        return None
    known = get_args(ScalingPlan)
    if processes is None:
        raise UserError(f"--plan {plan}: needs a number of processes; add --processes N, such as 8")
    if plan is None:
        raise UserError(f"--processes {processes}: add --plan {' or --plan '.join(known)}")
    chosen = next((one for one in known if one == plan), None)
    if chosen is None:
        raise UserError(f"--plan {plan}: expected {' or '.join(known)}")
    if processes < 2:
        raise UserError(
            f"--processes {processes}: expected 2 or more; leave --processes and --plan out for one process"
        )
    return Scaling(processes, chosen)
