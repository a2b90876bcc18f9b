"""Data whose results lie halfway between two values of a dtype: the last rounding shows.

A kernel that unpacks a 16-bit element and leaves a bit of its neighbour in it is off by less than a
rounding hides, except here.
"""

from __future__ import annotations

import torch


def fill_odd_even(rows: torch.Tensor) -> None:
    """Sets elements to 1 + eps and 1 in turn: the first has a mantissa of all zeros but the last
    bit, so that it spoils its neighbour if any bit does. NaN stays."""
    values = torch.ones(rows.shape[-1])
    values[::2] += torch.finfo(rows.dtype).eps
    rows.copy_(torch.where(rows.isnan(), rows, values.to(rows.dtype)))


def factor(dtype: torch.dtype) -> float:
    """Multiplies 1 so that it lies halfway to the next value."""
    return 1 + torch.finfo(dtype).eps / 2


def set_angles(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> None:
    """Makes every move a multiplication by :func:`factor`."""
    cos.fill_(factor(dtype))
    sin.fill_(0.0)
