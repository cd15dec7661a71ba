"""`dae merge moe`: dense checkpoints as the experts of one mixture (the 2x7B student of arXiv 2406.19112), by mergekit.

Every layer keeps the base's attention and norms; its MLP becomes a router and one MLP per expert. What an expert
learnt outside its MLPs is lost; the summary says how much.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from dae.merging import mergekit_calls
from dae.merging.checkpoints import (
    Inputs,
    check_foundation,
    check_opens,
    check_same_architecture,
    run_merge,
    same,
    stored_dtype,
    whole_checkpoint,
    write_companions,
)
from dae.merging.recipe import MoeRecipe
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.checkpoint_files import weight_files
from kd.models.compatibility import check_tokenizers
from kd.models.merged import state_ties_of_files
from kd.stages.run_stage import RunResult

logger = logging.getLogger("dae")

# Dense model type -> mergekit's name for its mixture (a prefix).
MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3"}
# mergekit's own `random` has unit variance: at usual widths its logits are in the tens, so the softmax is one-hot and
# hardly learns. Its `uniform_random` is the initialisation of a linear layer.
GATES = {"hidden": "hidden", "cheap_embed": "cheap_embed", "random": "uniform_random"}
MUCH_LEFT_OUT = 0.5


def merge_moe(recipe: MoeRecipe) -> RunResult:
    """Make a mixture of experts from dense checkpoints. LoRA experts are merged into the base first.

    Raises UserError (recipe, checkpoints, an unsupported architecture), MachineError (disk).
    """
    base = checkpoint(recipe.base)
    base.refuse_adapter("base")
    experts = {f"expert.{name}": checkpoint(expert.path) for name, expert in recipe.experts.items()}
    inputs = {"base": base, **experts}

    def make(folder: Path, scratch: Path) -> Mapping[str, Any]:
        candidates = foundations(inputs)
        whole = {
            name: whole_checkpoint(role, expert, candidates, scratch)
            for name, (role, expert) in zip(recipe.experts, experts.items(), strict=True)
        }
        carried = {name: mlp_share(base.folder, expert) for name, expert in whole.items()}
        warn_of_losses(recipe, carried)
        dtype = stored_dtype(base.folder)
        mergekit_calls.mix(moe_configuration(recipe, base.folder, whole, dtype), folder, recipe.seed)
        write_config(base.folder, folder, dtype)
        write_companions(base, folder)
        return {
            "gate": recipe.gate,
            "experts": len(recipe.experts),
            "experts_per_token": recipe.experts_per_token,
            "parameters": check_opens(folder, base),
            "carried": carried,
        }

    return run_merge(recipe, inputs, lambda: check_experts(recipe, inputs), make)


def check_experts(recipe: MoeRecipe, inputs: Inputs) -> None:
    """Raise UserError if the experts do not fit the base, or its architecture has no mixture."""
    base = inputs["base"]
    config = AutoConfig.from_pretrained(str(base.folder))
    if config.model_type not in MIXTURES:
        raise UserError(
            f"base {base}: is a {config.model_type} model; mixtures are supported for {', '.join(MIXTURES)}"
        )
    biases = [name for name, _ in base.meta_model().named_parameters() if name.endswith(".bias")]
    if biases:
        raise UserError(f"base {base}: has biases ({biases[0]}, ...), which its mixture does not support")
    if len(windows_of(config)) > 1:
        raise UserError(
            f"base {base}: only some layers have the sliding window of {config.sliding_window} tokens "
            "(layer_types); a mixture needs it in all layers or in none. If no row is longer than the window, remove "
            "it from the config.json of base and experts (use_sliding_window: false, no layer_types)"
        )
    for role, one in inputs.items():
        if one.is_adapter:
            check_foundation(role, one, foundations(inputs))
        elif one is not base:
            check_same_architecture(role, one, base)
    check_tokenizers(base, inputs)
    if same(*(one for role, one in inputs.items() if role != "base")):
        logger.warning("experts: all are the same model; the mixture equals it until trained")
    if recipe.gate == "random" and any(e.prompts or e.negative_prompts for e in recipe.experts.values()):
        logger.warning("experts: prompts are ignored with gate: random")


def foundations(inputs: Inputs) -> list[Checkpoint]:
    """Possible bases of an expert's adapter: the base, or another expert."""
    return [one for one in inputs.values() if not one.is_adapter]


def moe_configuration(recipe: MoeRecipe, base: Path, whole: Mapping[str, Path], dtype: torch.dtype) -> dict[str, Any]:
    model_type = AutoConfig.from_pretrained(str(base)).model_type
    return {
        "base_model": mergekit_calls.model(base),
        "architecture": MIXTURES[model_type],
        "gate_mode": GATES[recipe.gate],
        "experts_per_token": recipe.experts_per_token,
        "dtype": str(dtype).removeprefix("torch."),
        "experts": [
            {
                "source_model": mergekit_calls.model(whole[name]),
                "positive_prompts": list(expert.prompts) or [name],  # required even if not read
                "negative_prompts": list(expert.negative_prompts),
            }
            for name, expert in recipe.experts.items()
        ],
    }


def write_config(base: Path, folder: Path, dtype: torch.dtype) -> None:
    """Restore what mergekit changes of the base's config: sliding window, special tokens, dtype."""
    ours, config = AutoConfig.from_pretrained(str(base)), AutoConfig.from_pretrained(str(folder))
    (config.sliding_window,) = windows_of(ours)
    if hasattr(config, "use_sliding_window"):
        config.use_sliding_window = config.sliding_window is not None
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, key, getattr(ours, key, None))
    config.dtype = dtype
    state_ties_of_files(folder, config)
    config.save_pretrained(str(folder))


def windows_of(config: Any) -> set[int | None]:
    """The sliding windows of a dense model's layers, in tokens; None: without. Only Qwen3's layers may differ."""
    window = getattr(config, "sliding_window", None)
    types = config.layer_types if config.model_type == "qwen3" else ["sliding_attention"]
    return {window if kind == "sliding_attention" else None for kind in types}


def mlp_share(base: Path, expert: Path) -> float | None:
    """The share of the squared difference between expert and base that is in MLPs; None if the expert is the base."""
    ours, theirs = tensor_files(base), tensor_files(expert)
    inside = outside = 0.0
    for name in ours.keys() & theirs.keys():
        energy = float((read_tensor(theirs, name) - read_tensor(ours, name)).square().sum(dtype=torch.float64))
        if ".mlp." in name:
            inside += energy
        else:
            outside += energy
    return inside / (inside + outside) if inside + outside > 0 else None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file."""
    files: dict[str, Path] = {}
    for file_name in weight_files(folder):
        if file_name.endswith(".safetensors"):
            with safe_open(folder / file_name, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), folder / file_name)
    return files


def read_tensor(files: Mapping[str, Path], name: str) -> torch.Tensor:
    """One tensor of a checkpoint, in float32."""
    with safe_open(files[name], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name).float()
    return tensor


def warn_of_losses(recipe: MoeRecipe, carried: Mapping[str, float | None]) -> None:
    """Warn of experts that changed mostly outside their MLPs."""
    for name, share in carried.items():
        if share is not None and 1 - share > MUCH_LEFT_OUT:
            logger.warning(
                "experts.%s: %s: %.0f %% of its squared difference to the base is outside its MLPs (attention, norms, "
                "embeddings) and is lost; use this expert as --base, or train the mixture on its rows.",
                name,
                recipe.experts[name].path,
                100 * (1 - share),
            )
