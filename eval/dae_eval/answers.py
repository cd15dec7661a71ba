"""From lm-eval's documents and samples to readable answers, sources of documents, and guessing baselines."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import getsource
from typing import Any

import numpy as np
from lm_eval.utils import handle_non_serializable

from dae_eval.harness import build_requests, generation_settings, name_of
from dae_eval.metrics import Metric, value_of
from dae_eval.results import Document
from dae_eval.suites import TaskEntry
from kd.errors import UserError

_WHEREABOUTS = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs", "num_fewshot")
_CHOOSING = ("acc", "acc_norm", "acc_bytes")


@dataclass(frozen=True)
class Question:
    """A document that no model has answered yet.

    text: the question without solved examples and chat template; target: the right answer as text; choices, if any, and
    right: indices of the right ones; cluster, leak: texts for `Document.cluster` and `Document.seen`.
    """

    id: int
    hash: str
    text: str
    target: str
    choices: tuple[str, ...]
    right: tuple[int, ...]
    cluster: str
    leak: str


@dataclass(frozen=True)
class Asked:
    """A task with all that its scores depend on except the model. requests: SHA-256 of the rendered requests."""

    task: Any
    entry: TaskEntry
    metric: Metric
    questions: tuple[Question, ...]
    requests: str

    @property
    def chance(self) -> float | None:
        """The score of guessing among the choices, over all documents; None without choices."""
        if self.metric.name not in _CHOOSING or not all(question.choices for question in self.questions):
            return None
        return sum(len(q.right) / len(q.choices) for q in self.questions) / len(self.questions)

    @property
    def majority(self) -> float | None:
        """The score of always giving the most frequent right answer; None for a loss, and if none is right twice."""
        if self.metric.unit != "points":
            return None
        most = Counter(question.target for question in self.questions).most_common(1)[0][1]
        return most / len(self.questions) if most > 1 else None


def ask(task: Any, entry: TaskEntry, metric: Metric, chat: Callable[..., str] | None) -> Asked:
    """Read a task's documents and render its requests.

    Raises:
        UserError: the documents do not have the field that the suite names.
    """
    requests = build_requests(task, entry.limit, chat)
    first = {instance.doc_id: instance for instance in reversed(requests)}
    questions = tuple(_question(task, entry, number, first[number]) for number in sorted(first))
    sent = [[instance.request_type, instance.doc_id, instance.idx, instance.arguments] for instance in requests]
    hashes = [question.hash for question in questions]
    return Asked(task, entry, metric, questions, _sha256(_json([sent, hashes])))


def _question(task: Any, entry: TaskEntry, number: int, instance: Any) -> Question:
    doc = instance.doc
    choices = tuple(map(str, task.doc_to_choice(doc))) if task.get_config("doc_to_choice") is not None else ()
    target = task.doc_to_target(doc)
    text = task.doc_to_text(doc)
    if getattr(task, "multiple_input", 0):  # the choices are different beginnings with the same continuation
        right, own_text = _right(text, choices), str(target)
    else:
        right, own_text = _right(target, choices), str(text)
    shown = " | ".join(choices[place] for place in right) if right else _as_text(target)
    delimiter = str(task.get_config("target_delimiter") or " ")
    cluster = (
        own_text.strip() or shown if entry.cluster_by is None else _field(task, doc, "cluster_by", entry.cluster_by)
    )
    leak = own_text + delimiter + shown if entry.leak_by is None else _field(task, doc, "leak_by", entry.leak_by)
    answer = "" if task.get_config("output_type") == "loglikelihood_rolling" else shown  # there it is the prompt
    return Question(number, _sha256(_json(doc, indent=2)), own_text, answer, choices, right, cluster, leak)


def _right(target: Any, choices: Sequence[str]) -> tuple[int, ...]:
    """The indices of the right choices; lm-eval gives an index, a text, or a list of indices."""
    if isinstance(target, str):
        return (choices.index(target),) if target in choices else ()
    places = target if isinstance(target, (list, tuple)) else (target,)
    return tuple(int(p) for p in places if isinstance(p, (int, np.integer)) and 0 <= int(p) < len(choices))


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return " | ".join(value)
    return _json(value)


def _field(task: Any, doc: Any, key: str, name: str) -> str:
    if not isinstance(doc, Mapping) or name not in doc:
        there = ", ".join(map(str, doc)) if isinstance(doc, Mapping) else "none"
        raise UserError(f"task {name_of(task)}: {key}: {name}: unknown field; the documents have {there}")
    return _as_text(doc[name])


def documents_of(asked: Asked, samples: Sequence[Mapping[str, Any]], seen: frozenset[int]) -> tuple[Document, ...]:
    """One `Document` for each question, from lm-eval's samples. seen: ids of documents that occur in training rows.

    Raises:
        UserError: a document has no score or loss, or none has a weight.
    """
    chosen = {int(s["doc_id"]): s for s in samples if s["filter"] == asked.metric.filter}
    documents = []
    for question in asked.questions:
        sample = chosen[question.id]
        assert sample["doc_hash"] == question.hash, (name_of(asked.task), question.id)
        score, weight = value_of(asked.metric, asked.task, sample)
        documents.append(
            Document(
                id=question.id,
                hash=question.hash,
                score=score,
                prompt=_prompt(asked.task, sample),
                target=question.target,
                answer=_answer(asked.task, question, asked.metric.name, sample),
                cluster=cluster_id(question),
                seen=question.id in seen,
                weight=weight,
            )
        )
    if not any(document.weight for document in documents):
        raise UserError(f"task {name_of(asked.task)}: all its documents are empty; remove it, or add texts")
    return tuple(documents)


def cluster_id(question: Question) -> str:
    return _sha256(question.cluster)[:16]


def _prompt(task: Any, sample: Mapping[str, Any]) -> str:
    """The model's input; for a task whose choices are beginnings, these with their continuation."""
    arguments = sample["arguments"]
    if getattr(task, "multiple_input", 0):
        return "\n".join(str(context) + str(rest) for context, rest in arguments)
    return str(arguments[0][0])


