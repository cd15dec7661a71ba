"""Run accelerate's own FSDP2 preparation on CPUs, where accelerate would fall back to DDP.

PartialState reports MULTI_GPU in place of MULTI_CPU, so that accelerate takes its branch for FSDP.

Everything but the device is what a GPU's run has: the plugin that a config makes, the plan, torch's fully_shard, gloo
in place of nccl. `python -m benchmarks.fsdp_on_cpus ARGUMENTS` is `dae ARGUMENTS` so.
"""

from __future__ import annotations

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


def tell_accelerate() -> None:
    """From now on accelerate splits weights over CPU processes where its config asks for FSDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    begin: Any = PartialState.__init__

    def begin_as_gpus(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus  # type: ignore[method-assign]


if __name__ == "__main__":
    tell_accelerate()
    from dae.cli import main

    sys.exit(main())
