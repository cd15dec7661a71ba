"""Which runs benchmarks/trade_off.py makes, and where each of them lies. Runs nothing.

A *way* makes a student (DAE, next-token loss, a merge, ...) on one of two *pairs* of a general model and an expert: the
embedded world, and stories260k of ../shared with product questions. Its *setting* is a place on its trade-off curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Pair = Literal["world", "real"]
Part = Literal["alignment", "distillation", "mixture"]
Rates = Mapping[tuple[Pair, str], float]  # of (pair, way): the learning rate chosen on validation documents
Grids = Mapping[tuple[Pair, str], Sequence[float]]  # the learning rates that are tried; GRID where not said

GRID = (1.5e-3, 3e-3, 6e-3)  # where every way that trains begins, on both pairs
LOWEST_RATE, HIGHEST_RATE = GRID[0] / 8, GRID[-1] * 8
FINISHED_RATE = 3e-3  # of the students that `dae demo` and real_pair.py leave behind
ENDS = ("base", "expert")


@dataclass(frozen=True)
class Way:
    """One way to a student.

    settings: places on its curve, the first one where its learning rate is tuned; empty: there is only one place.
    trains: whether it has a learning rate.
    """

    title: str
    part: Part
    setting: str = ""
    settings: tuple[float, ...] = ()
    trains: bool = True


def merge(title: str, settings: tuple[float, ...]) -> Way:
    return Way(title, "alignment", "coefficient", settings, trains=False)


MERGES = {
    "linear": merge("merge, linear", (0.3, 0.5, 0.7)),
    "slerp": merge("merge, SLERP", (0.3, 0.5, 0.7)),
    "ties": merge("merge, TIES", (0.5, 1.0, 1.5)),
    "dare_ties": merge("merge, DARE-TIES", (0.3, 0.5, 0.7)),
    "task_arithmetic": merge("merge, task arithmetic", (0.5,)),
}


def trained_ways(setting: str, settings: tuple[float, ...]) -> dict[str, Way]:
    return {
        "dae": Way("DAE", "alignment", setting, settings),
        "ntp": Way("next-token loss, same mixed rows", "alignment", setting, settings),
        "sft": Way("next-token loss, domain rows alone", "alignment"),
        "small_sft": Way("next-token loss", "distillation"),
        "small_kd": Way("KD", "distillation"),
        "small_attention": Way("KD and attention loss", "distillation"),
        "moe": Way("DAE, mixture of base and expert", "mixture"),
    }


WAYS: Mapping[Pair, Mapping[str, Way]] = {
    "world": {
        **trained_ways("share of domain rows", (0.7, 0.3, 0.1)),
        "dense": Way("DAE, dense", "mixture"),
        "merged": Way("DAE, dense, from their linear merge at 0.5", "mixture"),
        **MERGES,
    },
    "real": {**trained_ways("weight of domain rows", (1.0, 0.25)), **MERGES},
}

# (part, pair, whether the last settings of its trained ways), the most wanted first.
BLOCKS: tuple[tuple[Part, Pair, bool], ...] = (
    ("alignment", "world", False),
    ("alignment", "real", False),
    ("distillation", "world", False),
    ("distillation", "real", False),
    ("mixture", "world", False),
    ("alignment", "world", True),
    ("mixture", "real", False),
)
EARLY_SETTINGS = 2


@dataclass(frozen=True)
class Plan:
    """What to run and where. steps: of every training here, for a trial; limit: first documents of each real task."""

    shared: Path
    work: Path
    demo_runs: Path
    real_runs: Path
    seeds: tuple[int, ...]
    parts: tuple[Part, ...]
    pairs: tuple[Pair, ...]
    steps: int | None = None
    limit: int = 600

    @property
    def stories(self) -> Path:
        return self.shared / "models" / "stories260k"

    @property
    def validation(self) -> Path:
        return self.work / "validation"

    def demo(self, seed: int) -> Path:
        """What `dae demo` wrote: base, expert, student, next-token, world, report."""
        return self.demo_runs / f"seed-{seed}"

    def real(self, role: str) -> Path:
        """A run of real_pair.py on product questions, all weights."""
        return self.real_runs / f"questions-full-{role}"


@dataclass(frozen=True)
class Run:
    """One model to be scored. at: its setting; rate: its learning rate, None for what is not trained here."""

    pair: Pair
    way: str
    at: float | None
    seed: int
    rate: float | None

    @property
    def name(self) -> str:
        at = "" if self.at is None else f"-{self.at:g}"
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return f"{self.pair}-{self.way}{at}{rate}-{self.seed}"

    @property
    def part(self) -> Part:
        return "alignment" if self.way in ENDS else WAYS[self.pair][self.way].part

    @property
    def is_finished_elsewhere(self) -> bool:
        """Whether `dae demo` or real_pair.py makes and scores it: base, expert, and students as they train them."""
        if self.way in ENDS:
            return True
        is_theirs = self.way in ("dae", "ntp") and self.at == first_setting(self.pair, self.way)
        return is_theirs and self.rate == FINISHED_RATE


def first_setting(pair: Pair, way: str) -> float | None:
    settings = WAYS[pair][way].settings
    return settings[0] if settings else None


# -- which runs --------------------------------------------------------------------------------------------------------


def seeds_of(plan: Plan, pair: Pair, way: str) -> tuple[int, ...]:
    """The real pair has one base and one expert, so merges of them differ only where they draw at random."""
    is_single = pair == "real" and (way in ENDS or (way in MERGES and way != "dare_ties"))
    return plan.seeds[:1] if is_single else plan.seeds


def grid_runs(plan: Plan, pair: Pair, way: str, rates: Sequence[float] = GRID) -> list[Run]:
    """The runs that a way's learning rate is chosen from: the first seed's, at its first setting."""
    return [Run(pair, way, first_setting(pair, way), plan.seeds[0], rate) for rate in rates]


def widened(rates: Sequence[float], best: float) -> tuple[float, ...]:
    """The grid with one rate more where the best stands at an end, half or twice it; else, or at the limits, as it is.

    So every way's grid goes on until its best rate lies between two worse ones.
    """
    lower, higher = rates[0] / 2, rates[-1] * 2
    if best == rates[0] and lower >= LOWEST_RATE:
        return (lower, *rates)
    if best == rates[-1] and higher <= HIGHEST_RATE:
        return (*rates, higher)
    return tuple(rates)


def tuned_ways(plan: Plan) -> list[tuple[Pair, str]]:
    """Every way of the plan that has a learning rate."""
    blocks = {(part, pair) for part, pair, _ in blocks_of(plan)}
    return [
        (pair, name) for pair in WAYS for name, way in WAYS[pair].items() if way.trains and (way.part, pair) in blocks
    ]


def runs_at(plan: Plan, pair: Pair, way: str, at: float | None, rate: float | None) -> list[Run]:
    return [Run(pair, way, at, seed, rate) for seed in seeds_of(plan, pair, way)]


def blocks_of(plan: Plan) -> list[tuple[Part, Pair, bool]]:
    return [block for block in BLOCKS if block[0] in plan.parts and block[1] in plan.pairs]


def merged_start(pair: Pair, seed: int) -> Run:
    """The linear merge that the way `merged` starts from."""
    return Run(pair, "linear", 0.5, seed, None)


def block_runs(plan: Plan, rates: Rates, part: Part, pair: Pair, last: bool) -> Iterator[Run]:
    """The runs of a block that are to be scored, as far as learning rates are known: setting by setting."""
    ways = {name: way for name, way in WAYS[pair].items() if way.part == part}
    for place in range(3):
        for name, way in ways.items():
            settings: Sequence[float | None] = way.settings or (None,)
            is_late = place >= EARLY_SETTINGS and way.trains
            if place < len(settings) and is_late == last and (not way.trains or (pair, name) in rates):
                yield from runs_at(plan, pair, name, settings[place], rates.get((pair, name)))


def planned_runs(plan: Plan, rates: Rates) -> list[Run]:
    """Everything that is to be in the results; until a learning rate is chosen, FINISHED_RATE stands for it."""
    known = dict.fromkeys(tuned_ways(plan), FINISHED_RATE) | dict(rates)
    found = [run for pair in plan.pairs for way in ENDS for run in runs_at(plan, pair, way, None, None)]
    return found + [run for block in blocks_of(plan) for run in block_runs(plan, known, *block)]


# -- where they lie ----------------------------------------------------------------------------------------------------


def ends(plan: Plan, pair: Pair, seed: int) -> tuple[str, str]:
    """Base and expert."""
    if pair == "real":
        return str(plan.stories), str(plan.real("expert"))
    return str(plan.demo(seed) / "base"), str(plan.demo(seed) / "expert")


def checkpoint(plan: Plan, run: Run) -> Path:
    """Where a run's weights lie."""
    if run.way in ENDS:
        return Path(ends(plan, run.pair, run.seed)[ENDS.index(run.way)])
    if not run.is_finished_elsewhere:
        return plan.work / run.name
    if run.pair == "real":
        return plan.real(f"{run.way}-{run.seed}")
    return plan.demo(run.seed) / {"dae": "student", "ntp": "next-token"}[run.way]


def test_scores(plan: Plan, run: Run) -> Path:
    """Where a run's answers to the test documents lie: a folder for the world, a file for the real pair."""
    if not run.is_finished_elsewhere:
        return plan.work / "scores" / (run.name if run.pair == "world" else f"{run.name}.json")
    if run.pair == "world":
        return plan.demo(run.seed) / "report" / "evaluations" / checkpoint(plan, run).name
    return plan.real_runs / "scores" / ("base.json" if run.way == "base" else f"{checkpoint(plan, run).name}.json")


def validation_scores(plan: Plan, run: Run) -> Path:
    """Where its answers to the validation documents lie; on the real pair those are other documents of one file."""
    return test_scores(plan, run) if run.pair == "real" else plan.work / "validation_scores" / run.name
