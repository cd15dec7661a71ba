"""What a run will need, from configurations and file headers alone: memory, tokens, disk. Estimates, not promises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainingArguments

from dae.alignment import needs_base, role_paths
from dae.checking.meta_roles import empty_roles
from dae.recipe import AlignRecipe
from kd.config.layer_recipes import AttentionRecipe
from kd.config.stage_recipe import StageRecipe
from kd.data.stage_data import StageData
from kd.losses.chunked import (
    ACCELERATOR_CHUNK_ELEMENTS,
    CPU_CHUNK_ELEMENTS,
    FEWEST_CHUNK_TOKENS,
    block_elements,
    logits_elements,
)
from kd.models.adapter_files import ADAPTER_WEIGHTS, is_adapter
from kd.models.checkpoint_files import resolve_model
from kd.models.compatibility import empty_model
from kd.models.roles import LoadSettings, Role, vocabulary_rows
from kd.stages.distill import pairs_of, projection_parameters, text_config
from kd.stages.distill_recipe import DistillRecipe
from kd.stages.sft_recipe import SftRecipe
from kd.training.settings import student_dtype

ADAPTER_BYTES = 4  # peft keeps adapters in float32
ADAMW_BYTES = 8  # two moments in float32
GRADIENT_BYTES = 4
# Bytes that backward keeps per token and layer, as (per width, per inner width of the MLP): counted on Llama layers
# with LoRA on all linear layers and SDPA.
KEPT_BYTES = {torch.float32: (40, 16), torch.bfloat16: (42, 10)}
LIVE_CHUNKS = 3  # both sides' logits in float32 (the gradient takes their place), and a copy in the weights' dtype
LIVE_BLOCKS = 6  # their probabilities, logarithms of these, gradient, one temporary
# Student's and teacher's scores, logarithms of their maps, the teacher's map, their ratio, the student's map, gradient.
LIVE_MAP_CHUNKS = 8


@dataclass(frozen=True)
class Item:
    """One line of an estimate."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Models:
    """The models of a run without their weights: the base, every role (the student first), and what each copy takes."""

    base: nn.Module
    roles: tuple[Role, ...]
    trainable: int
    weights: tuple[Item, ...]
    vocabulary_rows: int


def models_of(recipe: StageRecipe, inputs: Mapping[str, str], settings: LoadSettings) -> Models:
    """Which weights a run keeps in memory, once each, and how many of them train.

    Raises UserError where a checkpoint is no causal language model or `lora.target_modules` names no layer.
    """
    element = settings.dtype.itemsize
    base = empty_model(recipe.base, recipe.trust_remote_code)
    size, roles = parameters(base), empty_roles(recipe)
    weights: list[Item] = []
    if isinstance(recipe, SftRecipe):
        on_base, own = ["student"] if recipe.lora else [], {}
    elif isinstance(recipe, DistillRecipe):
        on_base, own = ["student"] if recipe.lora else [], {recipe.teacher: ["teacher"]}
    else:
        assert isinstance(recipe, AlignRecipe)
        on_base, own = split_roles(recipe, inputs)
    for path, names in own.items():
        model = empty_model(path, recipe.trust_remote_code)
        weights.append(Item(", ".join(names), parameters(model) * element))
    if on_base:
        weights.insert(0, Item(f"base: {', '.join(on_base)}", size * element))
    if isinstance(recipe, AlignRecipe):
        weights += frozen_adapters(recipe)
    if isinstance(recipe, DistillRecipe) and (count := projection_parameters(recipe)):
        weights.append(Item("projections, their gradients and AdamW", count * (4 + GRADIENT_BYTES + ADAMW_BYTES)))
    if recipe.lora is None:
        trainable = size
        weights.append(Item("student, all weights", size * student_dtype(recipe).itemsize))
    else:
        trainable = sum(weight.numel() for weight in roles[0].model.parameters() if weight.requires_grad)
        weights.append(Item("student adapter", trainable * ADAPTER_BYTES))
    speakers = roles[:1] if isinstance(recipe, DistillRecipe) and recipe.cross_tokenizer else roles
    return Models(base, roles, trainable, tuple(weights), vocabulary_rows(speakers))


