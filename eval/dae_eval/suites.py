"""The suite: tasks, their groups and their conditions. Read from YAML like a recipe.

    shipped: world                  # or `include: FOLDER` with task YAMLs; neither: lm-eval's own tasks
    metadata: {world: demo/world}   # passed to the tasks' loading functions
    chat_template: false            # false | true (the tokenizer's own) | FILE.jinja
    groups:
      domain: [world_price, {task: world_size, shots: 0, limit: 100}]
      general: [world_sorting, mmlu]                        # mmlu: all its tasks, as one benchmark
      "only shown": {kind: shown, tasks: [world_colour]}    # losses (bits per byte, ...) too

This module does not import lm-eval; unknown tasks are reported when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, field_validator

from dae_eval.results import Kind
from kd.config.loading import load_recipe
from kd.config.problems import NO_VALUE, Problem, one_of
from kd.config.schema import Frozen, plain

TASKS = Path(__file__).parent / "tasks"
KINDS: tuple[Kind, ...] = get_args(Kind)
HELD_OUT_ROUTES = ("general", "domain")
_PATHS = ("include", "chat_template", "held_out")


class TaskEntry(Frozen):
    """One task of a group, or several by the name that lm-eval has for them; the keys are then of each."""

    task: str = Field(
        min_length=1, description="lm-eval's name of a task, or of several (a group or tag, such as mmlu)"
    )
    shots: int | None = Field(
        default=None, ge=0, description="solved examples in the prompt; null: the task's own number"
    )
    limit: int | None = Field(default=None, ge=1, description="number of documents, from the first on; null: all")
    metric: str | None = Field(
        default=None,
        min_length=1,
        description="`NAME` or `NAME,FILTER`; null: the first on 0..1 per document, or a loss where the kind is shown",
    )
    cluster_by: str | None = Field(
        default=None, description="field of the document that names its source; null: the text of the question"
    )
    leak_by: str | None = Field(
        default=None,
        description="field whose text is searched in training rows; null: the question with its right answer",
    )


class Group(Frozen):
    """Tasks shown together. `domain` counts in gap closed, `general` in retention, `shown` in neither."""

    kind: Kind = Field(default="shown", description="what the group's scores count in")
    tasks: tuple[TaskEntry, ...] = Field(description="names, or {task, shots, limit, metric, ...}")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        problems = []
        if "kind" not in raw:
            words = "`kind` is required: add kind: domain (gap closed), general (retention) or shown (neither)"
            problems.append(Problem((), NO_VALUE, words))
        if "tasks" in raw and not raw["tasks"]:
            problems.append(Problem(("tasks",), NO_VALUE, "must not be empty: add a task"))
        return problems


class Suite(Frozen):
    """The tasks for a model. Paths are relative to the suite's file, or to the working folder on the command line."""

    include: str | None = Field(default=None, min_length=1, description="folder with task YAMLs")
    shipped: str | None = Field(default=None, description="a set of tasks shipped with dae_eval: world")
    metadata: dict[str, Any] = Field(default_factory=dict, description="passed to the tasks' loading functions")
    chat_template: bool | str = Field(description="false, true (the tokenizer's own), or a .jinja file")
    batch_size: int = Field(default=64, ge=1, description="requests at a time")
    max_length: int | None = Field(default=None, ge=2, description="longest request in tokens; null: the model's own")
    groups: dict[str, Group] = Field(description="name: tasks, or name: {kind, tasks}")
    held_out: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="eval sets by route (general, domain), for loss and KL"
    )

    @field_validator("chat_template", mode="before")
    @classmethod
    def _choice_or_file(cls, value: Any) -> Any:
        if not isinstance(value, bool) and not (isinstance(value, str) and value):
            raise ValueError("must be false, true (the tokenizer's own), or a .jinja file")
        return value

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        expanded = dict(raw)
        if isinstance(raw.get("groups"), Mapping):
            expanded["groups"] = {name: _expand_group(name, value) for name, value in raw["groups"].items()}
        if isinstance(raw.get("held_out"), Mapping):
            paths = raw["held_out"].items()
            expanded["held_out"] = {name: plain((value,) if isinstance(value, str) else value) for name, value in paths}
        return expanded

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        return [*_place_problems(raw), *_group_problems(raw.get("groups")), *_held_out_problems(raw.get("held_out"))]

    @classmethod
    def key_elsewhere(cls, name: str) -> str | None:
        return f"groups.{name}" if name in KINDS else None

    @property
    def task_folder(self) -> Path | None:
        """The folder of the suite's task YAMLs; None: all tasks are lm-eval's own."""
        if self.shipped is not None:
            return TASKS / self.shipped
        return None if self.include is None else Path(self.include)

    def entries(self) -> list[tuple[str, Kind, TaskEntry]]:
        """(group, kind, task) for every task, in the order of the file."""
        return [(name, group.kind, entry) for name, group in self.groups.items() for entry in group.tasks]


