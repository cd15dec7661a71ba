"""What every merge does around its arithmetic: do the checkpoints belong together, adapters made whole, publishing.

Where the arithmetic is: mixture.py (`dae merge moe`), weights.py (`dae merge weights`), to_lora.py (`dae merge
to-lora`); mergekit stands behind mergekit_calls.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dae.merging.card import write_merge_card
from dae.merging.recipe import MergeRecipe
from kd.errors import UserError
from kd.models.adapters import put_adapter
from kd.models.checkpoint import Checkpoint
from kd.models.checkpoint_files import weight_files
from kd.models.compatibility import check_adapter, check_complete
from kd.models.merged import merged
from kd.models.roles import STUDENT_ADAPTER, LoadSettings, load_model, refuse_bad_weights
from kd.runs.files import TEMPORARY_PREFIX, remove
from kd.runs.provenance import base_fingerprint_of
from kd.runs.run_folder import RunFolder, Start
from kd.stages.run_stage import RunResult

logger = logging.getLogger("dae")

# What a model does beyond its weights. Where two configs differ in the first, weights do not mean the same to both.
_SAME_MEANING = ("hidden_act", "hidden_activation", "activation_function", "num_attention_heads", "num_key_value_heads")
_WORTH_A_WARNING = ("rope_parameters", "sliding_window", "rms_norm_eps", "layer_norm_epsilon")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# Writes the result's files into the first folder and returns the summary; the second is for what goes afterwards.
Make = Callable[[Path, Path], Mapping[str, Any]]


Inputs = Mapping[str, Checkpoint]  # by role, the base first: adapters are checked against it, and provenance names it


def same(*sources: Checkpoint) -> bool:
    """Whether these are one and the same model."""
    return len({one.fingerprint for one in sources}) == 1


def run_merge(recipe: MergeRecipe, inputs: Inputs, check: Callable[[], None], make: Make) -> RunResult:
    """Claim the run folder, make the merge, publish it, call it finished. A finished one is left as it is.

    check: raises UserError where the checkpoints do not belong together, and reads no weights; make: the merge itself.

    Raises UserError, MachineError.
    """
    run = RunFolder(recipe.output)
    fingerprints = {role: one.fingerprint for role, one in inputs.items()}
    with run.claim(Start("merge", recipe, fingerprints, str(inputs["base"]), data={})) as state:
        if state == "finished":
            logger.info("%s: this merge is finished; nothing to do", recipe.output)
            return RunResult(run.path, run.summary())
        check()
        for one in dict.fromkeys(inputs.values()):
            if not one.is_adapter:
                check_complete(one)
        scratch = run.path / f"{TEMPORARY_PREFIX}merge"  # the next claim removes what a kill leaves of it
        summary: dict[str, Any] = {}

        def write_files(folder: Path) -> None:
            scratch.mkdir()
            try:
                summary.update(make(folder, scratch))
            finally:
                remove(scratch)
            write_merge_card(folder, recipe, inputs, summary)

        run.publish(write_files)
        with suppress(FileNotFoundError):
            run.checkpoints.folder.rmdir()  # a merge makes none
        run.mark_finished(summary)
        return RunResult(run.path, summary)


# -- do they belong together? ------------------------------------------------------------------------------------------


def check_same_architecture(role: str, other: Checkpoint, base: Checkpoint) -> None:
    """Raise UserError where a full checkpoint's weights could not be laid over the base's, naming the difference.

    Settings that change what weights do (rotary base, sliding window, ...) give a warning: the result has the base's.
    """
    theirs, ours = other.meta_model(), base.meta_model()
    if type(theirs) is not type(ours):
        raise UserError(
            f"{role} {other}: is a {type(theirs).__name__}, {base} is a {type(ours).__name__}; pass checkpoints of one "
            "architecture"
        )
    shapes, wanted = _shapes(theirs), _shapes(ours)
    for name in [*wanted, *(shapes.keys() - wanted.keys())]:
        if shapes.get(name) == wanted.get(name):
            continue
        remedy = ""
        if name in shapes and name in wanted and shapes[name][1:] == wanted[name][1:] and "layers" not in name:
            remedy = (
                f"; if only the vocabulary's padding differs, model.resize_token_embeddings({wanted[name][0]}) mends it"
            )
        raise UserError(
            f"{role} {other}: its {name} is {shapes.get(name, 'not there')}, that of {base} is "
            f"{wanted.get(name, 'not there')}{remedy}"
        )
    for key in (*_SAME_MEANING, *_WORTH_A_WARNING):
        values = [getattr(model.config.get_text_config(), key, None) for model in (theirs, ours)]  # type: ignore[union-attr,operator]
        if values[0] == values[1]:
            continue
        words = f"{role} {other}: {key} is {values[0]}, that of {base} is {values[1]}"
        if key in _SAME_MEANING:
            raise UserError(f"{words}: the same weights would mean something else to each")
        logger.warning("%s; the result has the latter", words)


def _shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def foundation(adapter: Checkpoint, candidates: Sequence[Checkpoint]) -> Checkpoint:
    """What an adapter stands on, among candidates (the likeliest first). Its provenance decides where it has any."""
    recorded = base_fingerprint_of(adapter.folder)
    return next((one for one in candidates if one.fingerprint == recorded), candidates[0])


def check_foundation(role: str, adapter: Checkpoint, candidates: Sequence[Checkpoint]) -> None:
    """Raise UserError where a role's adapter fits none of the candidates, or peft cannot merge it."""
    base = foundation(adapter, candidates)
    check_adapter(role, adapter, base)
    if adapter.adapter_config.get("kasa_config"):
        return  # can be merged, but not without the weights of its base
    adapted = put_adapter(base.meta_model(), adapter, STUDENT_ADAPTER)
    nn.Module.to(adapted, "meta")  # the adapter was read, and would not meet the weights of the base
    merged(adapted, STUDENT_ADAPTER, str(adapter))


