"""Fills the stores of teachers (store.py): one teacher in memory at a time, on the rows that are not there yet.

The rows of a part follow from the missing rows alone: ordered by length and digest, cut into parts of a fixed size.
So a command that was killed and is given again writes what it would have written, byte for byte.

Shape legend: R rows, T positions, N response tokens, E width of the teacher, V vocabulary rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.cache.keys import STORED, TeacherKey, bytes_per_token
from kd.cache.parts import Answers, as_stored
from kd.cache.plans import CachePlan, Missing, refuse_small_disk
from kd.cache.served_answers import ServedAnswers
from kd.cache.store import HEAD, TEACHER, UNFINISHED, CachedTeacher, TeacherStore
from kd.config.served_recipe import ServedTeacher
from kd.data.batches import model_inputs, predicting_positions
from kd.data.mixing import MixedRows, pad_rows
from kd.errors import UserError
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
    load_teacher,
    vocabulary_rows,
)
from kd.models.teacher_logits import systematic_samples, top_k
from kd.runs.claimed_folder import ClaimedFolder
from kd.runs.lock import HeldError

logger = logging.getLogger("dae")

PART_BYTES = 64 << 20  # of answers in one file
# The same for a teacher on a server; enough rows to be asked side by side.
SERVED_PART_BYTES, SERVED_PART_ROWS = 4 << 20, 512
KEPT_EVERY = 32  # rows of a server: after a kill, about so many are asked again
WAIT_SECONDS = 2.0
LOGITS_ELEMENTS = 2**23  # at once, where probabilities are needed
# Rotary embeddings that depend on the longest row of a batch, once it is longer than the model was first trained on.
OF_THE_BATCH = {"dynamic", "longrope"}


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
        own = frozenset({HEAD, UNFINISHED, *(file.name for file in folder.glob("part-*.safetensors"))})
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
    kept = plan.store.unfinished()
    if plan.known is not None:
        digest, (rows, index) = plan.known
        server.refuse_change(rows.arrays(index), plan.store.answers([digest]), plan.store.folder)
    elif (known := next((item for item in plan.missing.items() if item[0] in kept), None)) is not None:
        digest, (rows, index) = known
        server.refuse_change(rows.arrays(index), kept[digest], plan.store.folder)
    if not plan.store.has_teacher:
        plan.store.write_teacher(None, plan.key, str(teacher), plan.head_shape[0])

    def answers(part: Sequence[Missing]) -> list[Answers]:
        asked = [item for item in part if item[0] not in kept]
        try:
            answered = server.answers([rows.arrays(index) for _, (rows, index) in asked])
            for count, (place, answer) in enumerate(answered, 1):
                kept[asked[place][0]] = answer
                if count % KEPT_EVERY == 0:
                    plan.store.write_unfinished(kept)
        except BaseException:
            plan.store.write_unfinished(kept)
            raise
        return [kept.pop(digest) for digest, _ in part]

    add_parts(plan, parts_of(plan, SERVED_PART_BYTES, SERVED_PART_ROWS), answers)
    plan.store.write_unfinished(kept)  # of rows that another recipe asked for, if any


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
        return Role(role, load_teacher(one, settings), None)
    backbone = Backbone(inputs["base"], load_model(inputs["base"], settings))
    name = add_frozen_adapter(backbone, one)
    return Role(role, backbone.model, name)


def parts_of(plan: CachePlan, part_bytes: int, part_rows: int = 1) -> Iterator[list[Missing]]:
    """The missing rows, longest first, in parts of at least so many bytes of answers and so many rows."""
    ordered = sorted(plan.missing.items(), key=lambda item: (-length(item), item[0]))
    tokens = max(1, part_bytes // bytes_per_token(plan.head_shape, plan.key))
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
