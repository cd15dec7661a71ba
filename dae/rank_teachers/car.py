"""Compatibility-Adjusted Reward (CAR; Xu et al. 2024, arXiv 2411.07133): rank teachers for a student before training.

    CAR(D, theta) = r(D) / (1 + beta * L(D, theta))

r is the mean reward of the candidate's responses D. L is the student's mean loss on them: nats per response token of
each row, then the mean over rows, so that each response weighs the same in L and r. (The paper calls it the average
loss of the responses; the mean over all tokens is in the result, too.) The paper names no default for beta, so there
is one ranking per beta of a sweep.

Shape legend: K candidates, N rows (the same prompts in the same order), P different prompts, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from dae_eval.comparing.statistics import Estimate

from kd.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RESAMPLES = 2000
TAIL = 0.025  # each end of a 95 % interval
PART_ELEMENTS = 4_000_000  # bootstrap weights in memory at a time


@dataclass(frozen=True)
class Measured:
    """One candidate's rows, each [N].

    losses, losses_alone: the student's, in nats per response token, with and without the prompt. tokens: per response,
    by the student's tokenizer, end token included.
    """

    rewards: Sequence[float]
    losses: Sequence[float]
    losses_alone: Sequence[float]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Facts:
    """Statistics of one candidate's responses.

    reward: mean, unshifted. loss: L, mean over rows; loss_over_tokens: mean over all tokens. tokens: mean length of a
    response. ifd: mean over rows of loss / loss without the prompt (Instruction-Following Difficulty, arXiv
    2308.12032); near 1 the prompt does not help the student. perplexity: mean over rows of exp(loss).
    """

    name: str
    reward: Estimate
    loss: Estimate
    loss_over_tokens: float
    tokens: float
    ifd: float
    perplexity: float


@dataclass(frozen=True)
class Place:
    """A candidate's place at one beta.

    best, worst: the places that the intervals allow: behind those it is clearly worse than (the interval of the paired
    difference is below 0), before those it is clearly better than. behind: CAR minus that of the candidate one place
    ahead; None for the first.
    """

    name: str
    car: Estimate
    best: int
    worst: int
    behind: Estimate | None

    @property
    def tied(self) -> bool:
        """Whether the interval of the difference to the one ahead contains 0."""
        return self.behind is not None and self.behind.high >= 0


@dataclass(frozen=True)
class AtBeta:
    """All candidates at one beta, the largest CAR first."""

    beta: float
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Crossing:
    """Two candidates that change places within the sweep: `below` is ahead at smaller betas, `above` at larger."""

    beta: float
    below: str
    above: str


@dataclass(frozen=True)
class Ranking:
    """The result. shift: added to every reward in CAR; None without `shift`."""

    prompts: int
    rows: int
    shift: float | None
    facts: tuple[Facts, ...]
    sweep: tuple[AtBeta, ...]
    crossings: tuple[Crossing, ...]


def compatibility_adjusted_reward(reward: npt.ArrayLike, loss: npt.ArrayLike, beta: float) -> Floats:
    """r / (1 + beta L), elementwise; arXiv 2411.07133. Reward in the reward model's unit, loss in nats per token."""
    car: Floats = np.asarray(reward, np.float64) / (1.0 + beta * np.asarray(loss, np.float64))
    return car


def rank(
    measured: Mapping[str, Measured], prompt_of_row: Sequence[int], betas: Sequence[float], *, shift: bool, seed: int
) -> Ranking:
    """Rank candidates at every beta, with paired intervals over prompts.

    Args:
        measured: candidate -> its rows, all in one order of prompts.
        prompt_of_row: [N] the number of each row's prompt, 0..P-1; rows of one prompt are resampled together.
        betas: each at least 0.
        shift: subtract the lowest single reward of all candidates. This changes CAR, not only its scale: the discount
            then applies to the distance from that reward.
        seed: of the bootstrap.

    Raises:
        UserError: a mean reward is negative and `shift` is false (a larger loss would then raise CAR); one prompt only.
    """
    names, prompts_N = list(measured), np.asarray(prompt_of_row, np.int64)
    prompts = int(prompts_N.max()) + 1
    if prompts < 2:
        raise UserError("all rows have the same prompt; at least two prompts are required")
    rewards_KN = np.array([measured[name].rewards for name in names], np.float64)
    losses_KN = np.array([measured[name].losses for name in names], np.float64)
    offset = -float(rewards_KN.min()) if shift else 0.0
    if not shift:
        refuse_negative({name: float(mean) for name, mean in zip(names, rewards_KN.mean(1), strict=True)})
    reward_K, loss_K = rewards_KN.mean(1) + offset, losses_KN.mean(1)
    means_RX = resampled_means(np.concatenate([rewards_KN, losses_KN]), prompts_N, prompts, seed)
    reward_RK, loss_RK = means_RX[:, : len(names)], means_RX[:, len(names) :]
    facts = tuple(
        facts_of(name, measured[name], reward_RK[:, place], loss_RK[:, place]) for place, name in enumerate(names)
    )
    sweep = tuple(
        AtBeta(
            beta,
            places(
                names,
                compatibility_adjusted_reward(reward_K, loss_K, beta),
                compatibility_adjusted_reward(reward_RK + offset, loss_RK, beta),
            ),
        )
        for beta in betas
    )
    crossed = crossings(names, reward_K, loss_K, min(betas), max(betas))
    return Ranking(prompts, len(prompts_N), offset if shift else None, facts, sweep, crossed)


