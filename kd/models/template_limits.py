"""Limits on chat templates, which come with checkpoints of strangers: a rendering may do so much work and no more.

transformers renders templates in Jinja's immutable sandbox, which keeps them from everything but their arguments, yet
not from endless loops and endless strings. Here each rendering has a budget: a round of a loop, a call, and each value
that an operator, filter or method reads or makes are charged, the last before it is made. So the limit is the same on
every machine, in every thread, and holds for memory, too. What is rendered within it does not change.

`limit_chat_templates` puts these limits under `apply_chat_template`, whoever calls it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from jinja2 import Environment, Template, nodes
from jinja2.runtime import Context, LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

from kd.errors import UserError
from kd.models.template_costs import CHEAP_FILTERS, CHEAP_TESTS, NODE, cost_of_call, cost_of_operator, weight

WORK = 100_000_000  # of one rendering, about one for each character or 1/8 of an element that is read or made
PER_CHARACTER = 1000  # more work for each character of what is rendered
LONGEST_TEXT = 2_000_000  # characters of a rendering, and for each character of what is rendered MORE_TEXT
MORE_TEXT = 10
STEP = 250  # work of a round of a loop, or of a call
SMALL_STEP = 50  # of a filter or test
LONGEST = 200_000  # characters of a template; published ones have up to 30,000

# Names that no template can spell.
_COUNTED, _WEIGHED, _JOINED = "rounds of a loop", "a weighed value", "joined values"


class TemplateLimitError(UserError):
    """A chat template that is too long, or whose rendering does too much."""


class _Budget:
    """Work that is left of one rendering. given: what is rendered."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.left = WORK
        self.written = 0
        self._all = given
        self._given: Mapping[str, Any] | None = given

    def charge(self, work: int) -> None:
        self.left -= work
        if self.left >= 0:
            return
        if self._given is not None:  # weighed only where it matters
            self.left += PER_CHARACTER * weight(self._given)
            self._given = None
        if self.left < 0:
            raise TemplateLimitError(
                "the chat template does too much in one rendering: endless loops, or texts that grow without end; "
                "correct the template"
            )

    def write(self, text: str) -> None:
        """Count what is written; all that reads it later takes its time, too."""
        self.written += len(text)
        self.charge(len(text) + 1)
        if self.written > LONGEST_TEXT and self.written > LONGEST_TEXT + MORE_TEXT * weight(self._all):
            raise TemplateLimitError("the chat template writes far more than it is given; correct the template")


class _Rendering(threading.local):
    """What this thread renders; budget: None while a template is compiled."""

    budget: _Budget | None = None


_rendering = _Rendering()


def _charge(work: int) -> None:
    budget = _rendering.budget
    if budget is not None:
        budget.charge(work)


def _concat(parts: Iterable[str]) -> str:
    """`"".join`, charged before the whole is made."""
    kept = parts if isinstance(parts, list) else list(parts)  # a generator's rounds are charged one by one
    _charge(sum(map(len, kept)) + NODE * len(kept))
    return "".join(kept)


def _finalize(value: Any) -> Any:
    """Before a value is written."""
    if type(value) is not str:
        _charge(NODE * weight(value))
    return value


_JINJAS_OWN = ("_loop_vars", "_block_vars")  # keywords that its code adds to every call in a loop: all that was `set`


