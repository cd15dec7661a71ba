"""Paired statistics against simulation, independent definitions and scipy."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
from dae_eval.comparing.statistics import (
    Estimate,
    Spread,
    bootstrap_p,
    detectable_difference,
    documents_needed,
    holm,
    macro_difference,
    mcnemar_power,
    non_inferiority,
    paired_difference,
    paired_test,
    sign_flip_mid_p,
    spread,
)
from scipy import stats


def differences(wins: int, losses: int, n: int) -> np.ndarray:
    return np.r_[np.ones(wins), -np.ones(losses), np.zeros(n - wins - losses)]


@cache
def counted(wins: int, losses: int, n: int) -> Spread:
    return spread(differences(wins, losses, n), np.arange(n))


@cache
def interval(wins: int, losses: int, n: int) -> Estimate:
    return macro_difference([counted(wins, losses, n)])


def drawn(n: int, differing: float, difference: float, trials: int, seed: int = 0) -> np.ndarray:
    """Wins and losses of `trials` data sets, [trials, 2]."""
    chances = [(differing + difference) / 2, (differing - difference) / 2, 1 - differing]
    return np.random.default_rng(seed).multinomial(n, chances, size=trials)[:, :2]


def clustered(
    rng: np.random.Generator, clusters: int, largest: int, differing: float, difference: float, shared: float
) -> tuple[np.ndarray, np.ndarray]:
    """0/1 pairs in clusters of 1 to `largest` documents; with probability `shared` a cluster's documents agree."""
    index = np.repeat(np.arange(clusters), rng.integers(1, largest + 1, size=clusters))
    chances = [(differing + difference) / 2, (differing - difference) / 2, 1 - differing]
    alike = rng.choice([1.0, -1.0, 0.0], p=chances, size=clusters)[index]
    alone = rng.choice([1.0, -1.0, 0.0], p=chances, size=len(index))
    return np.where((rng.random(clusters) < shared)[index], alike, alone), index


# -- tests -------------------------------------------------------------------------------------------------------------


@cache
def mid_p(wins: int, losses: int) -> float:
    """McNemar's mid-p: the exact p less half of the observed outcome's mass in each tail."""
    n = wins + losses
    return 1.0 if wins == losses else float(stats.binomtest(wins, n).pvalue - stats.binom.pmf(wins, n, 0.5))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 1), (3, 0), (5, 5), (2, 11), (30, 18), (40, 61)])
def test_sign_flips_of_single_documents_are_mid_p_mcnemar(wins: int, losses: int) -> None:
    n = wins + losses + 10
    assert sign_flip_mid_p(differences(wins, losses, n), np.arange(n)) == pytest.approx(mid_p(wins, losses))


def test_sign_flips_of_clusters_against_all_sign_patterns() -> None:
    rng = np.random.default_rng(0)
    differences_D = rng.choice([1.0, 1.0, 0.0, -1.0], size=40)
    clusters_D = np.sort(rng.integers(10, size=40))
    net = np.array([differences_D[clusters_D == c].sum() for c in range(10)])
    sums = np.abs([np.dot(signs, net) for signs in product([1, -1], repeat=10)])
    observed = abs(net.sum())
    expected = (sums > observed).mean() + (sums == observed).mean() / 2
    assert sign_flip_mid_p(differences_D, clusters_D) == pytest.approx(expected)


def test_bootstrap_against_all_sign_patterns() -> None:
    values = np.random.default_rng(1).normal(0.05, 0.1, size=12)
    sums = np.abs([np.dot(signs, values) for signs in product([1, -1], repeat=12)])
    exact = (sums >= abs(values.sum()) - 1e-9).mean()
    assert bootstrap_p(values, np.arange(12), resamples=40_000) == pytest.approx(exact, abs=0.01)
    assert bootstrap_p(np.zeros(5), np.arange(5)) == 1
    assert bootstrap_p(np.full(3, 0.5), np.arange(3)) == pytest.approx(0.25, abs=0.03)


