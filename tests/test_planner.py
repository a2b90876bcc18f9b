"""The work list: every visible key is met once, shared pages are met together, sizes hold."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance._planner import plan_work, work_capacity
from tokendance.device.executor import items_per_kv_head

FIELDS = (
    "work",
    "work_rows",
    "work_chunks",
    "work_uses",
    "row_partial_indptr",
    "row_partials",
)


def ints(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def indptr(counts: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(ints(counts))]).astype(np.int32)


def make_round(
    master_length: list[int],
    uses: list[list[tuple[int, int, int]]],
    own_position: list[list[int]],
    row_position: list[list[int]],
    block_size: int = 8,
) -> dict[str, np.ndarray]:
    """Planner arguments from per-agent lists; a use is ``(master, delta, length)``."""
    own_pages = [-(-len(p) // block_size) for p in own_position]
    own_padded = np.zeros(sum(own_pages) * block_size, dtype=np.int32)
    own_page_indptr = indptr(own_pages)
    for agent, positions in enumerate(own_position):
        start = own_page_indptr[agent] * block_size
        own_padded[start : start + len(positions)] = positions
    flat = [(agent, *use) for agent, agent_uses in enumerate(uses) for use in agent_uses]
    columns = ints(flat).reshape(-1, 4).T
    return {
        "row_agent": np.repeat(np.arange(len(uses)), [len(p) for p in row_position]).astype("i4"),
        "row_position": ints([p for positions in row_position for p in positions]),
        "use_agent": np.ascontiguousarray(columns[0]),
        "use_master": np.ascontiguousarray(columns[1]),
        "use_delta": np.ascontiguousarray(columns[2]),
        "use_length": np.ascontiguousarray(columns[3]),
        "master_page_indptr": indptr([-(-n // block_size) for n in master_length]),
        "own_length": ints([len(p) for p in own_position]),
        "own_page_indptr": own_page_indptr,
        "own_position": own_padded,
    }


def decode_round(
    agents: int, shared: int, private: int, rows: int = 1, block_size: int = 16
) -> dict[str, np.ndarray]:
    """Every agent: ``private`` rows of its own, one shared segment, ``rows`` rows to decode."""
    end = private + shared
    return make_round(
        [shared],
        [[(0, private, shared)] for _ in range(agents)],
        [list(range(private)) + list(range(end, end + rows)) for _ in range(agents)],
        [list(range(end, end + rows)) for _ in range(agents)],
        block_size,
    )


def visible_pages(
    arguments: dict[str, np.ndarray], row: int, block_size: int, window: int
) -> set[tuple[int, int]]:
    """``(source, page)`` of every page in which the row sees a key by its position."""
    agent, p = arguments["row_agent"][row], arguments["row_position"][row]
    pages: set[tuple[int, int]] = set()
    if agent < 0:
        return pages
    for use in np.flatnonzero(arguments["use_agent"] == agent):
        positions = arguments["use_delta"][use] + np.arange(arguments["use_length"][use])
        seen = (positions <= p) & ((window == 0) | (p - positions < window))
        master = int(arguments["use_master"][use])
        pages |= {(master, int(j)) for j in np.flatnonzero(seen) // block_size}
    start = arguments["own_page_indptr"][agent] * block_size
    positions = arguments["own_position"][start : start + arguments["own_length"][agent]]
    seen = (positions <= p) & ((window == 0) | (p - positions < window))
    return pages | {(-1 - int(agent), int(j)) for j in np.flatnonzero(seen) // block_size}


def met_pages(
    plan: dict[str, np.ndarray], arguments: dict[str, np.ndarray], block_size: int
) -> dict:
    """``{row: {(source, page): times}}`` that the items let the row meet, by its agent's use."""
    uses = list(zip(arguments["use_agent"].tolist(), arguments["use_master"].tolist(), strict=True))
    met: dict[int, dict[tuple[int, int], int]] = {}
    for row_begin, row_end, chunk_begin, chunk_end, _, use_begin, each, _ in plan["work"].tolist():
        for i, row in enumerate(plan["work_rows"][row_begin:row_end].tolist()):
            agent = int(arguments["row_agent"][row])
            pages = met.setdefault(row, {})
            chunks = plan["work_chunks"][chunk_begin:chunk_end].tolist()
            for number, (source, begin, end, _) in enumerate(chunks):
                use = int(plan["work_uses"][use_begin + number * each + min(i, each - 1)])
                assert use == (uses.index((agent, source)) if (agent, source) in uses else -1)
                if use >= 0 or source == -1 - agent:
                    for page in range(begin // block_size, -(-end // block_size)):
                        pages[source, page] = pages.get((source, page), 0) + 1
    return met


def check_chunks(
    plan: dict[str, np.ndarray], arguments: dict[str, np.ndarray], block_size: int
) -> None:
    """Chunks begin with a page, end with one or with the own rows, and know their page list."""
    for source, begin, end, page_list in plan["work_chunks"].tolist():
        assert begin % block_size == 0
        assert begin < end
        if source >= 0:
            assert end % block_size == 0
            assert page_list == arguments["master_page_indptr"][source]
        else:
            length = arguments["own_length"][-1 - source]
            assert end <= length
            assert end % block_size == 0 or end == length
            assert page_list == arguments["own_page_indptr"][-1 - source]


def check_partials(plan: dict[str, np.ndarray], row_agent: np.ndarray) -> None:
    """A row is the output of one item, or of the merge of the partials of all of its items."""
    writers: dict[int, list[int]] = {}
    for row_begin, row_end, _, _, partial_begin, *_, zero in plan["work"].tolist():
        assert zero == 0
        rows = plan["work_rows"][row_begin:row_end].tolist()
        assert rows == sorted(set(rows))
        for i, row in enumerate(rows):
            writers.setdefault(row, []).append(partial_begin + i if partial_begin >= 0 else -1)
    merged = plan["row_partial_indptr"]
    assert merged[0] == 0
    assert merged[-1] == len(plan["row_partials"])
    for row, agent in enumerate(row_agent.tolist()):
        partials = plan["row_partials"][merged[row] : merged[row + 1]].tolist()
        if agent < 0:
            assert row not in writers
            assert not partials
        elif partials:
            assert sorted(writers[row]) == sorted(partials)
        else:
            assert writers[row] == [-1]
    assert sorted(plan["row_partials"].tolist()) == list(range(len(plan["row_partials"])))


@st.composite
def rounds(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], int]:
    block_size = draw(st.sampled_from([8, 16]))
    master_length = draw(st.lists(st.integers(0, 200), max_size=5))
    agents = draw(st.integers(0, 6))
    uses, own_position, row_position = [], [], []
    for _ in range(agents):
        order = draw(st.permutations(range(len(master_length))))
        at, agent_uses, own = draw(st.integers(0, 20)), [], []
        own.extend(range(at))
        for master in order[: draw(st.integers(0, len(order)))]:
            length = draw(st.integers(0, master_length[master]))
            agent_uses.append((master, at, length))
            own.extend(p for p in range(at, at + length) if draw(st.integers(0, 9)) == 0)
            gap = draw(st.integers(0, 5))
            own.extend(range(at + length, at + length + gap))
            at += length + gap
        uses.append(agent_uses)
        own_position.append(own)
        limit = draw(st.sampled_from([3, at + 1]))
        chosen = draw(st.sets(st.integers(0, at), max_size=limit))
        row_position.append(sorted(chosen))
    arguments = make_round(master_length, uses, own_position, row_position, block_size)
    padding = draw(st.integers(0, 2))
    arguments["row_agent"] = np.concatenate([arguments["row_agent"], ints([-1] * padding)])
    arguments["row_position"] = np.concatenate([arguments["row_position"], ints([0] * padding)])
    return arguments, block_size


