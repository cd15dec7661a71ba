"""lm-eval on a model that is already in memory: one task at a time, without its side effects.

Its side effects are disabled: the model's own generation settings (generation_config.json), progress bars and advice,
the seeding of the global random states, the cache (which ignores the model), and the calls to git, pip and the hub.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from kd.data.chat import UnrenderableError, template_errors
from kd.errors import UserError
from kd.models.template_limits import limit_chat_templates

# lm-eval's own defaults, so that shots and sampled answers are those of its command line.
SHOTS_SEED = 1234
PYTHON_SEED, NUMPY_SEED, TORCH_SEED = 0, 1234, 1234
DEFAULT_NEW_TOKENS = 256
_KEPT_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_TOO_LONG = re.compile("Combined length of context|Left truncation applied")

Progress = Callable[[int, int], None]  # answered requests, all requests


def cut_in_two_ways(requests: Sequence[tuple[Any, list[int], list[int]]]) -> bool:
    """Whether the same tokens are divided into context and answer in two ways, such as "a | b c" and "a b | c".

    lm-eval asks the model once for both, and then reads the likelihoods of the shorter answer at the wrong places.
    """
    cuts: dict[tuple[int, ...], int] = {}
    return any(cuts.setdefault((*context, *ids[:-1]), len(context)) != len(context) for _, context, ids in requests)


class NotANumber(Exception):  # noqa: N818 - the error of a user is made of it, with the document's name
    """A likelihood or logit is NaN or +infinity (-infinity is a token that the model rules out).

    request: its texts, or the first ones, as lm-eval gives them to the model.
    """

    def __init__(self, *request: str) -> None:
        super().__init__(*request)
        self.request = request


class Harness(HFLM):
    """A model in memory for lm-eval; `truncated` counts requests that were longer than the model's context.

    model: a transformers model, also with adapters; max_length: tokens, None for the model's own; name: in messages.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int | None = None,
        progress: Progress = lambda _done, _total: None,
        name: str = "the model",
    ) -> None:
        wrapped: Any = {"pretrained": model, "tokenizer": tokenizer}  # the declared types are too narrow
        with no_advice(), as_it_was(model):
            super().__init__(**wrapped, batch_size=batch_size, max_length=max_length)
        self.truncated = 0
        self.progress = progress
        self.name = name
        self._windows: list[str] = []  # of rolling requests: for each, the text that it is a part of
        self._done = 0
        self._batch: list[str] = []  # prompts that are being continued
        self.set_cache_hook(_Watch())

    def apply_chat_template(self, *arguments: Any, **named: Any) -> str:
        return rendered_chat(self, *arguments, **named)

    def loglikelihood_rolling(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        texts = [request.args[0] for request in requests]
        windows = [math.ceil(len(self.tok_encode(text)) / self.max_length) for text in texts]
        self._windows = [text for text, n in zip(texts, windows, strict=True) for _ in range(n)]
        self._done = 0
        return super().loglikelihood_rolling(requests, *arguments, **named)

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        self.logits_cache = not cut_in_two_ways(requests)
        if requests and requests[0][0] is None:  # windows of rolling requests, one batch at a time, never too long
            found = super()._loglikelihood_tokens(requests, *arguments, **{**named, "disable_tqdm": True})
            asked = self._windows[self._done : self._done + len(found)]
            for (value, _), text in zip(found, asked, strict=True):
                refuse_not_a_number(value, text)
            self._done += len(found)
            self.progress(self._done, len(self._windows))
            return found
        for (context, _), context_ids, ids in requests:
            if len(ids) > self.max_length:
                raise UserError(
                    f"an answer of {len(ids)} tokens is longer than the model's context of {self.max_length}; remove "
                    f"its document from the task. The prompt ends in: {str(context)[-80:]!r}"
                )
            self.truncated += len(context_ids) + len(ids) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, *arguments, **named)

    def tok_batch_encode(self, strings: Any, *arguments: Any, **named: Any) -> Any:
        self._batch = list(strings)
        room = named.get("left_truncate_len")
        if room:
            self.truncated += sum(len(self.tok_encode(string)) > room for string in strings)
        return super().tok_batch_encode(strings, *arguments, **named)

    def _model_generate(self, *arguments: Any, **named: Any) -> Any:
        watched = LogitsProcessorList([_WatchedLogits(self._batch)])
        return super()._model_generate(*arguments, **named, logits_processor=watched)


