"""Run accelerate's own preparation for FSDP2 and DeepSpeed on CPUs, where accelerate would fall back to DDP.

PartialState reports MULTI_GPU (or DEEPSPEED) in place of MULTI_CPU, so that accelerate takes its branch for it.

Everything but the device is what a GPU's run has: the plugin that a config makes, the plan, torch's fully_shard or
DeepSpeed's engine, gloo in place of nccl. `python -m benchmarks.fsdp_on_cpus ARGUMENTS` is `dae ARGUMENTS` so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

# What `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` sets, for its processes to read.
FSDP2: Mapping[str, str] = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def zero(stage: int) -> Mapping[str, str]:
    """What `accelerate launch --config_file recipes/accelerate/zero3.yaml` (or zero2.yaml) sets."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    }


def tell_accelerate() -> None:
    """From now on accelerate splits weights over CPU processes where its config asks for FSDP or DeepSpeed."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    begin: Any = PartialState.__init__

    def begin_as_gpus(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
            self.distributed_type = DistributedType.DEEPSPEED if uses_deepspeed else DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus  # type: ignore[method-assign]


if __name__ == "__main__":
    tell_accelerate()
    from dae.cli import main

    sys.exit(main())
