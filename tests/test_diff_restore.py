"""`diff_restore` against the reference, bit for bit, untouched memory included."""

from __future__ import annotations

from dataclasses import replace

import drawn_rounds
import e4m3
import pytest
import ties
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance import testing
from tokendance.device.rounds import RoundTensors
from tokendance.testing import reference

OPERATOR = "diff_restore"
PLAIN = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*PLAIN, *testing.QUANTIZED]
HEAD_DIMS = drawn_rounds.HEAD_DIMS
pytestmark = pytest.mark.usefixtures("one_thread")


def restored(module, case, dense):
    """Runs the operator (or the reference) on these very tensors."""
    tables = (case.cos, case.sin, case.interleaved)
    round = (case.round,) if module is reference else (case.round.buffer, case.extents)
    module.diff_restore(
        *(case.k_pool, case.v_pool, *tables, *round, dense.slot_mapping, dense.k, dense.v),
        *(case.k_scale, case.v_scale),
    )


def expectation(case, dense):
    """The dense rows that the reference makes."""
    expected = dense.copy()
    restored(reference, case, expected)
    return expected


def check(backend, case, dense, expected=None, any_nan=False):
    """Compares all of every storage with the reference's; returns the reference's dense rows.

    ``any_nan``: a NaN that is written may have any bits.
    """
    expected = expected or expectation(case, dense)
    mine, actual = case.copy(backend.device), dense.copy(backend.device)
    restored(backend, mine, actual)
    for got, want in zip(actual.k + actual.v, expected.k + expected.v, strict=True):
        testing.assert_same_storage(got, want, "out", any_nan)
    for name, got, want in (
        *(("k_pool", *pair) for pair in zip(mine.k_pool, case.k_pool, strict=True)),
        *(("v_pool", *pair) for pair in zip(mine.v_pool, case.v_pool, strict=True)),
        ("round", mine.round.buffer, case.round.buffer),
    ):
        testing.assert_same_storage(got, want, name)
    return expected


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_comes_back(backend, dtype, head_dim, interleaved):
    case = testing.random_round(
        head_dim, head_dim=head_dim, dtype=dtype, interleaved=interleaved, whole_uses=True
    )
    expected = check(backend, case, testing.dense_cache(case, 1))
    for agent, length in enumerate(case.length.tolist()):
        slots = testing.dense_cache(case, 1).slot_mapping[agent, :length]
        for rows in expected.k + expected.v:
            stored = reference.gather_rows(rows, slots).float()
            assert (stored.isfinite() & (stored != testing.poison(dtype))).all()


