"""How far a run on several processes is from the same run on one: each wrapping plan, stage and number of processes.

    python benchmarks/plans.py [--quick] [--output benchmarks/results]     # a quarter of an hour on two cores

Every run is real processes with gloo on the CPU, in float32, with rows, order and rows per step of the one process.
FSDP2 and ZeRO are accelerate's own preparation (benchmarks/fsdp_on_cpus.py). ZeRO needs DeepSpeed (`make test-zero`
makes .venv-zero, which has it), and is left out without. Compared are losses and gradient norms of every step, and the
weights that are published.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # run as a script, too

from benchmarks.fsdp_on_cpus import FSDP2, tell_accelerate, zero  # noqa: E402
from benchmarks.peer_inputs import prepare  # noqa: E402
from benchmarks.peer_setting import Setting  # noqa: E402

SETTING = Setting(
    "plans", layers=2, width=32, mlp=64, heads=4, vocabulary=288, rows=8, tokens=24, prompt=10, experts=2, lora_rank=4,
    steps=8, learning_rate=1e-2, expert_std=0.2,
)  # fmt: skip
OWN_WEIGHTS = [
    "expert.domain0=experts/domain0-merged", "expert.domain1=experts/domain1-merged",
    "reference=experts/domain1-merged",
]  # fmt: skip
BETWEEN = "start={domain0: 0.3, domain1: 0.2}"
DISTILL = [
    "--base", "base", "--teacher", "experts/domain0-merged", "--data", "general.jsonl", "attention.weight=0.5",
    "hidden.weight=0.5", "hidden.loss=mse", "lora.rank=4", f"train.max_steps={SETTING.steps}",
    "train.learning_rate=1e-3", "train.logging_steps=1", "train.save_strategy=no",
]  # fmt: skip
STAGES: Mapping[str, Sequence[str]] = {
    "align, LoRA, all roles on one backbone": ["align", "--recipe", "align.yaml"],
    "align, LoRA, gradient checkpointing": ["align", "--recipe", "align.yaml", "train.gradient_checkpointing=true"],
    "align, LoRA, from a point between the experts": ["align", "--recipe", "align.yaml", BETWEEN],
    "align, all weights": ["align", "--recipe", "align.yaml", "lora=null", "train.learning_rate=1e-3"],
    "align, teachers with weights of their own": ["align", "--recipe", "align.yaml", *OWN_WEIGHTS],
    "distill, attention maps and hidden states": ["distill", *DISTILL],
    "sft, LoRA": ["sft", "--recipe", "sft.yaml"],
}
QUICK = ("align, LoRA, all roles on one backbone", "align, all weights")


@dataclass(frozen=True)
class WrappingPlan:
    """variables: what accelerate's config sets; none for DDP."""

    name: str
    processes: int
    variables: Mapping[str, str] = field(default_factory=dict)


PLANS = (
    WrappingPlan("DDP", 2),
    WrappingPlan("DDP", 4),
    WrappingPlan("FSDP2", 2, FSDP2),
    WrappingPlan("FSDP2", 4, FSDP2),
    WrappingPlan("FSDP2, not resharded after forward", 2, {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}),
    WrappingPlan("FSDP2, layers in one group", 2, {**FSDP2, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}),
)
ZERO = (WrappingPlan("ZeRO-2", 2, zero(2)), WrappingPlan("ZeRO-3", 2, zero(3)), WrappingPlan("ZeRO-3", 4, zero(3)))
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def train(arguments: Sequence[str], output: str, folder: Path, plan: WrappingPlan | None) -> Path:
    """A run with the rows per step of one process; its folder."""
    count = 1 if plan is None else plan.processes
    words = [*arguments, "--output", output, f"train.per_device_train_batch_size={SETTING.rows // count}"]
    variables: dict[str, str] = {}
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        variables = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if plan is not None:
        variables |= plan.variables
    context = multiprocessing.get_context("forkserver")  # it imports everything once
    context.set_forkserver_preload(["dae.alignment", "dae.cli", "kd.stages.distill", "kd.stages.sft"])
    ranks = [
        context.Process(target=run_rank, args=(words, str(folder), {**variables, **rank_variables(rank, count)}))
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"{words}: {[rank.exitcode for rank in ranks]}")
    return folder / output


def rank_variables(rank: int, count: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}


