"""Recipes of `dae align` and `dae sample`: experts paired with their rows, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, field_validator

from dae.routing import GENERAL
from kd.config import DATA_SETTINGS, LARGEST_SEED, ROUTE_NAME, Frozen, StageRecipe, route_problems
from kd.errors import UserError
from kd.fingerprints import data_sha256
from kd.problems import NO_VALUE, Problem
from kd.provenance import read_provenance

UNNAMED = "domain"  # what an expert without a name is called


class AlignRecipe(StageRecipe):
    """`dae align`: the student matches each expert on the rows of its route, and the reference on `general`."""

    has_experts: ClassVar[bool] = True

    output: str = Field(default="runs/align", min_length=1, description="the run folder to write")
    expert: dict[str, str] = Field(
        description="each domain's teacher: a path, or {name: path}; a LoRA folder, a checkpoint or a hub id"
    )
    reference: str | None = Field(default=None, min_length=1, description="teacher of general rows; null: the base")
    student_from: str | None = Field(
        default=None, min_length=1, description="go on from an earlier student: its run folder"
    )
    lambda_: float = Field(
        default=1.0, ge=0, le=1, alias="lambda", description="weight of the divergence; the rest is next-token loss"
    )
    temperature: float = Field(default=1.0, gt=0, description="both distributions are softened by it")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl", description="between teacher and student: KL(t||s), KL(s||t), or between them"
    )
    beta: float = Field(default=0.5, ge=0, le=1, description="of jsd: 0 is forward KL, 1 is reverse KL")
    weights: Literal["routes", "tokens"] | dict[str, float] = Field(
        default="routes", description="each route the same say, each token the same say, or a factor for each route"
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _routes_tokens_or_factors(cls, value: Any) -> Any:
        if value in ("routes", "tokens") or isinstance(value, Mapping):
            return value
        raise ValueError("wants routes, tokens, or a factor for each route, such as {general: 1.0, domain: 2.0}")

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        raw = super().expand(raw)
        return {**raw, "expert": {UNNAMED: raw["expert"]}} if isinstance(raw.get("expert"), str) else raw

    @classmethod
    def complete(cls, raw: dict[str, Any]) -> dict[str, Any]:
        return complete_from_run_folders(raw)

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        problems = super().cross_checks(raw)
        if raw.get("beta", 0.5) != 0.5 and raw.get("divergence", "forward_kl") != "jsd":
            problems.append(
                Problem(("beta",), raw["beta"], "is read with `divergence: jsd` only: set that, or remove it")
            )
        experts = raw.get("expert")
        if not isinstance(experts, Mapping):
            return problems
        problems += expert_problems(experts)
        problems += route_problems(
            raw, {GENERAL: general_remedy(raw)} | {str(n): domain_remedy(n, p) for n, p in experts.items()}
        )
        return problems + weight_problems(raw.get("weights"), [GENERAL, *experts])


def expert_problems(experts: Mapping[str, Any]) -> list[Problem]:
    """No expert at all, names that another key has, and empty paths."""
    if not experts:
        return [Problem(("expert",), NO_VALUE, "names no expert: add one, such as --expert PATH")]
    problems = []
    for name, path in experts.items():
        if name == GENERAL:
            problems.append(
                Problem(("expert", name), path, "`general` is the reference's route: give the expert another name")
            )
        elif name in DATA_SETTINGS or not ROUTE_NAME.fullmatch(str(name)):
            words = "cannot be a route's name (letters, digits, - and _, and no setting of `data`): give it another"
            problems.append(Problem(("expert", str(name)), path, words))
        elif path == "":
            problems.append(Problem(("expert", name), path, "must not be empty"))
    return problems


def weight_problems(weights: Any, routes: list[str]) -> list[Problem]:
    """Factors are numbers above 0, one for each route."""
    if not isinstance(weights, Mapping):
        return []
    problems = [
        Problem(("weights", name), NO_VALUE, "has no factor: give one for each route")
        for name in routes
        if name not in weights
    ]
    for name, factor in weights.items():
        if name not in routes:
            problems.append(Problem(("weights", str(name)), factor, f"is no route; the routes are {', '.join(routes)}"))
        elif isinstance(factor, (int, float)) and not isinstance(factor, bool) and not factor > 0:
            problems.append(Problem(("weights", name), factor, "must be above 0"))
    return problems


def domain_remedy(name: str, path: Any) -> str:
    """What to add where an expert's rows are not known, and why its run folder does not tell them."""
    flag = "--domain-data PATH" if name == UNNAMED else f"--domain-data {name}=PATH"
    return f"add {flag}{why_unknown(path, name)}"


