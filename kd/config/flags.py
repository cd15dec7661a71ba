"""Flags of a stage's command, declared beside the keys that they give."""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    """`--NAME METAVAR` gives the recipe's dotted key; a flag that repeats gives a list."""

    name: str
    key: str
    metavar: str
    help: str
    repeats: bool = False


BASE = Flag("base", "base", "CKPT", "checkpoint that training starts from")
ROWS = Flag("data", "data.train", "PATH", "training rows; repeats", repeats=True)
