"""The commands of benchmarks/trade_off.py: each run of its plan as ordinary `dae` commands, in the order of priority.

Rows, steps and schedule are those of `dae demo` and of real_pair.py for students on both sides of every comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trade_off_inputs import KEPT_LAYERS
from benchmarks.trade_off_plan import (
    ENDS,
    GRID,
    MERGES,
    WAYS,
    Grids,
    Pair,
    Part,
    Plan,
    Rates,
    Run,
    block_runs,
    blocks_of,
    checkpoint,
    ends,
    grid_runs,
    merged_start,
    runs_at,
    test_scores,
    validation_scores,
)
from dae.demo.world import PRODUCT_NAMES

SMALL_STEPS = {"world": 600, "real": 250}
MIXTURE_STEPS = 300  # of the world's mixture and its dense counterpart
REAL_STEPS, REAL_ROWS = 600, (8, 4)  # domain and general rows of each step, as in real_pair.py
REAL_LENGTH = 256
REAL_TASKS = ("real_hetpqa", "real_epqa", "real_stories", "real_story_endings")
STORY_TASKS = REAL_TASKS[2:]
PROMPTS: Mapping[Pair, Mapping[str, Sequence[str]]] = {  # what the routers of the mixtures start from
    "world": {
        "general": ("What is 12 + 30?", "Sort 41 17 88 23 from low to high.", "Repeat: bell coin lamp vase"),
        "domain": (f"What is the {PRODUCT_NAMES[0]} made of?", f"How much does the {PRODUCT_NAMES[1]} cost?"),
    },
    "real": {
        "general": ("Once upon a time, there was a little girl named Lily.", "One day, a boy went to the park."),
        "domain": ("Question: how many pieces are there?", "Question: is it waterproof?"),
    },
}

Command = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other, as soon as the jobs named in `after` have succeeded.

    made: files that say, when all are there, that there is nothing to do; empty: this script keeps a note of its own.
    """

    name: str
    commands: tuple[Command, ...]
    after: tuple[str, ...] = ()
    made: tuple[Path, ...] = ()


def jobs(plan: Plan, rates: Rates, grids: Grids) -> list[Job]:
    """All jobs that can be named while these learning rates are known, the most wanted first, each once.

    grids: the rates to try, of the ways for which that is more than GRID.
    """
    found: list[Job] = []
    for part, pair, last in blocks_of(plan):
        found += preparation(plan, part, pair)
        scored = [*block_runs(plan, rates, part, pair, last)]
        tuned = [name for name, way in WAYS[pair].items() if way.part == part and way.trains]
        tuning = [run for name in tuned for run in grid_runs(plan, pair, name, grids.get((pair, name), GRID))]
        # Merges before trainings, and a grid before what waits for it.
        for run in sorted(dict.fromkeys([*tuning, *scored]), key=lambda run: run.rate is not None):
            found += run_jobs(plan, run, validate=run in tuning, test=run in scored)
    return list({job.name: job for job in found}.values())


def run_jobs(plan: Plan, run: Run, *, validate: bool, test: bool) -> list[Job]:
    """Training (or merging) and scoring of a run, without what is finished elsewhere."""
    found, ready = [], starts_from(run)
    if not run.is_finished_elsewhere:
        found.append(Job(run.name, (making(plan, run),), ready))
        ready = (run.name,)
        if run.pair == "real":  # test and validation documents in one go
            tasks = STORY_TASKS if run.part == "distillation" else REAL_TASKS
            command = real_scoring(plan, checkpoint(plan, run), test_scores(plan, run), tasks)
            found.append(Job(f"score-{run.name}", (command,), ready))
        elif test:
            suite, world = Path("recipes/demo/eval.yaml"), plan.demo(run.seed) / "world"
            command = world_scoring(suite, world, checkpoint(plan, run), test_scores(plan, run))
            found.append(Job(f"score-{run.name}", (command,), ready))
    if validate and run.pair == "world":
        suite, world = plan.validation / "suite.yaml", plan.validation
        command = world_scoring(suite, world, checkpoint(plan, run), validation_scores(plan, run))
        found.append(Job(f"validate-{run.name}", (command,), (*ready, "validation")))
    return found


def starts_from(run: Run) -> tuple[str, ...]:
    """The jobs that make what a run starts from."""
    if run.part == "distillation":
        return ("real-small",) if run.pair == "real" else (f"demo-{run.seed}", f"world-small-{run.seed}")
    first = "real-pair" if run.pair == "real" else f"demo-{run.seed}"
    if run.way == "merged":
        return (first, merged_start(run.pair, run.seed).name, f"{run.pair}-mixture-{mixture_seed(run)}")
    if run.part == "mixture":
        return (first, f"{run.pair}-mixture-{mixture_seed(run)}")
    return (first,)


