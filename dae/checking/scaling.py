"""What a run of several processes takes on each: memory, and what it sends in one optimizer step.

FSDP2 is as recipes/accelerate/fsdp2.yaml asks for it. Every decoder layer is a group of weights, and so is the input
embedding, unless it is tied: each is gathered for a forward pass and let go after it. The rest (output layer, final
norm) stays gathered until the backward pass has gone; of a model without a backward pass, from its first pass on.

A weight is split by its first dimension, into parts of equally many rows; where there are too few rows, the last parts
are filled up. A mixture's experts are one weight with a row for each: over more processes than experts, most parts are
filling, which is kept and sent like the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dae.checking.estimates import ADAPTER_BYTES, GRADIENT_BYTES, Item, is_training_only, memory, trainable
from dae.checking.plan import Plan
from dae.checking.processes import Scaling
from kd.models.forward import unwrapped
from kd.models.roles import Role
from kd.training.settings import student_dtype

# At once: a layer's weights, the buffer that they came in, and the next layer's buffer.
GATHERED_LAYERS = 3
TRAINING_ONLY_BYTES = 4


@dataclass(frozen=True)
class Groups:
    """Bytes that a model's groups take when they are gathered, with padding.

    layers: together, those that are gathered for each pass; largest: of these; kept: those that stay gathered.
    """

    layers: int
    largest: int
    kept: int


def part_of(weight: Tensor, processes: int) -> int:
    """Elements of a process's part of a weight."""
    rows = weight.shape[0] if weight.dim() else 1
    return -(-rows // processes) * (weight.numel() // rows)


def scaled_memory(plan: Plan, scaling: Scaling) -> list[Item]:
    """Peak memory of one of the processes in bytes, by part."""
    if scaling.plan == "ddp":
        return [*memory(plan), Item("DDP's buckets of gradients", gradient_bytes(plan, scaling))]
    part = partial(part_of, processes=scaling.processes)
    items = memory(plan, part)
    student = plan.roles.student.model
    if plan.args.bf16 and plan.recipe.lora is None and student_dtype(plan.recipe) == torch.bfloat16:
        upcast = torch.float32.itemsize - torch.bfloat16.itemsize
        items.append(Item("student in float32 (mixed precision)", trainable(plan.roles.student, part) * upcast))
    of_student = groups(student, plan, scaling)
    of_others = [groups(model, plan, scaling) for model in models(plan) if model is not student]
    largest = max(one.largest for one in [of_student, *of_others])
    items.append(Item("gathered for a moment: a layer, its buffer, the next", GATHERED_LAYERS * largest))
    items.append(Item("gathered until after backward: output layer", of_student.kept))
    if of_others:
        items.append(Item("gathered all the time: others' output layers", sum(one.kept for one in of_others)))
    if plan.args.gradient_accumulation_steps > 1:
        items.append(Item("gradients, not split before the last micro-batch", gradient_bytes(plan, scaling)))
    return items


def communication(plan: Plan, scaling: Scaling) -> list[Item]:
    """Bytes that one process sends in an optimizer step, by part; it gets as many.

    Without what takes a few bytes: counts of tokens, the gradients' norm, metrics.
    """
    others = (scaling.processes - 1) / scaling.processes
    gradients = gradient_bytes(plan, scaling)
    if scaling.plan == "ddp":
        return [Item("gradients, all-reduce", 2 * others * gradients)]
    each = others * plan.args.gradient_accumulation_steps
    student = groups(plan.roles.student.model, plan, scaling)
    items = []
    for teacher in passing(plan):
        layers = groups(teacher.model, plan, scaling).layers
        items.append(Item(f"{teacher.name}: all-gather for forward", each * layers))
    items.append(Item("student: all-gather for forward", each * (student.layers + student.kept)))
    items.append(Item("student: all-gather for backward", each * student.layers))
    return [*items, Item("gradients, reduce-scatter", others * gradients)]


def passing(plan: Plan) -> list[Role]:
    """The teachers that a training step runs, each once; under FSDP2 on every process, also without rows for them."""
    found: list[Role] = []
    if plan.objective.trains_with_teachers:
        for teacher in (route.teacher for route in plan.objective.routes):
            if not isinstance(teacher, Role) or teacher.name in plan.cache:
                continue
            if not any(known.same_as(teacher) for known in found):
                found.append(teacher)
    return found


def models(plan: Plan) -> list[nn.Module]:
    """Those in memory, each once."""
    return list({id(role.model): role.model for role in plan.roles.all}.values())


def groups(model: nn.Module, plan: Plan, scaling: Scaling) -> Groups:
    """The groups that accelerate makes of a model (fsdp2_prepare_model)."""
    sizes = {
        weight: scaling.processes * part_of(weight, scaling.processes) * element_bytes(name, model, plan, scaling)
        for name, weight in model.named_parameters()
    }
    apart = [sum(sizes[weight] for weight in module.parameters()) for module in gathered_apart(model)]
    return Groups(sum(apart), max(apart, default=0), sum(sizes.values()) - sum(apart))


def gathered_apart(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, and the input embedding unless it is tied."""
    inner = unwrapped(model)
    kinds = set(inner._no_split_modules or ())
    found = [module for module in inner.modules() if type(module).__name__ in kinds]
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    is_tied = weight is not None and weight is getattr(head, "weight", None)
    return [*found, embedding] if embedding is not None and not is_tied else found


def gradient_bytes(plan: Plan, scaling: Scaling) -> int:
    """Bytes of all gradients of the student, with padding where they are split."""
    model, parts = plan.roles.student.model, scaling.processes if scaling.plan == "fsdp2" else 1
    casts = scaling.plan == "fsdp2" and plan.args.bf16  # weights only: gradients are sent in float32
    return sum(
        parts * part_of(weight, parts) * (GRADIENT_BYTES if casts else element_bytes(name, model, plan, scaling))
        for name, weight in model.named_parameters()
        if weight.requires_grad
    )


def element_bytes(name: str, model: nn.Module, plan: Plan, scaling: Scaling) -> int:
    """Bytes of an element of a weight as it is sent, and of its gradient without mixed precision."""
    if scaling.plan == "fsdp2" and plan.args.bf16:
        return torch.bfloat16.itemsize  # accelerate's mixed precision casts before it sends
    if is_training_only(name):
        return TRAINING_ONLY_BYTES
    if set(getattr(model, "peft_config", ())) & {*name.split(".")}:
        return ADAPTER_BYTES
    trains = model is plan.roles.student.model and plan.recipe.lora is None
    return (student_dtype(plan.recipe) if trains else plan.settings.dtype).itemsize
