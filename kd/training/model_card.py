"""README.md of a run folder: a model card in the hub's format that says what went in and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from kd.config.loading import resolved_yaml
from kd.data.hub import could_be_on_the_hub
from kd.models.checkpoint import Checkpoint
from kd.models.line import described
from kd.models.quantization import loading_settings
from kd.runs.environment import library_versions
from kd.runs.provenance import HELD_OUT, DataInput
from kd.training.settings import load_settings

if TYPE_CHECKING:
    from kd.config.served_recipe import ServedTeacher
    from kd.config.stage_recipe import StageRecipe
    from kd.data.examples import SourceReport

CARD = "README.md"
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Description:
    """What a stage's result is, in one paragraph, and how its method is cited."""

    text: str
    citation: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    inputs: the checkpoints by role; served: the teachers on servers by role;
    data: the sources of each route, eval sets under `eval.NAME`;
    reports: what became of these sources, in the same order; summary: as in run.json.
    """

    stage: str
    description: Description
    recipe: StageRecipe
    inputs: Mapping[str, Checkpoint]
    served: Mapping[str, ServedTeacher]
    data: Mapping[str, Sequence[DataInput]]
    reports: Mapping[str, Sequence[SourceReport]]
    summary: Mapping[str, Any]


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write README.md into `folder` over any other, such as the one that peft leaves there.

    Returns:
        The card's path.
    """
    sections = {
        "Models": _models(facts),
        "Data": _data(facts),
        **_start(facts.summary.get("start", {})),
        "Results": table(("measure", "value"), result_rows(_results(facts.summary))),
        "How to load it": _loading_code(facts.recipe) + _quantised_base(facts.recipe),
        "Recipe": f"```yaml\n{resolved_yaml(facts.recipe).rstrip()}\n```",
        "Made with": ", ".join(f"{name} {version}" for name, version in library_versions().items()),
    }
    if facts.description.citation:
        sections["Citation"] = facts.description.citation
    text = f"# {Path(facts.recipe.output).name}\n\n{facts.description.text}\n"
    text += "".join(f"\n## {title}\n\n{content}\n" for title, content in sections.items())
    card = ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{text}")
    path = folder / CARD
    card.save(path)
    return path


def _metadata(facts: CardFacts) -> ModelCardData:
    adapter = facts.recipe.lora is not None
    base = facts.recipe.base
    sources = [source.path for sources in facts.data.values() for source in sources]
    extra: dict[str, Any] = licence_of(facts.inputs["base"])
    if is_on_hub(base):
        extra |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    if on_hub := sorted({path for path in sources if is_on_hub(path)}):
        extra["datasets"] = on_hub
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["dae-align", facts.stage] + (["lora"] if adapter else []),
        **extra,
    )


def is_on_hub(path: str) -> bool:
    """Whether a path as typed is a hub id. A card on the hub may name nothing else."""
    return not Path(path).exists() and could_be_on_the_hub(path)


def licence_of(source: Checkpoint) -> dict[str, str]:
    """The licence that a checkpoint's own card states; nothing where it states none."""
    card = source.folder / CARD
    if not card.is_file():
        return {}
    stated = ModelCard.load(card, ignore_metadata_errors=True).data
    return {key: value for key in _LICENCE_KEYS if isinstance(value := stated.get(key), str)}


def _models(facts: CardFacts) -> str:
    licence = licence_of(facts.inputs["base"]).get("license")
    terms = (
        f"The base's card states the licence `{licence}`. " if licence else "The base's card states no licence. "
    ) + "The terms of the other models and of the data apply as well; they are not known to the toolkit."
    return f"{models_table(facts.inputs, facts.served)}\n\n{terms}"


def models_table(inputs: Mapping[str, Checkpoint], served: Mapping[str, ServedTeacher] | None = None) -> str:
    """Checkpoint and fingerprint of each role; of a teacher on a server its name and address."""
    rows = [(role, f"`{one}`", f"`{one.fingerprint}`") for role, one in inputs.items()]
    rows += [(role, f"`{one}`", "unknown") for role, one in (served or {}).items()]
    return table(("role", "checkpoint", "fingerprint (SHA-256 of weights and config)"), rows)


