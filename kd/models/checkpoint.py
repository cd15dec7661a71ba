"""A checkpoint or adapter as one value: the path as typed, the local folder, and what its small files say.

Strings of recipes and command lines become Checkpoints once, at the start of a command; all else takes these. A folder
is looked at once, and a hub is asked once for each id.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import UserError
from kd.models.checkpoint_files import ADAPTER_CONFIG, TOKENIZER_FILES, model_fingerprint
from kd.models.opening import opening, refuse_unsafe_settings
from kd.models.template_limits import limit_chat_templates

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Some hub repositories carry a second copy of the weights in their authors' own format.
_NOT_DOWNLOADED = ("consolidated*", "original/*", "onnx/*", "openvino/*")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A full checkpoint or a peft adapter. `checkpoint` makes it, once for each path.

    path: as typed, a folder or a hub id; folder: where it lies on this machine. Opens no weights, imports no peft.
    """

    path: str
    folder: Path

    def __str__(self) -> str:
        return self.path

    @property
    def lasting_path(self) -> str:
        """What other files call it: its folder from the root, or the hub id as typed."""
        return str(self.folder.resolve()) if self.folder == Path(self.path) else self.path

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of weights and config; the files are read once. Raises UserError where they are torn or missing."""
        return model_fingerprint(self.folder)

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it is a peft adapter."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """An adapter's config as it is written. Raises UserError where it is no JSON object."""
        file = self.folder / ADAPTER_CONFIG
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: is no JSON ({error}); save or download the adapter again") from error
        if not isinstance(config, dict):
            raise UserError(f"{file}: is no JSON object; save or download the adapter again")
        return config

    @property
    def base_path(self) -> str:
        """The path or hub id that an adapter names as its base. Raises UserError where it names none."""
        named = self.adapter_config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            file = self.folder / ADAPTER_CONFIG
            raise UserError(f"{file}: names no base (base_model_name_or_path); write its base's path or hub id there")
        return named

    @property
    def base(self) -> Checkpoint | None:
        """The base in an adapter's config; None for a full checkpoint. Raises UserError if it is not found."""
        return checkpoint(self.base_path) if self.is_adapter else None

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is in the same folder."""
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    @property
    def tokenizer_home(self) -> Checkpoint:
        """Where its tokenizer lies: beside its weights, or with the base of an adapter that brings none."""
        return self if self.has_tokenizer else self.base or self

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """A new tokenizer from the files beside its weights. Raises UserError where transformers can open none."""
        from transformers import AutoTokenizer

        limit_chat_templates()
        refuse_unsafe_settings(self.folder, trust_remote_code)
        with opening(f"{self}: no tokenizer that transformers can open"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(self.folder), trust_remote_code=trust_remote_code
            )
            tokenizer("probe")  # some settings are read no sooner
        return tokenizer

    def refuse_adapter(self, key: str = "") -> None:
        """Raise UserError for an adapter: transformers would leave it out, or put it on a base of its choice.

        key: of the recipe, where the path stands there.
        """
        if self.is_adapter:
            raise UserError(
                f"{key}{': ' if key else ''}{self}: is an adapter, and a full checkpoint is wanted here; pass what it "
                "was trained on, or merge it."
            )

    def meta_model(self, trust_remote_code: bool = False) -> nn.Module:
        """A new model of its architecture on the meta device. Raises UserError where it is no full causal LM."""
        from kd.models.meta_model import meta_model

        self.refuse_adapter()
        return meta_model(self.folder, self.path, trust_remote_code)


_State = list[tuple[str, int, int]]
_known: dict[tuple[str, str], tuple[_State | None, Checkpoint]] = {}


def checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path or hub id: the same value each time, until the folder's files change.

    Raises:
        UserError: no such folder, or the hub id can neither be fetched nor found in the local cache.
    """
    name = os.fspath(path)
    key, state = (name, os.getcwd()), _state(Path(name))
    if key not in _known or _known[key][0] != state:
        _known[key] = state, Checkpoint(name, _hub_snapshot(name) if state is None else Path(name))
    return _known[key][1]


def _state(folder: Path) -> _State | None:
    """Names, sizes and times of writing of a folder's files; None where no such folder."""
    if not folder.is_dir():
        return None
    facts = [(file.name, file.stat()) for file in os.scandir(folder) if file.is_file()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in facts)


def _hub_snapshot(name: str) -> Path:
    if Path(name).exists() or not _MODEL_ID.fullmatch(name) or name.startswith(("./", "../", "~")):
        kind = "this is a file, a model is a folder" if Path(name).exists() else "no such folder"
        raise UserError(f"{name}: {kind}; give the folder of a checkpoint or adapter, or a hub id")
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md", "*.py"]
    fetch: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": list(_NOT_DOWNLOADED)}
    try:
        return Path(snapshot_download(name, **fetch))
    except Exception as error:  # noqa: BLE001 - the hub client raises errors of four libraries; all mean "not to be had"
        try:
            return Path(snapshot_download(name, local_files_only=True, **fetch))
        except Exception:  # noqa: BLE001
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{name}: no such folder, and the hub does not give a model of this name ({reason}); "
                "check the spelling, your network and your hub login, or download it and give its folder"
            ) from error
