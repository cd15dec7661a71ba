"""Means over the steps between two lines of metrics.jsonl."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.training.objective import Objective, Route, RouteSums


@dataclass(frozen=True)
class WindowMeans:
    loss_R: Tensor
    kl_R: Tensor
    ntp_R: Tensor
    tokens_R: Tensor
    terms: Mapping[str, Tensor]
    router_aux: float | None
    seconds: float

    def route(self, index: int, route: Route) -> dict[str, float]:
        tokens = max(float(self.tokens_R[index]), 1.0)
        values = {f"{route.name}/loss": float(self.loss_R[index]) / tokens}
        if route.teacher is not None and math.isfinite(float(self.kl_R[index])):
            values[f"{route.name}/kl"] = float(self.kl_R[index]) / tokens
        values[f"{route.name}/ntp"] = float(self.ntp_R[index]) / tokens
        values |= {f"{route.name}/{name}": float(sums_R[index]) / tokens for name, sums_R in self.terms.items()}
        values[f"{route.name}/tokens"] = int(self.tokens_R[index])
        return values

    def flat(self, routes: Sequence[Route]) -> dict[str, float]:
        values: dict[str, float] = {}
        for index, route in enumerate(routes):
            if self.tokens_R[index] > 0:
                values |= self.route(index, route)
        values["response_tokens_per_second"] = round(float(self.tokens_R.sum()) / max(self.seconds, 1e-9), 1)
        return values


class MetricsWindow:
    """Sums since the last log; they stay on the device, so that a micro-batch needs no synchronisation."""

    def __init__(self, objective: Objective) -> None:
        self._routes = len(objective.routes)
        self._terms = [term.name for term in objective.terms]
        self._with_router = objective.router_aux_weight > 0
        self._clear()

    def _clear(self) -> None:
        self._sums: Tensor | None = None
        self._since = time.monotonic()

    def add(self, sums: RouteSums) -> None:
        rows = [sums.loss.detach(), sums.kl, sums.ntp, sums.tokens, *sums.terms]
        if self._with_router:  # the sum over micro-batches, and how many they are
            aux = torch.zeros_like(sums.kl) if sums.router_aux is None else sums.router_aux.detach().expand_as(sums.kl)
            rows += [aux, torch.full_like(sums.kl, float(sums.router_aux is not None))]
        block = torch.stack([row.double() for row in rows])
        self._sums = block if self._sums is None else self._sums + block

    def drain(self, reduce: Callable[[Tensor, str], Tensor]) -> WindowMeans:
        rows = 4 + len(self._terms) + 2 * self._with_router
        block = self._sums if self._sums is not None else torch.zeros(rows, self._routes, dtype=torch.float64)
        block = reduce(block, "sum").cpu()
        terms = dict(zip(self._terms, block[4 : 4 + len(self._terms)], strict=True))
        router_aux = float(block[-2, 0] / block[-1, 0]) if self._with_router and block[-1, 0] > 0 else None
        means = WindowMeans(block[0], block[1], block[2], block[3], terms, router_aux, time.monotonic() - self._since)
        self._clear()
        return means


def peak_memory_bytes() -> int:
    """Peak memory of the accelerator if there is one, else the peak resident memory of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
