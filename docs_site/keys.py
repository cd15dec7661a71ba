"""Every key of every recipe, as `dae keys` shows it, and the flags that set some of them."""

from __future__ import annotations

from html import escape

from dae.commands.keys import schemas
from dae.pipeline.kinds import kinds
from dae.pipeline.recipe import PipelineRecipe
from docs_site.inline import with_code
from kd.config.flags import CommandRecipe
from kd.config.key_docs import KeyDoc, key_docs
from kd.config.schema import Frozen


def section() -> str:
    """A heading for each recipe: what its command does, its flags, and a list of its keys."""
    return "\n\n".join(one(name, schema) for name, schema in listed().items())


def listed() -> dict[str, type[Frozen]]:
    """The recipes of `dae keys`, that of `dae run`, and its stages that have none of their own."""
    stages = {f"run-{name}": kind.schema for name, kind in kinds().items() if kind.command_line}
    return {**schemas(), "run": PipelineRecipe, **stages}


def one(name: str, schema: type[Frozen]) -> str:
    parts = [f"## {title(name)}", *about(schema), key_list(name, key_docs(schema))]
    return "\n\n".join(parts)


def title(name: str) -> str:
    """The heading of a recipe: the command that reads it."""
    if name == "suite":
        return "An evaluation suite: `dae report --suite`"
    if name.startswith("run-"):
        return f"Stage `{name.removeprefix('run-')}` of `dae run`"
    return f"`dae {name.replace('merge-', 'merge ')}`"


def about(schema: type[Frozen]) -> list[str]:
    """What the command of a recipe does, and the keys that its flags set."""
    if issubclass(schema, CommandRecipe):
        flags = (f"`--{flag.name}` sets `{flag.key}`" for flag in schema.flags)
        return [schema.summary, f"Flags: {', '.join(flags)}."]
    if schema is PipelineRecipe:
        names = ", ".join(f"`{kind}`" for kind in kinds())
        return [f'A pipeline. Kinds of stage: {names}. `"@NAME"` is the output of stage NAME.']
    return []


def key_list(recipe: str, docs: list[KeyDoc]) -> str:
    """The keys of one recipe in HTML; each has an anchor, `RECIPE.KEY`."""
    return "\n".join(["<dl class='keys'>", *(key_item(recipe, doc) for doc in docs), "</dl>"])


def key_item(recipe: str, doc: KeyDoc) -> str:
    default = "required" if doc.default == "required" else f"default <code>{escape(doc.default)}</code>"
    return (
        f"<dt id='{escape(f'{recipe}.{doc.key}')}'><code>{escape(doc.key)}</code> "
        f"<span>{escape(doc.type)}, {default}</span></dt><dd>{with_code(doc.meaning)}</dd>"
    )
