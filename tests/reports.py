"""Reports made by hand, in the shape that the demo's have: what the tests of rendering show."""

from __future__ import annotations

import random
from dataclasses import replace

from dae_eval.comparing.statistics import Estimate, Word
from dae_eval.report import (
    BenchmarkLine,
    Curve,
    Flip,
    FloorLine,
    GapLine,
    HeldOutLine,
    LossLine,
    ModelLine,
    Radar,
    Report,
    RetentionLine,
    StudentDifference,
    StudentSummary,
    TaskLine,
    TaskLoss,
)
from dae_eval.results import Kind

MODELS = ("base", "expert", "student", "next-token")
GROUPS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "shop, aligned": ("domain", ("category", "material", "size", "price", "compatibility")),
    "shop, not aligned": ("shown", ("colour", "options")),
    "general, aligned": ("general", ("arithmetic", "sorting", "copying", "reading", "selecting", "regions")),
    "general, not aligned": ("shown", ("reversing", "shifting", "crafts", "capitals")),
}
LEVELS = {  # group -> scores of MODELS
    "shop, aligned": (0.27, 0.93, 0.91, 0.88),
    "shop, not aligned": (0.26, 0.90, 0.36, 0.33),
    "general, aligned": (0.96, 0.41, 0.958, 0.961),
    "general, not aligned": (0.92, 0.38, 0.81, 0.86),
}
COUNTS = {"shop, aligned": 800, "shop, not aligned": 400, "general, aligned": 240, "general, not aligned": 240}


def task_line(
    task: str, group: str, kind: Kind, rng: random.Random, levels: tuple[float, ...], n: int = 240, seen: int = 0
) -> TaskLine:
    """One task with scores near `levels` (of MODELS; the reference is the base) and an interval that fits n."""
    scores = {name: min(1.0, max(0.0, rng.gauss(level, 0.02))) for name, level in zip(MODELS, levels, strict=True)}
    scores["reference"] = scores["base"]
    against = "base" if kind == "domain" else "reference"
    value = scores["student"] - scores[against]
    half = 1.96 * (0.25 / n) ** 0.5 * (0.4 if kind == "general" else 0.8)
    certain = abs(value) > half
    estimate = Estimate(value, value - half, value + half)
    return TaskLine(
        task=task,
        group=group,
        kind=kind,
        metric="acc",
        n=n,
        clusters=n // 4,
        chance=0.25,
        majority=0.26,
        scores=scores,
        against=against,
        difference=estimate,
        p=0.0004 if certain else 0.41,
        p_holm=0.0061 if certain else 1.0,
        test="paired bootstrap",
        detectable=half * 1.43,
        wins=int(n * max(0.02, value)),
        losses=int(n * max(0.02, -value)),
        unchanged=0.9,
        unpaired=3 if task.endswith("arithmetic") else 0,
        seen=seen,
        unseen_scores={name: score - 0.01 for name, score in scores.items()} if seen else None,
        unseen_difference=Estimate(value - 0.01, value - half - 0.02, value + half + 0.01) if seen else None,
    )


def flip(task: str, group: str, number: int, change: float, *, seen: bool = False) -> Flip:
    """A document of the shop on which the student is better (change 1.0) or worse (-1.0)."""
    against, right, wrong = ("base" if group.startswith("shop") else "reference"), "walnut", "brushed steel"
    student, other = (right, wrong) if change > 0 else (wrong, right)
    return Flip(
        task=task,
        group=group,
        id=number,
        prompt=f"Question {number}: which material is the Varnholt side table made of?\n"
        "Choices: oak, walnut, brushed steel, glass\nAnswer:",
        target=right,
        answers={"base": other, "expert": right, "reference": other, "student": student, "next-token": student},
        scores={
            "base": float(change < 0),
            "expert": 1.0,
            "reference": float(change < 0),
            "student": float(change > 0),
            "next-token": float(change > 0),
        },
        against=against,
        change=change,
        seen=seen,
    )


