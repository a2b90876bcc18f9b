"""What the operators refuse: the error names the argument, what it has and what is wanted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from operator_arguments import named_arguments_of, tensors_in

from tokendance import testing
from tokendance.device.rounds import RoundTensors

pytestmark = pytest.mark.usefixtures("one_thread")


def each(change):
    """The change on every layer."""
    return lambda layers: [change(layer) for layer in layers]


def first(count):
    return lambda tensor: tensor[:count]


def plus(number):
    return lambda tensor: tensor + number


def to(dtype):
    return lambda tensor: tensor.to(dtype)


E4M3 = torch.float8_e4m3fn


def scales(*shape):
    return lambda _: torch.ones(shape)


REFUSED = [
    (
        "rope_rotate",
        "x",
        to(torch.float64),
        "x: expected float32, float16, bfloat16, float8_e4m3fn or int8, got float64",
    ),
    ("rope_rotate", "x", lambda x: x[0], "x: expected [rows, heads, head_dim] or [pages, block_si"),
    (
        "rope_rotate",
        "x",
        lambda x: x.mT,
        "x: expected innermost stride 1, got strides [128, 1, 64]",
    ),
    (
        "rope_rotate",
        "x",
        lambda x: x[..., :48],
        "x: expected head_dim 64, 80, 96, 128 or 256, got 4",
    ),
    ("rope_rotate", "row_in", to(torch.int32), "row_in: expected int64, got int32"),
    ("rope_rotate", "row_in", plus(100), "row_in[0]: expected 0 to 15, got 100"),
    ("rope_rotate", "row_in", plus(-1), "row_in[0]: expected 0 to 15, got -1"),
    ("rope_rotate", "row_in", first(3), "position_from: expected [3], got [6]"),
    ("rope_rotate", "position_to", to(torch.int64), "position_to: expected int32, got int64"),
    ("rope_rotate", "position_to", first(2), "position_to: expected [6], got [2]"),
    (
        "rope_rotate",
        "position_to",
        plus(10**4),
        "position_to: expected a distance below max_positi",
    ),
    (
        "rope_rotate",
        "position_to",
        lambda _: None,
        "position_from: expected None where position_to",
    ),
    ("rope_rotate", "cos", to(torch.float64), "cos: expected float32, got float64"),
    ("rope_rotate", "cos", lambda cos: cos[:, ::2], "cos: expected a contiguous tensor, got strid"),
    ("rope_rotate", "cos", first(5), "sin: expected [5, 32], got [41, 32]"),
    (
        "rope_rotate",
        "cos",
        lambda _: torch.zeros(9, 64),
        "cos: expected [max_position, <= 32], got",
    ),
    (
        "rope_rotate_out",
        "out",
        to(torch.float32),
        "out: expected bfloat16, float8_e4m3fn or int8, got float32",
    ),
    ("rope_rotate_out", "out", first(3), "row_out[0]: expected at most 2, got 5"),
    (
        "rope_rotate_out",
        "out",
        lambda out: out[:1].expand(6, -1, -1),
        "out: expected memory of its",
    ),
    ("rope_rotate_out", "row_out", plus(94), "row_out[0]: expected at most 5, got 99"),
    (
        "key_deviation",
        "fresh_row",
        lambda row: row[:, :4],
        "fresh_position: expected [1, 4], got [1",
    ),
    ("key_deviation", "fresh_row", plus(50), "fresh_row[0, 0]: expected at most 15, got 50"),
    ("key_deviation", "cached_row", plus(-5), "cached_row[0]: expected 0 to 15, got -5"),
    (
        "key_deviation",
        "cached",
        lambda x: x[:, :1],
        "cached: expected [16, 2, 64], got [16, 1, 64]",
    ),
    ("key_deviation", "cached", to(torch.float32), "cached: expected bfloat16, got float32"),
    (
        "key_deviation",
        "cached_position",
        plus(5000),
        "cached_position[0]: expected a distance below",
    ),
    ("key_deviation_out", "out", first(4), "out: expected [6], got [4]"),
    ("key_deviation_out", "out", to(torch.float16), "out: expected float32, got float16"),
    *(
        (operator, *refused)
        for operator in ("diff_encode", "diff_restore")
        for refused in [
            ("k_pool", first(1), "v_pool: expected 1 layers, got 2"),
            ("k_pool", first(0), "k_pool: expected at least one layer, got 0"),
            ("k_pool", each(first(2)), "v_pool[0]: expected [2, 16, 2, 64], got [12, 16, 2, 64]"),
            ("v_pool", each(to(torch.float16)), "v_pool[0]: expected bfloat16, got float16"),
            ("v_pool", lambda v: [v[0], v[1].contiguous()], "v_pool[1]: expected strides [4096, 1"),
            ("slot_mapping", to(torch.int32), "slot_mapping: expected int64, got int32"),
            ("slot_mapping", first(1), "slot_mapping: expected [2, T], got [1, 44]"),
            ("slot_mapping", plus(10**4), "slot_mapping[0, 0]: expected"),
            ("extents", first(12), "extents: expected 13 entries of round version 2, got 12"),
            (
                "extents",
                lambda e: [*e[:-1], 12],
                "extents (block_size): expected 8, 16 or 32, got 12",
            ),
            ("extents", lambda e: [e[0] + 4, *e[1:]], "round: expected [252], got [240]"),
            ("extents", lambda e: [-1, *e[1:]], "extents (rows): expected 0 to 2147483647, got -1"),
            ("round", to(torch.int64), "round: expected int32, got int64"),
            ("round", plus(9), "round.master_page_indptr[0]: expected 0, got 9"),
        ]
    ),
    ("diff_encode", "length", plus(100), "length[0]: expected 0 to 44, got 141"),
    ("diff_encode", "length", plus(-100), "length[0]: expected 0 to 44, got -59"),
    ("diff_encode", "length", first(1), "length: expected [2], got [1]"),
    ("diff_encode", "length", to(torch.int64), "length: expected int32, got int64"),
    ("diff_encode", "atol", lambda _: -1.0, "atol: expected >= 0, got -1"),
    ("diff_encode", "rtol", lambda _: float("nan"), "rtol: expected >= 0, got nan"),
    (
        "diff_restore",
        "k_out",
        each(lambda k: k[:, :, :1]),
        "k_out[0]: expected [7, 16, 2, 64], got",
    ),
    (
        "collective_attention",
        "q",
        lambda q: q[:, :3],
        "q: expected a multiple of the 2 heads of k_",
    ),
    ("collective_attention", "q", first(1), "q: expected [2, q_heads, head_dim], got [1, 4, 64]"),
    (
        "collective_attention",
        "q",
        to(torch.float32),
        "k_pool: expected float32, float8_e4m3fn or int8, got bfloat16",
    ),
    ("collective_attention", "q", lambda q: q.mT, "q: expected innermost stride 1, got strides"),
    ("collective_attention", "k_pool", first(2), "v_pool: expected [2, 16, 2, 64], got [12, 16, 2"),
    (
        "collective_attention",
        "window",
        lambda _: -1,
        "window: expected 0 (none) to 2^31 - 1, got -1",
    ),
    (
        "collective_attention",
        "soft_cap",
        lambda _: -1.0,
        "soft_cap: expected 0 (none) or more, got",
    ),
    ("collective_attention", "sinks", first(2), "sinks: expected [4], got [2]"),
    ("collective_attention", "sinks", to(torch.float16), "sinks: expected float32, got float16"),
    (
        "collective_attention_out",
        "workspace",
        first(5),
        "workspace: expected at least 1040 elements",
    ),
    (
        "collective_attention_out",
        "workspace",
        to(torch.float16),
        "workspace: expected float32, got",
    ),
    ("collective_attention_out", "out", first(1), "out: expected [2, 4, 64], got [1, 4, 64]"),
    ("collective_attention_out", "out", to(torch.float32), "out: expected bfloat16, got float32"),
    ("collective_attention_out", "lse", first(1), "lse: expected [2, 4], got [1, 4]"),
    ("merge_states", "partial_lse", first(1), "partial_lse: expected [3, 4, 2], got [1, 4, 2]"),
    (
        "merge_states",
        "partial_lse",
        to(torch.float16),
        "partial_lse: expected float32, got float16",
    ),
    ("merge_states", "partial_out", lambda x: x.mT, "partial_out: expected"),
    ("merge_states", "sinks", first(1), "sinks: expected [2], got [1]"),
    ("merge_states_out", "out", first(1), "out: expected [4, 2, 64], got [1, 2, 64]"),
    ("merge_states_out", "out", to(torch.float16), "out: expected float32, got float16"),
    (
        "key_deviation",
        "fresh",
        to(E4M3),
        "fresh: expected float32, float16 or bfloat16, got float8",
    ),
    ("key_deviation", "cached", to(E4M3), "cached: expected bfloat16, got float8_e4m3fn"),
    ("merge_states", "partial_out", to(E4M3), "partial_out: expected float32, float16 or bfloat1"),
    ("collective_attention", "q", to(E4M3), "q: expected float32, float16 or bfloat16, got float8"),
    ("collective_attention", "k_pool", to(E4M3), "v_pool: expected float8_e4m3fn, got bfloat16"),
    (
        "collective_attention",
        "k_scale",
        scales(2),
        "k_scale: expected None where k_pool is bfloat1",
    ),
    ("rope_rotate_out", "x_scale", scales(2), "x_scale: expected None where x is bfloat16, got a"),
    ("rope_rotate_out", "out_scale", scales(2), "out_scale: expected None where out is bfloat16"),
    ("diff_encode", "k_in", each(to(E4M3)), "k_in[0]: expected bfloat16, got float8_e4m3fn"),
    ("diff_encode", "k_scale", scales(2, 2), "k_scale: expected None where k_pool[0] is bfloat16"),
    ("diff_restore", "k_out", each(to(E4M3)), "k_out[0]: expected bfloat16, got float8_e4m3fn"),
    ("diff_restore", "v_scale", scales(2, 2), "v_scale: expected None where k_pool[0] is bfloat16"),
]


@pytest.mark.parametrize(
    ("operator", "name", "change", "message"),
    REFUSED,
    ids=[f"{operator}-{name}-{i}" for i, (operator, name, *_) in enumerate(REFUSED)],
)
def test_refused(operator, name, change, message):
    arguments = named_arguments_of(operator)
    arguments[name] = change(arguments.get(name))
    before = [tensor.clone() for tensor in tensors_in(arguments.values())]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops.tokendance, operator)(**arguments)
    for tensor, was in zip(tensors_in(arguments.values()), before, strict=True):
        testing.assert_same_bits(tensor, was, "an argument of a refused call")


def shorter(scales):
    return scales[..., :1].contiguous()


def minus(scales):
    return -scales


QUANTIZED_REFUSED = [
    (
        "rope_rotate_out",
        "out",
        to(torch.int8),
        "out: expected float8_e4m3fn, float32, float16 or b",
    ),
    ("rope_rotate_out", "out", to(E4M3), "out_scale: expected scales as for x, got None"),
    ("rope_rotate_out", "x_scale", shorter, "x_scale: expected [2], got [1]"),
    ("rope_rotate_out", "x_scale", minus, "x_scale: expected positive, finite scales, got -0.0"),
    ("rope_rotate_out", "x_scale", lambda s: s * torch.inf, "x_scale: expected positive, finite"),
    ("rope_rotate_out", "x_scale", to(torch.float64), "x_scale: expected float32, got float64"),
    ("rope_rotate_out", "out_scale", scales(2), "out_scale: expected None where out is bfloat16"),
    ("diff_encode", "k_in", each(to(torch.int8)), "k_in[0]: expected float8_e4m3fn, got int8"),
    ("diff_encode", "k_scale", shorter, "k_scale: expected [2, 2], got [2, 1]"),
    ("diff_encode", "v_scale", lambda s: s[:1], "v_scale: expected [2, 2], got [1, 2]"),
    ("diff_restore", "k_out", each(to(torch.int8)), "k_out[0]: expected float8_e4m3fn, float32, f"),
    ("diff_restore", "k_out", each(to(torch.half)), "v_out[0]: expected float16, got float8_e4m3f"),
    ("diff_restore", "v_scale", lambda s: s.mT, "v_scale: expected a contiguous tensor, got strid"),
    ("collective_attention", "k_scale", shorter, "k_scale: expected [2], got [1]"),
    ("collective_attention", "v_scale", minus, "v_scale: expected positive, finite scales, got"),
    ("collective_attention", "v_pool", to(torch.int8), "v_pool: expected float8_e4m3fn, got int8"),
    ("collective_attention_out", "out", to(E4M3), "out: expected bfloat16, got float8_e4m3fn"),
]


@pytest.mark.parametrize(
    ("operator", "name", "change", "message"),
    QUANTIZED_REFUSED,
    ids=[f"{operator}-{name}-{i}" for i, (operator, name, *_) in enumerate(QUANTIZED_REFUSED)],
)
def test_refused_of_quantized_arguments(operator, name, change, message):
    arguments = named_arguments_of(operator, E4M3)
    arguments[name] = change(arguments.get(name))
    before = [tensor.clone() for tensor in tensors_in(arguments.values())]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(torch.ops.tokendance, operator)(**arguments)
    for tensor, was in zip(tensors_in(arguments.values()), before, strict=True):
        testing.assert_same_bits(tensor, was, "an argument of a refused call")


def test_more_layers_than_a_launch_takes():
    arguments = named_arguments_of("diff_restore")
    for name in ("k_pool", "v_pool", "k_out", "v_out"):
        arguments[name] = arguments[name] * 65
    with pytest.raises(RuntimeError, match="k_pool: expected at most 128 layers, got 130"):
        torch.ops.tokendance.diff_restore(**arguments)


# Field of the round, index, value, operators that read it, error.
BOTH = ("restore", "attention")
BROKEN_ROUNDS = [
    ("use_master", 0, 99, BOTH, "round.use_master[0]: expected 0 to"),
    ("use_length", 0, 10**6, BOTH, "round.use_length[0]: expected 0 to"),
    ("use_length", 0, -1, BOTH, "round.use_length[0]: expected 0 to"),
    ("use_shift", 0, 10**6, BOTH, "round.use_shift[0]: expected"),
    ("use_delta", 1, 0, BOTH, "round.use_delta[1]: expected >="),
    ("use_agent", 0, 1, BOTH, "round.use_agent[0]: expected 0 by agent_use_indptr, got 1"),
    ("use_page_indptr", 1, 10**6, BOTH, "round.use_page_indptr[1]: expected"),
    ("agent_use", 0, -1, BOTH, "round.agent_use"),
    ("master_pages", 0, 10**6, BOTH, "round.master_pages[0]: expected 0 to"),
    ("master_pages", 0, -1, BOTH, "round.master_pages[0]: expected 0 to"),
    ("own_length", 0, 10**6, BOTH, "round.own_length[0]: expected 0 to"),
    ("own_pages", 0, 10**6, BOTH, "round.own_pages[0]: expected 0 to"),
    ("own_position", 0, 10**6, BOTH, "round.own_position[0]: expected 0 to"),
    ("row_agent", 0, 99, ("attention",), "round.row_agent[0]: expected -1 to"),
    ("row_position", 0, 10**6, ("attention",), "round.row_position[0]: expected 0 to"),
    ("work_rows", 0, 10**6, ("attention",), "round.work_rows[0]: expected 0 to"),
    ("work_chunks", 0, 99, ("attention",), "round.work_chunks[0]: expected"),
    ("work_chunks", 2, 10**6, ("attention",), "round.work_chunks[2]: expected 0 to"),
    ("work_chunks", 3, 10**6, ("attention",), "round.work_chunks[3]: expected the beginning of"),
    ("work", 5, 10**6, ("attention",), "round.work[5]: expected 0 to"),
    ("work", 6, 99, ("attention",), "round.work[6]: expected"),
    ("row_partials", 0, 10**6, ("attention",), "round.row_partials[0]: expected 0 to"),
]


def broken(field, index, value):
    case = testing.random_round(
        3, agents=3, masters=(20, 33), whole_uses=True, masks="none", slack=False, rows=4
    )
    arrays = {name: array.copy() for name, array in case.arrays.items()}
    arrays[field].reshape(-1)[index] = value
    return replace(case, round=RoundTensors.from_arrays(arrays, case.filled))


@pytest.mark.parametrize(
    ("field", "index", "value", "readers", "message"),
    BROKEN_ROUNDS,
    ids=[f"{entry[0]}-{i}" for i, entry in enumerate(BROKEN_ROUNDS)],
)
def test_a_broken_round_is_refused_before_anything_is_read(field, index, value, readers, message):
    case = broken(field, index, value)
    dense = testing.dense_cache(case, 1)
    tables = (case.cos, case.sin, case.interleaved)
    round = (case.round.buffer, case.extents)
    if "restore" in readers:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            torch.ops.tokendance.diff_restore(
                case.k_pool, case.v_pool, *tables, *round, dense.slot_mapping, dense.k, dense.v
            )
        assert dense.k[0].isnan().all()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.tokendance.collective_attention(
            case.q, case.k_pool[0], case.v_pool[0], *tables, *round, 1.0
        )


@pytest.mark.parametrize(
    ("value", "message"), [(99, "expected 0 to"), (-2, "expected 0 to"), (None, "expected agent")]
)
def test_a_use_of_another_agent_or_master_is_refused(value, message):
    case = broken("work_uses", 0, -1)
    chunk, use = next(
        (chunk, use)
        for row_begin, row_end, chunk, chunk_end, _, use, *_ in case.arrays["work"].tolist()
        if row_begin < row_end and chunk < chunk_end and case.arrays["work_chunks"][chunk, 0] >= 0
    )
    master = case.arrays["work_chunks"][chunk, 0]
    if value is None:
        value = int((case.arrays["use_master"] != master).nonzero()[0][0])
    case = broken("work_uses", use, value)
    tables = (case.cos, case.sin, case.interleaved)
    message = rf"round.work_uses\[{use}\]: {message}"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tokendance.collective_attention(
            *(case.q, case.k_pool[0], case.v_pool[0], *tables, case.round.buffer, case.extents, 1.0)
        )


def test_mask_bits_beyond_a_use_are_refused():
    case = broken("use_masks", 1, 1 << 30)
    tables = (case.cos, case.sin, case.interleaved)
    with pytest.raises(RuntimeError, match=r"round.use_masks\[1\]: expected bits of the"):
        torch.ops.tokendance.collective_attention(
            *(case.q, case.k_pool[0], case.v_pool[0], *tables, case.round.buffer, case.extents, 1.0)
        )
