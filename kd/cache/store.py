"""A teacher's final hidden states on disk, row by row.

    DIR/3f9c.../teacher.json             which teacher: fingerprints, dtypes, its head's scale
                head.safetensors         its output layer: weight [V, E], and bias [V] where it has one
                part-00000.safetensors   hidden [N, E], digests [R, 32], offsets [R + 1]; int8 also scale [N]

The folder's name is a digest of what decides the values: the teacher's weights and config, its base's where it is an
adapter, its dtype, and the stored one. A row is found by the SHA-256 of its tokens and response mask. So nothing
depends on shuffling, mixing, batch size or ranks, recipes share what they have in common, and a teacher or row that
changed is never mistaken for what it was. Parts are written whole and never changed.

Shape legend: R rows, N response tokens, E width of the teacher, V vocabulary rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd.config.cache_recipe import CacheRecipe
from kd.data.batches import Batch
from kd.data.token_rows import Ids, Mask
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.head import Head
from kd.runs.files import TEMPORARY_PREFIX, disk_errors, fsync_path, json_text, read_json, write_text_durably

FORMAT = 1
TEACHER, HEAD = "teacher.json", "head.safetensors"
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
REMEDY = "remove this folder and fill the cache again"


@dataclass(frozen=True)
class TeacherKey:
    """What decides a teacher's hidden states. base: fingerprint of an adapter's base; dtype: of its weights."""

    fingerprint: str
    base: str | None
    dtype: str
    stored: str

    @property
    def digest(self) -> str:
        """Its folder's name: 16 hexadecimal digits."""
        values = json.dumps([FORMAT, self.fingerprint, self.base, self.dtype, self.stored])
        return hashlib.sha256(values.encode()).hexdigest()[:16]


def teacher_key(teacher: Checkpoint, base: Checkpoint, dtype: torch.dtype, cache: CacheRecipe) -> TeacherKey:
    """base: what the teacher stands on, if it is an adapter; dtype: of the models in memory."""
    name = str(dtype).removeprefix("torch.")
    on = base.fingerprint if teacher.is_adapter else None
    return TeacherKey(teacher.fingerprint, on, name, name if cache.dtype == "auto" else cache.dtype)


def row_digest(input_ids: Ids, response_mask: Mask) -> bytes:
    """SHA-256 of a row: its tokens (int32 [T]) and which of them are response tokens (bool [T])."""
    digest = hashlib.sha256(np.ascontiguousarray(input_ids, np.int32).tobytes())
    digest.update(np.ascontiguousarray(response_mask, np.bool_).tobytes())
    return digest.digest()


def batch_digests(batch: Batch) -> list[bytes]:
    """The digest of each row of a padded or packed batch, in order."""
    ids_BT, mask_BT = batch["input_ids"].cpu().numpy(), batch["response_mask"].cpu().numpy()
    if "position_ids" in batch:
        starts = np.flatnonzero(batch["position_ids"][0].cpu().numpy() == 0)
        rows = zip(np.split(ids_BT[0], starts[1:]), np.split(mask_BT[0], starts[1:]), strict=True)
        return [row_digest(*row) for row in rows]
    lengths_B = batch["attention_mask"].sum(1).tolist()
    return [row_digest(ids_BT[b, :length], mask_BT[b, :length]) for b, length in enumerate(lengths_B)]


@dataclass(frozen=True)
class Place:
    """Where a row is: tokens first..last of a part."""

    part: int
    first: int
    last: int