def flips(n: int, seed: int = 0) -> tuple[Flip, ...]:
    """`n` flips over all tasks of GROUPS, regressions first."""
    rng = random.Random(seed)
    tasks = [(f"world_{task}", group) for group, (_, names) in GROUPS.items() for task in names]
    made = []
    for number in range(n):
        task, group = rng.choice(tasks)
        made.append(flip(task, group, number, rng.choice((-1.0, 1.0)), seen=number % 7 == 0))
    return tuple(sorted(made, key=lambda one: one.change))


def curves() -> tuple[Curve, ...]:
    """What a run's metrics give: drift on general rows of two students, loss of the expert's own training."""
    steps = tuple(range(0, 1001, 100))
    falling = tuple(0.02 + 1.2 * 0.75 ** (step / 100) for step in steps)
    return (
        Curve("student", "KL(reference || student), general rows", "nats per token", steps,
              tuple(0.012 * (1 - 0.8 ** (step / 100)) for step in steps)),
        Curve("next-token", "KL(reference || student), general rows", "nats per token", steps,
              tuple(0.055 * (1 - 0.85 ** (step / 100)) for step in steps)),
        Curve("student", "KL(expert || student), domain rows", "nats per token", steps, falling),
        Curve("expert", "held-out loss", "nats per token", steps, tuple(1.1 + value for value in falling)),
    )  # fmt: skip


def floor(word: Word) -> FloorLine:
    """The line of the worst task; FAIL: it lost 30 points."""
    worst = TaskLoss("world_arithmetic", "reference", 240, Estimate(-0.8, -2.9, 1.3), 0.4, None)
    if word == "PASS":
        return FloorLine("PASS", 5.0, worst, (), ())
    lost = replace(worst, difference=Estimate(-30.0, -36.2, -23.8), p=1e-9)
    unsure = TaskLoss("world_sorting", "reference", 240, Estimate(-3.0, -6.2, 0.2), 0.1, 480)
    return FloorLine(word, 5.0, lost, (lost,), (unsure,))


def full_report() -> Report:
    """Everything that a report can have besides the demo's: a lost task, a benchmark, losses, ratings."""
    report = demo_report()
    lost = replace(report.tasks[7], p_holm=0.0001, difference=Estimate(-0.3, -0.362, -0.238))
    rated = replace(report.tasks[8], task="mt_bench", metric="rating / 10", unit="rating")
    tasks = (*report.tasks[:7], lost, rated, *report.tasks[9:])
    scores = {"base": 0.61, "expert": 0.55, "reference": 0.61, "student": 0.6, "next-token": 0.58}
    benchmark = BenchmarkLine(
        "mmlu", "general, aligned", "general", 57, 14_042, scores, "reference", Estimate(-0.01, -0.02, -0.001), 0.02
    )
    values = {"base": 2.31, "reference": 2.31, "student": 2.33, "expert": 2.9, "next-token": 2.4}
    loss = LossLine("wikitext", "shown", "word_perplexity", "word perplexity", 62, 62, values, "reference",
                    Estimate(0.02, 0.01, 0.03), 0.0004, 0.0008)  # fmt: skip
    other = replace(loss, task="pile_arxiv", metric="bits_per_byte", unit="bits per byte")
    missing = ("task world_capitals was not answered by expert; to pass without it, --allow-missing world_capitals",)
    gap, retention = report.student.gap, report.student.retention
    assert gap is not None and retention is not None
    compared = (replace(report.compared[0], left_out=("world_size",)),)
    student = replace(
        report.student,
        gap=replace(gap, word="INCONCLUSIVE", documents_needed=900, reasons=missing),
        retention=replace(retention, word="INCONCLUSIVE", exhausted=True, reasons=missing),
        floor=replace(floor("FAIL"), reasons=missing),
    )
    parts = {"tasks": tasks, "benchmarks": (benchmark,), "losses": (loss, other), "compared": compared}
    return replace(report, word="FAIL", student=student, **parts)


