"""README.md of a merge's run folder: inputs, method, measurements, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dae.merging.recipe import MergeRecipe, MoeRecipe, ToLoraRecipe, WeightsRecipe
from kd.config.loading import resolved_yaml
from kd.models.checkpoint import Checkpoint
from kd.runs.environment import library_versions
from kd.training.model_card import CARD, is_on_hub, licence_of, models_table, result_rows, table

_METHODS = {
    "linear": "linear interpolation from reference to expert at {weight:g} "
    "([arXiv 2203.05482](https://arxiv.org/abs/2203.05482))",
    "slerp": "spherical interpolation from reference to expert, per tensor, at {weight:g} "
    "([Shoemake 1985](https://dl.acm.org/doi/10.1145/325165.325242))",
    "task_arithmetic": "the base plus {weight:g} times the sum of task vectors "
    "([arXiv 2212.04089](https://arxiv.org/abs/2212.04089))",
    "ties": "the base plus {weight:g} times the TIES merge of task vectors, each trimmed to its largest {density:g} "
    "([arXiv 2306.01708](https://arxiv.org/abs/2306.01708))",
    "dare_ties": "the base plus {weight:g} times the TIES merge of task vectors, each dropped at random to {density:g} "
    "and rescaled ([arXiv 2311.03099](https://arxiv.org/abs/2311.03099))",
}


def write_merge_card(
    folder: Path, recipe: MergeRecipe, inputs: Mapping[str, Checkpoint], summary: Mapping[str, Any]
) -> None:
    """Write README.md into `folder`.

    inputs: by role; summary: as in run.json.
    """
    licences = {role: licence_of(one).get("license") for role, one in inputs.items()}
    stated = ", ".join(f"{role}: `{licence}`" for role, licence in licences.items() if licence) or "none stated"
    sections = {
        "Models": f"{models_table(inputs)}\n\nLicences in the models' cards: {stated}. The terms of all of them apply.",
        "Results": table(("measure", "value"), result_rows(summary)),
        "How to load it": _loading_code(recipe),
        "Recipe": f"```yaml\n{resolved_yaml(recipe).rstrip()}\n```",
        "Made with": ", ".join(f"{name} {version}" for name, version in library_versions().items()),
    }
    text = f"# {Path(recipe.output).name}\n\n{_what_it_is(recipe)}\n"
    text += "".join(f"\n## {title}\n\n{content}\n" for title, content in sections.items())
    ModelCard(f"---\n{_metadata(recipe, inputs).to_yaml()}\n---\n\n{text}").save(folder / CARD)


def _what_it_is(recipe: MergeRecipe) -> str:
    if isinstance(recipe, MoeRecipe):
        names = ", ".join(f"`{expert.path}`" for expert in recipe.experts.values())
        return (
            f"A mixture of experts: `{recipe.base}` with the MLPs of {names} as its experts, "
            f"{recipe.experts_per_token} of them for each token. Attention, norms and embeddings are the base's; the "
            f"router is initialised by the gate `{recipe.gate}`. Made with mergekit, without training."
        )
    if isinstance(recipe, WeightsRecipe):
        how = _METHODS[recipe.method].format(weight=recipe.weight, density=recipe.density or 1.0)
        return f"A merge: {how}. Made with mergekit, without training."
    return (
        f"A LoRA adapter on `{recipe.reference}` made from `{recipe.expert}`, a full fine-tune of it: the singular "
        "value decomposition of each matrix's difference, truncated to a rank. Made without training."
    )


def _metadata(recipe: MergeRecipe, inputs: Mapping[str, Checkpoint]) -> ModelCardData:
    adapter = isinstance(recipe, ToLoraRecipe)
    sources = [inputs["base"]] if adapter else list(inputs.values())
    extra: dict[str, Any] = licence_of(inputs["base"]) if adapter else {}
    if on_hub := sorted({str(one) for one in sources if is_on_hub(str(one))}):
        extra |= {"base_model": on_hub, "base_model_relation": "adapter" if adapter else "merge"}
    tags = ["dae-align", "merge"] + (["lora"] if adapter else ["mergekit"])
    return ModelCardData(
        library_name="peft" if adapter else "transformers", pipeline_tag="text-generation", tags=tags, **extra
    )


def _loading_code(recipe: MergeRecipe) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if isinstance(recipe, ToLoraRecipe):
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'base = AutoModelForCausalLM.from_pretrained("{recipe.reference}", dtype="auto")')
        lines.append(f'model = PeftModel.from_pretrained(base, "{recipe.output}")')
    else:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{recipe.output}", dtype="auto")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{recipe.output}")')
    return "```python\n" + "\n".join(lines) + "\n```"
