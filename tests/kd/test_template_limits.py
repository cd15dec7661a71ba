"""Chat templates of strangers: what never ends or grows without end is one message; others render as before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import (
    DROPS_REASONING,
    KEEPS,
    KINDS,
    OPENS_REASONING,
    TOOLS_AS_OBJECT,
    TOOLS_AS_TEXT,
    TOOLS_BY_PART,
    with_template,
)
from jinja2.exceptions import TemplateError
from transformers.utils import chat_template_utils

from kd.data.chat import PLAIN_TEMPLATE, UnrenderableError, chat_format, render
from kd.data.chat_markers import marks_responses
from kd.errors import UserError
from kd.models.template_limits import LONGEST, LimitedEnvironment, limit_chat_templates

limit_chat_templates()
SHARED = Path(__file__).resolve().parents[3] / "shared" / "templates"
ASK = [{"role": "user", "content": "what?"}]
TALK = [{"role": "system", "content": "s"}, *ASK, {"role": "assistant", "content": "a <b>é</b>"}, *ASK]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}]
LONG = "x" * 10_000

ENDLESS = {
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a doubled text": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "an added text": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a doubled list": "{% set n = namespace(a=1) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}",
    "a value that contains itself": "{% set n = namespace() %}{% set n.a = n %}{{ [n] }}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a repeated text": "{{ 'a' * 10**9 }}",
    "a repeated list": "{{ [1] * 10**9 }}",
    "a product": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a centred text": "{{ 'x'|center(10**9) }}",
    "a method's width": "{{ 'x'.ljust(10**9) }}",
    "a percent format": "{{ '%1000000000d' % 1 }}",
    "a width from an argument": "{{ '%*d' % (10**9, 1) }}",
    "a format": "{{ '{:1000000000}'.format(1) }}",
    "a nested format": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "a batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "a replaced text": "{% set b = 'b' * 10**5 %}{{ b.replace('b', b) }}",
    "a joined list": "{{ ([1] * 10**5)|join('x' * 10**5) }}",
    "an indented JSON": "{{ [1, 2]|tojson(indent=10**9) }}",
    "a rounded number": "{{ 1.5|round(10**9, 'floor') }}",
    "characters stripped": "{{ ('a' * 10**5).strip('b' * 10**5 ~ 'a') }}",
    "a search from the end": "{{ ('a' * 10**6).rfind('b' ~ 'a' * 10**5) }}",
    "a generator joined": "{{ ('x' * 10**5).join(([1] * 10**5)|map('string')) }}",
    "made-up text": "{{ lipsum(n=10**6) }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "equal lists": "{% set b = 'b' * 10**6 %}{{ [b] * 10**4 == [b ~ ''] * 10**4 }}",
    "written again and again": "{% for i in range(99999) %}" + LONG + "{% endfor %}",
    "kept again and again": "{% set x %}{% for i in range(99999) %}" + LONG + "{% endfor %}{% endset %}",
    "a block in itself": "{% block a %}{% for i in range(9999) %}{{ self.a() }}{% endfor %}{% endblock %}",
    "a recursive loop": "{% for x in [[1, 1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
}


def test_a_text_far_longer_than_the_conversation() -> None:
    template = "{{ messages[0].content }}{{ 'x' * 3000000 }}"
    for mark in ("", "{% generation %}a{% endgeneration %}"):
        tokenizer = with_template(KINDS["byte-level"], template + mark)
        with pytest.raises(UserError, match="the tokenizer: the chat template writes far more than it is given"):
            render(tokenizer, template + mark, ASK)
        assert len(render(tokenizer, template + mark, [{"role": "user", "content": LONG * 20}])) > 3_000_000


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_one_message_that_names_the_checkpoint(name: str) -> None:
    tokenizer = with_template(KINDS["byte-level"], ENDLESS[name])
    tokenizer.name_or_path = "some/checkpoint"
    with pytest.raises(UserError, match=r"^some/checkpoint: the chat template (does too much|is nested too deeply)"):
        render(tokenizer, ENDLESS[name], ASK)


def test_the_limit_is_under_every_use_of_apply_chat_template() -> None:
    tokenizer = with_template(KINDS["byte-level"], ENDLESS["nested loops"])
    for more in ({}, {"return_assistant_tokens_mask": True, "return_dict": True}):
        with pytest.raises(UserError, match="does too much"):
            tokenizer.apply_chat_template(ASK, **more)


def test_the_limit_holds_in_other_threads() -> None:
    tokenizer, caught = with_template(KINDS["byte-level"], ENDLESS["calls"]), []

    def rendered() -> None:
        try:
            render(tokenizer, ENDLESS["calls"], ASK)
        except UserError as error:
            caught.append(error)

    thread = threading.Thread(target=rendered)
    thread.start()
    thread.join()
    assert len(caught) == 1


@pytest.mark.parametrize(
    "template",
    ["x" * (LONGEST + 1), "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 300 + "{% endif %}" * 300],
)
def test_a_template_that_is_too_long_or_nested_too_deeply(template: str) -> None:
    with pytest.raises(UserError, match=r"the tokenizer: the chat template (has 200001 characters|is nested)"):
        render(with_template(KINDS["byte-level"], template), template, ASK)


OUTSIDE = [
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ messages.append(1) }}",
    "{{ messages.__class__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ self.__init__ }}", "{{ dict.__init__ }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ namespace(__class__=1) }}",
]  # fmt: skip


@pytest.mark.parametrize("template", OUTSIDE)
def test_a_template_reaches_nothing_outside(template: str) -> None:
    try:
        text = render(with_template(KINDS["byte-level"], template), template, ASK)
    except UnrenderableError:
        text = ""
    assert text == ""


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ 2.0 ** 9999 }}", "{{ -messages }}"]
)
def test_whatever_a_template_raises_is_its_own_error(template: str) -> None:
    with pytest.raises(UnrenderableError):
        render(with_template(KINDS["byte-level"], template), template, ASK)


def test_a_long_conversation_stays_within_the_limit() -> None:
    messages = [{"role": role, "content": LONG} for role in ("user", "assistant") * 200]
    loop = "{% for m in messages %}{% set n.s = n.s + m.content | trim %}{% endfor %}"
    template = "{% set n = namespace(s='') %}" + loop + "{{ n.s }}"
    words = "{% for m in messages %}{{ m.content.split('x')|map('upper')|join(' ')|trim }}{% endfor %}"
    assert len(render(with_template(KINDS["byte-level"], words), words, messages)) == 0
    for one in (template, KEEPS):
        assert len(render(with_template(KINDS["byte-level"], one), one, messages)) >= 4_000_000


@pytest.mark.parametrize("turns", [1, 40])
def test_long_thoughts_stay_within_the_limit(turns: int) -> None:
    """Jinja hands each call in a loop all that was `set` before it, as keywords: they are no work."""
    template = (
        "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and '</think>' in text %}"
        "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n').replace('a', 'b').strip() %}"
        "<think>{{ thought.strip('\n') }}</think>{% endif %}{{ text }}{% endfor %}"
    )
    answer = f"<think>\n{LONG}\n</think>\n\n{LONG}"
    messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": answer}] * turns
    assert len(render(with_template(KINDS["byte-level"], template), template, messages)) >= 3 * turns * len(LONG)


# Blank lines part the templates; line ends in them are none of theirs.
OWN_LINES = """
{{ messages|length }}{{ messages|map(attribute='role')|join(', ') }}
{{ messages|selectattr('role', 'eq', 'user')|list }}

