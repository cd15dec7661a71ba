"""Paired statistics over documents that two models answered.

Scores lie on 0..1, differences on -1..1. Documents of one cluster share a source and count as one piece of evidence.
Legend: D documents and G clusters of a task, K tasks, R resamples. Every interval is a two-sided 95 % one; `margin` and
all results are on the scores' own scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Word = Literal["PASS", "FAIL", "INCONCLUSIVE"]

ALPHA = 0.05
POWER = 0.8
TEST_RESAMPLES = 5000
LEAST_DEGREES = 1e-9  # below: a task is a single cluster
MOST_DOCUMENTS = 10**9  # more are not worth reporting


@dataclass(frozen=True)
class Estimate:
    """A value with the two ends of its two-sided 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """The mean of a task's paired differences and its variance.

    squares: sum over clusters of (summed deviation from the mean)^2; times G / (G - 1), over n^2, it is the
    cluster-robust variance of the mean, with degrees + 1 for G. doubt: added to the squares because few differences
    were seen (see `spread`). cubes: sum over clusters of (summed deviation from the mean)^3. design: the factor by
    which clustering inflates the variance, at least 1. degrees: of freedom. differing: number of documents with a
    difference.
    """

    n: int
    mean: float
    squares: float
    cubes: float
    doubt: float
    design: float
    degrees: float
    differing: int

    @property
    def variance(self) -> float:
        """Of the mean difference, including doubt."""
        return (self.squares * (1 + 1 / self.degrees) + self.doubt) / self.n**2


def spread(differences_D: Floats, clusters_D: Ints) -> Spread:
    """Mean and variance of paired differences, also valid if few or no documents differ.

    The variance is that of Bonett and Price (2012, adjusted Wald interval for paired proportions) carried over to
    clusters and to any score: two documents are added, one on which each model is better, of the typical size of a
    difference (that of a 0/1 score is 1; of others it is taken to be the nearer to 1 the fewer documents differ), times
    the design effect, by which documents are fewer than they look. Where no document differs that effect cannot be
    seen, and each cluster is taken as one document. Unlike theirs, the mean itself stays as observed.

    Degrees of freedom: clusters - 1, with Kish's effective number of clusters, (sum m)^2 / sum m^2 for sizes m.
    """
    n = len(differences_D)
    mean = float(differences_D.mean())
    sizes_G, sums_G = _by_cluster(differences_D, clusters_D)
    deviations_G = sums_G - mean * sizes_G
    within = float(((differences_D - mean) ** 2).sum())
    between = float((deviations_G**2).sum())
    differing = int(np.count_nonzero(differences_D))
    unsure = 1 / (1 + differing)
    typical_square = (float((differences_D**2).sum()) + unsure) / (differing + unsure)
    greatest_design = float((sizes_G**2).sum()) / n
    prior = 2 * typical_square
    design = max(1.0, (between + prior * greatest_design) / (within + prior))
    return Spread(
        n=n,
        mean=mean,
        squares=between,
        cubes=float((deviations_G**3).sum()),
        doubt=prior * design**2,
        design=design,
        degrees=n / greatest_design - 1,
        differing=differing,
    )


def paired_difference(differences_D: Floats, clusters_D: Ints) -> Estimate:
    """Mean paired difference of one task, with its interval."""
    return macro_difference([spread(differences_D, clusters_D)])


def macro_difference(tasks: Sequence[Spread], weights_K: Sequence[float] | None = None) -> Estimate:
    """Mean over tasks of their mean differences; the tasks are the ones asked about, not a sample of tasks.

    weights_K: of each task, None: equal. The members of a benchmark have their share in its score.

    Variances of tasks add up (tasks share no documents), times the squared weights; the doubt is added once, for the
    task where it is largest: what was seen in one task is evidence about the others' documents too. Reference
    distribution: Student's t with Satterthwaite's degrees of freedom. A task with a single cluster has an unknown
    variance: [-1, 1].

    Rare losses make the mean's distribution skewed, so the end on the side of the longer tail is moved out: t becomes
    t + |skewness| (2 t^2 + 1) / 6 (Johnson 1978, Hall 1992). Without that, a model that lost exactly the margin passes
    in up to 10 % of all cases instead of 2.5 % (small differences on all documents and a few failures, n = 60 to 240).
    """
    weights = _weights(tasks, weights_K)
    value = float(np.average([task.mean for task in tasks], weights=weights))
    if any(task.degrees < LEAST_DEGREES for task in tasks):
        return Estimate(value, -1.0, 1.0)
    below, above = _ends(tasks, weights, [task.n for task in tasks])
    return Estimate(value, max(value + below, -1.0), min(value + above, 1.0))


def _weights(tasks: Sequence[Spread], weights_K: Sequence[float] | None) -> Floats:
    return np.ones(len(tasks)) if weights_K is None else np.asarray(weights_K, dtype=np.float64)


