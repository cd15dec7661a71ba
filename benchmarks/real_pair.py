"""The main job on a real pretrained model and real rows: `dae sft`, `dae align`, scores by lm-eval.

    python benchmarks/real_pair.py [--shared ../shared] [--work runs/real_pair] [--output benchmarks/results] [--jobs 2]
        [--seeds 0 1 2] [--sets questions category] [--students lora full]

Base and reference are one checkpoint (`shared/models/stories260k`, which knows little stories). Per set of e-commerce
rows and kind of student (LoRA, from a LoRA expert; all weights, from an expert of all weights): one expert, then for
each seed the student by DAE and, over the same mixed rows in the same steps, one by next-token loss alone (`lambda=0`).

Nothing was chosen by held-out scores: a student's learning rate is its expert's, for DAE and for next-token loss alike,
and no grid was searched. Every command is an ordinary `dae` command; a finished one is passed over by the toolkit, so
that the same call goes on after a stop. The table is written anew after every run, from what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.real_pair_scores import (
    Document,
    Estimate,
    Scores,
    TaskScores,
    gain,
    gap_closed,
    paired,
    retention,
    score_tasks,
)
from benchmarks.real_pair_tables import BIT_TASKS, ENDINGS, STORIES, markdown
from kd.models.checkpoint_files import model_fingerprint
from kd.runs.files import write_text_durably

TASKS = Path(__file__).parent / "tasks"
# those of the experts in shared/README.md; here for experts and students of both objectives
LEARNING_RATES = {"lora": 5e-3, "full": 3e-3}
EXPERT_SEED = 0
SAMPLED_ROWS = 1600
MAX_LENGTH = 256

Student = Literal["lora", "full"]


@dataclass(frozen=True)
class DomainSet:
    """One set of e-commerce rows: how its expert and its students train, and what they are scored on.

    general: where its general rows come from, `file` (data/general/reference_samples.jsonl) or `sample` (`dae sample`).
    rows: domain and general rows of each optimizer step; the two routes weigh the same in the loss.
    """

    data: str
    tasks: tuple[str, ...]
    general: Literal["file", "sample"]
    expert_rows: int
    expert_steps: int
    rows: tuple[int, int]
    steps: int


SETS = {
    "questions": DomainSet(
        "data/ecom/train.jsonl",
        ("real_hetpqa", "real_epqa"),
        "file",
        expert_rows=16,
        expert_steps=543,
        rows=(8, 4),
        steps=600,
    ),
    "category": DomainSet(
        "data/ecom/train_category.jsonl",
        ("real_category",),
        "sample",
        expert_rows=32,
        expert_steps=400,
        rows=(16, 4),
        steps=600,
    ),
}


@dataclass(frozen=True)
class Plan:
    """What to run and where. steps: of every training, instead of those in SETS; limit: documents of each task."""

    shared: Path
    work: Path
    sets: tuple[str, ...]
    students: tuple[Student, ...]
    seeds: tuple[int, ...]
    steps: int | None = None
    limit: int | None = None

    @property
    def base(self) -> Path:
        return self.shared / "models" / "stories260k"

    def general(self, source: str) -> Path:
        return (
            self.work / "general.jsonl" if source == "sample" else self.shared / "data/general/reference_samples.jsonl"
        )


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other, as soon as the jobs named in `after` have succeeded."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()


def run_name(set_name: str, student: str, role: str, seed: int | None = None) -> str:
    """A run's folder below the work folder: `category-lora-expert`, `category-lora-dae-0`, ..."""
    return f"{set_name}-{student}-{role}" + ("" if seed is None else f"-{seed}")


def jobs(plan: Plan) -> list[Job]:
    """All jobs, what the others wait for first, then seed by seed."""
    every_task = tuple(task for name in plan.sets for task in SETS[name].tasks)
    found = [Job("base", (evaluation(plan, "base", str(plan.base), every_task),))]
    if any(SETS[name].general == "sample" for name in plan.sets):
        rows = SAMPLED_ROWS if plan.steps is None else 4 * plan.steps
        flags = ("--model", str(plan.base), "--output", str(plan.general("sample")), "--rows", str(rows))
        # With <s> in front a row is as long as those of the file.
        found.append(Job("sample", (("dae", "sample", *flags, "--max-new-tokens", "255", "--batch-size", "64"),)))
    kinds = [(name, student) for name in plan.sets for student in plan.students]
    found += [expert_job(plan, *kind) for kind in kinds]
    return found + [
        student_job(plan, *kind, role, seed) for seed in plan.seeds for kind in kinds for role in ("dae", "ntp")
    ]


