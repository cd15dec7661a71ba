"""Shares -> the rows of each optimizer step -> micro-batches -> tensors.

The rows of step k follow from (seed, k), the sources and the rows per step alone: not from micro-batch size, ranks, or
what ran before. Legend: B rows, T positions, S tokens of all rows of a packed batch, K rows drawn so far.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kd.data.token_rows import Ids, Mask, TokenRows
from kd.errors import UserError

SHARE_TOLERANCE = 1e-6
IGNORED_BY_ROUNDING = 1e-9

Row = tuple[int, int]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MixtureSource:
    """n_rows rows of one route that make `share` of all rows; `repeat`: they may start over within an epoch.

    name: for messages; a path where there is one.
    """

    route: str
    n_rows: int
    share: float
    repeat: bool = False
    name: str = ""

    @property
    def title(self) -> str:
        return f"data.{self.route}{f': {self.name}' if self.name else ''}"


class Mixture:
    """Which row of which source comes when.

    Rows are shared out in a chain: the first member takes round(p K) of the first K rows, the next one its part of the
    rest, and so on: routes first, then the sources of each, larger shares first. What rounding leaves over is carried
    to the next step. With two members (two routes, or two sources) each is within 1/2 of share * K at every K: the
    same rows as giving each row to the member that is furthest behind. The i-th member is within (1 + H(i-1)) / 2, H
    the harmonic numbers: it is off by d_i - s_i * sum over k < i of d_k / L_k, with |d| <= 1/2 for the rounding at
    each link, s the shares and L_k what is left after member k, and L_k >= (i - k) s_i. A source of a route with
    several comes with its part of the route's own error on top. Where all s K are whole, as at an epoch's end by
    default, the counts are exact.

    The j-th row that a source gives is entry j mod n of its permutation number j // n: no row comes twice before all
    have come once, over epochs too.
    """

    def __init__(self, sources: Sequence[MixtureSource], rows_per_step: int, seed: int) -> None:
        """rows_per_step: rows of one optimizer step over all micro-batches and ranks.

        Raises:
            UserError: a source is empty, shares are not positive or do not sum to 1, or an epoch is less than a step.
        """
        check_sources(sources)
        assert rows_per_step > 0, rows_per_step
        self.sources = tuple(sources)
        self.rows_per_step = rows_per_step
        self.seed = seed
        self._chain = chain_of(self.sources)
        self._permutation = functools.lru_cache(maxsize=2 * len(sources))(self._make_permutation)
        if self.rows_per_epoch is not None and self.rows_per_epoch < rows_per_step:
            shortest = min((s for s in self.sources if not s.repeat), key=lambda source: source.n_rows / source.share)
            raise UserError(
                f"{shortest.title}: {shortest.n_rows} rows at a share of {shortest.share:g} make an epoch of "
                f"{self.rows_per_epoch} rows, fewer than the {rows_per_step} of one optimizer step; give it more rows, "
                "a smaller share or `repeat: true`, or make the step smaller (train.per_device_train_batch_size x "
                "train.gradient_accumulation_steps x processes)"
            )

    @functools.cached_property
    def rows_per_epoch(self) -> int | None:
        """Rows until the first source without `repeat` is used up at its share; None if all repeat."""
        once = [i for i, source in enumerate(self.sources) if not source.repeat]
        if not once:
            return None
        limits = np.array([self.sources[i].n_rows for i in once])
        longest = min(self.sources[i].n_rows / self.sources[i].share for i in once)
        total = math.floor(longest * (1 + IGNORED_BY_ROUNDING))
        # A source may be one row or so ahead of its share just then.
        while (self.taken(np.array([total]))[once, 0] > limits).any():
            total -= 1
        return total

    def steps(self, num_epochs: float) -> int:
        """Whole optimizer steps in so many epochs; the rest of an epoch is carried over into the next.

        Raises:
            UserError: there is no epoch, since every source repeats, or not one step.
        """
        if self.rows_per_epoch is None:
            raise UserError("data: every source has `repeat: true`, so no epoch ends; set train.max_steps")
        steps = math.floor(num_epochs * self.rows_per_epoch / self.rows_per_step + IGNORED_BY_ROUNDING)
        if steps < 1:
            raise UserError(
                f"train.num_train_epochs: {num_epochs:g}: {self.rows_per_epoch} rows an epoch do not make one step of "
                f"{self.rows_per_step} rows; train longer, or lower train.gradient_accumulation_steps"
            )
        return steps

    def taken(self, totals: npt.ArrayLike) -> Integers:
        """How many rows each source has given once K rows are drawn.

        Args:
            totals: [N] values of K.

        Returns:
            [sources, N] int64; each column sums to its K.
        """
        rest = {"": np.asarray(totals, np.int64)}
        counts = np.zeros((len(self.sources), len(rest[""])), np.int64)
        for link in self._chain:
            available = rest[link.pool]
            part = available if link.part is None else np.floor(available * link.part + 0.5).astype(np.int64)
            rest[link.pool] = available - part
            if link.source is None:
                rest[link.route] = part
            else:
                counts[link.source] = part
        return counts

    def rows_of_step(self, step: int) -> list[Row]:
        """The (source, row) pairs of optimizer step `step`, counted from 0."""
        totals = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step + 1)
        taken = self.taken(totals)
        source_of_row = np.diff(taken, axis=1).argmax(axis=0)
        place_of_row = taken[source_of_row, np.arange(self.rows_per_step)]
        rows = np.empty(self.rows_per_step, np.int64)
        for index, source in enumerate(self.sources):
            chosen = source_of_row == index
            passes, places = np.divmod(place_of_row[chosen], source.n_rows)
            found = np.empty(len(places), np.int64)
            for number in np.unique(passes):
                of_pass = passes == number
                found[of_pass] = self._permutation(index, int(number))[places[of_pass]]
            rows[chosen] = found
        return list(zip(source_of_row.tolist(), rows.tolist(), strict=True))

    def _make_permutation(self, source: int, number: int) -> Integers:
        """[n_rows] the order of a source's rows in its pass `number`."""
        # Raw bits, sorted: numpy promises their stream for good, but not what Generator.permutation makes of them.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, source, number]))
        return np.argsort(bits.random_raw(self.sources[source].n_rows), kind="stable")


