"""The messages in the source: what is given to the classes of errors, with a name for each part that is filled in."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kd.config.problems import BOUNDS, PLAIN_WORDS
from kd.data.drafts import NoChatTemplateError

ROOT = Path(__file__).parents[1]
PACKAGES = ("kd", "dae", "eval/dae_eval")
ERRORS = ("UserError", "MachineError", "NoChatTemplateError", "HeldError", "LostPartError")
PROBLEM = "Problem"  # kd.config.problems: key, value, message; gathered into one UserError
VALIDATORS = ("kd/config/", "dae/recipe.py", "eval/dae_eval/suites.py")  # where a ValueError is what pydantic reports


@dataclass(frozen=True)
class Template:
    """One message: `«path»: is empty` has a name in place of what is filled in."""

    file: str
    line: int
    error: str
    text: str


class Module:
    """One file of the source: its tree, and its constants and functions by name."""

    def __init__(self, path: Path) -> None:
        self.file = path.relative_to(ROOT).as_posix()
        self.name = self.file.removeprefix("eval/").removesuffix(".py").replace("/", ".")
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.constants: dict[str, ast.expr] = {}
        self.functions: dict[str, ast.FunctionDef] = {}
        self.imports: dict[str, str] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value
            elif isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: f"{node.module}" for alias in node.names}


Source = Mapping[str, Module]


def read_source() -> dict[str, Module]:
    """Every module by its dotted name."""
    modules = [Module(path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {module.name: module for module in modules}


def all_templates() -> list[Template]:
    """Every message, in the order of the files and lines."""
    source = read_source()
    found = [template for module in source.values() for template in templates_of(module, source)]
    found += statuses(source["dae.exit_status"], source)
    plain = [*PLAIN_WORDS.values(), *(f"{words} «bound»" for _, words in BOUNDS.values())]
    found += [Template("kd/config/problems.py", 0, PROBLEM, f"«key» = «value»: {words}") for words in plain]
    return sorted(set(found), key=lambda template: (template.file, template.line, template.text))


def statuses(module: Module, source: Source) -> Iterator[Template]:
    """The messages that the command line has for errors of Python and the machine: returned with their exit status."""
    errors = {"MACHINE": "MachineError", "USER": "UserError"}
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Return)
            and isinstance(node.value, ast.Tuple)
            and isinstance(node.value.elts[0], ast.Name)
        ):
            status, message = node.value.elts[0].id, node.value.elts[1]
            if status in errors and isinstance(message, ast.JoinedStr):
                yield Template(module.file, node.lineno, errors[status], text_of(message, module, source))


def templates_of(module: Module, source: Source) -> Iterator[Template]:
    """The messages of one file, those of the functions and names that it passes on included."""
    remedy = inspect.signature(NoChatTemplateError).parameters["remedy"].default
    for scope in (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(scope):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            name, arguments = node.func.id, node.args
            place = {PROBLEM: 2} | dict.fromkeys(ERRORS, 0)
            if module.file.startswith(VALIDATORS):
                place["ValueError"] = 0
            if name in place and len(arguments) > place[name]:
                before = {PROBLEM: key_of(arguments[0]), "ValueError": "«key»: "}.get(name, "")
                after = f"; {remedy}" if name == "NoChatTemplateError" and len(arguments) == 1 else ""
                for text in texts(arguments[place[name]], scope, module, source):
                    yield Template(module.file, node.lineno, name, before + text + after)


def key_of(node: ast.expr) -> str:
    """The key of a problem as a user writes it."""
    parts = node.elts if isinstance(node, ast.Tuple) else []
    words = [str(part.value) if isinstance(part, ast.Constant) else f"«{placeholder(part)}»" for part in parts]
    return f"{'.'.join(words) or '«key»'}: ".replace("data.routes.", "data.")


def texts(node: ast.expr, scope: ast.FunctionDef, module: Module, source: Source) -> Iterator[str]:
    """What an argument can be: itself, or what its function returns or its name is set to."""
    if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
        yield text_of(node, module, source)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body, scope, module, source)
        yield from texts(node.orelse, scope, module, source)
    elif isinstance(node, ast.Name):
        for value in values_of(node, scope):
            yield from texts(value, scope, module, source)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        home = module if node.func.id in module.functions else source.get(module.imports.get(node.func.id, ""))
        called = home.functions.get(node.func.id) if home else None
        if home and called:
            for returned in (one for one in ast.walk(called) if isinstance(one, ast.Return) and one.value):
                assert returned.value is not None
                yield from texts(returned.value, called, home, source)


def values_of(name: ast.Name, scope: ast.FunctionDef) -> Iterator[ast.expr]:
    """What a name was last set to: in branches before the statement that reads it, or once at its level."""
    around = (
        one
        for one in ast.walk(scope)
        if isinstance(one, ast.stmt) and one.lineno <= name.lineno <= (one.end_lineno or 0)
    )
    level = max(statement.col_offset for statement in around)
    before = [
        one
        for one in ast.walk(scope)
        if isinstance(one, ast.Assign) and one.lineno < name.lineno and ast.unparse(one.targets[0]) == name.id
    ]
    for assigned in sorted(before, key=lambda one: one.lineno, reverse=True):
        yield assigned.value
        if assigned.col_offset <= level:
            return


def text_of(node: ast.expr, module: Module, source: Source) -> str:
    """A string as it is written, with «names» for what is filled in; constants of the module are put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, module, source) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, module, source) + text_of(node.right, module, source)
    filled = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(filled, ast.Name) and (known := constant(filled.id, module, source)) is not None:
        return known
    name = placeholder(filled)
    return "" if name in HINTS else f"«{name}»"