def _data(facts: CardFacts) -> str:
    trained = {route: sources for route, sources in facts.data.items() if not route.startswith(HELD_OUT)}
    held_out = {route: sources for route, sources in facts.data.items() if route.startswith(HELD_OUT)}
    text = _sources(trained, facts)
    if held_out:
        text += f"\n\nHeld out for evaluation during training:\n\n{_sources(held_out, facts)}"
    longest = facts.recipe.data.max_length
    return f"{text}\n\nCut: rows longer than {longest} tokens. Dropped: rows that gave no response token."


def _sources(routes: Mapping[str, Sequence[DataInput]], facts: CardFacts) -> str:
    """The sources of some routes, and what became of their rows."""
    head = ("route", "source", "rows", "cut", "dropped", "share of rows", "response tokens", "SHA-256")
    rows = [
        (
            route.removeprefix(HELD_OUT),
            f"`{source.path}`",
            f"{report.kept:,}",
            f"{report.truncated:,}",
            f"{sum(report.dropped.values()):,}",
            "" if source.share is None else f"{source.share:.1%}",
            f"{report.response_tokens:,}",
            f"`{source.sha256}`",
        )
        for route, sources in routes.items()
        for source, report in zip(sources, facts.reports[route], strict=True)
    ]
    return table(head, rows)


def _results(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ("rows", "dropped", "truncated", "start")}


def _start(facts: Mapping[str, Any]) -> dict[str, str]:
    """The section on where training started and which points were measured; none for `start: base`."""
    weights = facts.get("weights", {})
    if not weights:
        return {}
    text = f"On the line from the base to the experts: {described(weights)}."
    if "energy_kept" in facts:
        text += f" The adapter keeps {facts['energy_kept']:.1%} of that difference (squared norm)."
    if curve := facts.get("curve", []):
        routes = list(curve[0]["kl"])
        curve = sorted(curve, key=lambda point: list(point["weights"].values()))
        rows = [[described(point["weights"]), *(f"{point['kl'][route]:.4g}" for route in routes)] for point in curve]
        head = ["point measured", *(f"{route} KL, nats per token" for route in routes)]
        text += f"\n\n{table(head, rows)}"
    return {"Start": text}


def result_rows(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The summary's numbers with dotted names; losses and divergences are in nats per response token."""
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from result_rows(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)


def _loading_code(recipe: StageRecipe) -> str:
    remote = ", trust_remote_code=True" if recipe.trust_remote_code else ""
    output = str(recipe.output)
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if recipe.lora is None:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{output}", dtype="auto"{remote})')
    else:
        lines.insert(0, "from peft import PeftModel")
        how = 'dtype="auto"'
        if recipe.quantization is not None:
            dtype = load_settings(recipe).dtype
            given = ", ".join(f"{key}={value!r}" for key, value in loading_settings(recipe.quantization, dtype).items())
            lines[1] += ", BitsAndBytesConfig"
            lines.append(f"quantised = BitsAndBytesConfig({given})".replace("'", '"'))
            how = f'dtype="{str(dtype).removeprefix("torch.")}", quantization_config=quantised'
        lines.append(f'base = AutoModelForCausalLM.from_pretrained("{recipe.base}", {how}{remote})')
        lines.append(f'model = PeftModel.from_pretrained(base, "{output}")')
    lines += [
        f'tokenizer = AutoTokenizer.from_pretrained("{output}"{remote})',
        'inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _quantised_base(recipe: StageRecipe) -> str:
    """What whoever loads an adapter should know of the base that it was trained on."""
    if recipe.quantization is None:
        return ""
    text = (
        f"\n\nThe adapter was trained on a base whose linear layers were quantised ({recipe.quantization}, by "
        "bitsandbytes), as above. On the base as it is, or merged into it, it is another model, to be evaluated by "
        "itself."
    )
    rounded = " bitsandbytes also rounds the inputs of these layers to 8 bits, which the training did not."
    return text + (rounded if recipe.quantization == "int8" else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
