"""Estimates of a run's memory, tokens and disk, from configs and file headers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from dae.checking.plan import Plan
from kd.config.stage_recipe import Quantization
from kd.data.stage_data import StageData
from kd.losses.attention import AttentionLoss
from kd.losses.chunked import (
    ACCELERATOR_CHUNK_ELEMENTS,
    CPU_CHUNK_ELEMENTS,
    FEWEST_CHUNK_TOKENS,
    block_elements,
    logits_elements,
)
from kd.models.forward import unwrapped
from kd.models.offloading import layer_weights, layers_of
from kd.models.quantization import quantised_bytes, quantised_shapes
from kd.models.roles import Role
from kd.stages.distill import text_config
from kd.training.gathering import TRAINING_ONLY
from kd.training.settings import student_dtype

ADAPTER_BYTES = 4  # peft keeps adapters in float32
ADAMW_BYTES = 8  # two moments in float32
GRADIENT_BYTES = 4
# Bytes kept for backward per token and layer, as (per width, per inner width of the MLP): measured on Llama layers with
# LoRA on all linear layers and SDPA.
KEPT_BYTES = {torch.float32: (40, 16), torch.bfloat16: (42, 10)}
LIVE_CHUNKS = 3  # both sides' logits in float32 (replaced by the gradient), and a copy in the weights' dtype
LIVE_BLOCKS = 6  # both sides' probabilities and their logarithms, gradient, one temporary
# Student's and teacher's scores, logarithms of their maps, the teacher's map, their ratio, the student's map, gradient.
LIVE_MAP_CHUNKS = 8


Size = Callable[[Tensor], int]


@dataclass(frozen=True)
class Item:
    name: str
    bytes: float


def weights(plan: Plan, size: Size = Tensor.numel) -> list[Item]:
    """A run's models in memory: each copy of full weights once, adapters, trained weights.

    size: elements of a weight that this process holds.
    """
    recipe, roles = plan.recipe, plan.roles
    element, items = plan.settings.dtype.itemsize, list[Item]()
    adapters: dict[tuple[int, str], Item] = {}
    on_model: dict[int, list[Role]] = {}
    for role in roles.all:
        on_model.setdefault(id(role.model), []).append(role)
    for sharing in on_model.values():
        model, student_trains = sharing[0].model, sharing[0] is roles.student and recipe.lora is None
        if not student_trains:
            names = ", ".join(role.name for role in sharing)
            name = f"base: {names}" if model is roles.shared else names
            items.append(Item(name, weight_bytes(model, element, recipe.quantization, size)))
            if is_offloaded(plan, sharing[0]):
                items[-1] = Item(f"{name}: what stays, and one layer", (parameters(model) - waiting(model)) * element)
        for role in sharing:
            if role.adapter is not None and role is not roles.student:
                adapters.setdefault((id(model), role.adapter), Item(f"{role.name} adapter", adapter_bytes(role, size)))
    items.sort(key=lambda item: not item.name.startswith("base: "))
    items += adapters.values()
    if count := sum(size(w) for name, w in roles.student.model.named_parameters() if is_training_only(name)):
        items.append(Item("projections, their gradients and AdamW", count * (4 + GRADIENT_BYTES + ADAMW_BYTES)))
    if heads := cached_heads(plan):
        items.append(Item("output layers of cached teachers", heads * element))
    each = ADAPTER_BYTES if recipe.lora else student_dtype(recipe).itemsize
    name = "student adapter" if recipe.lora else "student, all weights"
    return [*items, Item(name, trainable(roles.student, size) * each)]


def is_offloaded(plan: Plan, role: Role) -> bool:
    """Whether a role's layers wait elsewhere: those of teachers without adapters, where the recipe says so."""
    student = plan.roles.student
    return plan.settings.offload_teachers is not None and role is not student and not isinstance(role.model, PeftModel)


def waiting(model: nn.Module) -> int:
    """Elements of an offloaded model's layers, but for the largest, which is on the device while it computes."""
    layers = [sum(map(Tensor.numel, unwrapped(model).get_submodule(name).parameters())) for name in layers_of(model)]
    return sum(layers) - max(layers, default=0)


def moved_layers(plan: Plan) -> list[Item]:
    """What each pass of an offloaded teacher moves to the device."""
    element = plan.settings.dtype.itemsize
    offloaded = {id(role.model): role for role in plan.roles.all if is_offloaded(plan, role)}
    return [Item(role.name, sum(map(Tensor.numel, layer_weights(role.model))) * element) for role in offloaded.values()]


def cached_heads(plan: Plan) -> int:
    """Elements of the output layers that come with cached teachers; the frozen base's own is there already."""
    on_base = plan.recipe.lora is not None
    apart = {
        one.key.fingerprint: one.head_shape[0] * one.head_shape[1]
        for one in plan.cache.values()
        if one.key.kind == "hidden"
        and not (on_base and plan.inputs["base"].fingerprint in (one.key.fingerprint, one.key.base))
    }
    return sum(apart.values())


def is_training_only(name: str) -> bool:
    """Whether a weight trains with the student but is not published."""
    return TRAINING_ONLY in name.split(".")


def parameters(model: nn.Module, size: Size = Tensor.numel) -> int:
    """Number of weights without adapters and training-only ones; tied weights once."""
    others = {TRAINING_ONLY, *getattr(model, "peft_config", ())}
    return sum(size(weight) for name, weight in model.named_parameters() if not others & {*name.split(".")})


def weight_bytes(model: nn.Module, element: int, quantization: Quantization | None, size: Size = Tensor.numel) -> float:
    """Of a model's weights in memory; element: bytes of one that is not quantised. Quantised ones are never split."""
    whole = parameters(model, size) * element
    if quantization is None:
        return whole
    layers = list(quantised_shapes(model))
    quantised = sum(quantised_bytes(outputs, inputs, quantization) for outputs, inputs in layers)
    return whole - sum(outputs * inputs for outputs, inputs in layers) * element + quantised


