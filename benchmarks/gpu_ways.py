"""The ways of benchmarks/gpu.py to take the same step, and the loss alone. torch is imported where it is used.

Shape legend: B rows, T positions, N response tokens, V vocabulary, D width.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LIGER = "Liger's fused JSD, beta 0 (forward KL)"
CHUNKS = (64, 256, 1024, 4096)


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
    from kd.cache.keys import batch_digests
    from kd.cache.parts import as_stored
    from kd.cache.store import CachedTeacher, TeacherStore
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
