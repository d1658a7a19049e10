"""From measured times to the constants of a device: robust least squares in log time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import cost
from .grid import Measurement

__all__ = ["fit", "predicted", "residuals"]

_RATES = ("dram_bandwidth", "l2_bandwidth", "sort_rate", "launch_overhead")
_OUTLIER = 0.1  # log time beyond which a residual counts by its absolute value
_PRIOR = 0.02  # what nothing measured tells of stays where it was
_FURTHEST = math.log(30)  # from where it was
# A rate that no pass is bound by has no slope: efficiencies are also started from below and above.
_STARTS = (0.0, -0.5, 0.5)
_STEPS = 60


def _read(device: cost.Device) -> list[float]:
    return [math.log(x) for x in (*(getattr(device, name) for name in _RATES), *device.efficiency)]


def _written(device: cost.Device, logs: Sequence[float]) -> cost.Device:
    values = [math.exp(x) for x in logs]
    rates = dict(zip(_RATES, values, strict=False))
    return replace(device, **rates, efficiency=tuple(values[len(_RATES) :]))  # type: ignore[arg-type]


def predicted(problem: cost.Problem, device: cost.Device) -> dict[tuple[str, str], float]:
    """Seconds by order and stage, as ``Measurement`` names them."""
    found = {key: value for key, value in cost.seconds(problem, device).items() if key[1] in ("forward", "backward")}
    passes = (one for order in cost.LOOP_ORDERS for one in cost.breakdown(problem, device, order))
    found["", "lists"] = next(one.seconds for one in passes if one.name == "lists")
    return found


def residuals(measured: Sequence[Measurement], device: cost.Device) -> list[float]:
    """Log of predicted over measured time."""
    known = {problem: predicted(problem, device) for problem in {m.problem for m in measured}}
    return [math.log(known[m.problem][m.order, m.stage] / m.seconds) for m in measured]


def fit(device: cost.Device, measured: Sequence[Measurement]) -> cost.Device:
    """``device`` with rates and efficiencies that predict ``measured`` best.

    Huber's loss of the logarithms, by Levenberg-Marquardt with numerical slopes, and a weak pull towards the constants
    that ``device`` came with. The peaks (``flops``) stay: their product with an efficiency is what counts. Raises
    ValueError without measurements.
    """
    if not measured:
        raise ValueError("nothing was measured")
    prior = torch.tensor(_read(device), dtype=torch.float64)

    def errors(x: Tensor) -> Tensor:
        return torch.tensor(residuals(measured, _written(device, x.tolist())), dtype=torch.float64)

    candidates = []
    for start in _STARTS:
        x = prior.clone()
        x[len(_RATES) :] += start
        candidates.append(_descend(errors, x, prior))
    return _written(device, min(candidates, key=lambda found: found[1])[0].tolist())


def _loss(error: Tensor, x: Tensor, prior: Tensor) -> float:
    size = error.abs()
    huber = torch.where(size < _OUTLIER, size * size / 2, _OUTLIER * (size - _OUTLIER / 2))
    return float(huber.sum() + 0.5 * (_PRIOR * (x - prior)).square().sum())


def _descend(errors: Callable[[Tensor], Tensor], x: Tensor, prior: Tensor) -> tuple[Tensor, float]:
    """A minimum near ``x``, and the loss there."""
    identity, width, damping = torch.eye(len(x), dtype=x.dtype), 1e-4, 1e-2
    error = errors(x)
    loss = _loss(error, x, prior)
    for _ in range(_STEPS):
        slopes = torch.stack([(errors(x + width * unit) - error) / width for unit in identity], 1)
        weight = (_OUTLIER / error.abs().clamp(min=_OUTLIER))[:, None]
        curvature = slopes.T @ (weight * slopes) + _PRIOR**2 * identity
        gradient = slopes.T @ (weight[:, 0] * error) + _PRIOR**2 * (x - prior)
        before = loss
        for _ in range(10):
            step = torch.linalg.solve(curvature + damping * curvature.diag().diag(), -gradient)
            tried = torch.clamp(x + step.clamp(-0.5, 0.5), prior - _FURTHEST, prior + _FURTHEST)
            if (there := _loss(found := errors(tried), tried, prior)) < loss:
                x, error, loss, damping = tried, found, there, max(damping / 4, 1e-6)
                break
            damping *= 4
        if before - loss <= 1e-8 * before:
            break
    return x, loss
