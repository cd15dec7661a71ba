"""When a training is said not to have levelled off."""

from __future__ import annotations

import numpy as np
from dae_eval.comparing.curves import still_falling, training_curves


def test_still_falling_is_not_said_of_noise_or_of_a_curve_that_levelled_off() -> None:
    rng = np.random.default_rng(0)

    def lines(values: np.ndarray, key: str = "train/ntp") -> list[dict[str, float]]:
        return [{"step": i + 1, key: float(value)} for i, value in enumerate(values)]

    steps = np.arange(1, 101)
    told = [bool(still_falling(lines(2 + rng.normal(0, 0.2, 100)))) for _ in range(300)]
    assert np.mean(told) < 0.06
    assert still_falling(lines(2 + np.exp(-steps / 10) + rng.normal(0, 0.01, 100))) == []
    assert len(still_falling(lines(4 - 0.03 * steps + rng.normal(0, 0.02, 100)))) == 1
    assert still_falling(lines(4 - 0.03 * steps[:15])) == []  # too few to tell
    held_out = lines(np.linspace(3, 1, 10), "eval_shop_ntp")
    (sentence,) = still_falling([*lines(np.full(100, 2.0)), *held_out])
    assert sentence.startswith("held-out loss on shop rows still fell by 18")


def test_curves_come_from_the_best_measurement_there_is() -> None:
    logged = {"step": 10, "loss": 1.0, "shop/kl": 0.5, "shop/ntp": 2.0}
    held_out = {"step": 10, "eval_shop_kl": 0.6, "eval_shop_ntp": 2.1, "eval_loss": 0.6}
    drift = {"step": 0, "drift/shop/kl_reference": 0.0, "drift/shop/kl_expert": 0.7, "drift/shop/loss": 2.2}

    def names(*lines: dict[str, float], own_loss: bool = False) -> list[str]:
        return [curve.name for curve in training_curves("student", lines, own_loss=own_loss)]

    assert names(logged) == ["KL(teacher || student), shop training rows"]
    assert names(logged, held_out) == ["KL(teacher || student), shop rows", "held-out loss, shop rows"]
    assert names(logged, held_out, drift) == [
        "KL(reference || student), shop rows",
        "KL(expert || student), shop rows",
        "held-out loss, shop rows",
    ]
    assert names({"step": 10, "train/ntp": 2.0}, own_loss=True) == ["training loss, train rows"]
