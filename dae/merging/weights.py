"""`dae merge weights`: baselines for alignment, made by mergekit from two or three checkpoints.

    linear            (1 - w) reference + w expert                               arXiv 2203.05482
    slerp             spherical, reference to expert at w, per tensor            Shoemake 1985
    task_arithmetic   base + w (tau_reference + tau_expert)                      arXiv 2212.04089, section 2
    ties              base + w merge(trim(tau_reference), trim(tau_expert))      arXiv 2306.01708, algorithm 1
    dare_ties         as ties, but tau is dropped at random and divided by
                      the density instead of trimmed                             arXiv 2311.03099, section 3

tau_x = x - base is a task vector; a reference that is the base has none. merge() elects each entry's sign by the sum of
the vectors and takes the mean of those with that sign. Trimming is per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

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
from dae.merging.recipe import BETWEEN, WeightsRecipe
from kd.errors import UserError
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.compatibility import check_tokenizers
from kd.models.merged import state_ties_of_files
from kd.stages.run_stage import RunResult


def merge_weights(recipe: WeightsRecipe) -> RunResult:
    """Merge reference and expert by arithmetic on their weights. Adapters are merged into their base first.

    Raises UserError (recipe, checkpoints), MachineError (disk).
    """
    base, expert = checkpoint(recipe.base), checkpoint(recipe.expert)
    reference = checkpoint(recipe.reference or recipe.base)
    base.refuse_adapter("base")
    inputs = {"base": base, "reference": reference, "expert": expert}
    # The result has its config, tokenizer and dtype. Adapters are on it or on the base.
    home = base if reference.is_adapter else reference
    candidates = list(dict.fromkeys([base, home]))

    def make(folder: Path, scratch: Path) -> Mapping[str, Any]:
        dtype = stored_dtype(home.folder)
        if recipe.method in BETWEEN and recipe.weight == 1 and expert.is_adapter:
            # Nothing of the reference remains, so mergekit need not know the architecture.
            whole_expert = str(whole_checkpoint("expert", expert, candidates, scratch))
            model = AutoModelForCausalLM.from_pretrained(whole_expert, dtype=dtype, use_safetensors=True)
            model.save_pretrained(str(folder))
        else:
            whole = {role: whole_checkpoint(role, one, candidates, scratch) for role, one in inputs.items()}
            configuration = merge_configuration(recipe, whole, not same(base, reference))
            mergekit_calls.merge({**configuration, "out_dtype": str(dtype).removeprefix("torch.")}, folder, recipe.seed)
            config = AutoConfig.from_pretrained(str(home.folder))
            config.dtype = dtype
            state_ties_of_files(folder, config)
            config.save_pretrained(str(folder))
        write_companions(home, folder)
        return {"method": recipe.method, "weight": recipe.weight, "parameters": check_opens(folder, home)}

    return run_merge(recipe, inputs, lambda: check_roles(recipe, inputs, candidates), make)


def check_roles(recipe: WeightsRecipe, inputs: Inputs, candidates: Sequence[Checkpoint]) -> None:
    """Raise UserError if reference and expert do not fit the base, or are identical."""
    base = inputs["base"]
    for role, one in inputs.items():
        if one.is_adapter:
            check_foundation(role, one, candidates)
        elif one is not base:
            check_same_architecture(role, one, base)
    check_tokenizers(base, inputs)
    other = "reference" if recipe.method in BETWEEN else "base"
    if same(inputs["expert"], inputs[other]):
        raise UserError(f"expert {recipe.expert}: is identical to the {other}; nothing to merge")


def merge_configuration(recipe: WeightsRecipe, whole: Mapping[str, Path], reference_has_vector: bool) -> dict[str, Any]:
    """The recipe as mergekit's configuration, computed in float32. whole: each role's full checkpoint."""
    models = {role: mergekit_calls.model(folder) for role, folder in whole.items()}
    common: dict[str, Any] = {"merge_method": recipe.method, "dtype": "float32"}
    if recipe.method in BETWEEN:
        weights = {"reference": 1.0 - recipe.weight, "expert": recipe.weight}
        inputs = [{"model": models[role], "parameters": {"weight": weight}} for role, weight in weights.items()]
        if recipe.method == "slerp":
            common |= {"base_model": models["reference"], "parameters": {"t": recipe.weight}}
            inputs = [{"model": models[role]} for role in weights]
        return {**common, "models": inputs}
    density = recipe.density if recipe.density is not None else 1.0
    vectors = ["reference", "expert"] if reference_has_vector else ["expert"]
    # mergekit's rescaling keeps each tensor's l1 norm; DARE divides by the density, which commutes with the rest.
    scale = recipe.weight / density if recipe.method == "dare_ties" else recipe.weight
    settings = {"normalize": recipe.method != "task_arithmetic", "rescale": False, "lambda": scale}
    inputs = [{"model": models[role], "parameters": {"weight": 1.0, "density": density}} for role in vectors]
    return {**common, "base_model": models["base"], "models": inputs, "parameters": settings}
