"""Recipes of `dae merge moe`, `dae merge weights` and `dae merge to-lora`. Importing this imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kd.config.data_recipe import ROUTE_NAME
from kd.config.flags import NAME_RULE, CommandRecipe, Flag, split_name
from kd.config.problems import NO_VALUE, Problem
from kd.config.schema import LARGEST_SEED, Frozen, Reads
from kd.errors import UserError

Gate = Literal["hidden", "cheap_embed", "random"]
Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_ties"]
BETWEEN = ("linear", "slerp")  # methods whose weight runs from the reference (0) to the expert (1)
LEAST_ENERGY = 0.9  # of the squared difference: with less, an adapter is no longer the expert
# TIES keeps the top 20 % in its paper; DARE's papers sweep the drop rate and name no default.
DEFAULT_DENSITY: Mapping[str, float] = {"ties": 0.2, "dare_ties": 0.5}

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


class MoeExpert(Frozen):
    """One expert of a mixture, and texts that should be routed to it."""

    path: str = Field(min_length=1, description="a dense checkpoint, or a LoRA folder on the base: folder or hub id")
    prompts: tuple[str, ...] = Field(
        default=(), description="texts for this expert; gates hidden and cheap_embed are made from them"
    )
    negative_prompts: tuple[str, ...] = Field(default=(), description="texts that are not for it")


class MergeRecipe(CommandRecipe):
    """A recipe of `dae merge`."""

    if TYPE_CHECKING:
        output: str

    @property
    def base_of_adapter(self) -> str | None:
        """The model that the result is an adapter on; None: the result is a checkpoint of its own."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """What the result is, for its model card."""


class MoeRecipe(MergeRecipe):
    """`dae merge moe`: the MLPs of several dense checkpoints as the experts of one mixture."""

    summary: ClassVar[str] = "Build a mixture of experts, such as a 2x7B, from dense checkpoints."
    flags: ClassVar[tuple[Flag, ...]] = (
        Flag("base", "base", "CKPT", "attention, norms and embeddings"),
        Flag("expert", "experts", "[NAME=]CKPT", "MLPs of one expert; repeats; set its prompts in the recipe", True),
        Flag("gate", "gate", None, "hidden, cheap_embed or random"),
    )
    reads: ClassVar[Mapping[str, Reads]] = {"base": "full checkpoint", "experts.*.path": "checkpoint"}

    base: str = Field(min_length=1, description="attention, norms and embeddings: folder or hub id")
    experts: dict[str, MoeExpert] = Field(
        description="checkpoints whose MLPs become experts: {name: {path, prompts}}, or a list (named 0, 1, ...)"
    )
    gate: Gate = Field(
        default="hidden", description="initial router: from the prompts' hidden states, their embeddings, or random"
    )
    experts_per_token: int = Field(default=2, ge=1, description="experts that each token is routed to")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="seed of the random gate")
    output: str = Field(min_length=1, description="the run folder to write")

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        flags, names = super().from_flags({**given, "expert": None})
        for place, text in enumerate(given.get("expert") or ()):
            name, path = split_name(text)
            if (key := f"experts.{name or place}.path") in flags:
                raise UserError(f"--expert {text}: duplicate name `{name}`")
            flags[key], names[key] = path, "--expert"
        return flags, names

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
            problems.append(Problem(("experts",), NO_VALUE, "at least two are required: add --expert PATH"))
        each = raw.get("experts_per_token", 2)
        if isinstance(each, int) and 2 <= len(experts) < each:
            problems.append(Problem(("experts_per_token",), each, f"must be at most the {len(experts)} experts"))
        return problems + prompt_problems(experts, raw.get("gate", "hidden"))

    def describe(self) -> str:
        names = ", ".join(f"`{expert.path}`" for expert in self.experts.values())
        return (
            f"A mixture of experts: `{self.base}` with the MLPs of {names} as its experts, "
            f"{self.experts_per_token} of them for each token. Attention, norms and embeddings are the base's; the "
            f"router is initialised by the gate `{self.gate}`. Made with mergekit, without training."
        )


def expert_name_problems(experts: Mapping[str, Any]) -> list[Problem]:
    numbered = [name for name in experts if str(name).isdigit()]
    problems = [
        Problem(("experts", str(name)), NO_VALUE, NAME_RULE)
        for name in experts
        if name not in numbered and not ROUTE_NAME.fullmatch(str(name))
    ]
    if numbered and len(numbered) < len(experts):
        words = "give all experts a name or none: --expert NAME=PATH"
        problems.append(Problem(("experts", numbered[0]), NO_VALUE, words))
    return problems


def prompt_problems(experts: Mapping[str, Any], gate: Any) -> list[Problem]:
    """Gates made from prompts need some for every expert, and not the same ones for all."""
    if gate not in ("hidden", "cheap_embed"):
        return []
    texts = {name: expert.get("prompts", ()) for name, expert in experts.items() if isinstance(expert, Mapping)}
    problems = [
        Problem(
            ("experts", name, "prompts"),
            NO_VALUE,
            f"is required by gate `{gate}`: add texts for this expert to the recipe "
            f"(experts.{name}.prompts: [...]), or use --gate random",
        )
        for name, prompts in texts.items()
        if not prompts
    ]
    unwanted = [expert.get("negative_prompts", ()) for expert in experts.values() if isinstance(expert, Mapping)]
    if not problems and len(texts) > 1 and len(set(map(str, zip(texts.values(), unwanted, strict=True)))) == 1:
        words = "are the same for all experts: the router needs different ones for each"
        problems.append(Problem(("experts", next(iter(texts)), "prompts"), NO_VALUE, words))
    return problems


class WeightsRecipe(MergeRecipe):
    """`dae merge weights`: reference and expert merged by arithmetic on their weights."""

    summary: ClassVar[str] = "Merge the weights of reference and expert. Also weight=, density=, seed=."
    flags: ClassVar[tuple[Flag, ...]] = (
        Flag("method", "method", None, "linear, slerp, task_arithmetic, ties or dare_ties"),
        Flag("base", "base", "CKPT", "origin of task vectors; base of adapters"),
        Flag("reference", "reference", "CKPT", "general model (default: the base)"),
        Flag("expert", "expert", "CKPT", "domain model: checkpoint or LoRA folder"),
    )
    reads: ClassVar[Mapping[str, Reads]] = {
        "base": "full checkpoint",
        "reference": "checkpoint",
        "expert": "checkpoint",
    }

    method: Method = Field(description="linear and slerp interpolate; the others add task vectors to the base")
    base: str = Field(min_length=1, description="origin of task vectors and base of adapters: folder or hub id")
    reference: str | None = Field(default=None, min_length=1, description="the general model; null: the base")
    expert: str = Field(min_length=1, description="the domain model: a checkpoint or a LoRA folder")
    weight: float = Field(
        ge=0,
        description="linear, slerp: from the reference (0) to the expert (1), default 0.5; others: factor of the "
        "merged task vector, default 1",
    )
    density: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of each task vector to keep: ties, the largest (null: 0.2); dare_ties, random (null: 0.5)",
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="seed of the entries that dare_ties keeps")
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
            problems.append(Problem(("weight",), weight, f"must be at most 1 with {method}"))
        if raw.get("density") is not None and method not in DEFAULT_DENSITY:
            problems.append(Problem(("density",), raw["density"], "is only read by ties and dare_ties: remove it"))
        return problems

    def describe(self) -> str:
        how = _METHODS[self.method].format(weight=self.weight, density=self.density or 1.0)
        return f"A merge: {how}. Made with mergekit, without training."


class ToLoraRecipe(MergeRecipe):
    """`dae merge to-lora`: the difference of a fully fine-tuned expert to the reference, as a LoRA adapter."""

    summary: ClassVar[str] = "Convert a fully fine-tuned expert to a LoRA adapter that shares the backbone."
    flags: ClassVar[tuple[Flag, ...]] = (
        Flag("reference", "reference", "CKPT", "base of the adapter"),
        Flag("expert", "expert", "CKPT", "fully fine-tuned checkpoint"),
        Flag("rank", "rank", None, "rank of every matrix"),
        Flag("energy", "energy", None, "instead of --rank: share of the squared difference to keep"),
    )
    reads: ClassVar[Mapping[str, Reads]] = {"reference": "full checkpoint", "expert": "full checkpoint"}

    reference: str = Field(min_length=1, description="base of the adapter: folder or hub id")
    expert: str = Field(min_length=1, description="the fully fine-tuned checkpoint")
    rank: int | None = Field(default=None, ge=1, description="rank of every matrix; set this or `energy`")
    energy: float | None = Field(
        default=None, gt=0, le=1, description="share of each matrix's squared difference to keep; sets its rank"
    )
    min_energy: float = Field(
        default=LEAST_ENERGY, ge=0, le=1, description="fail if less of the matrices' squared difference is kept"
    )
    max_left_out: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="fail if more of the whole squared difference is in embeddings, output layer, norms and biases",
    )
    output: str = Field(min_length=1, description="the run folder to write")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        rank, energy = raw.get("rank"), raw.get("energy")
        if rank is None and energy is None:
            return [Problem(("rank",), NO_VALUE, "is required: add --rank, or --energy (such as 0.99)")]
        if rank is not None and energy is not None:
            return [Problem(("energy",), energy, "cannot be combined with rank: remove one")]
        return energy_problems(raw)

    @property
    def base_of_adapter(self) -> str:
        return self.reference

    def describe(self) -> str:
        return (
            f"A LoRA adapter on `{self.reference}` made from `{self.expert}`, a full fine-tune of it: the singular "
            "value decomposition of each matrix's difference, truncated to a rank. Made without training."
        )


def energy_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """`energy` below the default min_energy: the result would be refused."""
    energy, least = raw.get("energy"), LEAST_ENERGY
    if "min_energy" in raw or not isinstance(energy, (int, float)) or not 0 < energy < least:
        return []
    return [Problem(("energy",), energy, f"is below min_energy ({least:g}): raise it, or add min_energy={energy:g}")]