OPTIONS = st.fixed_dictionaries(
    {
        "max_tile_rows": st.sampled_from([1, 2, 5, 16, 64]),
        "target_items": st.sampled_from([1, 3, 20]),
        "max_splits": st.sampled_from([1, 2, 16]),
        "window": st.sampled_from([0, 1, 10, 60]),
    }
)


@settings(max_examples=300, deadline=None)
@given(rounds(), OPTIONS)
def test_every_visible_page_is_met_once(
    drawn: tuple[dict[str, np.ndarray], int], options: dict[str, int]
) -> None:
    arguments, block_size = drawn
    plan = plan_work(**arguments, block_size=block_size, **options)
    met = met_pages(plan, arguments, block_size)
    check_chunks(plan, arguments, block_size)
    for row, agent in enumerate(arguments["row_agent"]):
        if agent < 0:
            continue
        pages = met[row]
        assert max(pages.values(), default=1) == 1
        missing = visible_pages(arguments, row, block_size, options["window"]) - pages.keys()
        assert not missing
    check_partials(plan, arguments["row_agent"])
    for row_begin, row_end, *_ in plan["work"].tolist():
        assert row_end - row_begin <= options["max_tile_rows"]
    capacity = work_capacity(
        agents=len(arguments["own_length"]),
        rows=len(arguments["row_agent"]),
        uses=len(arguments["use_agent"]),
        masters=len(arguments["master_page_indptr"]) - 1,
        max_tile_rows=options["max_tile_rows"],
        target_items=options["target_items"],
        max_splits=options["max_splits"],
    )
    assert len(plan["work"]) <= capacity["work"]
    assert len(plan["work_rows"]) <= capacity["work_rows"]
    assert len(plan["work_chunks"]) <= capacity["work_chunks"]
    assert len(plan["work_uses"]) <= capacity["work_uses"]
    assert len(plan["row_partials"]) <= capacity["partials"]
    assert all(plan[name].dtype == np.int32 for name in FIELDS)


