"""What run.json says of a run's last figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

import kd.training.publishing
from kd.training.publishing import summarise


def test_each_route_has_its_newest_figures_though_the_last_step_had_no_row_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kd.training.publishing, "final_evaluation", lambda _: {})
    history = [
        {"loss": 0.9, "general/kl": 0.5, "shop/kl": 0.4, "shop/ntp": 2.0, "grad_norm": 1.0},
        {"loss": 0.8, "general/kl": 0.3, "shop/kl": 0.2},
        {"eval_loss": 0.1, "drift/general": 0.7},
        {"loss": 0.7, "general/kl": 0.1, "learning_rate": 1e-4},
        {"train_runtime": 3.0},
    ]
    state = SimpleNamespace(log_history=history, global_step=3, best_global_step=None)
    alone = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1)
    trainer: Any = SimpleNamespace(state=state, budget=None, accelerator=alone)
    data: Any = SimpleNamespace(counts=lambda _: {})
    summary = summarise(trainer, data, {})
    assert summary["last"] == {"loss": 0.7, "general/kl": 0.1, "shop/kl": 0.2, "shop/ntp": 2.0}
