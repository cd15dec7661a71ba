"""Final hidden states, the output layer, and what else a model's forward pass is asked."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from kd.errors import UserError
from kd.models.head import Head
from kd.models.sharding import class_of, gather, is_engine, is_sharded, whole

# Names of tables of positions (wpe, embed_positions, position_embeddings, pos_encoding), and how many rows such a table
# may have before that of position 0.
_OF_POSITIONS = re.compile(r"(^|\.)[^.]*(wpe|pos)[^.]*")

_MOST_ROWS_AHEAD = 8
_INSIDE = "forward_pass_inside"  # of a model, while a function runs inside of its forward pass

Output = TypeVar("Output")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers of peft and of data parallelism."""
    inner = model.module if hasattr(model, "module") else model
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner  # type: ignore[return-value]


def admit_functions(model: nn.Module) -> None:
    """Let `run_in_forward` run functions inside of this model's forward pass; done before it is wrapped."""
    plain: Any = model.forward

    def forward(*arguments: Any, function: Callable[[], Any] | None = None, **named: Any) -> Any:
        if function is None:
            return plain(*arguments, **named)
        vars(model)[_INSIDE] = plain
        try:
            return function()
        finally:
            del vars(model)[_INSIDE]

    model.forward = forward


def run_in_forward(model: nn.Module, function: Callable[[], Output]) -> Output:
    """What a function returns, which runs the model and works on its hidden states.

    Under DDP, FSDP2 and DeepSpeed it runs inside of the wrapped model's forward pass, so that all weights are gathered
    and the tensors it returns (a tensor, or a tuple of them) are the pass's outputs, on which the gathering for the
    backward pass depends. Such a model must admit functions.
    """
    if isinstance(model, DistributedDataParallel) or is_engine(model) or is_sharded(model):
        assert "forward" in vars(getattr(model, "module", model)), "admit_functions was not called"
        output: Output = model(function=function)
        return output
    return function()


@contextlib.contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Inside, `final_hidden_states` of this model computes in the dtype of its weights, as anybody does who opens it.

    For training in mixed precision accelerate has put autocast around its forward pass, and kept what it was.
    """
    plain = vars(model).get("_original_forward")
    if plain is not None:
        vars(model)[_INSIDE] = plain
    try:
        yield
    finally:
        vars(model).pop(_INSIDE, None)


def decoder_of(model: nn.Module) -> nn.Module:
    """The part whose output is the final, normalised hidden states."""
    decoder: nn.Module = unwrapped(model).get_decoder()
    return decoder


def final_hidden_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, T] inputs -> [B, T, D] post-norm hidden states, through the model's ordinary (wrapped) forward pass.

    Going through the wrapper keeps gradient synchronisation and autocast; no position is projected to the vocabulary.
    No cache is made, which also keeps packed rows apart (field: a cache switches the block mask off).
    """
    no_position = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    inside = vars(getattr(model, "module", model)).get(_INSIDE)
    handle = decoder_of(model).register_forward_hook(catch)
    try:
        (inside or model)(**inputs, logits_to_keep=no_position, use_cache=False)
    finally:
        handle.remove()
    return caught[-1]


def head_of(model: nn.Module) -> Head:
    """The output layer as the *currently active* adapter leaves it (modules_to_save copy, LoRA on the head, or plain).

    Raises UserError for output layers that it does not know.
    """
    base = unwrapped(model)
    layer: Any = base.get_output_embeddings()
    if layer is not None:
        gather(layer)
    weight_VD, bias_V = _output_weights(layer, type(base).__name__)
    config = base.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight_VD, bias_V, scale, None if softcap is None else float(softcap))


def _output_weights(layer: nn.Module | None, architecture: str) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, ModulesToSaveWrapper):
        active = next((name for name in layer.active_adapters if name in layer.modules_to_save), None)
        chosen = layer.original_module if layer.disable_adapters or active is None else layer.modules_to_save[active]
        return _output_weights(chosen, architecture)
    if isinstance(layer, TrainableTokensWrapper):
        tokens = layer.token_adapter
        if tokens.disable_adapters or not tokens.active_adapters:
            return _output_weights(tokens.base_layer, architecture)
        return tokens.get_merged_weights(tokens.active_adapters), None  # peft leaves a bias out here
    if isinstance(layer, LoraLinear):
        weight_VD, bias_V = _output_weights(layer.get_base_layer(), architecture)
        for name in [] if layer.disable_adapters else layer.active_adapters:
            if name not in layer.lora_A:
                continue
            if layer.use_dora[name]:
                raise UserError(
                    f"{architecture}: an adapter on the output layer must be plain LoRA, and this one is DoRA; "
                    "merge it into its base and pass the full checkpoint."
                )
            # A frozen role runs in eval mode, where dropout does nothing.
            trains = layer.lora_A[name].weight.requires_grad
            if trains and not isinstance(layer.lora_dropout[name], nn.Identity):
                raise UserError(
                    f"{architecture}: the adapter that trains sits on the output layer, where it can have no dropout; "
                    "set lora.dropout=0, or leave the output layer out of lora.target_modules."
                )
            weight_VD = weight_VD + layer.get_delta_weight(name).to(weight_VD.dtype)
            if layer.lora_bias[name]:
                own_V = layer.scaling[name] * layer.lora_B[name].bias.to(weight_VD.dtype)
                bias_V = own_V if bias_V is None else bias_V + own_V
        return weight_VD, bias_V
    if isinstance(layer, nn.Linear) and class_of(layer) is nn.Linear:
        if isinstance(layer, FSDPModule):
            layer.unshard()
        return whole(layer.weight), None if layer.bias is None else whole(layer.bias)
    raise UserError(f"{architecture}: output layer {type(layer).__name__} is not supported.")


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has a table for, learnt or not; None where it works positions out as they come."""
    base = unwrapped(model)
    config = base.config.get_text_config()
    if config.model_type == "mpt":  # its table of biases is made anew in each pass, from this
        return int(config.max_seq_len)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = innermost(base.get_input_embeddings())
    sizes: list[int] = []
    for name, module in decoder_of(model).named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            rows = module.num_embeddings
            if rows == limit or (_OF_POSITIONS.search(name) and limit < rows <= limit + _MOST_ROWS_AHEAD):
                # RoBERTa begins behind its padding position, OPT and BART have rows ahead of position 0.
                ahead = 0 if module.padding_idx is None else int(module.padding_idx) + 1
                sizes.append(min(limit, rows - ahead - int(getattr(module, "offset", 0))))
        elif any(
            buffer.dim() == 2 and buffer.shape[0] == limit and _OF_POSITIONS.search(buffer_name)
            for buffer_name, buffer in module.named_buffers(recurse=False)
        ):
            sizes.append(limit)  # sines of every position: GPT-J, CodeGen, CTRL
    return min(sizes, default=None)


def innermost(layer: nn.Module) -> nn.Module:
    """A layer of the base without the wrappers that adapters put around it."""
    while True:
        if isinstance(layer, BaseTunerLayer):
            layer = layer.get_base_layer()
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            layer = layer.original_module
        else:
            return layer
