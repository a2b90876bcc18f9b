"""Keys and values in eight bits: what an element stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendance.device.arrays import Array, as_tensor
from tokendance.device.geometry import KVGeometry

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Room above the samples. e4m3 has the same relative precision at any scale, so that room costs next
# to nothing there; in int8 it makes every step larger.
MARGIN = {torch.float8_e4m3fn: 2.0, torch.int8: 1.25}


@dataclass(frozen=True, eq=False, init=False)
class Quantization:
    """The dtype of a quantized pool and the scales of its elements.

    An element of KV head h in layer l stands for itself times ``k_scale[l, h]`` or
    ``v_scale[l, h]``. What is stored is rounded to the nearest element: in e4m3 it is off by at
    most a sixteenth of itself (and half of 2^-9 scales near zero), in int8 by half a scale; what
    lies beyond the largest element, 448 or 127 scales, becomes that.

    Args:
        dtype: ``torch.float8_e4m3fn``, or on the CPU ``torch.int8``.
        k_scale, v_scale: fp32 ``[L, Hk]``, positive and finite.

    Raises:
        ValueError: for anything else, naming the argument.
    """

    dtype: torch.dtype
    k_scale: Tensor
    v_scale: Tensor

    def __init__(self, dtype: torch.dtype, k_scale: Array, v_scale: Array) -> None:
        if dtype not in LARGEST:
            raise ValueError(f"dtype: expected one of {tuple(LARGEST)}, got {dtype}")
        # Copies: pages would change their meaning with the caller's arrays.
        scales = {"k_scale": as_tensor(k_scale).clone(), "v_scale": as_tensor(v_scale).clone()}
        shape = scales["k_scale"].shape
        for name, scale in scales.items():
            if scale.dtype != torch.float32 or scale.dim() != 2:
                raise ValueError(
                    f"{name}: expected torch.float32 [layers, KV heads], "
                    f"got {scale.dtype} {list(scale.shape)}"
                )
            if scale.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(scale.shape)}")
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise ValueError(f"{name}: expected positive, finite scales, got {scale}")
        for name, value in {"dtype": dtype, **scales}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def unit(cls, geometry: KVGeometry, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantization:
        """Scales of 1: enough for e4m3 where no key or value exceeds 448."""
        shape = (geometry.num_layers, geometry.num_kv_heads)
        ones = torch.ones(shape, dtype=torch.float32, device="cpu")
        return cls(dtype, ones, ones.clone())

    @classmethod
    def from_samples(
        cls,
        keys: Sequence[Array],
        values: Sequence[Array],
        dtype: torch.dtype = torch.float8_e4m3fn,
        margin: float | None = None,
    ) -> Quantization:
        """Scales whose largest element is ``margin`` times the largest of the samples; 1 for a
        head whose samples are all zero.

        Args:
            keys, values: per layer ``[..., Hk, D]``, keys rotated. At other positions a key's
                elements are others: those of a rotated pair may grow to its norm.
            margin: room for what the samples do not show, since what exceeds the largest element
                is cut; 2 in e4m3 and 1.25 in int8 by default.

        Raises:
            ValueError: no layers, lists of different lengths, another dtype, or a margin that is
                not positive.
        """
        if dtype not in LARGEST:
            raise ValueError(f"dtype: expected one of {tuple(LARGEST)}, got {dtype}")
        margin = MARGIN[dtype] if margin is None else margin
        if not keys or len(keys) != len(values):
            raise ValueError(f"values: expected {max(len(keys), 1)} layers, got {len(values)}")
        if not margin > 0:
            raise ValueError(f"margin: expected a positive number, got {margin}")

        def scales(samples: Sequence[Array]) -> Tensor:
            rows = []
            for sample in samples:
                heads = as_tensor(sample).detach().float().movedim(-2, 0).flatten(1)
                rows.append(heads.abs().amax(dim=1))
            largest = torch.stack(rows).cpu() * (margin / LARGEST[dtype])
            tiny = torch.finfo(torch.float32).tiny
            return torch.where(largest == 0, 1.0, largest.clamp(min=tiny))

        return cls(dtype, scales(keys), scales(values))

    def to(self, device: torch.device | str) -> Quantization:
        """The same, with its scales on ``device``, contiguous."""
        k, v = (scale.to(device).contiguous() for scale in (self.k_scale, self.v_scale))
        return Quantization(self.dtype, k, v)

    def equals(self, other: Quantization | None) -> bool:
        """Whether ``other`` has the same dtype and scales."""
        return (
            other is not None
            and self.dtype == other.dtype
            and torch.equal(self.k_scale.cpu(), other.k_scale.cpu())
            and torch.equal(self.v_scale.cpu(), other.v_scale.cpu())
        )