def split_roles(recipe: AlignRecipe, inputs: Mapping[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """(roles on the shared base, roles by checkpoint of their own): as dae.alignment.build_roles loads them."""
    shared = needs_base(recipe, inputs)
    on_base = ["student"] if recipe.lora is not None else []
    own: dict[str, list[str]] = {}
    first_path: dict[str, str] = {}
    for role, path in role_paths(recipe).items():
        if role in ("base", "student_from"):
            continue
        if is_adapter(path) or (shared and inputs[role] == inputs["base"]):
            on_base.append(role)
        else:
            own.setdefault(first_path.setdefault(inputs[role], path), []).append(role)
    return on_base, own


def frozen_adapters(recipe: AlignRecipe) -> list[Item]:
    """Experts' (and the reference's) adapters, from the headers of their files."""
    items = {}
    for role, path in role_paths(recipe).items():
        if role != "student_from" and is_adapter(path) and path not in items:
            with safe_open(resolve_model(path) / ADAPTER_WEIGHTS, framework="pt") as file:
                count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
            items[path] = Item(f"{role} adapter", count * ADAPTER_BYTES)
    return list(items.values())


def parameters(model: nn.Module) -> int:
    """Number of weights, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())


def memory(
    recipe: StageRecipe, models: Models, args: TrainingArguments, data: StageData, settings: LoadSettings
) -> list[Item]:
    """Peak memory of one process, by part: weights of each role, training state, activations, the loss's chunk."""
    config = models.base.config.get_text_config()  # type: ignore[union-attr,operator]
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    dtype = torch.bfloat16 if args.bf16 or settings.dtype == torch.bfloat16 else torch.float32
    longest = max(int(rows.lengths.max()) for rows in data.rows)
    tokens = longest * args.per_device_train_batch_size
    per_width, per_inner = KEPT_BYTES[dtype]
    layer = tokens * (per_width * width + per_inner * inner)
    if args.gradient_checkpointing:
        kept, name = layers * tokens * width * dtype.itemsize + layer, "activations, checkpointed"
    else:
        kept, name = layers * layer, "activations (train.gradient_checkpointing=true needs less)"
    chunk = CPU_CHUNK_ELEMENTS if settings.device == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    logits, maps = bytes_of_logits(tokens, models.vocabulary_rows, settings.device), 0
    terms = []
    if isinstance(recipe, DistillRecipe) and recipe.attention is not None:
        held = tokens * held_for_maps(recipe.attention, models.roles, dtype, bool(args.gradient_checkpointing))
        terms.append(Item("attention: queries and keys until the loss, and their gradients", held))
        maps = LIVE_MAP_CHUNKS * 4 * chunk
    return [
        *models.weights,
        Item("gradients and AdamW", models.trainable * (GRADIENT_BYTES + ADAMW_BYTES)),
        Item(f"{name}, {args.per_device_train_batch_size} x {longest} tokens", kept),
        *terms,
        # Not both at once: one loss is worked out after the other.
        Item(f"logits{' or attention maps' if maps else ''}, one chunk at a time", max(logits, maps)),
    ]


def bytes_of_logits(tokens: int, vocabulary_rows: int, device: str) -> int:
    """Bytes that the loss of so many tokens holds at once: a chunk of logits, a block of what is made of
    them.
    """
    chunk = max(logits_elements(device), FEWEST_CHUNK_TOKENS * vocabulary_rows)
    chunk, block = (min(elements, tokens * vocabulary_rows) for elements in (chunk, block_elements(device)))
    return 4 * (LIVE_CHUNKS * chunk + LIVE_BLOCKS * block)


def held_for_maps(attention: AttentionRecipe, roles: Sequence[Role], dtype: torch.dtype, checkpointed: bool) -> int:
    """Bytes that the loss between attention maps holds per token (kd/losses/attention.py): of the chosen layers'
    queries and keys, the teacher's until the loss, and the student's gradients in float32 from there to their layer's
    backward.

    The student's own are among its kept activations, unless those are checkpointed.
    """
    student, teacher = roles[0].model, roles[1].model
    pairs = pairs_of("attention", attention.layers, student, teacher)
    ours, theirs = query_and_key_width(student), query_and_key_width(teacher)
    own = len({layer for layer, _ in pairs}) * ours * dtype.itemsize if checkpointed else 0
    return own + len({layer for _, layer in pairs}) * theirs * dtype.itemsize + len(pairs) * ours * GRADIENT_BYTES


def query_and_key_width(model: nn.Module) -> int:
    """Entries of the queries and keys of one token in one layer, all heads together."""
    config = text_config(model)
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return (heads + key_heads) * width


def disk(recipe: StageRecipe, models: Models, args: TrainingArguments) -> list[Item]:
    """What the run folder takes at most: checkpoints (weights and optimizer), the result, a merged copy."""
    element = ADAPTER_BYTES if recipe.lora is not None else student_dtype(recipe).itemsize
    result = models.trainable * element
    checkpoint = result + models.trainable * ADAMW_BYTES
    # One more than are kept: the next is whole before the oldest goes. And the best one, where one is chosen.
    count = 0 if args.save_strategy == "no" else (args.save_total_limit or 2) + 1 + bool(recipe.data.eval)
    items = [Item("the result", result), Item(f"checkpoints, at most {count}", count * checkpoint)]
    if recipe.merge:
        items.append(Item("merged weights", parameters(models.base) * torch.finfo(torch.float32).bits / 8))
    return items


def tokens_of_run(data: StageData, rows: int, routes: Sequence[str]) -> int:
    """Tokens of so many training rows, as far as they are of these routes, at the sources' shares."""
    means = zip(data.sources, data.rows, strict=True)
    return round(
        rows * sum(source.share * float(part.lengths.mean()) for source, part in means if source.route in routes)
    )