def refuse_not_a_number(value: float, *request: str) -> None:
    if math.isnan(value) or value == math.inf:
        raise NotANumber(*request)


class _Watch(CacheHook):
    """Stands for lm-eval's cache, which is given each answer at once: a broken model is refused at the first one."""

    def __init__(self) -> None:
        super().__init__(None)

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        if kind == "loglikelihood":
            refuse_not_a_number(answer[0], *request)


class _WatchedLogits(LogitsProcessor):
    """Leaves logits as they are. prompts: those of the batch; each may have several rows (beams)."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wrong = (scores.isnan() | scores.isposinf()).any(dim=-1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise NotANumber(self.prompts[row * len(self.prompts) // len(wrong)])
        return scores


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., str]:
    """lm-eval's function that renders a conversation, without a model."""
    model: Any = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    return partial(rendered_chat, model)


def rendered_chat(model: Any, *arguments: Any, **named: Any) -> str:
    """A conversation as lm-eval renders it, within kd.models.template_limits. Raises UserError."""
    limit_chat_templates()
    try:
        with template_errors(model.tokenizer):
            return HFLM.apply_chat_template(model, *arguments, **named)
    except UnrenderableError as error:
        raise UserError(
            f"{model.tokenizer.name_or_path}: its chat template rejects a document of the tasks: {error}; set "
            "chat_template to false, or to another .jinja file"
        ) from error


def build_requests(task: Any, limit: int | None, chat: Callable[..., str] | None) -> list[Any]:
    """The requests of `run_task`, in the same order and with the same shots."""
    task.set_fewshot_seed(SHOTS_SEED)
    with seeded(), no_advice(), _bars(lambda _done, _total: None):
        task.build_all_requests(
            limit=limit, apply_chat_template=chat is not None, fewshot_as_multiturn=chat is not None, chat_template=chat
        )
    return list(task.instances)


def run_task(harness: Harness, task: Any, limit: int | None, with_chat: bool) -> list[dict[str, Any]]:
    """lm-eval's samples of one task, as `--log_samples` writes them, in the order of the documents."""
    task.set_fewshot_seed(SHOTS_SEED)
    with (
        as_it_was(harness.model),
        neutral_generation(harness.model),
        _no_aggregates(task),
        _no_long_texts(),
        _bars(harness.progress),
    ):
        try:
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
        except NotANumber as error:
            raise UserError(_not_a_number(harness, task, error.request)) from error
    return sorted(results["samples"][name_of(task)], key=lambda sample: int(sample["doc_id"]))


def _not_a_number(harness: Harness, task: Any, request: tuple[str, ...]) -> str:
    document = next(one.doc_id for one in task.instances if one.args[: len(request)] == request)
    dtype = str(getattr(harness.model, "dtype", "")).removeprefix("torch.")
    return (
        f"{harness.name}: task {name_of(task)}: document {document}: the model's likelihoods are not numbers (NaN or "
        f"infinity, in {dtype}); its weights are damaged or overflow: check the checkpoint, or evaluate an earlier one"
    )


def name_of(task: Any) -> str:
    """A task's name; lm-eval's `task_name` draws a random number at every access."""
    return str(task.get_config("task"))


def documents_in(task: Any) -> int:
    """The number of documents that a task has without a limit."""
    loaded = getattr(task, "task_docs", None)  # of tasks from YAML; `eval_docs` processes all documents again
    return len(task.eval_docs if loaded is None else loaded)


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
def no_advice() -> Iterator[None]:
    """Hide lm-eval's advice on its command line while it loads; warnings while scoring are kept."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _no_aggregates(task: Any) -> Iterator[None]:
    """Leave out lm-eval's scores of the whole task, which we do not use and which some tasks cannot have."""
    task.aggregation = lambda: defaultdict(lambda: lambda _values: None)
    try:
        yield
    finally:
        del task.aggregation


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
            self.counts = str(options.get("desc", "")).startswith("Running") and not options.get("disable")
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