def test_names_say_which_test_was_used() -> None:
    values, alone, shared = differences(5, 1, 20), np.arange(20), np.arange(20) // 2
    named = {
        paired_test(values, clusters, binary=binary)[1] for binary in (True, False) for clusters in (alone, shared)
    }
    assert named == {
        "mid-p McNemar",
        "clustered mid-p McNemar",
        "paired bootstrap",
        "clustered paired bootstrap",
    }


def test_type_one_rate_and_power_of_mcnemar_next_to_an_unpaired_test() -> None:
    def unpaired(wins: np.ndarray, losses: np.ndarray, n: int, level: float) -> np.ndarray:
        return np.abs(wins - losses) / n > 1.96 * (2 * level * (1 - level) / n) ** 0.5

    def rates(n: int, difference: float) -> tuple[float, float]:
        counts = drawn(n, 0.2, difference, 20_000)
        ours = np.mean([mid_p(int(w), int(lost)) < 0.05 for w, lost in counts])
        return float(ours), float(unpaired(counts[:, 0], counts[:, 1], n, 0.6).mean())

    paired_level, unpaired_level = rates(100, 0.0)
    assert 0.035 < paired_level < 0.055
    assert unpaired_level < 0.005
    paired_power, unpaired_power = rates(500, 0.05)
    assert paired_power == pytest.approx(0.71, abs=0.02)
    assert unpaired_power == pytest.approx(0.32, abs=0.03)
    assert mcnemar_power(500, 0.2, 0.05) == pytest.approx(paired_power, abs=0.015)
    assert mcnemar_power(100, 0.2, 1e-12) == pytest.approx(paired_level, abs=0.006)


def test_type_one_rate_of_the_clustered_tests() -> None:
    rng = np.random.default_rng(2)
    aware, unaware, bootstrap = [], [], []
    for trial in range(800):
        differences_D, clusters_D = clustered(rng, 40, 6, 0.3, 0.0, shared=1.0)
        aware.append(sign_flip_mid_p(differences_D, clusters_D) < 0.05)
        unaware.append(sign_flip_mid_p(differences_D, np.arange(len(differences_D))) < 0.05)
        bootstrap.append(bootstrap_p(differences_D, clusters_D, seed=trial, resamples=399) < 0.05)
    assert 0.02 < np.mean(aware) < 0.07
    assert 0.02 < np.mean(bootstrap) < 0.07
    assert np.mean(unaware) > 0.2


def test_type_one_rate_and_power_of_the_bootstrap_on_ratings() -> None:
    rng = np.random.default_rng(3)
    ratings = np.round(rng.normal(0, 0.2, size=(800, 80)) * 9) / 9
    none = [bootstrap_p(row, np.arange(80), seed=i, resamples=399) < 0.05 for i, row in enumerate(ratings)]
    assert 0.03 < np.mean(none) < 0.075
    some = [bootstrap_p(row + 0.06, np.arange(80), seed=i, resamples=399) < 0.05 for i, row in enumerate(ratings)]
    t_test = stats.ttest_1samp(ratings + 0.06, 0, axis=1).pvalue < 0.05
    assert np.mean(some) == pytest.approx(t_test.mean(), abs=0.03)


def test_holm_from_its_definition() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    # Ascending: 0.005 * 5, 0.01 * 4, 0.03 * 3, 0.04 * 2 (not below the one before), 0.9
    assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# -- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 30, 100, 324, 1000])
@pytest.mark.parametrize("differing", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("one_sided", [0.0, 0.5, 1.0])
def test_coverage_of_0_1_differences(n: int, differing: float, one_sided: float) -> None:
    true = differing * one_sided
    counts = drawn(n, differing, true, 4000)
    found = [interval(int(wins), int(losses), n) for wins, losses in counts]
    assert np.mean([estimate.low <= true <= estimate.high for estimate in found]) > 0.94


def test_the_interval_becomes_the_walds_where_many_documents_differ() -> None:
    found = interval(300, 200, 2000)
    assert found.value == pytest.approx(0.05)
    half = 1.96 * ((0.25 - 0.05**2) / 2000) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.01)


