"""One file of a teacher's answers, and how tensors of a cache are written.

Shape legend: R rows, N response tokens, E width of the teacher.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd.cache.keys import STORED
from kd.errors import UserError
from kd.runs.files import TEMPORARY_PREFIX, disk_errors, fsync_path, give_usual_permissions

Answers = dict[str, Tensor]  # by name, as in the files; dimension 0 is response tokens
OF_ROWS = ("digests", "offsets", "checks")  # a part's tensors beside the answers
REMEDY = "remove this folder and fill the cache again"


def open_part(file: Path) -> tuple[Any, dict[bytes, tuple[int, int, int]]]:
    """The open file, and first, last + 1 and check of each row in it, by digest.

    Raises UserError where it is damaged, or of another teacher than the folder that it is in.
    """
    try:
        part: Any = safe_open(file, framework="pt")
        owner = (part.metadata() or {}).get("teacher")
        digests_RB, offsets, checks_R = (part.get_tensor(name) for name in OF_ROWS)
        lengths = {part.get_slice(name).get_shape()[:1] == [int(offsets[-1])] for name in answer_names(part)}
    except (SafetensorError, OSError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise unreadable(file, error) from error
    refuse_owner(file, owner)
    shapes = digests_RB.shape == (len(offsets) - 1, 32) and checks_R.shape == (len(offsets) - 1,)
    types = (digests_RB.dtype, offsets.dtype, checks_R.dtype) == (torch.uint8, torch.int64, torch.int64)
    whole = shapes and types and lengths == {True}
    if not whole or int(offsets[0]) != 0 or not bool((offsets.diff() >= 0).all()):
        raise UserError(f"{file}: its digests, offsets and answers do not belong together; {REMEDY}")
    places = zip(offsets[:-1].tolist(), offsets[1:].tolist(), checks_R.tolist(), strict=True)
    return part, dict(zip((row.tobytes() for row in digests_RB.numpy()), places, strict=True))


def write_part(file: Path, digests: Sequence[bytes], answers: Sequence[Answers]) -> None:
    """Write rows and the answers of each."""
    tensors = {name: torch.cat([one[name] for one in answers]).contiguous() for name in answers[0]}
    counts = [0, *(len(next(iter(one.values()))) for one in answers)]
    tensors["offsets"] = torch.tensor(counts, dtype=torch.int64).cumsum(0)
    tensors["digests"] = torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32).copy())
    checks = [check_of(one, digest) for digest, one in zip(digests, answers, strict=True)]
    save_durably(tensors | {"checks": torch.tensor(checks, dtype=torch.int64)}, file)


def refuse_owner(file: Path, owner: str | None) -> None:
    """Raise UserError where the teacher that a file names is not that of its folder."""
    if owner != file.parent.name:
        raise UserError(f"{file}: belongs to another teacher ({owner}); {REMEDY}")


def unreadable(file: Path, error: Exception) -> UserError:
    """Safetensors says of a file without permission that there is none."""
    if file.is_file() and not os.access(file, os.R_OK):
        return UserError(f"{file}: may not be read; change its permissions")
    return UserError(f"{file}: cannot be read ({error}); {REMEDY}")


def answer_names(part: Any) -> list[str]:
    """The tensors of a part beside its rows."""
    return sorted(name for name in part.keys() if name not in OF_ROWS)  # noqa: SIM118 - no mapping


def read_row(file: Path, part: Any, digest: bytes, first: int, last: int, check: int) -> Answers:
    """The answers of a row. Raises UserError where they are not those that were written."""
    try:
        row = {name: part.get_slice(name)[first:last] for name in answer_names(part)}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise unreadable(file, error) from error
    if check_of(row, digest) != check:
        raise UserError(f"{file}: is damaged, its values are not those that were written; {REMEDY}")
    return row


def width_of(part: Any) -> int:
    """E of a part of hidden states."""
    shape = part.get_slice("hidden").get_shape()
    return int(shape[1]) if len(shape) == 2 else 0


def check_of(tensors: Mapping[str, Tensor], digest: bytes = b"") -> int:
    """CRC-32 of a row's digest and the bytes of all tensors, in the order of their names."""
    check = zlib.crc32(digest)
    for _, tensor in sorted(tensors.items()):
        check = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, check)
    return check


def as_stored(hidden_NE: Tensor, stored: str) -> Answers:
    """Hidden states in the stored dtype. int8: hidden = scale * integer, scale = max |hidden| / 127 of each token."""
    if stored != "int8":
        return {"hidden": hidden_NE.to(STORED[stored])}
    scale_N = hidden_NE.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {"hidden": (hidden_NE.float() / scale_N[:, None]).round().to(torch.int8), "scale": scale_N}


def from_stored(answers: Answers) -> Tensor:
    """[N, E] hidden states; those of int8 in float32."""
    hidden_NE = answers["hidden"]
    return hidden_NE.float() * answers["scale"][:, None] if "scale" in answers else hidden_NE


def save_durably(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a file whole or not at all, with the name of its folder as its teacher."""
    temporary = file.with_name(TEMPORARY_PREFIX + file.name)
    with disk_errors(file):
        try:
            save_file(tensors, temporary, {"teacher": file.parent.name})
            give_usual_permissions(temporary)
            fsync_path(temporary)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(file.parent)
