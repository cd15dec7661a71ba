"""The recipe of `dae run`: named stages in order, each with a section of its own.

    output: runs/path
    stages:
      expert:  {stage: sft, base: BASE, data: {train: shop.jsonl}}
      aligned: {stage: align, base: BASE, expert: {shop: "@expert"}, data: {general: general.jsonl}}

`stage` may be omitted if the name is a kind of stage. "@expert" is the output of the stage `expert`, "@expert/merged"
its merged weights. A stage writes to OUTPUT/NAME unless its section has an `output`. One message reports all problems
of all sections.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError

from dae.pipeline.kinds import found_at, kinds
from dae.pipeline.references import Draft, Input, misfits, parse
from dae.routing import GENERAL
from kd.config.data_recipe import ROUTE_NAME
from kd.config.flags import NAME_RULE
from kd.config.layering import Layers
from kd.config.loading import address
from kd.config.problems import NO_VALUE, Key, Problem, as_written, one_of, report, suggestion
from kd.config.schema import Frozen
from kd.errors import UserError

RECIPES = "recipes"  # the pipeline's subfolder for the stages' resolved recipes


class PipelineRecipe(Frozen):
    """`dae run`: the top-level keys."""

    verbatim: ClassVar[frozenset[str]] = frozenset({"stages"})

    output: str = Field(min_length=1, description="the pipeline's folder; stages write to folders inside it")
    stages: dict[str, Any] = Field(description="{name: {stage: KIND, ...}}, in order")

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        stages = raw.get("stages")
        return [Problem(("stages",), stages, "at least one stage is required")] if stages == {} else []

    @classmethod
    def key_elsewhere(cls, name: str) -> str | None:
        return f"stages.{name}" if name in kinds() else None


@dataclass(frozen=True)
class Stage:
    """One stage, ready to run. `recipe` has paths instead of references; `inputs` has both."""

    name: str
    kind: str
    recipe: Frozen
    inputs: tuple[Input, ...]

    @property
    def output(self) -> Path:
        """The folder that it writes, or the file if it writes rows."""
        output: str = self.recipe.output  # type: ignore[attr-defined]
        return Path(output)

    @property
    def upstream(self) -> frozenset[str]:
        """Names of the stages whose outputs it reads."""
        return frozenset(one.stage for one in self.inputs if one.stage is not None)

    def settings(self) -> dict[str, Any]:
        """The resolved section with references as written and without `output`: compared to detect changes."""
        values = self.recipe.model_dump(mode="json", by_alias=True, exclude={"output"})
        for one in self.inputs:
            if one.reference is not None:
                values = replaced(values, one.key, one.reference)
        return values


@dataclass(frozen=True)
class Pipeline:
    output: Path
    stages: tuple[Stage, ...]


@dataclass
class Loaded:
    """The valid sections read so far, and all problems."""

    path: Path
    layers: Layers
    output: Path | None
    drafts: dict[str, Draft]
    problems: list[Problem]

    def pipeline(self) -> Pipeline:
        """The pipeline. Raises UserError with all problems, in the order of the file."""
        if self.problems:
            order = ["", "output", *(f"stages.{name}" for name in self.layers.raw.get("stages") or ())]
            rank = {section: number for number, section in enumerate(order)}  # others come first
            ranked = sorted(self.problems, key=lambda problem: rank.get(".".join(map(str, problem.key[:2])), 0))
            raise report(ranked, self.layers.origins, str(self.path))
        assert self.output is not None
        stages = [Stage(d.name, d.kind, d.recipe, tuple(d.inputs)) for d in self.drafts.values() if d.recipe]
        return Pipeline(self.output, tuple(stages))


def pipeline_address(key: Key) -> Key:
    """The internal place of a dotted key: inside a section as in the stage's own recipe."""
    return (*key[:2], *address(key[2:])) if key[0] == "stages" else key


