"""A report of models, for `dae report` and for `dae.report` in Python: evaluate, compare, judge."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dae.commands.stopping import going_on
from dae.exit_status import as_own_errors
from dae.process import quiet_libraries
from kd.errors import UserError

if TYPE_CHECKING:
    from dae_eval.report import Report
    from dae_eval.results import Evaluation

ROLES = ("base", "expert", "reference", "student")


@dataclass(frozen=True)
class Bounds:
    """What a student must reach: points, a part of the expert's gain, points."""

    margin: float = 1.0
    min_gap: float = 0.0
    max_task_loss: float = 5.0

    def check(self, prefix: str = "") -> None:
        """Raise UserError where a bound is not a number, or out of range. prefix: of the names, `--` for flags."""
        for name, bound in vars(self).items():
            if not isinstance(bound, (int, float)):
                raise UserError(f"{shown(name, prefix)}: expected a number, not {type(bound).__name__}")
        for name, points in (("margin", self.margin), ("max_task_loss", self.max_task_loss)):
            if not 0 < points <= 100:
                raise UserError(f"{shown(name, prefix)} {points:g}: must be above 0 and at most 100, in points")
        if not 0 <= self.min_gap <= 1:
            raise UserError(f"{shown('min_gap', prefix)} {self.min_gap:g}: must be from 0 to 1")


@dataclass(frozen=True)
class Request:
    """What `dae.report` is asked.

    models: by role, as given; compare: other students by name; settings: keys of the suite by dotted names.
    """

    models: Mapping[str, str]
    compare: Mapping[str, str]
    suite: Path
    settings: Mapping[str, Any]
    bounds: Bounds
    allow_missing: Sequence[str]
    retention_only: bool

    def check(self) -> None:
        """Raise UserError where arguments are missing, or a bound is out of range."""
        needed = ["student", *([] if self.retention_only else ["base", "expert"])]
        missing = [role for role in needed if role not in self.models]
        if self.retention_only and not {"base", "reference"} & self.models.keys():
            missing.append("reference")
        if missing:
            raise UserError(f"report(): {', '.join(missing)}: required; without an expert pass retention_only=True")
        if taken := [name for name in self.compare if name in ROLES]:
            raise UserError(f"report(compare=...): {taken[0]}: is a role; choose another name")
        self.bounds.check()


def compared(request: Request, output: Path) -> Report:
    """Evaluate the models into OUTPUT/evaluations/ROLE, and judge the student. Raises UserError, Stopped."""
    request.check()
    models = with_reference(request.models, request.compare)
    command = ["dae", "report", *(f"--{role}={path}" for role, path in request.models.items())]
    command += [*(f"--compare={name}={path}" for name, path in request.compare.items()), f"--suite={request.suite}"]
    settings = [f"{key}={json.dumps(value, default=str)}" for key, value in request.settings.items()]  # JSON is YAML
    evaluations = ask_models(models, request.suite, settings, output, [*command, *settings])
    return judged(evaluations, request.bounds, request.allow_missing, request.retention_only, [*command, *settings])


