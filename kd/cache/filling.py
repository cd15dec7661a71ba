"""Fills the stores of teachers (store.py): one teacher in memory at a time, on the rows that are not there yet.

The rows of a part follow from the missing rows alone: ordered by length and digest, cut into parts of a fixed size.
So a command that was killed and is given again writes what it would have written, byte for byte.

Shape legend: R rows, T positions, N response tokens, E width of the teacher.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kd.cache.store import (
    HEAD,
    TEACHER,
    CachedTeacher,
    TeacherKey,
    TeacherStore,
    bytes_per_token,
    row_digest,
    teacher_key,
)
from kd.config.cache_recipe import CacheRecipe
from kd.data.batches import model_inputs, predicting_positions
from kd.data.mixing import MixedRows, pad_rows
from kd.data.token_rows import TokenRows
from kd.errors import MachineError
from kd.models.checkpoint import Checkpoint
from kd.models.forward import final_hidden_states, head_of
from kd.models.roles import (
    Backbone,
    LoadSettings,
    Role,
    activate,
    add_frozen_adapter,
    check_head,
    load_model,
    vocabulary_rows,
)
from kd.runs.claimed_folder import ClaimedFolder

logger = logging.getLogger("dae")

PART_BYTES = 64 << 20  # of hidden states in one file, in memory until it is written
BATCH_ROWS = 32
BATCH_TOKENS = 16_384

RowsOfRoute = Sequence[tuple[TokenRows, Sequence[int]]]  # rows, and which of them


@dataclass(frozen=True)
class CachePlan:
    """What a teacher's store needs for a run. missing: digest -> (rows, index) of the rows that are not there yet."""

    role: str
    key: TeacherKey
    store: TeacherStore
    rows: int
    missing: Mapping[bytes, tuple[TokenRows, int]]

    @property
    def missing_tokens(self) -> int:
        """Response tokens of the missing rows."""
        return sum(int(rows.arrays(index)[1].sum()) for rows, index in self.missing.values())

    @property
    def missing_input_tokens(self) -> int:
        """All tokens of the missing rows: what the teacher reads."""
        return sum(len(rows.arrays(index)[0]) for rows, index in self.missing.values())

    @property
    def is_complete(self) -> bool:
        return not self.missing and self.store.has_head

    def renewed(self) -> CachePlan:
        """As things are now: two roles may be one teacher, and another run may have filled its store meanwhile."""
        store = TeacherStore(self.store.folder)
        missing = {digest: place for digest, place in self.missing.items() if digest not in store}
        return replace(self, store=store, missing=missing)


def cache_plans(
    cache: CacheRecipe,
    inputs: Mapping[str, Checkpoint],
    rows: Mapping[str, RowsOfRoute],
    dtype: torch.dtype,
) -> dict[str, CachePlan]:
    """What each teacher's store has and lacks. Opens no weights, writes nothing.

    Args:
        cache: of the recipe.
        inputs: the run's checkpoints by role, `base` among them.
        rows: by the role of the teacher that answers them.
        dtype: of the models in memory.

    Raises:
        UserError: a file of a store is damaged or another teacher's.
    """
    plans = {}
    for role, several in rows.items():
        key = teacher_key(inputs[role], inputs["base"], dtype, cache)
        store = TeacherStore(Path(cache.path) / key.digest)
        wanted = {row_digest(*part.arrays(index)): (part, index) for part, indices in several for index in indices}
        missing = {digest: place for digest, place in wanted.items() if digest not in store}
        plans[role] = CachePlan(role, key, store, len(wanted), missing)
    return plans


def fill(
    inputs: Mapping[str, Checkpoint],
    plans: Mapping[str, CachePlan],
    settings: LoadSettings,
    check: Callable[[Role], None],
) -> dict[str, CachedTeacher]:
    """Fill what is missing, one teacher after the other, and open the stores.

    check: raises UserError for a teacher that cannot answer these rows.

    Raises:
        UserError: a live process fills the same store, a checkpoint cannot be read, or a file cannot be written.
        MachineError: the disk is too small, which is told before anything is computed where it can be.
    """
    for role, plan in plans.items():
        if plan.is_complete:
            logger.info("cache: %s: all %s rows are in %s", role, f"{plan.rows:,}", plan.store.folder)
            continue
        with ClaimedFolder(plan.store.folder, TEACHER, frozenset({HEAD})).held(lambda: None):
            fill_one(inputs, plan.renewed(), settings, check)
    return cached_teachers(plans, settings)


