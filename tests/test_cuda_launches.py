"""What the CUDA launches do that cases of the operators' own tests are too small for.

Several agents and layers in a block, and with them every stage of a pipeline, come with large
rounds only. Here a small round has the capacity of a large one: the plan is the large round's, and
blocks beyond its content have nothing to do.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_diff_encode
import test_diff_restore
import torch
from ptx_backend import PtxBackend

from tokendance import reference, testing
from tokendance.rounds import RoundTensors

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or ""),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
all_kernels = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"]),
    pytest.mark.parametrize("layout", ["separate", "unaligned"]),
]


def for_all_kernels(test):
    for mark in all_kernels:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def ptx():
    return PtxBackend()


def with_capacity(case, **capacity):
    """The same round in a buffer with room for more."""
    extents = replace(case.round.extents, **capacity)
    return replace(case, round=RoundTensors.from_arrays(case.arrays, case.filled, extents))


@for_all_kernels
def test_restore_with_agents_and_layers_in_a_block(ptx, dtype, interleaved, layout):
    case = testing.random_round(
        1,
        agents=5,
        masters=(20, 16),
        whole_uses=True,
        num_layers=5,
        dtype=dtype,
        interleaved=interleaved,
        layout=layout,
    )
    case = with_capacity(case, own_pages=600)
    test_diff_restore.check(ptx, case, testing.dense_cache(case, 1, layout=layout))
    tile = ptx.launched.launches[0].tile
    assert (tile.agents, tile.layers) == (case.round.extents.agents, 5)


@for_all_kernels
def test_encode_with_agents_in_a_tile(ptx, dtype, interleaved, layout):
    case = testing.random_round(
        2,
        agents=6,
        masters=(20, 16),
        num_layers=3,
        dtype=dtype,
        interleaved=interleaved,
        layout=layout,
        room_for_all=True,
    )
    dense = test_diff_encode.restored(case)
    for agent, length in enumerate(case.length.tolist()):
        test_diff_encode.alter(dense, agent, range(agent, length, 5), layer=agent % 3)
    case = with_capacity(case, master_pages=600)
    test_diff_encode.check(ptx, test_diff_encode.forget_mirrors(case), dense)
    assert ptx.launched.launches[0].tile.agents == case.round.extents.agents


def test_more_agents_than_a_tile_has(ptx):
    """The last tile is not full, and the last blocks have fewer layers."""
    case = testing.random_round(
        3,
        agents=35,
        masters=(12,),
        private_length=3,
        num_layers=3,
        num_kv_heads=1,
        room_for_all=True,
        slack=False,
        dtype=torch.bfloat16,
    )
    dense = test_diff_encode.restored(case, spare_columns=256 * 12)
    case = with_capacity(case, master_pages=120)
    test_diff_restore.check(ptx, case, testing.dense_cache(case, 3))
    restore = ptx.launched.launches[0].tile
    case = with_capacity(case, master_pages=300)
    test_diff_encode.check(ptx, test_diff_encode.forget_mirrors(case), dense)
    compare, compact = (launch.tile for launch in ptx.launched.launches)
    assert (restore.agents, compare.agents) == (12, 12)
    assert (restore.layers, compact.layers) == (2, 2)


@pytest.mark.parametrize("heads", [5, 32, 40])
def test_rotation_of_rows_that_fill_a_block_or_take_several(ptx, heads):
    rows = torch.randn(9, heads, 128).half()
    tables = testing.random_round(0, agents=1, masters=(30,), whole_uses=True, head_dim=128)
    to = torch.arange(9, dtype=torch.int32)
    outputs = [torch.zeros_like(rows), torch.zeros_like(rows)]
    for module, out in zip((ptx, reference), outputs, strict=True):
        module.rope_rotate_out(
            rows, None, to.long().flip(0), None, to, tables.cos, tables.sin, False, 1.0, out
        )
    testing.assert_same_bits(*outputs)


# Offsets beyond 32 bits ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    return testing.random_round(
        4, agents=2, masters=(20,), whole_uses=True, room_for_all=True, dtype=torch.bfloat16
    )


def test_rotation_of_pages_that_lie_far_apart(ptx, case):
    rows = torch.randn(3, 8, 2, 64).bfloat16()
    near, far = torch.zeros_like(rows), testing.far_apart(torch.zeros_like(rows))
    row_in, row_out = torch.tensor([23, 0, 9]), torch.tensor([16, 23, 7])
    to = torch.tensor([3, 0, 21], dtype=torch.int32)
    for module, x, out in ((reference, rows, near), (ptx, testing.far_apart(rows), far)):
        module.rope_rotate_out(x, row_in, row_out, None, to, case.cos, case.sin, False, 1.0, out)
    testing.assert_same_bits(far, near)


def test_deviation_of_pages_that_lie_far_apart(ptx, case):
    rows = torch.randn(3, 8, 2, 64).bfloat16()
    position = torch.tensor([4, 2], dtype=torch.int32)
    arguments = (torch.tensor([[22, 1]]), None), (torch.tensor([17, 20]), position)
    tables = (case.cos, case.sin, False, 1.0)
    got, far = torch.empty(2), testing.far_apart(rows)
    ptx.key_deviation_out(far, *arguments[0], far, *arguments[1], *tables, got)
    want = reference.key_deviation(rows, *arguments[0], rows, *arguments[1], *tables)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0.0)


def with_far_pool(case):
    """The same round whose pool's pages lie far apart."""
    return replace(
        case,
        round=RoundTensors(case.round.buffer.clone(), case.round.extents),
        k_pool=[testing.far_apart(pages) for pages in case.k_pool],
        v_pool=[testing.far_apart(pages) for pages in case.v_pool],
    )


