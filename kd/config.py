"""The recipe: one frozen, fully typed description of a run, and how it is put together.

A recipe comes from a YAML file, overridden by flags, overridden by `key=value`. All that is wrong with it is told in
one message. Nothing here imports torch; only `train` needs transformers to be checked, when it is not empty.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from kd.layers import Layers, RecipeDumper
from kd.problems import MISSING, NO_VALUE, Key, Problem, as_written, in_plain_words, report, suggestion
from kd.record_forms import Format
from kd.training_arguments import argument_types, training_argument_problems

SHARE_TOLERANCE = 1e-6
LARGEST_SEED = 2**32 - 1  # numpy, which transformers seeds along with torch, takes none above
ROUTE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
Recipe = TypeVar("Recipe", bound="Frozen")


def plain(value: Any) -> Any:
    """Paths as text and lists as tuples, all the way down: what frozen, strictly typed fields take."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


class Frozen(BaseModel):
    """Base of all recipes: immutable, exact types (no "3" for 3), unknown keys refused, all problems told at once."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", validate_by_name=True, validate_by_alias=True, allow_inf_nan=False
    )
    verbatim: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Short forms written out (a bare path becomes {path: ...}), so that dotted keys reach what they name."""
        return raw

    @classmethod
    def complete(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """What can be looked up instead of asked for, filled in. `raw` is expanded, and may be wrong anywhere."""
        return raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        """Problems between keys. `raw` is expanded, and may be wrong anywhere: single keys are checked elsewhere."""
        return []

    @classmethod
    def key_elsewhere(cls, name: str) -> str | None:
        """The dotted key that an unknown key of this name belongs to, if there is one."""
        return None

    @model_validator(mode="wrap")
    @classmethod
    def _tell_all_problems(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(raw, cls) or not isinstance(raw, Mapping):
            return handler(raw)
        raw = cls.expand({key: value if key in cls.verbatim else plain(value) for key, value in raw.items()})
        problems: list[Problem] = []
        try:
            recipe = handler(raw)
        except ValidationError as error:
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for line in error.errors():
                value = NO_VALUE if line["type"] == "missing" else line["input"]
                elsewhere = cls.key_elsewhere(str(line["loc"][-1])) if line["type"] == "extra_forbidden" else None
                words = f"stands in another place: write `{elsewhere}`" if elsewhere else in_plain_words(line, known)
                problems.append(Problem(line["loc"], value, words))
        problems += cls.cross_checks(raw)
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, [as_pydantic(problem) for problem in problems])
        return recipe


def as_pydantic(problem: Problem) -> InitErrorDetails:
    """A problem as pydantic carries it up from a nested recipe."""
    # Not PydanticCustomError's own template fields: the words may hold braces.
    kind = PydanticCustomError("recipe", "{words}", {"words": problem.message})
    return InitErrorDetails(type=kind, loc=problem.key, input=problem.value)


class SourceRecipe(Frozen):
    """One place that rows come from."""

    path: str = Field(
        min_length=1,
        description="a file (JSONL, JSON, CSV, parquet; gzip too), a folder of such or saved by `datasets`, a hub id",
    )
    share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="this source's share of all training rows; for every source or for none, sum 1",
    )
    repeat: bool = Field(
        default=False, description="start over when used up (oversampling), instead of ending the epoch"
    )
    split: str = Field(default="train", description="which split of a folder or hub data set")
    format: Format | None = Field(default=None, description="the shape of its rows; null: each row's keys tell")


class LoraRecipe(Frozen):
    """The student's adapter."""

    rank: int = Field(default=16, ge=1, description="rank of the update")
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="which layers: all-linear, a regular expression, or a list of module names"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _text_or_names(cls, value: Any) -> Any:
        named = isinstance(value, tuple) and value and all(isinstance(name, str) for name in value)
        if not named and not (isinstance(value, str) and value):
            raise ValueError("wants all-linear, a regular expression, or a list of module names")
        return value


def expand_sources(value: Any) -> Any:
    """A path, a source, or a list of either, as a tuple of sources; anything else is left for validation."""
    if isinstance(value, (str, Mapping)):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        return value
    return [{"path": item} if isinstance(item, str) else item for item in value]