@pytest.mark.parametrize("kind", testing.EDGE_CASES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_edge_cases(backend, kind, block_size):
    case = testing.random_round(
        block_size, block_size=block_size, dtype=torch.bfloat16, **testing.EDGE_CASES[kind]
    )
    check(backend, case, testing.dense_cache(case, 2, page_size=8))


@pytest.mark.parametrize("seed", range(3))
def test_rows_before_position_0_and_rows_that_are_nobodys(backend, seed):
    case = testing.random_round(seed, cut=True, holes=True, private_length=4, block_size=8)
    check(backend, case, testing.dense_cache(case, seed))


@pytest.mark.parametrize("page_size", [None, 16], ids=["rows", "pages"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides(backend, layout, page_size):
    case = testing.random_round(4, layout=layout, dtype=torch.float16, num_layers=2)
    for out_layout in testing.LAYOUTS[:: 1 if backend.name == "cpu" else 3]:
        dense = testing.dense_cache(case, 5, page_size=page_size, layout=out_layout)
        check(backend, case, dense)


@pytest.mark.parametrize("rotary_dim", [0, 2, 34, 64])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
def test_partial_rotation(backend, rotary_dim, interleaved):
    case = testing.random_round(
        6, head_dim=96, rotary_dim=rotary_dim, interleaved=interleaved, dtype=torch.bfloat16
    )
    check(backend, case, testing.dense_cache(case, 6))


@pytest.mark.parametrize("skip", [0.3, 1.0])
def test_negative_slots_are_skipped(backend, skip):
    case = testing.random_round(7, agents=4)
    expected = check(backend, case, testing.dense_cache(case, 7, skip=skip))
    assert (skip == 1.0) == bool(expected.k[0].isnan().all())


@pytest.mark.parametrize("fewer", [1, 20, 1000])
def test_positions_beyond_the_slot_mapping_are_skipped(backend, fewer):
    case = testing.random_round(8, agents=3, masters=(30, 20), whole_uses=True)
    dense = testing.dense_cache(case, 8, spare_columns=0)
    columns = max(0, dense.slot_mapping.shape[1] - fewer)
    cut = testing.DenseCache(dense.k, dense.v, dense.slot_mapping[:, :columns])
    check(backend, case, cut)


def test_many_layers_share_one_launch(backend):
    case = testing.random_round(9, agents=2, masters=(19,), num_layers=11, num_kv_heads=1)
    check(backend, case, testing.dense_cache(case, 9))


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_numbers_of_heads(backend, heads):
    case = testing.random_round(
        10, agents=2, masters=(19,), num_q_heads=heads, num_kv_heads=heads, dtype=torch.float16
    )
    check(backend, case, testing.dense_cache(case, 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_agent_that_made_a_master_gets_its_bits_back(backend, dtype):
    """Shift 0 and no override: every bit pattern of the Master arrives, NaN included."""
    case = testing.random_round(
        11, agents=1, masters=(40,), masks="none", whole_uses=True, private_length=0, dtype=dtype
    )
    case.round.use_shift[0] = 0
    bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]
    info, generator = torch.iinfo(bits), torch.Generator().manual_seed(11)
    shape = case.k_pool[0].shape
    pattern = torch.randint(info.min, info.max + 1, shape, generator=generator).to(bits)
    case.k_pool[0].copy_(pattern.view(dtype))
    dense = testing.dense_cache(case, 11)
    expected = check(backend, case, dense)
    pages = case.round.master_pages[:3].long()
    rows = case.k_pool[0][pages].flatten(0, 1)[:40]
    testing.assert_same_bits(reference.gather_rows(expected.k[0], dense.slot_mapping[0, :40]), rows)


def own_rows_beyond_the_last(out_dtype=None, **options):
    """A round whose entries for own rows that no agent has name pages and positions, dense rows."""
    case = testing.random_round(
        18, agents=3, masters=(20,), private_length=5, slack=False, **options
    )
    filled, size = case.filled, case.filled.block_size
    capacity = replace(filled, master_pages=filled.master_pages + 1, own_pages=filled.own_pages + 2)
    case = replace(case, round=RoundTensors.from_arrays(case.arrays, filled, capacity))
    dense = testing.dense_cache(case, 1, dtype=out_dtype)
    round = case.round
    for agent, length in enumerate(round.own_length[: filled.agents].tolist()):
        first, end = (round.own_page_indptr[agent : agent + 2] * size).tolist()
        round.own_position[first + length : end] = 0
    round.own_pages[filled.own_pages :] = 0
    round.own_position[filled.own_pages * size :] = 0
    ranges, _ = round.extents.offsets()
    round.buffer[ranges["own_length"][0] - 1] = 1000  # as if an agent stood before the first
    round.buffer[ranges["own_page_indptr"][0] - 1] = 0
    return case, dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_that_no_agent_has_are_not_read(backend, dtype):
    check(backend, *own_rows_beyond_the_last(dtype=dtype))


def halfway_round(dtype, out_dtype=None, **options):
    case = testing.random_round(
        17, agents=2, masters=(19,), whole_uses=True, table_slack=9, dtype=dtype, **options
    )
    for pool in case.k_pool + case.v_pool:
        ties.fill_odd_even(pool)
    ties.set_angles(case.cos, case.sin, out_dtype or dtype)
    return replace(case, k_scale=None, v_scale=None)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("dtype", [*PLAIN, torch.float8_e4m3fn], ids=str)
def test_halfway_values_go_to_the_even_neighbour(backend, dtype, interleaved):
    case = halfway_round(dtype, interleaved=interleaved)
    assert (case.round.use_shift[: case.filled.uses] != 0).any()
    check(backend, case, testing.dense_cache(case, 12))


@settings(max_examples=50, deadline=None)
@given(
    **drawn_rounds.ARGUMENTS,
    **drawn_rounds.LENGTHS,
    dtype=st.sampled_from(PLAIN),
    out_layout=st.sampled_from(testing.LAYOUTS),
    page_size=st.sampled_from([None, 1, 16, 256]),
    start=st.sampled_from([0, 0, 2000]),
    cut=st.booleans(),
    holes=st.booleans(),
)
def test_random_rounds(fast_backend, seed, out_layout, page_size, **options):
    case = drawn_rounds.drawn_round(seed, **options)
    dense = testing.dense_cache(case, seed, page_size=page_size, layout=out_layout, skip=0.05)
    check(fast_backend, case, dense)


# Quantized pools --------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("plain", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_quantized_pools_are_read_out(backend, dtype, plain, head_dim, interleaved):
    case = testing.random_round(
        head_dim, head_dim=head_dim, dtype=dtype, interleaved=interleaved, num_layers=2
    )
    check(backend, case, testing.dense_cache(case, 1, dtype=plain))
    bare = replace(case, k_scale=None, v_scale=None)
    check(backend, bare, testing.dense_cache(case, 1, dtype=plain, page_size=None))


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_scales_between_quantized_tensors_cancel(backend, dtype):
    case = testing.random_round(14, dtype=dtype, num_layers=2)
    dense = testing.dense_cache(case, 3)
    expected = check(backend, case, dense)
    bare = replace(case, k_scale=None, v_scale=None)
    check(backend, bare, dense, expected)


def every_code_rounds(out_dtype, **options):
    """All the elements; and read out with scales, or made infinite by the angles."""
    yield e4m3.round_of(e4m3.every_code(), **options)
    rows, scale = e4m3.scaled_codes(out_dtype)
    case = e4m3.round_of(rows, **options)
    if out_dtype == e4m3.E4M3:
        e4m3.make_infinite(case.cos, case.sin)
    yield replace(case, k_scale=scale[None], v_scale=scale[None])


@pytest.mark.parametrize("out_dtype", [e4m3.E4M3, *PLAIN], ids=str)
def test_every_element_in_every_lane(backend, out_dtype):
    for case in every_code_rounds(out_dtype):
        dense = testing.dense_cache(case, 1, dtype=out_dtype)
        check(backend, case, dense, any_nan=out_dtype != e4m3.E4M3)


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
@settings(max_examples=30, deadline=None)
@given(
    **drawn_rounds.ARGUMENTS,
    out_layout=st.sampled_from(testing.LAYOUTS),
    out_dtype=st.sampled_from([*PLAIN, None]),
    cut=st.booleans(),
)
def test_random_quantized_rounds(fast_backend, dtype, seed, out_layout, out_dtype, **options):
    case = drawn_rounds.drawn_round(seed, dtype=dtype, **options)
    dense = testing.dense_cache(case, seed, layout=out_layout, skip=0.05, dtype=out_dtype)
    check(fast_backend, case, dense)
