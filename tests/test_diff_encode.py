"""`diff_encode` against the reference, bit for bit, and what a diff promises."""

from __future__ import annotations

from dataclasses import replace

import drawn_rounds
import e4m3
import numpy as np
import pytest
import ties
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance import testing
from tokendance.device.rounds import RoundTensors
from tokendance.testing import reference

OPERATOR = "diff_encode"
PLAIN = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*PLAIN, *testing.QUANTIZED]
HEAD_DIMS = drawn_rounds.HEAD_DIMS
ABSURD_SLOT = 1 << 40  # stands in the slot mapping where no token does
pytestmark = pytest.mark.usefixtures("one_thread")


def encoded(module, case, dense, atol=0.0, rtol=0.0):
    """Runs the operator (or the reference) on these very tensors."""
    tables = (case.cos, case.sin, case.interleaved)
    round = (case.round,) if module is reference else (case.round.buffer, case.extents)
    inputs = (dense.k, dense.v, dense.slot_mapping, case.length)
    scales = (case.k_scale, case.v_scale)
    module.diff_encode(*inputs, case.k_pool, case.v_pool, *tables, *round, atol, rtol, *scales)


def restored(case, seed=0, **options):
    """Dense KV of the round's Mirrors, by the reference; NaN and absurd slots beyond prompts."""
    dense = testing.dense_cache(case, seed, **options)
    tables = (case.cos, case.sin, case.interleaved)
    reference.diff_restore(
        case.k_pool, case.v_pool, *tables, case.round, dense.slot_mapping, dense.k, dense.v
    )
    for agent, length in enumerate(case.length.tolist()):
        dense.slot_mapping[agent, length:] = ABSURD_SLOT
    return dense


def forget_mirrors(case):
    """The round as it is before encoding: rubbish in the masks, own rows and own pages."""
    blank = case.copy()
    blank.round.use_masks.fill_(0x5A5A5A5A)
    blank.round.own_length.fill_(-7)
    blank.round.own_position.fill_(testing.ABSURD)
    own = blank.round.own_pages[: int(blank.round.own_page_indptr[-1])].long()
    for pool in blank.k_pool + blank.v_pool:
        pool[own] = torch.full_like(pool[own], testing.poison(pool.dtype))
    return blank


def expectation(blank, dense, atol=0.0, rtol=0.0):
    """The round that the reference encodes."""
    expected = blank.copy()
    encoded(reference, expected, dense, atol, rtol)
    return expected


def check(backend, blank, dense, atol=0.0, rtol=0.0, expected=None):
    """Compares all of every storage with the reference's; returns the encoded round."""
    expected = expected or expectation(blank, dense, atol, rtol)
    mine, given_dense = blank.copy(backend.device), dense.copy(backend.device)
    encoded(backend, mine, given_dense, atol, rtol)
    for name in blank.round.extents.shapes():
        testing.assert_same_bits(getattr(mine.round, name), getattr(expected.round, name), name)
    for name, got, want in (
        ("round", mine.round.buffer, expected.round.buffer),
        *(("k_pool", *pair) for pair in zip(mine.k_pool, expected.k_pool, strict=True)),
        *(("v_pool", *pair) for pair in zip(mine.v_pool, expected.v_pool, strict=True)),
        *(("k_in", *pair) for pair in zip(given_dense.k, dense.k, strict=True)),
        *(("v_in", *pair) for pair in zip(given_dense.v, dense.v, strict=True)),
    ):
        testing.assert_same_storage(got, want, name)
    return expected


