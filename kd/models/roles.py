"""Roles: the student and its teachers, on as few weights as possible.

A role is a backbone plus one adapter, or none. The usual run holds three roles on one backbone: the student is a
trainable adapter, the expert a frozen adapter, the reference the backbone with all adapters off.

Shape legend: B rows, T positions, N response tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from kd.config.stage_recipe import LoraRecipe, Offload, Quantization
from kd.errors import UserError
from kd.models.adapters import put_adapter
from kd.models.checkpoint import Checkpoint
from kd.models.compatibility import refuse_unusable_attention
from kd.models.completeness import first_line, opened_whole
from kd.models.forward import decoder_of, final_hidden_states, head_of, innermost, unwrapped
from kd.models.merged import state_ties
from kd.models.offloading import open_offloaded
from kd.models.opening import opening
from kd.models.quantization import loading_settings, refuse_unquantisable, with_exact_products
from kd.models.sharding import whole_shape
from kd.models.tensor_files import refuse_not_finite

STUDENT_ADAPTER = "default"  # the name under which peft saves an adapter so that plain loading finds it


Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class LoadSettings:
    """How every model of a run is opened. dtype is a torch dtype; the device is the accelerator if there is one.

    quantization: of the weights of linear layers (kd/models/quantization.py); dtype is then that of all others.
    offload_teachers: where layers of teachers with weights of their own wait (kd/models/offloading.py).
    """

    dtype: torch.dtype
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    device: str = "cpu"
    quantization: Quantization | None = None
    offload_teachers: Offload | None = None


@dataclass(frozen=True)
class Role:
    """A model with one active adapter (a name) or none (None: all adapters off).

    Made once all adapters are on the model: it remembers the model's modules.
    """

    name: str
    model: Model
    adapter: str | None

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.modules())

    @cached_property
    def switches(self) -> tuple[tuple[Any, list[str]], ...]:
        """The modules that adapters sit on, and what this role activates on each: its adapter, or nothing."""
        layers = [m for m in self.modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        return tuple((m, [self.adapter] if self.adapter in m._get_available_adapters() else []) for m in layers)

    def same_as(self, other: Role) -> bool:
        return self.model is other.model and self.adapter == other.adapter


@dataclass
class Backbone:
    """One copy of a base's weights with the adapters that share it, by the names that they have on it."""

    base: Checkpoint
    model: Model
    adapters: dict[Checkpoint, str] = field(default_factory=dict)


def load_model(
    source: Checkpoint, settings: LoadSettings, dtype: torch.dtype | None = None, offload: Offload | None = None
) -> PreTrainedModel:
    """Open a full checkpoint (safetensors only) in eval mode with all weights frozen; on `meta` its architecture alone.

    offload: where its layers wait between passes (kd/models/offloading.py).

    Raises UserError for an unreadable or incomplete checkpoint and for weights that are not finite, naming the tensor.
    """
    source.refuse_adapter()
    if settings.device == "meta":
        meta_model: Any = source.meta_model(settings.trust_remote_code).requires_grad_(False).eval()
        refuse_unusable_attention(meta_model, source, settings.attn_implementation)
        refuse_unknown_forward(meta_model, source)
        return meta_model
    open_model = partial(
        AutoModelForCausalLM.from_pretrained,
        str(source.folder),
        dtype=dtype or settings.dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=True,
    )
    if settings.quantization is not None:
        refuse_unquantisable(source, settings.quantization)
        config = BitsAndBytesConfig(**loading_settings(settings.quantization, settings.dtype))
        # Each weight is quantised where it stays: bitsandbytes' layers are not moved.
        open_model = partial(open_model, quantization_config=config, device_map={"": settings.device})
    if offload is not None:
        trust = settings.trust_remote_code
        model = open_offloaded(source, open_model, offload, settings.device, trust_remote_code=trust)
    else:
        model = opened_whole(source, open_model)
        if settings.quantization is None:
            model.to(settings.device)  # type: ignore[arg-type]
    with_exact_products(model, str(source))
    model.requires_grad_(False)
    model.eval()
    state_ties(model)
    refuse_bad_weights(model, source)
    refuse_unknown_forward(model, source)
    return model


def load_teacher(source: Checkpoint, settings: LoadSettings) -> PreTrainedModel:
    """`load_model` of weights that only teachers without adapters use: they may wait elsewhere between passes."""
    return load_model(source, settings, offload=settings.offload_teachers)


def refuse_bad_weights(model: nn.Module, source: Checkpoint, adapter: str | None = None) -> None:
    """Raise UserError where a weight is NaN or infinite: every loss and gradient after it would be, too."""
    for name, tensor in model.named_parameters():
        if tensor.is_meta or (adapter is not None and adapter not in name.split(".")):
            continue
        as_saved = name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
        refuse_not_finite(source, as_saved, tensor)


def refuse_unknown_forward(model: PreTrainedModel, source: Checkpoint) -> None:
    """Raise UserError for architectures that do not expose their final hidden states in an ordinary forward pass."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters or decoder_of(model) is model:
        raise UserError(
            f"{source}: architecture {type(model).__name__} does not expose its final hidden states "
            "(forward without logits_to_keep, or no get_decoder()); it is not supported."
        )


def trainable_model(source: Checkpoint, settings: LoadSettings, dtype: torch.dtype) -> PreTrainedModel:
    """A full checkpoint whose weights all train. dtype is usually fp32, with bf16 only inside autocast."""
    model = load_model(source, settings, dtype)
    model.requires_grad_(True)
    return model


def add_student_adapter(backbone: Backbone, lora: LoraRecipe) -> PeftModel:
    """Put a new trainable adapter on the backbone (B = 0: the student starts as the base); the wrapped model."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft scales by any number
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
    )
    try:
        return _as_student(backbone, get_peft_model(backbone.model, config, STUDENT_ADAPTER))
    except ValueError as error:
        raise UserError(f"lora.target_modules: {lora.target_modules}: {first_line(error)}") from error


