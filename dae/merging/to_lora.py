"""`dae merge to-lora`: the difference of a fully fine-tuned expert to the reference, as a LoRA adapter.

For each weight matrix W of a linear layer, D = W_expert - W_reference is truncated to rank r by its singular value
decomposition D = U S V^T (Eckart, Young 1936: no matrix of rank r is nearer to D):

    B = U_r sqrt(S_r),  A = sqrt(S_r) V_r^T,  energy kept = sum_{i<=r} s_i^2 / ||D||^2

Embeddings, output layer, norms and biases are left out: their difference is reported, and refused if too large.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from dae.merging.checkpoints import Inputs, check_same_architecture, run_merge, same, stored_dtype
from dae.merging.recipe import ToLoraRecipe
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kd.models.compatibility import check_tokenizers
from kd.models.low_rank import Factors, low_rank
from kd.models.roles import LoadSettings, load_model
from kd.runs.files import json_text, read_json
from kd.stages.run_stage import RunResult

logger = logging.getLogger("dae")


def to_lora(recipe: ToLoraRecipe) -> RunResult:
    """Make a PEFT adapter on the reference from a fully fine-tuned expert.

    Raises UserError if the checkpoints do not fit, or more would be lost than the recipe allows; MachineError.
    """
    base, tuned = checkpoint(recipe.reference), checkpoint(recipe.expert)
    base.refuse_adapter("reference")
    if tuned.is_adapter:
        raise UserError(f"expert: {tuned}: is already an adapter; use it as it is: `dae align --expert`")
    inputs = {"base": base, "expert": tuned}

    def make(folder: Path, _scratch: Path) -> Mapping[str, Any]:
        reference, expert = (load_model(one, LoadSettings(stored_dtype(one.folder))) for one in (base, tuned))
        left_out = left_out_energies(reference, expert)
        factors = factorise(reference, expert, recipe)
        del expert
        summary = what_is_kept(factors, left_out)
        refuse_large_loss(recipe, summary)
        write_adapter(folder, base, reference, factors)
        AutoTokenizer.from_pretrained(str(base.folder)).save_pretrained(str(folder))
        check_loads(folder, reference, factors)
        return summary

    return run_merge(recipe, inputs, lambda: check_pair(inputs), make)


def check_pair(inputs: Inputs) -> None:
    """Raise UserError if the expert is no fine-tune of the reference, or has weights that LoRA does not support."""
    reference, expert = inputs["base"], inputs["expert"]
    if same(reference, expert):
        raise UserError(f"expert {expert}: is identical to the reference; use the fine-tuned checkpoint")
    check_same_architecture("expert", expert, reference)
    check_tokenizers(reference, {"expert": expert})
    for name, parameter in reference.meta_model().named_parameters():
        if parameter.dim() > 2:
            raise UserError(
                f"reference {reference}: {name} is {list(parameter.shape)}: experts of a mixture cannot become "
                "a LoRA; use the full checkpoint: `dae align --expert`"
            )


# -- the difference ----------------------------------------------------------------------------------------------------


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear layer except the output layer."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            yield name, module


def kind_of_rest(model: nn.Module, parameter: str) -> str:
    owner = model.get_submodule(parameter.rpartition(".")[0])
    if parameter.endswith(".bias"):
        return "biases"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if owner is model.get_output_embeddings():  # type: ignore[operator]
        return "output layer"
    return "norms"


def left_out_energies(reference: nn.Module, expert: nn.Module) -> dict[str, float]:
    """Squared norm of expert - reference for each kind of parameter that is left out."""
    carried = {f"{name}.weight" for name, _ in matrices(reference)}
    ours, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (reference, expert))
    energies: dict[str, float] = defaultdict(float)
    # If one of the two has tied embeddings, only the other names its output layer.
    for name in dict.fromkeys(name for model in (reference, expert) for name, _ in model.named_parameters()):
        if name not in carried:
            difference = theirs[name].detach().float() - ours[name].detach().float()
            energies[kind_of_rest(reference, name)] += float(difference.square().sum(dtype=torch.float64))
    return dict(energies)


def factorise(reference: nn.Module, expert: nn.Module, recipe: ToLoraRecipe) -> dict[str, Factors]:
    """The update of each linear layer that changed, by name. Decomposed on the accelerator, if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    factors = {}
    layers = list(matrices(reference))
    console = Console(stderr=True)
    for name, module in track(layers, "decomposing", console=console, transient=True, disable=not console.is_terminal):
        difference_OI = expert.get_submodule(name).weight.detach().to(device).float()  # type: ignore[operator]
        difference_OI = difference_OI - module.weight.detach().to(device).float()  # type: ignore[operator]
        if isinstance(module, Conv1D):  # its weights are transposed
            difference_OI = difference_OI.T
        if bool(difference_OI.any()):
            factors[name] = low_rank(difference_OI, recipe.rank, recipe.energy)
    return factors


