"""lm-eval on a model that is already in memory: one task at a time, without its side effects.

Its side effects are disabled: the model's own generation settings (generation_config.json), progress bars and advice,
the seeding of the global random states, the cache (which ignores the model), and the calls to git, pip and the hub.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, PreTrainedTokenizerBase

from kd.config.problems import suggestion
from kd.errors import UserError

# lm-eval's own defaults, so that shots and sampled answers are those of its command line.
SHOTS_SEED = 1234
PYTHON_SEED, NUMPY_SEED, TORCH_SEED = 0, 1234, 1234
DEFAULT_NEW_TOKENS = 256
_KEPT_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_TOO_LONG = re.compile("Combined length of context|Left truncation applied")

Progress = Callable[[int, int], None]  # answered requests, all requests


class Harness(HFLM):
    """A model in memory for lm-eval; `truncated` counts requests that were longer than the model's context.

    model: a transformers model, also with adapters; max_length: tokens, None for the model's own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int | None = None,
        progress: Progress = lambda _done, _total: None,
    ) -> None:
        wrapped: Any = {"pretrained": model, "tokenizer": tokenizer}  # the declared types are too narrow
        with _no_advice(), as_it_was(model):
            super().__init__(**wrapped, batch_size=batch_size, max_length=max_length)
        self.truncated = 0
        self.progress = progress

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        for (context, _), context_ids, ids in requests:
            if len(ids) > self.max_length:
                raise UserError(
                    f"an answer of {len(ids)} tokens is longer than the model's context of {self.max_length}; remove "
                    f"its document from the task. The prompt ends in: {str(context)[-80:]!r}"
                )
            self.truncated += len(context_ids) + len(ids) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, *arguments, **named)

    def tok_batch_encode(self, strings: Any, *arguments: Any, **named: Any) -> Any:
        room = named.get("left_truncate_len")
        if room:
            self.truncated += sum(len(self.tok_encode(string)) > room for string in strings)
        return super().tok_batch_encode(strings, *arguments, **named)


def load_tasks(names: Sequence[str], folder: Path | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's task objects by name, from the task YAMLs in `folder`, else from lm-eval's own.

    Raises:
        UserError: a task is unknown or stands for several, or its documents cannot be loaded.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"include: {folder}: folder not found; give the folder of your task YAMLs, or remove the key")
    with _no_advice():
        places: dict[str, Any] = {"include_path": None if folder is None else str(folder), "metadata": dict(metadata)}
        manager = TaskManager(include_defaults=folder is None, **places)
        if folder is not None and not set(names) <= set(manager.all_tasks):
            manager = TaskManager(**places)  # reads thousands of files
        refuse_unknown_tasks(names, manager, folder)
        return {name: _load_task(name, manager) for name in names}


def refuse_unknown_tasks(names: Sequence[str], manager: TaskManager, folder: Path | None) -> None:
    """Raise UserError for unknown tasks and for names of several tasks."""
    problems = []
    for name in names:
        if name in manager.all_subtasks:
            continue
        if name in manager.all_tasks:
            members = sorted(_members(name, manager))
            shown = ", ".join(members[:4]) + (", ..." if len(members) > 4 else "")
            problems.append(f"{name}: a group of {len(members)} tasks; name single tasks ({shown})")
        else:
            where = "lm-eval's own tasks" if folder is None else f"{folder} and lm-eval's own tasks"
            problems.append(f"{name}: unknown task in {where}{suggestion(name, manager.all_subtasks)}")
    if problems:
        raise UserError("\n".join(problems))


def _members(name: str, manager: TaskManager) -> set[str]:
    """The members of a group or tag of lm-eval that its file names."""
    entry = manager.task_index[name]
    listed = (entry.cfg or {}).get("task", ())
    named = {str(item.get("task", item.get("group")) if isinstance(item, Mapping) else item) for item in listed}
    return named | set(entry.tags) if not listed else named


def _load_task(name: str, manager: TaskManager) -> Any:
    try:
        with seeded():  # some tasks shuffle their choices when they are loaded
            task = manager.load([name])["tasks"][name]
    except Exception as error:  # the task's own code and the hub's clients raise what they like
        cause = error.__cause__ or error
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(
            f"task {name}: documents cannot be loaded: {type(cause).__name__}: {first}; check `metadata` in the suite, "
            "the task's YAML, and, for a hub data set, your network"
        ) from error
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name}: has images or sound, which text models cannot read; remove it")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {name}: runs code that the model writes, which is not supported; remove it")
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    return task


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


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """lm-eval's function that renders a conversation, without a model."""
    model: Any = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    return partial(HFLM.apply_chat_template, model)