def refuse_negative(rewards: Mapping[str, float]) -> None:
    """Raise UserError if a mean reward is negative: a larger loss would raise its CAR."""
    negative = {name: reward for name, reward in rewards.items() if reward < 0}
    if negative:
        shown = ", ".join(f"{name} {reward:.4g}" for name, reward in negative.items())
        raise UserError(
            f"shift: false: the mean reward is negative ({shown}), so a larger loss would raise CAR; set shift=true to "
            "subtract the lowest reward (finished results are kept), or use another reward model"
        )


def resampled_means(values_XN: Floats, prompt_of_row_N: Ints, prompts: int, seed: int) -> Floats:
    """[X, N] -> [R, X]: means over rows, on the same resamples of prompts for every X: differences are paired."""
    sums_PX, rows_P = np.zeros((prompts, len(values_XN))), np.bincount(prompt_of_row_N, minlength=prompts)
    np.add.at(sums_PX, prompt_of_row_N, values_XN.T)
    rng = np.random.default_rng(seed)
    means, left = [], RESAMPLES
    while left:
        part = min(left, max(1, PART_ELEMENTS // prompts))
        times_RP = rng.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=part).astype(np.float64)
        means.append(times_RP @ sums_PX / (times_RP @ rows_P)[:, None])
        left -= part
    return np.concatenate(means)


def estimate(value: float, resampled_R: Floats) -> Estimate:
    """The value with its 95 % interval: percentiles of its bootstrap over prompts."""
    low, high = np.quantile(resampled_R, [TAIL, 1 - TAIL])
    return Estimate(float(value), float(low), float(high))


def facts_of(name: str, rows: Measured, reward_R: Floats, loss_R: Floats) -> Facts:
    losses_N, alone_N = np.asarray(rows.losses, np.float64), np.asarray(rows.losses_alone, np.float64)
    tokens_N = np.asarray(rows.tokens, np.float64)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ifd, perplexity = float((losses_N / alone_N).mean()), float(np.exp(losses_N).mean())
    return Facts(
        name=name,
        reward=estimate(float(np.mean(rows.rewards)), reward_R),
        loss=estimate(float(losses_N.mean()), loss_R),
        loss_over_tokens=float((losses_N * tokens_N).sum() / tokens_N.sum()),
        tokens=float(tokens_N.mean()),
        ifd=ifd,
        perplexity=perplexity,
    )


def places(names: Sequence[str], car_K: Floats, car_RK: Floats) -> tuple[Place, ...]:
    """Candidates by CAR, the largest first; ties in the given order."""
    order = sorted(range(len(names)), key=lambda place: -car_K[place])
    found = []
    for rank_of, index in enumerate(order):
        low_K, high_K = np.quantile(car_RK[:, [index]] - car_RK, [TAIL, 1 - TAIL], axis=0)
        ahead = order[rank_of - 1] if rank_of else None
        behind = (
            None
            if ahead is None
            else Estimate(float(car_K[index] - car_K[ahead]), float(low_K[ahead]), float(high_K[ahead]))
        )
        best, worst = 1 + int((high_K < 0).sum()), len(names) - int((low_K > 0).sum())
        found.append(Place(names[index], estimate(float(car_K[index]), car_RK[:, index]), best, worst, behind))
    return tuple(found)


def crossings(
    names: Sequence[str], reward_K: Floats, loss_K: Floats, smallest: float, largest: float
) -> tuple[Crossing, ...]:
    """The betas between smallest and largest where two candidates' CAR are equal, ascending.

    r_a / (1 + beta L_a) = r_b / (1 + beta L_b) at beta = (r_a - r_b) / (r_b L_a - r_a L_b); at most one per pair, since
    1 + beta L > 0.
    """
    found = []
    for a, b in combinations(range(len(names)), 2):
        gap, turn = reward_K[a] - reward_K[b], reward_K[b] * loss_K[a] - reward_K[a] * loss_K[b]
        if turn == 0 or not smallest < gap / turn < largest:
            continue
        below, above = (a, b) if gap > 0 else (b, a)
        found.append(Crossing(float(gap / turn), names[below], names[above]))
    return tuple(sorted(found, key=lambda crossing: crossing.beta))