@settings(max_examples=50, deadline=None)
@given(rounds(), OPTIONS, st.randoms(use_true_random=False))
def test_bounds_of_positions_hide_nothing(
    drawn: tuple[dict[str, np.ndarray], int], options: dict[str, int], random: Any
) -> None:
    """Given only bounds of the positions, what the exact positions see is still met."""
    arguments, block_size = drawn
    margin = random.randint(0, 30)
    bounded = dict(arguments)
    for name in ("row_position", "own_position"):
        bounded[name] = np.maximum(arguments[name] - margin, 0)
        bounded[f"{name}_bound"] = arguments[name] + margin
    met = met_pages(plan_work(**bounded, block_size=block_size, **options), arguments, block_size)
    for row, agent in enumerate(arguments["row_agent"]):
        if agent >= 0:
            seen = visible_pages(arguments, row, block_size, options["window"])
            assert seen <= met[row].keys()


@settings(max_examples=50, deadline=None)
@given(rounds(), OPTIONS)
def test_same_arguments_give_the_same_list(
    drawn: tuple[dict[str, np.ndarray], int], options: dict[str, int]
) -> None:
    arguments, block_size = drawn
    first = plan_work(**arguments, block_size=block_size, **options)
    second = plan_work(
        **{name: array.copy() for name, array in arguments.items()},
        block_size=block_size,
        **options,
    )
    for name in FIELDS:
        np.testing.assert_array_equal(first[name], second[name])


def test_decode_reads_shared_pages_once_for_all_agents() -> None:
    arguments = decode_round(agents=16, shared=4096, private=256)
    plan = plan_work(**arguments, block_size=16, max_tile_rows=16, target_items=4, max_splits=8)
    chunks = plan["work_chunks"]
    shared = chunks[chunks[:, 0] == 0]
    assert (shared[:, 2] - shared[:, 1]).sum() == 4096
    # One partial of its own part and one per split of the shared part.
    splits = len(shared)
    assert splits > 1
    assert (np.diff(plan["row_partial_indptr"]) == 1 + splits).all()


def test_partials_do_not_grow_with_the_shared_part() -> None:
    options = {"block_size": 16, "max_tile_rows": 8, "target_items": 4, "max_splits": 16}
    counts = [
        len(plan_work(**decode_round(8, shared, 16), **options)["row_partials"])
        for shared in (1 << 10, 1 << 16)
    ]
    # One own part and four splits of the shared part for each of the 8 rows.
    assert counts == [8 * 5, 8 * 5]


def test_master_of_one_agent_goes_with_its_own_rows() -> None:
    arguments = make_round(
        [64, 64],
        [[(0, 0, 64), (1, 64, 64)], [(0, 0, 64)]],
        [[128], [64]],
        [[128], [64]],
    )
    plan = plan_work(**arguments, block_size=8, max_tile_rows=8, target_items=1, max_splits=1)
    sources = {
        tuple(plan["work_rows"][r0:r1].tolist()): plan["work_chunks"][c0:c1, 0].tolist()
        for r0, r1, c0, c1, *_ in plan["work"].tolist()
    }
    assert sources == {(0, 1): [0], (0,): [1, -1], (1,): [-2]}


