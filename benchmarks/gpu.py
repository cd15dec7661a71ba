"""What a step of `dae align` costs on a GPU: a Mistral of 7B with random weights, LoRA, bfloat16, 2,048 tokens a row.

    python benchmarks/gpu.py                                # all of it, on the CUDA device that is there
    python benchmarks/gpu.py --device cpu --shape tiny      # the same code in small, to see that it runs

Ways to take the same step, each in a process of its own, in alternation:

    live          three roles on one backbone, each row through its teacher, chunked loss
    cached        the teachers' hidden states are read from a cache on disk
    three-model   student, expert and reference are three models; each row's teacher is chosen, full logits

Model FLOP utilisation counts matrix products of the model alone (no recomputation): per token 2 forward and 2 backward
for each weight of the student's frozen layers, 2 for a teacher's; of the output layer at response positions, in the
three-model way at all; and attention. The loss alone is timed for several chunk sizes, with Liger's fused loss beside
it where `liger_kernel` is installed.
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
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path.insert(0, str(ROOT))

KINDS = ("live", "cached", "three-model")
LIGER = "Liger's fused JSD, beta 0 (forward KL)"
CHUNKS = (64, 256, 1024, 4096)
# Dense bfloat16, from the makers' data sheets; the first name that the device's name contains.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first loss, relative


@dataclass(frozen=True)
class Shape:
    """A Mistral and one micro-batch: `rows` full rows, the first `prompt` tokens of each are prompt."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    tokens: int
    prompt: int
    lora_rank: int = 16

    @property
    def layer_weights(self) -> int:
        """Of all layers' matrices."""
        key_value = self.width * self.kv_heads // self.heads
        return self.layers * (2 * self.width**2 + 2 * self.width * key_value + 3 * self.width * self.mlp)


SHAPES = {
    "7b": Shape(32, 4096, 14336, 32, 8, 32000, rows=4, tokens=2048, prompt=512),
    "tiny": Shape(2, 32, 64, 4, 2, 96, rows=4, tokens=16, prompt=4, lora_rank=4),
}


def flops(kind: str, shape: Shape) -> float:
    """Of one step's matrix products: forward and, where a gradient passes, backward."""
    tokens, responses = shape.rows * shape.tokens, shape.rows * (shape.tokens - shape.prompt)
    attention = 2 * 2 * shape.layers * shape.rows * shape.tokens**2 * shape.width / 2  # causal: half of the products
    forward = 2 * shape.layer_weights * tokens + attention
    head = 2 * shape.vocabulary * shape.width * (tokens if kind == "three-model" else responses)
    teacher_layers = {"live": forward, "cached": 0.0, "three-model": 2 * forward}[kind]
    teacher_heads = {"live": head, "cached": head, "three-model": 2 * head}[kind]
    # Backward: the gradient of activations alone, as much as forward; attention's takes twice its forward.
    return 2 * forward + attention + 2 * head + teacher_layers + teacher_heads


# -- in a process of its own -------------------------------------------------------------------------------------------


def new_model(shape: Shape, device: str, dtype: Any) -> Any:
    """The base: the same weights in every process."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.tokens,
        sliding_window=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = MistralForCausalLM._from_config(config, dtype=dtype)
    torch.nn.init.normal_(model.lm_head.weight, std=2.0 * shape.width**-0.5)  # logits of standard deviation 2: not flat
    return model.requires_grad_(False).eval()


def with_adapters(shape: Shape, model: Any, names: Sequence[str]) -> Any:
    """The model with the student's adapter (`default`) or the expert's, each drawn from its own seed."""
    import torch
    from peft import LoraConfig, get_peft_model

    rank = shape.lora_rank
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    wrapped = get_peft_model(model, config, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            is_expert = ".expert." in name
            torch.manual_seed(sum(map(ord, name)))
            parameter.data.normal_(std=0.02) if is_expert or "lora_A" in name else parameter.data.zero_()
            parameter.requires_grad_(not is_expert)
    return wrapped


def make_batch(shape: Shape, device: str) -> dict[str, Any]:
    """Half of the rows are domain rows, route 1."""
    import torch

    generator = torch.Generator().manual_seed(1)
    size = (shape.rows, shape.tokens)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[:, shape.prompt :] = True
    batch = {
        "input_ids": torch.randint(3, shape.vocabulary, size, generator=generator),
        "attention_mask": torch.ones(size, dtype=torch.int64),
        "response_mask": mask,
        "route_ids": (torch.arange(shape.rows) < shape.rows // 2).long(),
    }
    return {name: values.to(device) for name, values in batch.items()}


def checkpointed(model: Any) -> Any:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def ours(shape: Shape, device: str, dtype: Any, folder: Path | None) -> tuple[Any, Callable[[], Any]]:
    """The student, and a function that gives the loss of a step, as kd.training.trainer takes it.

    folder: for a cache; None: live teachers.
    """
    from kd.data.batches import response_token_counts
    from kd.losses.token_loss import TokenLoss
    from kd.models.roles import Role
    from kd.training.objective import Objective, Route, route_sums

    model = with_adapters(shape, new_model(shape, device, dtype), ["default", "expert"])
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".expert." not in name)
    batch = make_batch(shape, device)
    routes = (Route("general", Role("reference", model, None)), Route("domain", Role("expert", model, "expert")))
    objective = Objective(routes, TokenLoss())
    if folder is not None:
        objective = with_cache(objective, batch, folder)
    checkpointed(model)

    def loss_of_step() -> Any:
        weights_R = objective.weights(response_token_counts(batch, len(objective.routes)))
        return (weights_R * route_sums(model, batch, objective).loss).sum()

    return model, loss_of_step


def with_cache(objective: Any, batch: Mapping[str, Any], folder: Path) -> Any:
    """The objective with its teachers' hidden states in stores on disk."""
    from kd.cache.store import CachedTeacher, TeacherStore, as_stored, batch_digests
    from kd.data.batches import predicting_positions, rows_of_routes
    from kd.training.objective import teacher_views

    routes = []
    for index, view in teacher_views(batch, objective).items():
        route, rows = objective.routes[index], rows_of_routes(batch, [index])
        store = TeacherStore(folder / route.name)
        store.folder.mkdir()
        hidden = view.hidden_NE.cpu().split(predicting_positions(rows).sum(1).tolist())  # type: ignore[attr-defined]
        stored = str(hidden[0].dtype).removeprefix("torch.")
        store.add(batch_digests(rows), [as_stored(one, stored) for one in hidden])
        head = view.head  # type: ignore[attr-defined]
        cached = CachedTeacher(route.name, TeacherStore(store.folder), "hidden", head, view.vocabulary_rows)
        routes.append(replace(route, teacher=cached))
    return replace(objective, routes=tuple(routes))


