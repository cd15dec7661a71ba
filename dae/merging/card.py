"""README.md of a merge's run folder: inputs, method, measurements, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dae.merging.recipe import MergeRecipe
from kd.config.loading import resolved_yaml
from kd.models.checkpoint import Checkpoint
from kd.runs.environment import library_versions
from kd.training.model_card import CARD, is_on_hub, licence_of, models_table, result_rows, table


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
    text = f"# {Path(recipe.output).name}\n\n{recipe.describe()}\n"
    text += "".join(f"\n## {title}\n\n{content}\n" for title, content in sections.items())
    ModelCard(f"---\n{_metadata(recipe, inputs).to_yaml()}\n---\n\n{text}").save(folder / CARD)


def _metadata(recipe: MergeRecipe, inputs: Mapping[str, Checkpoint]) -> ModelCardData:
    adapter = recipe.base_of_adapter is not None
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
    if (base := recipe.base_of_adapter) is not None:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")')
        lines.append(f'model = PeftModel.from_pretrained(base, "{recipe.output}")')
    else:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{recipe.output}", dtype="auto")')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{recipe.output}")')
    return "```python\n" + "\n".join(lines) + "\n```"