def test_uses_stand_once_for_an_agent_and_by_row_for_several() -> None:
    """Agents 0 and 1 share Master 0 with two rows and one; agent 1 alone has Master 1."""
    arguments = make_round(
        [64, 64],
        [[(0, 0, 64)], [(1, 0, 64), (0, 64, 64)]],
        [[64, 65], [128]],
        [[64, 65], [128]],
    )
    plan = plan_work(**arguments, block_size=8, max_tile_rows=8, target_items=1, max_splits=1)
    uses = {
        tuple(plan["work_rows"][r0:r1].tolist()): plan["work_uses"][u : u + (c1 - c0) * each]
        for r0, r1, c0, c1, _, u, each, _ in plan["work"].tolist()
    }
    assert {rows: list(of_rows) for rows, of_rows in uses.items()} == {
        (0, 1, 2): [0, 0, 2],
        (0, 1): [-1],
        (2,): [1, -1],
    }


def test_parts_of_a_tile_name_the_uses_of_their_own_chunks() -> None:
    """An agent with eight Masters of its own, whose item is cut into eight."""
    uses = [[(m, m * 512, 512) for m in range(8)]]
    arguments = make_round([512] * 8, uses, [[4096]], [[4096]])
    plan = plan_work(**arguments, block_size=8, max_tile_rows=8, target_items=8, max_splits=8)
    assert len(plan["work"]) > 4
    met_pages(plan, arguments, 8)
    assert len(plan["work_uses"]) == 9


def test_agents_of_the_same_masters_share_tiles() -> None:
    """Two groups, interleaved: each tile holds agents of one group."""
    uses = [[(agent % 2, 0, 512)] for agent in range(16)]
    arguments = make_round([512, 512], uses, [[512]] * 16, [[512]] * 16)
    plan = plan_work(**arguments, block_size=8, max_tile_rows=8, target_items=1, max_splits=1)
    tiles = [plan["work_rows"][r0:r1] for r0, r1, *_ in plan["work"].tolist() if r1 - r0 > 1]
    assert sorted(tile.tolist() for tile in tiles) == [
        list(range(0, 16, 2)),
        list(range(1, 16, 2)),
    ]


def test_agents_of_several_rows_fill_tiles_together() -> None:
    """8 agents of 5 rows in tiles of 8: five full shared tiles, not eight of five rows."""
    arguments = decode_round(agents=8, shared=1024, private=16, rows=5)
    plan = plan_work(**arguments, block_size=16, max_tile_rows=8, target_items=1, max_splits=1)
    chunks = plan["work_chunks"]
    assert (chunks[chunks[:, 0] == 0] == [0, 0, 1024, 0]).all()
    assert (chunks[:, 0] == 0).sum() == 5
    check_partials(plan, arguments["row_agent"])


def test_prefill_tiles_leave_out_what_none_of_their_rows_sees() -> None:
    """64 rows in tiles of 16 against 512 shared rows that stand in the middle of them."""
    positions = [*range(32), *range(544, 576)]
    arguments = make_round([512], [[(0, 32, 512)]] * 3, [positions] * 3, [positions] * 3)
    plan = plan_work(**arguments, block_size=8, max_tile_rows=16, target_items=8, max_splits=4)
    assert len(plan["row_partials"]) == 0
    for r0, r1, c0, c1, *_ in plan["work"].tolist():
        last = arguments["row_position"][plan["work_rows"][r1 - 1]]
        own = int(np.searchsorted(positions, last, side="right"))
        agent = arguments["row_agent"][plan["work_rows"][r0]]
        expected = [[-1 - agent, 0, own, 8 * agent]]
        if last >= 544:
            expected.insert(0, [0, 0, 512, 0])
        assert plan["work_chunks"][c0:c1].tolist() == expected