def demo_report(n_flips: int = 60) -> Report:
    """Four models on 17 tasks in four groups; the student passes both lines."""
    rng = random.Random(3)
    lines = tuple(
        task_line(f"world_{name}", group, kind, rng, LEVELS[group], COUNTS[group], seen=31 if name == "price" else 0)
        for group, (kind, names) in GROUPS.items()
        for name in names
    )
    held_out = tuple(
        HeldOutLine(route, model, 18_432, loss, kl)
        for route, model, loss, kl in (
            ("general", "base", 0.611, {"reference": 0.0, "expert": 1.9201}),
            ("general", "student", 0.618, {"reference": 0.0113, "expert": 1.8764}),
            ("general", "next-token", 0.655, {"reference": 0.0521, "expert": 1.8022}),
            ("shop", "base", 2.713, {"reference": 0.0, "expert": 1.2211}),
            ("shop", "student", 1.204, {"reference": 1.1034, "expert": 0.0312}),
            ("shop", "next-token", 1.198, {"reference": 1.2307, "expert": 0.0604}),
        )
    )
    axes = tuple(name for _, names in GROUPS.values() for name in names)[:8]
    return Report(
        word="PASS",
        date="2026-11-03",
        student=StudentSummary(
            "student",
            GapLine("PASS", Estimate(3.3, 3.19, 3.41), Estimate(0.924, 0.881, 0.953), 0.0, None),
            RetentionLine("PASS", Estimate(-0.2, -0.8, 0.4), 1.0, None, Estimate(99.8, 99.2, 100.4)),
            floor("PASS"),
        ),
        compared=(StudentDifference("next-token", Estimate(0.023, 0.004, 0.042), Estimate(0.4, -0.2, 1.0)),),
        others=(
            StudentSummary(
                "next-token",
                GapLine("PASS", Estimate(3.3, 3.19, 3.41), Estimate(0.901, 0.862, 0.934), 0.0, None),
                RetentionLine("INCONCLUSIVE", Estimate(-0.6, -1.3, 0.1), 1.0, 5400, Estimate(99.4, 98.7, 100.1)),
                floor("PASS"),
            ),
        ),
        models=(
            ModelLine("base", "demo/base", "3f9ac2d17b604e58" * 4, ""),
            ModelLine("expert", "demo/expert", "a1d0475be93f62c8" * 4, ""),
            ModelLine("reference", "demo/base", "3f9ac2d17b604e58" * 4, "base"),
            ModelLine("student", "demo/student", "770be41c95da3f26" * 4, ""),
            ModelLine("next-token", "demo/next-token", "c4e2905df1ab7386" * 4, ""),
        ),
        tasks=lines,
        benchmarks=(),
        losses=(),
        flips=flips(n_flips),
        held_out=held_out,
        radars=(
            Radar("Accuracy by skill", axes, {
                model: tuple(LEVELS["shop, aligned"][i] if j < 5 else LEVELS["shop, not aligned"][i] if j < 7 else 0.95
                             for j in range(len(axes))) for i, model in enumerate(MODELS)}),
        ),
        curves=curves(),
        notes=(
            "3 documents of world_arithmetic were answered by only some of the models and are left out.",
            "31 of 800 documents of world_price also stand in rows that the student was trained on.",
        ),
        provenance=(
            ("command", "dae report --base demo/base --expert demo/expert --student demo/student --output demo/report"),
            ("suite", "recipes/demo/eval.yaml, SHA-256 5d1c" + "0f" * 30),
            ("chat template", "none"),
            ("generation", "greedy, 32 new tokens at most"),
            ("resampling", "10000 paired bootstrap samples, seed 0"),
            ("libraries", "torch 2.13.0, transformers 5.23.0, peft 0.21.2, lm-eval 0.4.13"),
        ),
    )  # fmt: skip


