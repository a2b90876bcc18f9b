"""Comparisons within tolerances and bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from tokendance.testing.layouts import whole_storage

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference from the fp64 reference that attention in ``dtype`` may have."""
    return _TOLERANCE[dtype]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Compares with the fp64 reference, relative to the largest value of each innermost row.

    ``-inf`` and NaN must stand at the same places. Raises ``AssertionError``.
    """
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"{what}: {actual.shape} and {expected.shape}"
    if expected.numel() == 0:
        return
    finite = expected.isfinite()
    strange = torch.where(finite, 0.0, expected)
    torch.testing.assert_close(
        torch.where(actual.isfinite(), 0.0, actual), strange, equal_nan=True, rtol=0, atol=0
    )
    magnitude = torch.where(finite, expected, 0.0).abs().amax(dim=-1, keepdim=True)
    error = torch.where(finite, (actual - expected).abs(), 0.0) / magnitude.clamp(min=1e-2)
    worst = float(error.max())
    assert worst <= tolerance(dtype), (
        f"{what}: off by {worst:.3g} relative at {_where(error == worst)}, "
        f"expected at most {tolerance(dtype):g}"
    )


def same_bits(actual: Tensor, expected: Tensor) -> Tensor:
    """Elementwise whether bits agree (NaN equals the same NaN, +0 differs from -0): bool."""
    bits = _BITS[expected.element_size()]
    return actual.contiguous().view(bits) == expected.contiguous().view(bits)


def assert_same_bits(
    actual: Tensor, expected: Tensor, what: str = "", any_nan: bool = False
) -> None:
    """Compares shape, dtype and every bit; with ``any_nan`` a NaN may be any other NaN.

    Raises ``AssertionError``.
    """
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if any_nan:
        actual = torch.where(actual.isnan(), torch.nan, actual)
        expected = torch.where(expected.isnan(), torch.nan, expected)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} and {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} and {expected.shape}"
    differs = ~same_bits(actual, expected)
    assert not differs.any(), (
        f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, first at "
        f"{_where(differs)}: {actual[differs][0].item()} instead of {expected[differs][0].item()}"
    )


def assert_same_storage(
    actual: Tensor, expected: Tensor, what: str = "", any_nan: bool = False
) -> None:
    """:func:`assert_same_bits` of whole storages: nothing beside the tensor was written, either."""
    assert actual.stride() == expected.stride(), f"{what}: {actual.stride()}, {expected.stride()}"
    assert_same_bits(actual, expected, what, any_nan)
    storages = whole_storage(actual), whole_storage(expected)
    assert_same_bits(*storages, f"{what}: whole storage", any_nan)


def _where(condition: Tensor) -> list[int]:
    return [int(index) for index in condition.nonzero()[0]]
