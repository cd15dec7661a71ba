"""Proof that a saved result is the model that was trained: a fresh process opens it with plain libraries and compares.

Run as a file this is the fresh process. It imports nothing of the toolkit, so that what opens here opens for anybody.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kd.models.checkpoint import Checkpoint
    from kd.models.roles import LoadSettings

# Largest |saved - trained| over the largest |trained| logit. The same weights on the same kernels give exactly 0; other
# thread counts or a CPU in place of an accelerator reorder sums. In float32 that has been seen to move hidden states by
# 1e-6. 16-bit formats round every intermediate, to 2^-8 (bfloat16) or 2^-11 (float16) of it, and a few such roundings
# add up. A forgotten adapter, a head left out or another base are far above, unless training hardly moved the model.
TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 2**-5, "float16": 2**-8}

# A launcher's variables would make the fresh process wait for its fellow ranks.
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "DEEPSPEED_")


@dataclass(frozen=True)
class Verification:
    """What was found: largest absolute difference, scale (largest absolute logit), dtype of the opened weights."""

    difference: float
    scale: float
    dtype: str

    @property
    def relative(self) -> float:
        return self.difference / self.scale if self.scale > 0 else self.difference


def verify_saved(
    folder: Path,
    probe_input_ids: Sequence[int],
    expected_logits_TV: torch.Tensor,
    settings: LoadSettings,
    base: Checkpoint | None = None,
) -> Verification:
    """Open `folder` in a fresh process and compare its logits on one row with those of the model it was saved from.

    An adapter folder is opened on the base that its adapter_config.json names, in the dtype of `settings` and
    quantised as there; a full checkpoint in the dtype it was saved in, or in bfloat16 where that is how the trained
    model computes (FSDP2's mixed precision). The fresh process uses the accelerator of
    `settings` if a second copy of the model fits beside the first, else the CPU.

    Args:
        folder: adapter folder (PEFT) or full checkpoint.
        probe_input_ids: T token ids of one row, without padding.
        expected_logits_TV: [T, V] logits of the trained model in eval mode, on any device, in the dtype in which they
            were computed.
        settings: how the run opens its models.
        base: what an adapter was trained on; a hub id is not asked for again.

    Raises:
        MachineError: the place for temporary files is full.
        RuntimeError: the folder does not open, or the logits differ by more than `TOLERANCE` allows. This is never the
            user's mistake.
    """
    import torch
    from safetensors.torch import save_file

    from kd.models.quantization import loading_settings
    from kd.runs.files import disk_errors

    tensors = {
        "input_ids": torch.tensor([list(probe_input_ids)], dtype=torch.int64),
        "logits": expected_logits_TV.detach().to("cpu", torch.float32).contiguous(),
    }
    request = {
        "folder": str(folder),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "computed_in": str(expected_logits_TV.dtype).removeprefix("torch."),
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
        "device": settings.device,
        "quantization": settings.quantization and loading_settings(settings.quantization, settings.dtype),
        "downloaded": {} if base is None else {base.path: str(base.folder)},
    }
    with tempfile.TemporaryDirectory(prefix="dae-verify-") as scratch:
        probe = Path(scratch) / "probe.safetensors"
        with disk_errors(probe):
            save_file(tensors, probe)
        answer = _ask_fresh_process(probe, request)
    found = Verification(answer["difference"], answer["scale"], answer["dtype"])
    allowed = TOLERANCE[found.dtype]
    if not found.relative <= allowed:  # also where it is NaN
        raise RuntimeError(
            f"{folder}: the saved model is not the trained one: opened by a fresh process its logits differ by "
            f"{found.relative:.2e} of their scale ({found.difference:.3g} of {found.scale:.3g}; "
            f"{found.dtype} allows {allowed:.2e})"
        )
    return found


def _ask_fresh_process(probe: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    # -P keeps this file's folder out of the path: its neighbours must not pass for top-level modules.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(probe), json.dumps(request)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise RuntimeError(f"{request['folder']}: a fresh process cannot open the saved model:\n{tail}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _compare(probe: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """In the fresh process: load, run, compare."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(probe)
    model = _open(request)
    with torch.inference_mode():
        logits_TV = model(tensors["input_ids"].to(model.device), use_cache=False).logits[0].float().cpu()
    expected_TV = tensors["logits"]
    if logits_TV.shape != expected_TV.shape:
        raise SystemExit(
            f"the saved model gives logits of shape {list(logits_TV.shape)}, not {list(expected_TV.shape)}"
        )
    return {
        "difference": float((logits_TV - expected_TV).abs().max()),
        "scale": float(expected_TV.abs().max()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _open(request: Mapping[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    folder = Path(request["folder"])
    adapter_config = folder / "adapter_config.json"
    is_adapter = adapter_config.is_file()
    base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"] if is_adapter else folder
    source = request["downloaded"].get(base, base)
    full = "bfloat16" if request["computed_in"] == "bfloat16" else "auto"
    how: dict[str, Any] = {
        "dtype": request["dtype"] if is_adapter else full,
        "attn_implementation": request["attn_implementation"],
        "trust_remote_code": request["trust_remote_code"],
    }
    if request["quantization"]:
        from transformers import BitsAndBytesConfig

        files = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
        how["quantization_config"] = BitsAndBytesConfig(**request["quantization"])
        how["device_map"] = {"": _device(files, request["device"])}
    model: Any = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, **how)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        _use_exact_products(model)
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    opened: PreTrainedModel = model.eval()
    if not request["quantization"]:
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        opened = model.to(_device(weights, request["device"]))
    return opened


def _use_exact_products(model: Any) -> None:
    """As a run computes. bitsandbytes by itself goes to bfloat16 on some CPUs, and rounds inputs of 8-bit layers."""
    from bitsandbytes.autograd._functions import MatMul8bitFp
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def product(layer: Any, x: torch.Tensor) -> Any:
        if layer.weight.CB is not None:
            layer.init_8bit_state()
        return MatMul8bitFp.apply(x, layer.weight, None, layer.bias, layer.state)

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.forward = partial(product, module)  # type: ignore[method-assign]


def _device(weights: int, wanted: str) -> str:
    """The accelerator where half as much again as the weights (in bytes) is free on it, else the CPU."""
    import torch

    if not wanted.startswith("cuda") or not torch.cuda.is_available():
        return "cpu"
    return wanted if torch.cuda.mem_get_info(wanted)[0] > 1.5 * weights else "cpu"


if __name__ == "__main__":
    result = _compare(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