def _ends(tasks: Sequence[Spread], weights_K: Floats, documents: Sequence[int]) -> tuple[float, float]:
    """Ends of the interval from the mean on, if task k had documents[k] documents that differ at the observed rates."""
    grown = [_grown(task, n) for task, n in zip(tasks, documents, strict=True)]
    error, degrees = _error(grown, weights_K)
    t = t_quantile(degrees)
    shift = skewness(grown, weights_K, error) * (2 * t**2 + 1) / 6
    return error * (min(shift, 0.0) - t), error * (max(shift, 0.0) + t)


def skewness(tasks: Sequence[Spread], weights_K: Floats, error: float) -> float:
    """Of the weighted mean, with its standard error."""
    third = sum(weight**3 * task.cubes / task.n**3 for task, weight in zip(tasks, weights_K, strict=True))
    return float(third / weights_K.sum() ** 3 / error**3) if error else 0.0


def _error(tasks: Sequence[Spread], weights_K: Floats) -> tuple[float, float]:
    """Standard error of the weighted mean of the tasks' differences, and its degrees of freedom."""
    doubts_K = weights_K**2 * np.array([task.doubt / task.n**2 for task in tasks])
    variances_K = weights_K**2 * np.array([task.variance for task in tasks])
    degrees = degrees_of_freedom(variances_K, np.array([task.degrees for task in tasks]))
    variance = (variances_K - doubts_K).sum() + doubts_K.max()
    return float(variance**0.5 / weights_K.sum()), degrees


def _grown(task: Spread, n: int) -> Spread:
    growth = n / task.n
    return replace(
        task, n=n, squares=task.squares * growth, cubes=task.cubes * growth, degrees=(task.degrees + 1) * growth - 1
    )


def degrees_of_freedom(variances_K: Floats, degrees_K: Floats) -> float:
    """Satterthwaite (1946): of the sum of independent variance estimates."""
    return float(variances_K.sum() ** 2 / (variances_K**2 / degrees_K).sum())


def t_quantile(degrees: float) -> float:
    """The quantile of Student's t for a two-sided 95 % interval."""
    return float(stats.t.ppf(1 - ALPHA / 2, degrees))


def loss_p(tasks: Sequence[Spread], margin: float, weights_K: Sequence[float] | None = None) -> float:
    """One-sided p of "the true mean difference is -margin or more"; 1 if a task is a single cluster.

    It is 2.5 % where the upper end of `macro_difference` is -margin.
    """
    if any(task.degrees < LEAST_DEGREES for task in tasks):
        return 1.0
    weights = _weights(tasks, weights_K)
    error, degrees = _error(tasks, weights)
    mean, t = float(np.average([task.mean for task in tasks], weights=weights)), t_quantile(degrees)
    x = (mean + margin) / error
    shift = skewness(tasks, weights, error) * (2 * min(x**2, t**2) + 1) / 6
    return float(stats.t.cdf(x + max(shift, 0.0), degrees))


def difference_p(tasks: Sequence[Spread], weights_K: Sequence[float] | None = None) -> float:
    """Two-sided p of "no difference" of the weighted mean over tasks."""
    mirrored = [replace(task, mean=-task.mean, cubes=-task.cubes) for task in tasks]
    return min(1.0, 2 * min(loss_p(tasks, 0.0, weights_K), loss_p(mirrored, 0.0, weights_K)))


def non_inferiority(difference: Estimate, margin: float) -> Word:
    """PASS if the whole interval is above -margin, FAIL if all of it is below, else INCONCLUSIVE."""
    if difference.low > -margin:
        return "PASS"
    return "FAIL" if difference.high < -margin else "INCONCLUSIVE"


def documents_needed(
    tasks: Sequence[Spread],
    margin: float,
    weights_K: Sequence[float] | None = None,
    totals_K: Sequence[int | None] | None = None,
) -> int | None:
    """Documents per task that would turn an INCONCLUSIVE `non_inferiority` into PASS or FAIL.

    That is the smallest N such that, with every task of fewer than N documents brought up to N, the interval would
    leave -margin outside, if the mean differences, the rates of differing documents and the cluster sizes stay as they
    are. None if no number would: the mean difference is -margin, a task is a single cluster, or the tasks do not have
    so many. totals_K: documents that each task has, None: unknown.
    """
    weights = _weights(tasks, weights_K)
    mean = float(np.average([task.mean for task in tasks], weights=weights))
    if any(task.degrees < LEAST_DEGREES for task in tasks):
        return None
    totals = [MOST_DOCUMENTS if total is None else total for total in totals_K or [None] * len(tasks)]

    def decides(documents: int) -> bool:
        counts = [max(task.n, min(documents, total)) for task, total in zip(tasks, totals, strict=True)]
        below, above = _ends(tasks, weights, counts)
        return mean + below > -margin or mean + above < -margin

    low = min(task.n for task in tasks)
    high = low + 1
    while not decides(high):
        if high > max(totals):
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def paired_test(differences_D: Floats, clusters_D: Ints, *, binary: bool, seed: int = 0) -> tuple[float, str]:
    """Two-sided p of "no difference", and the name of the test: McNemar's for 0/1 scores, else a bootstrap.

    "clustered" in the name: signs are flipped per cluster.
    """
    clusters = len(np.unique(clusters_D))
    clustered = "clustered " if clusters < len(clusters_D) else ""
    if binary:
        return sign_flip_mid_p(differences_D, clusters_D), f"{clustered}mid-p McNemar"
    return bootstrap_p(differences_D, clusters_D, seed=seed), f"{clustered}paired bootstrap"


