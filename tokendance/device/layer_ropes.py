"""The rotation tables of a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendance.device.geometry import KVGeometry
from tokendance.device.rope import Rope


@dataclass(frozen=True)
class LayerRope:
    """A layer's tables on the store's device; ``rotary_dim`` 0 where the layer has no RoPE."""

    cos: Tensor
    sin: Tensor
    interleaved: bool
    attention_factor: float


def layer_ropes(
    geometry: KVGeometry, rope: Rope | Sequence[Rope | None], device: torch.device
) -> tuple[list[LayerRope], int]:
    ropes = list(rope) if isinstance(rope, Sequence) else [rope] * geometry.num_layers
    if len(ropes) != geometry.num_layers:
        raise ValueError(f"rope: expected {geometry.num_layers} layers, got {len(ropes)}")
    tables = [one for one in ropes if one is not None]
    max_position = min((one.max_position for one in tables), default=1 << 30)
    made: dict[int, LayerRope] = {}
    result = []
    for one in ropes:
        if id(one) not in made:
            if one is None:
                empty = torch.empty(max_position, 0, dtype=torch.float32, device=device)
                made[id(one)] = LayerRope(empty, empty, False, 1.0)
            else:
                if one.rotary_dim > geometry.head_dim:
                    raise ValueError(
                        f"rope: expected rotary_dim <= head_dim={geometry.head_dim}, "
                        f"got {one.rotary_dim}"
                    )
                moved = one.to(device)
                made[id(one)] = LayerRope(
                    moved.cos, moved.sin, moved.interleaved, moved.attention_factor
                )
        result.append(made[id(one)])
    return result, max_position


def same_rope(layers: Sequence[int], ropes: Sequence[LayerRope]) -> list[list[int]]:
    """Indices into ``layers``, grouped by the layers' tables: one launch serves a group."""
    groups: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(id(ropes[layer]), []).append(index)
    return list(groups.values())
