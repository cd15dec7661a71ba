"""Whether the first of several processes waits for the others before it may refuse a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MET, EARLY = "others-have-met", "refused-early"  # files in the folder of the run


@dataclass(frozen=True)
class Meets:
    """To be armed in a process, like processes.Signal: it writes MET when it waits for the others."""

    def arm(self) -> None:
        from accelerate import PartialState

        wait = PartialState.wait_for_everyone

        def noted(state: PartialState) -> None:
            Path(MET).touch()
            wait(state)

        setattr(PartialState, "wait_for_everyone", noted)  # noqa: B010


@dataclass(frozen=True)
class RefusesEarly:
    """In the first process: it writes EARLY if it judges a recipe before MET is there."""

    def arm(self) -> None:
        from kd.training import wrapping

        judge = wrapping.refuse_unshardable

        def noted(*given: object) -> None:
            if not Path(MET).exists():
                Path(EARLY).touch()
            judge(*given)  # type: ignore[arg-type]

        setattr(wrapping, "refuse_unshardable", noted)  # noqa: B010