class DataRecipe(Frozen):
    """The rows: settings, and one list of sources for each route.

    In YAML the routes stand beside the settings (`data: {max_length: 2048, general: a.jsonl, ecom: b.jsonl}`).
    """

    max_length: int = Field(default=2048, ge=2, description="longest row in tokens; longer ones are cut on the right")
    append_eos: bool | None = Field(
        default=None, description="end token after the response; null: for prompt/completion pairs, not for text"
    )
    packing: bool = Field(default=False, description="several rows to one sequence, instead of padding")
    chat_template: str | None = Field(
        default=None,
        description="`plain` (built in) or a .jinja file, for tokenizers without a chat template of their own; "
        "`expert`: the expert's (align)",
    )
    special_tokens: Literal["parse", "literal"] = Field(
        default="parse",
        description="control tokens that `text`, `prompt` and `completion` strings spell: read as such, or as text",
    )
    empty_responses: Literal["drop", "keep"] = Field(
        default="drop", description="answers without a character: without loss, or learnt as an end token"
    )
    allow_lossy_tokenizer: bool = Field(
        default=False, description="train although the tokenizer loses characters of many rows"
    )
    routes: dict[str, tuple[SourceRecipe, ...]] = Field(
        default_factory=dict, description="training rows of a route: a path, a source, or a list of them"
    )
    eval: dict[str, tuple[SourceRecipe, ...]] = Field(
        default_factory=dict, description="held-out rows of a route: the same forms"
    )

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        settings = {key: value for key, value in raw.items() if key in cls.model_fields and key != "routes"}
        given = raw.get("routes", {})
        routes = dict(given) if isinstance(given, Mapping) else {"routes": given}
        for key, value in raw.items():
            if key in cls.model_fields:
                continue
            if isinstance(value, (str, Mapping, list, tuple)):
                routes[key] = value
            else:
                settings[key] = value
        settings["routes"] = {name: plain(expand_sources(value)) for name, value in routes.items()}
        if isinstance(settings.get("eval"), Mapping):
            settings["eval"] = {name: plain(expand_sources(value)) for name, value in settings["eval"].items()}
        return settings

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        return [*route_name_problems(raw), *share_problems(raw["routes"]), *held_out_problems(raw.get("eval"))]

    @model_serializer(mode="plain")
    def _as_written(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in type(self).model_fields if name not in ("routes", "eval")}
        written = {**settings, **sources_as_written(self.routes)}
        return {**written, "eval": sources_as_written(self.eval)} if self.eval else written

    @property
    def has_shares(self) -> bool:
        """Whether the recipe names shares; otherwise `default_shares` makes them from the numbers of rows."""
        return any(source.share is not None for sources in self.routes.values() for source in sources)


DATA_SETTINGS = frozenset(DataRecipe.model_fields) - {"routes"}


def sources_as_written(routes: Mapping[str, Sequence[SourceRecipe]]) -> dict[str, Any]:
    """Routes as they stand in a resolved recipe."""
    return {name: [source.model_dump() for source in sources] for name, sources in routes.items()}


def route_name_problems(data: Mapping[str, Any]) -> list[Problem]:
    """Names that could not be told apart from dotted keys, and routes without a source."""
    problems = []
    for name, sources in data["routes"].items():
        if not isinstance(name, str) or not ROUTE_NAME.fullmatch(name):
            problems.append(
                Problem(
                    ("routes", str(name)),
                    NO_VALUE,
                    "a route's name starts with a letter and has letters, digits, - and _ only",
                )
            )
        elif isinstance(sources, tuple) and not sources:
            problems.append(Problem(("routes", name), (), "has no source: add a path"))
    return problems


def share_problems(routes: Mapping[str, Any]) -> list[Problem]:
    """Shares are given for every source of all routes and sum to 1, or for none."""
    shares = {
        ("routes", name, place, "share"): source.get("share")
        for name, sources in routes.items()
        if isinstance(sources, tuple)
        for place, source in enumerate(sources)
        if isinstance(source, Mapping)
    }
    given = {key: share for key, share in shares.items() if share is not None}
    if not given or any(isinstance(share, bool) or not isinstance(share, (int, float)) for share in given.values()):
        return []
    missing = [key for key in shares if key not in given]
    if missing:
        words = "is missing: give every source of all routes a share (they sum to 1), or none"
        return [Problem(key, NO_VALUE, words) for key in missing]
    total = sum(given.values())
    if abs(total - 1) > SHARE_TOLERANCE:
        return [Problem(next(iter(given)), next(iter(given.values())), f"all shares together are {total:g}, not 1")]
    return []


