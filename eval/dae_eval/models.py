"""The evaluated models: their paths, their bases, and how several share one backbone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dae_eval.results import ModelFacts
from kd.data.tokenizer_audit import PROBES, audit
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.compatibility import check_adapter
from kd.models.forward import unwrapped
from kd.models.roles import Backbone, LoadSettings, Role, activate, add_frozen_adapter, load_model
from kd.runs.provenance import read_provenance

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")

logger = logging.getLogger("dae")


@dataclass(frozen=True)
class Model:
    """A full checkpoint (base None), or an adapter on a base."""

    source: Checkpoint
    base: Checkpoint | None = None

    @property
    def path(self) -> str:
        """As typed."""
        return str(self.source)

    @property
    def identity(self) -> tuple[str, str | None]:
        """Fingerprints of the model and of its base. Two models with the same identity are the same weights."""
        return self.source.fingerprint, None if self.base is None else self.base.fingerprint

    @property
    def backbone(self) -> Checkpoint:
        """The full weights."""
        return self.base or self.source

    @property
    def tokenizer_home(self) -> Checkpoint:
        """The model itself where its folder holds a tokenizer, else its base."""
        return self.source if any((self.source.folder / name).is_file() for name in _VOCABULARIES) else self.backbone

    def facts(self) -> ModelFacts:
        """The model's facts, as reports show them."""
        inputs = dict((read_provenance(self.source.folder) or {}).get("inputs", {}))
        fingerprint, of_base = self.identity
        return ModelFacts(self.path, fingerprint, None if self.base is None else str(self.base), of_base, inputs)


def locate(role: str, path: str, base: str | None) -> Model:
    """Find a model and what it stands on; no weights are loaded.

    base: what an adapter stands on; None: what its adapter_config.json names.

    Raises:
        UserError: there is no such model, or the adapter does not belong to the base.
    """
    source = checkpoint(path)
    if not source.is_adapter:
        return Model(source)
    named = source.base_path if base is None else base
    try:
        chosen = checkpoint(named)
    except UserError as error:
        raise UserError(
            f"{role} {path}: the adapter's base is not found; give its path with --base. {error}"
        ) from error
    if chosen.is_adapter:
        raise UserError(f"{role} {path}: its base {chosen} is an adapter itself; merge that into its base first")
    check_adapter(role, source, chosen)
    return Model(source, chosen)


def warn_of_losses(model: Model, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = PROBES) -> None:
    """Warn, in one line, where the tokenizer drops characters of these texts or cuts them in a way of its own."""
    loss = audit(tokenizer, model.tokenizer_home.folder, texts).loss(model.path)
    if loss is not None:
        logger.warning("%s", loss)


def load_settings() -> LoadSettings:
    """bfloat16 on an accelerator that has it, else float32."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    return LoadSettings(dtype, device="cuda" if on_gpu else "cpu")


class Memory:
    """The one backbone in memory, with the adapters loaded on it."""

    def __init__(self, settings: LoadSettings) -> None:
        self.settings = settings
        self._backbone: Backbone | None = None

    @contextmanager
    def activated(self, model: Model) -> Iterator[PreTrainedModel]:
        """The transformers model of `model`, loaded if needed; another backbone is freed first."""
        (role,) = self.roles({model.path: model}).values()
        with activate(role) as active:
            yield unwrapped(active)

    def roles(self, models: Mapping[str, Model]) -> dict[str, Role]:
        """Roles by name, of models that share one backbone."""
        backbone = self._backbone_of(next(iter(models.values())))
        assert {model.backbone.fingerprint for model in models.values()} == {backbone.base.fingerprint}, models
        # Adapters first: the first one wraps the backbone, and every role must hold the wrapped one.
        adapters = {
            name: None if model.base is None else add_frozen_adapter(backbone, model.source)
            for name, model in models.items()
        }
        return {name: Role(name, backbone.model, adapter) for name, adapter in adapters.items()}

    def _backbone_of(self, model: Model) -> Backbone:
        wanted = model.backbone
        if self._backbone is None or self._backbone.base.fingerprint != wanted.fingerprint:
            self.free()
            self._backbone = Backbone(wanted, load_model(wanted, self.settings))
        return self._backbone

    def free(self) -> None:
        """Give the memory back."""
        self._backbone = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def chat_template_of(model: Model, tokenizer: PreTrainedTokenizerBase, choice: Any) -> str | None:
    """The text of the chat template that the suite chooses, set on the tokenizer; None: no template.

    Raises:
        UserError: the tokenizer has no template, or the file cannot be read.
    """
    if choice is False:
        return None
    if choice is True:
        return own_chat_template(model, tokenizer)
    try:
        tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: {choice}: cannot be read ({error}); give a .jinja file") from error
    return str(tokenizer.chat_template)


def own_chat_template(model: Model, tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own chat template. Raises UserError if it has none, or several without a default."""
    if not tokenizer.chat_template:
        raise UserError(
            f"chat_template: true: the tokenizer of {model.path} has no chat template; set false, or a .jinja file"
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(f"chat_template: true: {model.path}: {error}") from error
