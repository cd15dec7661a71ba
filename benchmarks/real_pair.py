"""The main job on a real pretrained model and real rows: experts by `dae sft`, students by `dae align`, scores by lm-eval.

    python benchmarks/real_pair.py [--shared ../shared] [--work runs/real_pair] [--output benchmarks/results] [--jobs 2]
        [--seeds 0 1 2] [--sets questions category] [--students lora full]

Base and reference are one checkpoint (`shared/models/stories260k`, which knows little stories). Per set of e-commerce rows
and kind of student (LoRA, from a LoRA expert; all weights, from an expert of all weights): one expert, then for each seed
the student by DAE and, over the same mixed rows in the same steps, one by next-token loss alone (`lambda=0`).

Nothing was chosen by held-out scores: a student's learning rate is its expert's, for DAE and for next-token loss alike,
and no grid was searched. Every command is an ordinary `dae` command; a finished one is passed over by the toolkit, so that
the same call goes on after a stop. The table is written anew after every run, from what is there.
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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from dae_eval.harness import Document, TaskScores, score_tasks
from dae_eval.scores import Estimate, gain, gap_closed, paired, retention
from kd.fingerprints import model_fingerprint

TASKS = Path(__file__).parent / "tasks"
TITLES = {
    "real_category": "title to category",
    "real_hetpqa": "hetPQA",
    "real_hetpqa_unshared": "hetPQA, new evidence",
    "real_epqa": "ePQA",
    "real_stories": "stories",
    "real_story_endings": "story endings",
}
BIT_TASKS = {"real_hetpqa", "real_epqa", "real_stories"}
ENDINGS, STORIES = "real_story_endings", "real_stories"
# lr of the ordinary script in shared/README.md, for experts and students of both objectives
LEARNING_RATES = {"lora": 5e-3, "full": 3e-3}
EXPERT_SEED = 0
SAMPLED_ROWS = 1600
MAX_LENGTH = 256

Student = Literal["lora", "full"]


@dataclass(frozen=True)
class DomainSet:
    """One set of e-commerce rows: how its expert and its students train, and what they are scored on.

    general: where general rows come from, `file` (shared/data/general/reference_samples.jsonl) or `sample` (`dae sample`).
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
        "data/ecom/train.jsonl", ("real_hetpqa", "real_epqa"), "file", expert_rows=16, expert_steps=543, rows=(8, 4), steps=400
    ),
    "category": DomainSet(
        "data/ecom/train_category.jsonl", ("real_category",), "sample", expert_rows=32, expert_steps=400, rows=(16, 4), steps=400
    ),
}


@dataclass(frozen=True)
class Plan:
    """What to run and where. steps: of every training, instead of those in SETS; limit: first documents of each task."""

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
        """The file of general rows."""
        return self.work / "general.jsonl" if source == "sample" else self.shared / "data/general/reference_samples.jsonl"


@dataclass(frozen=True)
class Job:
    """Commands that run one after the other, as soon as the jobs named in `after` have succeeded."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()


def run_name(set_name: str, student: str, role: str, seed: int | None = None) -> str:
    """A run's folder below the work folder: `category-lora-expert`, `category-lora-dae-0`, `category-lora-ntp-0`, ..."""
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
    return found + [student_job(plan, *kind, role, seed) for seed in plan.seeds for kind in kinds for role in ("dae", "ntp")]


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
    """Where the scores of a run lie, document by document."""
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
        print(f"{datetime.now():%H:%M:%S}  {job.name}  {'done' if finished else 'FAILED: ' + str(log_file(plan, job.name))}", flush=True)
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
    """Where a job's output goes."""
    return plan.work / "logs" / f"{name}.log"


def evaluate(checkpoint: str, shared: Path, tasks: Sequence[str], scores: Path, limit: int | None) -> None:
    """Score a checkpoint and write {"fingerprint", "tasks"}; leave scores of the same weights on the same tasks as they are."""
    fingerprint = model_fingerprint(checkpoint)
    if scores.is_file():
        known = json.loads(scores.read_text(encoding="utf-8"))
        if known["fingerprint"] == fingerprint and set(tasks) <= known["tasks"].keys() and known["limit"] == limit:
            return
    found = score_checkpoint(checkpoint, shared, tasks, limit)
    scores.parent.mkdir(parents=True, exist_ok=True)
    record = {"fingerprint": fingerprint, "limit": limit, "tasks": {task: asdict(found[task]) for task in tasks}}
    scores.write_text(json.dumps(record), encoding="utf-8")


def score_checkpoint(checkpoint: str, shared: Path, tasks: Sequence[str], limit: int | None = None) -> dict[str, TaskScores]:
    """lm-eval on a checkpoint as plain transformers and peft open it; adapters go onto the base that they name."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_flush_denormal(True)
    adapter = (Path(checkpoint) / "adapter_config.json").is_file()
    opener = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = opener.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = {}
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
    source = yaml.safe_load((TASKS / f"{task.removeprefix('real_')}.yaml").read_text(encoding="utf-8"))["dataset_kwargs"]
    lines = (shared / "data" / source["file"]).read_text(encoding="utf-8").splitlines()
    texts = [row.get("completion") or row["text"][: source["first_characters"]] for row in map(json.loads, lines)]
    return np.array([len(text.encode()) for text in texts], dtype=np.float64)


def new_evidence(shared: Path) -> NDArray[np.bool_]:
    """[D] the documents of hetPQA whose evidence text no training row has."""

    def evidence(file: str) -> list[str]:
        prompts = [json.loads(line)["prompt"] for line in (shared / "data" / file).read_text(encoding="utf-8").splitlines()]
        return [next((part for part in prompt.split("\n") if part.startswith("Evidence: ")), "") for prompt in prompts]

    seen = set(evidence("ecom/train.jsonl")) - {""}
    return np.array([text not in seen for text in evidence("ecom/heldout_hetpqa.jsonl")])


def write_results(plan: Plan, output: Path) -> None:
    """TEMP"""


def arguments() -> argparse.Namespace:
    """The command line."""
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
    plan = Plan(given.shared, given.work, tuple(given.sets), tuple(given.students), tuple(given.seeds), given.steps, given.limit)
    failed = run_all(plan, given.jobs, given.output)
    if failed:
        print(f"not finished: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