def expert_job(plan: Plan, set_name: str, student: Student) -> Job:
    """`dae sft` on the domain rows alone, and its scores."""
    settings, name = SETS[set_name], run_name(set_name, student, "expert")
    command = (
        *("dae", "sft", "--base", str(plan.base), "--data", str(plan.shared / settings.data)),
        *("--output", str(plan.work / name), f"seed={EXPERT_SEED}", *common_keys(student)),
        f"train.max_steps={plan.steps or settings.expert_steps}",
        *("train.per_device_train_batch_size=8", f"train.gradient_accumulation_steps={settings.expert_rows // 8}"),
    )
    return Job(name, (command, evaluation(plan, name, str(plan.work / name), settings.tasks)))


def student_job(plan: Plan, set_name: str, student: Student, role: str, seed: int) -> Job:
    """`dae align` against that expert, or (role `ntp`) the same command with next-token loss alone; and its scores."""
    settings, name = SETS[set_name], run_name(set_name, student, role, seed)
    expert = run_name(set_name, student, "expert")
    domain_rows, general_rows = settings.rows
    rows = domain_rows + general_rows
    general = plan.general(settings.general)
    command = (
        *("dae", "align", "--base", str(plan.base), "--expert", str(plan.work / expert)),
        *("--output", str(plan.work / name), f"seed={seed}", *common_keys(student)),
        f"data.domain={{path: {plan.shared / settings.data}, share: {domain_rows / rows!r}}}",
        f"data.general={{path: {general}, share: {general_rows / rows!r}}}",
        *((f"lambda={0}",) if role == "ntp" else ()),
        f"train.max_steps={plan.steps or settings.steps}",
        *("train.per_device_train_batch_size=4", f"train.gradient_accumulation_steps={rows // 4}"),
    )
    after = (expert, "sample") if settings.general == "sample" else (expert,)
    return Job(name, (command, evaluation(plan, name, str(plan.work / name), settings.tasks)), after)


def common_keys(student: Student) -> tuple[str, ...]:
    """What experts and students have in common."""
    kind = () if student == "lora" else ("lora=null",)
    return (*kind, f"data.max_length={MAX_LENGTH}", f"train.learning_rate={LEARNING_RATES[student]}")


def evaluation(plan: Plan, name: str, checkpoint: str, tasks: Sequence[str]) -> tuple[str, ...]:
    """This script's own command that scores one checkpoint on its domain's tasks and on both general ones."""
    limit = () if plan.limit is None else ("--limit", str(plan.limit))
    return (
        *("python", "benchmarks/real_pair.py", "--shared", str(plan.shared), "--evaluate", checkpoint),
        *("--scores", str(scores_file(plan, name)), *limit, "--tasks", *tasks, STORIES, ENDINGS),
    )


def scores_file(plan: Plan, name: str) -> Path:
    return plan.work / "scores" / f"{name}.json"


def as_process(command: Sequence[str]) -> list[str]:
    """A command as printed, as arguments of a process in this interpreter."""
    words = {"dae": ["-m", "dae"], "python": [str(Path(__file__).resolve())]}
    return [sys.executable, *words[command[0]], *command[1 if command[0] == "dae" else 2 :]]


def run_all(plan: Plan, at_a_time: int, output: Path) -> list[str]:
    """Run all jobs, so many at a time, and write results after each. Returns the names of those that failed."""
    done: dict[str, Future[bool]] = {}
    writing, stopped = threading.Lock(), threading.Event()

    def run(job: Job) -> bool:
        if stopped.is_set() or not all(done[name].result() for name in job.after):
            return False
        finished = all(run_logged(plan, job.name, command) for command in job.commands)
        outcome = "done" if finished else f"FAILED: {log_file(plan, job.name)}"
        print(f"{datetime.now():%H:%M:%S}  {job.name}  {outcome}", flush=True)
        with writing:
            write_results(plan, output)
        return finished

    planned = jobs(plan)
    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            for job in planned:
                done[job.name] = pool.submit(run, job)
            return [job.name for job in planned if not done[job.name].result()]
        finally:
            stopped.set()