def _answer(task: Any, question: Question, metric: str, sample: Mapping[str, Any]) -> str:
    """The model's answer: its choice, its text (after filters), or whether the target is its greedy continuation."""
    kind, answers = task.get_config("output_type"), sample["filtered_resps"]
    if kind == "multiple_choice" and question.choices:
        likelihoods = np.array([float(answer[0]) for answer in answers])
        n = len(question.choices)
        if metric == "acc_mutual_info":
            likelihoods = likelihoods[:n] - likelihoods[n:]
        elif metric in ("acc_norm", "acc_bytes"):
            texts = question.choices if metric == "acc_norm" else [choice.encode() for choice in question.choices]
            likelihoods = likelihoods[:n] / np.array([float(len(text)) for text in texts])
        return question.choices[int(np.argmax(likelihoods[:n]))]
    if kind == "loglikelihood_rolling":
        return f"(log-likelihood {float(answers[0]):.2f})"
    if kind == "loglikelihood":
        likelihood, is_greedy = answers[0]
        return question.target if is_greedy else f"(something else is likelier; log-likelihood {float(likelihood):.2f})"
    return _as_text(answers[0])


def task_settings(asked: Asked, chat_template_sha256: str | None, max_length: int | None) -> dict[str, Any]:
    """The settings that must be equal to compare two models' answers (`TaskResult.settings`)."""
    task = asked.task
    delimiter = task.get_config("target_delimiter")
    if chat_template_sha256 and task.get_config("output_type") == "multiple_choice":
        prefix = task.get_config("gen_prefix")
        delimiter = delimiter if prefix and not str(prefix)[-1].isspace() else ""  # as lm-eval drops it
    return {
        "output_type": task.get_config("output_type"),
        "shots": task.get_config("num_fewshot"),
        "limit": asked.entry.limit,
        "chat_template_sha256": chat_template_sha256,
        "shots_as_turns": chat_template_sha256 is not None,
        "target_delimiter": delimiter,
        "generation": generation_settings(task),
        "max_length": max_length,
        "task_sha256": _sha256(_json(_definition(task))),
    }


def _definition(task: Any) -> Any:
    """A task's YAML with the source of its functions, without the paths of its documents."""
    config = task.config.to_dict(keep_callable=True)
    return _plain({key: value for key, value in config.items() if key not in _WHEREABOUTS})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if not callable(value):
        return value
    try:
        return getsource(value)
    except (OSError, TypeError):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _json(value: Any, indent: int | None = None) -> str:
    """As lm-eval writes documents before it hashes them."""
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
