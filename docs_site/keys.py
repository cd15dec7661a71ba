"""Every key of every recipe, as `dae keys` shows it."""

from __future__ import annotations

from html import escape

from dae.commands.keys import schemas
from docs_site.inline import with_code
from kd.config.key_docs import KeyDoc, key_docs


def section() -> str:
    """A heading for each recipe, and a list of its keys."""
    return "\n\n".join(f"## {title(name)}\n\n{key_list(name, key_docs(schema))}" for name, schema in schemas().items())


def title(name: str) -> str:
    """The heading of a recipe: the command that reads it."""
    if name == "suite":
        return "An evaluation suite: `dae report --suite`"
    return f"`dae {name.replace('merge-', 'merge ')}`"


def key_list(recipe: str, docs: list[KeyDoc]) -> str:
    """The keys of one recipe in HTML; each has an anchor, `RECIPE.KEY`."""
    return "\n".join(["<dl class='keys'>", *(key_item(recipe, doc) for doc in docs), "</dl>"])


def key_item(recipe: str, doc: KeyDoc) -> str:
    default = "required" if doc.default == "required" else f"default <code>{escape(doc.default)}</code>"
    return (
        f"<dt id='{escape(f'{recipe}.{doc.key}')}'><code>{escape(doc.key)}</code> "
        f"<span>{escape(doc.type)}, {default}</span></dt><dd>{with_code(doc.meaning)}</dd>"
    )