# -- whole checkpoints -------------------------------------------------------------------------------------------------


def whole_checkpoint(role: str, source: Checkpoint, candidates: Sequence[Checkpoint], scratch: Path) -> Path:
    """The folder of a role's full checkpoint: its own, or that of a LoRA adapter merged into its base, below `scratch`.

    Merging is in float32 and saved so: the result is rounded once, when the merge that it goes into writes its own.

    Raises UserError where its weights are not finite, or it cannot be merged.
    """
    if not source.is_adapter:
        return source.folder
    base = foundation(source, candidates)
    logger.info("%s: merging the adapter %s into %s first", role, source, base)
    model = put_adapter(load_model(base, LoadSettings(torch.float32)), source, STUDENT_ADAPTER)
    refuse_bad_weights(model, source)
    folder = scratch / role
    merged(model, STUDENT_ADAPTER, str(source)).save_pretrained(str(folder))
    return folder


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a checkpoint's first floating point tensor, as its file says.

    Raises UserError for weights that are stored in a format of quantisation.
    """
    for file_name in weight_files(folder):
        if not file_name.endswith(".safetensors"):
            continue
        with safe_open(folder / file_name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                name = str(file.get_slice(key).get_dtype())
                if name in _DTYPES:
                    return _DTYPES[name]
    raise UserError(f"{folder}: its weights are not stored as float32, float16 or bfloat16; merge before quantising")


def write_companions(source: Checkpoint, folder: Path) -> None:
    """Beside merged weights: the tokenizer and the generation settings that go with them, those of `source`."""
    origin = str(source.folder)
    AutoTokenizer.from_pretrained(origin).save_pretrained(str(folder))
    try:
        generation = GenerationConfig.from_pretrained(origin)
    except OSError:  # it has none: what its config says of start, end and padding
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(origin))
    generation.save_pretrained(str(folder))


def check_opens(folder: Path, source: Checkpoint) -> int:
    """Open what was merged with plain transformers; its number of parameters.

    transformers fills a tensor that a checkpoint lacks with random numbers and passes over one that it does not know.

    source: whose architecture it has.

    Raises:
        UserError: tensors are missing, left over or of another shape: mergekit does not know all of the architecture.
        RuntimeError: logits are not finite.
    """
    opened: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", output_loading_info=True)
    model, found = opened
    wrong = [f"{name} ({kind.replace('_', ' ')})" for kind, names in found.items() for name in sorted(map(str, names))]
    if wrong:
        raise UserError(
            f"{source}: mergekit does not carry all of a {type(model).__name__} over, so it cannot be merged: "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
        )
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[0, 1, 2, 3]]), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise RuntimeError(f"{folder}: what was merged gives logits that are not finite")
    return sum(parameter.numel() for parameter in model.parameters())