def check_sources(sources: Sequence[MixtureSource]) -> None:
    """Raises UserError unless there are rows everywhere and shares are positive and sum to 1."""
    if not sources:
        raise UserError("data: no training rows; add a source")
    for source in sources:
        if source.n_rows < 1:
            raise UserError(f"{source.title}: has no usable rows; give it some, or remove it")
        if not source.share > 0:
            raise UserError(f"{source.title}: share: {source.share:g}: not above 0; to leave the source out, remove it")
    total = math.fsum(source.share for source in sources)
    if abs(total - 1) > SHARE_TOLERANCE:
        raise UserError(f"data: the shares sum to {total:g}, not 1; let them sum to 1")


@dataclass(frozen=True)
class Link:
    """One division: `part` of what is left in `pool` (None: all of it) goes to a source, or to a route's own pool."""

    pool: str
    part: float | None
    route: str
    source: int | None


def chain_of(sources: Sequence[MixtureSource]) -> tuple[Link, ...]:
    """The divisions of all rows: among routes, then among the sources of each; larger shares first."""
    routes = list(dict.fromkeys(source.route for source in sources))
    shares = {route: math.fsum(s.share for s in sources if s.route == route) for route in routes}
    links = []
    left = math.fsum(shares.values())
    ordered = sorted(routes, key=lambda route: -shares[route])
    for route in ordered:
        links.append(Link("", None if route == ordered[-1] else shares[route] / left, route, None))
        left -= shares[route]
    for route in ordered:
        members = sorted((i for i, s in enumerate(sources) if s.route == route), key=lambda i: -sources[i].share)
        left = shares[route]
        for i in members:
            links.append(Link(route, None if i == members[-1] else sources[i].share / left, route, i))
            left -= sources[i].share
    return tuple(links)


def micro_batches_of_step(
    rows: Sequence[Row], lengths: Sequence[npt.NDArray[np.int64]], micro_batch_size: int
) -> list[list[Row]]:
    """The rows of a step, longest first (ties as they come), cut into micro-batches.

    Args:
        rows: (source, row) pairs.
        lengths: for each source, the tokens of each of its rows.
        micro_batch_size: rows of one micro-batch on one rank; divides the number of rows.
    """
    assert len(rows) % micro_batch_size == 0, (len(rows), micro_batch_size)
    ordered = sorted(rows, key=lambda row: -int(lengths[row[0]][row[1]]))
    return [ordered[start : start + micro_batch_size] for start in range(0, len(ordered), micro_batch_size)]