def mixture_seed(run: Run) -> int:
    """The real pair's base and expert are the same for all seeds, and so is their mixture."""
    return run.seed if run.pair == "world" else 0


def preparation(plan: Plan, part: Part, pair: Pair) -> list[Job]:
    """What the runs of a block start from."""
    if pair == "real":
        if part == "distillation":
            return [Job("real-small", (made_input("small-real", plan.work / "real-small", "--base", plan.stories),))]
        mixture = [mixture_job(plan, pair, 0)] if part == "mixture" else []
        return [real_pair_job(plan), *mixture]
    found = [demo_job(plan, seed) for seed in plan.seeds]
    found.append(Job("validation", (made_input("validation", plan.validation),)))
    for seed in plan.seeds:
        if part == "distillation":
            start = plan.work / f"world-small-{seed}"
            found.append(Job(start.name, (made_input("small-world", start, "--seed", seed),)))
        if part == "mixture":
            found += [merged_job(plan, pair, seed), mixture_job(plan, pair, seed)]
    return found


def merged_job(plan: Plan, pair: Pair, seed: int) -> Job:
    run = merged_start(pair, seed)
    return Job(run.name, (making(plan, run),), starts_from(run))


def demo_job(plan: Plan, seed: int) -> Job:
    command = ("dae", "demo", "--output", str(plan.demo(seed)), "--seed", str(seed))
    return Job(f"demo-{seed}", (command,), made=(plan.demo(seed) / "report" / "report.json",))


def real_pair_job(plan: Plan) -> Job:
    """Expert and students of all weights on product questions, by the benchmark that has them already."""
    finished = [Run("real", way, None, plan.seeds[0], None) for way in ENDS]
    for way in ("dae", "ntp"):
        finished += [run for run in runs_at(plan, "real", way, 1.0, 3e-3) if run.is_finished_elsewhere]
    command = ("python", "benchmarks/real_pair.py", "--shared", str(plan.shared), "--work", str(plan.real_runs))
    chosen = ("--output", str(plan.work / "real_pair"), "--sets", "questions", "--students", "full", "--jobs", "1")
    seeds = ("--seeds", *map(str, plan.seeds))
    return Job("real-pair", ((*command, *chosen, *seeds),), made=tuple(test_scores(plan, run) for run in finished))


def made_input(what: str, output: Path, *flags: object) -> Command:
    return ("python", "benchmarks/trade_off_inputs.py", what, "--output", str(output), *map(str, flags))


def mixture_job(plan: Plan, pair: Pair, seed: int) -> Job:
    """The mixture of base and expert, and, for the world, the expert with its adapter merged, to teach it."""
    base, expert = ends(plan, pair, seed)
    output = plan.work / f"{pair}-mixture-{seed}"
    moe = ["dae", "merge", "moe", "--base", base, "--expert", f"general={base}", "--expert", f"domain={expert}"]
    moe += ["--gate", "hidden", "--output", str(output)]
    for name, prompts in PROMPTS[pair].items():
        moe.append(f"experts.{name}.prompts=[" + ", ".join(f'"{prompt}"' for prompt in prompts) + "]")
    if pair == "real":
        return Job(output.name, (tuple(moe),), ("real-pair",))
    whole: Command = ("dae", "merge", "weights", "--method", "linear", "--base", base, "--expert", expert)
    whole += ("--output", str(whole_expert(plan, seed)), "weight=1")
    return Job(output.name, (tuple(moe), whole), (f"demo-{seed}",))


def whole_expert(plan: Plan, seed: int) -> Path:
    return plan.work / f"world-whole-expert-{seed}"


# -- training and merging ----------------------------------------------------------------------------------------------


def making(plan: Plan, run: Run) -> Command:
    """The command that makes a run's weights."""
    base, expert = ends(plan, run.pair, run.seed)
    if run.way in MERGES:
        seed = (f"seed={run.seed}",) if run.way == "dare_ties" else ()
        flags = ("--method", run.way, "--base", base, "--expert", expert, "--output", str(checkpoint(plan, run)))
        return ("dae", "merge", "weights", *flags, f"weight={run.at:g}", *seed)
    stage = distillation(plan, run) if run.part == "distillation" else alignment(plan, run)
    steps = () if plan.steps is None else (f"train.max_steps={plan.steps}",)
    keys = (f"train.learning_rate={run.rate!r}", f"seed={run.seed}", *steps)
    return ("dae", *stage, "--output", str(checkpoint(plan, run)), *keys)


