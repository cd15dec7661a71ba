"""Fills the stores of teachers (store.py): one teacher in memory at a time, on the rows that are not there yet.

The rows of a part follow from the missing rows alone: ordered by length and digest, cut into parts of a fixed size.
So a command that was killed and is given again writes what it would have written, byte for byte.

Shape legend: R rows, T positions, N response tokens, E width of the teacher, V vocabulary rows.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.cache.served_answers import ServedAnswers
from kd.cache.store import (
    HEAD,
    STORED,
    TEACHER,
    Answers,
    CachedTeacher,
    TeacherKey,
    TeacherStore,
    as_stored,
    bytes_per_token,
    row_digest,
    served_key,
    teacher_key,
)
from kd.config.cache_recipe import CacheRecipe
from kd.config.served_recipe import ServedTeacher
from kd.data.batches import model_inputs, predicting_positions
from kd.data.mixing import MixedRows, pad_rows
from kd.data.token_rows import TokenRows
from kd.errors import MachineError, UserError
from kd.models.checkpoint import Checkpoint
from kd.models.forward import final_hidden_states, head_of, unwrapped
from kd.models.head import Head, slices
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
from kd.models.teacher_logits import systematic_samples, top_k
from kd.runs.claimed_folder import ClaimedFolder, refuse_file
from kd.runs.lock import HeldError

logger = logging.getLogger("dae")

PART_BYTES = 64 << 20  # of answers in one file
# The same for a teacher on a server: what a stopped command asks again, at most; enough rows to be asked side by side.
SERVED_PART_BYTES, SERVED_PART_ROWS = 4 << 20, 512
KNOWN_ROWS = 16  # among which one is asked again
WAIT_SECONDS = 2.0
LOGITS_ELEMENTS = 2**23  # at once, where probabilities are needed
# Rotary embeddings that depend on the longest row of a batch, once it is longer than the model was first trained on.
OF_THE_BATCH = {"dynamic", "longrope"}

RowsOfRoute = Sequence[tuple[TokenRows, Sequence[int]]]  # rows, and which of them
Missing = tuple[bytes, tuple[TokenRows, int]]  # digest, and where the row is


@dataclass(frozen=True)
class CachePlan:
    """What a teacher's store needs for a run.

    rows: how many the run asks it; missing: digest -> (rows, index) of those that are not there yet, and that no plan
    before this one adds to the same store; head_shape: (V, E) of the teacher's output layer; known: a row that is
    there.
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
        return head + self.missing_tokens * bytes_per_token(width, self.key)

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
    try:
        refuse_file(Path(cache.path))
    except UserError as error:
        raise UserError(f"cache.path: {error}") from error
    plans = {}
    shared_rows = min(head_shape(role, inputs, settings)[0] for role in inputs)
    planned: dict[str, set[bytes]] = {}
    for role, several in rows.items():
        shape = head_shape(role, inputs, settings)
        if role in served:
            shape = (shared_rows, shape[1])
            key = served_key(served[role], shared_rows)
        else:
            key = teacher_key(inputs[role], inputs["base"], settings.dtype, cache)
        store = TeacherStore(Path(cache.path) / key.digest)
        wanted = {row_digest(*part.arrays(index)): (part, index) for part, indices in several for index in indices}
        before = planned.setdefault(key.digest, set())
        missing = {digest: row for digest, row in wanted.items() if digest not in store and digest not in before}
        before.update(missing)
        plans[role] = CachePlan(role, key, store, len(wanted), missing, shape, known_row(store, wanted))
    return plans


def known_row(store: TeacherStore, rows: Mapping[bytes, tuple[TokenRows, int]]) -> Missing | None:
    """Of the first rows that are in the store, by digest, the one with the most response tokens."""
    there = islice(((digest, rows[digest]) for digest in sorted(rows) if digest in store), KNOWN_ROWS)
    return max(there, key=lambda one: int(one[1][0].arrays(one[1][1])[1].sum()), default=None)


def head_shape(role: str, inputs: Mapping[str, Checkpoint], settings: LoadSettings) -> tuple[int, int]:
    """(V, E) of a teacher's output layer, of the base's for a teacher on a server; reads no weights."""
    one = inputs["base"] if role not in inputs or inputs[role].is_adapter else inputs[role]
    model: Any = unwrapped(one.meta_model(settings.trust_remote_code))
    rows, width = model.get_output_embeddings().weight.shape
    return int(rows), int(width)