def read_pipeline(path: Path, assignments: Sequence[str] = ()) -> Loaded:
    """Read a pipeline's recipe, YAML < key=value, and validate every section. Reads no other file.

    Raises:
        UserError: the file is not a YAML mapping. Other mistakes are in the result's `problems`.
    """
    layers = Layers(pipeline_address)
    try:
        layers.read_yaml(path)
    except UserError as error:
        hint = ' (put references in quotes: "@NAME")' if "character '@'" in str(error) else ""
        raise UserError(f"{error}{hint}") from error
    # A YAML alias is one object in two sections: a key=value for one must not change the other.
    sections = layers.raw.get("stages")
    if isinstance(sections, Mapping):
        layers.raw["stages"] = {str(name): expanded(str(name), copy.deepcopy(s)) for name, s in sections.items()}
    for assignment in assignments:
        layers.put_assignment(assignment)
    problems = list(layers.problems)
    try:
        PipelineRecipe.model_validate(layers.raw)
    except ValidationError as error:
        problems += [Problem(line["loc"], line["input"], line["msg"]) for line in error.errors()]
    place, sections = layers.raw.get("output"), layers.raw.get("stages")
    output = Path(place) if isinstance(place, str) and place else None
    loaded = Loaded(path, layers, output, {}, problems)
    names = [str(name) for name in sections] if isinstance(sections, Mapping) else []
    for name in names:
        read_section(loaded, name, layers.raw["stages"][name], names)
    loaded.problems += same_outputs(loaded)
    return loaded


def kind_of(name: str, section: Mapping[str, Any]) -> Any:
    """A section's kind of stage: from `stage`, or from its name."""
    return section.get("stage", name if name in (*kinds(), "merge") else None)


