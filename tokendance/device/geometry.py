"""The shape of a model's KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (8, 16, 32)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class KVGeometry:
    """Layers, heads and dtype of a KV cache.

    Args:
        num_layers: L.
        num_q_heads: Hq, a multiple of ``num_kv_heads`` (grouped-query attention).
        num_kv_heads: Hk.
        head_dim: D, one of 64, 80, 96, 128, 256.
        dtype: of the model's keys, values and queries: float32, float16 or bfloat16. A store may
            keep keys and values quantized (:class:`~tokendance.device.quantization.Quantization`).

    Raises:
        ValueError: for anything else, naming the argument.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {self.num_layers}")
        if self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads: expected at least 1, got {self.num_kv_heads}")
        if self.num_q_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads: expected a multiple of num_kv_heads={self.num_kv_heads}, "
                f"got {self.num_q_heads}"
            )
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim: expected one of {HEAD_DIMS}, got {self.head_dim}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, got {self.dtype}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
