"""What a cache finds a teacher and a row by: digests of all that decides the answers.

Shape legend: T tokens of a row, B rows of a batch, E width of the teacher, V vocabulary rows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

from kd.config.cache_recipe import CacheRecipe
from kd.config.served_recipe import ServedTeacher
from kd.config.stage_recipe import Quantization
from kd.data.batches import Batch
from kd.data.token_rows import Ids, Mask
from kd.models.checkpoint import Checkpoint
from kd.models.roles import LoadSettings

FORMAT = 2  # of the files; with another one nothing is found
SERVED = "served"  # in place of a dtype
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class TeacherKey:
    """What decides a teacher's answers. base: fingerprint of an adapter's base; dtype: of its weights.

    stored: the dtype on disk; top_k: of kind topk, samples: of kind sampled; both None for hidden states.
    quantization: of its weights in memory.
    """

    fingerprint: str
    base: str | None
    dtype: str
    stored: str
    top_k: int | None = None
    samples: int | None = None
    quantization: Quantization | None = None

    @property
    def is_served(self) -> bool:
        """Whether the teacher is on a server."""
        return self.dtype == SERVED

    @property
    def kind(self) -> str:
        """As in the recipe."""
        if self.samples is not None:
            return "sampled"
        return "hidden" if self.top_k is None else "topk"

    @property
    def digest(self) -> str:
        """Its folder's name: 16 hexadecimal digits."""
        values = json.dumps([FORMAT, *astuple(self)])
        return hashlib.sha256(values.encode()).hexdigest()[:16]


def teacher_key(teacher: Checkpoint, base: Checkpoint, settings: LoadSettings, cache: CacheRecipe) -> TeacherKey:
    """base: what the teacher stands on, if it is an adapter; settings: how the models are opened."""
    name = str(settings.dtype).removeprefix("torch.")
    on = base.fingerprint if teacher.is_adapter else None
    automatic = name if cache.kind == "hidden" else "float32"
    stored = automatic if cache.dtype == "auto" else cache.dtype
    key = TeacherKey(teacher.fingerprint, on, name, stored, quantization=settings.quantization)
    if cache.kind == "topk":
        return replace(key, top_k=cache.top_k)
    return replace(key, samples=cache.samples) if cache.kind == "sampled" else key


def served_key(teacher: ServedTeacher, vocabulary_rows: int) -> TeacherKey:
    """Of a teacher on a server, whose weights are known by its name and address only.

    vocabulary_rows: that the run's models share; what is beyond them is part of the tail.
    """
    named = hashlib.sha256(json.dumps([teacher.url, teacher.model, vocabulary_rows]).encode()).hexdigest()
    return TeacherKey(named, None, SERVED, "float32", top_k=teacher.top_k)


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


def bytes_per_token(head_shape: tuple[int, int], key: TeacherKey) -> int:
    """On disk, without what each row takes. head_shape: (V, E) of the teacher's output layer."""
    each, (rows, width) = STORED[key.stored].itemsize, head_shape
    if key.samples is not None:
        return key.samples * torch.int32.itemsize + torch.float32.itemsize
    if key.top_k is not None:
        return min(key.top_k, rows - 1) * (each + torch.int32.itemsize) + torch.float32.itemsize
    return width * each + (torch.float32.itemsize if key.stored == "int8" else 0)
