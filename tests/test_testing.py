"""The random rounds of `tokendance.testing` are legal, poisoned, and cover what they should."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tokendance import testing
from tokendance.device.rounds import RoundTensors
from tokendance.testing.reference import gather_rows, mirror_rows

SEEDS = range(7)
pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {
    **testing.EDGE_CASES,
    "plain": {},
    "many": {"agents": 7, "masters": 5, "rows": 9, "repeat": True},
    "cut": {"cut": True, "private_length": 0, "agents": 5},
    "holes": {"holes": True, "start": 9},
    "no_rows": {"rows": 0},
    "room": {"room_for_all": True, "block_size": 8},
    "wide_pages": {"block_size": 32, "masters": (64, 33)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_rounds_keep_the_contract(kind, seed):
    case = testing.random_round(seed, **KINDS[kind])
    round, size = case.round, case.round.extents.block_size
    uses = range(case.filled.uses)
    max_position = case.cos.shape[0]
    for first, second in pairwise(uses):
        agent = int(round.use_agent[first])
        if agent == int(round.use_agent[second]):
            end = int(round.use_delta[first]) + int(round.use_length[first])
            assert end <= int(round.use_delta[second])
        else:
            assert agent < int(round.use_agent[second])
    for use in uses:
        agent, master = int(round.use_agent[use]), int(round.use_master[use])
        assert case.use_table[agent, master] == use
        assert abs(int(round.use_shift[use])) < max_position
        pages = int(round.master_page_indptr[master + 1] - round.master_page_indptr[master])
        assert int(round.use_length[use]) <= pages * size
    assert (case.use_table >= 0).sum() == case.filled.uses
    for agent in range(case.filled.agents):
        begin, end = round.agent_use_indptr[agent : agent + 2].tolist()
        entries = round.agent_use[begin:end]
        assert sorted(entries[:, 1].tolist()) == list(range(begin, end))
        assert entries[:, 0].tolist() == sorted(set(entries[:, 0].tolist()))
        assert torch.equal(round.use_master[entries[:, 1]], entries[:, 0])
    assert (round.agent_use[case.filled.uses :] == -1).all()
    for agent in range(case.filled.agents):
        position = mirror_rows(round, agent).position
        assert position.unique().numel() == position.numel()
        if position.numel():
            assert int(position.min()) >= 0
            assert int(position.max()) < int(case.length[agent]) <= max_position
        if kind not in ("holes", "cut") and KINDS[kind].get("start", 0) == 0:
            assert position.numel() == int(case.length[agent])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_that_may_be_read_is_finite_and_every_other_is_nan(kind, seed):
    case = testing.random_round(seed, layout=testing.LAYOUTS[seed % 7], **KINDS[kind])
    round = case.round
    num_pages, size = case.k_pool[0].shape[:2]
    readable = torch.zeros(num_pages * size, dtype=torch.bool)
    for use in range(case.filled.uses):
        first = int(round.master_page_indptr[int(round.use_master[use])])
        for row in range(int(round.use_length[use])):
            page = int(round.master_pages[first + row // size])
            readable[page * size + row % size] = True
    for agent in range(case.filled.agents):
        rows = mirror_rows(round, agent)
        own = rows.pool_row[rows.pool_row.numel() - int(round.own_length[agent]) :]
        assert not readable[own].any(), "an own row stands in a Master's page"
        readable[own] = True
    for pool in (case.k_pool[0], case.v_pool[0]):
        rows = gather_rows(pool, torch.arange(num_pages * size)).flatten(1)
        assert rows[readable].isfinite().all()
        assert rows[~readable].isnan().all()
    assert int(testing.whole_storage(case.k_pool[0]).isfinite().sum()) in (
        int(readable.sum()) * case.k_pool[0][0, 0].numel() * shared for shared in (1, 2)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_work_lists_cover_what_rows_see(kind, seed):
    case = testing.random_round(seed, rows_per_item=5, **KINDS[kind])
    testing.assert_work_covers(case.round, max_rows=5)
    testing.assert_work_covers(case.round, max_rows=5, window=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 7])
def test_planned_work_lists_cover_what_rows_see(kind, window):
    for seed in SEEDS:
        arguments = {"rows": 6, **KINDS[kind]}
        case = testing.random_round(
            seed, work="planned", window=window, rows_per_item=8, **arguments
        )
        testing.assert_work_covers(case.round, max_rows=8, window=window)


def damaged(case, field, index, value):
    arrays = {name: array.copy() for name, array in case.arrays.items()}
    arrays[field].reshape(-1)[index] = value
    return RoundTensors.from_arrays(arrays, case.filled)


def test_a_damaged_work_list_is_noticed():
    case = testing.random_round(1, agents=5, masters=3, rows=6, rows_per_item=4)
    chunks, work = case.arrays["work_chunks"], case.arrays["work"]
    longest = int(np.argmax(chunks[:, 2] - chunks[:, 1]))
    size = case.filled.block_size
    shorter = damaged(case, "work_chunks", longest * 4 + 2, chunks[longest, 2] - size)
    with pytest.raises(AssertionError, match="does not meet"):
        testing.assert_work_covers(shorter, 4)
    elsewhere = damaged(case, "work_chunks", longest * 4 + 3, chunks[longest, 3] + 1)
    with pytest.raises(AssertionError):
        testing.assert_work_covers(elsewhere, 4)
    [used, *_] = np.flatnonzero(case.arrays["work_uses"] >= 0)
    unused = damaged(case, "work_uses", used, -1)
    with pytest.raises(AssertionError, match="use -1"):
        testing.assert_work_covers(unused, 4)
    item = int(np.flatnonzero(work[:, 0] < work[:, 1])[0])
    fewer = damaged(case, "work", item * 8 + 1, work[item, 1] - 1)
    with pytest.raises(AssertionError):
        testing.assert_work_covers(fewer, 4)
    with pytest.raises(AssertionError):
        testing.assert_work_covers(case.round, 1)


def test_the_same_arguments_give_the_same_round_and_copies_are_apart():
    first, second = (testing.random_round(7, layout="packed") for _ in range(2))
    testing.assert_same_bits(first.round.buffer, second.round.buffer)
    testing.assert_same_storage(first.k_pool[0], second.k_pool[0])
    copy = first.copy()
    testing.assert_same_storage(copy.v_pool[0], first.v_pool[0])
    assert copy.k_pool[0].untyped_storage().data_ptr() == (
        copy.v_pool[0].untyped_storage().data_ptr()
    )
    copy.k_pool[0].zero_()
    testing.assert_same_storage(second.k_pool[0], first.k_pool[0])


def test_rounds_have_what_they_are_for():
    """Over a few seeds: shifts of both signs and zero, prefixes, agents without this or that."""
    shifts, lengths, found = set(), set(), set()
    for seed in range(30):
        case = testing.random_round(seed, agents=4, masters=3, cut=True, repeat=True, rows=5)
        filled = case.filled
        shifts |= {int(np.sign(shift)) for shift in case.arrays["use_shift"]}
        lengths |= {int(length) % 16 for length in case.arrays["use_length"]}
        found |= {"no uses"} if (np.diff(case.arrays["agent_use_indptr"]) == 0).any() else set()
        found |= {"no own rows"} if (case.arrays["own_length"] == 0).any() else set()
        found |= {"before 0"} if (case.arrays["use_delta"] < 0).any() else set()
        found |= {"at 0"} if (case.arrays["use_delta"] == 0).any() else set()
        ends = case.arrays["use_delta"] + case.arrays["use_length"]
        found |= {"at the end"} if (ends == case.cos.shape[0]).any() else set()
        with_rows = set(case.arrays["row_agent"].tolist())
        found |= {"no rows"} if len(with_rows) < filled.agents else set()
        found |= {"merged"} if filled.partials > filled.rows else set()
    assert shifts == {-1, 0, 1}
    assert {0, 1, 15} <= lengths
    assert found == {
        *("no uses", "no own rows", "before 0", "at 0", "at the end", "no rows", "merged"),
    }


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_dense_caches_give_each_token_a_slot_of_its_own(page_size, layout):
    case = testing.random_round(3, agents=4)
    dense = testing.dense_cache(case, 5, page_size=page_size, layout=layout, skip=0.2)
    assert dense.k[0].dim() == (3 if page_size is None else 4)
    assert dense.v[0].isnan().all()
    slots = dense.slot_mapping[dense.slot_mapping >= 0]
    assert slots.unique().numel() == slots.numel() > 0
    assert (dense.slot_mapping < 0).any()


def test_comparisons_see_one_bit():
    bits = torch.tensor([1.0, -0.0, torch.nan])
    testing.assert_same_bits(bits.clone(), bits)
    with pytest.raises(AssertionError, match="1 of 3 elements differ"):
        testing.assert_same_bits(bits.abs(), bits)
    base = torch.zeros(4, 6)
    other = base.clone()
    other[0, 5] = 1
    with pytest.raises(AssertionError, match="whole storage"):
        testing.assert_same_storage(other[:, :4], base[:, :4])
    testing.assert_close(torch.tensor([1.000001]), torch.tensor([1.0]), torch.float32)
    with pytest.raises(AssertionError, match="off by"):
        testing.assert_close(torch.tensor([1.0001]), torch.tensor([1.0]), torch.float32)
    with pytest.raises(AssertionError):
        testing.assert_close(torch.tensor([0.0]), torch.tensor([-torch.inf]), torch.float32)
