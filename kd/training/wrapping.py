"""How a run's weights lie on its processes: what the launcher's config asks for, and what accelerate makes of it.

DDP: every process has all weights. FSDP2 and ZeRO-3: each has a part of them, and gathers a layer when it is needed.
ZeRO-2: all weights, and a part of the optimizer's state (zero.py). accelerate falls back in silence where it cannot do
what its config asks for, as with FSDP on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import TrainingArguments

from kd.config.stage_recipe import StageRecipe
from kd.errors import UserError
from kd.losses.divergence_recipe import DivergenceRecipe
from kd.models.forward import admit_functions
from kd.models.quantization import is_quantised
from kd.training.settings import processes
from kd.training.zero import asked_stage, partition, refuse_under_zero, refuse_zero_config, set_up

# Keys of accelerate's fsdp_config, the variable each becomes, the value that is refused, and why.
_REFUSED = (
    ("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", "true", "is not supported; set it to false"),
    (
        "fsdp_cpu_ram_efficient_loading",
        "FSDP_CPU_RAM_EFFICIENT_LOADING",
        "true",
        "leaves all processes but the first without weights to check and to start from; set it to false",
    ),
    (
        "fsdp_activation_checkpointing",
        "FSDP_ACTIVATION_CHECKPOINTING",
        "true",
        "does not know the adapters that share the weights; set it to false, and train.gradient_checkpointing=true",
    ),
    (
        "fsdp_auto_wrap_policy",
        "FSDP_AUTO_WRAP_POLICY",
        "SIZE_BASED_WRAP",
        "can part the output layer from what reads it; use TRANSFORMER_BASED_WRAP",
    ),
)

# Beginnings of names of optimizers of torch, which can step sharded weights.
_SHARDED_OPTIMIZERS = ("adamw_torch", "sgd", "rmsprop", "adagrad")


def asks_for_fsdp() -> bool:
    """Whether the launcher's config asks for FSDP."""
    return _is_on("ACCELERATE_USE_FSDP")


def asked_plan() -> str | None:
    """What the launcher's config asks for beyond DDP."""
    if asks_for_fsdp():
        return "FSDP2"
    stage = asked_stage()
    return None if stage is None else f"ZeRO-{stage}"


def refuse_wrapping(recipe: StageRecipe) -> None:
    """Raise UserError for a launcher's config that this run cannot have, or that was never tried."""
    if started_one_of_several() and not recipe.allow_fallback:
        raise UserError(
            "accelerate launch has started one process although its config or --num_processes asks for more, as it "
            "always does with --cpu. Leave out --cpu: without a GPU the processes use the CPU. (allow_fallback=true "
            "trains in one process.)"
        )
    refuse_config()
    plan = asked_plan()
    if plan is None:
        return
    if can_shard():
        refuse_unshardable(recipe, plan)
    elif not recipe.allow_fallback:
        state = processes()
        place = "CPUs" if state.device.type == "cpu" else "a single process"
        raise UserError(
            f"accelerate's config asks for {plan}, which accelerate does not support on {place}: without a warning it "
            f"would train with {words(state.distributed_type, state.num_processes)}. Use "
            "recipes/accelerate/ddp.yaml, or set allow_fallback=true."
        )
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # transformers would set DeepSpeed up all the same


def refuse_config() -> None:
    """Raise UserError for what no run supports in accelerate's config, whatever its recipe."""
    if asked_stage() is not None:
        refuse_zero_config()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UserError(
            f"accelerate's config: mixed_precision: {precision}: the recipe decides (dtype, train.bf16); set it to no"
        )
    if not asks_for_fsdp():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"accelerate's config: fsdp_version: {version}: only FSDP2 is supported; set it to 2")
    for key, variable, refused, reason in _REFUSED:
        if os.environ.get(variable, "").lower() == refused.lower():
            raise UserError(f"accelerate's config: {key}: {refused} {reason}")


