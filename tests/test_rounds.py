"""Packing of rounds: capacities, padding, views."""

from __future__ import annotations

import ctypes
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tokendance import _planner, testing
from tokendance.device import operators
from tokendance.device.rounds import RoundTensors
from tokendance.host.round import (
    AGENT_USE_FIELDS,
    CHUNK_FIELDS,
    FIELD_ALIGNMENT,
    ROUND_VERSION,
    WORK_FIELDS,
    RoundExtents,
    agent_use,
    pack,
    require_round_version,
)

FILLED = RoundExtents(
    rows=3,
    uses=2,
    use_pages=3,
    agents=2,
    masters=2,
    master_pages=3,
    own_pages=2,
    work=2,
    work_rows=3,
    work_chunks=2,
    work_uses=6,
    partials=4,
    block_size=8,
)
LARGER = replace(
    FILLED, rows=5, uses=7, agents=3, masters=4, own_pages=3, work=9, work_uses=8, partials=6
)
HEADER = Path(__file__).parents[1] / "csrc" / "include" / "tokendance" / "round.h"


def arrays_of(extents):
    """Every field filled with its own numbers; ranges end where their field is full."""
    arrays, at = {}, 1
    for name, shape in extents.shapes().items():
        count = int(np.prod(shape))
        arrays[name] = np.arange(at, at + count, dtype=np.int32).reshape(shape)
        at += count
    return arrays


def test_fields_are_those_of_the_header_in_its_order():
    text = HEADER.read_text()
    taken = re.findall(r"view->(\w+) = take\(", text)
    assert list(FILLED.shapes()) == taken
    struct = text[text.index("struct RoundExtents") : text.index("constexpr int kNumExtents")]
    assert [field.name for field in fields(RoundExtents)] == re.findall(r"int64_t (\w+);", struct)
    assert f"kFieldAlignment = {FIELD_ALIGNMENT};" in text
    assert f"kRoundVersion = {ROUND_VERSION};" in text
    for constant, value in (
        ("AgentUse", AGENT_USE_FIELDS),
        ("Work", WORK_FIELDS),
        ("Chunk", CHUNK_FIELDS),
    ):
        assert f"k{constant}Fields = {value};" in text


@pytest.mark.parametrize("capacity", [None, FILLED, LARGER], ids=["default", "same", "larger"])
def test_every_field_is_read_back(capacity):
    arrays = arrays_of(FILLED)
    round = RoundTensors.from_arrays(arrays, FILLED, capacity)
    assert round.extents == (capacity or FILLED)
    for name, shape in FILLED.shapes().items():
        field = getattr(round, name)
        assert field.shape == round.extents.shapes()[name]
        filled = field[tuple(slice(0, size) for size in shape)]
        np.testing.assert_array_equal(filled.numpy(), arrays[name])


def test_padding():
    round = RoundTensors.from_arrays(arrays_of(FILLED), FILLED, LARGER)
    assert round.row_agent[3:].tolist() == [-1, -1]
    assert round.use_agent[2:].tolist() == [-1] * 5
    assert round.use_length[2:].tolist() == [0] * 5
    assert round.own_length[2:].tolist() == [0]
    assert (round.work[2:] == 0).all()
    assert (round.agent_use[2:] == -1).all()
    for name in ("use_page_indptr", "agent_use_indptr", "master_page_indptr", "own_page_indptr"):
        field = getattr(round, name)
        filled = FILLED.shapes()[name][0]
        assert (field[filled:] == field[filled - 1]).all()


def test_fields_are_aligned_and_do_not_overlap():
    ranges, total = LARGER.offsets()
    end = 0
    for offset, length in ranges.values():
        assert offset % FIELD_ALIGNMENT == 0
        assert end <= offset < end + FIELD_ALIGNMENT
        end = offset + length
    assert end <= total < end + FIELD_ALIGNMENT


