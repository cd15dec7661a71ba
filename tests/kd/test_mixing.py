"""Which rows come when: against the definition, in exact arithmetic where it is about counts."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kd.data.mixing import MixedRows, Mixture, MixtureSource, StepBatchSampler, collate, micro_batches_of_step
from kd.data.token_rows import TokenRows
from kd.errors import UserError

few = settings(max_examples=40, deadline=None)
weights = st.lists(st.integers(1, 200), min_size=2, max_size=7)


def drawn(mixture: Mixture, steps: int) -> list[tuple[int, int]]:
    return [row for step in range(steps) for row in mixture.rows_of_step(step)]


def test_two_sources_take_turns_as_the_definition_says():
    # Row k goes to the source that is furthest behind its share of k + 1 rows.
    share = Fraction(3, 16)
    mixture = Mixture([MixtureSource("domain", 50, 3 / 16, True), MixtureSource("general", 50, 13 / 16, True)], 10, 0)
    taken = [0, 0]
    expected = []
    for k in range(400):
        behind = [share * (k + 1) - taken[0], (1 - share) * (k + 1) - taken[1]]
        expected.append(0 if behind[0] > behind[1] else 1)  # a tie goes to the larger share
        taken[expected[-1]] += 1
    assert [source for source, _ in drawn(mixture, 40)] == expected


@few
@given(st.floats(0.01, 0.99), st.integers(1, 20))
def test_two_sources_stay_within_half_a_row_of_their_share(share, rows_per_step):
    sources = [MixtureSource("domain", 30, share, True), MixtureSource("general", 30, 1 - share, True)]
    counts = np.array([source for source, _ in drawn(Mixture(sources, rows_per_step, 0), 20)])
    totals = np.arange(1, len(counts) + 1)
    assert np.abs((counts == 0).cumsum() - share * totals).max() <= 0.5 + 1e-9


@few
@given(weights)
@example([1, 1, 1, 1, 1, 20])  # in this order, not the larger ones first, one would be off by 2
def test_many_sources_stay_within_the_harmonic_bound(parts):
    total = sum(parts)
    sources = [MixtureSource("route", 10, part / total, True) for part in parts]
    counts = Mixture(sources, 1, 0).taken(np.arange(2000))
    off = np.abs(counts - np.outer([part / total for part in parts], np.arange(2000)))
    assert counts.sum(0).tolist() == list(range(2000))
    assert set(np.diff(counts, axis=1).ravel().tolist()) <= {0, 1}
    assert off.max() <= (1 + sum(1 / i for i in range(1, len(parts)))) / 2 + 1e-9


def test_a_routes_share_does_not_suffer_from_its_many_sources():
    sources = [MixtureSource("general", 10, 0.9 / 9, True) for _ in range(9)] + [MixtureSource("domain", 10, 0.1, True)]
    domain = Mixture(sources, 1, 0).taken(np.arange(3000))[9]
    assert np.abs(domain - 0.1 * np.arange(3000)).max() <= 0.5 + 1e-9


@few
@given(weights)
def test_shares_by_number_of_rows_use_every_row_once_an_epoch(rows):
    total = sum(rows)
    mixture = Mixture([MixtureSource("r", n, n / total) for n in rows], 1, 3)
    assert mixture.rows_per_epoch == total
    seen = Counter(drawn(mixture, total))
    assert seen == Counter({(source, row): 1 for source, n in enumerate(rows) for row in range(n)})


@few
@given(
    st.lists(st.tuples(st.integers(5, 60), st.integers(1, 9), st.booleans()), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_no_row_twice_before_all_rows_of_its_source_once(given_sources, seed):
    total = sum(part for _, part, _ in given_sources)
    sources = [MixtureSource(f"r{i % 2}", n, part / total, repeat) for i, (n, part, repeat) in enumerate(given_sources)]
    rows = drawn(Mixture(sources, 5, seed), 60)
    for index, source in enumerate(sources):
        mine = [row for number, row in rows if number == index]
        for start in range(0, len(mine), source.n_rows):
            block = mine[start : start + source.n_rows]
            assert len(set(block)) == len(block)
            assert set(block) <= set(range(source.n_rows))
    once = [(i, s) for i, s in enumerate(sources) if not s.repeat]
    epoch = Mixture(sources, 1, seed).rows_per_epoch
    if not once:
        assert epoch is None
    else:  # no source gives more than it has, and one more row or two would be more than one has
        taken = Mixture(sources, 1, seed).taken([epoch, epoch + 1 + len(sources) * total])
        assert all(taken[i, 0] <= source.n_rows for i, source in once)
        assert any(taken[i, 1] > source.n_rows for i, source in once)


def test_epoch_ends_with_the_first_source_that_is_used_up_and_repeat_does_not_count():
    domain, general = MixtureSource("domain", 100, 0.1), MixtureSource("general", 5000, 0.9)
    assert Mixture([domain, general], 8, 0).rows_per_epoch == 1000
    assert Mixture([domain, general], 8, 0).steps(2) == 250
    assert Mixture([domain, general], 300, 0).steps(1) == 3
    assert Mixture([domain, general], 300, 0).steps(2) == 6  # the 100 rows left over count in the second epoch
    assert Mixture([domain, general], 400, 0).steps(1.6) == 4
    oversampled = Mixture([MixtureSource("domain", 100, 0.1, repeat=True), general], 8, 0)
    assert oversampled.rows_per_epoch == 5555
    counts = Counter(row for source, row in drawn(oversampled, oversampled.steps(1)) if source == 0)
    assert set(counts.values()) == {5, 6}


def test_an_epoch_is_shorter_where_a_source_is_ahead_of_its_share_as_it_ends():
    rows_and_parts = [(4, 1), (4, 3), (26, 7), (22, 7), (8, 6)]  # the second is used up first: 4 rows at 3/24 are 32
    mixture = Mixture([MixtureSource("r", n, part / 24) for n, part in rows_and_parts], 1, 0)
    assert (mixture.taken([31, 32])[:, 0] <= [n for n, _ in rows_and_parts]).all()
    assert (mixture.taken([31, 32])[:, 1] > [n for n, _ in rows_and_parts]).any()
    assert mixture.rows_per_epoch == 31


def test_larger_sources_go_on_where_they_were_in_the_next_epoch():
    mixture = Mixture([MixtureSource("domain", 10, 0.5), MixtureSource("general", 20, 0.5)], 4, 0)
    rows = drawn(mixture, mixture.steps(2))
    assert sorted(row for source, row in rows if source == 1) == list(range(20))
    assert Counter(row for source, row in rows if source == 0) == Counter(dict.fromkeys(range(10), 2))


def test_rows_of_a_step_follow_from_seed_and_step_alone():
    sources = [MixtureSource("domain", 40, 0.25), MixtureSource("general", 200, 0.75)]
    one, other = Mixture(sources, 8, 5), Mixture(sources, 8, 5)
    forwards = [one.rows_of_step(step) for step in range(40)]
    backwards = [other.rows_of_step(step) for step in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert drawn(Mixture(sources, 8, 6), 40) != drawn(one, 40)
    # A larger step draws the same rows, in larger pieces.
    assert drawn(Mixture(sources, 16, 5), 20) == drawn(one, 40)


def test_the_order_of_rows_is_the_same_as_in_every_run_before():
    # Runs that were started with an older version go on with the rows they would have had.
    mixture = Mixture([MixtureSource("domain", 5, 0.25, True), MixtureSource("general", 9, 0.75)], 4, 17)
    rows = drawn(mixture, 6)
    assert [row for source, row in rows if source == 0] == [1, 4, 3, 2, 0, 1]
    assert [row for source, row in rows if source == 1] == [1, 8, 5, 4, 7, 0, 6, 2, 3, 3, 2, 8, 5, 1, 6, 7, 0, 4]
    assert [source for source, _ in rows] == [1, 1, 0, 1] * 6


def test_sources_of_one_size_are_not_shuffled_alike():
    mixture = Mixture([MixtureSource("a", 50, 0.5), MixtureSource("b", 50, 0.5)], 100, 0)
    rows = mixture.rows_of_step(0)
    assert [row for source, row in rows if source == 0] != [row for source, row in rows if source == 1]


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([], "no training rows"),
        ([MixtureSource("general", 0, 1.0, name="g.jsonl")], "g.jsonl: has no usable rows"),
        ([MixtureSource("a", 90, 0.5), MixtureSource("b", 90, 0.4)], "sum to 0.9"),
        ([MixtureSource("a", 90, 1.0), MixtureSource("b", 90, 0.0)], "data.b: share: 0"),
        (
            [MixtureSource("a", 3, 0.5), MixtureSource("b", 90, 0.5)],
            "data.a: 3 rows .* an epoch of 6 rows, fewer than the 8",
        ),
    ],
)
def test_mixtures_that_cannot_be(sources, words):
    with pytest.raises(UserError, match=words):
        Mixture(sources, 8, 0)


def test_steps_that_cannot_be():
    endless = Mixture([MixtureSource("a", 3, 1.0, repeat=True)], 8, 0)
    with pytest.raises(UserError, match=r"train\.max_steps"):
        endless.steps(1)
    assert len(endless.rows_of_step(0)) == 8
    with pytest.raises(UserError, match=r"train\.num_train_epochs: 0\.1"):
        Mixture([MixtureSource("a", 20, 1.0)], 8, 0).steps(0.1)


@pytest.fixture
def mixture_and_lengths():
    mixture = Mixture([MixtureSource("domain", 40, 0.3), MixtureSource("general", 200, 0.7)], 8, 1)
    rng = np.random.default_rng(0)
    return mixture, [rng.integers(2, 9, 40), rng.integers(2, 30, 200)]


def test_micro_batches_are_the_step_sorted_by_length(mixture_and_lengths):
    mixture, lengths = mixture_and_lengths
    rows = mixture.rows_of_step(3)
    batches = micro_batches_of_step(rows, lengths, 2)
    flat = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    assert sorted(flat) == sorted(rows)
    for before, after in itertools.pairwise(flat):
        ahead, behind = lengths[before[0]][before[1]], lengths[after[0]][after[1]]
        assert ahead > behind or (ahead == behind and rows.index(before) < rows.index(after))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_micro_batch_size_does_not_change_the_rows_of_a_step(mixture_and_lengths, size):
    mixture, lengths = mixture_and_lengths
    sampler = StepBatchSampler(mixture, 5, lengths, size)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 5 * 8 // size
    for step in range(5):
        of_step = batches[step * 8 // size : (step + 1) * 8 // size]
        assert sorted(row for batch in of_step for row in batch) == sorted(mixture.rows_of_step(step))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_the_rows_of_every_step(mixture_and_lengths, ranks):
    mixture, lengths = mixture_and_lengths
    sampler = StepBatchSampler(mixture, 6, lengths, 1)
    per_rank = [list(BatchSamplerShard(sampler, num_processes=ranks, process_index=rank)) for rank in range(ranks)]
    steps_of_rank = 8 // ranks
    assert {len(batches) for batches in per_rank} == {6 * steps_of_rank}
    for step in range(6):
        part = slice(step * steps_of_rank, (step + 1) * steps_of_rank)
        rows = [row for batches in per_rank for batch in batches[part] for row in batch]
        assert sorted(rows) == sorted(mixture.rows_of_step(step))


def test_micro_batches_that_do_not_divide_a_step_are_refused(mixture_and_lengths):
    with pytest.raises(ValueError, match="no multiple"):
        StepBatchSampler(mixture_and_lengths[0], 1, mixture_and_lengths[1], 3)


@pytest.fixture
def mixed_rows():
    domain = TokenRows.from_rows(
        [([1, 5, 2], [False, True, True]), ([1, 6, 7, 8, 2], [False, False, False, True, True])]
    )
    general = TokenRows.from_rows([([1, 9, 9, 2], [False, True, True, False])])
    return MixedRows([general, domain], [0, 1])


def test_mixed_rows_carry_their_route(mixed_rows):
    assert len(mixed_rows) == 3
    row = mixed_rows[(1, 1)]
    assert row["input_ids"].tolist() == [1, 6, 7, 8, 2]
    assert row["response_mask"].tolist() == [False, False, False, True, True]
    assert row["route_id"] == 1
    assert mixed_rows[(0, 0)]["route_id"] == 0


def test_padded_batch_with_padding_that_is_also_the_end_token(mixed_rows):
    batch = collate([mixed_rows[(1, 0)], mixed_rows[(1, 1)], mixed_rows[(0, 0)]], pad_token_id=2, packing=False)
    assert batch["input_ids"].tolist() == [[1, 5, 2, 2, 2], [1, 6, 7, 8, 2], [1, 9, 9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["response_mask"].tolist() == [
        [False, True, True, False, False],
        [False, False, False, True, True],
        [False, True, True, False, False],
    ]
    assert batch["route_ids"].tolist() == [1, 1, 0]
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "response_mask": torch.bool,
        "route_ids": torch.int64,
    }
    wide = collate([mixed_rows[(1, 1)]], pad_token_id=0, packing=False, pad_to_multiple_of=4)
    assert wide["input_ids"].tolist() == [[1, 6, 7, 8, 2, 0, 0, 0]]


def test_packed_and_padded_batches_carry_the_same_tokens(mixed_rows):
    rows = [mixed_rows[(1, 0)], mixed_rows[(0, 0)], mixed_rows[(1, 1)]]
    padded = collate(rows, pad_token_id=0, packing=False)
    packed = collate(rows, pad_token_id=0, packing=True)
    real = padded["attention_mask"].bool()
    assert "attention_mask" not in packed
    assert packed["input_ids"].tolist() == [padded["input_ids"][real].tolist()]
    assert packed["response_mask"].tolist() == [padded["response_mask"][real].tolist()]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert packed["route_ids"].tolist() == padded["route_ids"].tolist()
    row_of_token = (packed["position_ids"][0] == 0).cumsum(0) - 1
    assert packed["route_ids"][row_of_token].tolist() == [1] * 3 + [0] * 4 + [1] * 5
    assert {packed[name].dtype for name in ("input_ids", "position_ids", "route_ids")} == {torch.int64}
