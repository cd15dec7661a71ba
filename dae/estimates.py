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
from dae.recipe import AlignRecipe
from kd.compatibility import empty_model, is_adapter
from kd.config import SftRecipe, StageRecipe
from kd.distill import projection_parameters
from kd.distill_recipe import DistillRecipe
from kd.fingerprints import resolve_model
from kd.losses import ACCELERATOR_CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS
from kd.roles import ADAPTER_WEIGHTS, Backbone, LoadSettings, add_student_adapter
from kd.stage import student_dtype
from kd.stage_data import StageData

ADAPTER_BYTES = 4  # peft keeps adapters in float32
ADAMW_BYTES = 8  # two moments in float32
GRADIENT_BYTES = 4
# Bytes that backward keeps per token and layer, as (per width, per inner width of the MLP): counted on Llama layers
# with LoRA on all linear layers and SDPA.
KEPT_BYTES = {torch.float32: (40, 16), torch.bfloat16: (42, 10)}
LIVE_CHUNKS = 6  # student's and teacher's logits, log-probabilities, gradient, one temporary; in float32


@dataclass(frozen=True)
class Item:
    """One line of an estimate."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Models:
    """The models of a run without their weights: the base's architecture, the student's, and what each copy takes."""

    base: nn.Module
    trainable: int
    weights: tuple[Item, ...]
    vocabulary_rows: int


def models_of(recipe: StageRecipe, inputs: Mapping[str, str], settings: LoadSettings) -> Models:
    """Which weights a run keeps in memory, once each, and how many of them train.

    Raises UserError where a checkpoint is no causal language model or `lora.target_modules` names no layer.
    """
    element = settings.dtype.itemsize
    base = empty_model(recipe.base, recipe.trust_remote_code)
    size, vocabulary_rows = parameters(base), head_rows(base)
    weights: list[Item] = []
    if isinstance(recipe, SftRecipe):
        on_base, own = ["student"] if recipe.lora else [], {}
    elif isinstance(recipe, DistillRecipe):
        on_base, own = ["student"] if recipe.lora else [], {recipe.teacher: ["teacher"]}
    else:
        assert isinstance(recipe, AlignRecipe)
        on_base, own = split_roles(recipe, inputs)
    for path, roles in own.items():
        model = empty_model(path, recipe.trust_remote_code)
        if not (isinstance(recipe, DistillRecipe) and recipe.cross_tokenizer):
            vocabulary_rows = min(vocabulary_rows, head_rows(model))
        weights.append(Item(", ".join(roles), parameters(model) * element))
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
        adapted = add_student_adapter(Backbone(recipe.base, base), recipe.lora, None)  # type: ignore[arg-type]
        trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
        weights.append(Item("student adapter", trainable * ADAPTER_BYTES))
    return Models(base, trainable, tuple(weights), vocabulary_rows)


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


def head_rows(model: nn.Module) -> int:
    """Rows of the output layer."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0])


def memory(models: Models, args: TrainingArguments, data: StageData, settings: LoadSettings) -> list[Item]:
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
    return [
        *models.weights,
        Item("gradients and AdamW", models.trainable * (GRADIENT_BYTES + ADAMW_BYTES)),
        Item(f"{name}, {args.per_device_train_batch_size} x {longest} tokens", kept),
        Item("logits, one chunk at a time", LIVE_CHUNKS * 4 * max(chunk, 16 * models.vocabulary_rows)),
    ]


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


def loss_shares(recipe: StageRecipe, data: StageData) -> dict[str, float]:
    """Each route's share of the loss, in expectation over a run (sum 1).

    With `weights: routes` each route has 1, with factors its factor; pooled over tokens, its share of response tokens.
    """
    weights = recipe.weights if isinstance(recipe, AlignRecipe) else "tokens"
    if weights == "tokens":
        says = dict.fromkeys(data.route_names, 0.0)
        for source, rows in zip(data.sources, data.rows, strict=True):
            says[source.route] += source.share * float(rows.response_counts.mean())
    else:
        says = {name: weights[name] if isinstance(weights, Mapping) else 1.0 for name in data.route_names}
    total = sum(says.values())
    return {name: say / total for name, say in says.items()}