def sign_flip_mid_p(differences_D: Floats, clusters_D: Ints) -> float:
    """McNemar's mid-p test (Fagerland, Lydersen and Laake 2013) with clusters in place of documents.

    If each document is its own cluster, it is McNemar's test; p is 1 if nothing differs. Under the null hypothesis a
    cluster's net wins have either sign with equal probability. The distribution of their sum over all sign patterns is
    computed in full. differences_D: -1, 0 or 1.
    """
    _, sums_G = _by_cluster(differences_D, clusters_D)
    net_G = np.abs(np.rint(sums_G)).astype(np.int64)
    # With S the sum of all |net|: mass[i] is the probability that the positive ones add up to i of S.
    mass = np.ones(1)
    for size, count in zip(*np.unique(net_G[net_G > 0], return_counts=True), strict=True):
        spaced = np.zeros(int(size * count) + 1)
        spaced[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        mass = np.convolve(mass, spaced)
    total = int(net_G.sum())
    fewer = (total - abs(int(np.rint(sums_G.sum())))) // 2
    return min(1.0, float(2 * mass[: fewer + 1].sum() - mass[fewer]))


def bootstrap_p(differences_D: Floats, clusters_D: Ints, *, seed: int = 0, resamples: int = TEST_RESAMPLES) -> float:
    """Wild cluster bootstrap test of mean 0, null imposed (Cameron, Gelbach and Miller 2008; Rademacher weights).

    Each resample flips the sign of a cluster's summed difference, or leaves it. Next to drawing clusters with
    replacement it keeps its level with ten documents (0.05 against 0.10, normal differences) and cannot find anything
    where there are too few of them.
    """
    _, sums_G = _by_cluster(differences_D, clusters_D)
    kinds_U, times_U = np.unique(np.abs(sums_G[sums_G != 0]), return_counts=True)
    rng = np.random.default_rng(seed)
    observed = abs(sums_G.sum()) * (1 - 1e-12)
    exceeding = 0
    for part in in_parts(resamples, len(kinds_U)):
        positive_RU = rng.binomial(times_U, 0.5, size=(part, len(kinds_U)))
        exceeding += int((np.abs((2 * positive_RU - times_U) @ kinds_U) >= observed).sum())
    return (1 + exceeding) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm (1979): p values corrected for multiple tests, in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors), 1)
    return [float(p) for p in corrected]


def detectable_difference(task: Spread, *, binary: bool) -> float | None:
    """The smallest true mean difference that this many documents find with 80 % power at 5 %, two-sided.

    0/1 scores: exact power of the mid-p McNemar test on n / design effect documents, of which as many differ as did
    (or, where fewer did than the difference itself asks for, no more than that: a bound). Others, by normal theory:
    (t_0.975 + t_0.8) x standard error. None if not even a difference on all documents would be found.
    """
    if task.degrees < LEAST_DEGREES:
        return None
    if task.differing and not binary:
        found = (t_quantile(task.degrees) + stats.t.ppf(POWER, task.degrees)) * task.variance**0.5
        return float(found) if found <= 1 else None
    n = int(task.n / task.design)
    if mcnemar_power(n, 1.0, 1.0) < POWER:
        return None
    differing = task.differing / task.n
    return float(optimize.brentq(lambda true: mcnemar_power(n, differing, true) - POWER, 1e-9, 1.0, xtol=1e-6))


def mcnemar_power(n: int, differing: float, difference: float) -> float:
    """Power of the mid-p McNemar test at 5 % on n documents: mean difference `difference`, rate of differing ones."""
    differing = min(max(differing, difference), 1.0)
    low, high = stats.binom.ppf([1e-9, 1 - 1e-9], n, differing)
    m = np.arange(int(low), int(high) + 1)
    critical = stats.binom.ppf(ALPHA / 2, m, 0.5)
    mid_p = 2 * stats.binom.cdf(critical, m, 0.5) - stats.binom.pmf(critical, m, 0.5)
    critical = np.where(mid_p < ALPHA, critical, critical - 1)
    wins = (1 + difference / differing) / 2
    found = stats.binom.cdf(critical, m, wins) + stats.binom.sf(m - critical - 1, m, wins)
    return float((stats.binom.pmf(m, n, differing) * found).sum())


def _by_cluster(differences_D: Floats, clusters_D: Ints) -> tuple[Floats, Floats]:
    _, index_D = np.unique(clusters_D, return_inverse=True)
    sizes_G: Floats = np.bincount(index_D).astype(np.float64)
    sums_G: Floats = np.bincount(index_D, weights=differences_D).astype(np.float64)
    return sizes_G, sums_G


def in_parts(resamples: int, width: int) -> list[int]:
    """Resamples of `width` numbers each, in parts of at most two million numbers to limit memory."""
    rows = max(1, 2_000_000 // max(width, 1))
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]
