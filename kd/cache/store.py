"""What a teacher says of rows, on disk.

    DIR/3f9c.../teacher.json             which teacher: fingerprints, dtypes, its head's scale
                head.safetensors         of kind hidden: its output layer, weight [V, E], and bias [V] where it has
                                         one, and their check
                part-00000.safetensors   answers, and digests [R, 32], offsets [R + 1], checks [R] of their rows
                unfinished.safetensors   of a teacher on a server: what it answered of the next part, in any order

    answers: kind hidden: hidden [N, E], for int8 also scale [N]; kind topk: ids [N, K], log_q [N, K], log_tail [N];
        kind sampled: ids [N, S], entropy [N]

The folder's name is a digest of what decides the answers: the teacher's weights and config, its base's where it is an
adapter, its dtype and quantisation, and what is stored. A row is found by the SHA-256 of its tokens and response mask.
So recipes share what they have in common, whatever their shuffling, shares or batch size, and a teacher or row that
changed is another one. A change in the code that runs a model is not noticed. Parts are written whole, never changed.
A check is the CRC-32 of a row's digest and answers, or of the output layer, compared whenever they are read.

Shape legend: R rows, N response tokens, E width of the teacher, V vocabulary rows, K tokens kept,
S tokens drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd.config.cache_recipe import CacheRecipe
from kd.config.served_recipe import ServedTeacher
from kd.config.stage_recipe import Quantization
from kd.data.batches import Batch
from kd.data.token_rows import Ids, Mask
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.head import Head
from kd.models.roles import LoadSettings
from kd.models.teacher_logits import HiddenTeacher, SampledTeacher, TeacherLogits, TopKTeacher
from kd.runs.files import (
    TEMPORARY_PREFIX,
    disk_errors,
    fsync_path,
    give_usual_permissions,
    json_text,
    read_json,
    write_text_durably,
)

FORMAT = 2
Answers = dict[str, Tensor]  # by name, as in the files; dimension 0 is response tokens
SERVED = "served"  # in place of a dtype
TEACHER, HEAD, UNFINISHED = "teacher.json", "head.safetensors", "unfinished.safetensors"
OF_ROWS = ("digests", "offsets", "checks")  # a part's tensors beside the answers
ANSWERS = {"hidden": {"hidden"}, "topk": {"ids", "log_q", "log_tail"}, "sampled": {"ids", "entropy"}}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
REMEDY = "remove this folder and fill the cache again"


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is: response tokens first to last - 1 of a part, and the CRC-32 of its answers."""

    part: int
    first: int
    last: int
    check: int


