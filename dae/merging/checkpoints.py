"""What all merges share: checking that checkpoints fit together, merging adapters first, publishing.

The arithmetic is in mixture.py (`dae merge moe`), weights.py (`dae merge weights`) and to_lora.py (`dae merge
to-lora`); mergekit_calls.py calls mergekit.
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

# Config keys that change what weights mean (an error if they differ), and some that change less (a warning).
_SAME_MEANING = ("hidden_act", "hidden_activation", "activation_function", "num_attention_heads", "num_key_value_heads")
_WORTH_A_WARNING = ("rope_parameters", "sliding_window", "rms_norm_eps", "layer_norm_epsilon")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

# Writes the result's files into the first folder and returns the summary; the second folder is scratch space.
Make = Callable[[Path, Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Checkpoints:
    """The inputs of a merge: each role's path as typed, and each path's fingerprint.

    base: the base in the provenance; adapters are checked against it. It need not be among `paths`.
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
    """Fingerprint every checkpoint, each path once. Raises UserError if one is not found."""
    return Checkpoints(base, paths, {path: model_fingerprint(path) for path in dict.fromkeys([base, *paths.values()])})


def run_merge(recipe: MergeRecipe, checkpoints: Checkpoints, check: Callable[[], None], make: Make) -> RunResult:
    """Claim the run folder, merge, publish, and mark it finished. A finished folder is left as it is.

    check: raises UserError if the checkpoints do not fit together; reads no weights. make: the merge itself.

    Raises UserError, MachineError.
    """
    run = RunFolder(recipe.output)
    with run.claim(Start("merge", recipe, checkpoints.inputs, checkpoints.base, data={})) as state:
        if state == "finished":
            logger.info("%s: already finished; nothing to do", recipe.output)
            return RunResult(run.path, run.summary())
        check()
        for path in checkpoints.sha256:
            if not is_adapter(path):
                check_complete(path)
        scratch = run.path / f"{TEMPORARY_PREFIX}merge"  # the next claim removes it after a kill
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
            run.checkpoints.folder.rmdir()  # a merge has no checkpoints
        run.mark_finished(summary)
        return RunResult(run.path, summary)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_same_architecture(role: str, path: str, base: str) -> None:
    """Raise UserError if a full checkpoint's weights do not have the base's names and shapes, or mean something else.

    Other settings that differ (rotary base, sliding window, ...) give a warning: the result has the base's.
    """
    theirs, ours = empty_model(path), empty_model(base)
    if type(theirs) is not type(ours):
        raise UserError(
            f"{role} {path}: is a {type(theirs).__name__}, but {base} is a {type(ours).__name__}; all checkpoints need "
            "one architecture"
        )
    shapes, wanted = _shapes(theirs), _shapes(ours)
    for name in [*wanted, *(shapes.keys() - wanted.keys())]:
        if shapes.get(name) == wanted.get(name):
            continue
        remedy = ""
        if name in shapes and name in wanted and shapes[name][1:] == wanted[name][1:] and "layers" not in name:
            remedy = f"; if only vocabulary padding differs, use model.resize_token_embeddings({wanted[name][0]})"
        raise UserError(
            f"{role} {path}: {name} is {shapes.get(name, 'missing')}, but {wanted.get(name, 'missing')} in "
            f"{base}{remedy}"
        )
    for key in (*_SAME_MEANING, *_WORTH_A_WARNING):
        values = [getattr(model.config.get_text_config(), key, None) for model in (theirs, ours)]  # type: ignore[union-attr,operator]
        if values[0] == values[1]:
            continue
        words = f"{role} {path}: {key} is {values[0]}, but {values[1]} in {base}"
        if key in _SAME_MEANING:
            raise UserError(f"{words}; such weights cannot be merged")
        logger.warning("%s; the result has the base's", words)


def _shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def foundation(role: str, checkpoints: Checkpoints, candidates: Sequence[str]) -> str:
    """The base of a role's adapter, among candidates (paths): by its provenance, else the first."""
    recorded = base_fingerprint_of(resolve_model(checkpoints.paths[role]))
    return next((one for one in candidates if checkpoints.sha256[one] == recorded), candidates[0])


def check_foundation(role: str, checkpoints: Checkpoints, candidates: Sequence[str]) -> None:
    """Raise UserError if a role's adapter fits none of the candidates, or peft cannot merge it."""
    path, base = checkpoints.paths[role], foundation(role, checkpoints, candidates)
    check_adapter(role, path, base, checkpoints.sha256[base])
    if read_adapter_config(path).get("kasa_config"):
        return  # can be merged, but only with the weights of its base
    empty = put_adapter(empty_model(base), path, STUDENT_ADAPTER)
    nn.Module.to(empty, "meta")  # the adapter's weights were read, the base's were not
    merged(empty, STUDENT_ADAPTER, path)


# -- full checkpoints --------------------------------------------------------------------------------------------------


def whole_checkpoint(role: str, checkpoints: Checkpoints, candidates: Sequence[str], scratch: Path) -> Path:
    """The folder of a role's full checkpoint: its own, or a LoRA adapter merged into its base, in `scratch`.

    Adapters are merged and saved in float32, so that the final result is rounded once.

    Raises UserError if weights are not finite, or the adapter cannot be merged.
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


def write_companions(source: str, folder: Path) -> None:
    """Write the tokenizer and generation settings of `source`."""
    origin = str(resolve_model(source))
    AutoTokenizer.from_pretrained(origin).save_pretrained(str(folder))
    try:
        generation = GenerationConfig.from_pretrained(origin)
    except OSError:  # it has none: use the BOS, EOS and padding of its config
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(origin))
    generation.save_pretrained(str(folder))


def check_opens(folder: Path, source: str) -> int:
    """Open the merged checkpoint with plain transformers; its number of parameters.

    transformers initialises missing tensors at random and ignores unknown ones. source: the base, as typed.

    Raises:
        UserError: tensors are missing, left over or of another shape: mergekit does not know all of the architecture.
        RuntimeError: logits are not finite.
    """
    opened: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", output_loading_info=True)
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
