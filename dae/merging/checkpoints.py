"""What every merge does around its arithmetic: do the checkpoints belong together, adapters made whole, publishing.

Where the arithmetic is: mixture.py (`dae merge moe`), weights.py (`dae merge weights`), to_lora.py (`dae merge
to-lora`); mergekit stands behind mergekit_calls.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dae.merging.card import write_merge_card
from dae.merging.recipe import MergeRecipe
from kd.errors import UserError
from kd.models.adapter_files import is_adapter, read_adapter_config
from kd.models.adapters import put_adapter
from kd.models.checkpoint_files import model_fingerprint, resolve_model, weight_files
from kd.models.compatibility import check_adapter, check_complete, empty_model
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


@dataclass(frozen=True)
class Checkpoints:
    """What a merge is made from: path as typed of each role, and the fingerprint of each path.

    base: the checkpoint that provenance calls the base; adapters are checked against it. It need not be among `paths`.
    """

    base: str
    paths: Mapping[str, str]
    sha256: Mapping[str, str]

    @property
    def inputs(self) -> dict[str, str]:
        """Role -> fingerprint, the base first."""
        return {"base": self.sha256[self.base]} | {role: self.sha256[path] for role, path in self.paths.items()}

    def same(self, *roles: str) -> bool:
        """Whether these roles are one and the same model."""
        return len({self.inputs[role] for role in roles}) == 1


def read_checkpoints(base: str, paths: Mapping[str, str]) -> Checkpoints:
    """Fingerprint every checkpoint, each path once. Raises UserError where one cannot be had."""
    return Checkpoints(base, paths, {path: model_fingerprint(path) for path in dict.fromkeys([base, *paths.values()])})


def run_merge(recipe: MergeRecipe, checkpoints: Checkpoints, check: Callable[[], None], make: Make) -> RunResult:
    """Claim the run folder, make the merge, publish it, call it finished. A finished one is left as it is.

    check: raises UserError where the checkpoints do not belong together, and reads no weights; make: the merge itself.

    Raises UserError, MachineError.
    """
    run = RunFolder(recipe.output)
    with run.claim(Start("merge", recipe, checkpoints.inputs, checkpoints.base, data={})) as state:
        if state == "finished":
            logger.info("%s: this merge is finished; nothing to do", recipe.output)
            return RunResult(run.path, run.summary())
        check()
        for path in checkpoints.sha256:
            if not is_adapter(path):
                check_complete(path)
        scratch = run.path / f"{TEMPORARY_PREFIX}merge"  # the next claim removes what a kill leaves of it
        summary: dict[str, Any] = {}

        def write_files(folder: Path) -> None:
            scratch.mkdir()
            try:
                summary.update(make(folder, scratch))
            finally:
                remove(scratch)
            paths = {"base": checkpoints.base, **checkpoints.paths}
            write_merge_card(folder, recipe, paths, checkpoints.inputs, summary)

        run.publish(write_files)
        with suppress(FileNotFoundError):
            run.checkpoints.folder.rmdir()  # a merge makes none
        run.mark_finished(summary)
        return RunResult(run.path, summary)


# -- do they belong together? ------------------------------------------------------------------------------------------


def check_same_architecture(role: str, path: str, base: str) -> None:
    """Raise UserError where a full checkpoint's weights could not be laid over the base's, naming the difference.

    Settings that change what weights do (rotary base, sliding window, ...) give a warning: the result has the base's.
    """
    theirs, ours = empty_model(path), empty_model(base)
    if type(theirs) is not type(ours):
        raise UserError(
            f"{role} {path}: is a {type(theirs).__name__}, {base} is a {type(ours).__name__}; pass checkpoints of one "
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
            f"{role} {path}: its {name} is {shapes.get(name, 'not there')}, that of {base} is "
            f"{wanted.get(name, 'not there')}{remedy}"
        )
    for key in (*_SAME_MEANING, *_WORTH_A_WARNING):
        values = [getattr(model.config.get_text_config(), key, None) for model in (theirs, ours)]  # type: ignore[union-attr,operator]
        if values[0] == values[1]:
            continue
        words = f"{role} {path}: {key} is {values[0]}, that of {base} is {values[1]}"
        if key in _SAME_MEANING:
            raise UserError(f"{words}: the same weights would mean something else to each")
        logger.warning("%s; the result has the latter", words)


def _shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def foundation(role: str, checkpoints: Checkpoints, candidates: Sequence[str]) -> str:
    """The checkpoint that a role's adapter stands on, among candidates (paths, the likeliest first).

    Its provenance decides where it has any.
    """
    recorded = base_fingerprint_of(resolve_model(checkpoints.paths[role]))
    return next((one for one in candidates if checkpoints.sha256[one] == recorded), candidates[0])


def check_foundation(role: str, checkpoints: Checkpoints, candidates: Sequence[str]) -> None:
    """Raise UserError where a role's adapter fits none of the candidates, or peft cannot merge it."""
    path, standing = checkpoints.paths[role], foundation(role, checkpoints, candidates)
    check_adapter(role, path, standing, checkpoints.sha256[standing])
    if read_adapter_config(path).get("kasa_config"):
        return  # can be merged, but not without the weights of its base
    empty = put_adapter(empty_model(standing), path, STUDENT_ADAPTER)
    nn.Module.to(empty, "meta")  # the adapter was read, and would not meet the weights of the base
    merged(empty, STUDENT_ADAPTER, path)


# -- whole checkpoints -------------------------------------------------------------------------------------------------


def whole_checkpoint(role: str, checkpoints: Checkpoints, candidates: Sequence[str], scratch: Path) -> Path:
    """The folder of a role's full checkpoint: its own, or that of a LoRA adapter merged into its base, below `scratch`.

    Merging is in float32 and saved so: the result is rounded once, when the merge that it goes into writes its own.

    Raises UserError where its weights are not finite, or it cannot be merged.
    """
    path = checkpoints.paths[role]
    if not is_adapter(path):
        return resolve_model(path)
    base = foundation(role, checkpoints, candidates)
    logger.info("%s: merging the adapter %s into %s first", role, path, base)
    model = put_adapter(load_model(base, LoadSettings(torch.float32)), path, STUDENT_ADAPTER)
    refuse_bad_weights(model, path)
    folder = scratch / role
    merged(model, STUDENT_ADAPTER, path).save_pretrained(str(folder))
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


def write_companions(source: str, folder: Path) -> None:
    """Beside merged weights: the tokenizer and the generation settings that go with them, those of `source`."""
    origin = str(resolve_model(source))
    AutoTokenizer.from_pretrained(origin).save_pretrained(str(folder))
    try:
        generation = GenerationConfig.from_pretrained(origin)
    except OSError:  # it has none: what its config says of start, end and padding
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(origin))
    generation.save_pretrained(str(folder))


def check_opens(folder: Path, source: str) -> int:
    """Open what was merged with plain transformers; its number of parameters.

    transformers fills a tensor that a checkpoint lacks with random numbers and passes over one that it does not know.

    source: whose architecture it has, as typed.

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