class TeacherStore:
    """One teacher's folder. Opened anew after something was added."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where a file in it is damaged or another teacher's."""
        self.folder = folder
        self._parts: list[Any] = []
        self._places: dict[bytes, Place] = {}
        self._files = sorted(folder.glob("part-*.safetensors"))
        for index, file in enumerate(self._files):
            part, rows = self._open(file)
            self._parts.append(part)
            self._places |= {digest: Place(index, *place) for digest, place in rows.items()}

    def _open(self, file: Path) -> tuple[Any, dict[bytes, tuple[int, int, int]]]:
        """The open file, and first, last + 1 and check of each row in it, by digest."""
        try:
            part: Any = safe_open(file, framework="pt")
            owner = (part.metadata() or {}).get("teacher")
            digests_RB, offsets, checks_R = (part.get_tensor(name) for name in OF_ROWS)
            lengths = {part.get_slice(name).get_shape()[:1] == [int(offsets[-1])] for name in answer_names(part)}
        except (SafetensorError, OSError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise unreadable(file, error) from error
        if owner != self.folder.name:
            raise UserError(f"{file}: belongs to another teacher ({owner}); {REMEDY}")
        shapes = digests_RB.shape == (len(offsets) - 1, 32) and checks_R.shape == (len(offsets) - 1,)
        types = (digests_RB.dtype, offsets.dtype, checks_R.dtype) == (torch.uint8, torch.int64, torch.int64)
        whole = shapes and types and lengths == {True}
        if not whole or int(offsets[0]) != 0 or not bool((offsets.diff() >= 0).all()):
            raise UserError(f"{file}: its digests, offsets and answers do not belong together; {REMEDY}")
        places = zip(offsets[:-1].tolist(), offsets[1:].tolist(), checks_R.tolist(), strict=True)
        return part, dict(zip((row.tobytes() for row in digests_RB.numpy()), places, strict=True))

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def __len__(self) -> int:
        return len(self._places)

    def answers(self, digests: Sequence[bytes]) -> Answers:
        """Those of these rows, in order, as they are stored. Raises UserError where a row is not there."""
        parts: list[Answers] = []
        for digest in digests:
            if digest not in self._places:
                raise UserError(f"{self.folder}: a row of this run is not in the cache; {REMEDY}")
            place = self._places[digest]
            part = self._parts[place.part]
            parts.append(read_row(self._files[place.part], part, digest, place.first, place.last, place.check))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def refuse_others(self, key: TeacherKey) -> None:
        """Raise UserError where a part does not hold what this kind of answers is made of."""
        wanted = ANSWERS[key.kind] | ({"scale"} if key.stored == "int8" else set())
        for file, part in zip(self._files, self._parts, strict=True):
            if set(answer_names(part)) != wanted:
                raise UserError(f"{file}: has {', '.join(answer_names(part))}, not {key.kind} answers; {REMEDY}")
            if key.kind == "hidden" and width_of(part) != width_of(self._parts[0]):
                raise UserError(f"{file}: has hidden states of another width; {REMEDY}")

    def add(self, digests: Sequence[bytes], answers: Sequence[Answers]) -> None:
        """Write a new part. answers: of each row. This store sees it only when it is opened anew."""
        taken = [int(file.stem.removeprefix("part-")) for file in self.folder.glob("part-*.safetensors")]
        number = max(taken, default=-1) + 1  # one in between may have been removed
        self._write(self.folder / f"part-{number:05d}.safetensors", digests, answers)

    def _write(self, file: Path, digests: Sequence[bytes], answers: Sequence[Answers]) -> None:
        tensors = {name: torch.cat([one[name] for one in answers]).contiguous() for name in answers[0]}
        counts = [0, *(len(next(iter(one.values()))) for one in answers)]
        tensors["offsets"] = torch.tensor(counts, dtype=torch.int64).cumsum(0)
        tensors["digests"] = torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32).copy())
        tensors["checks"] = torch.tensor(
            [check_of(one, digest) for digest, one in zip(digests, answers, strict=True)], dtype=torch.int64
        )
        _save_durably(tensors, file, {"teacher": self.folder.name})

    def unfinished(self) -> dict[bytes, Answers]:
        """What a stopped command was answered of a part that it did not write, by digest."""
        file = self.folder / UNFINISHED
        if not file.exists():
            return {}
        try:
            part, rows = self._open(file)
            if set(answer_names(part)) != ANSWERS["topk"]:
                raise UserError(f"{file}: has {', '.join(answer_names(part))}, not topk answers; {REMEDY}")
            return {digest: read_row(file, part, digest, *row) for digest, row in rows.items() if digest not in self}
        except UserError as error:  # the parts beside it are whole
            raise UserError(f"{error}".replace(REMEDY, "remove this file and run the same command again")) from error

    def write_unfinished(self, answers: Mapping[bytes, Answers]) -> None:
        """Keep answers of a part that is not whole yet; without any, remove the file."""
        if answers:
            self._write(self.folder / UNFINISHED, list(answers), list(answers.values()))
        else:
            (self.folder / UNFINISHED).unlink(missing_ok=True)

    @property
    def has_teacher(self) -> bool:
        """Whether the files beside the parts are there; teacher.json is written last."""
        return (self.folder / TEACHER).is_file()

    def write_teacher(self, head: Head | None, key: TeacherKey, path: str, vocabulary_rows: int) -> None:
        """head: None for a teacher on a server; path: the teacher's, for a reader."""
        if key.kind == "hidden":
            assert head is not None
            tensors = {"weight": head.weight_VD.detach().cpu().contiguous()}
            if head.bias_V is not None:
                tensors["bias"] = head.bias_V.detach().cpu().contiguous()
            tensors["check"] = torch.tensor(check_of(tensors))
            _save_durably(tensors, self.folder / HEAD, {"teacher": self.folder.name})
        facts = {"format": FORMAT, "teacher": path, **asdict(key), "vocabulary_rows": vocabulary_rows}
        facts |= {} if head is None else {"scale": head.scale, "softcap": head.softcap}
        write_text_durably(self.folder / TEACHER, json_text(facts))

    def teacher(self, name: str, key: TeacherKey, device: str) -> CachedTeacher:
        """The teacher of this store. Raises UserError where its files are damaged or another teacher's."""
        try:
            facts, file = read_json(self.folder / TEACHER), self.folder / HEAD
        except UserError as error:
            raise UserError(f"{self.folder / TEACHER}: cannot be read, or is damaged; {REMEDY}") from error
        expected = {"format": FORMAT, **asdict(key)}
        needed = {"vocabulary_rows", *(["scale"] if key.kind == "hidden" else [])}
        known = {name: facts.get(name) for name in expected} == expected
        needed |= {"softcap"} if facts.get("softcap") is not None else set()
        if not known or not all(type(facts.get(name)) in (int, float) for name in needed):
            raise UserError(f"{self.folder / TEACHER}: is not that of this teacher; {REMEDY}")
        self.refuse_others(key)
        if key.kind != "hidden":
            return CachedTeacher(name, self, key.kind, None, facts["vocabulary_rows"])
        try:
            with safe_open(file, framework="pt") as opened:
                owner = (opened.metadata() or {}).get("teacher")
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise unreadable(file, error) from error
        if owner != self.folder.name:
            raise UserError(f"{file}: belongs to another teacher ({owner}); {REMEDY}")
        check = tensors.pop("check", None)
        width = width_of(self._parts[0]) if self._parts else None
        shape = tensors["weight"].shape if "weight" in tensors else ()
        if len(shape) != 2 or shape[0] != facts["vocabulary_rows"] or (width is not None and shape[1] != width):
            raise UserError(f"{file}: has no output layer, or that of other answers; {REMEDY}")
        if check is None or check.dtype != torch.int64 or check.numel() != 1 or int(check) != check_of(tensors):
            raise UserError(f"{file}: is damaged, its values are not those that were written; {REMEDY}")
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        head = Head(tensors["weight"], tensors.get("bias"), float(facts["scale"]), facts.get("softcap"))
        return CachedTeacher(name, self, key.kind, head, facts["vocabulary_rows"])


