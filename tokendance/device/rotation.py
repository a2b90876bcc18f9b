"""What a rotary embedding is before there are tables: frequencies, pairing and a factor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch


class Rotation(NamedTuple):
    """How layers rotate their queries and keys; the arguments of `Rope` but the positions.

    Attributes:
        inv_freq: ``[rotary_dim / 2]`` fp32, radians per position.
        interleaved: the pairing of dimensions.
        attention_factor: of the rotary dimensions of fresh queries and keys.
    """

    inv_freq: torch.Tensor
    interleaved: bool
    attention_factor: float


def default_frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    """``[rotary_dim / 2]`` fp32, by the very operations with which models make theirs."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even number >= 2, got {rotary_dim}")
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"rope_theta: expected a finite value > 0, got {theta}")
    exponent = even(rotary_dim) / rotary_dim
    frequencies: torch.Tensor = 1.0 / (theta**exponent)
    return frequencies


def even(rotary_dim: int) -> torch.Tensor:
    """``0, 2 .. rotary_dim - 2`` in fp32."""
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu")


def required(config: Any, field: str) -> Any:
    """A field of a transformers config. Raises ``ValueError`` where it is missing or None."""
    value = getattr(config, field, None)
    if value is None:
        raise ValueError(f"{field}: expected in the config, got none ({type(config).__name__})")
    return value