def with_far_pages(dense):
    return testing.DenseCache(
        [testing.far_apart(rows) for rows in dense.k],
        [testing.far_apart(rows) for rows in dense.v],
        dense.slot_mapping,
    )


def test_restore_from_and_to_pages_that_lie_far_apart(ptx, case):
    near = testing.dense_cache(case, 5)
    far = with_far_pages(near)
    test_diff_restore.restored(reference, case, near)
    test_diff_restore.restored(ptx, with_far_pool(case), far)
    for got, want in zip(far.k + far.v, near.k + near.v, strict=True):
        testing.assert_same_bits(got, want)


def test_encode_of_pages_that_lie_far_apart(ptx, case):
    dense = test_diff_encode.restored(case)
    blank = test_diff_encode.forget_mirrors(case)
    near, far = blank.copy(), with_far_pool(blank)
    test_diff_encode.encoded(reference, near, dense)
    test_diff_encode.encoded(ptx, far, with_far_pages(dense))
    testing.assert_same_bits(far.round.buffer, near.round.buffer)
    for got, want in zip(far.k_pool + far.v_pool, near.k_pool + near.v_pool, strict=True):
        testing.assert_same_bits(got, want)


# Other architectures -------------------------------------------------------------------------


def test_sm_90(case):
    """nvcc's PTX for another architecture does the same; a subset, for the source is one."""
    newer = PtxBackend("90")
    dense = test_diff_encode.restored(case)
    test_diff_restore.check(newer, case, testing.dense_cache(case, 5))
    test_diff_encode.check(newer, test_diff_encode.forget_mirrors(case), dense)
    keys = case.k_pool[0].nan_to_num(0.5)
    rows, to = torch.tensor([[3, 40], [5, 1]]), torch.tensor([[0, 7], [9, 2]], dtype=torch.int32)
    tables = (case.cos, case.sin, False, 1.0)
    outputs = [torch.zeros_like(keys), torch.zeros_like(keys)]
    for module, out in zip((newer, reference), outputs, strict=True):
        module.rope_rotate_out(keys, rows[0], rows, to[0], to, *tables, out)
    testing.assert_same_bits(*outputs)
    got = torch.empty(2)
    newer.key_deviation_out(keys, rows, to, keys, rows[0], to[0], *tables, got)
    want = reference.key_deviation(keys, rows, to, keys, rows[0], to[0], *tables)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0.0)
    partial, lse = torch.randn(3, 4, 2, 64), torch.randn(3, 4, 2)
    out, merged_lse = torch.empty(4, 2, 64), torch.empty(4, 2)
    newer.merge_states_out(partial, lse, None, out, merged_lse)
    for got, want in zip((out, merged_lse), reference.merge_states(partial, lse), strict=True):
        testing.assert_close(got, want, torch.float32)
