"""What benchmarks/soak.py kills: commands over a pico world, the phases of each, and what must be kept."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(ROOT / "tests")]

import yaml  # noqa: E402
from claims import CANDIDATES, make_claims_world  # noqa: E402
from golden_runs import RUNS  # noqa: E402
from worlds import make_adapter  # noqa: E402

import kd.cache.filling  # noqa: E402
import kd.runs.environment  # noqa: E402

TRAINING = {
    "kd.runs.run_folder:RunFolder._set_up": "set-up",
    "kd.stages.run_stage:prepare": "loading",
    "kd.stages.run_stage:start_metrics": "first measurement",
    "kd.training.trainer:RoutedTrainer.training_step": "training step",
    "kd.training.trainer:RoutedTrainer.evaluate": "held-out evaluation",
    "kd.training.trainer:RoutedTrainer._save_checkpoint": "checkpoint write",
    "kd.stages.run_stage:publish": "publishing",
}
EVALUATION = {
    "dae_eval.evaluation:run_task": "task",
    "dae_eval.evaluation:write_evaluation": "evaluation write",
}
MERGING = {
    "dae.merging.checkpoints:whole_checkpoint": "merging an adapter",
    "dae.merging.mergekit_calls:merge": "merging",
    "dae.merging.mergekit_calls:mix": "merging",
    "kd.runs.run_folder:RunFolder.publish": "publishing",
    "kd.runs.run_folder:RunFolder.mark_finished": "publishing",
}
SAMPLING = {
    "dae.sampling.sample:SampleFile.append": "writing rows",
    "dae.sampling.sample:SampleFile.finish": "finishing",
    "dae.sampling.sample:batch_writer": "sampling",
    "dae.sampling.sample:answer": "sampling",
}
PART_BYTES = 4096  # of a cache's file: several of them, of pico rows
TRAIN = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
LORA = {"lora": {"rank": 4}, "train": TRAIN}
PIPELINE: Mapping[str, Any] = {
    "expert": {"stage": "sft", "base": "base", "data": {"train": "shop.jsonl"}, **LORA},
    "aligned": {
        "stage": "align", "base": "base", "expert": {"shop": "@expert"}, "data": {"general": "general.jsonl"}, **LORA,
    },
    "report": {"base": "base", "expert": "@expert", "student": "@aligned", "suite": "suite.yaml"},
    "written": {"stage": "sample", "model": "base", "prompts": "shop.jsonl", "rows": 4, "max_new_tokens": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One command. phases: by function; kept: files that no kill takes away once they are there; suffix: of a file."""

    command: tuple[str, ...]
    phases: Mapping[str, str]
    kept: tuple[str, ...] = ()
    output: str = "--output={}"
    suffix: str = ""
    forks: bool = False


TARGETS: Mapping[str, Target] = {
    "align": Target(RUNS["align-shared"], TRAINING, ("provenance.json",)),
    "sft": Target(RUNS["sft"], TRAINING, ("provenance.json",)),
    "distill": Target(RUNS["distill-layers"], TRAINING, ("provenance.json",)),
    "cache": Target(
        ("cache", *RUNS["align-shared"], "--output", "unused"),
        {"kd.stages.caching:plans_of_run": "planning", "kd.cache.filling:fill_one": "filling"},
        ("**/*.safetensors",),
        "cache.path={}",
    ),
    "eval tasks": Target(
        ("eval", "tasks", "--model", "expert", "--suite", "suite.yaml"), EVALUATION, ("documents/*.gz",)
    ),
    "report": Target(
        ("report", "--base", "base", "--expert", "expert", "--student", "student", "--suite", "suite.yaml"),
        {**EVALUATION, "dae.commands.report:publish": "report write"},
        ("**/documents/*.gz",),
    ),
    "merge weights": Target(
        ("merge", "weights", "--method", "dare_ties", "--base", "base", "--expert", "expert"), MERGING
    ),
    "merge moe": Target(
        ("merge", "moe", "--base", "wide", "--expert", "wide", "--expert", "other", "--gate", "random"), MERGING
    ),
    "sample": Target(
        ("sample", "--model", "base", "--prompts", "shop.jsonl", "--rows", "48", "max_new_tokens=8", "batch_size=4"),
        SAMPLING,
        suffix=".jsonl",
    ),
    "rank-teachers": Target(
        ("rank-teachers", "--student", "base", "--reward-model", "rm", *CANDIDATES, "shift=true"),
        {
            "dae.rank_teachers.measuring:rewards_of": "rewards",
            "dae.rank_teachers.measuring:losses_of": "student losses",
            "dae.rank_teachers.folder:RankFolder.keep": "writing",
            "dae.rank_teachers.folder:RankFolder.finish": "writing",
        },
        ("settings.json", "rewards/*.json", "losses/*.json"),
    ),
    "run": Target(
        ("run", "path.yaml"),
        {
            "dae.pipeline.state:PipelineFolder.save": "state write",
            "dae.pipeline.stages:write_recipe": "recipe write",
            **TRAINING,
            **EVALUATION,
            **SAMPLING,
        },
        ("*/provenance.json", "*/run.json"),
        "output={}",
        forks=True,
    ),
}


def make_soak_world(folder: Path) -> Path:
    """All that the commands are given."""
    from pico import make_checkpoint

    make_claims_world(folder)
    make_adapter(folder / "student", folder / "base", seed=2)
    for seed, name in enumerate(("wide", "other")):
        make_checkpoint(folder / name, "mistral", seed=seed)
    (folder / "path.yaml").write_text(yaml.safe_dump({"output": "runs", "stages": dict(PIPELINE)}, sort_keys=False))
    return folder


@dataclass(frozen=True)
class Marks:
    """To be armed in the process of a command: its own process group, and a file that says which phase it is in.

    In a pipeline its stages inherit what is armed here, but for the group: they have their own, and end with it.
    """

    file: str
    phases: Mapping[str, str] = field(default_factory=dict)

    def arm(self) -> None:
        os.setpgid(0, 0)
        self._write("other")
        setattr(kd.cache.filling, "PART_BYTES", PART_BYTES)  # noqa: B010
        # Outputs name it: work on the repository meanwhile is no difference.
        setattr(kd.runs.environment, "toolkit_commit", lambda: None)  # noqa: B010
        for where, phase in self.phases.items():
            module, _, path = where.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, attribute = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, attribute, self._marked(getattr(owner, attribute), phase))

    def _marked(self, real: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def marked(*arguments: Any, **named: Any) -> Any:
            before = Path(self.file).read_text().strip()
            self._write(phase)
            try:
                return real(*arguments, **named)
            finally:
                self._write(before)

        return marked

    def _write(self, phase: str) -> None:
        """In one write of a fixed width: a reader finds the old phase or the new one."""
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(descriptor, f"{phase:<40}".encode(), 0)
        os.close(descriptor)
