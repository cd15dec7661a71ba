"""A command's flags, declared beside the keys of its recipe that they set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from kd.config.data_recipe import ROUTE_NAME
from kd.config.schema import Frozen

NAME_RULE = "a name starts with a letter and has only letters, digits, - and _"


class Flag(NamedTuple):
    """`--NAME METAVAR` sets the recipe's dotted key; a flag that repeats sets a list."""

    name: str
    key: str
    metavar: str | None
    help: str
    repeats: bool = False


BASE = Flag("base", "base", "CKPT", "checkpoint that training starts from")
ROWS = Flag("data", "data.train", "PATH", "training rows; repeats", repeats=True)


class CommandRecipe(Frozen):
    """A recipe with a command of its own: `dae X` is built from these flags (dae/commands/recipe_command.py)."""

    summary: ClassVar[str] = ""  # the command's help
    flags: ClassVar[tuple[Flag, ...]] = ()  # besides --output and --recipe

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Flags as typed (NAME with _ -> value, None where not given) as dotted keys; and each key's flag."""
        keys = {flag.name.replace("-", "_"): flag.key for flag in cls.flags} | {"output": "output"}
        flags = {key: given.get(name) for name, key in keys.items()}
        return flags, {flag.key: f"--{flag.name}" for flag in cls.flags}


def split_name(text: str) -> tuple[str | None, str]:
    """NAME=PATH -> (NAME, PATH). A text whose first part cannot be a name is a path without one."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and ROUTE_NAME.fullmatch(name) else (None, text)
