"""From the names in a suite to lm-eval's tasks: a name is a task, or a group or tag of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from dae_eval.harness import documents_in, name_of, no_advice, seeded
from dae_eval.metrics import Metric, choose_metric
from dae_eval.results import Kind
from dae_eval.suites import Suite, TaskEntry
from kd.config.problems import suggestion
from kd.errors import UserError

MOST_NAMES = 10  # of a benchmark's tasks, in messages
FEW_NAMES = 3


@dataclass(frozen=True)
class Benchmark:
    """The tasks of a name in a suite.

    tasks: by name, those of nested groups too; is_group: whether the name is a group or tag. scores: the group scores
    that lm-eval computes; counted: the task names that go into them (one in two nested groups counts twice).
    """

    name: str
    tasks: Mapping[str, Any]
    is_group: bool = False
    scores: tuple[AggMetricConfig, ...] = ()
    counted: tuple[str, ...] = ()

    def shares(self, metrics: Mapping[str, Metric], sizes: Mapping[str, int]) -> dict[str, float]:
        """The weight of each task in lm-eval's group score; equal where it has no score over all tasks (every tag).

        metrics, sizes: the metric, and the number of evaluated documents, of each task.
        """
        score = next((one for one in self.scores if all(_is_over(one, metric) for metric in metrics.values())), None)
        if score is None:
            return dict.fromkeys(self.tasks, 1 / len(self.tasks))
        times = Counter(self.counted)
        weights = {task: times[task] * (sizes[task] if score.weight_by_size else 1) for task in self.tasks}
        return {task: weight / sum(weights.values()) for task, weight in weights.items()}


@dataclass(frozen=True)
class Member:
    """One task of a suite. entry: as if the suite named this task; documents: evaluated ones, of `total`.

    benchmark: the group or tag that the suite names, or empty; share: the task's weight in the benchmark's score.
    """

    task: Any
    entry: TaskEntry
    group: str
    kind: Kind
    metric: Metric
    documents: int
    total: int
    benchmark: str
    share: float


def _is_over(score: AggMetricConfig, metric: Metric) -> bool:
    return score.metric == metric.name and (score.filter_list is None or metric.filter in score.filter_list)


def load_benchmarks(
    names: Sequence[str], folder: Path | None, metadata: Mapping[str, Any]
) -> tuple[dict[str, Benchmark], list[str]]:
    """The tasks of each name, from the task YAMLs in `folder`, else from lm-eval's own; and the names' problems.

    Raises:
        UserError: there is no such folder.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"include: {folder}: folder not found; give the folder of your task YAMLs, or remove the key")
    with no_advice():
        manager = _task_manager(names, folder, metadata)
        found, problems = dict[str, Benchmark](), list[str]()
        for name in names:
            try:
                found[name] = _load(name, manager, folder)
            except UserError as error:
                problems.append(str(error))
    return found, problems + _duplicates(found.values())


