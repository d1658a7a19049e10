"""SPEC's error budget: against a float64 reference, at most 1.5x the error of plain PyTorch at the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.5
_SMALL = 512  # elements: below, the error of either is a matter of luck


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Relative Frobenius norm of the difference, in float64."""
    reference = reference.double()
    difference = (actual.double() - reference).norm()
    return float(difference / reference.norm().clamp(min=torch.finfo(torch.float64).tiny))


def floor(dtype: torch.dtype, numel: int, cancels: bool = False) -> float:
    """Relative error that is forgiven: of the order of one rounding, less where many elements average it.

    `cancels`: the gradient of rows that see hardly a key, where dP and its mean leave little but rounding.
    """
    eps = torch.finfo(dtype).eps
    if cancels:
        return (256 if dtype == torch.float32 else 8) * eps
    if dtype == torch.float32:
        return 8 * eps  # sums in another order
    return eps if numel < _SMALL else eps / 8


def assert_within_budget(
    actual: Tensor,
    reference: Tensor,
    eager: Tensor,
    what: str = "",
    dtype: torch.dtype | None = None,
    cancels: bool = False,
) -> None:
    """`actual` is as near to the float64 `reference` as `eager`, the same in plain PyTorch at the same dtype, may be.

    -inf has to be where it is in the reference, and nothing is NaN. Rows that are zero in the reference, like the
    gradient of a query that sees one key only, have no relative error: they are held to rounding of the largest
    elements. `dtype` is that of the inputs, where the result's is wider; `cancels` as in `floor`.
    """
    dtype = actual.dtype if dtype is None else dtype
    assert actual.shape == reference.shape, f"{what}: shape {tuple(actual.shape)}, reference {tuple(reference.shape)}"
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} NaN"
    infinite = reference.isinf()
    assert torch.equal(actual.isinf() & (actual < 0), infinite & (reference < 0)), f"{what}: -inf in other places"
    actual, reference, eager = (x.double().masked_fill(infinite, 0) for x in (actual, reference, eager))
    assert actual.isfinite().all(), f"{what}: not finite"
    if actual.numel() == 0:
        return
    size = reference.abs().amax(-1, keepdim=True)
    dead = (size <= 1e-10 * max(1.0, float(size.max()))).expand_as(reference)
    if dead.any():
        worst = float(actual[dead].abs().max())
        allowed = (128 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps * max(1.0, float(size.max()))
        assert worst <= allowed, f"{what}: {worst:.3g} where the reference is 0, at most {allowed:.3g} is rounding"
        actual, reference, eager = (x.masked_fill(dead, 0) for x in (actual, reference, eager))
    if not reference.any():
        return
    error, allowed = relative_error(actual, reference), floor(dtype, reference.numel(), cancels)
    yardstick = relative_error(eager, reference)
    if yardstick == yardstick:  # plain PyTorch itself may overflow, which allows nothing more
        allowed += FACTOR * yardstick
    assert error <= allowed, (
        f"{what}: relative error {error:.3g}, allowed {allowed:.3g}, plain PyTorch has {yardstick:.3g}"
    )