def test_no_differing_document_is_no_proof() -> None:
    widths = [interval(0, 0, n).high for n in (10, 100, 1000)]
    # 1 - 0.025^(1/n): the rate that no success in n trials leaves possible (Clopper and Pearson).
    bounds = [stats.binomtest(0, n).proportion_ci().high for n in (10, 100, 1000)]
    assert all(0.66 * bound < width < 1.35 * bound for width, bound in zip(widths, bounds, strict=True))
    assert interval(0, 0, 100) == Estimate(0.0, -widths[1], widths[1])
    tens = np.arange(100) // 10
    assert paired_difference(np.zeros(100), tens).high > 8 * interval(0, 0, 100).high
    assert paired_difference(np.zeros(100), np.zeros(100, dtype=int)) == Estimate(0, -1, 1)


@pytest.mark.parametrize(
    ("clusters", "largest", "differing", "difference", "shared"),
    [
        (10, 5, 0.1, 0.0, 0.5),
        (30, 5, 0.02, 0.0, 1.0),
        (30, 5, 0.3, 0.15, 0.5),
        (60, 4, 0.1, 0.05, 0.0),
        (100, 3, 0.3, 0.15, 1),
    ],
)
def test_coverage_of_clustered_differences(
    clusters: int, largest: int, differing: float, difference: float, shared: float
) -> None:
    rng = np.random.default_rng(4)
    found = [paired_difference(*clustered(rng, clusters, largest, differing, difference, shared)) for _ in range(1000)]
    assert np.mean([estimate.low <= difference <= estimate.high for estimate in found]) > 0.93


def test_ignoring_clusters_would_not_cover() -> None:
    rng = np.random.default_rng(5)
    naive = []
    for _ in range(500):
        differences_D, _ = clustered(rng, 40, 6, 0.3, 0.0, shared=1.0)
        estimate = paired_difference(differences_D, np.arange(len(differences_D)))
        naive.append(estimate.low <= 0 <= estimate.high)
    assert np.mean(naive) < 0.85


@pytest.mark.parametrize("kind", ["ratings", "skewed", "rare"])
def test_coverage_of_scores_that_are_not_0_1(kind: str) -> None:
    rng = np.random.default_rng(6)
    draw = {
        "ratings": lambda: np.round(rng.normal(0.05, 0.2, size=80) * 9) / 9,
        "skewed": lambda: rng.exponential(0.1, size=30),
        "rare": lambda: np.where(rng.random(100) < 0.05, rng.random(100), 0),
    }[kind]
    true = np.mean([draw().mean() for _ in range(5000)])
    found = [paired_difference(draw(), np.arange(len(draw()))) for _ in range(1000)]
    assert 0.92 < np.mean([estimate.low <= true <= estimate.high for estimate in found]) < 0.99


@pytest.mark.parametrize(
    ("sizes", "differing", "one_sided"),
    [((100,) * 5, (0.02,) * 5, 0.9), ((20,) * 20, (0.3,) * 20, 0.8), ((30, 500, 500), (0.02, 0.1, 0.1), 0.5)],
)
def test_coverage_of_the_macro_mean(sizes: tuple[int, ...], differing: tuple[float, ...], one_sided: float) -> None:
    true = float(np.mean(differing)) * one_sided
    each = zip(sizes, differing, strict=True)
    counts = [drawn(n, rate, rate * one_sided, 1500, seed) for seed, (n, rate) in enumerate(each)]
    covered = []
    for trial in range(1500):
        tasks = [counted(*map(int, found[trial]), n) for found, n in zip(counts, sizes, strict=True)]
        estimate = macro_difference(tasks)
        covered.append(estimate.low <= true <= estimate.high)
    assert np.mean(covered) > 0.935


def test_macro_mean_adds_the_variances_of_tasks() -> None:
    tasks = [counted(60, 40, 400), counted(100, 150, 1000)]
    estimate = macro_difference(tasks)
    assert estimate.value == pytest.approx((0.05 - 0.05) / 2)
    half = 1.96 / 2 * ((0.25 - 0.05**2) / 400 + (0.25 - 0.05**2) / 1000) ** 0.5
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.02)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_non_inferiority_has_three_words() -> None:
    assert non_inferiority(Estimate(0, -0.009, 0.009), 0.01) == "PASS"
    assert non_inferiority(Estimate(-0.03, -0.04, -0.02), 0.01) == "FAIL"
    assert non_inferiority(Estimate(0, -0.02, 0.02), 0.01) == "INCONCLUSIVE"
    assert non_inferiority(Estimate(-0.02, -0.03, -0.01), 0.01) == "INCONCLUSIVE"


