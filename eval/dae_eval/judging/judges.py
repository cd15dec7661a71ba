"""Judges: a model behind an OpenAI-compatible endpoint or a local checkpoint in process; their prompts and cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dae_eval.judging.asking import NO_ROOM, ChatModel, Reply, ReplyLog, Request, ask_all, unanswered
from dae_eval.judging.endpoints import Endpoint
from dae_eval.judging.fastchat_files import JudgePrompt
from kd.errors import UserError
from kd.served.connection import EndpointChoice

logger = logging.getLogger("dae")

TEMPERATURE = 0.0
MAX_TOKENS = 2048  # FastChat's limit for a judgment
CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English, for the estimate alone
OUTPUT_FORMATS = {"single": "[[rating]]", "pairwise": "[[A]]"}


@dataclass(frozen=True)
class JudgeChoice:
    """The judge: the model at `endpoint`, else the checkpoint or adapter at the path `checkpoint`."""

    endpoint: EndpointChoice | None
    checkpoint: str = ""
    max_tokens: int = MAX_TOKENS
    batch_size: int = 8

    @property
    def name(self) -> str:
        return self.checkpoint if self.endpoint is None else self.endpoint.model

    def settings(self) -> dict[str, Any]:
        """All that a judgment depends on except its prompt; an endpoint's model is identified by its name."""
        settings = {"judge": self.name, "judge temperature": TEMPERATURE, "judge max tokens": self.max_tokens}
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
        """Open the endpoint or the checkpoint. Raises UserError."""
        if self.endpoint is not None:
            return Endpoint(self.endpoint)
        from dae_eval.judging.local_chat import open_local_chat
        from dae_eval.models import locate

        return open_local_chat(locate("--judge", self.checkpoint, None), None, self.batch_size)


def judge_request(judge: JudgeChoice, prompt: JudgePrompt, key: str, fields: Mapping[str, str], source: str) -> Request:
    """The request for one judgment: the prompt's system message, and its template with the fields filled in.

    Raises:
        UserError: the template has an unknown field.
    """
    try:
        text = prompt.template.format_map(fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source}: prompt {prompt.name}: cannot be filled in ({error!r}); its fields can be {', '.join(fields)}"
        ) from error
    system = ({"role": "system", "content": prompt.system},) if prompt.system else ()
    return Request(key, (*system, {"role": "user", "content": text}), TEMPERATURE, judge.max_tokens)


def chosen_prompt(prompts: Mapping[str, JudgePrompt], name: str, kind: str, source: str) -> JudgePrompt:
    """The judge prompt of this name.

    Raises:
        UserError: it is missing, or asks for a form of judgment that cannot be read.
    """
    if name not in prompts:
        raise UserError(f"{source}: prompt {name} is missing; the file has {', '.join(prompts)}")
    prompt = prompts[name]
    if prompt.kind != kind or prompt.output_format != OUTPUT_FORMATS[kind]:
        raise UserError(
            f"{source}: prompt {name}: type {prompt.kind}, output_format {prompt.output_format}; expected type {kind}, "
            f"output_format {OUTPUT_FORMATS[kind]}"
        )
    return prompt


def ask_judge(
    judge: JudgeChoice,
    requests: Sequence[Request],
    log: ReplyLog,
    what: str,
    price: tuple[float, float] | None,
    only_estimate: bool,
    usable: Callable[[Reply], bool],
    decides: str = "",
) -> dict[str, Reply] | None:
    """Log the cost of the calls that are left, then make them; None if only the estimate is wanted.

    what, usable: as for `ask_all`. price: per million tokens (in, out). decides: what the judgments can show.

    Raises:
        UserError, MachineError: a prompt does not fit into the judge's context, or the model raises it.
    """
    left = unanswered(requests, log, usable)
    cost = describe_cost(judge.name, left, len(requests) - len(left), price)
    logger.info("%s", f"{cost}; {decides}" if decides else cost)
    if only_estimate:
        return None
    replies = ask_all(judge.open, requests, log, what, usable)
    refuse_crowded(judge, replies)
    return replies


def refuse_crowded(judge: JudgeChoice, replies: Mapping[str, Reply]) -> None:
    """Raise UserError if prompts did not fit into the judge's context."""
    crowded = [key for key, reply in replies.items() if reply.stop == NO_ROOM]
    if crowded:
        raise UserError(
            f"{judge.name}: {len(crowded)} of {len(replies)} prompts leave no room for a judgment in the judge's "
            "context; choose a judge with a longer context, a smaller --judge-max-tokens or shorter answers"
        )


def describe_cost(judge: str, left: Sequence[Request], done: int, price: tuple[float, float] | None) -> str:
    """The calls that are left, their tokens and their cost, in one line.

    Prompt tokens are estimated from characters. The cost is for empty replies to replies of full length, in the
    currency of the price per million tokens (in, out).
    """
    if not left:
        return f"{judge}: all {done} judgments exist; no calls are left"
    characters = sum(len(message["content"]) for request in left for message in request.messages)
    prompt_tokens = round(characters / CHARACTERS_PER_TOKEN)
    reply_tokens = sum(request.max_tokens for request in left)
    text = (
        f"{judge}: {len(left)} calls{f' ({done} are done)' if done else ''}, about {prompt_tokens:,} tokens in "
        f"prompts, at most {reply_tokens:,} in replies"
    )
    if price is None:
        return text
    low = prompt_tokens * price[0] / 1e6
    return f"{text}; {low:.2f} to {low + reply_tokens * price[1] / 1e6:.2f} at the given prices"
