"""Do these checkpoints belong together? Asked without loading weights: `dae check` and a run give the same answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from kd.config.stage_recipe import Quantization
from kd.errors import UserError
from kd.models.adapter_features import refuse_unknown_features, refuse_unshareable
from kd.models.adapters import put_adapter
from kd.models.checkpoint import Checkpoint, checkpoint
from kd.models.completeness import opened_whole, some
from kd.models.meta_model import meta_tensors
from kd.models.opening import opening, refuse_broken_json, refuse_unsafe_settings
from kd.runs.provenance import base_fingerprint_of, base_quantization_of

logger = logging.getLogger("dae")

# Spaces, newlines, digits, accents, other scripts and emoji: where tokenizers with equal vocabularies still differ.
_PROBES = (
    "Hello  world\n\n\tx = 1234.50",
    "naïve café, Größe 42 cm",
    "价格是多少？ цена €99",
    "🙂 </s><|im_end|> [INST]",
)
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MOST_DESCRIBED = 100  # times what a checkpoint's files hold
_OTHER_TOKENS = (
    "Pass a teacher of the base's family; or distil from one of another tokenizer: `dae distill` with cross_tokenizer."
)


def check_tokenizers(base: Checkpoint, others: Mapping[str, Checkpoint], trust_remote_code: bool = False) -> None:
    """Every role must use the base's tokens: same vocabulary and same encoding (padding of the weights may differ).

    Tokens added after the base's vocabulary are allowed: rows use the base's tokens.
    others: by role. Adapters that bring no tokenizer use the base's. Raises UserError naming role and difference.
    """
    ours = _tokenizer(base, trust_remote_code)
    if ours is None:
        raise UserError(f"{base}: no tokenizer found; save it next to the weights with tokenizer.save_pretrained(...).")
    for role, other in others.items():
        if other is base:
            continue
        theirs = _tokenizer(other, trust_remote_code)
        if theirs is None:
            if other.is_adapter:
                continue
            raise UserError(
                f"{role} {other}: no tokenizer found, so its tokens cannot be compared with those of {base}. "
                "If they are the same, copy the base's tokenizer files into it."
            )
        difference = _difference(ours, theirs)
        if difference:
            raise UserError(
                f"{role} {other}: its tokenizer differs from that of {base} ({difference[0]}). A teacher must "
                f"share the student's tokenizer: token ids must mean the same to both. {difference[1]}"
            )
        _warn_of_added_tokens(role, other, base, ours, theirs)


def _tokenizer(source: Checkpoint, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not source.has_tokenizer:
        return None
    refuse_broken_json(source.folder, *TOKENIZER_JSON)
    refuse_unsafe_settings(source.folder, trust_remote_code)
    with opening(f"{source}: its tokenizer cannot be opened"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source.folder), trust_remote_code=trust_remote_code
        )
        tokenizer.get_vocab()
        for text in _PROBES:
            tokenizer.encode(text, add_special_tokens=False)
        tokenizer("probe")  # some settings are read no sooner
    return tokenizer


def _difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """(what differs, what helps) between two tokenizers, or None where a row's tokens mean the same to both models."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    token = min((token for token in a.keys() & b.keys() if a[token] != b[token]), default=None)
    if token is not None:
        return f"{token!r} is token {a[token]} in one and {b[token]} in the other", _OTHER_TOKENS
    missing = {token for token in a.keys() - b.keys() if token != ours.pad_token}
    extra = b.keys() - a.keys()
    if missing or not all(b[token] in theirs.added_tokens_decoder and b[token] > max(a.values()) for token in extra):
        shown = some([repr(token) for token in missing or extra])
        who = "it lacks" if missing else "the base's lacks"
        remedy = _OTHER_TOKENS
        if missing and not extra and all(a[token] in ours.added_tokens_decoder for token in missing):
            remedy = "Pass the base as it was before these tokens were added, or train the teacher with them."
        return f"{len(b)} tokens against {len(a)}; {who} {shown}", remedy
    for text in _PROBES:
        if ours.encode(text, add_special_tokens=False) != theirs.encode(text, add_special_tokens=False):
            return f"{text!r} is split into other tokens", _OTHER_TOKENS
    return None