def fill(
    inputs: Mapping[str, Checkpoint],
    served: Mapping[str, ServedTeacher],
    plans: Mapping[str, CachePlan],
    settings: LoadSettings,
    check: Callable[[Role], None],
    batch_tokens: int,
    text_of: Callable[[int], str],
) -> dict[str, CachedTeacher]:
    """Fill what is missing, one teacher after the other, and open the stores.

    check: raises UserError for a teacher that cannot answer these rows; batch_tokens: of one pass, at most, but at
    least one row; text_of: a token's text, by its id.

    Raises:
        UserError: a checkpoint cannot be read, or a file cannot be written.
        MachineError: the disk is too small; raised before anything is computed, where that can be foreseen.
    """
    torch.set_flush_denormal(True)  # denormals slow a CPU several times over
    refuse_small_disk(plans.values())
    for role, plan in plans.items():
        if plan.is_complete:
            logger.info("cache: %s: all %s rows are in %s", role, f"{plan.rows:,}", plan.store.folder)
            continue
        with held_store(plan.store.folder):
            now = plan.renewed()
            if not now.is_complete:
                if role in served:
                    fill_from_server(served[role], now, text_of)
                else:
                    fill_one(inputs, now, settings, check, batch_tokens)
    return cached_teachers(plans, settings)


@contextmanager
def held_store(folder: Path) -> Iterator[None]:
    """Hold a store for this process, once no other run fills it. Raises UserError where it cannot be written."""
    waits = False
    while True:
        # Without teacher.json, which someone has removed, the parts are ours even so.
        own = frozenset({HEAD, *(file.name for file in folder.glob("part-*.safetensors"))})
        with ExitStack() as stack:
            try:
                stack.enter_context(ClaimedFolder(folder, TEACHER, own).held(lambda: None))
            except HeldError:
                if not waits:
                    logger.info("cache: waiting for the run that fills %s", folder)
                waits = True
            except UserError as error:
                raise UserError(f"cache.path: {error}") from error
            else:
                yield
                return
        time.sleep(WAIT_SECONDS)


def cached_teachers(plans: Mapping[str, CachePlan], settings: LoadSettings) -> dict[str, CachedTeacher]:
    """The teachers of complete stores."""
    return {
        role: TeacherStore(plan.store.folder).teacher(role, plan.key, settings.device) for role, plan in plans.items()
    }


def fill_one(
    inputs: Mapping[str, Checkpoint],
    plan: CachePlan,
    settings: LoadSettings,
    check: Callable[[Role], None],
    batch_tokens: int,
) -> None:
    """Add a teacher's missing rows to its store, which this process holds."""
    teacher = lone_teacher(plan.role, inputs, settings)
    check(teacher)
    check_head(teacher, vocabulary_rows([teacher]))
    with activate(teacher) as model:
        head = head_of(model)
    if not plan.store.has_teacher:
        plan.store.write_teacher(head, plan.key, inputs[plan.role].lasting_path, head.weight_VD.shape[0])

    def answers(part: Sequence[Missing]) -> list[Answers]:
        batches = batches_of(part, batch_tokens)
        return [one for batch in batches for one in answers_of(teacher, head, plan.key, batch)]

    add_parts(plan, parts_of(plan, PART_BYTES), answers)


def fill_from_server(teacher: ServedTeacher, plan: CachePlan, text_of: Callable[[int], str]) -> None:
    """Ask a server for a teacher's missing rows, and add them to its store, which this process holds."""
    server = ServedAnswers(plan.role, teacher, plan.head_shape[0], text_of)
    if plan.known is not None:
        digest, (rows, index) = plan.known
        server.refuse_change(rows.arrays(index), plan.store.answers([digest]), plan.store.folder)
    if not plan.store.has_teacher:
        plan.store.write_teacher(None, plan.key, str(teacher), plan.head_shape[0])

    def answers(part: Sequence[Missing]) -> list[Answers]:
        return server.answers([rows.arrays(index) for _, (rows, index) in part])

    add_parts(plan, parts_of(plan, SERVED_PART_BYTES, SERVED_PART_ROWS), answers)


def add_parts(
    plan: CachePlan, parts: Iterable[Sequence[Missing]], answers: Callable[[Sequence[Missing]], list[Answers]]
) -> None:
    """Have the missing rows answered part by part, and log how far it is."""
    total, done = len(plan.missing), 0
    logger.info(
        "cache: %s answers %s of %s rows, %.3g MB, into %s",
        *(plan.role, f"{total:,}", f"{plan.rows:,}", plan.missing_bytes / 1e6, plan.store.folder),
    )
    for part in parts:
        plan.store.add([digest for digest, _ in part], answers(part))
        done += len(part)
        if done < total:
            logger.info("cache: %s: %s of %s rows", plan.role, f"{done:,}", f"{total:,}")


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
        raise MachineError(
            f"{folder}: the cache needs {needed / 1e6:,.0f} MB more, and the disk has {free / 1e6:,.0f} MB free; free "
            "some space, set cache.path to another disk, or store less (cache.dtype=int8, cache.kind=topk)"
        )


def refuse_batch_dependent(role: Role, longest: int) -> None:
    """Raise UserError for a teacher whose answer to a row depends on which rows it is in a batch with."""
    config: Any = unwrapped(role.model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type")
    limit = int(rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None) or 0)
    if kind in OF_THE_BATCH and longest > limit:
        raise UserError(
            f"cache: {role.name}: rows of more than {limit} tokens change what it says of other rows in their batch "
            f"(rope_type: {kind}), so it cannot answer beforehand; set data.max_length={limit}, or remove cache"
        )