def passes(n: int, differing: float, difference: float) -> float:
    counts = drawn(n, differing, difference, 3000, seed=n)
    return float(np.mean([non_inferiority(interval(int(w), int(lost), n), 0.01) == "PASS" for w, lost in counts]))


@pytest.mark.parametrize(
    ("n", "rates"), [(324, (0.17, 0.11, 0.08)), (2000, (0.86, 0.52, 0.28)), (5000, (1.0, 0.89, 0.61))]
)
def test_how_often_a_one_point_margin_passes_without_a_loss(n: int, rates: tuple[float, ...]) -> None:
    for differing, rate in zip((0.02, 0.05, 0.1), rates, strict=True):
        assert passes(n, differing, 0.0) == pytest.approx(rate, abs=0.035)


def test_a_model_that_lost_the_margin_rarely_passes() -> None:
    for n, differing in [(324, 0.0125), (324, 0.02), (324, 0.1), (2000, 0.02)]:
        assert passes(n, differing, -0.01) < 0.035


@pytest.mark.parametrize("wins_losses", [(0, 0), (1, 1), (5, 5), (6, 4), (2, 8), (20, 18)])
def test_documents_needed_decide_at_the_same_rates_and_not_before(wins_losses: tuple[int, int]) -> None:
    wins, losses = wins_losses
    n = 100
    assert non_inferiority(interval(wins, losses, n), 0.01) == "INCONCLUSIVE"
    needed = documents_needed([counted(wins, losses, n)], 0.01)
    assert needed is not None

    def word(hundreds: int) -> str:
        return non_inferiority(interval(hundreds * wins, hundreds * losses, hundreds * n), 0.01)

    assert word(-(-needed // n)) != "INCONCLUSIVE"
    assert word((needed - 1) // n) == "INCONCLUSIVE"


def test_documents_needed_are_what_the_smaller_tasks_lack() -> None:
    small, large = counted(2, 2, 50), counted(40, 40, 1000)
    needed = documents_needed([small, large], 0.015)
    assert needed is not None
    assert 50 < needed < 1000
    grown = counted(round(0.04 * needed * 1.02), round(0.04 * needed * 1.02), round(needed * 1.02))
    assert non_inferiority(macro_difference([grown, large]), 0.015) == "PASS"


def test_no_number_of_documents_decides_on_the_margin_itself() -> None:
    assert documents_needed([counted(1, 2, 100)], 0.01) is None
    assert documents_needed([spread(np.zeros(9), np.zeros(9, dtype=int))], 0.01) is None


@pytest.mark.parametrize(("wins", "losses", "n"), [(0, 0, 324), (25, 25, 500), (3, 1, 100)])
def test_the_detectable_difference_is_found_with_80_per_cent_power(wins: int, losses: int, n: int) -> None:
    found = detectable_difference(counted(wins, losses, n), binary=True)
    assert found is not None
    rate = max((wins + losses) / n, found)
    counts = drawn(n, rate, found, 4000)
    assert np.mean([mid_p(int(w), int(lost)) < 0.05 for w, lost in counts]) == pytest.approx(0.8, abs=0.03)


def test_the_detectable_difference_is_a_bound_where_nothing_differs() -> None:
    found = detectable_difference(counted(0, 0, 1000), binary=True)
    assert found is not None
    assert found == pytest.approx(6.7 / 1000, rel=0.02)  # a Poisson mean that gives 5 or more in 80 % of all cases
    assert detectable_difference(counted(0, 0, 4), binary=True) is None
    pairs = detectable_difference(spread(np.zeros(1000), np.arange(1000) // 2), binary=True)
    assert pairs == pytest.approx(2 * found, rel=0.02)


def test_the_detectable_difference_of_ratings_by_normal_theory() -> None:
    values = np.random.default_rng(7).normal(0, 0.2, size=400)
    found = detectable_difference(spread(values, np.arange(400)), binary=False)
    assert found == pytest.approx((1.96 + 0.84) * values.std() / 20, rel=0.02)
