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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from kd.cache.keys import FORMAT, TeacherKey, batch_digests
from kd.cache.parts import (
    REMEDY,
    Answers,
    answer_names,
    check_of,
    from_stored,
    open_part,
    read_row,
    refuse_owner,
    save_durably,
    unreadable,
    width_of,
    write_part,
)
from kd.data.batches import Batch
from kd.errors import UserError
from kd.models.head import Head
from kd.models.teacher_logits import HiddenTeacher, SampledTeacher, TeacherLogits, TopKTeacher
from kd.runs.files import json_text, read_json, write_text_durably

TEACHER, HEAD, UNFINISHED = "teacher.json", "head.safetensors", "unfinished.safetensors"
ANSWERS = {"hidden": {"hidden"}, "topk": {"ids", "log_q", "log_tail"}, "sampled": {"ids", "entropy"}}


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
            part, rows = open_part(file)
            self._parts.append(part)
            self._places |= {digest: Place(index, *place) for digest, place in rows.items()}

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
        write_part(self.folder / f"part-{number:05d}.safetensors", digests, answers)

    def unfinished(self) -> dict[bytes, Answers]:
        """What a stopped command was answered of a part that it did not write, by digest."""
        file = self.folder / UNFINISHED
        if not file.exists():
            return {}
        try:
            part, rows = open_part(file)
            if set(answer_names(part)) != ANSWERS["topk"]:
                raise UserError(f"{file}: has {', '.join(answer_names(part))}, not topk answers; {REMEDY}")
            return {digest: read_row(file, part, digest, *row) for digest, row in rows.items() if digest not in self}
        except UserError as error:  # the parts beside it are whole
            raise UserError(f"{error}".replace(REMEDY, "remove this file and run the same command again")) from error

    def write_unfinished(self, answers: Mapping[bytes, Answers]) -> None:
        """Keep answers of a part that is not whole yet; without any, remove the file."""
        if answers:
            write_part(self.folder / UNFINISHED, list(answers), list(answers.values()))
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
            save_durably(tensors, self.folder / HEAD)
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
        refuse_owner(file, owner)
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
