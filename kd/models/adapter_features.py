"""What an adapter's config requires beyond a low-rank update, and whether it is supported.

A feature that changes the forward pass and is not supported is refused by its key: without it the model would give
other distributions than the expert, without an error.
"""

from __future__ import annotations

import dataclasses

import peft
from peft import LoraConfig

from kd.errors import UserError
from kd.models.checkpoint import Checkpoint
from kd.models.checkpoint_files import ADAPTER_CONFIG

_KNOWN_KEYS = frozenset(field.name for field in dataclasses.fields(LoraConfig))
_WITH_PEFT = "merge it with peft (merge_and_unload), save that and pass the full checkpoint"
_AS_LORA = "it cannot be merged either: train a plain LoRA adapter in its place"
CANNOT_MERGE = (
    "Pass the adapter itself where one is taken (dae align --expert), or train a plain LoRA adapter in its place."
)

# Key of the config -> (what it does, remedy). Not carried out here at all.
_NOT_HERE = {
    "use_bdlora": ("BD-LoRA keeps block-diagonal factors", _WITH_PEFT),
    "arrow_config": ("Arrow routes each token to other adapters", _AS_LORA),
    "monteclora_config": ("MonteCLoRA samples its factors", _WITH_PEFT),
    "use_qalora": ("QA-LoRA pools the inputs of a quantised base", _WITH_PEFT),
    "megatron_config": ("it is made for Megatron's parallel layers", _WITH_PEFT),
}
# Right where the adapter is alone on its base, and not where other roles speak through the same weights.
_NOT_SHARED = {
    "alora_invocation_tokens": ("aLoRA acts only after its invocation tokens", _AS_LORA),
    "layer_replication": ("it repeats layers of the base, for all roles", ""),
    "kasa_config": ("KaSA changes the base's weights, for all roles", ""),
}
# Starts (peft's init_lora_weights) that take what the adapter begins with out of the base's weights.
_STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_changed_base(adapter: Checkpoint) -> None:
    """Raise UserError where an adapter is counted from weights that peft made of the base's when it was begun.

    Putting it on would change the base for all roles, or mean something else than was trained.
    """
    start = adapter.adapter_config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_STARTS_THAT_CHANGE_THE_BASE):
        raise UserError(
            f"{adapter}: was begun with init_lora_weights={start}, which changes the base's weights; convert it to "
            "plain LoRA with peft (save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it "
            "and pass the full checkpoint."
        )


def refuse_unknown_features(adapter: Checkpoint) -> None:
    """Raise UserError where an adapter's config has keys that the installed peft would pass over, or asks for a
    variant that is not carried out here.
    """
    config = adapter.adapter_config
    if config.get("peft_type") != "LORA":
        return  # check_adapter refuses the whole kind
    unknown = {key: value for key, value in config.items() if key not in _KNOWN_KEYS and value not in (None, False)}
    unknown = {key: value for key, value in unknown.items() if value not in ("", [], {})}
    if unknown:
        shown = ", ".join(f"{key}: {value!r}" for key, value in sorted(unknown.items()))
        written = config.get("peft_version")
        by = f" (it was written by {written})" if written else ""
        raise UserError(
            f"{adapter.folder / ADAPTER_CONFIG}: {shown}: peft {peft.__version__}, which is installed, does not know "
            f"this{by} and would leave out what it does to the model. Install the peft that wrote it (pip install -U "
            "peft), or merge it there (merge_and_unload), save that and pass the full checkpoint."
        )
    _refuse(adapter, _NOT_HERE, "which is not supported")


def refuse_unshareable(adapter: Checkpoint) -> None:
    """Raise UserError where an adapter cannot share its base's weights with other roles, by the key of its config."""
    _refuse(adapter, _NOT_SHARED, "so it cannot share its base with other roles")


def _refuse(adapter: Checkpoint, features: dict[str, tuple[str, str]], consequence: str) -> None:
    for key, (what, remedy) in features.items():
        if value := adapter.adapter_config.get(key):
            raise UserError(
                f"{adapter.folder / ADAPTER_CONFIG}: {key}: {value!r}: {what}, {consequence}; "
                f"{remedy or merge_command(adapter)}."
            )


def merge_command(adapter: Checkpoint) -> str:
    """The remedy for an adapter that can be merged: the command that makes a full checkpoint of it."""
    return (
        f"merge it into its base (dae merge weights --method linear --base BASE --expert {adapter} --output MERGED "
        "weight=1) and pass MERGED in its place"
    )