def load_suite(path: Path, assignments: Sequence[str] = ()) -> Suite:
    """Read a suite. `assignments` (`key=value`) override it; their paths are relative to the working folder.

    Raises:
        UserError: one message with all problems.
    """
    suite = load_recipe(Suite, path, {}, assignments)
    typed = {assignment.partition("=")[0].split(".")[0] for assignment in assignments}
    placed = {key: _placed(getattr(suite, key), path.parent) for key in _PATHS if key not in typed}
    return suite.model_copy(update=placed)


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return str(folder / value)
    if isinstance(value, tuple):
        return tuple(_placed(item, folder) for item in value)
    return {key: _placed(item, folder) for key, item in value.items()} if isinstance(value, Mapping) else value


def _expand_group(name: Any, value: Any) -> Any:
    """A list of tasks as {kind, tasks}, task names as {task: NAME}; other values are left to validation."""
    if isinstance(value, (str, list, tuple)):
        value = {"tasks": value}
    if not isinstance(value, Mapping):
        return value
    group = dict(value)
    if name in KINDS:
        group.setdefault("kind", name)
    tasks = group.get("tasks")
    tasks = (tasks,) if isinstance(tasks, str) else tasks
    if isinstance(tasks, (list, tuple)):
        group["tasks"] = [{"task": task} if isinstance(task, str) else task for task in tasks]
    return group


def _place_problems(raw: Mapping[str, Any]) -> list[Problem]:
    shipped, include = raw.get("shipped"), raw.get("include")
    sets = sorted(folder.name for folder in TASKS.iterdir() if folder.is_dir() and not folder.name.startswith("_"))
    problems = []
    if isinstance(shipped, str) and shipped not in sets:
        problems.append(Problem(("shipped",), shipped, f"unknown set of tasks; expected {one_of(sets)}"))
    if shipped is not None and include is not None:
        problems.append(Problem(("include",), include, "cannot be combined with `shipped`; remove one"))
    return problems


def _group_problems(groups: Any) -> list[Problem]:
    if not isinstance(groups, Mapping):
        return []
    if not groups:
        return [Problem(("groups",), NO_VALUE, "must not be empty: add a group, such as general: [TASK]")]
    problems, homes = [], dict[str, str]()
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            continue
        kind = group.get("kind")
        if name in KINDS and kind != name:
            words = f"must be {name} for a group of this name; rename the group"
            problems.append(Problem(("groups", name, "kind"), kind, words))
        for place, entry in enumerate(group["tasks"] if isinstance(group.get("tasks"), (list, tuple)) else ()):
            task = entry.get("task") if isinstance(entry, Mapping) else None
            if isinstance(task, str) and task in homes:
                words = f"duplicate task, also in `{homes[task]}`; remove one"
                problems.append(Problem(("groups", name, "tasks", place, "task"), task, words))
            elif isinstance(task, str):
                homes[task] = str(name)
    return problems


def _held_out_problems(held_out: Any) -> list[Problem]:
    if not isinstance(held_out, Mapping):
        return []
    problems = []
    for name, paths in held_out.items():
        if name not in HELD_OUT_ROUTES:
            problems.append(
                Problem(("held_out", str(name)), NO_VALUE, f"unknown route; expected {one_of(HELD_OUT_ROUTES)}")
            )
        elif isinstance(paths, tuple) and not paths:
            problems.append(Problem(("held_out", str(name)), (), "must not be empty: add a path"))
    return problems
