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
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dae_eval.results import ModelFacts
from kd.data.tokenizer_audit import PROBES, audit
from kd.errors import UserError
from kd.models.adapter_files import ADAPTER_CONFIG, is_adapter, read_adapter_config
from kd.models.checkpoint_files import model_fingerprint, resolve_model
from kd.models.compatibility import check_adapter
from kd.models.forward import unwrapped
from kd.models.opening import opening
from kd.models.roles import Backbone, LoadSettings, Role, activate, add_frozen_adapter, load_model
from kd.runs.provenance import read_provenance

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")

logger = logging.getLogger("dae")


@dataclass(frozen=True)
class Model:
    """A full checkpoint (base None), or an adapter on a base. Paths are as typed."""

    path: str
    fingerprint: str
    base: str | None = None
    base_fingerprint: str | None = None

    @property
    def identity(self) -> tuple[str, str | None]:
        """Two models with the same identity are the same weights."""
        return self.fingerprint, self.base_fingerprint

    @property
    def backbone(self) -> tuple[str, str]:
        """(path, fingerprint) of the full weights."""
        if self.base is None or self.base_fingerprint is None:
            return self.path, self.fingerprint
        return self.base, self.base_fingerprint

    @property
    def tokenizer_folder(self) -> Path:
        """Its own folder if that has a tokenizer, else its base's."""
        own = resolve_model(self.path)
        has_one = any((own / name).is_file() for name in _VOCABULARIES)
        return own if has_one or self.base is None else resolve_model(self.base)

    def facts(self) -> ModelFacts:
        """The model as a report shows it."""
        provenance = read_provenance(resolve_model(self.path)) or {}
        inputs = dict(provenance.get("inputs", {}))
        return ModelFacts(self.path, self.fingerprint, self.base, self.base_fingerprint, inputs)


def locate(role: str, path: str, base: str | None, known: dict[str, str] | None = None) -> Model:
    """Find a model and its fingerprints; no weights are loaded.

    base: of an adapter; None: the base in its adapter_config.json. known: fingerprints found so far, by path.

    Raises:
        UserError: the model is not found, its run has not finished, or the adapter does not belong to the base.
    """
    known = {} if known is None else known

    def fingerprint(place: str) -> str:
        if place not in known:
            known[place] = model_fingerprint(place)
        return known[place]

    if not is_adapter(path):
        return Model(path, fingerprint(path))
    chosen = base if base is not None else base_of_adapter(path)
    try:
        base_is_adapter = is_adapter(chosen)
    except UserError as error:
        raise UserError(
            f"{role} {path}: the adapter's base is not found; give its path with --base. {error}"
        ) from error
    if base_is_adapter:
        raise UserError(f"{role} {path}: the base {chosen} is an adapter; merge it into its own base first")
    check_adapter(role, path, chosen, fingerprint(chosen))
    return Model(path, fingerprint(path), chosen, fingerprint(chosen))


def base_of_adapter(path: str) -> str:
    """The base in an adapter's config. Raises UserError if there is none."""
    named = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        config = resolve_model(path) / ADAPTER_CONFIG
        raise UserError(f"{config}: base_model_name_or_path: is required; or give the base with --base")
    return named


def open_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError if transformers cannot open it."""
    folder = model.tokenizer_folder
    with opening(f"{model.path}: no tokenizer that transformers can open"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder))
    return tokenizer


def warn_of_losses(model: Model, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = PROBES) -> None:
    """Warn, in one line, if the tokenizer drops characters of these texts or splits them in an unusual way."""
    loss = audit(tokenizer, model.tokenizer_folder, texts).loss(model.path)
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
        self._fingerprint: str | None = None
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
        assert {model.backbone[1] for model in models.values()} == {self._fingerprint}, models
        # Adapters first: the first one wraps the backbone, and every role needs the wrapped one.
        adapters = {
            name: None if model.base is None else add_frozen_adapter(backbone, model.path)
            for name, model in models.items()
        }
        return {name: Role(name, backbone.model, adapter) for name, adapter in adapters.items()}

    def _backbone_of(self, model: Model) -> Backbone:
        path, fingerprint = model.backbone
        if self._backbone is None or self._fingerprint != fingerprint:
            self.free()
            self._backbone, self._fingerprint = Backbone(path, load_model(path, self.settings)), fingerprint
        return self._backbone

    def free(self) -> None:
        self._backbone = self._fingerprint = None
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