def resume_adapter(backbone: Backbone, adapter: Checkpoint) -> PeftModel:
    """Put an earlier student's adapter on the backbone, to train on; the wrapped model."""
    model = put_adapter(backbone.model, adapter, STUDENT_ADAPTER, trainable=True, shared_with=backbone.base)
    refuse_bad_weights(model, adapter, STUDENT_ADAPTER)
    return _as_student(backbone, model)


def _as_student(backbone: Backbone, model: PeftModel) -> PeftModel:
    # A relative path would only work from the folder this was run in.
    model.peft_config[STUDENT_ADAPTER].base_model_name_or_path = backbone.base.lasting_path
    backbone.model = model
    return model


def add_frozen_adapter(backbone: Backbone, adapter: Checkpoint) -> str:
    """Put an adapter on the backbone, frozen; returns its name. The same one is put on once."""
    if adapter in backbone.adapters:
        return backbone.adapters[adapter]
    name = f"frozen_{len(backbone.adapters)}"
    backbone.model = put_adapter(backbone.model, adapter, name, shared_with=backbone.base)
    refuse_bad_weights(backbone.model, adapter, name)
    backbone.adapters[adapter] = name
    return name


@contextlib.contextmanager
def activate(role: Role) -> Iterator[Model]:
    """The role's model with its adapter active, in eval mode; afterwards everything is as it was.

    peft's own switches rewrite requires_grad on every adapter and walk a full status report each time; this one only
    moves the pointers, so it is cheap enough for every micro-batch and safe under DistributedDataParallel.
    """
    before = [(layer._active_adapter, layer._disable_adapters) for layer, _ in role.switches]
    training = [module for module in role.modules if module.training]
    for layer, active in role.switches:
        layer._disable_adapters = role.adapter is None
        if role.adapter is not None:
            layer._active_adapter = active
    for module in training:
        module.__dict__["training"] = False  # as eval() does, without its walk over the tree
    try:
        yield role.model
    finally:
        for (layer, _), (active, disabled) in zip(role.switches, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
        for module in training:
            module.__dict__["training"] = True


def vocabulary_rows(roles: Sequence[Role]) -> int:
    """Rows that every role's head has: same tokenizer, but checkpoints pad their vocabularies differently."""
    heads: list[Any] = [innermost(unwrapped(role.model).get_output_embeddings()) for role in roles]
    return min(whole_shape(head.weight)[0] for head in heads)


def refuse_unmergeable(model: nn.Module) -> None:
    """Raise UserError where the student's adapter cannot be merged: biases of its own on layers that have none."""
    base = unwrapped(model)
    for name, layer in base.named_modules():
        has_bias = isinstance(layer, LoraLayer) and layer.lora_bias.get(STUDENT_ADAPTER)
        if has_bias and getattr(layer.get_base_layer(), "bias", None) is None:
            raise UserError(
                f"merge: true: the adapter has a bias (lora_bias) for {name}, where the base has none to add it to; "
                "set merge: false."
            )


def check_head(role: Role, vocabulary_rows: int) -> None:
    """Compare the model's own logits with ours on eight tokens, so that no architecture is misread in silence.

    Raises UserError naming role and architecture if it does something to its logits that `Head` does not know.
    """
    ids = torch.arange(8, device=role.model.device)[None] % vocabulary_rows
    with activate(role) as model, torch.no_grad():
        with opening(
            f"role {role.name}: {type(unwrapped(role.model)).__name__} cannot run with its config.json",
            "Correct config.json, or save the checkpoint again.",
        ):
            expected = model(input_ids=ids, use_cache=False).logits[0]
        hidden_BTD = final_hidden_states(model, {"input_ids": ids})
        try:
            head = head_of(model)  # behind the forward passes, which let go of it under ZeRO-3
        except UserError as unknown:
            raise UserError(f"role {role.name}: {unknown}") from unknown
        got = head.logits(hidden_BTD[0])
    if not torch.isfinite(expected).all():
        raise UserError(
            f"role {role.name}: its logits are not finite; its weights or config are damaged. Save or download "
            "it again."
        )
    scale = expected.abs().max().clamp(min=1e-3).item()
    error = (expected.to(got.dtype) - got).abs().max().item() / scale
    if not error < (1e-4 if got.dtype == expected.dtype else 3e-2):
        raise UserError(
            f"role {role.name}: architecture {type(unwrapped(role.model)).__name__} transforms its logits in an "
            f"unknown way (relative difference {error:.1e}); it is not supported."
        )


def check_packing(role: Role, vocabulary_rows: int) -> None:
    """Two rows packed into one sequence must give the hidden states that they give apart. Raises UserError if not."""
    first = torch.arange(5, device=role.model.device)[None] % vocabulary_rows
    second = torch.arange(6, device=role.model.device).flip(0)[None] % vocabulary_rows
    both = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(6)]).to(both.device)[None]
    with activate(role) as model, torch.no_grad():
        apart = torch.cat([final_hidden_states(model, {"input_ids": ids}) for ids in (first, second)], dim=1)
        packed = final_hidden_states(model, {"input_ids": both, "position_ids": positions})
    error = ((apart - packed).abs().max() / apart.abs().max()).item()
    if not error < (1e-4 if apart.dtype in (torch.float32, torch.float64) else 3e-2):
        raise UserError(
            f"data.packing: true: rows of {type(unwrapped(role.model)).__name__} see each other when packed "
            f"(relative difference {error:.1e}); set data.packing=false."
        )
