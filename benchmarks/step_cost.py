"""What one optimizer step of `dae align` costs, beside the straightforward way to write it.

    python benchmarks/step_cost.py [--shape head|backbone|all] [--threads 2 1] [--repeats 5] [--steps 4]

Four ways to take the same step, each in a process of its own, in alternation:

    ours             kd.trainer.route_sums: three roles on one backbone, each row through its own teacher, chunked loss
    straightforward  student, expert and reference are three models; both teachers see all rows; full logits; the loss is
                     taken at response positions (torch.nn.functional.kl_div)
    masked-late      the same, with the divergence taken at all positions and masked afterwards, as many scripts do
    student-only     our loss with the teachers' hidden states given: what any training with this loss needs at least

All four start from the same checkpoint and the same expert (a LoRA adapter; the straightforward way merges it into a model
of its own), take the same rows, and must show the same losses to 1e-4 after every optimizer step, else nothing is reported.

The arithmetic bound is the ratio of floating-point operations in matrix products, counted from the real steps with torch's
FlopCounterMode. By hand, for a backbone whose forward pass is 1 unit: the student with LoRA costs 2 (forward, and the
gradient of the activations; the frozen weights need none), a teacher 1 on all rows. Straightforward 2 + 1 + 1 = 4, ours
2 + 1 = 3 since each row has one teacher. For the head: straightforward is 4 products (student forward and backward, two
teachers) over all positions, ours 3 over the response positions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the parent process imports no torch: a worker's memory is its own
    import torch
    from peft import LoraConfig
    from torch import Tensor, nn

    from kd.roles import Backbone

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("ours", "straightforward", "masked-late", "student-only")
GENERAL, DOMAIN = 0, 1
LOSS_TOLERANCE = 1e-4
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights and one micro-batch: `rows` full rows, the first `prompt` tokens of each are prompt."""

    name: str
    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int
    rows: int = 8
    domain_rows: int = 1  # about a tenth of the rows, as in the paper
    tokens: int = 256
    prompt: int = 128
    lora_rank: int = 16


SHAPES = {
    "head": Shape("head", layers=6, width=288, mlp=768, heads=6, vocabulary=32000),
    "backbone": Shape("backbone", layers=12, width=512, mlp=1376, heads=8, vocabulary=4096),
    "tiny": Shape("tiny", layers=2, width=16, mlp=32, heads=2, vocabulary=96, rows=4, tokens=12, prompt=5, lora_rank=4),
}

LossOfStep = Callable[[], "Tensor"]


def make_batch(shape: Shape) -> dict[str, Tensor]:
    """What kd.mixing.collate makes of rows of equal length: the first rows are domain rows, the others general."""
    import torch

    generator = torch.Generator().manual_seed(1)
    size = (shape.rows, shape.tokens)
    response_mask_BT = torch.zeros(size, dtype=torch.bool)
    response_mask_BT[:, shape.prompt :] = True
    return {
        "input_ids": torch.randint(3, shape.vocabulary, size, generator=generator),
        "attention_mask": torch.ones(size, dtype=torch.int64),
        "response_mask": response_mask_BT,
        "route_ids": torch.where(torch.arange(shape.rows) < shape.domain_rows, DOMAIN, GENERAL),
    }


def lora_config(shape: Shape) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=shape.lora_rank, lora_alpha=2 * shape.lora_rank, target_modules="all-linear")


def prepare(shape: Shape, folder: Path) -> None:
    """Write the base checkpoint, the expert's adapter and the teachers' hidden states into `folder`."""
    import torch
    from peft import get_peft_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from kd.objective import teacher_hidden_states

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.tokens,
    )
    base = LlamaForCausalLM(config)
    torch.nn.init.normal_(base.lm_head.weight, std=2.0 * shape.width**-0.5)  # logits of standard deviation 2: not flat
    base.save_pretrained(folder / "base")
    expert = get_peft_model(base, lora_config(shape))
    for name, parameter in expert.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    expert.save_pretrained(str(folder / "expert"))
    model, objective = _shared_roles(shape, folder)
    hidden = teacher_hidden_states(make_batch(shape), objective)
    save_file({str(route): hidden_NE for route, hidden_NE in hidden.items()}, folder / "teacher_states.safetensors")