def test_window_leaves_out_what_is_too_far_back() -> None:
    arguments = decode_round(agents=4, shared=1024, private=64)
    plan = plan_work(
        **arguments, block_size=16, max_tile_rows=8, target_items=1, max_splits=1, window=100
    )
    shared = plan["work_chunks"][plan["work_chunks"][:, 0] == 0]
    assert shared.tolist() == [[0, (1024 + 64 - 99 - 64) // 16 * 16, 1024, 0]]


def test_row_that_sees_nothing_has_an_item() -> None:
    arguments = make_round([], [[]], [[]], [[5]])
    plan = plan_work(**arguments, block_size=8, max_tile_rows=8, target_items=1, max_splits=1)
    assert plan["work"].tolist() == [[0, 1, 0, 0, -1, 0, 1, 0]]


def test_items_are_balanced() -> None:
    arguments = decode_round(agents=32, shared=16384, private=1024)
    plan = plan_work(
        **arguments,
        block_size=16,
        max_tile_rows=9,
        read_bound_rows=3,
        target_items=64,
        max_splits=32,
    )
    pages = -(-plan["work_chunks"][:, 2] // 16) - plan["work_chunks"][:, 1] // 16
    cost = [sum(pages[c0:c1]) * max(r1 - r0, 3) for r0, r1, c0, c1, *_ in plan["work"].tolist()]
    assert cost == sorted(cost, reverse=True)
    assert max(cost) <= 1.1 * sum(cost) / 64


def test_tiles_that_read_the_same_pages_run_together() -> None:
    """32 agents in tiles of 8: each part of the Master is met by four tiles in a row."""
    arguments = decode_round(agents=32, shared=16384, private=16)
    plan = plan_work(**arguments, block_size=16, max_tile_rows=8, target_items=64, max_splits=64)
    parts = [
        plan["work_chunks"][c0].tolist() for r0, r1, c0, *_ in plan["work"].tolist() if r1 - r0 == 8
    ]
    assert len(parts) > 8
    assert parts == sorted(parts)
    assert all(parts.count(part) == 4 for part in parts)


def test_a_device_is_kept_busy_by_all_kv_heads_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class H100:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    assert [items_per_kv_head(heads, "cuda:1") for heads in (1, 8, 40)] == [264, 33, 7]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("use_master", [1, 0], "use_master: expected 0 .. 0, got 1"),
        ("use_length", [16, 17], "use_length: expected 0 .. 16 of Master 0, got 17"),
        ("use_agent", [0, 2], "use_agent: expected less than 2, got 2"),
        ("use_delta", [0], r"use_delta: expected \[2\], got \[1\]"),
        ("row_agent", [0, 2], "row_agent: expected less than 2, got 2"),
        ("own_length", [9, 1], "own_length: expected 0 .. 8 of agent 0, got 9"),
        ("master_page_indptr", [0, -1], "master_page_indptr: expected ascending values"),
    ],
)
def test_wrong_arguments_are_named(name: str, value: list[int], message: str) -> None:
    arguments = make_round([16], [[(0, 0, 16)]] * 2, [[16]] * 2, [[16]] * 2)
    arguments[name] = ints(value)
    with pytest.raises(ValueError, match=message):
        plan_work(**arguments, block_size=8, max_tile_rows=8, target_items=1, max_splits=1)


def test_rows_must_be_adjacent_and_ascend() -> None:
    options = {"block_size": 8, "max_tile_rows": 8, "target_items": 1, "max_splits": 1}
    arguments = make_round([], [[], []], [[], []], [[3, 2], [0]])
    with pytest.raises(ValueError, match="row_position: expected the rows of an agent to ascend"):
        plan_work(**arguments, **options)
    arguments = make_round([], [[], []], [[], []], [[1, 2], [0]])
    arguments["row_agent"] = ints([0, 1, 0])
    with pytest.raises(ValueError, match="agent 0 comes again at row 2"):
        plan_work(**arguments, **options)


def test_time_grows_with_uses_not_with_pages() -> None:
    """64 agents of 64 segments and 32K tokens, 4 + 64 rows each: about a millisecond."""

    def best(segment: int) -> float:
        masters = [segment] * 64
        uses = [[(m, m * (segment + 1), segment) for m in range(64)] for _ in range(64)]
        rows = [m * (segment + 1) + i for m in range(64) for i in range(4)]
        arguments = make_round(masters, uses, [rows] * 64, [rows] * 64, 16)
        options = {"block_size": 16, "max_tile_rows": 21, "target_items": 64, "max_splits": 8}
        times = []
        for _ in range(5):
            start = time.perf_counter()
            plan_work(**arguments, **options)
            times.append(time.perf_counter() - start)
        return min(times)

    short, long = best(512), best(8192)
    assert short < 20e-3
    assert long < 3 * short
