"""SPEC's error budget: against a float64 reference, at most 1.5x the error of plain PyTorch at the same dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 1.5
_ENOUGH = 4096  # elements: with fewer, which of two implementations is nearer is a matter of luck


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Relative Frobenius norm of the difference, in float64."""
    reference = reference.double()
    difference = (actual.double() - reference).norm()
    return float(difference / reference.norm().clamp(min=torch.finfo(torch.float64).tiny))


def floor(dtype: torch.dtype) -> float:
    """Relative error that is forgiven whatever plain PyTorch's is: sums in another order, an odd rounding."""
    eps = torch.finfo(dtype).eps
    return 8 * eps if dtype == torch.float32 else eps / 8


def draws(*tensors: Tensor, most: int = 64, large_logits: bool = False) -> int:
    """How many draws of the inputs, `most` at most, make the errors of tensors of these sizes worth comparing.

    `large_logits`: nearly all of the error is in the few rows where two keys nearly tie, so it takes many rows.
    """
    fewest = min((x.numel() for x in tensors if x.numel()), default=_ENOUGH)
    return min(most, -(-_ENOUGH * (8 if large_logits else 1) // fewest))


class Budget:
    """The errors of one result over several draws of the inputs, and whether they are within the budget.

    `dtype` is that of the inputs; the result's may be wider. -inf has to be where it is in the reference, and nothing
    is NaN.
    """

    def __init__(self, what: str, dtype: torch.dtype) -> None:
        self.what, self.dtype = what, dtype
        self.numel, self.size, self.error, self.eager_error, self.largest = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, actual: Tensor, reference: Tensor, eager: Tensor) -> None:
        """One draw. `eager` is the same in plain PyTorch at the inputs' dtype."""
        assert actual.shape == reference.shape, f"{self.what}: {tuple(actual.shape)}, not {tuple(reference.shape)}"
        assert not actual.isnan().any(), f"{self.what}: {int(actual.isnan().sum())} NaN"
        infinite = reference.isinf()
        assert torch.equal(actual.isinf() & (actual < 0), infinite & (reference < 0)), f"{self.what}: -inf elsewhere"
        actual, reference, eager = (x.detach().double().masked_fill(infinite, 0) for x in (actual, reference, eager))
        assert actual.isfinite().all(), f"{self.what}: not finite"
        if not actual.numel():
            return
        self.numel += actual.numel()
        self.size += float(reference.square().sum())
        self.error += float((actual - reference).square().sum())
        self.eager_error += float((eager - reference).square().sum())
        self.largest = max(self.largest, float(actual.abs().max()))

    def check(self) -> None:
        """Fail where the budget is exceeded."""
        if self.size <= self.numel * 1e-20:
            # Differences of what is equal, as the gradient of a query that sees one key: rounding of float32 sums.
            assert self.largest <= 1e-5, f"{self.what}: {self.largest:.3g} where the reference is 0"
            return
        error, eager = (math.sqrt(x / self.size) for x in (self.error, self.eager_error))
        # Where plain PyTorch overflows it is no measure: a rounding of every operand is allowed.
        allowed = floor(self.dtype) + FACTOR * eager if math.isfinite(eager) else torch.finfo(self.dtype).eps
        assert error <= allowed, (
            f"{self.what}: relative error {error:.3g}, allowed {allowed:.3g}, plain PyTorch has {eager:.3g}"
        )


def assert_within_budget(
    actual: Tensor, reference: Tensor, eager: Tensor, what: str = "", dtype: torch.dtype | None = None
) -> None:
    """`Budget` of one draw."""
    budget = Budget(what, actual.dtype if dtype is None else dtype)
    budget.add(actual, reference, eager)
    budget.check()