def run_rank(words: Sequence[str], folder: str, variables: Mapping[str, str]) -> None:
    """In a process of its own: `dae WORDS`, without the fresh process that loads the result, as this compares it."""
    os.environ.update(variables)
    os.chdir(folder)
    import torch

    import kd.training.publishing
    from dae import cli

    torch.set_num_threads(1)
    cli.prepare_process(os.environ)
    if any(name.startswith("ACCELERATE_USE") for name in variables):
        tell_accelerate()
    setattr(kd.training.publishing, "verify_saved", lambda *_: None)  # noqa: B010
    status = cli.run(words)
    sys.stdout.flush()
    os._exit(status)


def differences(one: Path, other: Path) -> dict[str, Any]:
    """What the other run has: its wrapping, and the largest differences from the first."""
    losses: list[float] = []
    steps = ([line for line in lines(folder) if "loss" in line] for folder in (one, other))
    for ours, theirs in zip(*steps, strict=True):
        losses += [abs(theirs[key] - ours[key]) / abs(ours[key]) for key in ("loss", "grad_norm")]
    wrapping = json.loads((other / "run.json").read_text())["summary"]["wrapping"]
    return {"wrapping": wrapping, "losses": max(losses), "weights": weights_apart(one, other)}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_apart(one: Path, other: Path) -> float:
    """Largest difference of a published weight, over the largest weight of its tensor."""
    from safetensors.torch import load_file

    file = next(one.glob("*.safetensors")).name
    ours, theirs = load_file(one / file), load_file(other / file)
    assert ours.keys() == theirs.keys()
    return max(float((theirs[name] - weight).abs().max() / weight.abs().max()) for name, weight in ours.items())


def measure(stages: Sequence[str], plans: Sequence[WrappingPlan]) -> dict[str, Any]:
    record: dict[str, Any] = {"date": dt.date.today().isoformat(), "setting": vars(SETTING), "runs": []}
    libraries = ["torch", "transformers", "peft", "accelerate", *(["deepspeed"] if HAS_DEEPSPEED else [])]
    record["versions"] = {name: version(name) for name in libraries}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(SETTING, folder)
        for number, stage in enumerate(stages):
            one = train(STAGES[stage], f"one-{number}", folder, None)
            for index, plan in enumerate(plans):
                other = train(STAGES[stage], f"{number}-{index}", folder, plan)
                found = {"stage": stage, "plan": plan.name, "processes": plan.processes, **differences(one, other)}
                print(found, file=sys.stderr, flush=True)
                record["runs"].append(found)
    return record


def page(record: Mapping[str, Any]) -> str:
    columns = list(dict.fromkeys(f"{run['plan']}, {run['processes']}" for run in record["runs"]))
    rows: dict[str, dict[str, str]] = {}
    for run in record["runs"]:
        cell = f"{rounded(run['losses'])} / {rounded(run['weights'])}"
        rows.setdefault(run["stage"], {})[f"{run['plan']}, {run['processes']}"] = cell
    table = [
        f"| stage | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        *(f"| {stage} | {' | '.join(cells[column] for column in columns)} |" for stage, cells in rows.items()),
    ]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return "\n".join(
        [
            "# Several processes beside one",
            "",
            f"{record['date']}, CPU processes with gloo, float32, {versions}. Written by `benchmarks/plans.py`.",
            "",
            *table,
            "",
            "Columns: wrapping plan, number of processes. Cells: the largest relative difference of a loss or gradient",
            f"norm over {record['setting']['steps']} steps, and of a published weight over the largest of its tensor.",
            "FSDP2 and ZeRO are accelerate's own preparation, which `benchmarks/fsdp_on_cpus.py` makes it run on CPUs.",
            "",
        ]
    )


def rounded(value: float) -> str:
    """Rounded up to one digit: 3.2e-07 is `4e-07`."""
    if value == 0:
        return "0"
    unit = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / unit) * unit:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two stages, two processes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    chosen = parser.parse_args()
    stages = QUICK if chosen.quick else tuple(STAGES)
    plans = [plan for plan in PLANS if plan.processes == 2][:2] if chosen.quick else PLANS
    plans = [*plans, *(ZERO if HAS_DEEPSPEED else ())]
    record = measure(stages, plans)
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "plans.json").write_text(json.dumps(record, indent=1) + "\n")
    (chosen.output / "plans.md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