def cached_teachers(plans: Mapping[str, CachePlan], settings: LoadSettings) -> dict[str, CachedTeacher]:
    """The teachers of complete stores."""
    found = {}
    for role, plan in plans.items():
        store = TeacherStore(plan.store.folder)
        found[role] = CachedTeacher(role, store, store.head(settings.device))
    return found


def fill_one(
    inputs: Mapping[str, Checkpoint], plan: CachePlan, settings: LoadSettings, check: Callable[[Role], None]
) -> None:
    """Add a teacher's missing rows to its store, which this process holds."""
    teacher = lone_teacher(plan.role, inputs, settings)
    check(teacher)
    check_head(teacher, vocabulary_rows([teacher]))
    with activate(teacher) as model:
        head = head_of(model)
    width = head.weight_VD.shape[1]
    needed = plan.missing_tokens * bytes_per_token(width, plan.key.stored)
    refuse_small_disk(plan.store.folder, needed)
    counts = f"{len(plan.missing):,} of {plan.rows:,} rows"
    logger.info("cache: %s answers %s, %.3g MB, into %s", plan.role, counts, needed / 1e6, plan.store.folder)
    if not plan.store.has_head:
        plan.store.write_head(head, plan.key, inputs[plan.role].lasting_path)
    for part in parts_of(plan, width):
        hidden = [states for batch in batches_of(part) for states in answers(teacher, batch)]
        plan.store.add([digest for digest, _ in part], hidden, plan.key.stored)


def refuse_small_disk(folder: Path, needed: int) -> None:
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise MachineError(
            f"{folder}: the cache needs {needed / 1e6:,.0f} MB more, and the disk has {free / 1e6:,.0f} MB free; free "
            "some space, set cache.path to another disk, or cache.dtype=int8"
        )


def lone_teacher(role: str, inputs: Mapping[str, Checkpoint], settings: LoadSettings) -> Role:
    """A teacher by itself: a full checkpoint, or its adapter on its base."""
    one = inputs[role]
    if not one.is_adapter:
        return Role(role, load_model(one, settings), None)
    backbone = Backbone(inputs["base"], load_model(inputs["base"], settings))
    name = add_frozen_adapter(backbone, one)
    return Role(role, backbone.model, name)


Missing = tuple[bytes, tuple[TokenRows, int]]


def parts_of(plan: CachePlan, width: int) -> Iterator[list[Missing]]:
    """The missing rows, longest first, in parts of PART_BYTES."""
    ordered = sorted(plan.missing.items(), key=lambda item: (-length(item), item[0]))
    tokens = max(1, PART_BYTES // bytes_per_token(width, plan.key.stored))
    part: list[Missing] = []
    held = 0
    for item in ordered:
        rows, index = item[1]
        part.append(item)
        held += int(rows.arrays(index)[1].sum())
        if held >= tokens:
            yield part
            part, held = [], 0
    if part:
        yield part


def length(item: Missing) -> int:
    rows, index = item[1]
    return len(rows.arrays(index)[0])


def batches_of(part: Sequence[Missing]) -> Iterator[list[Missing]]:
    """Rows that pass the teacher together."""
    start = 0
    while start < len(part):
        count = min(BATCH_ROWS, max(1, BATCH_TOKENS // length(part[start])))
        yield list(part[start : start + count])
        start += count


def answers(teacher: Role, rows: Sequence[Missing]) -> list[Tensor]:
    """[N_r, E] of each row, on the CPU: the hidden states that predict its response tokens."""
    mixed = [MixedRows([rows_of], [0])[(0, index)] for _, (rows_of, index) in rows]
    batch = {name: values.to(teacher.model.device) for name, values in pad_rows(mixed, pad_token_id=0).items()}
    predicting_BT = predicting_positions(batch)
    with activate(teacher) as model, torch.no_grad():
        hidden_BTE = final_hidden_states(model, model_inputs(batch))[:, :-1]
    return [hidden_BTE[b][predicting_BT[b]].cpu() for b in range(len(rows))]
