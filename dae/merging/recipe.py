"""Recipes of `dae merge moe`, `dae merge weights` and `dae merge to-lora`. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from kd.config.data_recipe import ROUTE_NAME
from kd.config.problems import NO_VALUE, Problem
from kd.config.schema import LARGEST_SEED, Frozen, Reads

Gate = Literal["hidden", "cheap_embed", "random"]
Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_ties"]
BETWEEN = ("linear", "slerp")  # methods whose weight is a place between reference (0) and expert (1)
LEAST_ENERGY = 0.9  # of the squared difference: with less, an adapter is hardly the expert any more
# TIES keeps the top 20 % in its paper; DARE's papers sweep the drop rate and name no default.
DEFAULT_DENSITY: Mapping[str, float] = {"ties": 0.2, "dare_ties": 0.5}


class MoeExpert(Frozen):
    """One expert of a mixture, and what should be routed to it."""

    path: str = Field(min_length=1, description="a dense checkpoint, or a LoRA folder on the base: folder or hub id")
    prompts: tuple[str, ...] = Field(
        default=(), description="texts that belong to this expert; gates hidden and cheap_embed are made from them"
    )
    negative_prompts: tuple[str, ...] = Field(default=(), description="texts that do not belong to it")


class MoeRecipe(Frozen):
    """`dae merge moe`: the MLPs of several dense checkpoints as the experts of one mixture."""

    reads: ClassVar[Mapping[str, Reads]] = {"base": "full checkpoint", "experts.*.path": "checkpoint"}

    base: str = Field(min_length=1, description="attention, norms and embeddings come from it: folder or hub id")
    experts: dict[str, MoeExpert] = Field(
        description="whose MLPs become experts: {name: {path, prompts}}, or a list of them (named 0, 1, ...)"
    )
    gate: Gate = Field(
        default="hidden",
        description="the router's start: from prompts' hidden states, from their embeddings, or random as a new layer",
    )
    experts_per_token: int = Field(default=2, ge=1, description="how many experts each token passes through")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="of the random gate")
    output: str = Field(min_length=1, description="the run folder to write")

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        experts = raw.get("experts")
        if isinstance(experts, (list, tuple)):
            experts = {str(place): expert for place, expert in enumerate(experts)}
        if not isinstance(experts, Mapping):
            return raw
        written_out = {name: {"path": e} if isinstance(e, str) else e for name, e in experts.items()}
        return {**raw, "experts": written_out}

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        experts = raw.get("experts")
        if not isinstance(experts, Mapping):
            return []
        problems = expert_name_problems(experts)
        if len(experts) < 2:
            problems.append(Problem(("experts",), NO_VALUE, "a mixture has at least two experts: add --expert PATH"))
        each = raw.get("experts_per_token", 2)
        if isinstance(each, int) and 2 <= len(experts) < each:
            words = f"is more than the {len(experts)} experts there are"
            problems.append(Problem(("experts_per_token",), each, words))
        return problems + prompt_problems(experts, raw.get("gate", "hidden"))


def expert_name_problems(experts: Mapping[str, Any]) -> list[Problem]:
    """Names that no dotted key could reach, and numbered experts beside named ones."""
    numbered = [name for name in experts if str(name).isdigit()]
    problems = [
        Problem(("experts", str(name)), NO_VALUE, "a name starts with a letter and has letters, digits, - and _ only")
        for name in experts
        if name not in numbered and not ROUTE_NAME.fullmatch(str(name))
    ]
    if numbered and len(numbered) < len(experts):
        words = "has no name beside named ones: write --expert NAME=PATH"
        problems.append(Problem(("experts", numbered[0]), NO_VALUE, words))
    return problems


def prompt_problems(experts: Mapping[str, Any], gate: Any) -> list[Problem]:
    """A gate that is made from prompts needs some for every expert, and not the same ones for all."""
    if gate not in ("hidden", "cheap_embed"):
        return []
    said = {name: expert.get("prompts", ()) for name, expert in experts.items() if isinstance(expert, Mapping)}
    problems = [
        Problem(
            ("experts", name, "prompts"),
            NO_VALUE,
            f"is missing: gate `{gate}` is made from texts that belong to each expert; give some in the recipe "
            f"(experts.{name}.prompts: [...]), or choose --gate random",
        )
        for name, prompts in said.items()
        if not prompts
    ]
    unwanted = [expert.get("negative_prompts", ()) for expert in experts.values() if isinstance(expert, Mapping)]
    if not problems and len(said) > 1 and len(set(map(str, zip(said.values(), unwanted, strict=True)))) == 1:
        words = "are the same for all experts, so the router could not tell them apart: give each its own"
        problems.append(Problem(("experts", next(iter(said)), "prompts"), NO_VALUE, words))
    return problems


class WeightsRecipe(Frozen):
    """`dae merge weights`: a checkpoint between or beside others by arithmetic on their weights, without training."""

    reads: ClassVar[Mapping[str, Reads]] = {
        "base": "full checkpoint",
        "reference": "checkpoint",
        "expert": "checkpoint",
    }

    method: Method = Field(description="linear and slerp between reference and expert; the others add task vectors")
    base: str = Field(
        min_length=1, description="what task vectors are counted from, and what adapters stand on: folder or hub id"
    )
    reference: str | None = Field(default=None, min_length=1, description="the general model; null: the base")
    expert: str = Field(min_length=1, description="the domain's model: a checkpoint or a LoRA folder")
    weight: float = Field(
        ge=0,
        description="linear, slerp: place between reference (0) and expert (1), default 0.5; others: factor of the "
        "merged task vector, default 1",
    )
    density: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of each task vector that is kept: ties, the largest (null: 0.2); dare_ties, at random "
        "(null: 0.5)",
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="which entries dare_ties keeps")
    output: str = Field(min_length=1, description="the run folder to write")

    @classmethod
    def complete(cls, raw: dict[str, Any]) -> dict[str, Any]:
        method, filled = raw.get("method"), dict(raw)
        if raw.get("weight") is None:
            filled["weight"] = 0.5 if method in BETWEEN else 1.0
        if raw.get("density") is None and isinstance(method, str) and method in DEFAULT_DENSITY:
            filled["density"] = DEFAULT_DENSITY[method]
        if method in BETWEEN and "base" not in raw and raw.get("reference"):
            filled["base"] = raw["reference"]
        return filled

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        method, weight, problems = raw.get("method"), raw.get("weight"), []
        if method in BETWEEN and isinstance(weight, (int, float)) and weight > 1:
            problems.append(Problem(("weight",), weight, f"{method} goes from the reference, 0, to the expert, 1"))
        if raw.get("density") is not None and method not in DEFAULT_DENSITY:
            words = "is read by ties and dare_ties only: choose one of them, or remove it"
            problems.append(Problem(("density",), raw["density"], words))
        return problems


class ToLoraRecipe(Frozen):
    """`dae merge to-lora`: what a fully fine-tuned expert learnt, as a LoRA adapter on the reference."""

    reads: ClassVar[Mapping[str, Reads]] = {"reference": "full checkpoint", "expert": "full checkpoint"}

    reference: str = Field(min_length=1, description="the checkpoint that the adapter is to stand on: folder or hub id")
    expert: str = Field(min_length=1, description="the fully fine-tuned checkpoint")
    rank: int | None = Field(default=None, ge=1, description="of every matrix; give this or `energy`")
    energy: float | None = Field(
        default=None, gt=0, le=1, description="share of each matrix's squared difference to keep; its rank follows"
    )
    min_energy: float = Field(
        default=LEAST_ENERGY, ge=0, le=1, description="refuse when less of the matrices' squared difference is kept"
    )
    max_left_out: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="refuse when more of the whole squared difference lies where no LoRA goes: embeddings, output "
        "layer, norms, biases",
    )
    output: str = Field(min_length=1, description="the run folder to write")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        rank, energy = raw.get("rank"), raw.get("energy")
        if rank is None and energy is None:
            words = "is missing: give --rank, or --energy (such as 0.99) to have ranks follow from it"
            return [Problem(("rank",), NO_VALUE, words)]
        if rank is not None and energy is not None:
            return [Problem(("energy",), energy, "rank and energy are two ways to say the same: give one of them")]
        return energy_problems(raw)


def energy_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """Less energy asked for than the result must keep, where that is not said to be meant."""
    energy, least = raw.get("energy"), LEAST_ENERGY
    if "min_energy" in raw or not isinstance(energy, (int, float)) or not 0 < energy < least:
        return []
    words = f"is below min_energy ({least:g} unless you say otherwise), under which a result is refused: give at least "
    words += f"{least:g}, or also min_energy={energy:g}"
    return [Problem(("energy",), energy, words)]


MergeRecipe = MoeRecipe | WeightsRecipe | ToLoraRecipe
