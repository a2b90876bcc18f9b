"""How high the work items are that attention is asked for (`tokendance.device.executor`)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tokendance.device.executor import work_shape
from tokendance.device.geometry import KVGeometry

F32, F16, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "pool_dtype", "query_rows"),
    [
        ("cuda", 64, F16, None, 128),
        ("cuda", 128, BF16, BF16, 128),
        ("cuda", 128, BF16, E4M3, 64),
        ("cuda", 128, F32, None, 64),
        ("cuda", 96, BF16, None, 64),
        ("cuda", 256, BF16, None, 64),
        ("cpu", 128, BF16, None, 64),
    ],
)
def test_items_are_as_high_as_tiles(monkeypatch, device, head_dim, dtype, pool_dtype, query_rows):
    """The query rows of an item meet one tile: of 128 where kernels have such (kernels.md)."""
    an_h200 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: an_h200)
    geometry = KVGeometry(
        num_layers=2, num_q_heads=32, num_kv_heads=8, head_dim=head_dim, dtype=dtype
    )
    shape = work_shape(geometry, device, pool_dtype)
    assert shape.max_tile_rows == query_rows // 4
    reads_longest = device == "cuda" and dtype != F32
    assert shape.read_bound_rows == shape.max_tile_rows // (1 if reads_longest else 4)
    if device == "cuda":
        assert shape.target_items == 33


def test_an_item_has_a_row_at_least(monkeypatch):
    an_h200 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: an_h200)
    geometry = KVGeometry(num_layers=1, num_q_heads=160, num_kv_heads=1, head_dim=64, dtype=BF16)
    assert work_shape(geometry, "cuda").max_tile_rows == 1
