"""Inputs of a fuzzer: a seed with some parts changed. Hypothesis, atheris or a random generator chooses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

Choose = Callable[[int], int]  # a number below the one given

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 1.5, float("nan"), float("inf"), 10**12, 10**30, -(10**12), "", " ", "x", "</s>",
    "<|im_end|>", "\ud83d", "\ue000", "\x00", "\x1b[31m", "a" * 300, "[]", "{}", '{"a": 1}', "[" * 50, "../../x",
    "/etc/passwd", "=1+1", "<script>", "[[7]]", "[[A]]", "<think>", [], [None], [[]], ["x"], {}, {"": None}, {"x": 1},
    {"role": "assistant"}, ["a", 1], "role", "assistant", "tool", "length", "train", "auto", "q_proj", "nan",
    "hub/name",
]  # fmt: skip
WORDS = [
    "{%", "%}", "{{", "}}", "for i in range(99999)", "endfor", "if", "endif", "set x = ", "messages", "m.content", "~",
    "loop", "(", ")", "[", "]", "{", "}", "'", '"', ":", ",", "-", "&a ", "*a ", "<<: ", "!!python/object:os.system ",
    "!x ", "|", "> ", "#", "\n", "\r\n", "\t", "  ", "\x00", "\x1b[2J", "\ufeff", "\u2028", "null", "true", "1e309",
    "0x7f", "[[7]]", "[[A]]", "<think>", "</think>", "namespace(a=1)", "macro f(n)", "endmacro", "{% generation %}",
    "{% endgeneration %}", "|tojson", "|trim", "* 10**9", "=", "==", "data.", "train.", ".0.", "lambda", "base", "/",
    "..",
]  # fmt: skip


def mutated_json(seed: Any, choose: Choose) -> Any:
    """A JSON value with up to three parts replaced, removed, wrapped, renamed, doubled or nested deeply."""
    holder = [copy.deepcopy(seed)]
    for _ in range(choose(4)):
        owner, last = _place(holder, choose)
        how = choose(7)
        if how == 1 and owner is not holder:
            del owner[last]
        elif how == 2:
            owner[last] = [owner[last]]
        elif how == 3 and isinstance(owner, dict):
            owner[str(ODD[choose(len(ODD))])[:40]] = owner.pop(last)
        elif how == 4 and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[last]))
        elif how == 5:
            owner[last] = copy.deepcopy(_part(seed, choose))
        elif how == 6 and choose(8) == 0:
            for _ in range(1 + choose(300)):
                owner[last] = [owner[last]]
        else:
            owner[last] = copy.deepcopy(ODD[choose(len(ODD))])
    return holder[0]


def _place(holder: list[Any], choose: Choose) -> tuple[Any, Any]:
    """The owner and key of some part, found from the root on."""
    owner: Any = holder
    key: Any = 0
    while isinstance(owner[key], (dict, list)) and owner[key] and choose(4):
        owner = owner[key]
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        key = keys[choose(len(keys))]
    return owner, key


def _part(value: Any, choose: Choose) -> Any:
    owner, key = _place([value], choose)
    return owner[key]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutated_text(seed: str, choose: Choose) -> str:
    """A text with up to four words or lines put in, removed, doubled or moved."""
    parts = re.findall(r"\w+|\s+|[^\w\s]+", seed)
    for _ in range(choose(5)):
        place, how = choose(len(parts) + 1), choose(5)
        if how == 0:
            parts.insert(place, WORDS[choose(len(WORDS))])
        elif how == 1:
            del parts[place : place + 1 + choose(4)]
        elif how == 2 and parts:
            other = choose(len(parts))
            parts[place:place] = parts[other : other + 1 + choose(12)]
        elif how == 3:
            parts[place : place + 1] = [WORDS[choose(len(WORDS))]]
        elif parts:
            parts[place:place] = parts[place - 1 : place] * (1 + choose(60))
    return "".join(parts)


def mutated_bytes(seed: bytes, choose: Choose) -> bytes:
    """Bytes with up to four changed, cut out, put in or repeated."""
    found = bytearray(seed)
    for _ in range(choose(5)):
        place, how = choose(len(found) + 1), choose(4)
        if how == 0:
            found[place : place + 1] = bytes([choose(256)])
        elif how == 1:
            del found[place : place + 1 + choose(64)]
        elif how == 2:
            found[place:place] = bytes([choose(256)]) * (1 + choose(16))
        else:
            found[place:place] = found[place : place + 1 + choose(64)]
    return bytes(found)


def one_of(seeds: Sequence[Any], choose: Choose) -> Any:
    return seeds[choose(len(seeds))]


def json_document(seeds: Sequence[Any], choose: Choose) -> bytes:
    """A changed JSON document; one in eight is changed as bytes, too."""
    written = as_json(mutated_json(one_of(seeds, choose), choose))
    return mutated_bytes(written, choose) if choose(8) == 0 else written


def json_lines(seeds: Sequence[Any], choose: Choose) -> bytes:
    return b"".join(json_document(seeds, choose) + b"\n" for _ in range(1 + choose(3)))


def text_document(seeds: Sequence[str], choose: Choose) -> bytes:
    written = mutated_text(one_of(seeds, choose), choose).encode("utf-8", "surrogatepass")
    return mutated_bytes(written, choose) if choose(8) == 0 else written