def _student(shape: Shape, folder: Path) -> Backbone:
    """The base with a new student adapter on it, by the toolkit's own functions."""
    import torch

    from kd.config import LoraRecipe
    from kd.roles import Backbone, LoadSettings, add_student_adapter, load_model

    base = load_model(str(folder / "base"), LoadSettings(torch.float32))
    backbone = Backbone(str(folder / "base"), base)
    torch.manual_seed(2)
    add_student_adapter(backbone, LoraRecipe(rank=shape.lora_rank, alpha=2 * shape.lora_rank), None)
    return backbone


def _shared_roles(shape: Shape, folder: Path) -> tuple[nn.Module, Any]:
    """(student, Objective): three roles on one backbone, as dae.alignment.build_roles makes them."""
    from kd.losses import TokenLoss
    from kd.roles import Role, add_frozen_adapter
    from kd.objective import Objective, Route

    backbone = _student(shape, folder)
    name = add_frozen_adapter(backbone, str(folder / "expert"))
    reference, expert = Role("reference", backbone.model, None), Role("expert", backbone.model, name)
    return backbone.model, Objective((Route("general", reference), Route("domain", expert)), TokenLoss())


def ours(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """The step as kd.trainer.RoutedTrainer takes it: a count of response tokens, route sums, one normaliser."""
    from kd.objective import response_token_counts, route_sums

    model, objective = _shared_roles(shape, folder)
    batch = make_batch(shape)

    def loss_of_step() -> Tensor:
        weights_R = objective.weights(response_token_counts(batch, len(objective.routes)))
        return (weights_R * route_sums(model, batch, objective).loss).sum()

    return model, loss_of_step


def student_only(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """The student's pass and our loss; the teachers' hidden states at response positions are given."""
    from safetensors.torch import load_file

    from kd.losses import TokenLoss, token_loss_sums
    from kd.roles import final_hidden_states, head_of
    from kd.objective import model_inputs

    model = _student(shape, folder).model
    batch = make_batch(shape)
    teacher_states = load_file(folder / "teacher_states.safetensors")
    inputs, labels_BT = model_inputs(batch), batch["input_ids"][:, 1:]

    def loss_of_step() -> Tensor:
        import torch

        hidden_BTD = final_hidden_states(model, inputs)[:, :-1]
        head = head_of(model)
        means = []
        for route in (GENERAL, DOMAIN):
            here_BT = _positions(batch, route)
            sums = token_loss_sums(
                hidden_BTD[here_BT], head, labels_BT[here_BT], TokenLoss(), teacher_states[str(route)], head
            )
            means.append(sums.loss / here_BT.sum())
        return torch.stack(means).mean()

    return model, loss_of_step


def _positions(batch: Mapping[str, Tensor], route: int) -> Tensor:
    """[B, T - 1] bool: the positions of this route that predict a response token."""
    return batch["response_mask"][:, 1:] & (batch["route_ids"] == route)[:, None]


def _three_models(shape: Shape, folder: Path) -> tuple[nn.Module, dict[int, nn.Module]]:
    """(student, teacher by route) as models of their own; the expert is merged, which is its fastest form."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, use_safetensors=True)

    torch.manual_seed(2)
    student = get_peft_model(load(), lora_config(shape))
    expert = PeftModel.from_pretrained(load(), str(folder / "expert")).merge_and_unload()
    teachers = {GENERAL: load(), DOMAIN: expert}
    for teacher in teachers.values():
        teacher.eval().requires_grad_(False)
    return student, teachers


def straightforward(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """Three models, both teachers on all rows, full logits; softmax and divergence at response positions only."""
    import torch
    from torch.nn import functional

    student, teachers = _three_models(shape, folder)
    batch = make_batch(shape)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def teacher_log_probs(route: int) -> Tensor:
        with torch.inference_mode():
            logits_BTV = teachers[route](**inputs, use_cache=False).logits
        return functional.log_softmax(logits_BTV[:, :-1][_positions(batch, route)], dim=-1)

    def loss_of_step() -> Tensor:
        log_q = {route: teacher_log_probs(route) for route in teachers}
        logits_BTV = student(**inputs, use_cache=False).logits[:, :-1]
        means = []
        for route, log_q_NV in log_q.items():
            log_p_NV = functional.log_softmax(logits_BTV[_positions(batch, route)], dim=-1)
            means.append(functional.kl_div(log_p_NV, log_q_NV, log_target=True, reduction="sum") / len(log_q_NV))
        return torch.stack(means).mean()

    return student, loss_of_step


def masked_late(shape: Shape, folder: Path) -> tuple[nn.Module, LossOfStep]:
    """As `straightforward`, with each row's teacher chosen from full logits and the mask put on token losses."""
    import torch
    from torch.nn import functional

    student, teachers = _three_models(shape, folder)
    batch = make_batch(shape)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    positions = {route: _positions(batch, route) for route in teachers}
    weights_BT = sum(here / here.sum() / len(positions) for here in positions.values())
    is_domain_B11 = (batch["route_ids"] == DOMAIN)[:, None, None]

    def loss_of_step() -> Tensor:
        with torch.inference_mode():
            domain_BTV = teachers[DOMAIN](**inputs, use_cache=False).logits
            general_BTV = teachers[GENERAL](**inputs, use_cache=False).logits
        log_q_BTV = functional.log_softmax(torch.where(is_domain_B11, domain_BTV, general_BTV)[:, :-1], dim=-1)
        del domain_BTV, general_BTV
        log_p_BTV = functional.log_softmax(student(**inputs, use_cache=False).logits[:, :-1], dim=-1)
        kl_BT = functional.kl_div(log_p_BTV, log_q_BTV, log_target=True, reduction="none").sum(-1)
        return (weights_BT * kl_BT).sum()

    return student, loss_of_step


BUILDERS: dict[str, Callable[[Shape, Path], tuple[nn.Module, LossOfStep]]] = {
    "ours": ours,
    "straightforward": straightforward,
    "masked-late": masked_late,
    "student-only": student_only,
}


def optimizer_steps(kind: str, shape: Shape, folder: Path) -> Callable[[], float]:
    """A function that takes one optimizer step (AdamW on the student's adapter) and returns the loss before it."""
    import torch

    model, loss_of_step = BUILDERS[kind](shape, folder)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step() -> float:
        loss = loss_of_step()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def count_flops(kind: str, shape: Shape, folder: Path) -> int:
    """Floating-point operations of one step's matrix products and attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query.shape, key.shape, value.shape)

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)

    for function in (attention, attention_backward):
        function._get_raw = True  # type: ignore[attr-defined]
    aten = torch.ops.aten
    cpu_attention = {  # torch counts only the accelerators' kernels by itself
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    step = optimizer_steps(kind, shape, folder)
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        step()
    return counter.get_total_flops()


def work(kind: str, shape: Shape, folder: Path, threads: int, steps: int) -> dict[str, Any]:
    """One warm-up step, then `steps` measured ones, in this process: CPU and wall seconds per step, MiB above imports."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import kd.trainer  # noqa: F401

    torch.set_num_threads(threads)
    after_imports = resource.getrusage(resource.RUSAGE_SELF)
    step = optimizer_steps(kind, shape, folder)
    losses = [step()]
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    losses += [step() for _ in range(steps)]
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "losses": losses,
        "cpu_seconds": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / steps,
        "system_seconds": (after.ru_stime - before.ru_stime) / steps,
        "wall_seconds": wall / steps,
        "peak_mib": (after.ru_maxrss - after_imports.ru_maxrss) / 1024,
    }


def spawn(arguments: list[str], threads: int) -> Any:
    """Run this script as a worker and return what it printed."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # a thread that spins while another process has its core would count as work
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: Shape, threads: int, repeats: int, steps: int) -> dict[str, Any]:
    """All kinds in alternation, `repeats` times. Raises ValueError when their losses differ by more than 1e-4."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        common = ["--shape", shape.name, "--folder", name, "--threads", str(threads), "--steps", str(steps)]
        flops = spawn(["--worker", "prepare", *common], threads)
        for repeat in range(repeats):
            for kind in KINDS:
                runs[kind].append(spawn(["--worker", kind, *common], threads))
                print(f"{shape.name}, {threads} threads, {repeat + 1}/{repeats}, {kind}: {_line(runs[kind][-1])}", flush=True)
    return {"shape": asdict(shape), "threads": threads, "steps": steps, "flops": flops, "runs": runs} | summary(flops, runs)


def _line(run: Mapping[str, Any]) -> str:
    return f"{run['cpu_seconds']:.2f} s CPU, {run['wall_seconds']:.2f} s wall, {run['peak_mib']:.0f} MiB"


def summary(flops: Mapping[str, int], runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ratios to ours, repeat by repeat (neighbours in time, so that what else the machine does cancels)."""
    losses = runs["ours"][0]["losses"]
    difference = max(
        abs(loss - ours) / ours for kind in KINDS for run in runs[kind] for loss, ours in zip(run["losses"], losses, strict=True)
    )
    if not difference <= LOSS_TOLERANCE:
        raise ValueError(f"the losses differ by {difference:.1e} of their size; these are not the same steps")
    ratios = {}
    for kind in KINDS[1:]:
        ratios[kind] = {"arithmetic": flops[kind] / flops["ours"]}
        for what in ("cpu_seconds", "wall_seconds", "peak_mib"):
            ratios[kind][what] = _spread([a[what] / b[what] for a, b in zip(runs[kind], runs["ours"], strict=True)])
    return {"largest_relative_loss_difference": difference, "ratio_to_ours": ratios}


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(date: str, results: list[dict[str, Any]]) -> str:
    """The results as a Markdown page."""
    lines = [
        f"# Cost of one step, {date}",
        "",
        f"{os.cpu_count()} CPU cores, fp32, torch {version('torch')}, transformers {version('transformers')}, peft {version('peft')}.",
        "Ratios to ours, repeat by repeat: median (min to max). Memory is the peak above that after imports.",
        "",
        "| shape | threads | way | CPU s per step | peak MiB | arithmetic | CPU time | wall time | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for kind in KINDS:
            runs = result["runs"][kind]
            cells = [result["shape"]["name"], str(result["threads"]), kind]
            cells += [f"{statistics.median(run[what] for run in runs):{form}}" for what, form in (("cpu_seconds", ".2f"), ("peak_mib", ".0f"))]
            if kind == "ours":
                cells += ["1"] * 4
            else:
                ratio = result["ratio_to_ours"][kind]
                cells += [f"{ratio['arithmetic']:.2f}"]
                cells += [
                    "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio[w]) for w in ("cpu_seconds", "wall_seconds", "peak_mib")
                ]
            lines.append(f"| {' | '.join(cells)} |")
    difference = max(result["largest_relative_loss_difference"] for result in results)
    lines += ["", f"Largest difference between two ways' losses, relative, over all steps: {difference:.1e}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["all", *SHAPES], default="all", help="all: head and backbone")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured steps in each process, after one warm-up step")
    parser.add_argument("--date", default=datetime.date.today().isoformat())  # noqa: DTZ011
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=["prepare", *KINDS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "prepare":
        shape = SHAPES[arguments.shape]
        prepare(shape, arguments.folder)
        print(json.dumps({kind: count_flops(kind, shape, arguments.folder) for kind in KINDS}))
    elif arguments.worker is not None:
        shape = SHAPES[arguments.shape]
        print(json.dumps(work(arguments.worker, shape, arguments.folder, arguments.threads[0], arguments.steps)))
    else:
        names = ["head", "backbone"] if arguments.shape == "all" else [arguments.shape]
        results = [measure(SHAPES[n], t, arguments.repeats, arguments.steps) for n in names for t in arguments.threads]
        write(arguments.output, arguments.date, results)


def write(folder: Path, date: str, results: list[dict[str, Any]]) -> None:
    """step_cost.json (every run) and step_cost.md (the table) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"date": date, "python": platform.python_version(), "torch": version("torch"), "results": results}
    (folder / "step_cost.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "step_cost.md").write_text(table(date, results))
    print(table(date, results))


if __name__ == "__main__":
    main()