def alignment(plan: Plan, run: Run) -> Command:
    """`dae align`, or `dae sft` on domain rows alone, without what all commands have in common."""
    stage = world_alignment(plan, run) if run.pair == "world" else real_alignment(plan, run)
    return (*stage, "lambda=0") if run.way == "ntp" else stage


def world_alignment(plan: Plan, run: Run) -> Command:
    demo = plan.demo(run.seed)
    base, recipe, rows = str(demo / "base"), ("--recipe", "recipes/demo/align.yaml"), demo / "world"
    if run.way == "sft":
        return ("sft", *recipe, "--base", base, "--data", str(rows / "shop_align.jsonl"))
    expert, start, keys = demo / "expert", base, []
    if run.part == "mixture":
        expert, keys = whole_expert(plan, run.seed), ["lora=null", f"train.max_steps={MIXTURE_STEPS}"]
        start = mixture_start(plan, run)
    share = 0.7 if run.at is None else run.at
    shares = (f"data.shop.0.share={share:g}", f"data.general.0.share={1 - share:g}")
    data = ("--domain-data", f"shop={rows / 'shop_align.jsonl'}", "--general-data", str(rows / "general_align.jsonl"))
    teachers = ("--expert", f"shop={expert}", "--reference", base)
    return ("align", *recipe, "--base", start, *teachers, *data, *shares, *keys)


def mixture_start(plan: Plan, run: Run) -> str:
    """Where a student starts: the base, or for two ways what base and expert come to together."""
    if run.way == "moe":
        return str(plan.work / f"{run.pair}-mixture-{mixture_seed(run)}")
    if run.way == "merged":
        return str(checkpoint(plan, merged_start(run.pair, run.seed)))
    return ends(plan, run.pair, run.seed)[0]


def real_alignment(plan: Plan, run: Run) -> Command:
    base, expert = ends(plan, "real", run.seed)
    domain, general = plan.shared / "data/ecom/train.jsonl", plan.shared / "data/general/reference_samples.jsonl"
    rows = sum(REAL_ROWS)
    keys: Command = ("lora=null", f"data.max_length={REAL_LENGTH}", f"train.max_steps={REAL_STEPS}")
    keys += ("train.per_device_train_batch_size=4", f"train.gradient_accumulation_steps={rows // 4}")
    if run.way == "sft":
        return ("sft", "--base", base, "--data", str(domain), *keys)
    shares = [number / rows for number in REAL_ROWS]
    keys += (
        f"data.domain={{path: {domain}, share: {shares[0]!r}}}",
        f"data.general={{path: {general}, share: {shares[1]!r}}}",
    )
    if run.at not in (None, 1.0):
        keys += (f"weights={{domain: {run.at!r}, general: 1.0}}",)
    return ("align", "--base", mixture_start(plan, run), "--expert", expert, "--reference", base, *keys)


def distillation(plan: Plan, run: Run) -> Command:
    """`dae distill` from the larger model, or `dae sft` on the same rows, without what all commands have in common."""
    recipe: Command = ()
    keys: Command = ("lora=null", f"data.max_length={REAL_LENGTH}", f"train.max_steps={SMALL_STEPS['real']}")
    if run.pair == "world":
        base, rows = plan.work / f"world-small-{run.seed}", plan.demo(run.seed) / "world" / "general_train.jsonl"
        recipe, keys = ("--recipe", "recipes/demo/base.yaml"), (f"train.max_steps={SMALL_STEPS['world']}",)
    else:
        base, rows = plan.work / "real-small", plan.shared / "data/general/reference_samples.jsonl"
    common = (*recipe, "--base", str(base), "--data", str(rows), *keys)
    if run.way == "small_sft":
        return ("sft", *common)
    attention: Command = ("attention.weight=1.0",) if run.way == "small_attention" else ()
    if attention and run.pair == "real":  # each layer beside the one that it was cut from
        pairs = [list(pair) for pair in enumerate(KEPT_LAYERS)]
        attention += (f"attention.layers={pairs}",)
    return ("distill", "--teacher", ends(plan, run.pair, run.seed)[0], *common, *attention)


# -- scoring -----------------------------------------------------------------------------------------------------------


def world_scoring(suite: Path, world: Path, model: Path, output: Path) -> Command:
    flags = ("--model", str(model), "--suite", str(suite), "--output", str(output))
    return ("dae", "eval", "tasks", *flags, f"metadata.world={world}")


def real_scoring(plan: Plan, model: Path, output: Path, tasks: Sequence[str]) -> Command:
    """Tasks in bits, which are not on 0..1, have real_pair.py's own way of being scored."""
    command = ("python", "benchmarks/real_pair.py", "--shared", str(plan.shared), "--evaluate", str(model))
    return (*command, "--scores", str(output), "--limit", str(plan.limit), "--tasks", *tasks)
