"""The one judge of numbers in the tests: compares with a bound and names the first value that is wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(
    found: Tensor, expected: Tensor, bound: float = 0.0, *, scale: Tensor | float = 1.0, norm: bool = False
) -> None:
    """Fail unless |found - expected| <= bound * scale for every element. Equal infinities, and two NaN, are no error.

    Args:
        found: what is judged, of any real dtype.
        expected: of the same shape; best in FP64, where `found` was computed in less.
        bound: largest error; 0 demands equal values, zeros of the same sign included.
        scale: what the bound is relative to, for example the same sum over magnitudes; broadcasts.
        norm: judge the Frobenius norm of the error, relative to that of `expected`, instead of each element.

    Raises:
        AssertionError: names the number of wrong values and, of the first one (with `norm`, the worst), the
            coordinate, both values and the error.
    """
    assert found.shape == expected.shape, f"found shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    a, b = (t.detach().cpu().to(torch.float64 if t.is_floating_point() else torch.int64) for t in (found, expected))
    same = (a == b) | (a.isnan() & b.isnan())
    if bound == 0:
        same &= a.isnan() | (a.signbit() == b.signbit())
    # What is NaN or infinite on one side alone is wrong by any bound.
    error = torch.where(same, 0, (a - b).abs().double()).nan_to_num(torch.inf)
    if norm:
        relative = float(error.norm() / b.double().norm()) if error.any() else 0.0
        wrong, good = error == error.max() if error.numel() else ~same, relative <= bound
        what = f"relative error {relative:.3g} of the whole, the largest"
    else:
        allowed = bound * torch.as_tensor(scale, dtype=torch.float64).detach().cpu()
        wrong = ~same & (~(error <= allowed) | (bound == 0))
        good = not wrong.any()
        what = f"{int(wrong.sum())} of {a.numel()} values are wrong, the first"
    if not good:
        at = tuple(wrong.nonzero()[0].tolist())
        values = f"found {a[at].item()!r}, expected {b[at].item()!r}"
        raise AssertionError(f"{what} at {list(at)}: {values}, error {error[at].item():.3g}, bound {bound:.3g}")
