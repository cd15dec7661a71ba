"""The suite: which tasks are asked, in which groups, and under which conditions. Read from YAML like a recipe.

    shipped: world                  # or `include: FOLDER` with task YAMLs; neither: lm-eval's own tasks
    metadata: {world: demo/world}   # reaches the tasks' loading functions
    chat_template: false            # false | true (the tokenizer's own) | FILE.jinja
    groups:
      domain: [world_price, {task: world_size, shots: 0, limit: 100}]
      general: [world_sorting]
      "only shown": {kind: shown, tasks: [world_colour]}

Nothing here imports lm-eval: whether a task exists is seen when it is loaded.
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
    """One task of a group."""

    task: str = Field(min_length=1, description="lm-eval's name of the task")
    shots: int | None = Field(default=None, ge=0, description="solved examples in the prompt; null: as the task says")
    limit: int | None = Field(default=None, ge=1, description="only so many documents, the first ones")
    metric: str | None = Field(
        default=None, min_length=1, description="per document on 0..1, `NAME` or `NAME,FILTER`; null: the first such"
    )
    cluster_by: str | None = Field(
        default=None, description="field of the document; equal there: one source. null: equal text of the question"
    )
    leak_by: str | None = Field(
        default=None,
        description="field whose text is looked up in training rows; null: the question with its right answer",
    )


class Group(Frozen):
    """Tasks that are shown together. `domain` counts in gap closed, `general` in retention, `shown` in neither."""

    kind: Kind = Field(default="shown", description="what the group's scores count in")
    tasks: tuple[TaskEntry, ...] = Field(description="names, or {task, shots, limit, metric, ...}")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        problems = []
        if "kind" not in raw:
            words = "counts in neither gap closed nor retention unless it says so: add kind: domain, general or shown"
            problems.append(Problem((), NO_VALUE, words))
        if "tasks" in raw and not raw["tasks"]:
            problems.append(Problem(("tasks",), NO_VALUE, "names no task: add one"))
        return problems


class Suite(Frozen):
    """What a model is asked. Paths are relative to the suite's file, or to where they were typed."""

    include: str | None = Field(default=None, min_length=1, description="folder with task YAMLs")
    shipped: str | None = Field(default=None, description="a set of tasks that comes with dae_eval: world")
    metadata: dict[str, Any] = Field(default_factory=dict, description="reaches the tasks' loading functions")
    chat_template: bool | str = Field(description="false, true (the tokenizer's own), or a .jinja file")
    batch_size: int = Field(default=64, ge=1, description="requests at a time")
    max_length: int | None = Field(default=None, ge=2, description="longest request in tokens; null: the model's own")
    groups: dict[str, Group] = Field(description="name: tasks, or name: {kind, tasks}")
    held_out: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="rows by route (general, domain) whose loss and KL are measured"
    )

    @field_validator("chat_template", mode="before")
    @classmethod
    def _choice_or_file(cls, value: Any) -> Any:
        if not isinstance(value, bool) and not (isinstance(value, str) and value):
            raise ValueError("wants false, true (the tokenizer's own), or a .jinja file")
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
        """The folder that the suite's task YAMLs lie in; None: all tasks are lm-eval's own."""
        if self.shipped is not None:
            return TASKS / self.shipped
        return None if self.include is None else Path(self.include)

    def entries(self) -> list[tuple[str, Kind, TaskEntry]]:
        """(group, kind, task) for every task, in the order of the file."""
        return [(name, group.kind, entry) for name, group in self.groups.items() for entry in group.tasks]


def load_suite(path: Path, assignments: Sequence[str] = ()) -> Suite:
    """Read a suite. `assignments` are `key=value` over it; a path that they name is relative to the working folder.

    Raises:
        UserError: one message with everything that is wrong.
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
    """A list of tasks as {kind, tasks}, task names as {task: NAME}; anything else is left for validation."""
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
        problems.append(Problem(("shipped",), shipped, f"no such set of tasks; there is {one_of(sets)}"))
    if shipped is not None and include is not None:
        problems.append(Problem(("include",), include, "beside `shipped`: tasks come from one folder; remove one"))
    return problems


def _group_problems(groups: Any) -> list[Problem]:
    if not isinstance(groups, Mapping):
        return []
    if not groups:
        return [Problem(("groups",), NO_VALUE, "names no group: add one, such as general: [TASK]")]
    problems, homes = [], dict[str, str]()
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            continue
        kind = group.get("kind")
        if name in KINDS and kind != name:
            words = f"a group called {name} is of that kind; give the group another name"
            problems.append(Problem(("groups", name, "kind"), kind, words))
        for place, entry in enumerate(group["tasks"] if isinstance(group.get("tasks"), (list, tuple)) else ()):
            task = entry.get("task") if isinstance(entry, Mapping) else None
            if isinstance(task, str) and task in homes:
                words = f"stands in {_two(homes[task], str(name))}: a task is asked once; remove one"
                problems.append(Problem(("groups", name, "tasks", place, "task"), task, words))
            elif isinstance(task, str):
                homes[task] = str(name)
    return problems


def _two(first: str, second: str) -> str:
    return f"`{first}` twice" if first == second else f"`{first}` and in `{second}`"


def _held_out_problems(held_out: Any) -> list[Problem]:
    if not isinstance(held_out, Mapping):
        return []
    problems = []
    for name, paths in held_out.items():
        if name not in HELD_OUT_ROUTES:
            problems.append(
                Problem(("held_out", str(name)), NO_VALUE, f"unknown route; wants {one_of(HELD_OUT_ROUTES)}")
            )
        elif isinstance(paths, tuple) and not paths:
            problems.append(Problem(("held_out", str(name)), (), "names no rows: add a path"))
    return problems