class StepBatchSampler(Sampler[list[Row]]):
    """The micro-batches of all steps, in order.

    Each step has the same number of them, a multiple of the ranks: accelerate's BatchSamplerShard, which deals batches
    out in turn, gives each rank its own part of each step.
    """

    drop_last = True

    def __init__(
        self, mixture: Mixture, steps: int, lengths: Sequence[npt.NDArray[np.int64]], micro_batch_size: int
    ) -> None:
        """lengths: for each source, the tokens of each row. Raises ValueError where a step is no whole batches."""
        if mixture.rows_per_step % micro_batch_size:
            raise ValueError(f"{mixture.rows_per_step} rows a step, micro-batches of {micro_batch_size}: no multiple")
        self.mixture = mixture
        self.steps = steps
        self.lengths = lengths
        self.batch_size = micro_batch_size

    def __len__(self) -> int:
        return self.steps * (self.mixture.rows_per_step // self.batch_size)

    def __iter__(self) -> Iterator[list[Row]]:
        for step in range(self.steps):
            yield from micro_batches_of_step(self.mixture.rows_of_step(step), self.lengths, self.batch_size)


class MixedRow(TypedDict):
    """A row with its route: input_ids int32 [T], response_mask bool [T], route_id; also in a teacher's own tokens."""

    input_ids: Ids
    response_mask: Mask
    route_id: int
    teacher_input_ids: NotRequired[Ids]
    teacher_response_mask: NotRequired[Mask]


class MixedRows(Dataset[MixedRow]):
    """The rows of several sources under (source, row); route_ids: the number of each source's route."""

    def __init__(self, sources: Sequence[TokenRows], route_ids: Sequence[int]) -> None:
        assert len(sources) == len(route_ids), (len(sources), len(route_ids))
        self.sources = tuple(sources)
        self.route_ids = tuple(route_ids)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __getitem__(self, key: Row) -> MixedRow:
        source, row = key
        return cast(MixedRow, {**self.sources[source].columns(row), "route_id": self.route_ids[source]})


def collate(
    rows: Sequence[MixedRow], pad_token_id: int, packing: bool, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """Rows as one batch: `pack_rows` with `packing`, else `pad_rows`."""
    if packing:
        assert pad_to_multiple_of is None, "a packed batch has no padding"
        return pack_rows(rows)
    return pad_rows(rows, pad_token_id, pad_to_multiple_of)


def pad_rows(rows: Sequence[MixedRow], pad_token_id: int, pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
    """Rows padded on the right to the longest, or to the next multiple.

    Returns:
        input_ids [B, T] int64, attention_mask [B, T] int64, response_mask [B, T] bool, route_ids [B] int64; of rows
        that have a teacher's own tokens also teacher_input_ids, teacher_attention_mask and teacher_response_mask.
    """
    multiple = pad_to_multiple_of or 1
    width = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
    input_ids_BT = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    response_mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for b, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids_BT[b, :length] = torch.from_numpy(row["input_ids"].astype(np.int64))
        attention_mask_BT[b, :length] = 1
        response_mask_BT[b, :length] = torch.from_numpy(row["response_mask"].copy())
    batch = {
        "input_ids": input_ids_BT,
        "attention_mask": attention_mask_BT,
        "response_mask": response_mask_BT,
        "route_ids": torch.tensor([row["route_id"] for row in rows], dtype=torch.int64),
    }
    if "teacher_input_ids" in rows[0]:
        theirs = pad_rows([of_teacher(row) for row in rows], pad_token_id, pad_to_multiple_of)
        batch |= {f"teacher_{name}": values for name, values in theirs.items() if name != "route_ids"}
    return batch


def of_teacher(row: MixedRow) -> MixedRow:
    ids, mask = row["teacher_input_ids"], row["teacher_response_mask"]
    return {"input_ids": ids, "response_mask": mask, "route_id": row["route_id"]}


def pack_rows(rows: Sequence[MixedRow]) -> dict[str, Tensor]:
    """Rows one after the other, as one sequence in which models keep them apart by their positions.

    Returns:
        input_ids [1, S] int64, position_ids [1, S] int64 (from 0 in every row), response_mask [1, S] bool, route_ids
        [B] int64. No attention mask: transformers reads row boundaries off position_ids only where there is none.
    """
    ids = np.concatenate([row["input_ids"] for row in rows]).astype(np.int64)
    positions = np.concatenate([np.arange(len(row["input_ids"]), dtype=np.int64) for row in rows])
    mask = np.concatenate([row["response_mask"] for row in rows])
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "response_mask": torch.from_numpy(mask)[None],
        "route_ids": torch.tensor([row["route_id"] for row in rows], dtype=torch.int64),
    }