{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem }}{{ loop.cycle(1, 2) }}
{% endfor %}

{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v }}{% else %}none{% endfor %}
{% for m in messages if m.role == 'x' %}{% else %}no{% endfor %}

{% macro f(m, n=2) %}{{ m.content * n }}{{ caller() if caller }}{% endmacro %}{{ f(messages[0]) }}
{% call f(messages[0]) %}!{% endcall %}

{% for m in messages recursive %}{{ m if m is string else loop(m.values()) }}{% endfor %}

{{ messages[1:]|tojson(indent=2) }}{{ messages[::-1]|first }}{{ 'a-b'.split('-')[-1] }}{{ '%s:%d' % ('a', 3) }}
{{ 7 // 2 ** 2 }}

{% set x %}{{ messages[0].content|upper }}{% endset %}{{ x|indent(3, true) }}{{ x|replace('S', 'ss')|center(9) }}

{% set ns = namespace(a=[]) %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}{% endfor %}
{{ ns.a }}{{ ns.a|unique|sort|list }}

{{ tools|default('none', true) }}{{ missing is defined }}{{ missing }}{{ none }}{{ (1, 2.5, true) }}{{ {'a': [1]} }}

{% filter upper %}a{{ bos_token }}{% endfilter %}{{ 'x' if messages else 'y' }}{{ range(3)|list }}{{ '<&>'|e }}
{{ 3 in [1, 3] }}

{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}
{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}

{% autoescape true %}{{ '<' ~ messages[0].content }}{% endautoescape %}{{ '%.1f' % 2.25 }}{{ strftime_now('%%') }}
"""
OWN = [
    KEEPS, PLAIN_TEMPLATE, TOOLS_AS_OBJECT, TOOLS_AS_TEXT, TOOLS_BY_PART, DROPS_REASONING, OPENS_REASONING,
    "{% for m in messages %}\n  {%- if m.role -%}\n\n{{ m.role }}\n{% endif %}\n{%- endfor %}",
    *(lines.replace("\n", "") for lines in OWN_LINES.strip().split("\n\n")),
]  # fmt: skip


def without_limits(template: str) -> Any:
    """As transformers compiles it."""
    compiled = chat_template_utils._cached_compile_jinja_template(template)
    assert not isinstance(compiled.environment, LimitedEnvironment)
    return compiled


def test_transformers_own_templates_come_first() -> None:
    """A release that compiles templates elsewhere would leave the limits aside."""
    assert isinstance(chat_template_utils._compile_jinja_template("x").environment, LimitedEnvironment)


ALL = [*OWN, *(path.read_text() for path in sorted(SHARED.glob("*.jinja")))]


@pytest.mark.parametrize("number", range(len(ALL)))
@pytest.mark.parametrize("messages", [ASK, TALK, TALK[1:3]], ids=["asked", "talk", "answered"])
def test_rendered_as_in_transformers(number: int, messages: list[dict[str, str]]) -> None:
    given = {"messages": messages, "tools": TOOLS, "documents": None, "add_generation_prompt": True, "bos_token": "<s>"}

    def outcome(compiled: Callable[[str], Any]) -> str:
        try:
            return compiled(ALL[number]).render(**given)
        except TemplateError as error:
            return f"{type(error).__name__}: {error}"

    assert outcome(chat_template_utils._compile_jinja_template) == outcome(without_limits)


def test_marked_responses_are_at_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert marks_responses(chat_format(with_template(KINDS["byte-level"], template), template))
    given = {"chat_template": template, "return_assistant_tokens_mask": True}
    found = chat_template_utils.render_jinja_template([TALK], **given)
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", without_limits)
    assert chat_template_utils.render_jinja_template([TALK], **given) == found