def _warn_of_added_tokens(
    role: str, other: Checkpoint, base: Checkpoint, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> None:
    """Warn, once, of tokens that were added for one of the two only, [PAD] mostly: no row needs them."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    if extra := b.keys() - a.keys():
        logger.warning(
            "%s %s: its tokenizer has tokens that %s lacks (%s). Rows use the base's tokens, so the student does not "
            "learn them",
            role,
            other,
            base,
            some([repr(token) for token in extra]),
        )
    elif a.keys() - b.keys():
        logger.warning("%s %s: its tokenizer lacks the padding token of %s, which rows do not need", role, other, base)


def check_adapter(
    role: str,
    adapter: Checkpoint,
    base: Checkpoint,
    trust_remote_code: bool = False,
    *,
    shares: bool = False,
    quantization: Quantization | None = None,
) -> None:
    """An adapter must be LoRA (or DoRA), complete, and made for these base weights.

    With a recorded base fingerprint (runs of this toolkit) that decides; without, its tensors must fit the base's
    modules, and another recorded base gives a warning. So does a base that was quantised in another way when the
    adapter was trained. shares: other roles are to speak through the same base weights; quantization: of these.

    Raises UserError naming what does not fit, is missing, or cannot be carried out.
    """
    config, fingerprint = adapter.adapter_config, base.fingerprint
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{role} {adapter}: a {kind} adapter; only LoRA and DoRA adapters can share the backbone. "
            "Where the method allows it, merge it into its base and pass the full checkpoint."
        )
    recorded = base_fingerprint_of(adapter.folder)
    if recorded is not None and recorded != fingerprint:
        raise UserError(
            f"{role} {adapter}: this adapter was trained on another base (fingerprint {recorded[:12]}, but {base} is "
            f"{fingerprint[:12]}). Pass its own base as --base, or merge it and pass the full checkpoint."
        )
    meta_model = base.meta_model(trust_remote_code)
    refuse_unknown_features(adapter)
    if shares:
        refuse_unshareable(adapter)
    try:
        put_adapter(meta_model, adapter, "checked", shared_with=base if shares else None)
    except UserError as error:
        raise UserError(f"{role} {error}") from error
    if recorded is not None and (before := base_quantization_of(adapter.folder)) != quantization:
        _warn_of_other_quantization(role, adapter, before, quantization)
    if recorded is None:
        _warn_of_other_base(role, adapter, str(config.get("base_model_name_or_path") or ""), base)


def _warn_of_other_quantization(role: str, adapter: Checkpoint, before: str | None, now: str | None) -> None:
    """Warn, once for each adapter, that its base does not compute what it did when the adapter was trained."""
    logger.warning(
        "%s %s: was trained on a base that was %s, and is used on one that is %s: it is another model than was trained",
        role,
        adapter,
        *(f"quantised ({how})" if how else "not quantised" for how in (before, now)),
    )


def _warn_of_other_base(role: str, adapter: Checkpoint, named: str, base: Checkpoint) -> None:
    """Warn if an adapter names another base: compared by weights if that base is on this machine, else by name."""
    there = Path(named)
    if named and there.is_dir():
        try:
            if there.samefile(base.folder) or checkpoint(named).fingerprint == base.fingerprint:
                return
        except UserError:
            pass  # not a model, so only the names can be compared, below
        else:
            logger.warning(
                "%s %s: its config names the base %s, whose weights differ from those of %s. If this is not intended, "
                "pass --base %s",
                role,
                adapter,
                named,
                base,
                named,
            )
            return
    if named and there.name != Path(base.path).name:
        logger.warning("%s %s: its config names the base %s, but it is used on %s", role, adapter, named, base)


def check_complete(source: Checkpoint, trust_remote_code: bool = False) -> None:
    """See from the headers of its files that a full checkpoint holds the weights of its architecture.

    Raises UserError naming what is missing, unknown or of another shape, or where it is no causal LM.
    """
    model: Any = source.meta_model(trust_remote_code)
    if getattr(model.config, "quantization_config", None) is not None:
        return  # quantised files hold tensors beyond the architecture; loading checks them
    tensors = meta_tensors(source.folder)
    described, held = (sum(part.numel() for part in one) for one in (_parts_of(model), tensors.values()))
    if described > MOST_DESCRIBED * held:  # transformers would allocate some of it
        raise UserError(
            f"{source}: its config.json describes {described:,} numbers, its files hold {held:,}; correct config.json, "
            "or save the checkpoint again."
        )
    open_model = partial(type(model).from_pretrained, None, config=model.config, state_dict=tensors, device_map="meta")
    with _no_progress_bar():
        opened_whole(source, open_model)
    if (source.folder / GENERATION_CONFIG_NAME).is_file():  # which is opened with the weights
        with opening(f"{source}: {GENERATION_CONFIG_NAME} cannot be read", "Correct or remove it."):
            GenerationConfig.from_pretrained(str(source.folder))


def _parts_of(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from saying that it loads weights."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def refuse_unusable_attention(model: nn.Module, source: Checkpoint, attn_implementation: str | None) -> None:
    """Raise UserError where this model, on this machine, cannot be run with this attention (as transformers names it).

    model: as `Checkpoint.meta_model` gives it; from here on it has this attention.
    """
    if attn_implementation is None:
        return
    try:
        model.set_attn_implementation(attn_implementation)  # type: ignore[operator]
    except (ValueError, ImportError) as error:
        raise UserError(
            f"attn_implementation: {attn_implementation}: {source} cannot be run with it: {str(error).splitlines()[0]} "
            "Leave it out, or write `sdpa` or `eager`."
        ) from error