def three_models(shape: Shape, device: str, dtype: Any) -> tuple[Any, Callable[[], Any]]:
    """Three models, each row's teacher chosen; divergence over full logits in float32, at response positions."""
    import torch
    from torch.nn import functional

    student = checkpointed(with_adapters(shape, new_model(shape, device, dtype), ["default"]))
    expert = with_adapters(shape, new_model(shape, device, dtype), ["expert"]).merge_and_unload().eval()
    reference = new_model(shape, device, dtype)
    batch = make_batch(shape, device)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    here_BT, is_domain_B = batch["response_mask"][:, 1:], batch["route_ids"] == 1
    is_domain_N = is_domain_B[:, None].expand(here_BT.shape)[here_BT]
    weights_N = torch.where(is_domain_N, 0.5 / is_domain_N.sum(), 0.5 / (~is_domain_N).sum())

    def response_logits(model: Any) -> Any:
        return model(**inputs, use_cache=False).logits[:, :-1][here_BT].float()

    def loss_of_step() -> Any:
        with torch.no_grad():
            teacher_NV = torch.where(is_domain_N[:, None], response_logits(expert), response_logits(reference))
        log_q_NV = functional.log_softmax(teacher_NV, dim=-1)
        log_p_NV = functional.log_softmax(response_logits(student), dim=-1)
        return (weights_N * functional.kl_div(log_p_NV, log_q_NV, log_target=True, reduction="none").sum(-1)).sum()

    return student, loss_of_step