def with_reference(given: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Model by role, and by name for other students; without a reference, the base is the reference."""
    models = dict(given)
    if "base" in models:
        models.setdefault("reference", models["base"])
    return models | dict(others)


def ask_models(
    paths: Mapping[str, str],
    suite: Path,
    assignments: Sequence[str],
    output: Path,
    command: Sequence[str],
    prefix: str = "",
) -> dict[str, Evaluation]:
    """Evaluate every model into OUTPUT/evaluations/ROLE. prefix: of roles in messages, `--` for flags."""
    from dae_eval.suites import load_suite

    loaded = load_suite(suite, assignments)

    from dae_eval.evaluation import evaluate
    from dae_eval.models import locate

    from kd.models.checkpoint import checkpoint

    base = paths.get("base", paths.get("reference"))
    shared = base if base is not None and not checkpoint(base).is_adapter else None
    with going_on(output, "finished tasks are kept"):
        models = {role: locate(f"{prefix}{role}", path, shared) for role, path in paths.items()}
        return evaluate(models, loaded, {role: output / "evaluations" / role for role in models}, command)


def judged(
    evaluations: Mapping[str, Evaluation],
    bounds: Bounds,
    allow_missing: Sequence[str],
    retention_only: bool,
    command: Sequence[str],
) -> Report:
    """The report on evaluations by role; models of other names are other students."""
    from dae_eval.comparing.comparison import compare

    from kd.runs.environment import masked

    return compare(
        evaluations,
        margin=bounds.margin,
        min_gap=bounds.min_gap,
        max_task_loss=bounds.max_task_loss,
        allow_missing=allow_missing,
        retention_only=retention_only,
        others=[name for name in evaluations if name not in ROLES],
        command=shlex.join(masked(command)),
    )


def shown(name: str, prefix: str) -> str:
    """An argument's name as typed: a flag where there is a prefix."""
    return f"{prefix}{name.replace('_', '-')}" if prefix else name


# -- from Python --


@dataclass(frozen=True)
class ReportResult:
    """A report on a student.

    Attributes:
        path: the folder of the report; report.html in it is the page.
        data: all its figures.
    """

    path: Path
    data: Report = field(repr=False)

    @property
    def verdict(self) -> str:
        """PASS, FAIL or INCONCLUSIVE; PASS if every line passes."""
        return self.data.word

    def __repr__(self) -> str:
        return f"ReportResult({self.verdict}, {self.path / 'report.html'})"

    def _repr_markdown_(self) -> str:
        from dae_eval.rendering.markdown import section

        return section(self.data)


def as_path(name: str, value: Any) -> str:
    """An argument that is a path, as text. Raises UserError."""
    if not isinstance(value, (str, os.PathLike)):
        raise UserError(f"report(): {name}: expected a path, not {type(value).__name__}")
    return str(os.fspath(value))


def report(
    base: str | os.PathLike[str] | None = None,
    expert: str | os.PathLike[str] | None = None,
    student: str | os.PathLike[str] | None = None,
    *,
    suite: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    compare: Mapping[str, str | os.PathLike[str]] | None = None,
    args: Mapping[str, Any] | None = None,
    margin: float = 1.0,
    min_gap: float = 0.0,
    max_task_loss: float = 5.0,
    allow_missing: Sequence[str] = (),
    retention_only: bool = False,
) -> ReportResult:
    """Score the models on the same documents, and judge the student: gap closed, retention, worst task.

    Args:
        base: the model that the expert started from.
        expert: the model trained on the domain; not needed with `retention_only`.
        student: the model to judge.
        suite: a YAML file of lm-eval tasks in groups.
        output_dir: folder of the report and of the answers; finished tasks in it are not asked again.
        reference: the model whose general skills must be kept, by default the base.
        compare: other students by name, shown beside the student.
        args: keys of the suite by dotted names, `{"batch_size": 8}`.
        margin: largest accepted loss on general tasks, in points.
        min_gap: smallest accepted part of the expert's gain, 0 to 1.
        max_task_loss: largest accepted loss of a single task, in points.
        allow_missing: tasks that models, or documents of them, may lack.
        retention_only: compare without an expert.

    Returns:
        The report; a notebook shows its verdict.

    Raises:
        UserError: models, suite or bounds are wrong (a ValueError).
        MachineError: disk or memory is full.
    """
    roles = {"base": base, "expert": expert, "reference": reference, "student": student}
    if compare is not None and not isinstance(compare, Mapping):
        raise UserError(f"report(): compare: expected {{name: path}}, not {type(compare).__name__}")
    request = Request(
        models={role: as_path(role, path) for role, path in roles.items() if path is not None},
        compare={name: as_path(f"compare.{name}", path) for name, path in (compare or {}).items()},
        suite=Path(as_path("suite", suite)),
        settings=args or {},
        bounds=Bounds(margin, min_gap, max_task_loss),
        allow_missing=allow_missing,
        retention_only=retention_only,
    )
    folder = Path(as_path("output_dir", output_dir))
    with quiet_libraries(), as_own_errors():
        from dae_eval.rendering import write_report

        found = compared(request, folder)
        write_report(found, folder)
    return ReportResult(folder, found)
