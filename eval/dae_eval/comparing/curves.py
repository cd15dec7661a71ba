"""Curves of a model's training metrics: forgetting, held-out loss, and whether the expert had converged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dae_eval.comparing.statistics import Floats
from dae_eval.report import Curve

UNIT = "nats per response token"
STILL_FALLING = 0.02
_FEWEST_EVALUATIONS = 5
_FEWEST_LOGGED = 20


def training_curves(model: str, lines: Sequence[Mapping[str, Any]], *, own_loss: bool) -> list[Curve]:
    """Curves of `drift/*`, else of `eval_*_kl` and `eval_*_ntp`, else (no eval set) of `*/kl` on training rows.

    lines: of metrics.jsonl; the last value of a step counts. With `own_loss` also the training loss, `*/ntp`.
    """
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.items():
            if isinstance(value, int | float):
                points.setdefault(key, {})[int(line["step"])] = float(value)
    shown = _measured(list(points)) + [key for key in points if own_loss and _is_of_training(key, "ntp")]
    return [Curve(model, _name(key), UNIT, *zip(*sorted(points[key].items()), strict=True)) for key in shown]


def _measured(keys: Sequence[str]) -> list[str]:
    """The keys of the best measurement: drift compares with the reference on all routes, `eval_*` with the teacher."""
    drift = [key for key in keys if key.startswith("drift/")]
    held_out = [key for key in keys if key.startswith("eval_") and key.endswith(("_kl", "_ntp"))]
    return drift or held_out or [key for key in keys if _is_of_training(key, "kl")]


def _is_of_training(key: str, quantity: str) -> bool:
    return key.endswith(f"/{quantity}") and not key.startswith("drift/")


def _name(key: str) -> str:
    """`drift/shop/kl_expert` -> `KL(expert || student), shop rows`."""
    if key.startswith("drift/"):
        route, quantity = key.removeprefix("drift/").rsplit("/", 1)
        teacher = quantity.removeprefix("kl_")
        return f"held-out loss, {route} rows" if teacher == quantity else f"KL({teacher} || student), {route} rows"
    if key.endswith("_kl"):
        return f"KL(teacher || student), {key.removeprefix('eval_').removesuffix('_kl')} rows"
    if key.endswith("_ntp"):
        return f"held-out loss, {key.removeprefix('eval_').removesuffix('_ntp')} rows"
    route, quantity = key.rsplit("/", 1)
    return f"training loss, {route} rows" if quantity == "ntp" else f"KL(teacher || student), {route} training rows"


def still_falling(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each loss that was still falling at the end of training.

    Held-out loss (the same rows each time, at least 5 values): the last value is more than 2 % below that at nine
    tenths of the steps. Without one, training loss (other rows each time, at least 20 values): the mean of the last
    tenth is more than 2 % below that of the tenth before, and by more than two standard errors of the difference. A
    learning rate that decays to 0 flattens any curve, so no sentence does not mean that training was long enough.
    """
    curves = training_curves("", lines, own_loss=True)
    held_out = [c for c in curves if c.name.startswith("held-out") and len(c.steps) >= _FEWEST_EVALUATIONS]
    logged = [c for c in curves if c.name.startswith("training") and len(c.steps) >= _FEWEST_LOGGED]
    falls = {c.name: _last_tenth(c) for c in held_out} or {c.name: _last_tenth_of_noisy(c) for c in logged}
    return [
        f"{name.replace(', ', ' on ')} still fell by {100 * fall:.1f} % in the last tenth of training: "
        "training longer may teach more."
        for name, fall in falls.items()
        if fall > STILL_FALLING
    ]


def _last_tenth(curve: Curve) -> float:
    before = float(np.interp(0.9 * curve.steps[-1], curve.steps, curve.values))
    return _fall(before, curve.values[-1])


def _last_tenth_of_noisy(curve: Curve) -> float:
    size = len(curve.values) // 10
    values: Floats = np.array(curve.values)
    last, before = values[-size:], values[-2 * size : -size]
    # Noise between neighbouring points: the same before and after, and a trend hardly adds to it.
    noise = float((np.diff(values[-4 * size :]) ** 2).mean() / 2)
    if before.mean() - last.mean() <= 2 * (2 * noise / size) ** 0.5:
        return 0.0
    return _fall(float(before.mean()), float(last.mean()))


def _fall(before: float, last: float) -> float:
    return (before - last) / before if before > 0 else 0.0
