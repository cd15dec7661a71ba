"""What an operation in a chat template costs, known before it is carried out (see kd.models.template_limits)."""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sized, ValuesView
from typing import Any

from jinja2.utils import Namespace

NODE = 8  # weight of an element or a value: the bytes of a pointer
PARTS = 1_000_000  # a value with more of them (or one that contains itself) weighs without end
ENDLESS = 1 << 62
CHEAP_FILTERS = frozenset(("length", "count", "first", "last", "default", "d", "safe"))
CHEAP_TESTS = frozenset(
    ("defined", "undefined", "none", "boolean", "true", "false", "integer", "float", "number", "string", "mapping",
     "sequence", "iterable", "callable", "filter", "test", "escaped", "sameas")
)  # fmt: skip
_DIGITS = re.compile(r"\d+")
_WIDTH_FROM_ARGUMENT = re.compile(r"\*|\{[^}]*\{")
_SMALL = 1 << 63


def weight(value: Any) -> int:
    """Characters of a value's strings, and `NODE` for each of its parts."""
    if type(value) is str:
        return len(value) + NODE
    total, seen, parts = 0, 0, [value]
    while parts:
        part = parts.pop()
        total += NODE
        seen += 1
        if seen > PARTS:
            return ENDLESS
        if isinstance(part, (str, bytes)):
            total += len(part)
        elif isinstance(part, int):
            total += part.bit_length() // 8
        elif isinstance(part, (list, tuple, KeysView, ItemsView, ValuesView)):
            parts.extend(part)
        elif isinstance(part, Mapping):
            parts.extend(part.keys())
            parts.extend(part.values())
        elif isinstance(part, range):
            total += NODE * len(part)
        elif isinstance(part, Namespace):
            parts.append(getattr(part, "_Namespace__attrs"))  # noqa: B009 # a private name, which mypy does not know
    return total


def cost_of_operator(operator: str, left: Any, right: Any) -> int:
    """Of `left operator right`."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return _cost_of_arithmetic(operator, left, right)
    if operator == "*":
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        return weight(repeated) * max(times, 0) if isinstance(times, int) else NODE
    if operator == "%" and isinstance(left, (str, bytes)):
        return _formatted(left, (right,), {})
    return weight((left, right))


def _cost_of_arithmetic(operator: str, left: float, right: float) -> int:
    if not isinstance(left, int) or not isinstance(right, int):
        return 1
    if operator == "**":
        return (left.bit_length() * max(right, 0)) ** 2 >> 16
    if -_SMALL < left < _SMALL and -_SMALL < right < _SMALL:
        return 1
    return 1 + (left.bit_length() * right.bit_length() >> 10)


def cost_of_call(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Of a filter, test or method: its name, what it is applied to, its arguments."""
    cost = _COSTS.get(name)
    if cost is not None:
        return cost(value, args, kwargs)
    return weight(value) + _plainly(args, kwargs)


def _plainly(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Arguments are read once; a number may be a width or a count."""
    return sum(weight(part) + 8 * _size(part) for part in (*args, *kwargs.values()))


def _size(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


Cost = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], int]


def _arguments(_value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return weight((args, kwargs))


def _times(factor: int) -> Cost:
    return lambda value, args, kwargs: factor * (weight(value) + _plainly(args, kwargs))


def _squared(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return (weight(value) + _plainly(args, kwargs)) ** 2


def _product(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """What is applied to, times the arguments."""
    return weight(value) * (1 + _plainly(args, kwargs))


def _replaced(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    if kwargs or len(args) < 2 or not all(type(part) is str for part in (value, *args[:2])):
        return _product(value, args, kwargs)
    return len(value) + value.count(args[0]) * len(args[1]) + NODE


def _split(value: Any, args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> int:
    """A piece takes the memory of an object."""
    if type(value) is str and args and type(args[0]) is str and args[0]:
        return len(value) + 64 * (value.count(args[0]) + 1)
    return 32 * weight(value)


def _joined(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """A filter's list is its value, a method's its argument; neither is a generator here."""
    parts, between = (args[0], value) if isinstance(value, (str, bytes)) and args else (value, (args, kwargs))
    return 8 * weight(parts) + (len(parts) if isinstance(parts, Sized) else 1) * weight(between)


def _formatted(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """`%` or `str.format`: each field may be any argument, as wide as a number in the text or an argument says."""
    text = str(value)
    fields = text.count("%") + text.count("{") + 1
    widths = sum(int(digits) if len(digits) < 12 else ENDLESS for digits in _DIGITS.findall(text))
    if _WIDTH_FROM_ARGUMENT.search(text):
        widths += sum(map(_size, _flat((*args, *kwargs.values()))))
    return weight(text) + fields * (8 * weight((args, kwargs)) + widths)


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(tuple(value))
        elif isinstance(value, Mapping):
            yield from _flat(tuple(value.values()))
        else:
            yield value


def _indented(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    lines = value.count("\n") + 1 if isinstance(value, str) else weight(value)
    return weight(value) + lines * (4 + _plainly(args, kwargs))


def _as_json(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Each part may stand on a line of its own, behind an indent for each level above it."""
    whole = 8 * weight(value)
    if not args and not kwargs:
        return whole
    parts, depth = _shape(value)
    return whole + parts * (depth + 1) * _plainly(args, kwargs)


def _shape(value: Any) -> tuple[int, int]:
    """How many parts a value has, and how deep they lie."""
    found, deepest, parts = 0, 0, [(value, 0)]
    while parts and found <= PARTS:
        part, depth = parts.pop()
        found, deepest = found + 1, max(deepest, depth)
        inner = part.values() if isinstance(part, Mapping) else part if isinstance(part, (list, tuple)) else ()
        parts.extend((one, depth + 1) for one in inner)
    return found, deepest


def _sum(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    lists = any(isinstance(part, (list, tuple)) for part in (*args, *kwargs.values()))
    return _product(value, ((value,),), {}) if lists else weight(value)


_COSTS: Mapping[str, Cost] = {
    "get": _arguments, "items": _arguments, "keys": _arguments, "values": _arguments,
    "replace": _replaced, "split": _split, "splitlines": _times(32), "list": _times(64),
    "join": _joined, "format": _formatted, "format_map": _formatted, "indent": _indented, "tojson": _as_json,
    "strip": _product, "lstrip": _product, "rstrip": _product, "trim": _product,  # each character is looked up
    "rfind": _product, "rindex": _product, "rsplit": _product, "rpartition": _product,  # Python searches naively
    "expandtabs": _product, "translate": _product, "wordwrap": _product, "round": _squared, "sum": _sum,
    "pprint": _squared, "urlize": _squared, "striptags": _squared, "xmlattr": _times(8), "escape": _times(8),
    "e": _times(8), "forceescape": _times(8), "urlencode": _times(8), "string": _times(8), "sort": _times(32),
    "dictsort": _times(32), "groupby": _times(32), "unique": _times(32), "min": _times(32), "max": _times(32),
    "strftime_now": _times(256), "generate_lorem_ipsum": _squared,
}  # fmt: skip