class TeacherStore:
    """One teacher's folder. Opened anew after something was added."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where a file in it is damaged or another teacher's."""
        self.folder = folder
        self._files = sorted(folder.glob("part-*.safetensors"))
        self._parts: list[Any] = []
        self._places: dict[bytes, Place] = {}
        for index, file in enumerate(self._files):
            digests, offsets = self._open(file)
            for row, digest in enumerate(digests):
                self._places[digest] = Place(index, int(offsets[row]), int(offsets[row + 1]))

    def _open(self, file: Path) -> tuple[list[bytes], Tensor]:
        try:
            part: Any = safe_open(file, framework="pt")
            owner = (part.metadata() or {}).get("teacher")
            digests_RB, offsets = part.get_tensor("digests"), part.get_tensor("offsets")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cannot be read ({error}); {REMEDY}") from error
        if owner != self.folder.name:
            raise UserError(f"{file}: belongs to another teacher ({owner}); {REMEDY}")
        self._parts.append(part)
        return [row.tobytes() for row in digests_RB.numpy()], offsets

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def __len__(self) -> int:
        return len(self._places)

    def hidden_states(self, digests: Sequence[bytes]) -> Tensor:
        """[N, E] at the response positions of these rows, in order; as stored, but int8 as float32.

        Raises UserError where a row is not there.
        """
        parts = []
        for digest in digests:
            if digest not in self._places:
                raise UserError(f"{self.folder}: a row of this run is not in the cache; {REMEDY}")
            place = self._places[digest]
            part, tokens = self._parts[place.part], slice(place.first, place.last)
            hidden_NE = part.get_slice("hidden")[tokens]
            if hidden_NE.dtype == torch.int8:
                hidden_NE = hidden_NE.float() * part.get_slice("scale")[tokens, None]
            parts.append(hidden_NE)
        return torch.cat(parts)

    def add(self, digests: Sequence[bytes], hidden: Sequence[Tensor], stored: str) -> None:
        """Write a new part. hidden: [N_r, E] of each row. This store sees it only when it is opened anew."""
        tensors = _as_stored(torch.cat(list(hidden)), stored)
        tensors["digests"] = torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32).copy())
        counts = [0, *(len(part) for part in hidden)]
        tensors["offsets"] = torch.tensor(counts, dtype=torch.int64).cumsum(0)
        number = len(list(self.folder.glob("part-*.safetensors")))
        _save_durably(tensors, self.folder / f"part-{number:05d}.safetensors", {"teacher": self.folder.name})

    # -- the teacher's head --------------------------------------------------------------------------------------------

    @property
    def has_head(self) -> bool:
        return (self.folder / HEAD).is_file() and (self.folder / TEACHER).is_file()

    def write_head(self, head: Head, key: TeacherKey, path: str) -> None:
        """path: the teacher's, for a reader."""
        tensors = {"weight": head.weight_VD.detach().cpu().contiguous()}
        if head.bias_V is not None:
            tensors["bias"] = head.bias_V.detach().cpu().contiguous()
        _save_durably(tensors, self.folder / HEAD, {"teacher": self.folder.name})
        facts = {"format": FORMAT, "teacher": path, "fingerprint": key.fingerprint, "base": key.base}
        facts |= {"dtype": key.dtype, "stored": key.stored, "scale": head.scale, "softcap": head.softcap}
        write_text_durably(self.folder / TEACHER, json_text(facts))

    def head(self, device: str) -> Head:
        """Raises UserError where its files are damaged."""
        facts, file = read_json(self.folder / TEACHER), self.folder / HEAD
        try:
            tensors = load_file(file, device=device)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cannot be read ({error}); {REMEDY}") from error
        return Head(tensors["weight"], tensors.get("bias"), float(facts["scale"]), facts["softcap"])


@dataclass(frozen=True, eq=False)
class CachedTeacher:
    """What an objective needs of a teacher that is not in memory. Every row that it is asked about is in `store`."""

    name: str
    store: TeacherStore
    head: Head

    def hidden_states(self, rows: Batch) -> Tensor:
        """[N, E] at the positions that predict response tokens, row after row, on the rows' device.

        Raises UserError where a row is not in the store.
        """
        return self.store.hidden_states(batch_digests(rows)).to(rows["input_ids"].device)


def _as_stored(hidden_NE: Tensor, stored: str) -> dict[str, Tensor]:
    """In the stored dtype. int8: hidden = scale * integer, scale = max |hidden| / 127 of each token."""
    if stored != "int8":
        return {"hidden": hidden_NE.to(STORED[stored]).contiguous()}
    scale_N = hidden_NE.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    integers_NE = (hidden_NE.float() / scale_N[:, None]).round().to(torch.int8)
    return {"hidden": integers_NE.contiguous(), "scale": scale_N}


def _save_durably(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    temporary = file.with_name(TEMPORARY_PREFIX + file.name)
    with disk_errors(file):
        save_file(tensors, temporary, metadata)
        fsync_path(temporary)
        os.replace(temporary, file)
        fsync_path(file.parent)


def bytes_per_token(width: int, stored: str) -> int:
    """On disk, without the rows' digests."""
    return width * STORED[stored].itemsize + (4 if stored == "int8" else 0)
