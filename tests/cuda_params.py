"""Mirrors of ``csrc/include/tokendance/params.h`` and ``csrc/cuda/launch_plan.h`` for ctypes.

The C++ compiler checks their layouts (``ptx_backend.plans``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch

from tokendance.host.round import RoundExtents

_POINTER = ctypes.c_uint64
_INT, _LONG, _FLOAT, _BOOL = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_bool


def _struct(name: str, /, **members: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(members.items())})


MAX_LAYERS = 128
RowLayout = _struct(
    "RowLayout",
    num_rows=_LONG,
    page_stride=_LONG,
    row_stride=_LONG,
    head_stride=_LONG,
    block_size=_INT,
)
RopeTables = _struct(
    "RopeTables", cos=_POINTER, sin=_POINTER, max_position=_INT, rotary_dim=_INT, interleaved=_BOOL
)
Extents = _struct("RoundExtents", **dict.fromkeys(RoundExtents.__dataclass_fields__, _LONG))
RoundView = _struct(
    "RoundView", extents=Extents, **dict.fromkeys(RoundExtents().shapes(), _POINTER)
)
LayerPointers = _struct("LayerPointers", k=_POINTER * MAX_LAYERS, v=_POINTER * MAX_LAYERS)
RopeRotateParams = _struct(
    "RopeRotateParams",
    x=_POINTER,
    out=_POINTER,
    x_layout=RowLayout,
    out_layout=RowLayout,
    row_in=_POINTER,
    row_out=_POINTER,
    position_from=_POINTER,
    position_to=_POINTER,
    num_rows=_LONG,
    destinations=_INT,
    num_heads=_INT,
    head_dim=_INT,
    attention_factor=_FLOAT,
    rope=RopeTables,
    x_scale=_POINTER,
    out_scale=_POINTER,
    dtype=_INT,
    out_dtype=_INT,
)
KeyDeviationParams = _struct(
    "KeyDeviationParams",
    fresh=_POINTER,
    cached=_POINTER,
    fresh_layout=RowLayout,
    cached_layout=RowLayout,
    fresh_row=_POINTER,
    fresh_position=_POINTER,
    cached_row=_POINTER,
    cached_position=_POINTER,
    deviation=_POINTER,
    num_tokens=_LONG,
    num_agents=_INT,
    num_heads=_INT,
    head_dim=_INT,
    attention_factor=_FLOAT,
    rope=RopeTables,
    dtype=_INT,
)
DiffEncodeParams = _struct(
    "DiffEncodeParams",
    **{"in": LayerPointers},
    pool=LayerPointers,
    in_k_layout=RowLayout,
    in_v_layout=RowLayout,
    pool_k_layout=RowLayout,
    pool_v_layout=RowLayout,
    slot_mapping=_POINTER,
    slot_stride=_LONG,
    length=_POINTER,
    round=RoundView,
    atol=_FLOAT,
    rtol=_FLOAT,
    num_layers=_INT,
    num_heads=_INT,
    head_dim=_INT,
    max_length=_INT,
    rope=RopeTables,
    k_scale=_POINTER,
    v_scale=_POINTER,
    dtype=_INT,
)
DiffRestoreParams = _struct(
    "DiffRestoreParams",
    pool=LayerPointers,
    out=LayerPointers,
    pool_k_layout=RowLayout,
    pool_v_layout=RowLayout,
    out_k_layout=RowLayout,
    out_v_layout=RowLayout,
    slot_mapping=_POINTER,
    slot_stride=_LONG,
    round=RoundView,
    num_layers=_INT,
    num_heads=_INT,
    head_dim=_INT,
    max_length=_INT,
    rope=RopeTables,
    k_scale=_POINTER,
    v_scale=_POINTER,
    dtype=_INT,
    out_dtype=_INT,
)
CollectiveAttentionParams = _struct(
    "CollectiveAttentionParams",
    q=_POINTER,
    out=_POINTER,
    lse=_POINTER,
    k_pool=_POINTER,
    v_pool=_POINTER,
    sinks=_POINTER,
    workspace=_POINTER,
    q_row_stride=_LONG,
    q_head_stride=_LONG,
    out_row_stride=_LONG,
    out_head_stride=_LONG,
    k_layout=RowLayout,
    v_layout=RowLayout,
    round=RoundView,
    num_q_heads=_INT,
    num_kv_heads=_INT,
    head_dim=_INT,
    window=_INT,
    softmax_scale=_FLOAT,
    soft_cap=_FLOAT,
    attention_factor=_FLOAT,
    rope=RopeTables,
    k_scale=_POINTER,
    v_scale=_POINTER,
    dtype=_INT,
    pool_dtype=_INT,
)
MergeStatesParams = _struct(
    "MergeStatesParams",
    partial_out=_POINTER,
    partial_lse=_POINTER,
    sinks=_POINTER,
    out=_POINTER,
    lse=_POINTER,
    num_partials=_LONG,
    num_rows=_LONG,
    num_heads=_INT,
    head_dim=_INT,
    dtype=_INT,
)
Divisor = _struct(
    "Divisor",
    value=ctypes.c_uint32,
    multiplier=ctypes.c_uint32,
    first_shift=ctypes.c_uint32,
    second_shift=ctypes.c_uint32,
)
Tile = _struct(
    "Tile",
    rows=_INT,
    heads=_INT,
    agents=_INT,
    layers=_INT,
    in_page=Divisor,
    other_page=Divisor,
    head=Divisor,
)
KernelLaunch = _struct(
    "KernelLaunch",
    name=ctypes.c_char_p,
    kernel=_INT,
    grid=ctypes.c_uint32 * 3,
    block=ctypes.c_uint32 * 3,
    shared_bytes=_INT,
    tile=Tile,
    waits=_BOOL,
)
MAX_LAUNCHES = 2
LaunchPlan = _struct("LaunchPlan", num_launches=_INT, launches=KernelLaunch * MAX_LAUNCHES)

# Operators with a plan, and the params that it takes.
OPERATORS = {
    "rope_rotate": RopeRotateParams,
    "key_deviation": KeyDeviationParams,
    "diff_encode": DiffEncodeParams,
    "diff_restore": DiffRestoreParams,
    "collective_attention": CollectiveAttentionParams,
    "merge_states": MergeStatesParams,
}
MIRRORS = (
    *(RowLayout, RopeTables, Extents, RoundView, LayerPointers),
    *(Divisor, Tile, KernelLaunch, LaunchPlan),
    *OPERATORS.values(),
)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}


def static_asserts() -> Iterator[str]:
    """C++ that compiles if the layouts are those of the structs."""
    for mirror in MIRRORS:
        name = f"tokendance::{mirror.__name__}"
        yield f'static_assert(sizeof({name}) == {ctypes.sizeof(mirror)}, "sizeof {name}");'
        for member, *_ in mirror._fields_:
            offset = getattr(mirror, member).offset
            yield f'static_assert(offsetof({name}, {member}) == {offset}, "{name}::{member}");'
    yield f"static_assert(tokendance::kMaxLayers == {MAX_LAYERS});"
    yield f"static_assert(tokendance::kMaxLaunches == {MAX_LAUNCHES});"