def load_tasks(names: Sequence[str], folder: Path | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """All tasks of the names, by name. Raises UserError with all problems."""
    found, problems = load_benchmarks(names, folder, metadata)
    if problems:
        raise UserError("\n".join(problems))
    return {name: task for benchmark in found.values() for name, task in benchmark.tasks.items()}


def _task_manager(names: Sequence[str], folder: Path | None, metadata: Mapping[str, Any]) -> TaskManager:
    places: dict[str, Any] = {"include_path": None if folder is None else str(folder), "metadata": dict(metadata)}
    manager = TaskManager(include_defaults=folder is None, **places)
    if folder is not None and not _all_names(names, manager) <= set(manager.all_tasks):
        manager = TaskManager(**places)  # reads thousands of files
    manager._factory = _Factory(meta=places["metadata"])
    return manager


def _all_names(names: Sequence[str], manager: TaskManager) -> set[str]:
    """The names and, recursively, those that the files of their groups list."""
    found, waiting = set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            entry = manager.task_index.get(name)
            waiting += _names_in((entry.cfg or {}).get("task")) if entry is not None else ()
    return found


def _names_in(listed: Any) -> Iterator[str]:
    """The names in the `task` of a group's file: plain, with settings, or in a group that is written out there."""
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            yield from _names_in(item.get("task", item.get("group")))


class _Factory(TaskFactory):
    """Loads each task from the same random states, whatever else is loaded: some tasks shuffle their choices."""

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        try:
            with seeded():
                return super()._build_task(entry, overrides)
        except Exception as error:  # the task's own code and the hub's clients raise what they like
            raise UserError(_not_loaded(f"task {entry.name}: documents", error)) from error


def _not_loaded(what: str, error: Exception) -> str:
    cause = error.__cause__ or error
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return (
        f"{what} cannot be loaded: {type(cause).__name__}: {first}; check `metadata` in the suite, "
        "the task's YAML, and, for a hub data set, your network"
    )


def _load(name: str, manager: TaskManager, folder: Path | None) -> Benchmark:
    if name not in manager.task_index:
        where = "lm-eval's own tasks" if folder is None else f"{folder} and lm-eval's own tasks"
        raise UserError(f"{name}: unknown task in {where}{suggestion(name, manager.all_tasks)}")
    try:
        with seeded():  # lm-eval draws a random name whenever it looks up that of a task
            loaded = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # a group's file, or a task that is written out there
        raise UserError(_not_loaded(f"{name}: its tasks", error)) from error
    tasks = dict(loaded["tasks"])
    if not tasks:
        raise UserError(f"{name}: a group without tasks; remove it, or add tasks to its YAML")
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    group = loaded.get("groups", {}).get(name)
    if group is None:
        return Benchmark(name, tasks, is_group=name in manager.all_tags)
    counted = tuple(name_of(task) for task in group.get_all_tasks())
    return Benchmark(name, tasks, True, tuple(group.aggregate_metric_list or ()), counted)


def load_members(suite: Suite) -> dict[str, Member]:
    """The tasks of a suite by name, in its order. Raises UserError with all problems."""
    found, problems = load_benchmarks([e.task for _, _, e in suite.entries()], suite.task_folder, suite.metadata)
    members: dict[str, Member] = {}
    for group, kind, entry in suite.entries():
        if entry.task in found:
            own, wrong = _members(found[entry.task], group, kind, entry)
            members |= own
            problems += wrong
    if problems:
        raise UserError("\n".join(problems))
    return members


def _members(benchmark: Benchmark, group: str, kind: Kind, entry: TaskEntry) -> tuple[dict[str, Member], list[str]]:
    """The tasks of an entry, each with the entry's keys; and their problems."""
    preferred = [score.metric for score in benchmark.scores]
    metrics, problems = dict[str, Metric](), dict[str, list[str]]()
    for name, task in benchmark.tasks.items():
        try:
            refuse_unfit(task)
            set_shots(task, entry.shots)
            metrics[name] = choose_metric(task, entry.metric, kind, preferred)
        except UserError as error:
            problems.setdefault(str(error).removeprefix(f"task {name}: "), []).append(name)
    if problems:
        return {}, _problem_lines(benchmark, problems, others=list(metrics))
    totals = {name: documents_in(task) for name, task in benchmark.tasks.items()}
    sizes = {name: min(total, entry.limit or total) for name, total in totals.items()}
    shares = benchmark.shares(metrics, sizes)
    return {
        name: Member(
            task=task,
            entry=entry.model_copy(update={"task": name}),
            group=group,
            kind=kind,
            metric=metrics[name],
            documents=sizes[name],
            total=totals[name],
            benchmark=benchmark.name if benchmark.is_group else "",
            share=shares[name],
        )
        for name, task in benchmark.tasks.items()
    }, []


def _problem_lines(benchmark: Benchmark, problems: Mapping[str, Sequence[str]], others: Sequence[str]) -> list[str]:
    """One line for each problem, and for a group a remedy. others: its tasks that have no problem."""
    whose = f" of `{benchmark.name}`" if benchmark.is_group else ""
    lines = [f"task{'s' * (len(names) > 1)} {', '.join(names)}{whose}: {what}" for what, names in problems.items()]
    if others:
        lines.append(f"{benchmark.name}: to have its other tasks, name them in its place: {some(others)}")
    return lines


def some(names: Sequence[str]) -> str:
    """A list of names, shortened."""
    return ", ".join(names if len(names) <= MOST_NAMES else [*names[:FEW_NAMES], "...", names[-1]])


def _duplicates(benchmarks: Iterable[Benchmark]) -> list[str]:
    """A line for the tasks that several names of the suite have in common."""
    homes: dict[str, list[str]] = {}
    for benchmark in benchmarks:
        for task in benchmark.tasks:
            homes.setdefault(task, []).append(f"`{benchmark.name}`" if benchmark.is_group else "alone")
    twice: dict[tuple[str, ...], list[str]] = {}
    for task, places in homes.items():
        if len(places) > 1:
            twice.setdefault(tuple(places), []).append(task)
    return [
        f"{', '.join(tasks)}: duplicate {'task' if len(tasks) == 1 else 'tasks'}, named in {' and '.join(places)}; "
        "remove one"
        for places, tasks in twice.items()
    ]


def set_shots(task: Any, shots: int | None) -> None:
    """Set the number of solved examples in a task's prompts (None: its own). Raises UserError if it has no examples."""
    if shots is not None:
        task.set_config("num_fewshot", shots)
    pool = task.get_config("fewshot_split") or task.get_config("training_split") or task.get_config("validation_split")
    given = getattr(task.get_config("fewshot_config"), "samples", None) or getattr(
        task.get_config("fewshot_config"), "split", None
    )
    if task.get_config("num_fewshot") and not pool and not given:
        raise UserError(
            f"task {name_of(task)}: shots: {task.get_config('num_fewshot')}: the task has no split for examples, so a "
            "document could be its own example; set shots: 0, or add a fewshot_split to the task"
        )


def refuse_unfit(task: Any) -> None:
    """Raise UserError for a task of images or sound, or one that runs code."""
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name_of(task)}: has images or sound, which text models cannot read; remove it")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {name_of(task)}: runs code that the model writes, which is not supported; remove it")
