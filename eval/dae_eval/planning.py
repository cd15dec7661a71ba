"""The plan of a model's evaluation, made and checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from dae_eval.answers import Asked, ask, task_settings
from dae_eval.benchmarks import Member, load_members
from dae_eval.contamination import ContaminatedTexts, contaminated_texts, training_rows
from dae_eval.drift import HeldOutRows
from dae_eval.folders import digest, documents_name
from dae_eval.harness import (
    NUMPY_SEED,
    PYTHON_SEED,
    SHOTS_SEED,
    TORCH_SEED,
    chat_renderer,
    name_of,
    refuse_unfit_length,
    version_of,
)
from dae_eval.held_out import rows_of
from dae_eval.models import Model, chat_template_of, warn_of_losses
from dae_eval.results import TrainingRows
from dae_eval.suites import Suite
from kd.config.data_recipe import SourceRecipe
from kd.models.roles import LoadSettings
from kd.models.tokenizer_files import tokenizer_sha256
from kd.runs.environment import environment

_LIBRARIES = ("lm-eval", "transformers", "peft", "torch")


@dataclass(frozen=True)
class Plan:
    """The evaluation of one model before the model is loaded.

    members: the suite's tasks by name, in its order; asked: the same with questions and requests.
    facts: by task, all that its scores depend on; shared: the facts that all tasks have in common; keys: digests of
    facts; rows: the training rows of the model's run; seen: by task, ids of documents that occur in them.
    """

    role: str
    model: Model
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    members: Mapping[str, Member]
    asked: Mapping[str, Asked]
    settings: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Any]
    facts: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, str]
    conditions: Mapping[str, Any]
    held_out: tuple[HeldOutRows, ...]
    rows: tuple[TrainingRows, ...]
    seen: Mapping[str, frozenset[int]]

    def path(self, task: str) -> Path:
        """The file of a task's documents, which exists when the task is finished."""
        return self.folder / documents_name(task, self.keys[task])

    def notes_path(self, task: str) -> Path:
        """The file of the facts behind a task's key, and of notes on its run."""
        return self.path(task).with_name(self.path(task).name.replace(".jsonl.gz", ".json"))


class Planner:
    """Makes plans for several models on one suite; tasks, questions and training rows are read once."""

    def __init__(self, suite: Suite, settings: LoadSettings, command: Sequence[str] | None) -> None:
        self.suite = suite
        self.load_settings = settings
        self.environment = environment(command)
        self.members = load_members(suite)
        self._asked: dict[str, dict[str, Asked]] = {}
        self._contaminated: dict[tuple[str, str], ContaminatedTexts] = {}

    def plan(self, role: str, model: Model, folder: Path) -> Plan:
        """Look at all that concerns one model. Raises UserError."""
        suite, tokenizer = self.suite, model.tokenizer_home.tokenizer()
        own_template = _sha256(tokenizer.chat_template)
        template = chat_template_of(model, tokenizer, suite.chat_template)
        config: Any = AutoConfig.from_pretrained(str(model.backbone.folder))
        context = refuse_unfit_length(
            {name: one.task for name, one in self.members.items()}, config, tokenizer, suite.max_length, model.path
        )
        shared = self._shared_facts(model, context)
        asked = self._questions(shared["tokenizer"], tokenizer, template)
        warn_of_losses(model, tokenizer, [question.leak for one in asked.values() for question in one.questions])
        settings = {task: task_settings(one, _sha256(template), suite.max_length) for task, one in asked.items()}
        facts = {task: {**_task_facts(one), "settings": settings[task], **shared} for task, one in asked.items()}
        rows = training_rows([str(one) for one in (model.source, model.base) if one is not None])
        return Plan(
            role=role,
            model=model,
            folder=folder,
            tokenizer=tokenizer,
            template=template,
            members=self.members,
            asked=asked,
            settings=settings,
            shared=shared,
            facts=facts,
            keys={task: digest(fact) for task, fact in facts.items()},
            conditions=self._conditions(shared, template, own_template),
            held_out=rows_of(suite, tokenizer, context),
            rows=tuple(row for row, _ in rows),
            seen=self._seen_in([source for _, source in rows if source is not None], asked),
        )

    def _shared_facts(self, model: Model, context: int) -> dict[str, Any]:
        """What all scores of a model depend on."""
        fingerprint, of_base = model.identity
        return {
            "model": fingerprint,
            "base": of_base,
            "tokenizer": tokenizer_sha256(model.tokenizer_home.folder),
            "dtype": str(self.load_settings.dtype).removeprefix("torch."),
            "device": self.load_settings.device,
            "batch_size": self.suite.batch_size,
            "context": context,
            "libraries": {name: version(name) for name in _LIBRARIES},
        }

    def _conditions(self, shared: Mapping[str, Any], template: str | None, own: str | None) -> dict[str, Any]:
        """The conditions that a report shows."""
        return {
            "suite": self.suite.model_dump(mode="json"),
            "chat_template": {"choice": self.suite.chat_template, "sha256": _sha256(template), "tokenizer's own": own},
            **{name: shared[name] for name in ("tokenizer", "dtype", "device", "batch_size", "context")},
            "seeds": {"shots": SHOTS_SEED, "python": PYTHON_SEED, "numpy": NUMPY_SEED, "torch": TORCH_SEED},
            "generation": "as the task's YAML says, else greedy; of generation_config.json only the special tokens",
            "lm-eval": version("lm-eval"),
            **self.environment,
        }

    def _questions(self, sha: str, tokenizer: PreTrainedTokenizerBase, template: str | None) -> dict[str, Asked]:
        """The questions of all tasks; without a chat template they are the same for every tokenizer."""
        key = "" if template is None else f"{sha} {_sha256(template)}"
        if key not in self._asked:
            chat = None if template is None else chat_renderer(tokenizer)
            self._asked[key] = {name: ask(one.task, one.entry, one.metric, chat) for name, one in self.members.items()}
        return self._asked[key]

    def _seen_in(self, sources: Sequence[SourceRecipe], asked: Mapping[str, Asked]) -> dict[str, frozenset[int]]:
        keys = [(str(source.path), source.split) for source in sources]
        for key, source in zip(keys, sources, strict=True):
            if key not in self._contaminated:
                texts = (question.leak for one in asked.values() for question in one.questions)
                self._contaminated[key] = contaminated_texts(texts, source)
        found = [self._contaminated[key] for key in keys]
        return {
            task: frozenset(q.id for q in one.questions if any(q.leak in texts for texts in found))
            for task, one in asked.items()
        }


def _task_facts(asked: Asked) -> dict[str, Any]:
    task = asked.task
    return {
        "task": name_of(task),
        "version": version_of(task),
        "metric": asked.metric.key,
        "requests": asked.requests,
    }


def _sha256(template: Any) -> str | None:
    if not template:
        return None
    text = template if isinstance(template, str) else str(sorted(dict(template).items()))
    return sha256(text.encode()).hexdigest()
