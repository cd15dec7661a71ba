"""Prompts of `dae sample` and `dae rank-teachers`: from a file, or sampled from the chat template's user turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dae.sampling.generation import LENGTH, Continuation
from dae.sampling.written_rows import Prompt
from kd.config.data_recipe import SourceRecipe
from kd.data.chat import ChatFormat, UnrenderableError
from kd.data.record_forms import EXAMPLE, record_of, refuse_conversation_keys
from kd.data.records import read_raw
from kd.errors import UserError

_PROBE = "replyprobe"  # placeholder for the user's words in a template


def user_opening(fmt: ChatFormat, model: str) -> tuple[str, str]:
    """The template's text before the user's first words, and after them up to the answer.

    Raises:
        UserError: the template does not show where the user's words begin.
    """
    try:
        text = fmt.render([{"role": "user", "content": _PROBE}], ask=True)
    except UnrenderableError as error:
        raise UserError(f"{model}: its chat template refuses a lone user turn ({error}); add --prompts FILE") from error
    before, probe, after = text.rpartition(_PROBE)
    if not probe or not before.strip():
        raise UserError(f"{model}: its chat template does not show where a user turn begins; add --prompts FILE")
    # A space at the end would be a token of its own, unlike in training.
    return before.rstrip(" "), after


def instruction_of(written: Continuation, after: str) -> tuple[str | None, str | None]:
    """The user's words and no fault, or no words and the fault.

    after: the template's text after the user's words. Some templates end the turn with a special token, which stopped
    the model; others with ordinary text (`[/INST]`, `ASSISTANT:`), which the model writes and continues after.
    """
    if written.text is None:
        return None, written.fault
    words, marker, _ = written.text.partition(after.strip() or "\0")
    if not marker and written.stop == LENGTH:
        return None, "no end"
    return (words.strip(), None) if words.strip() else (None, "no text")


def read_prompts(path: str) -> list[Prompt]:
    """Prompts of a file: {"prompt": text or messages}, or any training row, whose last answer is ignored.

    Raises:
        UserError: the file cannot be read or is empty, a row has no prompt, or it has tools.
    """
    prompts = [_prompt_of(row, location, padded) for location, row, padded in read_raw(SourceRecipe(path=path))]
    if not prompts:
        raise UserError(f"{path}: has no rows; at least one prompt is required")
    return prompts


def _prompt_of(raw: Any, location: str, padded: Collection[str]) -> Prompt:
    if isinstance(raw, Mapping) and raw.get("prompt") is not None:
        raw = {key: raw[key] for key in ("prompt", "system", "tools") if key in raw}
        if not isinstance(raw["prompt"], str):
            raw["messages"] = raw.pop("prompt")
    if isinstance(raw, Mapping) and isinstance(prompt := raw.get("prompt"), str):
        refuse_conversation_keys(raw, location, "prompt-completion")
        # As in training, spaces at the end of a prompt belong to the completion.
        if not prompt.strip():
            raise UserError(f"{location}: prompt: must not be empty; remove the row")
        return prompt.rstrip()
    row = record_of(raw, location, padded=padded).row
    if "messages" not in row:
        raise UserError(f'{location}: has no prompt; expected {{"prompt": text}}, {{"prompt": messages}} or {EXAMPLE}')
    if "tools" in row:
        raise UserError(f"{location}: tools: not supported in sampling; remove them from the row")
    messages: list[dict[str, Any]] = row["messages"]
    last = max((place for place, message in enumerate(messages) if message["role"] != "assistant"), default=-1)
    if last < 0:
        raise UserError(f"{location}: messages: has no user turn to answer; add one, or remove the row")
    return messages[: last + 1]
