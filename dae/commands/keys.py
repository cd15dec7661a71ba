"""`dae keys`: every key of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from dae.commands.schemas import schemas
from kd.config.problems import one_of
from kd.errors import UserError


def keys(
    stage: Annotated[str, typer.Argument(metavar=f"[{'|'.join(schemas())}]")] = "align",
) -> None:
    """List every key of a recipe with type, default and meaning."""
    known = schemas()
    if stage not in known:
        raise UserError(f"{stage}: no such recipe; expected {one_of(list(known))}")
    from rich.console import Console
    from rich.markup import escape

    from kd.config.key_docs import key_docs

    console = Console(highlight=False)
    for doc in key_docs(known[stage]):
        default = "required" if doc.default == "required" else f"default {doc.default}"
        console.print(f"[bold]{escape(doc.key)}[/]  {escape(doc.type)}, {escape(default)}", soft_wrap=True)
        console.print(f"    {escape(doc.meaning)}", soft_wrap=True)