@dataclass(frozen=True, eq=False)
class CachedTeacher:
    """What an objective needs of a teacher that is not in memory. Every row that it is asked about is in `store`.

    kind: as in the recipe; head: of kind hidden, its output layer.
    """

    name: str
    store: TeacherStore
    kind: str
    head: Head | None
    vocabulary_rows: int

    def logits(self, rows: Batch) -> TeacherLogits:
        """What it says at the positions that predict response tokens, row after row, on the rows' device.

        Raises UserError where a row is not in the store.
        """
        device = rows["input_ids"].device
        answers = self.store.answers(batch_digests(rows))
        if self.head is None and bool(((answers["ids"] < 0) | (answers["ids"] >= self.vocabulary_rows)).any()):
            raise UserError(
                f"{self.store.folder}: has token ids above the vocabulary of {self.vocabulary_rows} rows; {REMEDY}"
            )
        found = {name: values.to(device) for name, values in answers.items()}
        if self.head is not None:
            return HiddenTeacher(from_stored(found), self.head)
        if self.kind == "sampled":
            return SampledTeacher(found["ids"].long(), found["entropy"], self.vocabulary_rows)
        return TopKTeacher(found["ids"].long(), found["log_q"], found["log_tail"], self.vocabulary_rows)


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


def _save_durably(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    temporary = file.with_name(TEMPORARY_PREFIX + file.name)
    with disk_errors(file):
        try:
            save_file(tensors, temporary, metadata)
            give_usual_permissions(temporary)
            fsync_path(temporary)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(file.parent)


def bytes_per_token(head_shape: tuple[int, int], key: TeacherKey) -> int:
    """On disk, without what each row takes. head_shape: (V, E) of the teacher's output layer."""
    each, (rows, width) = STORED[key.stored].itemsize, head_shape
    if key.samples is not None:
        return key.samples * torch.int32.itemsize + torch.float32.itemsize
    if key.top_k is not None:
        return min(key.top_k, rows - 1) * (each + torch.int32.itemsize) + torch.float32.itemsize
    return width * each + (torch.float32.itemsize if key.stored == "int8" else 0)
