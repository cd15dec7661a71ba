"""YAML < flags < key=value: the layers of a recipe laid over each other, and where each key was written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from kd.config.problems import NO_VALUE, Key, Origins, Problem
from kd.errors import UserError

LONGEST_FILE = 1_000_000  # characters
MOST_NODES = 100_000  # of a recipe
_UNCOUNTED = 0


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: 2e-5 is a number, `no` and `on` are words."""


class RecipeDumper(yaml.SafeDumper):
    """Writes what RecipeLoader reads back the same."""


KEPT_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
NUMBERS_AND_BOOLEANS = {
    "bool": (r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"[-+]?[0-9]+(_[0-9]+)*$", "-+0123456789"),
    "float": (
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}
for side in (RecipeLoader, RecipeDumper):
    side.yaml_implicit_resolvers = {first: list(resolvers) for first, resolvers in KEPT_RESOLVERS.items()}
    for tag, (pattern, first_characters) in NUMBERS_AND_BOOLEANS.items():
        side.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first_characters))


def decimal(loader: RecipeLoader, node: yaml.ScalarNode) -> int:
    """A whole number: 007 is 7, which YAML 1.1 would read as octal."""
    return int(str(loader.construct_scalar(node)).replace("_", ""))


RecipeLoader.add_constructor("tag:yaml.org,2002:int", decimal)


def dotted(name: str) -> Key:
    """`data.shop.0.share` as a key; numbers count places of a list."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


class Layers:
    """The recipe under construction: `raw` (nested dictionaries), `origins` (where each key stands), `problems`."""

    def __init__(self, address: Callable[[Key], Key]) -> None:
        """`address` says where a key, as the user writes it, lies inside `raw`."""
        self.address = address
        self.raw: dict[str, Any] = {}
        self.origins = Origins()
        self.problems: list[Problem] = []

    def read_yaml(self, path: Path) -> None:
        """Lays the file's keys at the bottom.

        Raises:
            UserError: the file is missing, no text, empty, no YAML, or no `key: value` pairs.
        """
        node, value = parse_file(path)
        for key, mark, words in walk(node, ()):
            origin = f"{path}:{mark.line + 1}"
            self.origins.put(key, origin)
            if words:
                self.problems.append(Problem(key, NO_VALUE, words, origin))
        self.raw = value

    def put(self, key: Key, value: Any, origin: str) -> None:
        """Lays one value over what stands at `key`, making the dictionaries on the way there."""
        self.origins.put(key, origin)
        node: Any = self.raw
        *way, last = self.address(key)
        for part in way:
            node = self.step_into(node, part, key)
            if node is None:
                return
        if isinstance(node, list):
            place = self.place_in(node, last, key)
            if place is not None:
                node[place] = value
        else:
            node[str(last)] = value

    def step_into(self, node: Any, part: str | int, key: Key) -> Any:
        """The container under `part`, or None where there cannot be one; a scalar or null gives way to a dictionary."""
        index: Any = part if isinstance(node, dict) else self.place_in(node, part, key)
        if index is None:
            return None
        if isinstance(node, dict):
            index = str(index)
            node.setdefault(index, None)
        child = node[index]
        if isinstance(child, tuple):
            child = list(child)
        elif not isinstance(child, (dict, list)):
            child = {}
        node[index] = child
        return child

    def place_in(self, node: list[Any], part: str | int, key: Key) -> int | None:
        """The entry of the list that `part` counts, or None, after noting a problem, if there is none."""
        if isinstance(part, int) and part < len(node):
            return part
        words = f"`{part}` is no place in a list of {len(node)}; places count from 0"
        self.problems.append(Problem(key, NO_VALUE, words))
        return None

    def put_assignment(self, assignment: str) -> None:
        """Lays one `key=value` of the command line on top; the value is read as YAML."""
        name, equals, text = assignment.partition("=")
        key = dotted(name)
        if not equals or not all(part != "" for part in key):
            words = "is neither a flag nor key=value, such as train.learning_rate=2e-5"
            self.problems.append(Problem((), NO_VALUE, words, f"`{assignment}`"))
            return
        try:
            node, value = parsed(text)
            places = [] if node is None else list(walk(node, key))
        except (yaml.YAMLError, RecursionError):
            self.problems.append(Problem(key, text, "cannot be read as a YAML value: put it in quotes", assignment))
            return
        self.problems += [Problem(inner, NO_VALUE, words, assignment) for inner, _, words in places if words]
        self.put(key, value, assignment)


def parse_file(path: Path) -> tuple[yaml.Node, dict[str, Any]]:
    """The file's node tree (for line numbers) and its value."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: recipe file not found; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the recipe file in it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(text) > LONGEST_FILE:
        raise UserError(f"{path}: has {len(text)} characters, more than {LONGEST_FILE}; a recipe is a few lines")
    try:
        node, value = parsed(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: is not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML: {str(error).splitlines()[0]}") from None
    if node is None or value is None:
        raise UserError(f"{path}: is empty; `dae keys` lists what a recipe can hold")
    if not isinstance(value, dict):
        raise UserError(f"{path}:{node.start_mark.line + 1}: a recipe is `key: value` pairs, this is {kind_of(value)}")
    return node, value


def parsed(text: str, loader: type[yaml.SafeLoader] = RecipeLoader) -> tuple[yaml.Node | None, Any]:
    """YAML's node tree and value. Raises yaml.YAMLError, also where aliases unfold to more than a recipe can hold."""
    node = yaml.compose(text, Loader=loader)
    if node is not None and unfolded(node, {}) > MOST_NODES:
        raise yaml.YAMLError(f"its aliases unfold to more than {MOST_NODES} values")
    try:
        return node, yaml.load(text, Loader=loader)  # noqa: S506 - derived from SafeLoader
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # A tag such as !!int or !!timestamp before a value that is none.
        raise yaml.YAMLError(f"a value does not fit its tag ({error})") from error


def unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes a tree has where each alias is written out. known: of nodes seen before, by id."""
    if id(node) not in known:
        known[id(node)] = _UNCOUNTED
        inner = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(unfolded(part, known) for part in inner)
    if known[id(node)] == _UNCOUNTED:
        raise yaml.YAMLError("an alias in this file contains itself")
    return known[id(node)]


def kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else "one value"


def walk(node: yaml.Node, key: Key) -> Iterator[tuple[Key, yaml.Mark, str]]:
    """Every key with its place, and a message where the key is written twice or is no text."""
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield (*key, place), item.start_mark, ""
            yield from walk(item, (*key, place))
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name_node, item in node.value:
            if name_node.tag.endswith(":merge"):
                continue
            name = str(name_node.value)
            words = "" if name_node.tag.endswith(":str") else "a key is text: put it in quotes"
            if name in seen:
                first, again = seen[name], name_node.start_mark.line + 1
                words = f"duplicate key{f' on lines {first} and {again}' if first != again else ''}: remove one"
            seen.setdefault(name, name_node.start_mark.line + 1)
            yield (*key, name), name_node.start_mark, words
            yield from walk(item, (*key, name))