class LimitedTemplate(Template):
    """A template each of whose renderings has a budget."""

    def new_context(self, *args: Any, **kwargs: Any) -> Context:
        context = super().new_context(*args, **kwargs)
        _rendering.budget = _Budget(context.get_all())
        return context

    def render(self, *args: Any, **kwargs: Any) -> str:
        text = super().render(*args, **kwargs)
        assert _rendering.budget is not None
        _rendering.budget.write(text)
        return text

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        for text in super().generate(*args, **kwargs):
            assert _rendering.budget is not None
            _rendering.budget.write(text)
            yield text


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, charging for all that can be repeated or grow."""

    template_class = LimitedTemplate
    concat = staticmethod(_concat)
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Charging().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # nearly all that templates ask for
            _charge(len(left) + len(right))
            return left + right
        _charge(cost_of_operator(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        cost = STEP
        if isinstance(function, LoopContext):
            cost += STEP * weight(args)
        elif getattr(function, "__name__", "") == "_generation_support":  # transformers joins all that is written
            cost += 0 if _rendering.budget is None else _rendering.budget.written // 16
        elif not isinstance(function, Macro):
            function_itself = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            owner, name = (getattr(function_itself, part, "") for part in ("__self__", "__name__"))
            args = tuple(map(_listed, args)) if name == "join" else args
            given = {key: value for key, value in kwargs.items() if key not in _JINJAS_OWN}
            cost += cost_of_call(name, owner, args, given)
        _charge(cost)
        return super().call(context, function, *args, **kwargs)


class _Charging(NodeTransformer):
    """Puts charges around what Jinja does without asking the environment."""

    # Jinja's visitor looks for methods by the names of its classes.
    # ruff: noqa: N802
    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno, environment=node.environment), _JOINED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        if sum(not _is_constant(operand) for operand in operands) > 1:
            node.expr = _filtered(node.expr, _WEIGHED)
            for operand in node.ops:
                operand.expr = _filtered(operand.expr, _WEIGHED)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(node, _WEIGHED)
        if not _is_constant(node.arg):
            node.arg = _filtered(node.arg, _WEIGHED)
        return node

    def _visit_literal(self, node: Any) -> nodes.Node:
        if getattr(node, "ctx", "load") != "load" or _is_constant(node):
            return cast("nodes.Node", node)
        self.generic_visit(node)
        return _filtered(node, _WEIGHED)

    visit_List = visit_Tuple = visit_Dict = _visit_literal


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _is_constant(node: nodes.Expr) -> bool:
    try:
        node.as_const()
    except nodes.Impossible:
        return False
    return True


@pass_context
def _counted(_context: Context, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _charge(STEP)
        yield value


def _listed(value: Any) -> Any:
    """The list of what a generator yields, so that it can be counted before it is joined."""
    return list(value) if isinstance(value, Iterator) and not isinstance(value, LoopContext) else value


@pass_context
def _weighed(_context: Context, value: Any) -> Any:
    _charge(weight(value))
    return value


@pass_context
def _joined(context: Context, values: tuple[Any, ...]) -> str:
    _charge(sum(len(value) if type(value) is str else NODE * weight(value) for value in values))
    return (markup_join if context.eval_ctx.autoescape else str_join)(values)


def _charged(name: str, function: Any) -> Callable[..., Any]:
    """A filter or test that is charged. It asks for the context so that Jinja does not call it while compiling."""
    asks = getattr(function, "jinja_pass_arg", None)
    wants = asks.name if asks is not None else ""

    @pass_context
    @functools.wraps(function, assigned=("__name__", "__doc__"), updated=())
    def charged(context: Context, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        value = _listed(value) if name == "join" else value
        _charge(SMALL_STEP + cost_of_call(name, value, args, kwargs))
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        return function(first[wants], value, *args, **kwargs) if wants else function(value, *args, **kwargs)

    return charged


def _limited_environment(theirs: Environment) -> LimitedEnvironment:
    """With what an environment of transformers has: its extensions, filters, tests and globals."""
    ours = LimitedEnvironment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
        finalize=_finalize,
    )
    ours.globals.update(theirs.globals)
    filters = {name: made if name in CHEAP_FILTERS else _charged(name, made) for name, made in theirs.filters.items()}
    tests = {name: made if name in CHEAP_TESTS else _charged(name, made) for name, made in theirs.tests.items()}
    ours.filters = {**filters, _COUNTED: _counted, _WEIGHED: _weighed, _JOINED: _joined}
    ours.tests = tests
    return ours


def limit_chat_templates() -> None:
    """From here on, chat templates are rendered within these limits in this process."""
    from transformers.utils import chat_template_utils

    theirs = chat_template_utils._compile_jinja_template
    if getattr(theirs, "is_limited", False):
        return

    @functools.lru_cache
    def limited(chat_template: str) -> Template:
        if len(chat_template) > LONGEST:
            raise TemplateLimitError(
                f"the chat template has {len(chat_template)} characters, more than {LONGEST}; use a shorter one"
            )
        _rendering.budget = None
        return _limited_environment(theirs("").environment).from_string(chat_template)

    limited.is_limited = True  # type: ignore[attr-defined]
    chat_template_utils._compile_jinja_template = limited