def dequantised_bytes(plan: Plan) -> int:
    """Of the largest quantised layer, whose weights are made whole while it computes; int8 goes through float32."""
    sizes = [rows * width for role in plan.roles.all for rows, width in quantised_shapes(role.model)]
    through_float32 = 2 * torch.float32.itemsize if plan.recipe.quantization == "int8" else 0
    return max(sizes, default=0) * max(through_float32, plan.settings.dtype.itemsize)


def adapter_bytes(role: Role, size: Size = Tensor.numel) -> int:
    of_role = (size(w) for name, w in role.model.named_parameters() if role.adapter in name.split("."))
    return sum(of_role) * ADAPTER_BYTES


def trainable(student: Role, size: Size = Tensor.numel) -> int:
    """Number of the student's weights that train and are published."""
    weights = student.model.named_parameters()
    return sum(size(weight) for name, weight in weights if weight.requires_grad and not is_training_only(name))


def memory(plan: Plan, size: Size = Tensor.numel) -> list[Item]:
    """Peak memory of one process, by part: weights per role, training state, activations, one chunk of the loss.

    size: elements of a weight that this process holds.
    """
    recipe, args, settings, roles = plan.recipe, plan.args, plan.settings, plan.roles
    config = text_config(roles.student.model)
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    dtype = torch.bfloat16 if args.bf16 or settings.dtype == torch.bfloat16 else torch.float32
    longest = max(int(rows.lengths.max()) for rows in plan.data.rows)
    tokens = longest * args.per_device_train_batch_size
    per_width, per_inner = KEPT_BYTES[dtype]
    layer = tokens * (per_width * width + per_inner * inner)
    if args.gradient_checkpointing:
        kept, name = layers * tokens * width * dtype.itemsize + layer, "activations, checkpointed"
    else:
        kept, name = layers * layer, "activations (less with train.gradient_checkpointing=true)"
    chunk = CPU_CHUNK_ELEMENTS if settings.device == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    logits, maps = bytes_of_logits(tokens, roles.vocabulary_rows, settings.device), 0
    terms = []
    for term in plan.objective.terms:
        if isinstance(term, AttentionLoss):
            held = tokens * held_for_maps(term, dtype, bool(args.gradient_checkpointing))
            terms.append(Item("attention: queries and keys until the loss, and their gradients", held))
            maps = LIVE_MAP_CHUNKS * 4 * chunk
    return [
        *weights(plan, size),
        Item("gradients and AdamW", trainable(roles.student, size) * (GRADIENT_BYTES + ADAMW_BYTES)),
        Item(f"{name}, {args.per_device_train_batch_size} x {longest} tokens", kept),
        *terms,
        *([Item("one layer, dequantised", dequantised_bytes(plan))] if recipe.quantization else []),
        # Not both at once: the losses are computed one after the other.
        Item(f"logits{' or attention maps' if maps else ''}, one chunk at a time", max(logits, maps)),
    ]


def bytes_of_logits(tokens: int, vocabulary_rows: int, device: str) -> int:
    """Bytes that the loss holds at once: a chunk of logits, and a block of what is computed from them."""
    chunk = max(logits_elements(device), FEWEST_CHUNK_TOKENS * vocabulary_rows)
    chunk, block = (min(elements, tokens * vocabulary_rows) for elements in (chunk, block_elements(device)))
    return 4 * (LIVE_CHUNKS * chunk + LIVE_BLOCKS * block)


def held_for_maps(attention: AttentionLoss, dtype: torch.dtype, checkpointed: bool) -> int:
    """Bytes per token that the attention loss holds (kd/losses/attention.py), for queries and keys of its layers.

    The teacher's are held until the loss, the student's float32 gradients from there to their layer's backward. The
    student's own count as activations, unless those are checkpointed.
    """
    student, teacher = attention.models
    pairs = attention.pairs
    ours, theirs = query_and_key_width(student), query_and_key_width(teacher)
    own = len({layer for layer, _ in pairs}) * ours * dtype.itemsize if checkpointed else 0
    return own + len({layer for _, layer in pairs}) * theirs * dtype.itemsize + len(pairs) * ours * GRADIENT_BYTES


def query_and_key_width(model: nn.Module) -> int:
    """Elements of one token's queries and keys in one layer, over all heads."""
    config = text_config(model)
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return (heads + key_heads) * width


def disk(plan: Plan) -> list[Item]:
    """Maximum size of the run folder: checkpoints (weights and optimizer), the result, a merged copy."""
    recipe, args, count = plan.recipe, plan.args, trainable(plan.roles.student)
    result = count * (ADAPTER_BYTES if recipe.lora is not None else student_dtype(recipe).itemsize)
    checkpoint = result + count * ADAMW_BYTES
    # One more than are kept, as the next is complete before the oldest is deleted; and the best one, if chosen.
    kept = 0 if args.save_strategy == "no" else (args.save_total_limit or 2) + 1 + bool(recipe.data.eval)
    items = [Item("the result", result), Item(f"checkpoints, at most {kept}", kept * checkpoint)]
    if recipe.merge:
        float32 = torch.finfo(torch.float32).bits / 8
        items.append(Item("merged weights", parameters(plan.roles.student.model) * float32))
    return items


def tokens_of_run(data: StageData, rows: int, routes: Sequence[str]) -> int:
    """Tokens of `rows` training rows that belong to these routes, at the sources' shares."""
    means = zip(data.sources, data.rows, strict=True)
    return round(
        rows * sum(source.share * float(part.lengths.mean()) for source, part in means if source.route in routes)
    )