def build_requests(task: Any, limit: int | None, chat: Callable[..., str] | None) -> list[Any]:
    """The requests of `run_task`, in the same order and with the same shots."""
    task.set_fewshot_seed(SHOTS_SEED)
    with seeded(), _no_advice(), _bars(lambda _done, _total: None):
        task.build_all_requests(
            limit=limit, apply_chat_template=chat is not None, fewshot_as_multiturn=chat is not None, chat_template=chat
        )
    return list(task.instances)


def run_task(harness: Harness, task: Any, limit: int | None, with_chat: bool) -> list[dict[str, Any]]:
    """lm-eval's samples of one task, as `--log_samples` writes them, in the order of the documents."""
    task.set_fewshot_seed(SHOTS_SEED)
    with as_it_was(harness.model), neutral_generation(harness.model), _no_long_texts(), _bars(harness.progress):
        # Not simple_evaluate, which calls git, pip and the hub and prints their output.
        results = evaluate(
            lm=harness,
            task_dict={"tasks": {name_of(task): task}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=with_chat,
            fewshot_as_multiturn=with_chat,
        )
    return sorted(results["samples"][name_of(task)], key=lambda sample: int(sample["doc_id"]))


def name_of(task: Any) -> str:
    """A task's name; lm-eval's `task_name` draws a random number at every access."""
    return str(task.get_config("task"))


def version_of(task: Any) -> str:
    metadata = task.get_config("metadata")
    version = metadata.get("version") if isinstance(metadata, Mapping) else None
    return str(task.VERSION if version is None else version)


def generation_settings(task: Any) -> dict[str, Any] | None:
    """The generation settings of a task: from its YAML, else lm-eval's defaults; None if it generates nothing."""
    if task.get_config("output_type") != "generate_until":
        return None
    given = dict(task.get_config("generation_kwargs") or {})
    new_tokens = next((int(given[name]) for name in _NEW_TOKENS if given.get(name) is not None), DEFAULT_NEW_TOKENS)
    kept = {name: value for name, value in given.items() if name not in _NEW_TOKENS}
    return {"do_sample": False, "temperature": 0.0, **kept, "max_gen_toks": new_tokens}


def refuse_unfit_length(
    tasks: Mapping[str, Any], config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None, path: str
) -> int:
    """The longest request in tokens. Raises UserError if the model has fewer positions, or no room for answers."""
    own = resolve_max_length(config, tokenizer)
    if max_length is not None and max_length > own:
        raise UserError(
            f"max_length: {max_length}: {path} has a context of {own} tokens; remove the key, or set max_length={own}"
        )
    length = max_length or own
    for name, task in tasks.items():
        settings = generation_settings(task)
        if settings is not None and settings["max_gen_toks"] >= length:
            raise UserError(
                f"task {name}: generates up to {settings['max_gen_toks']} tokens, but prompt and answer can have only "
                f"{length}; set generation_kwargs.max_gen_toks in the task's YAML"
            )
    return length


@contextmanager
def neutral_generation(model: Any) -> Iterator[None]:
    """Keep only the special token ids of the model's generation settings; the others would override the task's."""
    before = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(before, name, None) for name in _KEPT_GENERATION})
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def seeded() -> Iterator[None]:
    """Random states as lm-eval's command line sets them; the previous states are restored."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state
    try:
        with torch.random.fork_rng():
            random.seed(PYTHON_SEED)
            np.random.seed(NUMPY_SEED)  # noqa: NPY002
            torch.manual_seed(TORCH_SEED)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """`seeded`, and each module's training mode is restored (lm-eval calls `eval()`)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with seeded():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _no_advice() -> Iterator[None]:
    """Hide lm-eval's advice on its command line while it loads; warnings while scoring are kept."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _no_long_texts() -> Iterator[None]:
    """Hide lm-eval's warnings about truncated requests; `Harness.truncated` counts them."""
    logger = logging.getLogger("lm_eval.models.huggingface")

    def keep(record: logging.LogRecord) -> bool:
        return _TOO_LONG.match(record.getMessage()) is None

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    """Replace lm-eval's progress bars, which it cannot disable; their counts of requests go to `progress`."""
    modules: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    tqdm = modules[0].tqdm

    class Bar(tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.counts = str(options.get("desc", "")).startswith("Running")
            self.done = 0
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float = 1) -> None:
            if self.counts:
                self.done += int(n)
                progress(self.done, int(self.total))

    for module in modules:
        module.tqdm = Bar
    try:
        yield
    finally:
        for module in modules:
            module.tqdm = tqdm
