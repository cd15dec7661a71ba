"""What all merges share: checking that checkpoints fit together, merging adapters first, publishing.

The arithmetic is in mixture.py (`dae merge moe`), weights.py (`dae merge weights`) and to_lora.py (`dae merge
to-lora`); mergekit_calls.py calls mergekit.
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

# Config keys that change what weights mean (an error if they differ), and some that change less (a warning).
_SAME_MEANING = ("hidden_act", "hidden_activation", "activation_function", "num_attention_heads", "num_key_value_heads")
_WORTH_A_WARNING = ("rope_parameters", "sliding_window", "rms_norm_eps", "layer_norm_epsilon")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# Writes the result's files into the first folder and returns the summary; the second folder is scratch space.
Make = Callable[[Path, Path], Mapping[str, Any]]


Inputs = Mapping[str, Checkpoint]  # by role, the base first: adapters are checked against it, and provenance names it


def same(*sources: Checkpoint) -> bool:
    """Whether these are one and the same model."""
    return len({one.fingerprint for one in sources}) == 1


def run_merge(recipe: MergeRecipe, inputs: Inputs, check: Callable[[], None], make: Make) -> RunResult:
    """Claim the run folder, merge, publish, and mark it finished. A finished folder is left as it is.

    check: raises UserError if the checkpoints do not fit together; reads no weights. make: the merge itself.

    Raises UserError, MachineError.
    """
    run = RunFolder(recipe.output)
    fingerprints = {role: one.fingerprint for role, one in inputs.items()}
    with run.claim(Start("merge", recipe, fingerprints, str(inputs["base"]), data={})) as state:
        if state == "finished":
            logger.info("%s: already finished; nothing to do", recipe.output)
            return RunResult(run.path, run.summary())
        check()
        for one in dict.fromkeys(inputs.values()):
            if not one.is_adapter:
                check_complete(one)
        scratch = run.path / f"{TEMPORARY_PREFIX}merge"  # the next claim removes it after a kill
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
            run.checkpoints.folder.rmdir()  # a merge has no checkpoints
        run.mark_finished(summary)
        return RunResult(run.path, summary)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_same_architecture(role: str, other: Checkpoint, base: Checkpoint) -> None:
    """Raise UserError if a full checkpoint's weights do not have the base's names and shapes, or mean something else.

    Other settings that differ (rotary base, sliding window, ...) give a warning: the result has the base's.
    """
    theirs, ours = other.meta_model(), base.meta_model()
    if type(theirs) is not type(ours):
        raise UserError(
            f"{role} {other}: is a {type(theirs).__name__}, but {base} is a {type(ours).__name__}; all checkpoints "
            "need one architecture"
        )
    shapes, wanted = _shapes(theirs), _shapes(ours)
    for name in [*wanted, *(shapes.keys() - wanted.keys())]:
        if shapes.get(name) == wanted.get(name):
            continue
        remedy = ""
        if name in shapes and name in wanted and shapes[name][1:] == wanted[name][1:] and "layers" not in name:
            remedy = f"; if only vocabulary padding differs, use model.resize_token_embeddings({wanted[name][0]})"
        raise UserError(
            f"{role} {other}: {name} is {shapes.get(name, 'missing')}, but {wanted.get(name, 'missing')} in "
            f"{base}{remedy}"
        )
    for key in (*_SAME_MEANING, *_WORTH_A_WARNING):
        values = [getattr(model.config.get_text_config(), key, None) for model in (theirs, ours)]  # type: ignore[union-attr,operator]
        if values[0] == values[1]:
            continue
        words = f"{role} {other}: {key} is {values[0]}, but {values[1]} in {base}"
        if key in _SAME_MEANING:
            raise UserError(f"{words}; such weights cannot be merged")
        logger.warning("%s; the result has the base's", words)


def _shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def foundation(adapter: Checkpoint, candidates: Sequence[Checkpoint]) -> Checkpoint:
    """The base of an adapter, among candidates: by its provenance, else the first."""
    recorded = base_fingerprint_of(adapter.folder)
    return next((one for one in candidates if one.fingerprint == recorded), candidates[0])


def check_foundation(role: str, adapter: Checkpoint, candidates: Sequence[Checkpoint]) -> None:
    """Raise UserError if a role's adapter fits none of the candidates, or peft cannot merge it."""
    base = foundation(adapter, candidates)
    check_adapter(role, adapter, base)
    if adapter.adapter_config.get("kasa_config"):
        return  # can be merged, but only with the weights of its base
    adapted = put_adapter(base.meta_model(), adapter, STUDENT_ADAPTER)
    nn.Module.to(adapted, "meta")  # the adapter's weights were read, the base's were not
    merged(adapted, STUDENT_ADAPTER, str(adapter))


# -- full checkpoints --------------------------------------------------------------------------------------------------


def whole_checkpoint(role: str, source: Checkpoint, candidates: Sequence[Checkpoint], scratch: Path) -> Path:
    """The folder of a role's full checkpoint: its own, or a LoRA adapter merged into its base, in `scratch`.

    Adapters are merged and saved in float32, so that the final result is rounded once.

    Raises UserError if weights are not finite, or the adapter cannot be merged.
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
    """The dtype of a checkpoint's first floating-point tensor. Raises UserError for quantised weights."""
    for file_name in weight_files(folder):
        if not file_name.endswith(".safetensors"):
            continue
        with safe_open(folder / file_name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                name = str(file.get_slice(key).get_dtype())
                if name in _DTYPES:
                    return _DTYPES[name]
    raise UserError(f"{folder}: weights must be float32, float16 or bfloat16; merge before quantising")


def write_companions(source: Checkpoint, folder: Path) -> None:
    """Write the tokenizer and generation settings of `source`."""
    origin = str(source.folder)
    AutoTokenizer.from_pretrained(origin).save_pretrained(str(folder))
    try:
        generation = GenerationConfig.from_pretrained(origin)
    except OSError:  # it has none: use the BOS, EOS and padding of its config
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(origin))
    generation.save_pretrained(str(folder))


def check_opens(folder: Path, source: Checkpoint) -> int:
    """Open the merged checkpoint with plain transformers; its number of parameters.

    transformers initialises missing tensors at random and ignores unknown ones. source: has the same architecture.

    Raises:
        UserError: tensors are missing, left over or of another shape: mergekit does not know all of the architecture.
        RuntimeError: logits are not finite.
    """
    opened: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, output_loading_info=True
    )
    model, found = opened
    wrong = [f"{name} ({kind.replace('_', ' ')})" for kind, names in found.items() for name in sorted(map(str, names))]
    if wrong:
        raise UserError(
            f"{source}: mergekit cannot merge a {type(model).__name__} completely: "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
        )
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[0, 1, 2, 3]]), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise RuntimeError(f"{folder}: the merged model gives logits that are not finite")
    return sum(parameter.numel() for parameter in model.parameters())
