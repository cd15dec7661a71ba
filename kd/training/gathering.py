"""A student's weights and its optimizer's state, gathered from the ranks' parts, and sharded again.

The optimizer's under FSDP2; DeepSpeed's is another one (zero.py). What is gathered is what one process alone has:
checkpoints are the same files, and a run goes on under another number of processes, sharded or not. All functions are
collective: every rank calls them, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kd.models.checkpoint_files import ADAPTER_WEIGHTS
from kd.models.roles import STUDENT_ADAPTER
from kd.models.sharding import put, reshard, whole, whole_on_main
from kd.models.tensor_files import stored_tensor

# A module that trains with the student and is not part of the result: checkpoints keep it in a file of its own.
TRAINING_ONLY = "training_only"


def gathered_student(model: nn.Module, *, is_main: bool) -> dict[str, Tensor]:
    """What the student's files hold, and what only trains with it, by name in the model; empty on the other ranks."""
    reshard(model)
    own = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        own = {name: w for name, w in own.items() if STUDENT_ADAPTER in name.split(".") or is_training_only(name)}
    else:
        for name in set(dict(model.named_parameters(remove_duplicate=False))) - set(dict(model.named_parameters())):
            del own[name]  # one of two names of tied weights
    return dict(whole_on_main(own, is_main=is_main))


def scatter_student(model: nn.Module, folder: Path) -> None:
    """Put the weights of a student's files into the model's parts, without what only trains with it."""
    reshard(model)
    if isinstance(model, PeftModel):
        stored = load_file(folder / ADAPTER_WEIGHTS)
        own = get_peft_model_state_dict(
            model, model.state_dict(keep_vars=True), adapter_name=STUDENT_ADAPTER, save_embedding_layers=False
        )
        for name, weight in own.items():
            put(weight, stored[name])
        return
    for name, weight in model.named_parameters():
        if not is_training_only(name):
            value = stored_tensor(folder, [name])
            assert value is not None, name
            put(weight, value)


def is_training_only(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] == TRAINING_ONLY


def training_only_weights(student: nn.Module, gathered: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What only trains with the student, by name in its own module; gathered: from `gathered_student`, if sharded."""
    if gathered is None:
        weights: dict[str, Tensor] = getattr(student, TRAINING_ONLY).state_dict()
        return weights
    return {name.partition(".")[2]: weight for name, weight in gathered.items() if is_training_only(name)}


def gathered_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """A `state_dict` of an optimizer with whole tensors, on the CPU."""
    return {
        **state,
        "state": {
            index: {key: whole(value).cpu() if isinstance(value, Tensor) else value for key, value in moments.items()}
            for index, moments in state["state"].items()
        },
    }


def scattered_optimizer(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A `state_dict` of whole tensors, each sharded as its parameter is; groups: of the optimizer to load it."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return {
        **state,
        "state": {
            index: {key: _split_as(parameters[index], value) for key, value in moments.items()}
            for index, moments in state["state"].items()
        },
    }


def _split_as(parameter: Tensor, value: Any) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