def bare_report() -> Report:
    """Retention only, one task, nothing else: what every format has to show without empty headings."""
    line = replace(task_line("hellaswag", "general", "general", random.Random(1), (0.7, 0.3, 0.7, 0.7)),
                   chance=None, majority=None, detectable=None, unpaired=0)  # fmt: skip
    scores = {"reference": 0.7012, "student": 0.6988}
    return Report(
        word="INCONCLUSIVE",
        date="2026-11-03",
        student=StudentSummary(
            "student", None, RetentionLine("INCONCLUSIVE", Estimate(-0.24, -1.9, 1.4), 1.0, 12_400, None), None
        ),
        others=(),
        compared=(),
        models=(
            ModelLine("reference", "hub/general-7b", "0123456789abcdef" * 4, ""),
            ModelLine("student", "runs/student", "fedcba9876543210" * 4, ""),
        ),
        tasks=(replace(line, scores=scores, difference=Estimate(-0.0024, -0.019, 0.014)),),
        benchmarks=(),
        losses=(),
        flips=(),
        held_out=(),
        radars=(),
        curves=(),
        notes=(),
        provenance=(),
    )


def failing_report() -> Report:
    """A student that took nothing of an expert that gained nothing, and lost three points."""
    report = demo_report()
    return replace(
        report,
        word="FAIL",
        student=StudentSummary(
            "student",
            GapLine("FAIL", Estimate(0.004, -0.021, 0.03), None, 0.0, None),
            RetentionLine("FAIL", Estimate(-3.1, -4.0, -2.2), 1.0, None, Estimate(96.6, 95.7, 97.5)),
            floor("FAIL"),
        ),
    )


def wide_report() -> Report:
    """Forty tasks with long names in two groups, and five different models with long names."""
    report = demo_report()
    rng = random.Random(5)
    lines = []
    for number in range(40):
        kind: Kind = "domain" if number < 18 else "general"
        name = f"benchmark_{number:02d}_with_a_name_that_somebody_{'really_' * (number % 4)}chose"
        line = task_line(
            name, f"{kind} suite", kind, rng, LEVELS["general, aligned" if number > 17 else "shop, aligned"]
        )
        lines.append(replace(line, scores={**line.scores, "reference": line.scores["base"] - 0.01}))
    models = tuple(
        replace(line, same_as="", path=f"runs/2026-11-03/{'very-' * 9}long/{line.role}") for line in report.models
    )
    axes = tuple(f"category {number} of forty" for number in range(40))
    radar = Radar("Many categories", axes, {name: tuple(rng.random() for _ in axes) for name in MODELS})
    gap = GapLine("INCONCLUSIVE", Estimate(3.3, 3.19, 3.41), Estimate(0.51, 0.46, 0.57), 0.5, 900)
    others = (replace(report.others[0], gap=gap),)
    return replace(report, tasks=tuple(lines), models=models, radars=(radar,), others=others)


HOSTILE = (
    "<script>window.hacked = true</script>",
    "</script><img src=x onerror=\"window.hacked=true\">",
    "a \"quoted\" 'text' & <b>more</b>",
    "bell \x07 escape \x1b[31mred\x1b[0m null \x00",
    "right to left \u202egnp.exe\u202c and isolates \u2066x\u2069",
    "a | pipe, `code`, **bold**, _it_ [link](http://x.invalid) # no heading\n# nor this\n- nor a list",
    "lone surrogate \ud83d end",
    "",
    "{{ 7 * 7 }} {% raw %}",
    "word " * 20_000,
)  # fmt: skip


def hostile_report() -> Report:
    """What a model may write, and what a user may name things."""
    report = demo_report(0)
    base = flip("world_price", "shop, aligned", 0, -1.0)
    made = tuple(
        replace(base, id=number, prompt=text, target=text, answers=dict.fromkeys(base.answers, text))
        for number, text in enumerate(HOSTILE)
    )
    task = replace(report.tasks[0], task="<script>alert(1)</script>|`x`", group='"><b>group</b>')
    renamed = replace(made[0], task=task.task, group=task.group, id=99)
    return replace(
        report,
        flips=(*made, renamed),
        tasks=(task, *report.tasks[1:]),
        notes=(*HOSTILE[:7],),
        models=tuple(replace(line, path=f"{line.path}/<i>&|`\x1b[1m") for line in report.models),
        provenance=(("command", "dae report --output '<script>' $x$ \u202e"), ("a|b", "c`d`")),
        radars=(replace(report.radars[0], title="<b> $\\frac{1}{2}$ & |", axes=("<a>", "$x$", "&", *"defgh")),),
    )  # fmt: skip