def general_remedy(raw: Mapping[str, Any]) -> str:
    """The same for general rows."""
    path = raw.get("reference") or raw.get("base")
    return f"add --general-data PATH (`dae sample` writes such rows){why_unknown(path, GENERAL)}"


def why_unknown(path: Any, route: str) -> str:
    """Why the run folder at `path` does not tell the rows, as the end of a sentence."""
    if not isinstance(path, str) or not path:
        return ""
    found = recorded_sources(path, route)
    return f"; {found}" if isinstance(found, str) else ""


def complete_from_run_folders(raw: dict[str, Any]) -> dict[str, Any]:
    """Rows that a recipe does not name, as the run folders of its checkpoints tell them.

    An expert's rows are those that it was trained on; general rows are those of the reference (or the base). A file is
    used only if its content still is what it was then. Settings of single sources, such as `data.domain.0.share=0.2`,
    go over them.
    """
    experts, data = raw.get("expert"), raw.get("data")
    if not isinstance(experts, Mapping) or not isinstance(data, Mapping):
        return raw
    routes = dict(data["routes"])
    for name, path in {**experts, GENERAL: raw.get("reference") or raw.get("base")}.items():
        settings = settings_by_place(routes.get(name, ()))
        if not isinstance(path, str) or settings is None:
            continue
        routes.pop(name, None)
        found = recorded_sources(path, name)
        if not isinstance(found, str):
            routes[name] = with_settings(found, settings, name, path)
    return {**raw, "data": {**data, "routes": routes}}


def settings_by_place(route: Any) -> Mapping[str, Any] | None:
    """{"0": {"share": 0.2}} where that is all that is written of a route; None where it names rows of its own.

    `data.domain.0.share=0.2` leaves this behind where nothing stands at `data.domain`, read as a single source.
    """
    if not isinstance(route, Sequence) or len(route) > 1:
        return None
    written = route[0] if route else {}
    return written if isinstance(written, Mapping) and all(str(place).isdigit() for place in written) else None


def with_settings(
    sources: Sequence[Mapping[str, Any]], settings: Mapping[Any, Any], route: str, folder: str
) -> list[dict[str, Any]]:
    """Sources with settings over them, by place. Raises UserError for a place that none of them has."""
    found = [dict(source) for source in sources]
    for place, values in settings.items():
        if int(place) >= len(found):
            last = f"only 0 to {len(found) - 1}" if len(found) > 1 else "only 0"
            raise UserError(f"data.{route}.{place}: {folder} was trained on no such source for it: {last}")
        found[int(place)] |= values
    return found


def recorded_sources(folder: str, route: str) -> list[dict[str, Any]] | str:
    """The sources that a run folder was trained on: those of its route of this name, else those of `train`.

    Returns:
        The sources, without shares (those belong to the run they were recorded in); or, as text, why there are none.
    """
    provenance = read_provenance(folder)
    if provenance is None:
        return f"{folder} is no run folder of dae, which would tell"
    data = provenance.get("data", {})
    name = route if route in data else "train"
    if name not in data:
        return f"{folder} was not trained on rows for it"
    splits = recorded_splits(Path(folder) / "recipe.yaml", name)
    sources = []
    for place, source in enumerate(data[name]):
        try:
            unchanged = data_sha256(source["path"]) == source["sha256"]
        except UserError:
            from_here = "" if Path(source["path"]).is_absolute() else " from this folder"
            return f"{folder} was trained on {source['path']}, which is not there{from_here}"
        if not unchanged:
            return f"{folder} was trained on {source['path']}, which has changed since"
        sources.append({"path": source["path"], "split": splits[place] if place < len(splits) else "train"})
    return sources


def recorded_splits(recipe: Path, route: str) -> list[str]:
    """The split of each source of a route, from a run folder's resolved recipe."""
    if not recipe.is_file():
        return []
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return [source["split"] for source in written["data"].get(route, [])]


class SampleRecipe(Frozen):
    """`dae sample`: a model writes general rows itself."""

    model: str = Field(min_length=1, description="checkpoint that writes: folder or hub id")
    output: str = Field(min_length=1, description="the JSONL file to write")
    rows: int = Field(default=1000, ge=1, description="how many rows")
    max_new_tokens: int = Field(default=256, ge=1, description="longest row in tokens; the model's context caps it")
    temperature: float = Field(default=1.0, gt=0, description="of the sampling; 1 is the model's own distribution")
    batch_size: int = Field(default=16, ge=1, description="rows written at a time")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="the same seed gives the same rows")
    prompts: str | None = Field(
        default=None,
        min_length=1,
        description="a JSONL file whose prompts are answered; null: the model starts by itself",
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the checkpoint")
