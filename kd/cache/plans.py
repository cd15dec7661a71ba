"""What the stores of a run's teachers have and lack: a plan for each teacher, made without opening weights.

Shape legend: V vocabulary rows, E width of a teacher.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from kd.cache.keys import STORED, TeacherKey, bytes_per_token, row_digest, served_key, teacher_key
from kd.cache.store import TeacherStore
from kd.config.cache_recipe import CacheRecipe
from kd.config.served_recipe import ServedTeacher
from kd.data.token_rows import TokenRows
from kd.errors import MachineError, UserError
from kd.models.checkpoint import Checkpoint
from kd.models.forward import unwrapped
from kd.models.roles import LoadSettings
from kd.runs.claimed_folder import refuse_file

KNOWN_ROWS = 16  # among which one is asked again

RowsOfRoute = Sequence[tuple[TokenRows, Sequence[int]]]  # rows, and which of them
Missing = tuple[bytes, tuple[TokenRows, int]]  # digest, and where the row is


@dataclass(frozen=True)
class CachePlan:
    """What a teacher's store needs for a run.

    rows: how many the run asks it; missing: digest -> (rows, index) of those that are not there yet, and that no plan
    before this one adds to the same store; head_shape: (V, E) of the teacher's output layer, of a teacher on a
    server (shared V, 0); known: a row that is there, if any.
    """

    role: str
    key: TeacherKey
    store: TeacherStore
    rows: int
    missing: Mapping[bytes, tuple[TokenRows, int]]
    head_shape: tuple[int, int]
    known: Missing | None = None

    @property
    def missing_tokens(self) -> int:
        """Response tokens of the missing rows."""
        return sum(int(rows.arrays(index)[1].sum()) for rows, index in self.missing.values())

    @property
    def missing_input_tokens(self) -> int:
        """All tokens of the missing rows: what the teacher reads."""
        return sum(len(rows.arrays(index)[0]) for rows, index in self.missing.values())

    @property
    def missing_bytes(self) -> int:
        """What filling writes: the answers, and the output layer where it is not there yet."""
        rows, width = self.head_shape
        is_new = self.key.kind == "hidden" and bool(self.missing) and not self.store.has_teacher
        head = rows * width * STORED[self.key.dtype].itemsize if is_new else 0
        return head + self.missing_tokens * bytes_per_token(self.head_shape, self.key)

    @property
    def is_complete(self) -> bool:
        return not self.missing and self.store.has_teacher

    def renewed(self) -> CachePlan:
        """As things are now: two roles may be one teacher, and another run may have filled its store meanwhile."""
        store = TeacherStore(self.store.folder)
        missing = {digest: place for digest, place in self.missing.items() if digest not in store}
        known = self.known or known_row(store, self.missing)
        return replace(self, store=store, missing=missing, known=known)


def cache_plans(
    cache: CacheRecipe,
    inputs: Mapping[str, Checkpoint],
    served: Mapping[str, ServedTeacher],
    rows: Mapping[str, RowsOfRoute],
    settings: LoadSettings,
) -> dict[str, CachePlan]:
    """What each teacher's store has and lacks. Opens no weights, writes nothing.

    Args:
        cache: of the recipe.
        inputs: the run's checkpoints by role, `base` among them.
        served: the teachers on servers by role.
        rows: by the role of the teacher that answers them.
        settings: how the models are opened.

    Raises:
        UserError: the path is a file, or a file of a store is damaged or another teacher's.
    """
    refuse_file(Path(cache.path), "cache.path")
    plans = {}
    shapes = {role: head_shape(role, inputs, settings) for role in inputs}
    shared_rows = min(rows for rows, _ in shapes.values())
    planned: dict[str, set[bytes]] = {}
    for role, several in rows.items():
        if role in served:
            key, shape = served_key(served[role], shared_rows), (shared_rows, 0)
        else:
            key, shape = teacher_key(inputs[role], inputs["base"], settings, cache), shapes[role]
            refuse_wider(role, key, shape[0], shared_rows)
        store = TeacherStore(Path(cache.path) / key.digest)
        wanted = {row_digest(*part.arrays(index)): (part, index) for part, indices in several for index in indices}
        before = planned.setdefault(key.digest, set())
        missing = {digest: row for digest, row in wanted.items() if digest not in store and digest not in before}
        before.update(missing)
        plans[role] = CachePlan(role, key, store, len(wanted), missing, shape, known_row(store, wanted))
    return plans


def refuse_wider(role: str, key: TeacherKey, own_rows: int, shared_rows: int) -> None:
    """Raise UserError where probabilities would be over tokens that the other models lack."""
    if key.kind != "hidden" and own_rows > shared_rows:
        raise UserError(
            f"cache.kind: {key.kind}: the probabilities of {role} are over {own_rows} vocabulary rows, and the models "
            f"share only {shared_rows}; use cache.kind=hidden"
        )


def known_row(store: TeacherStore, rows: Mapping[bytes, tuple[TokenRows, int]]) -> Missing | None:
    """Of the first rows that are in the store, by digest, the one with the most response tokens."""
    there = islice(((digest, rows[digest]) for digest in sorted(rows) if digest in store), KNOWN_ROWS)
    return max(there, key=lambda one: int(one[1][0].arrays(one[1][1])[1].sum()), default=None)


def head_shape(role: str, inputs: Mapping[str, Checkpoint], settings: LoadSettings) -> tuple[int, int]:
    """(V, E) of a checkpoint's output layer; reads no weights."""
    one = inputs["base"] if inputs[role].is_adapter else inputs[role]
    model: Any = unwrapped(one.meta_model(settings.trust_remote_code))
    rows, width = model.get_output_embeddings().weight.shape
    return int(rows), int(width)


def refuse_small_disk(plans: Iterable[CachePlan]) -> None:
    """Raise MachineError where the disk has no room for what is missing."""
    several = list(plans)
    needed = sum(plan.missing_bytes for plan in several)
    if not needed:
        return
    folder = several[0].store.folder.parent
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        less = keys_to_store_less(next(plan for plan in several if plan.missing_bytes))
        raise MachineError(
            f"{folder}: the cache needs {needed / 1e6:,.2f} MB more, and the disk has {free / 1e6:,.2f} MB free; free "
            f"some space, set cache.path to another disk, or store less ({less})"
        )


def keys_to_store_less(plan: CachePlan) -> str:
    """The keys of the recipe that would make a plan's answers smaller."""
    if plan.key.is_served:
        return f"{plan.role}.top_k"
    if plan.key.kind == "hidden":
        return "cache.kind=topk" if plan.key.stored == "int8" else "cache.dtype=int8, cache.kind=topk"
    return "cache.top_k, cache.kind=sampled" if plan.key.kind == "topk" else "cache.samples"