def refuse_unshardable(recipe: StageRecipe, plan: str) -> None:
    """Raise UserError for what a recipe asks that this plan cannot do."""
    if plan == "FSDP2":
        refuse_optimizer(recipe)
    else:
        refuse_under_zero(recipe)
    if plan == "ZeRO-2":
        return
    if recipe.quantization is not None:
        raise UserError(
            f"quantization: {recipe.quantization}: {plan} cannot shard quantised weights; use DDP "
            "(recipes/accelerate/ddp.yaml), or remove it"
        )
    if isinstance(recipe, DivergenceRecipe) and recipe.offload_teachers is not None:
        raise UserError(
            f"offload_teachers: {recipe.offload_teachers}: under {plan} the teachers' weights are sharded; remove it"
        )
    if recipe.merge:
        raise UserError(
            f"merge: true: under {plan} no process has all weights to merge into; remove it, and merge the finished "
            "run with dae merge weights"
        )


def refuse_optimizer(recipe: StageRecipe) -> None:
    """Raise UserError for an optimizer that was not tried on FSDP2's weights."""
    optimizer = str(recipe.train.get("optim", "adamw_torch"))
    if not optimizer.startswith(_SHARDED_OPTIMIZERS):
        raise UserError(
            f"train.optim: {optimizer}: was not tested with FSDP2, under which several optimizers fail; use one of "
            f"{', '.join(_SHARDED_OPTIMIZERS)}"
        )


def started_one_of_several() -> bool:
    """Whether accelerate was asked for several processes (then it sets MASTER_ADDR) and started one (no WORLD_SIZE)."""
    variables = os.environ
    return "ACCELERATE_MIXED_PRECISION" in variables and "MASTER_ADDR" in variables and "WORLD_SIZE" not in variables


def can_shard() -> bool:
    """Whether accelerate can shard weights over these processes."""
    return processes().distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)


def has_plan() -> bool:
    """Whether this run has what the launcher's config asks for beyond DDP."""
    return asked_plan() is not None and can_shard()


def shards() -> bool:
    """Whether this run's weights are sharded over its processes."""
    return has_plan() and asked_plan() != "ZeRO-2"


def wrap(args: TrainingArguments, student: nn.Module, teachers: Iterable[nn.Module]) -> None:
    """Prepare the models for several processes; under FSDP2 and ZeRO-3 shard their weights, the teachers' own, too.

    Before the first forward pass on batches, so that a model need not fit one device; and after all adapters are on.
    """
    if processes().num_processes > 1 or has_plan():
        admit_functions(student)
    if not has_plan():
        return
    stage = asked_stage()
    if stage is not None:
        set_up(args, student, stage)
    if not shards():
        return
    models = list({id(model): model for model in (student, *teachers)}.values())  # roles share some
    for model in models:
        if is_quantised(model):
            raise UserError(f"{asked_plan()} cannot shard a checkpoint whose files are quantised; use DDP")
    if stage is None:
        _shard_by_fsdp(args, models)
    else:
        for model in models:
            partition(args, model)


def _shard_by_fsdp(args: TrainingArguments, models: Iterable[nn.Module]) -> None:
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    plugin = accelerator.state.fsdp_plugin
    keep_float32(plugin)
    policy, layers = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    for model in models:
        # accelerate keeps what it found in the first model, and models may be of several architectures.
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, layers
        try:
            fsdp2_prepare_model(accelerator, model)
        except ValueError as error:
            if "transformer layer class" not in str(error):
                raise
            raise UserError(f"accelerate's config: {error} Remove fsdp_transformer_layer_cls_to_wrap.") from error


def keep_float32(plugin: FullyShardedDataParallelPlugin) -> None:
    """Losses and gradients stay in float32 under mixed precision, as they do under DDP and in one process.

    accelerate would round what a forward pass returns, and add up gradients of micro-batches and processes in 16 bits.
    """
    if plugin.mixed_precision_policy is not None:
        policy = replace(plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32)
        plugin.mixed_precision_policy = policy


def wrapping(accelerator: Accelerator) -> str:
    """The plan that a run uses: `1 process`, `2 processes, DDP`, `8 processes, FSDP2`."""
    return words(accelerator.distributed_type, accelerator.num_processes)


def words(kind: DistributedType, count: int) -> str:
    text = "1 process" if count == 1 else f"{count} processes"
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return f"{text}, {asked_plan()}"
    return text if count == 1 else f"{text}, DDP"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