def lone_teacher(role: str, inputs: Mapping[str, Checkpoint], settings: LoadSettings) -> Role:
    """A teacher by itself: a full checkpoint, or its adapter on the base."""
    one = inputs[role]
    if not one.is_adapter:
        return Role(role, load_model(one, settings), None)
    backbone = Backbone(inputs["base"], load_model(inputs["base"], settings))
    name = add_frozen_adapter(backbone, one)
    return Role(role, backbone.model, name)


def parts_of(plan: CachePlan, part_bytes: int, part_rows: int = 1) -> Iterator[list[Missing]]:
    """The missing rows, longest first, in parts of at least so many bytes of answers and so many rows."""
    ordered = sorted(plan.missing.items(), key=lambda item: (-length(item), item[0]))
    tokens = max(1, part_bytes // bytes_per_token(plan.head_shape[1], plan.key))
    part: list[Missing] = []
    held = 0
    for item in ordered:
        rows, index = item[1]
        part.append(item)
        held += int(rows.arrays(index)[1].sum())
        if held >= tokens and len(part) >= part_rows:
            yield part
            part, held = [], 0
    if part:
        yield part


def length(item: Missing) -> int:
    rows, index = item[1]
    return len(rows.arrays(index)[0])


def batches_of(part: Sequence[Missing], batch_tokens: int) -> Iterator[list[Missing]]:
    """Rows that pass the teacher together; the longest comes first."""
    start = 0
    while start < len(part):
        count = max(1, batch_tokens // length(part[start]))
        yield list(part[start : start + count])
        start += count


def answers_of(teacher: Role, head: Head, key: TeacherKey, rows: Sequence[Missing]) -> list[Answers]:
    """What is stored of each row, on the CPU. Raises UserError where it is not finite."""
    mixed = [MixedRows([rows_of], [0])[(0, index)] for _, (rows_of, index) in rows]
    batch = {name: values.to(teacher.model.device) for name, values in pad_rows(mixed, pad_token_id=0).items()}
    predicting_BT = predicting_positions(batch)
    with activate(teacher) as model, torch.no_grad():
        hidden_BTE = final_hidden_states(model, model_inputs(batch))[:, :-1]
    hidden_NE, counts = hidden_BTE[predicting_BT], predicting_BT.sum(1).tolist()
    if not torch.isfinite(hidden_NE).all():
        raise UserError(f"{teacher.name}: its hidden states are not finite on these rows; save its checkpoint again.")
    if key.kind == "hidden":
        answers = as_stored(hidden_NE, key.stored)
    elif key.kind == "topk":
        answers = largest(hidden_NE, head, key)
    else:
        answers = drawn(hidden_NE, head, key, [digest for digest, _ in rows], counts)
    by_row = {name: values.cpu().split(counts) for name, values in answers.items()}
    return [{name: parts[row] for name, parts in by_row.items()} for row in range(len(rows))]


def largest(hidden_NE: torch.Tensor, head: Head, key: TeacherKey) -> Answers:
    """The largest probabilities of each token, and the logarithm of what is left."""
    assert key.top_k is not None
    k = min(key.top_k, head.weight_VD.shape[0] - 1)
    parts = [top_k(head.logits(hidden_NE[tokens]), k) for tokens in logits_chunks(hidden_NE, head)]
    ids_NK, log_q_NK, log_tail_N = (torch.cat(each) for each in zip(*parts, strict=True))
    return {"ids": ids_NK, "log_q": log_q_NK.to(STORED[key.stored]), "log_tail": log_tail_N}


def drawn(
    hidden_NE: torch.Tensor, head: Head, key: TeacherKey, digests: Sequence[bytes], counts: Sequence[int]
) -> Answers:
    """Tokens drawn at each position, and the entropy there. A row's digest is the seed of its draws."""
    assert key.samples is not None
    offsets = [seeded_offsets(digest, count) for digest, count in zip(digests, counts, strict=True)]
    offsets_N = torch.cat(offsets).to(hidden_NE.device)
    parts = [
        systematic_samples(head.logits(hidden_NE[tokens]), offsets_N[tokens], key.samples)
        for tokens in logits_chunks(hidden_NE, head)
    ]
    ids_NS, entropy_N = (torch.cat(each) for each in zip(*parts, strict=True))
    return {"ids": ids_NS, "entropy": entropy_N}


def seeded_offsets(digest: bytes, count: int) -> torch.Tensor:
    """[count] fp64, uniform in 0..1."""
    return torch.from_numpy(np.random.default_rng(np.frombuffer(digest, np.uint32)).random(count))


def logits_chunks(hidden_NE: torch.Tensor, head: Head) -> Iterator[slice]:
    return slices(len(hidden_NE), max(1, LOGITS_ELEMENTS // head.weight_VD.shape[0]))