def test_a_round_of_many_agents_and_masters_grows_with_its_uses_alone():
    """4,000 agents that use 6 of 1,000 Masters each: a table of agents by Masters had 16 MB."""
    agents, masters, each = 4000, 1000, 6
    use_agent = np.repeat(np.arange(agents, dtype=np.int32), each)
    use_master = np.arange(agents * each, dtype=np.int32) % masters
    filled = RoundExtents(
        rows=agents,
        uses=agents * each,
        use_pages=agents * each,
        agents=agents,
        masters=masters,
        master_pages=masters,
        own_pages=agents,
        work=agents,
        work_rows=agents,
        work_chunks=agents,
        work_uses=agents * each,
        partials=2 * agents,
    )
    fields = {"use_agent": use_agent, "use_master": use_master}
    buffer = pack({**fields, "agent_use": agent_use(use_agent, use_master)}, filled)
    assert buffer.nbytes < 2 * 2**20
    assert buffer.size == replace(filled, masters=0, master_pages=0).offsets()[1] + 2 * masters


def test_agent_use_is_sorted_by_agent_and_master():
    use_agent = np.array([0, 1, 1, 1, 3], dtype=np.int32)
    use_master = np.array([4, 7, 0, 5, 2], dtype=np.int32)
    got = agent_use(use_agent, use_master)
    assert got.dtype == np.int32
    assert got.tolist() == [[4, 0], [0, 2], [5, 3], [7, 1], [2, 4]]
    none = np.empty(0, dtype=np.int32)
    assert agent_use(none, none).shape == (0, 2)


def test_binaries_of_other_rounds_are_refused():
    require_round_version("tokendance/_C.so", ROUND_VERSION)
    for version in (ROUND_VERSION - 1, None):
        message = f"_C.so: expected rounds of version {ROUND_VERSION}, got {version}; build"
        with pytest.raises(ImportError, match=message):
            require_round_version("tokendance/_C.so", version)


def test_planner_and_operators_say_whose_rounds_they_have():
    library = ctypes.CDLL(str(operators.LIBRARY))
    assert _planner.ROUND_VERSION == library.tokendance_round_version() == ROUND_VERSION


def test_fields_are_views():
    round = RoundTensors.from_arrays({}, FILLED)
    round.use_masks[1] = 77
    offset = FILLED.offsets()[0]["use_masks"][0]
    assert round.buffer[offset + 1] == 77
    assert round.device == torch.device("cpu")
    with pytest.raises(AttributeError):
        _ = round.no_such_field


def test_fields_left_out_are_empty():
    round = RoundTensors.from_arrays({}, FILLED)
    assert (round.row_agent == -1).all()
    assert (round.agent_use == -1).all()
    assert (round.own_page_indptr == 0).all()


def test_an_empty_round():
    extents = RoundExtents(block_size=32)
    round = RoundTensors.from_arrays({}, extents)
    assert round.agent_use.shape == (0, 2)
    assert round.own_page_indptr.tolist() == [0]


def test_errors_name_what_is_wrong():
    arrays = arrays_of(FILLED)
    with pytest.raises(ValueError, match=r"unknown fields \['page'\]"):
        pack({"page": arrays["own_pages"]}, FILLED)
    with pytest.raises(ValueError, match=r"use_delta: expected \[2\], got \[3\]"):
        pack({"use_delta": np.zeros(3, dtype=np.int32)}, FILLED)
    for smaller in (replace(FILLED, rows=2), replace(FILLED, block_size=16)):
        with pytest.raises(ValueError, match="capacity: expected at least"):
            pack(arrays, FILLED, smaller)
    with pytest.raises(ValueError, match="buffer: expected contiguous int32"):
        RoundTensors(torch.zeros(7, dtype=torch.int32), FILLED)
    with pytest.raises(ValueError, match="buffer: expected contiguous int32"):
        RoundTensors(torch.zeros(FILLED.offsets()[1], dtype=torch.int64), FILLED)


def test_covers():
    assert LARGER.covers(FILLED)
    assert FILLED.covers(FILLED)
    assert not FILLED.covers(LARGER)
    assert not replace(LARGER, block_size=16).covers(FILLED)


def test_packing_a_round_again_changes_no_field():
    case = testing.random_round(3, slack=False)
    again = RoundTensors(torch.from_numpy(pack(case.arrays, case.filled)), case.filled)
    for name in case.filled.shapes():
        assert torch.equal(getattr(again, name), getattr(case.round, name)), name