def constant(name: str, module: Module, source: Source) -> str | None:
    """The text of a constant of the module, or of one that it imports; None for what is no text."""
    home = module if name in module.constants else source.get(module.imports.get(name, ""))
    if home is None or name not in home.constants:
        return None
    value = home.constants[name]
    return text_of(value, home, source) if isinstance(value, ast.Constant | ast.JoinedStr) else None


HINTS = ("suggestion", "near")  # "did you mean ...?", where a near name is known
SEEN_THROUGH = ("repr", "str", "sorted", "list", "map", "set", "getattr", "max", "min", "shown", "first_of", "range")


def placeholder(node: ast.expr) -> str:
    """A name for a part that is filled in, from the expression that fills it."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").lower().replace("_", " ")
    if isinstance(node, ast.Attribute):
        owner = placeholder(node.value)
        return (
            owner
            if node.attr in ("name", "strerror", "msg", "url") and owner != "self"
            else node.attr.strip("_").replace("_", " ")
        )
    if isinstance(node, ast.Subscript | ast.Starred):
        return placeholder(node.value)
    if isinstance(node, ast.IfExp):
        return placeholder(node.body)
    if isinstance(node, ast.BoolOp):
        return placeholder(node.values[0])
    if isinstance(node, ast.BinOp):
        return placeholder(node.left)
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        return placeholder(node.generators[0].iter)
    if isinstance(node, ast.Call):
        return placeholder_of_call(node)
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def placeholder_of_call(node: ast.Call) -> str:
    if isinstance(node.func, ast.Name):
        if node.func.id in SEEN_THROUGH and node.args:
            return placeholder(node.args[-1] if node.func.id == "map" else node.args[0])
        words = {"len": "number of", "type": "class of", "kind_of": "kind of", "one_of": "one of"}.get(node.func.id)
        return f"{words} {placeholder(node.args[0])}" if words and node.args else placeholder(node.func)
    assert isinstance(node.func, ast.Attribute)
    if node.func.attr == "join":
        return placeholder(node.args[0])
    return placeholder(node.func.value)