def run_logged(plan: Plan, name: str, command: Sequence[str]) -> bool:
    """Run one command in one thread of computation, its output at the end of the job's log."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **os.environ}
    log_file(plan, name).parent.mkdir(parents=True, exist_ok=True)
    with log_file(plan, name).open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        return subprocess.run(as_process(command), env=environment, stdout=log, stderr=log, check=False).returncode == 0


def log_file(plan: Plan, name: str) -> Path:
    return plan.work / "logs" / f"{name}.log"


def evaluate(checkpoint: str, shared: Path, tasks: Sequence[str], scores: Path, limit: int | None) -> None:
    """Score a checkpoint and write {"fingerprint", "tasks"}; leave scores of the same weights and tasks as they are."""
    fingerprint = model_fingerprint(Path(checkpoint))
    if scores.is_file():
        known = json.loads(scores.read_text(encoding="utf-8"))
        if known["fingerprint"] == fingerprint and set(tasks) <= known["tasks"].keys() and known["limit"] == limit:
            return
    found = score_checkpoint(checkpoint, shared, tasks, limit)
    scores.parent.mkdir(parents=True, exist_ok=True)
    record = {"fingerprint": fingerprint, "limit": limit, "tasks": {task: asdict(found[task]) for task in tasks}}
    write_text_durably(scores, json.dumps(record))  # whole or not at all: others read while this one writes


def score_checkpoint(
    checkpoint: str, shared: Path, tasks: Sequence[str], limit: int | None = None
) -> dict[str, TaskScores]:
    """lm-eval on a checkpoint as plain transformers and peft open it; an adapter is merged into its base."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_flush_denormal(True)
    if (Path(checkpoint) / "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(checkpoint).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found: dict[str, TaskScores] = {}
    for metric in ("bits", "acc"):
        chosen = [task for task in tasks if (task in BIT_TASKS) == (metric == "bits")]
        if chosen:
            metadata = {"shared": str(shared)}
            found |= score_tasks(
                model, tokenizer, chosen, include_path=TASKS, metadata=metadata, metric=metric, limit=limit
            )
    return found


def completion_bytes(shared: Path, task: str) -> NDArray[np.float64]:
    """[D] bytes of what is scored in each document of a task in bits."""
    source = yaml.safe_load((TASKS / f"{task.removeprefix('real_')}.yaml").read_text(encoding="utf-8"))[
        "dataset_kwargs"
    ]
    lines = (shared / "data" / source["file"]).read_text(encoding="utf-8").splitlines()
    texts = [row.get("completion") or row["text"][: source["first_characters"]] for row in map(json.loads, lines)]
    return np.array([len(text.encode()) for text in texts], dtype=np.float64)


def new_evidence(shared: Path) -> NDArray[np.bool_]:
    """[D] the documents of hetPQA whose evidence text no training row has."""

    def evidence(file: str) -> list[str]:
        prompts = [
            json.loads(line)["prompt"] for line in (shared / "data" / file).read_text(encoding="utf-8").splitlines()
        ]
        return [next((part for part in prompt.split("\n") if part.startswith("Evidence: ")), "") for prompt in prompts]

    seen = set(evidence("ecom/train.jsonl")) - {""}
    return np.array([text not in seen for text in evidence("ecom/heldout_hetpqa.jsonl")])


def read_scores(plan: Plan, name: str) -> dict[str, TaskScores] | None:
    """A run's scores, all of them such that higher is better; None where it has not been scored yet.

    Tasks in bits become minus bits per byte over the whole task: a document counts as -bits / (mean bytes).
    """
    if not scores_file(plan, name).is_file():
        return None
    found = {}
    for task, record in json.loads(scores_file(plan, name).read_text(encoding="utf-8"))["tasks"].items():
        documents = [Document(**document) for document in record["documents"]]
        found[task] = TaskScores(**{**record, "documents": tuple(documents)})
        if task not in BIT_TASKS:
            continue
        bytes_D = completion_bytes(plan.shared, task)[: len(documents)]
        found[task] = per_byte(found[task], np.ones(len(documents), dtype=np.bool_), bytes_D)
        if task == "real_hetpqa":
            kept_D = new_evidence(plan.shared)[: len(documents)]
            found[f"{task}_unshared"] = per_byte(
                TaskScores(**{**record, "documents": tuple(documents)}), kept_D, bytes_D
            )
    return found


def per_byte(bits: TaskScores, kept_D: NDArray[np.bool_], bytes_D: NDArray[np.float64]) -> TaskScores:
    """Scores in bits as parts of minus bits per byte over the documents kept: their mean is that figure."""
    mean_bytes = float(bytes_D[kept_D].mean())
    kept = [document for document, keep in zip(bits.documents, kept_D, strict=True) if keep]
    documents = tuple(Document(document.id, document.hash, -document.score / mean_bytes) for document in kept)
    return TaskScores(bits.task, bits.version, "minus bits per byte", documents)


def summarise(plan: Plan, set_name: str, student: Student) -> dict[str, Any] | None:
    """Figures of one set and kind of student, from the runs that have been scored; None without base and expert."""
    seeds = {role: [s for s in plan.seeds if scored(plan, set_name, student, role, s)] for role in ("dae", "ntp")}
    runs = {role: [run_name(set_name, student, role, seed) for seed in seeds[role]] for role in seeds}
    names = ["base", run_name(set_name, student, "expert"), *runs["dae"], *runs["ntp"]]
    found = [read_scores(plan, name) for name in names]
    if found[0] is None or found[1] is None:
        return None
    tasks = list(found[1])
    arrays = dict(zip(names, paired(*({t: f[t] for t in tasks} for f in found if f is not None)), strict=True))
    base, expert = arrays["base"], arrays[names[1]]
    rows: dict[str, Any] = {"base": figures(set_name, base, expert, [base])}
    rows["expert"] = figures(set_name, base, expert, [expert])
    for role in seeds:
        if runs[role]:
            rows[role] = figures(set_name, base, expert, [arrays[name] for name in runs[role]])
    result = {"set": set_name, "student": student, "general_rows": SETS[set_name].general, "runs": runs, "rows": rows}
    both = [seed for seed in seeds["dae"] if seed in seeds["ntp"]]
    if both:
        dae, ntp = (mean_of([arrays[run_name(set_name, student, role, s)] for s in both]) for role in seeds)
        result["dae_minus_ntp"] = {task: asdict(gain({task: ntp[task]}, {task: dae[task]})) for task in tasks}
    return result


def scored(plan: Plan, set_name: str, student: str, role: str, seed: int) -> bool:
    return scores_file(plan, run_name(set_name, student, role, seed)).is_file()


def mean_of(models: Sequence[Scores]) -> dict[str, NDArray[np.float64]]:
    """Each document's mean score over models that differ in the seed only: [D] by task."""
    return {task: np.mean([model[task] for model in models], axis=0) for task in models[0]}


def figures(set_name: str, base: Scores, expert: Scores, models: Sequence[Scores]) -> dict[str, Any]:
    """Scores by seed; gap closed, retention, loss difference of the seeds' mean with intervals over documents."""
    mean, domain = mean_of(models), SETS[set_name].tasks

    def of(tasks: Sequence[str], scores: Scores) -> dict[str, NDArray[np.float64]]:
        return {task: scores[task] for task in tasks}

    return {
        "scores": {task: [float(model[task].mean()) for model in models] for task in mean},
        "gap_closed": as_record(gap_closed(of(domain, base), of(domain, expert), of(domain, mean))),
        "gap_closed_by_seed": [
            as_record(gap_closed(of(domain, base), of(domain, expert), of(domain, model))) for model in models
        ],
        "stories_bits_per_byte_over_reference": as_record(gain(of([STORIES], mean), of([STORIES], base))),
        "story_endings_retention": as_record(retention(of([ENDINGS], base), of([ENDINGS], mean))),
    }


def as_record(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else asdict(estimate)


def write_results(plan: Plan, output: Path) -> None:
    """Write real_pair.json and real_pair.md from the scores that are there."""
    results = [
        found
        for name in plan.sets
        for student in plan.students
        if (found := summarise(plan, name, student)) is not None
    ]
    if not results:
        return
    packages = ("torch", "transformers", "peft", "lm-eval")
    record = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "planned_seeds": list(plan.seeds),
        "sets": {name: asdict(SETS[name]) for name in plan.sets},
        "results": results,
        "commands": [shlex.join(command) for job in jobs(plan) for command in job.commands],
    }
    planned = jobs(replace(plan, seeds=plan.seeds[:1]))
    commands = [shlex.join(job.commands[0]) for job in planned if job.name != "base"]
    score = shlex.join(planned[0].commands[0])
    output.mkdir(parents=True, exist_ok=True)
    (output / "real_pair.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "real_pair.md").write_text(markdown(record, commands, score), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with the model and the rows")
    parser.add_argument("--work", type=Path, default=Path("runs/real_pair"), help="where runs, scores and logs go")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the results go")
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=list(SETS))
    parser.add_argument("--students", nargs="+", choices=sorted(LEARNING_RATES), default=list(LEARNING_RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--steps", type=int, help="steps of every training, for a trial of the script")
    parser.add_argument("--limit", type=int, help="first documents of each task, for a trial of the script")
    parser.add_argument("--evaluate", metavar="CKPT", help="score this checkpoint only, as the script itself calls it")
    parser.add_argument("--scores", type=Path, help="where the scores of --evaluate go")
    parser.add_argument("--tasks", nargs="+", help="tasks of --evaluate")
    return parser.parse_args()


def main() -> int:
    """Run the plan; exit status 1 where a job failed."""
    given = arguments()
    if given.evaluate:
        evaluate(given.evaluate, given.shared, given.tasks, given.scores, given.limit)
        return 0
    plan = Plan(
        given.shared, given.work, tuple(given.sets), tuple(given.students), tuple(given.seeds), given.steps, given.limit
    )
    failed = run_all(plan, given.jobs, given.output)
    if failed:
        print(f"not finished: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
