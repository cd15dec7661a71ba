"""What the attention-map loss of `dae distill` costs, beside the straightforward way to write it.

    python benchmarks/attention_cost.py [--repeats 3] [--steps 2]

Three ways to take the same optimizer step, each in a process of its own, in alternation:

    without          the token loss alone: what any distillation step costs
    ours             kd.losses.attention: models keep their attention (sdpa), maps are made again from queries and
                     keys, a few rows at a time
    straightforward  both models with eager attention and output_attentions=True; KL between the whole maps

All start from the same student (LoRA) and teacher and take the same rows, in fp32 on the CPU. `ours` and
`straightforward` must show the same losses to 1e-4 at every step, else nothing is reported. Memory is the peak resident
size above that after imports and models.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("without", "ours", "straightforward")
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """Two Llamas; half of every row is prompt."""

    name: str
    rows: int
    tokens: int
    student: Mapping[str, int]
    teacher: Mapping[str, int]
    vocabulary: int = 2048


def llama(width: int, layers: int, heads: int, key_heads: int) -> dict[str, int]:
    """Settings of a Llama."""
    return {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }


SHAPES = {
    "tiny": Shape("tiny", 2, 24, llama(16, 2, 4, 2), llama(24, 3, 4, 2), 64),
    "small": Shape("small", 4, 512, llama(256, 6, 8, 4), llama(384, 9, 8, 4)),
}


def make_models(shape: Shape, way: str) -> tuple[Any, Any]:
    """A LoRA student and a frozen teacher with random weights, the same for every way."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    implementation = "eager" if way == "straightforward" else "sdpa"
    models = []
    for seed, settings in enumerate((shape.student, shape.teacher)):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("llama", vocab_size=shape.vocabulary, **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
        models.append(model.eval())
    torch.manual_seed(2)
    student = get_peft_model(models[0], LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    return student, models[1].requires_grad_(False)


def make_batch(shape: Shape) -> dict[str, Any]:
    """Rows of equal length."""
    import torch

    ids = torch.randint(3, shape.vocabulary, (shape.rows, shape.tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, shape.tokens // 2 :] = True
    route_ids = torch.zeros(shape.rows, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": mask, "route_ids": route_ids}


def loss_of(way: str, student: Any, teacher: Any, batch: Mapping[str, Any]) -> Callable[[], Any]:
    """The loss per response token, as a function that runs both models."""
    from kd.data.batches import response_token_counts
    from kd.losses.attention import attention_loss
    from kd.losses.layer_pairs import layer_pairs
    from kd.losses.token_loss import TokenLoss
    from kd.models.roles import STUDENT_ADAPTER, Role
    from kd.training.objective import Objective, Route, route_sums

    roles = (Role("student", student, STUDENT_ADAPTER), Role("teacher", teacher, None))
    depths = (student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    pairs = layer_pairs("even", *depths, "attention.layers")
    terms = (attention_loss(1.0, *roles, pairs),) if way == "ours" else ()
    objective = Objective((Route("train", roles[1]),), TokenLoss(), terms=terms)
    count = int(response_token_counts(batch, 1).sum())
    if way != "straightforward":
        return lambda: route_sums(student, batch, objective).loss.sum() / count
    return lambda: straightforward_loss(student, teacher, batch, pairs) / count


def straightforward_loss(student: Any, teacher: Any, batch: Mapping[str, Any], pairs: Any) -> Any:
    """The same sum from whole maps, with ordinary autograd; token loss and its chunks as ours."""
    import torch

    from kd.data.batches import predicting_positions
    from kd.losses.token_loss import TokenLoss, token_loss_sums
    from kd.models.forward import head_of
    from kd.models.teacher_logits import HiddenTeacher

    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    with torch.no_grad():
        theirs = teacher.get_decoder()(**inputs, output_attentions=True)
    ours = student.get_base_model().get_decoder()(**inputs, output_attentions=True)
    here = predicting_positions(batch)
    hidden, teacher_hidden = (out.last_hidden_state[:, :-1][here] for out in (ours, theirs))
    heads = head_of(student), head_of(teacher)
    labels = batch["input_ids"][:, 1:][here]
    total = token_loss_sums(hidden, heads[0], labels, TokenLoss(), HiddenTeacher(teacher_hidden, heads[1])).loss
    tiny = torch.finfo(torch.float32).tiny
    for a, b in pairs:
        p, q = (attentions[:, :, :-1].float() for attentions in (ours.attentions[a], theirs.attentions[b]))
        groups = min(p.shape[1], q.shape[1])
        p, q = (m.unflatten(1, (groups, -1)).mean(2) for m in (p, q))
        kl_BGT = (q * (q.clamp(min=tiny).log() - p.clamp(min=tiny).log())).sum(-1)
        total = total + (kl_BGT.mean(1) * here).sum() / len(pairs)
    return total


def work(way: str, shape: Shape, steps: int) -> dict[str, Any]:
    """One warm-up step, then `steps` measured ones: seconds per step, MiB above the models."""
    import torch

    student, teacher = make_models(shape, way)
    loss = loss_of(way, student, teacher, make_batch(shape))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses = []

    def step() -> None:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())

    step()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        step()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "losses": losses,
        "cpu_seconds": cpu / steps,
        "wall_seconds": wall / steps,
        "peak_mib": (after.ru_maxrss - idle) / 2**10,
    }


def measure(shape: Shape, repeats: int, steps: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """All ways in alternation, `repeats` times, each in a process of its own."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    for repeat in range(repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--worker", way, "--shape", shape.name, "--steps", str(steps)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{way}: exit status {done.returncode}\n{done.stderr}")
            run = json.loads(done.stdout.splitlines()[-1])
            runs[way].append(run)
            said = f"{run['wall_seconds']:.2f} s, {run['cpu_seconds']:.2f} s CPU, {run['peak_mib']:.0f} MiB"
            print(f"repeat {repeat + 1} of {repeats}, {way}: {said}", flush=True)
    return runs


def largest_difference(runs: Mapping[str, list[dict[str, Any]]]) -> float:
    """Between the losses of ours and straightforward, relative. Raises ValueError where it is more than 1e-4."""
    pairs = zip(runs["ours"], runs["straightforward"], strict=True)
    found = max(abs(a - b) / b for ours, theirs in pairs for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    if not found <= LOSS_TOLERANCE:
        raise ValueError(f"the losses differ by {found:.1e} of their size; these are not the same steps")
    return found


def table(record: Mapping[str, Any]) -> str:
    """The results as a Markdown page."""
    shape, runs = record["shape"], record["runs"]
    rows = []
    for way in WAYS:
        cells = [way]
        for what, unit in (("cpu_seconds", ".2f"), ("wall_seconds", ".2f"), ("peak_mib", ".0f")):
            values = [run[what] for run in runs[way]]
            ratios = [run[what] / ours[what] for run, ours in zip(runs[way], runs["ours"], strict=True)]
            cells += [f"{statistics.median(values):{unit}}"]
            cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        rows.append(f"| {' | '.join(cells)} |")
    student, teacher = shape["student"], shape["teacher"]
    return f"""# Cost of the attention-map loss, {record["date"]}

{record["threads"]} of {os.cpu_count()} CPU cores, fp32; torch {version("torch")}, transformers
{version("transformers")}. {shape["rows"]} rows of {shape["tokens"]} tokens, half of them prompt. Student:
{student["num_hidden_layers"]} layers of width {student["hidden_size"]} with LoRA. Teacher:
{teacher["num_hidden_layers"]} layers of width {teacher["hidden_size"]}. Every layer of the student is compared. Medians
over {len(runs["ours"])} repeats; ratios are to ours, repeat by repeat (range). Memory is the peak above that after
imports and models. Largest relative difference between the losses of ours and straightforward:
{record["largest_difference"]:.1e}.

| way | CPU s per step | to ours | wall s per step | to ours | peak MiB | to ours |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="measured steps in each process, after one warm-up step")
    parser.add_argument("--date", default=dt.date.today().isoformat())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.worker is not None:
        print(json.dumps(work(arguments.worker, shape, arguments.steps)))
        return
    runs = measure(shape, arguments.repeats, arguments.steps, arguments.threads)
    record = {
        "date": arguments.date,
        "threads": arguments.threads,
        "shape": asdict(shape),
        "steps": arguments.steps,
        "largest_difference": largest_difference(runs),
        "runs": runs,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "attention_cost.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.output / "attention_cost.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