def alter(dense, agent, positions, layer=0):
    """Changes one element of K or V of the rows at these positions, in one layer."""
    for index, position in enumerate(positions):
        rows = (dense.k, dense.v)[index % 2][layer]
        slot = dense.slot_mapping[agent, position : position + 1]
        row = reference.gather_rows(rows, slot).clone()
        step = index // 2  # K and V in turn
        element = (0, step % row.shape[1], (step * 31) % row.shape[2])
        row[element] = 1.0 if row[element].float() != 1 else 2.0
        reference.scatter_rows(rows, slot, row)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mirrors_come_back(backend, dtype, head_dim, interleaved):
    """Encoding what was restored gives the masks and own rows that it was restored from."""
    case = testing.random_round(
        head_dim,
        head_dim=head_dim,
        dtype=dtype,
        interleaved=interleaved,
        masters=(21, 30),
        num_layers=2,
        room_for_all=True,
    )
    got = check(backend, forget_mirrors(case), restored(case))
    for name in ("use_masks", "own_length", "own_position"):
        filled = case.filled.shapes()[name][0]
        wanted = getattr(case.round, name)[:filled]
        testing.assert_same_bits(getattr(got.round, name)[:filled], wanted, name)
    assert int(case.round.own_length.sum()) > 0


@pytest.mark.parametrize("kind", testing.EDGE_CASES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_edge_cases(backend, kind, block_size):
    arguments = {"room_for_all": True, "dtype": torch.float16, **testing.EDGE_CASES[kind]}
    arguments["start"] = 0  # every position has a row
    case = testing.random_round(block_size + 1, block_size=block_size, **arguments)
    check(backend, forget_mirrors(case), restored(case, page_size=8))


@pytest.mark.parametrize("page_size", [None, 16], ids=["rows", "pages"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides(backend, layout, page_size):
    case = testing.random_round(
        2, layout=layout, dtype=torch.bfloat16, masters=(20, 9), room_for_all=True
    )
    blank = forget_mirrors(case)
    for in_layout in testing.LAYOUTS[:: 1 if backend.name == "cpu" else 3]:
        check(backend, blank, restored(case, page_size=page_size, layout=in_layout))


@pytest.mark.parametrize("rotary_dim", [0, 2, 34])
def test_partial_rotation(backend, rotary_dim):
    case = testing.random_round(
        3, head_dim=96, rotary_dim=rotary_dim, dtype=torch.float16, room_for_all=True
    )
    check(backend, forget_mirrors(case), restored(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("altered", [(0,), (3, 4, 5, 17), tuple(range(40))])
def test_a_sibling_altered_in_r_rows_gets_r_own_rows(backend, altered, dtype):
    """Whichever layer, head, dimension of K or V they differ in."""
    case = testing.random_round(
        4,
        agents=1,
        masters=(40,),
        whole_uses=True,
        private_length=0,
        masks="none",
        num_layers=3,
        dtype=dtype,
        room_for_all=True,
    )
    blank = forget_mirrors(case)
    clean = check(backend, blank, restored(case))
    assert clean.round.own_length.tolist()[:1] == [0]
    assert (clean.round.use_masks[: case.filled.use_pages] == 0).all()
    for layer in range(3):
        dense = restored(case)
        alter(dense, 0, altered, layer)
        got = check(backend, blank, dense)
        assert int(got.round.own_length[0]) == len(altered)
        first = int(got.round.own_page_indptr[0]) * 16
        assert got.round.own_position[first : first + len(altered)].tolist() == list(altered)


def test_the_master_agent_has_no_override(backend):
    """A Master cut out of a prompt's own dense rows: no shift, and no row that differs."""
    case = testing.random_round(
        5, agents=2, masters=(33,), whole_uses=True, masks="none", room_for_all=True, slack=False
    )
    use = int(case.use_table[0, 0])
    moved = case.round.use_delta - case.round.use_delta[use]
    case.round.use_shift.copy_(moved)
    got = check(backend, forget_mirrors(case), restored(case))
    assert (got.round.use_masks == 0).all()
    private = case.length - 33
    assert got.round.own_length.tolist() == private.tolist()


def rows_at_the_tolerance(dtype, **options):
    """Two agents of which every element of every row is 0.5 off, up or down. Elements have a last
    bit that is set."""
    case = testing.random_round(
        19, agents=2, masters=(20,), whole_uses=True, masks="none", private_length=0,
        room_for_all=True, dtype=dtype, **options,
    )  # fmt: skip
    case.round.use_shift[:2] = 0
    eps = torch.finfo(dtype).eps
    upper = torch.arange(case.k_pool[0].shape[1]) % 2 == 1
    values = torch.where(upper, 1.5, 1.0) + eps
    for pool in case.k_pool + case.v_pool:
        pool.copy_(values.view(1, -1, 1, 1).expand(pool.shape).to(dtype))
    dense = restored(case)
    for rows in dense.k + dense.v:
        content = rows.float()
        rows.copy_(torch.where(content >= 1.5, content - 0.5, content + 0.5))
    return replace(forget_mirrors(case), k_scale=None, v_scale=None), dense


@pytest.mark.parametrize("dtype", [*PLAIN, torch.float8_e4m3fn], ids=str)
def test_rows_at_the_tolerance_are_the_same(backend, dtype):
    got = check(backend, *rows_at_the_tolerance(dtype), atol=0.5)
    assert got.round.own_length[:2].tolist() == [0, 0]


def one_element_each(dtype, **options):
    """Two agents of which each row differs from its Master's in one element: the first eight of
    either half of a key, of either half of a row of values."""
    case = testing.random_round(
        22, agents=2, masters=(40,), whole_uses=True, masks="none", private_length=0,
        room_for_all=True, dtype=dtype, **options,
    )  # fmt: skip
    dense = restored(case)
    places = [(dense.k, 0, dim) for dim in (*range(8), *range(32, 40))]
    places += [(dense.v, head, dim) for head in (0, 1) for dim in range(8)]
    for agent, delta in zip(case.arrays["use_agent"], case.arrays["use_delta"], strict=True):
        for row, (rows, head, dim) in enumerate(places):
            slots = dense.slot_mapping[agent, delta + row].view(1)
            changed = reference.gather_rows(rows[0], slots).float()
            changed[0, head, dim] = -400.0 if changed[0, head, dim] > 0 else 400.0
            reference.scatter_rows(rows[0], slots, changed.to(dtype))
    return forget_mirrors(case), dense


@pytest.mark.parametrize("dtype", [*PLAIN, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_any_element_makes_a_row_differ(backend, dtype, interleaved):
    got = check(backend, *one_element_each(dtype, interleaved=interleaved), atol=0.5)
    assert got.round.own_length[:2].tolist() == [32, 32]


def zeros_and_nans(dtype, **options):
    """A Master with both zeros, NaN and infinity, the same as dense rows of two agents, and those
    with the sign of a zero changed."""
    case = testing.random_round(
        6,
        agents=2,
        masters=(20,),
        whole_uses=True,
        masks="none",
        private_length=0,
        dtype=dtype,
        room_for_all=True,
        **options,
    )
    case.round.use_shift[:2] = 0
    rows = case.round.master_pages[:2].long()
    case.k_pool[0][rows[0], 3, 0, 5] = torch.nan
    case.v_pool[0][rows[0], 4, 1, 6] = 0.0
    case.v_pool[0][rows[0], 5, 1, 6] = -0.0
    case.k_pool[0][rows[1], 1, 0, 0] = torch.inf
    same = restored(case)
    changed = same.copy()
    slots = same.slot_mapping[:2, 4]
    row = reference.gather_rows(same.v[0], slots).clone()
    row[:, 1, 6] = -0.0
    reference.scatter_rows(changed.v[0], slots, row)
    return forget_mirrors(case), same, changed


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_zeros_of_both_signs_differ_and_equal_nans_do_not(backend, dtype):
    blank, same, dense = zeros_and_nans(dtype)
    assert check(backend, blank, same).round.own_length[:2].tolist() == [0, 0]
    got = check(backend, blank, dense)
    first = 16 * got.round.own_page_indptr[:2].long()
    assert got.round.own_length[:2].tolist() == [1, 1]
    assert got.round.own_position[first].tolist() == [4, 4]
    # With a tolerance the zeros are the same and the NaN is not.
    got = check(backend, blank, dense, atol=1e-3)
    assert got.round.own_position[first].tolist() == [3, 3]


def long_prompts(**options):
    """Prompts of several blocks of the compaction: a use of more mask words than a warp has lanes,
    more uses than a block has warps, uses of no rows, and of the Masters' rows an agent has none
    itself, one every seventh and one all."""
    lengths = (280, 5, 0, 9, 0, 3, 8, 7, 1, 6, 2, 4)
    case = testing.random_round(
        13, agents=3, masters=lengths, whole_uses=True, masks="none", block_size=8,
        private_length=30, room_for_all=True, **options,
    )  # fmt: skip
    dense = restored(case)
    for agent, length in enumerate(case.length.tolist()):
        alter(dense, agent, range(agent, length, 7 if agent == 1 else 1) if agent else ())
    return case, dense


def one_own_row(**options):
    """Two agents of one use, of several blocks of the compaction; the first agent has a row, and
    the second every other of a block, most of the next and none of the last. All of the second's
    are the first row of the dense KV."""
    case = testing.random_round(
        15, agents=2, masters=(600,), whole_uses=True, masks="none", private_length=0,
        num_q_heads=1, num_kv_heads=1, room_for_all=True, block_size=8, **options,
    )  # fmt: skip
    dense = restored(case)
    alter(dense, 0, [7])
    dense.slot_mapping[1, :256:2] = 0
    dense.slot_mapping[1, 256:456] = 0
    return forget_mirrors(case), dense


def test_one_own_row(backend):
    encoded = check(backend, *one_own_row())
    assert encoded.round.own_length[0] == 1


def alter_key(dense, agent, positions, head, dim):
    """Changes one element of the first layer's keys in the rows at these positions."""
    slots = dense.slot_mapping[agent, positions]
    rows = reference.gather_rows(dense.k[0], slots).clone()
    rows[:, head, dim] = (-1 - rows[:, head, dim].float()).to(rows.dtype)
    reference.scatter_rows(dense.k[0], slots, rows)


def uses_that_end_with_a_page(**options):
    """Uses of a Master's first page alone, and more room for masks than they need."""
    case = testing.random_round(
        19, agents=2, masters=(40,), whole_uses=True, masks="none", num_q_heads=1, num_kv_heads=1,
        room_for_all=True, **options,
    )  # fmt: skip
    dense = restored(case)
    blank = forget_mirrors(case)
    uses = case.filled.uses
    blank.round.use_length[:uses] = case.filled.block_size
    blank.round.use_page_indptr[:] = torch.arange(len(blank.round.use_page_indptr)).clamp(max=uses)
    return blank, dense


def test_uses_that_end_with_a_page(backend):
    check(backend, *uses_that_end_with_a_page())


def test_long_prompts(backend):
    case, dense = long_prompts(dtype=torch.bfloat16)
    assert (case.length[: case.filled.agents] > 256).all()
    check(backend, forget_mirrors(case), dense)


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 80), (5, 64), (9, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_fill_a_block_or_take_several_passes(backend, dtype, heads, head_dim):
    case = wide_rows(heads, head_dim, dtype=dtype)
    check(backend, forget_mirrors(case), restored(case))


def wide_rows(heads, head_dim, **options):
    return testing.random_round(
        14, agents=2, masters=(9,), num_q_heads=heads, num_kv_heads=heads, head_dim=head_dim,
        room_for_all=True, slack=False, **options,
    )  # fmt: skip


def halfway_round(dtype, **options):
    case = testing.random_round(
        18, agents=2, masters=(19,), whole_uses=True, masks="none", table_slack=9, dtype=dtype,
        room_for_all=True, **options,
    )  # fmt: skip
    for pool in case.k_pool + case.v_pool:
        ties.fill_odd_even(pool)
    ties.set_angles(case.cos, case.sin, dtype)
    return case


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("dtype", [*PLAIN, torch.float8_e4m3fn], ids=str)
def test_halfway_values_go_to_the_even_neighbour(backend, dtype, interleaved):
    case = halfway_round(dtype, interleaved=interleaved)
    assert (case.round.use_shift[: case.filled.uses] != 0).any()
    got = check(backend, forget_mirrors(case), restored(case))
    assert (got.round.use_masks[: case.filled.use_pages] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_encoded_is_restored_bit_for_bit(fast_backend, dtype):
    """Even where the dense rows have nothing to do with the Masters."""
    case = testing.random_round(
        7, agents=5, masters=4, rows=0, num_layers=2, dtype=dtype, room_for_all=True
    )
    dense = restored(case)
    generator = torch.Generator().manual_seed(7)
    for agent, length in enumerate(case.length.tolist()):
        chosen = torch.rand(length, generator=generator) < 0.5
        alter(dense, agent, chosen.nonzero().flatten().tolist(), layer=agent % 2)
    mine = forget_mirrors(case).copy(fast_backend.device)
    encoded(fast_backend, mine, dense.copy(fast_backend.device))
    back = testing.dense_cache(case, 0)
    there = back.copy(fast_backend.device)
    fast_backend.diff_restore(
        mine.k_pool,
        mine.v_pool,
        mine.cos,
        mine.sin,
        mine.interleaved,
        mine.round.buffer,
        mine.extents,
        there.slot_mapping,
        there.k,
        there.v,
    )
    for got, want in zip(there.k + there.v, dense.k + dense.v, strict=True):
        testing.assert_same_storage(got, want)


@pytest.mark.parametrize(("atol", "rtol"), [(0.05, 0.0), (0.0, 0.05), (0.02, 0.02)])
@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_tolerances(backend, dtype, atol, rtol):
    """Rows changed by a third of the tolerance stay with the Master, by three times it do not."""
    case = testing.random_round(
        8,
        agents=1,
        masters=(40,),
        whole_uses=True,
        masks="none",
        private_length=0,
        dtype=dtype,
        room_for_all=True,
    )
    dense = restored(case)
    slots = dense.slot_mapping[0, :40]
    for rows in dense.k + dense.v:
        content = reference.gather_rows(rows, slots).float()
        bound = atol + rtol * content.abs()
        part = torch.full((40, 1, 1), 0.33)
        part[::4] = 3.0
        sign = torch.where(torch.rand(content.shape) < 0.5, -1, 1)
        reference.scatter_rows(rows, slots, (content + part * bound * sign).to(dtype))
    blank = forget_mirrors(case)
    assert check(backend, blank, dense, atol, rtol).round.own_length[0] == 10
    assert check(backend, blank, dense).round.own_length[0] == 40


def with_room(case, pages_of_agent):
    """The round with so many own pages per agent, the first of those it has."""
    arrays = {name: array.copy() for name, array in case.arrays.items()}
    before = case.arrays["own_page_indptr"]
    kept = [
        page
        for agent, pages in enumerate(pages_of_agent)
        for page in case.arrays["own_pages"][before[agent] : before[agent] + pages].tolist()
    ]
    arrays["own_pages"] = np.array(kept, dtype=np.int32)
    arrays["own_page_indptr"] = np.cumsum([0, *pages_of_agent]).astype(np.int32)
    size = case.filled.block_size
    arrays["own_position"] = np.full(len(kept) * size, testing.ABSURD, dtype=np.int32)
    filled = replace(case.filled, own_pages=len(kept))
    return replace(case, round=RoundTensors.from_arrays(arrays, filled), filled=filled)


def little_room(room, **options):
    case = testing.random_round(
        9, agents=3, masters=(40, 30), whole_uses=True, masks="all", room_for_all=True,
        slack=False, **options,
    )  # fmt: skip
    dense = restored(case)
    has = np.diff(case.arrays["own_page_indptr"]).tolist()
    tight = with_room(case, [min(pages, room + agent) for agent, pages in enumerate(has)])
    return forget_mirrors(tight), dense


@pytest.mark.parametrize("room", [0, 1, 2])
def test_rows_that_do_not_fit_are_counted_and_not_written(backend, room):
    blank, dense = little_room(room, dtype=torch.float16)
    got = check(backend, blank, dense)
    assert got.round.own_length.tolist() == blank.length.tolist()


def test_tokens_before_the_end_of_a_use_are_not_needed(backend):
    """A prompt that ends within its last use: the rows beyond count as the Master's."""
    blank, dense = prompts_that_end_early()
    got = check(backend, blank, dense)
    assert got.round.own_length.tolist() == blank.length.tolist()


def prompts_that_end_early(**options):
    case = testing.random_round(
        10, agents=3, masters=(40, 40), whole_uses=True, masks="all", private_length=3,
        room_for_all=True, slack=False, **options,
    )  # fmt: skip
    dense = restored(case)
    shorter = torch.tensor([1, 13, 30], dtype=torch.int32)
    blank = replace(forget_mirrors(case), length=case.length - shorter)
    for agent, length in enumerate(blank.length.tolist()):
        dense.slot_mapping[agent, length:] = ABSURD_SLOT
    return blank, dense


@settings(max_examples=50, deadline=None)
@given(
    **drawn_rounds.ARGUMENTS,
    **drawn_rounds.LENGTHS,
    dtype=st.sampled_from(PLAIN),
    in_layout=st.sampled_from(testing.LAYOUTS),
    page_size=st.sampled_from([None, 1, 16, 256]),
    table_slack=st.sampled_from([0, 3000]),
)
def test_random_rounds(fast_backend, seed, in_layout, page_size, **options):
    case = drawn_rounds.drawn_round(seed, room_for_all=True, rows=0, **options)
    dense = restored(case, seed, page_size=page_size, layout=in_layout)
    check(fast_backend, forget_mirrors(case), dense)


# Quantized pools --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_tolerances_are_of_what_elements_stand_for(backend, dtype):
    """The same elements are off by less where their heads' scales are smaller."""
    case = testing.random_round(
        23, agents=1, masters=(40,), whole_uses=True, masks="none", private_length=0,
        num_layers=2, dtype=dtype, room_for_all=True,
    )  # fmt: skip
    case.round.use_shift[0] = 0
    for pool in case.k_pool + case.v_pool:
        pool.copy_(torch.full_like(pool, 16))
    dense = restored(case)
    slots = dense.slot_mapping[0, :40]
    for layer in range(2):
        for rows in (dense.k[layer], dense.v[layer]):
            content = reference.gather_rows(rows, slots)
            content[layer::2] = 18  # a step of e4m3, two of int8
            reference.scatter_rows(rows, slots, content)
    scales = torch.tensor([[0.5, 0.25], [1.0, 0.5]])
    blank = replace(forget_mirrors(case), k_scale=scales, v_scale=scales)
    counts = [
        int(check(backend, blank, dense, *tolerances).round.own_length[0])
        for tolerances in ((0.0, 0.0), (0.9, 0.0), (1.0, 0.0), (2.0, 0.0), (0.0, 0.12), (0.0, 0.13))
    ]
    assert counts == [40, 40, 20, 0, 40, 0]
    bare = replace(blank, k_scale=None, v_scale=None)
    assert check(backend, bare, dense, 1.9).round.own_length[0] == 40
    assert check(backend, bare, dense, 2.0).round.own_length[0] == 0


def one_step_in_every_row(dtype, **options):
    """Two agents of which each row differs in one element from the Master's, by 2: in one of keys
    and values, a layer, a head and a half of it. Some heads have a scale of 0.5, where that is a
    difference of 1."""
    case = testing.random_round(
        24, agents=2, masters=(24,), whole_uses=True, masks="none", private_length=0, num_layers=2,
        num_q_heads=3, num_kv_heads=3, dtype=dtype, room_for_all=True, **options,
    )  # fmt: skip
    case.round.use_shift[:2] = 0
    for pool in case.k_pool + case.v_pool:
        pool.copy_(torch.full_like(pool, 16))
    dense = restored(case)
    for row in range(24):
        layer, (head, half) = row // 6 % 2, divmod(row % 6, 2)
        rows = (dense.k, dense.v)[row // 12][layer]
        slots = dense.slot_mapping[:2, row]
        content = reference.gather_rows(rows, slots).clone()
        content[:, head, 40 * half] = 18
        reference.scatter_rows(rows, slots, content)
    k_scale = torch.tensor([[1.0, 0.5, 1.0], [0.5, 0.5, 1.0]])
    return replace(forget_mirrors(case), k_scale=k_scale, v_scale=1.5 - k_scale), dense


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_every_head_has_its_own_tolerance(backend, dtype):
    blank, dense = one_step_in_every_row(dtype)
    got = check(backend, blank, dense, atol=1.5)
    differs = torch.stack([blank.k_scale, blank.v_scale]).repeat_interleave(2) == 1
    for agent in range(2):
        count, first = int(got.round.own_length[agent]), 16 * int(got.round.own_page_indptr[agent])
        positions = got.round.own_position[first : first + count]
        assert positions.tolist() == differs.nonzero().flatten().tolist()


def every_code_rounds(**options):
    """All the elements, turned as what is encoded was, or made infinite by the angles."""
    for infinite in (False, True):
        case = e4m3.round_of(e4m3.every_code(), room_for_all=True, **options)
        if infinite:
            e4m3.make_infinite(case.cos, case.sin)
        yield case


def test_every_element_in_every_lane(backend):
    for case in every_code_rounds():
        got = check(backend, forget_mirrors(case), restored(case))
        assert int(got.round.own_length.sum()) == 0


def one_nan_in_every_row(**options):
    """Two agents' rows of the largest element but for a NaN in one of keys and values, of dense
    rows and Masters: in all of them, in every lane of both vectors of a thread. Eight rows more
    are without."""
    rows = torch.full((72, 2, 64), 448.0).to(e4m3.E4M3)
    case = e4m3.round_of(rows, room_for_all=True, **options)
    case.round.use_shift[:2] = 0
    dense = restored(case)
    pages = case.round.master_pages[:9].long()
    for kind, (pool, out) in enumerate(((case.k_pool, dense.k), (case.v_pool, dense.v))):
        held, given = rows.clone(), rows.clone()
        for index, side in enumerate((held, given)):
            for lane in range(16):
                is_second, place = divmod(lane, 8)
                head, dim = (0, 32 * is_second + place) if kind == 0 else (is_second, place)
                side[32 * kind + 16 * index + lane, head, dim] = torch.nan
        pool[0][pages] = held.view(9, 8, 2, 64)
        for slots in dense.slot_mapping[:2, :72]:
            reference.scatter_rows(out[0], slots, given)
    return forget_mirrors(case), dense


def test_nan_is_within_no_tolerance(backend):
    blank, dense = one_nan_in_every_row()
    for tolerances in ((40.0, 0.0), (0.0, 0.2)):
        got = check(backend, blank, dense, *tolerances)
        assert got.round.own_length[:2].tolist() == [64, 64]


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
@settings(max_examples=30, deadline=None)
@given(
    **drawn_rounds.ARGUMENTS,
    in_layout=st.sampled_from(testing.LAYOUTS),
    atol=st.sampled_from([0.0, 0.01]),
    rtol=st.sampled_from([0.0, 0.01]),
)
def test_random_quantized_rounds(fast_backend, dtype, seed, in_layout, atol, rtol, **options):
    case = drawn_rounds.drawn_round(seed, dtype=dtype, room_for_all=True, rows=0, **options)
    dense = restored(case, seed, layout=in_layout)
    for agent, length in enumerate(case.length.tolist()):
        alter(dense, agent, range(agent, length, 7), layer=agent % len(dense.k))
    check(fast_backend, forget_mirrors(case), dense, atol, rtol)