def wait_for(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(kind: str, shape: Shape, device: str, dtype_name: str, steps: int, folder: Path) -> dict[str, Any]:
    """One step to warm up, then `steps` measured ones. folder: empty, for a cache."""
    import torch

    dtype = getattr(torch, dtype_name)
    if kind == "three-model":
        model, loss_of_step = three_models(shape, device, dtype)
    else:
        model, loss_of_step = ours(shape, device, dtype, folder if kind == "cached" else None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses, seconds = [], []
    for _ in range(steps + 1):
        wait_for(device)
        started = time.perf_counter()
        loss = loss_of_step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "seconds": statistics.median(seconds[1:]), "peak_bytes": peak_bytes(device)}


def time_losses(shape: Shape, device: str, dtype_name: str, steps: int) -> dict[str, float | None]:
    """Seconds of the loss alone, forward and backward over a step's response tokens, by chunk size; and Liger's."""
    import torch

    from kd.losses.token_loss import TokenLoss, token_loss_sums
    from kd.models.head import Head
    from kd.models.teacher_logits import HiddenTeacher

    dtype = getattr(torch, dtype_name)
    generator = torch.Generator(device).manual_seed(0)
    count = shape.rows * (shape.tokens - shape.prompt)

    def draw(*size: int) -> Any:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    hidden_ND, teacher_ND = draw(count, shape.width).requires_grad_(), draw(count, shape.width)
    weight_VD = draw(shape.vocabulary, shape.width) * shape.width**-0.5
    labels_N = torch.zeros(count, dtype=torch.long, device=device)
    head = Head(weight_VD)

    def seconds_of(loss: Callable[[], Any]) -> float:
        taken = []
        for _ in range(steps + 1):
            hidden_ND.grad = None
            wait_for(device)
            started = time.perf_counter()
            loss().backward()
            wait_for(device)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    def with_chunks(tokens: int | None) -> Any:
        teacher = HiddenTeacher(teacher_ND, head)
        return token_loss_sums(hidden_ND, head, labels_N, TokenLoss(), teacher, chunk_tokens=tokens).loss

    found: dict[str, float | None] = {"ours, chunks of its choice": seconds_of(lambda: with_chunks(None))}
    found |= {f"ours, chunks of {tokens}": seconds_of(lambda tokens=tokens: with_chunks(tokens)) for tokens in CHUNKS}
    return {
        **found,
        "Liger's fused JSD, beta 0 (forward KL)": liger_seconds(seconds_of, hidden_ND, teacher_ND, weight_VD),
    }


def liger_seconds(seconds_of: Callable[..., float], hidden_ND: Any, teacher_ND: Any, weight_VD: Any) -> float | None:
    """None where it is not installed or has no device."""
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        return None
    if hidden_ND.device.type != "cuda":
        return None
    fused = LigerFusedLinearJSD(jsd_beta=0.0)
    return seconds_of(lambda: fused(hidden_ND, weight_VD, teacher_ND, weight_VD))


# -- the driver --------------------------------------------------------------------------------------------------------


def spawn(arguments: argparse.Namespace, worker: str) -> Any:
    """Run this script as a worker and return what it printed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", worker, "--shape", arguments.shape]
    command += ["--device", arguments.device, "--steps", str(arguments.steps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{worker}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways in alternation. Raises ValueError where their first losses differ."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for repeat in range(arguments.repeats):
        for kind in KINDS:
            runs[kind].append(spawn(arguments, kind))
            seconds = runs[kind][-1]["seconds"]
            print(f"repeat {repeat + 1} of {arguments.repeats}, {kind}: {seconds:.3f} s a step", flush=True)
    first = [run["losses"][0] for of in runs.values() for run in of]
    if max(first) - min(first) > TOLERANCE[dtype_of(arguments.device)] * min(first):
        raise ValueError(f"the losses differ ({min(first):.5f} to {max(first):.5f}): these are not the same steps")
    losses = spawn(arguments, "losses")
    return {"runs": runs, "loss_seconds": losses, "device": device_name(arguments.device)}


def dtype_of(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def peak_tflops(name: str, given: float | None) -> float | None:
    return given or next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def markdown(record: Mapping[str, Any]) -> str:
    """The results as a page."""
    shape = Shape(**record["shape"])
    tokens, peak = shape.rows * shape.tokens, record["peak_tflops"]
    rows = []
    for kind, runs in record["runs"].items():
        seconds = [run["seconds"] for run in runs]
        median = statistics.median(seconds)
        share = f"{flops(kind, shape) / median / (peak * 1e12):.1%}" if peak else "peak unknown"
        memory = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        spread = f"{median:.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        rows.append(f"| {kind} | {spread} | {tokens / median:,.0f} | {share} | {memory:.1f} |")
    timed = [
        f"| {name} | {'not installed' if seconds is None else f'{1e3 * seconds:.1f}'} |"
        for name, seconds in record["loss_seconds"].items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"# A step on a GPU, {record['date']}",
        "",
        f"{record['device']}, {versions}. Mistral with random weights: {shape.layers} layers, width {shape.width},",
        f"vocabulary {shape.vocabulary:,}; LoRA rank {shape.lora_rank}, {shape.rows} rows of {shape.tokens:,} tokens,",
        f"{record['dtype']}, gradient checkpointing.",
        "",
        "| way | seconds a step | tokens/s | model FLOP utilisation | peak GB |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"The loss alone, {shape.rows * (shape.tokens - shape.prompt):,} response tokens, forward and backward:",
        "",
        "| loss | ms |",
        "|---|---|",
        *timed,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps in each process, after one warm-up step")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16, if not known here")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=[*KINDS, "losses"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here. `--device cpu --shape tiny` runs the same code in small.", file=sys.stderr)
        raise SystemExit(2)
    shape, dtype = SHAPES[arguments.shape], dtype_of(arguments.device)
    if arguments.worker == "losses":
        print(json.dumps(time_losses(shape, arguments.device, dtype, arguments.steps)))
    elif arguments.worker:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(work(arguments.worker, shape, arguments.device, dtype, arguments.steps, Path(name))))
    else:
        name = device_name(arguments.device)
        record = {
            "date": dt.date.today().isoformat(),
            "versions": {one: version(one) for one in ("torch", "transformers", "peft")},
            "shape": asdict(shape),
            "dtype": dtype,
            "peak_tflops": peak_tflops(name, arguments.peak_tflops),
            **measure(arguments),
        }
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.output / "gpu.md").write_text(markdown(record))
        print(markdown(record))


if __name__ == "__main__":
    main()
