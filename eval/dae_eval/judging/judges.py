"""Judges: a model behind an OpenAI-compatible endpoint or a local checkpoint in process; their prompts and cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dae_eval.judging.asking import NO_ROOM, ChatModel, Reply, Request
from dae_eval.judging.endpoints import Endpoint, EndpointChoice
from dae_eval.judging.fastchat_files import JudgePrompt
from kd.errors import UserError

logger = logging.getLogger("dae")

TEMPERATURE = 0.0
MAX_TOKENS = 2048  # FastChat's limit for a judgment
CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English, for the estimate alone
OUTPUT_FORMATS = {"single": "[[rating]]", "pairwise": "[[A]]"}


@dataclass(frozen=True)
class JudgeChoice:
    """Who judges: the model at `endpoint`, else the checkpoint or adapter at the path `checkpoint`."""

    endpoint: EndpointChoice | None
    checkpoint: str = ""
    max_tokens: int = MAX_TOKENS
    batch_size: int = 8

    @property
    def name(self) -> str:
        """What files and reports call the judge."""
        return self.checkpoint if self.endpoint is None else self.endpoint.model

    def settings(self) -> dict[str, Any]:
        """All that a judgment depends on beside its prompt; an endpoint's model is known by its name alone."""
        settings: dict[str, Any] = {
            "judge": self.name,
            "judge temperature": TEMPERATURE,
            "judge max tokens": self.max_tokens,
        }
        if self.endpoint is not None:
            return settings
        from dae_eval.judging.local_chat import read_chat_format, template_sha256
        from dae_eval.models import locate

        model = locate("--judge", self.checkpoint, None)
        fingerprint, of_base = model.identity
        return {
            **settings,
            "judge fingerprint": fingerprint,
            "judge's base": of_base,
            "judge's chat template": template_sha256(read_chat_format(model, None)),
            "judge's batch size": self.batch_size,
        }

    def open(self) -> ChatModel:
        """The judge, ready to be asked. Raises UserError."""
        if self.endpoint is not None:
            return Endpoint(self.endpoint)
        from dae_eval.judging.local_chat import open_local_chat
        from dae_eval.models import locate

        return open_local_chat(locate("--judge", self.checkpoint, None), None, self.batch_size)


def judge_request(judge: JudgeChoice, prompt: JudgePrompt, key: str, fields: Mapping[str, str], source: str) -> Request:
    """The request for one judgment: the prompt's system message, and its template with the fields filled in.

    Raises:
        UserError: the template wants a field that there is not.
    """
    try:
        text = prompt.template.format_map(fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source}: prompt {prompt.name}: cannot be filled in ({error!r}); there are {', '.join(fields)}"
        ) from error
    system = ({"role": "system", "content": prompt.system},) if prompt.system else ()
    return Request(key, (*system, {"role": "user", "content": text}), TEMPERATURE, judge.max_tokens)


def chosen_prompt(prompts: Mapping[str, JudgePrompt], name: str, kind: str, source: str) -> JudgePrompt:
    """The judge prompt of this name.

    Raises:
        UserError: there is none, or it asks for another form of judgment than can be read here.
    """
    if name not in prompts:
        raise UserError(f"{source}: has no prompt {name}, which this judging needs; it has {', '.join(prompts)}")
    prompt = prompts[name]
    if prompt.kind != kind or prompt.output_format != OUTPUT_FORMATS[kind]:
        raise UserError(
            f"{source}: prompt {name}: type {prompt.kind}, output_format {prompt.output_format}; wants type {kind}, "
            f"output_format {OUTPUT_FORMATS[kind]}"
        )
    return prompt


def refuse_crowded(judge: JudgeChoice, replies: Mapping[str, Reply]) -> None:
    """Raise UserError where prompts did not fit into the judge's context."""
    crowded = [key for key, reply in replies.items() if reply.stop == NO_ROOM]
    if crowded:
        raise UserError(
            f"{judge.name}: {len(crowded)} of {len(replies)} prompts fill the judge's context; choose a judge with a "
            "longer context, or shorter answers"
        )


@dataclass(frozen=True)
class CostEstimate:
    """What the calls that are left will take. price: for a million tokens (in, out), or None where none was given."""

    calls: int
    prompt_tokens: int
    reply_tokens: int
    price: tuple[float, float] | None

    @property
    def price_range(self) -> tuple[float, float] | None:
        """From no reply at all to replies of full length, in the currency of the price."""
        if self.price is None:
            return None
        prompts = self.prompt_tokens * self.price[0] / 1e6
        return prompts, prompts + self.reply_tokens * self.price[1] / 1e6

    def told(self, judge: str, done: int) -> str:
        """In one line."""
        if not self.calls:
            return f"{judge}: all {done} judgments are there; nothing is asked"
        already = f" ({done} are there already)" if done else ""
        text = (
            f"{judge}: {self.calls} calls{already}, about {self.prompt_tokens:,} tokens in prompts, at most "
            f"{self.reply_tokens:,} in replies"
        )
        if self.price_range is None:
            return text
        low, high = self.price_range
        return f"{text}; {low:.2f} to {high:.2f} at the prices given"


def cost_estimate(requests: Sequence[Request], price: tuple[float, float] | None) -> CostEstimate:
    """Calls and tokens of requests that are still to be put. Prompt tokens are estimated from characters."""
    characters = sum(request.characters for request in requests)
    return CostEstimate(
        calls=len(requests),
        prompt_tokens=round(characters / CHARACTERS_PER_TOKEN),
        reply_tokens=sum(request.max_tokens for request in requests),
        price=price,
    )
