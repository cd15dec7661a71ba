"""What ranks send each other: the weights and gradients of each micro-batch, written down as they are sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MICRO_BATCH = "micro-batch"


@dataclass(frozen=True)
class Collectives:
    """In a rank of `processes.ranks`: a line in `file` for each collective, and one where a micro-batch begins."""

    file: str

    def arm(self) -> None:
        import torch.distributed
        from torch import Tensor
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        from torch.nn.parallel import DistributedDataParallel

        from kd.training.trainer import RoutedTrainer

        def write(kind: str, *tensors: Any) -> None:
            whole = max((value.nbytes for value in tensors if isinstance(value, Tensor)), default=0)
            with Path(self.file).open("a", encoding="utf-8") as file:
                file.write(json.dumps([kind, whole]) + "\n")

        def written(owner: Any, name: str, kind: str) -> None:
            real: Callable[..., Any] = getattr(owner, name)

            def call(*arguments: Any, **named: Any) -> Any:
                write(kind, *((*arguments, *named.values()) if kind != MICRO_BATCH else ()))
                return real(*arguments, **named)

            setattr(owner, name, call)

        written(torch.distributed, "all_gather_single", "all-gather")
        written(torch.distributed, "reduce_scatter_single", "reduce-scatter")
        written(RoutedTrainer, "training_step", MICRO_BATCH)
        begin: Callable[..., None] = DistributedDataParallel.__init__

        def begin_with_hook(wrapper: Any, *arguments: Any, **named: Any) -> None:
            begin(wrapper, *arguments, **named)

            def hook(group: Any, bucket: Any) -> Any:
                write("all-reduce", bucket.buffer())
                return allreduce_hook(group, bucket)

            hook.__annotations__.clear()  # torch wants its own types there, or none
            wrapper.register_comm_hook(None, hook)

        setattr(DistributedDataParallel, "__init__", begin_with_hook)  # noqa: B010


def of_step(file: Path, step: int, accumulation: int) -> dict[str, int]:
    """Bytes of whole tensors by kind of collective in one optimizer step; the first step is 0."""
    lines: list[tuple[str, int]] = [tuple(json.loads(line)) for line in file.read_text().splitlines()]
    sums: dict[str, int] = {}
    micro_batch = -1
    for kind, size in lines:
        micro_batch += kind == MICRO_BATCH
        if kind != MICRO_BATCH and micro_batch // accumulation == step:
            sums[kind] = sums.get(kind, 0) + size
    return sums
