"""Small, valid arguments of every operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

import tokendance.device.operators  # noqa: F401  (loads the library)
from tokendance import testing


def case_and_dense(dtype, size=1):
    case = testing.random_round(
        1,
        agents=1 + size,
        masters=(20, 9) + (12,) * (size - 1),
        whole_uses=True,
        slack=False,
        room_for_all=True,
        dtype=dtype,
        query_dtype=torch.bfloat16,
        layout="interleaved",
        num_layers=2,
    )
    for pool in case.k_pool + case.v_pool:
        pool.copy_(pool.float().nan_to_num(0.0))  # opcheck compares whole tensors, and NaN with NaN
    dense = testing.dense_cache(case, 1)
    for rows in dense.k + dense.v:
        rows.copy_(rows.float().nan_to_num(0.5))
    return case, dense


def arguments_of(name: str, dtype: torch.dtype = torch.bfloat16, size: int = 1) -> list[Any]:
    """Arguments of an operator, in order; fresh and the same for each call.

    With a quantized ``dtype`` those of the operators that take it, scales included. All numbers of
    rows, and most extents of the round, grow with ``size``.
    """
    case, dense = case_and_dense(dtype, size)
    scales: list[Any] = []
    if testing.is_quantized(dtype):
        scales = [case.k_scale, case.v_scale]
    tables = [case.cos, case.sin, case.interleaved]
    rows = torch.arange(6 * size)
    source, target = rows.int(), rows.int() * 2 % 5
    keys, other = dense.k[0][:size].flatten(0, 1), dense.k[0][size : 2 * size].flatten(0, 1)
    round = [case.round.buffer, case.extents]
    attention = [case.q, case.k_pool[0], case.v_pool[0], *tables, *round, case.scale]
    generator = torch.Generator().manual_seed(2)
    partials = (
        torch.randn(shape, generator=generator)
        for shape in [(3, 4 * size, 2, 64), (3, 4 * size, 2)]
    )
    partials = tuple(partials)
    num_rows, heads, head_dim = case.q.shape
    return {
        **coded_arguments(size),
        "rope_rotate": [keys, rows, source, target, *tables],
        "rope_rotate_out": [
            *(keys, rows, rows.flip(0), source, target, *tables, 1.5),
            torch.zeros(6 * size, *keys.shape[1:], dtype=torch.bfloat16),
            *[scale[0] for scale in scales[:1]],
        ],
        "rope_rotate_": [keys, rows, source, target, *tables],
        "key_deviation": [keys, rows[None], source[None], other, rows, target, *tables],
        "key_deviation_out": [
            *(keys, rows[None], source[None], other, rows, target, *tables, 1.0),
            torch.zeros(6 * size),
        ],
        "diff_encode": [
            *(dense.k, dense.v, dense.slot_mapping, case.length, case.k_pool, case.v_pool),
            *(*tables, *round, 0.0, 0.0, *scales),
        ],
        "diff_restore": [
            *(case.k_pool, case.v_pool, *tables, *round, dense.slot_mapping, dense.k, dense.v),
            *scales,
        ],
        "collective_attention": [
            *(*attention, 30, 2.0, torch.zeros(heads), 1.0),
            *[scale[0] for scale in scales],
        ],
        "collective_attention_out": [
            *(*attention, 30, 2.0, torch.zeros(heads), 1.0),
            torch.zeros(case.round.extents.partials * heads * (head_dim + 1) + 8),
            torch.zeros(num_rows, heads, head_dim, dtype=case.q.dtype),
            torch.zeros(num_rows, heads),
            *[scale[0] for scale in scales],
        ],
        "merge_states": [*partials, torch.zeros(2)],
        "merge_states_out": [
            *partials,
            None,
            torch.zeros(4 * size, 2, 64),
            torch.zeros(4 * size, 2),
        ],
    }[name]


def coded_arguments(size: int) -> dict[str, list[Any]]:
    """Of the operators between pages and coded ones."""
    generator = torch.Generator().manual_seed(3)
    pool = torch.randn(1 + 2 * size, 8, 2, 64, generator=generator).to(torch.bfloat16)
    page, rows = torch.arange(2 * size), torch.full((2 * size,), 7, dtype=torch.int32)
    bytes_of_page = 2 * 64 * 2 + 8 * 2 * 32
    coded = torch.zeros(2 * size, bytes_of_page, dtype=torch.uint8)
    full = coded.clone()
    torch.ops.tokendance.encode_pages(pool, page, rows, "int4", True, full)
    return {
        "encode_pages": [pool, page + 1, rows, "int4", True, coded, page.flip(0)],
        "decode_pages": [full, page.flip(0), rows, "int4", True, torch.zeros_like(pool), page + 1],
    }


QUANTIZED_OPERATORS = (
    "rope_rotate",
    "rope_rotate_out",
    "rope_rotate_",
    "diff_encode",
    "diff_restore",
    "collective_attention",
    "collective_attention_out",
)


def named_arguments_of(name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The same under the names of the schema."""
    schema = getattr(torch.ops.tokendance, name).default._schema
    arguments = arguments_of(name, dtype)
    return dict(zip((a.name for a in schema.arguments), arguments, strict=False))


def tensors_in(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Tensors among arguments, those in lists included."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)
