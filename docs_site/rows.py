"""Rows of each form with the response tokens that are found in them, computed by the code behind `dae check`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kd.config.data_recipe import DataRecipe, SourceRecipe
from kd.data.examples import SourceReport, load_rows, marked_text
from kd.errors import UserError

HEADER = "{{ '<|im_start|>' + m.role + '\\n' }}"
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
)
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CALLS = (
    "{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}"
)
PLAIN = f"{{% for m in messages %}}{HEADER}{{{{ m.content + '<|im_end|>\\n' }}}}{{% endfor %}}{ASK}"
WITH_TOOLS = (
    f"{TOOLS}{{% for m in messages %}}{HEADER}{{{{ m.content }}}}{CALLS}{{{{ '<|im_end|>\\n' }}}}{{% endfor %}}{ASK}"
)
# Marks what comes after a thought, not the thought.
MARKED = (
    f"{{% for m in messages %}}{HEADER}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if parts | length > 1 %}{{ parts[0] + '</think>' }}{% endif %}"
    "{% generation %}{{ parts[-1] }}{% endgeneration %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}"
    f"{{% endfor %}}{ASK}"
)

QUESTION = {"role": "user", "content": "What is the kettle?"}
ANSWER = {"role": "assistant", "content": "9 coins."}
THINKS = {"role": "assistant", "content": "<think>Look it up.</think>9 coins."}
CALL = {"type": "function", "function": {"name": "price", "arguments": {"item": "kettle"}}}
TOOL = {"type": "function", "function": {"name": "price", "parameters": {"type": "object", "properties": {}}}}


@dataclass(frozen=True)
class Case:
    """One row, and what the page says of it."""

    title: str
    words: str
    row: dict[str, Any]
    template: str = PLAIN
    settings: dict[str, Any] = field(default_factory=dict)


CASES: tuple[Case, ...] = (
    Case(
        "A conversation",
        "Every assistant turn carries loss, with its end token.",
        {
            "messages": [
                QUESTION,
                ANSWER,
                {"role": "user", "content": "And the cup?"},
                {"role": "assistant", "content": "3."},
            ]
        },
    ),
    Case(
        "With a system prompt",
        "`system` becomes the first turn; a system or developer turn in `messages` does the same.",
        {"messages": [QUESTION, ANSWER], "system": "Be brief."},
    ),
    Case(
        "With tools",
        "`tools` is a list of functions, or the same as JSON text. The call of a tool is part of the response; its "
        "result is not. The chat template must render tools.",
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "9"},
                ANSWER,
            ],
            "tools": [TOOL],
        },
        WITH_TOOLS,
    ),
    Case(
        "A turn without loss",
        "`weight: 0` (or `train: false`) takes an assistant turn out of the loss; it stays in the context.",
        {"messages": [QUESTION, {**ANSWER, "content": "No idea.", "weight": 0}, QUESTION, ANSWER]},
    ),
    Case(
        "An answer that was cut off",
        "With `finish_reason: length` the row ends where the answer was cut, without an end token, so the student does "
        "not learn to stop there.",
        {"messages": [QUESTION, {**ANSWER, "content": "It costs"}], "finish_reason": "length"},
    ),
    Case(
        "An empty answer",
        "It carries no loss. `data.empty_responses: keep` trains its end token.",
        {"messages": [QUESTION, ANSWER, QUESTION, {**ANSWER, "content": ""}]},
    ),
    Case(
        "Text that looks like a control token",
        "Message content is always text: the `<|im_end|>` in this answer is not read as the end of the turn.",
        {"messages": [QUESTION, {**ANSWER, "content": "Write <|im_end|> last."}]},
    ),
    Case(
        "ShareGPT",
        "`conversations` with `from` and `value`.",
        {"conversations": [{"from": "human", "value": "Price?"}, {"from": "gpt", "value": "9 coins."}]},
    ),
    Case(
        "Alpaca",
        "`instruction`, `input` and `output`; `history` holds earlier turns.",
        {"instruction": "Give the price.", "input": "kettle", "output": "9 coins."},
    ),
    Case(
        "A pair of strings",
        "No chat template. The completion carries loss, and the end token is appended (`data.append_eos: false` leaves "
        "it out). Tokens are those that lm-eval scores.",
        {"prompt": "Price?", "completion": " 9 coins."},
    ),
    Case(
        "The same with `response`",
        "Another name of `completion`.",
        {"prompt": "Price?", "response": " 9 coins."},
    ),
    Case(
        "A pair of message lists",
        "The chat template renders both; only assistant turns of the completion carry loss.",
        {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]},
    ),
    Case(
        "Text",
        "Every token carries loss but the first: nothing comes before it that could predict it. (Many tokenizers put "
        "BOS there; this one adds none.) `data.append_eos: true` appends the end token.",
        {"text": "The kettle costs 9 coins."},
    ),
    Case(
        "A row that is too long",
        "It is cut on the right at `data.max_length`, here 40, end token included. A row whose prompt alone fills it "
        "is dropped and counted.",
        {"prompt": "Price?", "completion": " The kettle costs 9 coins, and the cup 3."},
        settings={"max_length": 40},
    ),
    Case(
        "A template without `{% generation %}`",
        "The response is found by comparing renderings: all that the template writes for the turn, up to and including "
        "its end token.",
        {"messages": [QUESTION, THINKS]},
    ),
    Case(
        "A template with `{% generation %}`",
        "What the template marks is the response, as in transformers. This template marks the answer and not the "
        "thought before it. The end token behind a marked part is added, so that the student learns to stop.",
        {"messages": [QUESTION, THINKS]},
        MARKED,
    ),
    Case(
        "A part that the template leaves out",
        "Nothing is lost silently: the same row with tools under a template that does not render them is an error.",
        {"messages": [QUESTION, ANSWER], "tools": [TOOL]},
    ),
)


def section() -> str:
    """A heading for each case, the row, and the row as the student sees it."""
    return "\n\n".join(f"### {case.title}\n\n{case.words}\n\n{as_json(case)}\n\n{rendering(case)}" for case in CASES)


def as_json(case: Case) -> str:
    """The row, with a line for each message; in a JSONL file it is one line."""
    parts = (f"{json.dumps(key)}: {value_as_json(value)}" for key, value in case.row.items())
    return "```json\n{" + ", ".join(parts) + "}\n```"


def value_as_json(value: Any) -> str:
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n]"
    return json.dumps(value)


def rendering(case: Case) -> str:
    """The row with its response tokens marked, or the message that refuses it, in HTML."""
    tokenizer = make_tokenizer(case.template)
    try:
        segments, report = load(case, tokenizer)
    except UserError as error:
        return f"<div class='row refused'><pre><code>{in_html(str(error))}</code></pre></div>"
    marked = "".join(f"<mark>{in_html(text)}</mark>" if response else in_html(text) for text, response in segments)
    told = [f"format: {name}" for name in report.formats] + report.notes + ["truncated"] * report.truncated
    return f"<div class='row'><pre><code>{marked}</code></pre><p>{escape('; '.join(told))}</p></div>"


def load(case: Case, tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[str, bool]], SourceReport]:
    """Segments of the row, and what the report says of it. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(case.row) + "\n", encoding="utf-8")
        try:
            (kept,), (report,) = load_rows([SourceRecipe(path=str(path))], tokenizer, DataRecipe(**case.settings))
        except UserError as error:
            raise UserError(str(error).replace(str(path), path.name)) from error
    return marked_text(kept[0], tokenizer), report


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and the control tokens that the templates write."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE({token: place for place, token in enumerate([*control, *letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")  # noqa: S106
    tokenizer.add_special_tokens({"additional_special_tokens": control[2:]})
    tokenizer.chat_template = template
    return tokenizer


def in_html(text: str) -> str:
    """Text in a `pre`; line ends as entities, so that Markdown sees one block."""
    return escape(text).replace("\n", "&#10;")