def expanded(name: str, section: Any) -> Any:
    """A section with its short forms expanded; unchanged if its kind is unknown."""
    kind = kind_of(name, section) if isinstance(section, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds():
        return section
    return kinds()[kind].schema.expand({str(key): value for key, value in section.items()})


def read_section(loaded: Loaded, name: str, section: Any, names: Sequence[str]) -> None:
    """Validate one section: adds to `loaded.drafts` and `loaded.problems`."""
    found = section_problems(name, section)
    if found:
        loaded.problems += found
        return
    kind = str(kind_of(name, section))
    raw = {key: value for key, value in expanded(name, section).items() if key != "stage"}
    draft = Draft(name, kind, raw)
    if not raw.get("output"):
        ending = ".jsonl" if kinds()[kind].gives == "rows" else ""
        raw["output"] = str((loaded.output or Path()) / f"{name}{ending}")
    elif str(raw["output"]).startswith("@"):
        words = "must be a folder, not another stage's output"
        loaded.problems.append(Problem(("stages", name, "output"), raw["output"], words))
    draft.raw = with_rows_of_stages(draft, loaded.drafts)
    wrong = resolve(loaded, draft, names)
    schema = kinds()[kind].schema
    completed = schema.complete(draft.raw)
    known = {one.key for one in draft.inputs}
    draft.inputs += [one for one in external_inputs(kind, completed) if one.key not in known]
    try:
        draft.recipe = schema.model_validate(completed)
    except ValidationError as error:
        found = [Problem(draft.key(line["loc"]), line["input"], line["msg"]) for line in error.errors()]
        reported = {problem.key for problem in [*loaded.problems, *wrong]}
        wrong += [problem for problem in found if problem.key not in reported]
    loaded.problems += wrong
    loaded.drafts[name] = draft


def section_problems(name: str, section: Any) -> list[Problem]:
    """What prevents a section from being read."""
    key: Key = ("stages", name)
    if not ROUTE_NAME.fullmatch(name) and name not in kinds():
        return [Problem(key, NO_VALUE, f"invalid name: {NAME_RULE}")]
    if name == RECIPES:
        return [Problem(key, NO_VALUE, "this name is reserved for the stages' recipes: rename the stage")]
    if not isinstance(section, Mapping):
        return [Problem(key, section, "expected `key: value` pairs, including `stage`")]
    kind = kind_of(name, section)
    if kind == "merge":
        ways = one_of([kind for kind in kinds() if kind.startswith("merge ")])
        return [Problem((*key, "stage"), kind, f"expected {ways}")]
    if kind is None:
        return [Problem((*key, "stage"), NO_VALUE, f"is required: {one_of(list(kinds()))}")]
    if not isinstance(kind, str) or kind not in kinds():
        near = suggestion(kind, kinds()) if isinstance(kind, str) else ""
        return [Problem((*key, "stage"), kind, f"unknown stage; expected {one_of(list(kinds()))}{near}")]
    return []


def external_inputs(kind: str, raw: Mapping[str, Any]) -> list[Input]:
    """All inputs of a section, as if none were a reference."""
    return [
        Input(as_written(key), wanted, text, None)
        for pattern, wanted in kinds()[kind].schema.reads.items()
        for key, text in found_at(raw, pattern)
    ]


def resolve(loaded: Loaded, draft: Draft, names: Sequence[str]) -> list[Problem]:
    """Find a section's inputs and replace its references by paths; the problems found."""
    problems: list[Problem] = []
    outputs = {os.path.normpath(other.raw["output"]): other.name for other in loaded.drafts.values()}
    for pattern, wanted in kinds()[draft.kind].schema.reads.items():
        for key, text in list(found_at(draft.raw, pattern)):
            if not text.startswith("@"):
                problems += spelled_out(draft, key, text, outputs)
                draft.inputs.append(Input(as_written(key), wanted, text, None))
                continue
            reference = parse(text)
            upstream = loaded.drafts.get(reference.stage)
            if upstream is None:
                words = why_not(reference.stage, draft.name, loaded.drafts, names)
                problems.append(Problem(draft.key(key), text, words))
                path = text
            else:
                path = str(Path(upstream.raw["output"]) / reference.part)
            draft.raw = replaced(draft.raw, key, path)
            draft.inputs.append(Input(as_written(key), wanted, path, text))
    unfit = misfits(draft.kind, draft.inputs, loaded.drafts)
    return problems + [Problem(draft.key(key), text, words) for key, text, words in unfit]


def why_not(wanted: str, here: str, earlier: Mapping[str, Draft], names: Sequence[str]) -> str:
    """Why a reference is not to an earlier stage."""
    if wanted == here:
        return "is this stage itself; only earlier stages can be referenced"
    if wanted in names[names.index(here) :]:
        return f"is a later stage: move `{wanted}` before `{here}`"
    if wanted in names:
        return f"the section of `{wanted}` is invalid"
    return f"unknown stage{suggestion(wanted, earlier)}"


def spelled_out(draft: Draft, key: Key, text: str, outputs: Mapping[str, str]) -> list[Problem]:
    """An earlier stage's output given by its path: order and state of the stages would not follow it."""
    place = Path(os.path.normpath(text))
    for folder in (place, *place.parents):
        if str(folder) in outputs:
            part = place.relative_to(folder).as_posix()
            written = f"@{outputs[str(folder)]}" + ("" if part == "." else f"/{part}")
            return [Problem(draft.key(key), text, f'is the output of an earlier stage: write "{written}"')]
    return []


def replaced(values: Any, key: Key, value: str) -> Any:
    """A copy of nested mappings and lists with another value at one key."""
    if not key:
        return value
    part: Any = key[0]
    changed = dict(values) if isinstance(values, Mapping) else list(values)
    changed[part] = replaced(changed[part], key[1:], value)
    return changed


def with_rows_of_stages(draft: Draft, earlier: Mapping[str, Draft]) -> dict[str, Any]:
    """Rows that a section with experts omits, taken from the stages that write its checkpoints.

    The stage's own command takes them from run folders (dae/recorded_rows.py), which do not exist yet.
    """
    schema, raw = kinds()[draft.kind].schema, draft.raw
    experts, data = raw.get("expert"), raw.get("data")
    if not getattr(schema, "has_experts", False) or not isinstance(experts, Mapping) or not isinstance(data, Mapping):
        return raw
    routes = dict(data["routes"])
    for name, path in {**experts, GENERAL: raw.get("reference") or raw.get("base")}.items():
        upstream = earlier.get(parse(path).stage) if isinstance(path, str) and path.startswith("@") else None
        if name in routes or upstream is None:
            continue
        theirs = upstream.raw.get("data")
        known = theirs.get("routes", {}) if isinstance(theirs, Mapping) else {}
        sources = known.get(name, known.get("train"))
        if isinstance(sources, (list, tuple)):
            kept = [{k: v for k, v in s.items() if k in ("path", "split")} for s in sources if isinstance(s, Mapping)]
            routes[name] = kept
    return schema.expand({**raw, "data": {**data, "routes": routes}})


def same_outputs(loaded: Loaded) -> list[Problem]:
    """Stages that share an output, or write to the pipeline's own folder."""
    problems, owners = [], dict[str, str]()
    for draft in loaded.drafts.values():
        place = os.path.normpath(str(draft.raw["output"]))
        if place in owners:
            words = f"is also the output of `{owners[place]}`: use different folders"
            problems.append(Problem(draft.key(("output",)), draft.raw["output"], words))
        elif loaded.output is not None and Path(place) == Path(os.path.normpath(loaded.output)):
            words = "is the folder of the whole pipeline: use a folder inside it"
            problems.append(Problem(draft.key(("output",)), draft.raw["output"], words))
        owners.setdefault(place, draft.name)
    return problems
