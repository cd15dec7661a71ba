"""Which model and which data: SHA-256 fingerprints by which a run knows its inputs again."""

from __future__ import annotations

import json
import operator
import re
from pathlib import Path

from kd.errors import UserError
from kd.runs.files import files_sha256, joint_sha256
from kd.runs.provenance import FINISHED, read_provenance

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")  # a plain name on every file system
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


def weight_files(folder: Path) -> list[str]:
    """Names of the files that make up a model: its safetensors weights and its config.

    An adapter (adapter_config.json is there) is adapter_model.safetensors; a checkpoint is model.safetensors or else
    the files that model.safetensors.index.json lists.

    Raises:
        UserError: weights are missing, torn, pickled, or lie outside the folder.
    """
    adapter = (folder / ADAPTER_CONFIG).is_file()
    config = ADAPTER_CONFIG if adapter else "config.json"
    single = ADAPTER_WEIGHTS if adapter else "model.safetensors"
    index = "model.safetensors.index.json"
    if not (folder / config).is_file():
        raise UserError(
            f"{folder}: has neither config.json nor adapter_config.json; give the folder of a checkpoint or adapter"
        )
    if (folder / single).is_file():
        return [config, single]
    if not adapter and (folder / index).is_file():
        return [config, index, *_shards(folder / index)]
    pickles = sorted(
        {file.name for pattern in _PICKLES for file in folder.glob(pattern) if file.name != "training_args.bin"}
    )
    if pickles:
        raise UserError(
            f"{folder}: its weights are pickled ({', '.join(pickles[:3])}), and a pickle can run any code; "
            'convert them: load them where you trust them and call model.save_pretrained("NEW_FOLDER")'
        )
    raise UserError(f"{folder}: has {config} but no {single}; save it again with safetensors, or download it again")


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read ({error!r}); save or download the checkpoint again") from error
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise UserError(
                f"{index}: names {name!r}, which is no safetensors file beside it; save or download it again"
            )
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: lists {name}, which is missing; save or download the checkpoint again")
    return names


def check_safetensors(path: Path) -> None:
    """See from header and size alone that a safetensors file is whole.

    Raises:
        UserError: torn, empty, or no safetensors file at all (such as a git-lfs pointer).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if len(start) == 8 and length <= min(size, 100_000_000) else b""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        end = max(map(operator.index, ends), default=0)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, RecursionError) as error:
        pointer = " (it is a git-lfs pointer: run `git lfs pull`)" if start == b"version " else ""
        raise UserError(f"{path}: truncated or invalid safetensors file{pointer}; save or download it again") from error
    if size != 8 + length + end:
        raise UserError(f"{path}: has {size} bytes where its header says {8 + length + end}; save or download it again")


def model_fingerprint(folder: Path) -> str:
    """Fingerprint of the checkpoint or adapter in a folder: joint SHA-256 over names and contents of `weight_files`.

    It does not depend on where the folder lies, nor on tokenizer, model card or generation settings. Another sharding
    of the same weights counts as another model.

    Raises:
        UserError: the model is pickled or torn, or is the folder of a run that has not finished.
    """
    if read_provenance(folder) is not None and not (folder / FINISHED).is_file():
        raise UserError(f"{folder}: this run has not finished; give its command again to let it finish")
    names = weight_files(folder)
    for name in names:
        if name.endswith(".safetensors"):
            check_safetensors(folder / name)
    return joint_sha256(files_sha256(folder, names))
