"""Which of a task's metrics is its score, and what that metric gives one document.

Two models are compared document by document, so a metric must have a value per document. Each metric of lm-eval has a
function that makes one number of all documents: where it is a plain mean, documents have scores; where it is that of a
loss (bits per byte, ...), they have losses and weights; any other metric (BLEU, MCC, ...) is of the whole corpus only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lm_eval.api.metrics
import numpy as np

from dae_eval.harness import name_of
from dae_eval.results import Kind, Unit
from kd.errors import UserError

ON_0_TO_1 = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
_LOSSES: Mapping[str, tuple[Callable[[Any], float], Unit]] = {
    "bits_per_byte": (lm_eval.api.metrics.bits_per_byte, "bits per byte"),
    "byte_perplexity": (lm_eval.api.metrics.weighted_perplexity, "byte perplexity"),
    "word_perplexity": (lm_eval.api.metrics.weighted_perplexity, "word perplexity"),
    "brier_score": (lm_eval.api.metrics.brier_score, "Brier score"),
}
_PROBES = ([0.0, 1.0, 1.0, 0.5], [0.25, 0.0, 0.0, 0.0, 1.0])  # median, maximum, ... differ from the mean
_OF_THE_CORPUS = "of the whole corpus, with no value per document"
_LOWER = "lower is better, so it is not a score"
_ONLY_SHOWN = "a loss, which can only be shown"


@dataclass(frozen=True)
class Metric:
    """The metric of a task. key: `NAME`, or `NAME,FILTER` if the task has several filters; others: that could be it."""

    name: str
    filter: str
    key: str
    unit: Unit
    others: tuple[str, ...] = ()


def choose_metric(task: Any, wanted: str | None, kind: Kind, preferred: Sequence[str] = ()) -> Metric:
    """The metric that a suite names, else the first that fits the group's kind: a score before a loss.

    preferred: names to take before others, best first.

    Raises:
        UserError: the metric or filter is unknown, or the metric does not fit.
    """
    better = dict(task.higher_is_better())
    filters = [ensemble.name for ensemble in task._filters]
    name, _, filter_name = (wanted or "").partition(",")
    listed = f"task {name_of(task)}: its metrics are {', '.join(better)}"
    if len(filters) > 1:
        listed += f" and its filters {', '.join(filters)}"
    if name and name not in better and not _may_appear(task, name):
        raise UserError(f"{listed}; metric: {wanted!r}: unknown metric")
    if filter_name and filter_name not in filters:
        raise UserError(f"{listed}; metric: {wanted!r}: unknown filter")
    obstacles = {metric: _obstacle(task, metric, kind) for metric in dict.fromkeys((*better, *([name] * bool(name))))}
    usable = [metric for metric in sorted(better, key=partial(_rank, task, preferred)) if not obstacles[metric]]
    if not name and not usable:
        raise UserError(f"task {name_of(task)}: {_reasons(obstacles)}; {_remedy(task, usable, kind)}")
    name = name or usable[0]
    if obstacles[name]:
        raise UserError(
            f"task {name_of(task)}: metric: {name}: {obstacles[name]}; {_remedy(task, usable, kind, named=name)}"
        )
    chosen = filter_name or filters[0]
    key = f"{name},{chosen}" if len(filters) > 1 else name
    others = tuple(metric for metric in usable if metric != name)
    return Metric(name, chosen, key, _loss_unit(task, name) or "points", others)


def _may_appear(task: Any, name: str) -> bool:
    """Whether documents may have a metric that the task does not list: its own code makes them."""
    is_written = task.get_config("output_type") == "generate_until" and name in ON_0_TO_1
    return is_written or callable(task.get_config("process_results"))


def _loss_unit(task: Any, name: str) -> Unit | None:
    function, unit = _LOSSES.get(name, (None, None))
    return unit if function is not None and task.aggregation().get(name) is function else None


def _obstacle(task: Any, name: str, kind: Kind) -> str:
    """Why a metric cannot be the score of a task in a group of this kind, or nothing."""
    if _loss_unit(task, name) is not None:
        return "" if kind == "shown" else _ONLY_SHOWN
    # lm-eval takes the mean of a metric that has no function.
    if not _is_mean(task.aggregation().get(name, lm_eval.api.metrics.mean)):
        return _OF_THE_CORPUS
    return _LOWER if task.higher_is_better().get(name) is False else ""


def _is_mean(aggregate: Callable[[list[float]], Any]) -> bool:
    """Whether a function is the plain mean of numbers, whoever wrote it."""
    try:
        return all(math.isclose(float(aggregate(list(some))), sum(some) / len(some)) for some in _PROBES)
    except Exception:  # noqa: BLE001 - the task's own code, made for other values than numbers
        return False


def _rank(task: Any, preferred: Sequence[str], name: str) -> tuple[bool, bool, int, bool]:
    """Smaller is better; metrics of one rank keep the task's order."""
    is_loss = _loss_unit(task, name) is not None
    place = preferred.index(name) if name in preferred else len(preferred)
    return is_loss, is_loss and name != "bits_per_byte", place, name not in ON_0_TO_1


