"""References between stages ("@student", "@student/merged"), and whether they are of the expected kind."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dae.pipeline.kinds import kinds
from dae.stages import STAGES
from kd.config.problems import Key, as_written
from kd.config.schema import Frozen, Reads

MERGED = "merged"
EVALUATIONS = "evaluations"
_GIVEN = {"checkpoint": "a checkpoint", "rows": "rows", "evaluation": "an evaluation", "report": "a report"}


class Reference(NamedTuple):
    """`@STAGE` or `@STAGE/PART`."""

    stage: str
    part: str


@dataclass(frozen=True)
class Input:
    """One model, file or folder that a stage reads.

    key: in the section; path: as the stage's command gets it; reference: as written, or None.
    """

    key: Key
    wanted: Reads
    path: str
    reference: str | None

    @property
    def stage(self) -> str | None:
        """The stage that writes it, if any."""
        return None if self.reference is None else parse(self.reference).stage

    @property
    def name(self) -> str:
        return ".".join(str(part) for part in self.key)


@dataclass
class Draft:
    """A section being read: raw values, inputs, and its recipe if it is valid."""

    name: str
    kind: str
    raw: dict[str, Any]
    inputs: list[Input] = field(default_factory=list)
    recipe: Frozen | None = None

    def key(self, key: Key) -> Key:
        """A key of the section as written in the file."""
        return ("stages", self.name, *as_written(key))


def parse(text: str) -> Reference:
    return Reference(*text.removeprefix("@").partition("/")[::2])


def misfits(kind: str, inputs: Sequence[Input], earlier: Mapping[str, Draft]) -> Iterator[tuple[Key, str, str]]:
    """(key, reference, words) for every reference of another kind than expected."""
    for one in inputs:
        if one.reference is None:
            continue
        reference = parse(one.reference)
        upstream, part = earlier.get(reference.stage), reference.part
        if upstream is None:
            continue
        words = misfit(one.wanted, upstream, part) or ("" if part else other_base(kind, one, inputs, upstream))
        if words:
            yield one.key, one.reference, words


def misfit(wanted: Reads, upstream: Draft, part: str) -> str:
    """What is wrong with an output or a part of it; empty if nothing."""
    gives = kinds()[upstream.kind].gives
    if wanted in ("suite", "template"):
        return "stages do not write such files: use a path"
    if gives == "report" and wanted == "evaluation" and part.startswith(f"{EVALUATIONS}/"):
        return ""
    if gives != wanted.removeprefix("full "):
        more = f' (one of its evaluations is "@{upstream.name}/{EVALUATIONS}/ROLE")' if wanted == "evaluation" else ""
        expected = _GIVEN.get(wanted, f"a {wanted}")
        return f"expected {expected}, but `{upstream.name}` ({upstream.kind}) writes {_GIVEN[gives]}{more}"
    if part == MERGED and gives == "checkpoint":
        return "" if has_merged(upstream) else f"`{upstream.name}` writes no merged weights: {remedy(upstream)}"
    if part:
        return f'`{upstream.name}` has no part `{part}`: write "@{upstream.name}"'
    if wanted == "full checkpoint" and gives_adapter(upstream):
        return f"expected a full checkpoint, but this is an adapter: {remedy(upstream)}"
    return ""


def gives_adapter(upstream: Draft) -> bool:
    trains_adapter = upstream.kind in STAGES and upstream.raw.get("lora", True) is not None
    return trains_adapter or upstream.kind == "merge to-lora"


def has_merged(upstream: Draft) -> bool:
    return upstream.kind in STAGES and upstream.raw.get("merge") is True and gives_adapter(upstream)


def remedy(upstream: Draft) -> str:
    """How to get a stage's full weights."""
    if not gives_adapter(upstream):
        return f'its weights are full: write "@{upstream.name}"'
    if upstream.kind not in STAGES:
        return "use the checkpoint that it was made from"
    merge = "" if has_merged(upstream) else f"add `merge: true` to `{upstream.name}` and "
    return f'{merge}write "@{upstream.name}/{MERGED}"'


def other_base(kind: str, one: Input, inputs: Sequence[Input], upstream: Draft) -> str:
    """An adapter with a base that it was not trained on, if certain before anything has run."""
    if kind not in ("align", "report") or upstream.kind not in STAGES or not gives_adapter(upstream):
        return ""
    theirs = next((other for other in upstream.inputs if other.key == ("base",)), None)
    ours = next((other for key in ("base", "reference") for other in inputs if other.key == (key,)), None)
    if theirs is None or ours is None or ours is one:
        return ""
    same = os.path.normpath(theirs.path) == os.path.normpath(ours.path)
    if same or (theirs.reference is None and ours.reference is None):  # two paths may hold the same weights
        return ""
    on, here = theirs.reference or theirs.path, ours.reference or ours.path
    return f"is an adapter on {on}, but the {ours.name} is {here}: train it on that one, or {remedy(upstream)}"
