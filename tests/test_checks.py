"""Every bad argument of the operators that move keys raises, naming argument, wanted and found."""

from __future__ import annotations

import re

import pytest
import torch

from tokendance import testing
from tokendance.device import operators as ops

BLOCK = 16
HEADS, HEAD_DIM = 2, 64
POSITIONS = 32
ROWS = 6


def tables(positions=POSITIONS, rotary_dim=HEAD_DIM):
    return torch.ones(positions, rotary_dim // 2), torch.zeros(positions, rotary_dim // 2)


def raises(text):
    return pytest.raises(RuntimeError, match=re.escape(text))


# rope_rotate ------------------------------------------------------------------------------------


def rotate_arguments(**changes):
    cos, sin = tables()
    arguments = {
        "x": torch.zeros(ROWS, HEADS, HEAD_DIM),
        "row_in": torch.arange(ROWS),
        "row_out": torch.arange(ROWS),
        "position_from": torch.zeros(ROWS, dtype=torch.int32),
        "position_to": torch.zeros(ROWS, dtype=torch.int32),
        "cos": cos,
        "sin": sin,
        "interleaved": False,
        "scale": 1.0,
        "out": torch.zeros(ROWS, HEADS, HEAD_DIM),
    }
    return arguments | changes


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


ROTATE = [
    ({"x": torch.zeros(ROWS, HEADS)}, "x: expected [rows, heads, head_dim] or"),
    ({"x": torch.zeros(ROWS, HEADS, 72)}, "x: expected head_dim 64, 80, 96, 128 or 256, got 72"),
    (
        {"x": torch.zeros(ROWS, HEADS, HEAD_DIM, dtype=torch.float64)},
        "x: expected float32, float16, bfloat16, float8_e4m3fn or int8, got float64",
    ),
    (
        {"x": torch.zeros(ROWS, HEADS, 2 * HEAD_DIM)[..., ::2]},
        "x: expected innermost stride 1, got strides [256, 128, 2]",
    ),
    ({"row_in": torch.arange(ROWS).int()}, "row_in: expected int64, got int32"),
    ({"row_in": torch.zeros(2, 3, dtype=torch.int64)}, "row_in: expected [n], got [2, 3]"),
    ({"row_in": torch.arange(2 * ROWS)[::2]}, "row_in: expected a contiguous tensor, got strides"),
    ({"row_in": torch.tensor([0, 1, 2, 3, 4, 6])}, "row_in[5]: expected 0 to 5, got 6"),
    ({"row_in": torch.tensor([0, -1, 2, 3, 4, 5])}, "row_in[1]: expected 0 to 5, got -1"),
    ({"row_out": torch.tensor([0, 1, 2, 3, 4, 6])}, "row_out[5]: expected at most 5, got 6"),
    ({"row_out": torch.arange(5)}, "row_out: expected [6], got [5]"),
    ({"row_out": torch.arange(6)[:, None]}, "position_to: expected [6, 1], got [6]"),
    ({"position_from": torch.zeros(5, dtype=torch.int32)}, "position_from: expected [6], got [5]"),
    ({"position_from": torch.zeros(ROWS)}, "position_from: expected int32, got float32"),
    ({"position_to": torch.zeros(7, dtype=torch.int32)}, "position_to: expected [6], got [7]"),
    (
        {"position_to": None},
        "position_from: expected None where position_to is None, got a tensor",
    ),
    (
        {"position_to": int32(0, 0, POSITIONS, 0, 0, 0)},
        "position_to: expected a distance below max_position = 32 from position_from, "
        "got 32 from 0 in row 2",
    ),
    (
        {"position_from": int32(0, POSITIONS, 0, 0, 0, 0)},
        "position_to: expected a distance below max_position = 32 from position_from, "
        "got 0 from 32 in row 1",
    ),
    ({"cos": tables(rotary_dim=80)[0]}, "cos: expected [max_position, <= 32], got [32, 40]"),
    ({"sin": tables(positions=31)[1]}, "sin: expected [32, 32], got [31, 32]"),
    ({"cos": tables()[0].double()}, "cos: expected float32, got float64"),
    ({"cos": torch.ones(HEAD_DIM // 2, POSITIONS).t()}, "cos: expected a contiguous tensor"),
    ({"out": torch.zeros(ROWS, 3, HEAD_DIM)}, "out: expected [6, 2, 64], got [6, 3, 64]"),
    (
        {"out": torch.zeros(ROWS, HEADS, HEAD_DIM).half()},
        "out: expected float32, float8_e4m3fn or int8, got float16",
    ),
    (
        {"out": torch.zeros(1, HEADS, HEAD_DIM).expand(ROWS, -1, -1)},
        "out: expected memory of its own for every element, got strides [0, 64, 1]",
    ),
    (
        {"out": torch.zeros(4, HEADS, HEAD_DIM), "row_out": None},
        "out: expected at least 6 rows, got 4",
    ),
]


@pytest.mark.parametrize(("changes", "text"), ROTATE, ids=lambda value: str(value)[:40])
def test_rope_rotate_names_what_is_wrong(changes, text):
    arguments = rotate_arguments(**changes)
    before = arguments["out"].clone()
    with raises(text):
        ops.rope_rotate_out(*arguments.values())
    assert torch.equal(arguments["out"], before)


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused():
    with raises("cos: expected device cuda:0, got device cpu"):
        ops.rope_rotate_out(
            *rotate_arguments(
                x=torch.zeros(6, 2, 64, device="cuda"), row_in=None, position_from=None
            ).values()
        )


def test_rope_rotate_calls_rows_by_the_name_of_its_own_signature():
    cos, sin = tables()
    x = torch.zeros(ROWS, HEADS, HEAD_DIM)
    with raises("rows: expected int64, got int32"):
        ops.rope_rotate_(x, int32(0), None, int32(0), cos, sin)
    with raises("row_in: expected int64, got int32"):
        ops.rope_rotate(x, int32(0), None, int32(0), cos, sin)
    with raises("x: expected memory of its own for every element"):
        ops.rope_rotate_(x[:1].expand(2, -1, -1), None, None, int32(0, 0), cos, sin)


# key_deviation ----------------------------------------------------------------------------------

AGENTS, TOKENS = 2, 3


def deviation_arguments(**changes):
    cos, sin = tables()
    arguments = {
        "fresh": torch.zeros(ROWS, HEADS, HEAD_DIM),
        "fresh_row": torch.zeros(AGENTS, TOKENS, dtype=torch.int64),
        "fresh_position": torch.zeros(AGENTS, TOKENS, dtype=torch.int32),
        "cached": torch.zeros(ROWS, HEADS, HEAD_DIM),
        "cached_row": torch.zeros(TOKENS, dtype=torch.int64),
        "cached_position": torch.zeros(TOKENS, dtype=torch.int32),
        "cos": cos,
        "sin": sin,
        "interleaved": False,
        "scale": 1.0,
        "out": torch.full((TOKENS,), 7.0),
    }
    return arguments | changes


DEVIATION = [
    ({"fresh": torch.zeros(ROWS, HEADS, 72)}, "fresh: expected head_dim 64, 80, 96, 128 or 256"),
    ({"fresh": torch.zeros(ROWS, HEADS, HEAD_DIM).int()}, "fresh: expected float32, float16 or"),
    ({"cached": torch.zeros(ROWS, 3, HEAD_DIM)}, "cached: expected [6, 2, 64], got [6, 3, 64]"),
    ({"cached": torch.zeros(ROWS, HEADS, HEAD_DIM).half()}, "cached: expected float32, got"),
    ({"fresh_row": torch.zeros(TOKENS).long()}, "fresh_row: expected [agents, tokens], got [3]"),
    ({"fresh_row": torch.zeros(AGENTS, TOKENS)}, "fresh_row: expected int64, got float32"),
    ({"fresh_position": torch.zeros(AGENTS, 4).int()}, "fresh_position: expected [2, 3], got"),
    ({"cached_row": torch.zeros(4).long()}, "cached_row: expected [3], got [4]"),
    ({"cached_position": torch.zeros(4).int()}, "cached_position: expected [3], got [4]"),
    ({"cached_row": torch.tensor([0, -1, 0])}, "cached_row[1]: expected 0 to 5, got -1"),
    (
        {"fresh_row": torch.tensor([[0, 0, 0], [0, ROWS, 0]])},
        "fresh_row[1, 1]: expected at most 5, got 6",
    ),
    (
        {"cached_position": int32(0, 0, POSITIONS)},
        "cached_position[2]: expected a distance below max_position = 32 from fresh_position, "
        "got 32 from 0 of agent 0",
    ),
    ({"out": torch.zeros(4)}, "out: expected [3], got [4]"),
    ({"out": torch.zeros(TOKENS).half()}, "out: expected float32, got float16"),
]


@pytest.mark.parametrize(("changes", "text"), DEVIATION, ids=lambda value: str(value)[:40])
def test_key_deviation_names_what_is_wrong(changes, text):
    arguments = deviation_arguments(**changes)
    before = arguments["out"].clone()
    with raises(text):
        ops.key_deviation_out(*arguments.values())
    assert torch.equal(arguments["out"], before)


# Rounds -----------------------------------------------------------------------------------------


@pytest.fixture
def case():
    """Two agents that use two whole Masters each, some of whose rows are overridden."""
    return testing.random_round(
        4,
        agents=2,
        masters=[40, 20],
        whole_uses=True,
        masks="leading",
        num_layers=2,
        room_for_all=True,
        slack=False,
    )


def restore(case, **changes):
    dense = testing.dense_cache(case, 1)
    arguments = {
        "k_pool": case.k_pool,
        "v_pool": case.v_pool,
        "cos": case.cos,
        "sin": case.sin,
        "interleaved": False,
        "round": case.round.buffer,
        "extents": case.extents,
        "slot_mapping": dense.slot_mapping,
        "k_out": dense.k,
        "v_out": dense.v,
    } | changes
    torch.ops.tokendance.diff_restore(*arguments.values())


def encode(case, **changes):
    dense = testing.dense_cache(case, 1)
    arguments = {
        "k_in": dense.k,
        "v_in": dense.v,
        "slot_mapping": dense.slot_mapping,
        "length": case.length,
        "k_pool": case.k_pool,
        "v_pool": case.v_pool,
        "cos": case.cos,
        "sin": case.sin,
        "interleaved": False,
        "round": case.round.buffer,
        "extents": case.extents,
        "atol": 0.0,
        "rtol": 0.0,
    } | changes
    torch.ops.tokendance.diff_encode(*arguments.values())


def test_the_case_itself_is_right(case):
    assert int(case.round.agent_use_indptr[-1]) >= 2
    restore(case)
    encode(case)


def test_lists_of_layers_must_agree(case):
    pages = case.k_pool[0].shape[0]
    with raises("k_pool: expected at least one layer, got 0"):
        restore(case, k_pool=[])
    with raises("v_pool: expected 2 layers, got 1"):
        restore(case, v_pool=case.v_pool[:1])
    with raises("k_out: expected 2 layers, got 1"):
        restore(case, k_out=[torch.zeros(9, 2, 64)])
    with raises(f"v_pool[0]: expected [{pages}, 16, 2, 64], got [{pages}, 16, 3, 64]"):
        restore(case, v_pool=[torch.zeros(pages, 16, 3, 64)] * 2)
    with raises(f"k_pool[1]: expected [{pages}, 16, 2, 64] as in layer 0, got [1, 16, 2, 64]"):
        restore(case, k_pool=[case.k_pool[0], torch.zeros(1, 16, 2, 64)])
    with raises("k_pool[1]: expected strides [2048, 128, 64, 1] as in layer 0"):
        other = torch.zeros(pages, 2, 16, 64).transpose(1, 2)
        restore(case, k_pool=[case.k_pool[0], other])
    with raises("k_pool[1]: expected float32, got float16"):
        restore(case, k_pool=[case.k_pool[0], case.k_pool[1].half()])
    with raises("k_pool: expected at most 128 layers, got 129"):
        restore(case, k_pool=[case.k_pool[0]] * 129)
    with raises("k_in: expected 2 layers, got 1"):
        encode(case, k_in=[torch.zeros(9, 2, 64)])


def test_extents_and_buffer_must_agree(case):
    total = case.round.buffer.numel()
    with raises("extents: expected 13 entries of round version 2, got 12"):
        restore(case, extents=case.extents[:12])
    with raises("extents (block_size): expected 8, 16 or 32, got 12"):
        restore(case, extents=[*case.extents[:12], 12])
    with raises("extents (uses): expected 0 to 2147483647, got -1"):
        restore(case, extents=[case.extents[0], -1, *case.extents[2:]])
    with raises(f"round: expected [{total}], got [{total - 1}]"):
        restore(case, round=case.round.buffer[:-1])
    with raises("round: expected int32, got int64"):
        restore(case, round=case.round.buffer.long())
    with raises("round: expected memory aligned to 16 bytes, got 0x"):
        restore(case, round=torch.zeros(total + 1, dtype=torch.int32)[1:])
    pages = case.k_pool[0].shape[0]
    with raises(f"k_pool[0]: expected [num_pages, 16, heads, head_dim], got [{pages}, 8, 2, 64]"):
        restore(case, k_pool=[pool[:, :8] for pool in case.k_pool])


def test_slots_and_lengths_must_be_in_range(case):
    dense = testing.dense_cache(case, 1)
    rows = dense.k[0].shape[0] * dense.k[0].shape[1]
    slots = dense.slot_mapping.clone()
    slots[1, 2] = rows
    with raises(f"slot_mapping[1, 2]: expected at most {rows - 1}, got {rows}"):
        restore(case, slot_mapping=slots)
    with raises(f"slot_mapping[1, 2]: expected 0 to {rows - 1}, got {rows}"):
        encode(case, slot_mapping=slots)
    with raises("slot_mapping: expected [2, T], got [3, 4]"):
        restore(case, slot_mapping=torch.zeros(3, 4, dtype=torch.int64))
    with raises("slot_mapping: expected int64, got int32"):
        restore(case, slot_mapping=slots.int())
    columns = slots.shape[1]
    with raises(f"length[0]: expected 0 to {columns}, got {columns + 1}"):
        encode(case, length=torch.full_like(case.length, columns + 1))
    with raises("length: expected [2], got [3]"):
        encode(case, length=torch.zeros(3, dtype=torch.int32))
    with raises("atol: expected >= 0, got -1"):
        encode(case, atol=-1.0)
    with raises("rtol: expected >= 0, got nan"):
        encode(case, rtol=float("nan"))


FIELDS = [
    ("use_page_indptr", 0, 1, "round.use_page_indptr[0]: expected 0, got 1"),
    ("use_page_indptr", 1, 9999, "round.use_page_indptr[1]: expected 0 to "),
    ("agent_use_indptr", 1, -1, "round.agent_use_indptr[1]: expected 0 to "),
    ("master_page_indptr", 1, 9999, "round.master_page_indptr[1]: expected 0 to "),
    ("own_page_indptr", 1, 9999, "round.own_page_indptr[1]: expected 0 to "),
    ("master_pages", 0, 9999, "round.master_pages[0]: expected 0 to "),
    ("own_pages", 0, -1, "round.own_pages[0]: expected 0 to "),
    ("use_agent", 0, 1, "round.use_agent[0]: expected 0 by agent_use_indptr, got 1"),
    ("use_master", 0, 2, "round.use_master[0]: expected 0 to 1, got 2"),
    ("use_length", 0, 9999, "round.use_length[0]: expected 0 to "),
    ("use_length", 0, 1, "round.use_page_indptr[1]: expected ceil(use_length / block_size) = 1"),
    ("use_shift", 0, 9999, "round.use_shift[0]: expected -"),
    ("use_delta", 1, 0, "round.use_delta[1]: expected >= "),
]


@pytest.mark.parametrize(("field", "index", "value", "text"), FIELDS)
@pytest.mark.parametrize("operator", [restore, encode])
def test_a_damaged_round_is_named_by_field(case, operator, field, index, value, text):
    getattr(case.round, field).view(-1)[index] = value
    before = [pool.clone() for pool in case.k_pool]
    with raises(text):
        operator(case)
    for pool, was in zip(case.k_pool, before, strict=True):
        testing.assert_same_bits(pool, was)


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ((0, 0), -1, "round.agent_use[0]: expected 0 to 1, got -1"),
        ((1, 0), 0, "round.agent_use[2]: expected 1 to 1, got 0"),
        ((1, 0), 2, "round.agent_use[2]: expected 1 to 1, got 2"),
        ((1, 1), -1, "round.agent_use[3]: expected 0 to 1, got -1"),
        ((1, 1), 2, "round.agent_use[3]: expected 0 to 1, got 2"),
        ((2, 1), 1, "round.agent_use[5]: expected 2 to 3, got 1"),
    ],
)
@pytest.mark.parametrize("operator", [restore, encode])
def test_agent_use_must_name_every_use_once(case, operator, entry, value, text):
    """Two agents with two uses each: the entries of the second begin at 2."""
    assert case.round.agent_use_indptr.tolist()[:3] == [0, 2, 4]
    case.round.agent_use[entry] = value
    with raises(text):
        operator(case)


def test_agent_use_must_name_the_use_of_its_master(case):
    uses = case.round.agent_use[:2, 1].tolist()
    case.round.agent_use[:2, 1] = torch.tensor(uses[::-1], dtype=torch.int32)
    with raises(f"round.agent_use[1]: expected a use of Master 0, got {uses[1]}"):
        restore(case)


def test_restore_verifies_what_it_reads_beyond_the_uses(case):
    damaged = case.copy()
    damaged.round.own_length[0] = 9999
    with raises("round.own_length[0]: expected 0 to "):
        restore(damaged)

    damaged = case.copy()
    length = int(damaged.round.use_length[0])
    damaged.round.use_masks[int(damaged.round.use_page_indptr[1]) - 1] |= 1 << (length % BLOCK)
    with raises(f"expected bits of the {length % BLOCK} rows that the use has in this page"):
        restore(damaged)

    damaged = case.copy()
    damaged.round.own_position[0] = -5
    with raises("round.own_position[0]: expected 0 to "):
        restore(damaged)

    damaged = case.copy()
    assert int(damaged.round.use_masks[0]) != 0
    damaged.round.use_masks[0] = 0
    with raises("expected a position where no use shows a row"):
        restore(damaged)

    damaged = case.copy()
    damaged.round.use_delta[0] = -8
    with raises("rows before position 0 to be hidden"):
        restore(damaged)
    with raises("round.use_delta[0]: expected >= 0 to encode, got -8"):
        encode(damaged)