def _reasons(obstacles: Mapping[str, str]) -> str:
    """`bleu, ter: of the whole corpus ...; wer: lower is better ...`."""
    by_reason: dict[str, list[str]] = {}
    for metric, reason in obstacles.items():
        by_reason.setdefault(reason, []).append(metric)
    listed = "; ".join(f"{', '.join(metrics)}: {reason}" for reason, metrics in by_reason.items())
    return f"no metric that can be its score ({listed})"


def _remedy(task: Any, usable: Sequence[str], kind: Kind, named: str = "") -> str:
    losses = [name for name in sorted(task.higher_is_better(), key=partial(_rank, task, ())) if _loss_unit(task, name)]
    ways = [f"use {' or '.join(usable)}"] if usable else []
    if kind != "shown" and (named in losses if named else losses):
        ways.append(f"put the task in a group of `kind: shown`{'' if named else f', which shows {losses[0]}'}")
    return ", or ".join(ways) or "the task cannot be in a suite: remove it"


def value_of(metric: Metric, task: Any, sample: Mapping[str, Any]) -> tuple[float, float]:
    """A document's score or loss, and its weight in the task's mean, from lm-eval's sample.

    Raises:
        UserError: the metric has no such value for the document.
    """
    where = f"task {name_of(task)}: metric: {metric.name}"
    if metric.name not in sample["metrics"]:
        raise UserError(f"{where}: document {sample['doc_id']} has {', '.join(sample['metrics'])}; name one of them")
    value, remedy = sample[metric.name], f"use {' or '.join(metric.others)}" if metric.others else "remove the task"
    try:
        score, weight = _READ[metric.unit](value)
    except (TypeError, ValueError, IndexError) as error:
        what = f"{value!r} for document {sample['doc_id']}"
        raise UserError(f"{where}: {what} is not {_WANTED.get(metric.unit, 'a loss')}; {remedy}") from error
    if not math.isfinite(score):
        raise UserError(f"{where}: the loss of document {sample['doc_id']} is {score}; {remedy}")
    return score, weight


def _score(value: Any) -> tuple[float, float]:
    if not isinstance(value, (bool, int, float, np.number)) or not 0 <= float(value) <= 1:
        raise ValueError
    return float(value), 1.0


def _nats_per_part(value: tuple[float, int]) -> tuple[float, float]:
    """The loss per byte or word of a document; an empty one weighs nothing."""
    log_likelihood, parts = value
    return (-float(log_likelihood) / parts if parts else 0.0), float(parts)


def _bits_per_part(value: tuple[float, int]) -> tuple[float, float]:
    nats, parts = _nats_per_part(value)
    return nats / math.log(2), parts


def _brier(value: tuple[int, Any]) -> tuple[float, float]:
    """The sum over choices of (probability - 1 for the right one, else 0) squared."""
    right, probabilities = value
    if not 0 <= right < len(probabilities):
        raise ValueError
    return float(((np.asarray(probabilities) - np.eye(len(probabilities))[right]) ** 2).sum()), 1.0


_READ: Mapping[Unit, Callable[[Any], tuple[float, float]]] = {
    "points": _score,
    "bits per byte": _bits_per_part,
    "byte perplexity": _nats_per_part,
    "word perplexity": _nats_per_part,
    "Brier score": _brier,
}
_WANTED: Mapping[Unit, str] = {"points": "a score on 0..1", "Brier score": "one right choice and probabilities"}