# -- the loss ----------------------------------------------------------------------------------------------------------


def what_is_kept(factors: Mapping[str, Factors], left_out: Mapping[str, float]) -> dict[str, Any]:
    """Summary: energy kept in all matrices and by kind (the layer's name in its block), ranks, and what is left out.

    left_out: squared norms by kind. The summary has norms, and their share of the whole squared difference.
    """
    by_kind: dict[str, list[Factors]] = defaultdict(list)
    for name, factor in factors.items():
        by_kind[name.rpartition(".")[2]].append(factor)
    whole, kept = (sum(getattr(factor, part) for factor in factors.values()) for part in ("whole", "kept"))
    lost = sum(left_out.values())
    ranks = [len(factor.a_RI) for factor in factors.values()]
    return {
        "energy_kept": kept / whole if whole else 0.0,
        "by_kind": {
            kind: sum(factor.kept for factor in members) / sum(factor.whole for factor in members)
            for kind, members in sorted(by_kind.items())
        },
        "matrices": len(factors),
        "rank": {"lowest": min(ranks, default=0), "highest": max(ranks, default=0)},
        "left_out": {kind: energy**0.5 for kind, energy in sorted(left_out.items())},
        "left_out_share": lost / (whole + lost) if whole + lost else 0.0,
    }


def refuse_large_loss(recipe: ToLoraRecipe, summary: Mapping[str, Any]) -> None:
    """Raise UserError if more is lost than the recipe's thresholds allow."""
    if summary["left_out_share"] > recipe.max_left_out:
        norms = ", ".join(f"{kind} {norm:.3g}" for kind, norm in summary["left_out"].items())
        raise UserError(
            f"expert {recipe.expert}: {summary['left_out_share']:.1%} of its squared difference to {recipe.reference} "
            f"is in weights without LoRA (norms: {norms}), more than max_left_out ({recipe.max_left_out:g}); raise "
            "max_left_out, or use the full checkpoint: `dae align --expert`"
        )
    if summary["energy_kept"] < recipe.min_energy:
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in summary["by_kind"].items())
        asked = f"rank {recipe.rank}" if recipe.rank is not None else f"energy {recipe.energy}"
        raise UserError(
            f"expert {recipe.expert}: {asked} keeps {summary['energy_kept']:.1%} of its matrices' squared difference "
            f"to {recipe.reference} ({kinds}), less than min_energy ({recipe.min_energy:g}); raise --rank or --energy, "
            "or lower min_energy"
        )


# -- the adapter -------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, base: Checkpoint, model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Write a plain PEFT adapter: adapter_config.json and adapter_model.safetensors, scaled by 1."""
    ranks = {name: len(factor.a_RI) for name, factor in factors.items()}
    highest = max(ranks.values())
    differing = {name: rank for name, rank in ranks.items() if rank != highest}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.lasting_path,
        r=highest,
        lora_alpha=highest,
        rank_pattern=differing,
        alpha_pattern=dict(differing),
        target_modules=list(factors),
        fan_in_fan_out=any(isinstance(module, Conv1D) for _, module in matrices(model)),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    written = read_json(folder / ADAPTER_CONFIG)  # peft has the names in a set, whose order changes from run to run
    written["target_modules"] = sorted(written["target_modules"])
    (folder / ADAPTER_CONFIG).write_text(json_text(written), encoding="utf-8")
    tensors = {}
    for name, factor in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = factor.a_RI
        tensors[f"base_model.model.{name}.lora_B.weight"] = factor.b_OR
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def check_loads(folder: Path, reference: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Open the adapter with plain peft on the reference, and compare every update. Raises RuntimeError.

    peft silently leaves an update at zero if it does not find the tensor by name.
    """
    model = PeftModel.from_pretrained(reference, str(folder))
    for name, factor in factors.items():
        layer: Any = model.get_base_model().get_submodule(name)
        update = layer.get_delta_weight("default").detach().float()
        expected = factor.b_OR @ factor.a_RI
        if layer.fan_in_fan_out:
            expected = expected.T
        if not torch.allclose(update.cpu(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())):
            raise RuntimeError(f"{folder}: the update of {name} is not the one that was written")
