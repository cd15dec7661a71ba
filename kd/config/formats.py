"""The shapes that rows may come in."""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal["messages", "prompt-completion", "text", "sharegpt", "alpaca", "prompt-response"]


FORMATS: tuple[Format, ...] = get_args(Format)