def held_out_problems(held_out: Any) -> list[Problem]:
    """Held-out rows are all read, once: a share or a repetition of them means nothing."""
    if not isinstance(held_out, Mapping):
        return []
    return [
        Problem(("eval", name, place, key), source[key], "held-out rows are read once, all of them: remove it")
        for name, sources in held_out.items()
        if isinstance(sources, tuple)
        for place, source in enumerate(sources)
        if isinstance(source, Mapping)
        for key in ("share", "repeat")
        if source.get(key) not in (None, False)
    ]


class StageRecipe(Frozen):
    """What every training stage is told."""

    verbatim: ClassVar[frozenset[str]] = frozenset({"train"})
    has_experts: ClassVar[bool] = False

    base: str = Field(min_length=1, description="checkpoint that training starts from: folder or hub id")
    output: str = Field(min_length=1, description="the run folder to write")
    seed: int = Field(
        default=0, ge=0, le=LARGEST_SEED, description="decides the order of rows, the adapter's start and dropout"
    )
    data: DataRecipe = Field(description="rows and how they are read")
    lora: LoraRecipe | None = Field(
        default=LoraRecipe(), description="the adapter that trains; null: all weights train"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the weights; auto: bfloat16 on a GPU that has it, else float32"
    )
    attn_implementation: str | None = Field(
        default=None, description="of the models, as in transformers: sdpa, eager, ..."
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with a checkpoint")
    merge: bool = Field(default=False, description="also write the merged full weights of a LoRA student")
    router_aux_loss: float = Field(
        default=0.0,
        ge=0,
        description="weight of the loss that keeps a mixture's experts in use (Switch Transformer); 0: off",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better one; needs data.eval"
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="transformers.TrainingArguments by name, such as learning_rate"
    )

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> dict[str, Any]:
        data = raw.get("data", {})
        return {**raw, "data": DataRecipe.expand(dict(data))} if isinstance(data, Mapping) else raw

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        data, train = raw.get("data"), raw.get("train")
        problems = []
        if isinstance(train, Mapping):
            held_out = isinstance(data, Mapping) and bool(data.get("eval"))
            problems += training_argument_problems(train, held_out)
        if isinstance(data, Mapping) and data.get("chat_template") == "expert" and not cls.has_experts:
            words = "this stage has no expert: give `plain` or a .jinja file"
            problems.append(Problem(("data", "chat_template"), "expert", words))
        if raw.get("merge") is True and "lora" in raw and raw["lora"] is None:
            problems.append(Problem(("merge",), True, "with `lora: null` the weights are written whole: remove it"))
        if isinstance(data, Mapping) and not data.get("eval"):
            words = "needs held-out rows: add `data.eval`"
            if raw.get("early_stopping_patience") is not None:
                problems.append(Problem(("early_stopping_patience",), raw["early_stopping_patience"], words))
            if isinstance(train, Mapping) and str(train.get("eval_strategy", "no")) not in ("no", "False"):
                problems.append(Problem(("train", "eval_strategy"), train["eval_strategy"], words))
        return problems

    @classmethod
    def key_elsewhere(cls, name: str) -> str | None:
        nested = {f"data.{key}": key for key in DATA_SETTINGS} | {f"lora.{key}": key for key in LoraRecipe.model_fields}
        found = next((dotted for dotted, key in nested.items() if key == name), None)
        if found or suggestion(name, cls.model_fields):
            return found
        return f"train.{name}" if name in argument_types() else None  # imports transformers: last


class SftRecipe(StageRecipe):
    """`dae sft`: next-token loss on response tokens of the route `train`."""

    @classmethod
    def cross_checks(cls, raw: Mapping[str, Any]) -> list[Problem]:
        return [*super().cross_checks(raw), *route_problems(raw, {"train": "add --data PATH"})]


def route_problems(raw: Mapping[str, Any], wanted: Mapping[str, str]) -> list[Problem]:
    """Routes that are missing (`wanted`: name -> remedy) or that the stage does not have."""
    data = raw.get("data", {})
    if not isinstance(data, Mapping):
        return []
    routes, held_out = data.get("routes", {}), data.get("eval", {})
    problems = [
        Problem(("data", name), NO_VALUE, f"no training rows for `{name}`: {remedy}")
        for name, remedy in wanted.items()
        if name not in routes
    ]
    for name in routes:
        if name not in wanted:
            near = suggestion(name, DATA_SETTINGS | set(wanted))
            words = f"unknown key or route; the routes are {', '.join(wanted)}{near}"
            problems.append(Problem(("data", "routes", name), NO_VALUE, words))
    for name in held_out if isinstance(held_out, Mapping) else ():
        if name not in wanted:
            words = f"unknown route; the routes are {', '.join(wanted)}{suggestion(name, wanted)}"
            problems.append(Problem(("data", "eval", name), NO_VALUE, words))
    return problems


def default_shares(
    rows: Mapping[str, Sequence[int]], route_shares: Mapping[str, float] | None = None
) -> dict[str, tuple[float, ...]]:
    """Shares of rows for sources that were given none.

    Args:
        rows: for each route, the number of usable rows of each of its sources.
        route_shares: each route's share of all rows (sum 1); None: by its number of rows.

    Returns:
        For each route, its sources' shares of all rows: inside a route by number of rows. All together they are 1.
    """
    total = sum(sum(counts) for counts in rows.values())
    shares = {}
    for route, counts in rows.items():
        route_share = sum(counts) / total if route_shares is None else route_shares[route]
        shares[route] = tuple(route_share * count / sum(counts) for count in counts)
    return shares


def address(key: Key) -> Key:
    """Where a key, as the user writes it, lies: routes stand beside the settings of `data`, and are kept apart."""
    if len(key) > 1 and key[0] == "data" and key[1] not in DataRecipe.model_fields:
        return ("data", "routes", *key[1:])
    return key


def load_recipe(
    schema: type[Recipe],
    path: Path | None,
    flags: Mapping[str, Any],
    assignments: Sequence[str] = (),
    flag_names: Mapping[str, str] | None = None,
) -> Recipe:
    """Puts a recipe together: YAML < flags < key=value.

    Args:
        schema: which stage's recipe.
        path: the YAML file, if there is one.
        flags: dotted key -> value; a value of None means that the flag was not given.
        assignments: `key=value`, values read as YAML.
        flag_names: dotted key -> the flag as typed, for messages; `--key` where it names none.

    Raises:
        UserError: one message with everything that is wrong.
    """
    layers = Layers(address)
    if path is not None:
        layers.read_yaml(Path(path))
    layers.raw = schema.expand(layers.raw)
    names = flag_names or {}
    for name, value in flags.items():
        if value is not None:
            layers.put(tuple(name.split(".")), value, names.get(name, f"--{name.replace('_', '-')}"))
    layers.raw = schema.expand(layers.raw)
    for assignment in assignments:
        layers.put_assignment(assignment)
    problems = list(layers.problems)
    try:
        recipe = schema.model_validate(schema.complete(schema.expand(layers.raw)))
    except ValidationError as error:
        told = {tuple(str(part) for part in problem.key) for problem in problems}
        found = [Problem(line["loc"], line["input"], line["msg"]) for line in error.errors()]
        problems += [problem for problem in found if tuple(str(part) for part in problem.key) not in told]
    if problems:
        told_how = [with_remedy(problem, flags, names) for problem in problems]
        raise report(told_how, layers.origins, str(path) if path else "command line")
    return recipe


def with_remedy(problem: Problem, flags: Mapping[str, Any], names: Mapping[str, str]) -> Problem:
    """A missing key with the flag or key that gives it."""
    if problem.message != MISSING:
        return problem
    key = ".".join(str(part) for part in as_written(problem.key))
    way = names.get(key, f"--{key.replace('_', '-')}") if key in flags else f"`{key}`"
    return replace(problem, message=f"{MISSING}: add {way}")


def resolved_yaml(recipe: Frozen) -> str:
    """The recipe with every default written out, in the order of the schema; `load_recipe` reads it back the same."""
    values = recipe.model_dump(mode="json", by_alias=True)
    return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
