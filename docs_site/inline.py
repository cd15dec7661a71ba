"""Text of the code, in HTML."""

from __future__ import annotations

import re
from html import escape


def with_code(text: str) -> str:
    """A sentence in HTML; what stands in backticks becomes code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text)).replace("\n", "<br>")
