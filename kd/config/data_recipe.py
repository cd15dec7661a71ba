"""Rows in a recipe: sources, routes, shares."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_serializer

from kd.config.in_memory_rows import InMemoryRows
from kd.config.problems import NO_VALUE, Problem, suggestion
from kd.config.schema import PATH_TAG, ROWS_TAG, Frozen, plain

Format = Literal["messages", "prompt-completion", "text", "sharegpt", "alpaca", "prompt-response"]


FORMATS: tuple[Format, ...] = get_args(Format)


SHARE_TOLERANCE = 1e-6


ROUTE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def _kind(value: Any) -> str:
    return ROWS_TAG if isinstance(value, InMemoryRows) else PATH_TAG


RowsChoice = Annotated[
    Annotated[Annotated[str, Field(min_length=1)], Tag(PATH_TAG)] | Annotated[InMemoryRows, Tag(ROWS_TAG)],
    Discriminator(_kind),
]


class SourceRecipe(Frozen):
    """One place that rows come from; in Python, also rows in memory."""

    path: RowsChoice = Field(
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

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.path.name if isinstance(self.path, InMemoryRows) else self.path


def expand_sources(value: Any) -> Any:
    """A path, a source, or a list of either, as a tuple of sources; anything else is left for validation."""
    if isinstance(value, (str, InMemoryRows, Mapping)):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        return value
    return [{"path": item} if isinstance(item, (str, InMemoryRows)) else item for item in value]


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
            if isinstance(value, (str, InMemoryRows, Mapping, list, tuple)):
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
    return {name: [source.model_dump() for source in sources] for name, sources in routes.items()}


def route_name_problems(data: Mapping[str, Any]) -> list[Problem]:
    """Route names that dotted keys cannot express, and routes without a source."""
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
            problems.append(Problem(("routes", name), (), "no source: add a path"))
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
        return [Problem(next(iter(given)), next(iter(given.values())), f"the shares sum to {total:g}, not 1")]
    return []


def held_out_problems(held_out: Any) -> list[Problem]:
    """Held-out rows are all read, once: a share or a repetition of them means nothing."""
    if not isinstance(held_out, Mapping):
        return []
    return [
        Problem(("eval", name, place, key), source[key], "an eval set is read once, as a whole: remove it")
        for name, sources in held_out.items()
        if isinstance(sources, tuple)
        for place, source in enumerate(sources)
        if isinstance(source, Mapping)
        for key in ("share", "repeat")
        if source.get(key) not in (None, False)
    ]


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
