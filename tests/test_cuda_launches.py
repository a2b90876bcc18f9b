"""What the CUDA launches do that cases of the operators' own tests are too small for.

Several agents and layers in a block, and with them every stage of a pipeline, come with large
rounds only. Here a small round has the capacity of a large one: the plan is the large round's, and
blocks beyond its content have nothing to do.
"""

from __future__ import annotations

from dataclasses import replace

import ptxrun
import pytest
import test_diff_encode
import test_diff_restore
import test_key_deviation
import test_merge_states
import test_rope_rotate
import torch
from ptx_backend import CUDA_SOURCES, PtxBackend, ptx_of_source

from tokendance import testing
from tokendance.device.rounds import RoundTensors
from tokendance.testing import reference
from tools import paths

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or ""),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAST = 2**31 - 1
for_all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_kernels = [
    for_all_dtypes,
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
    """The round as it is now, which need not be how it was packed, with room for more."""
    arrays = {
        name: getattr(case.round, name)[: len(array)].numpy() for name, array in case.arrays.items()
    }
    extents = replace(case.round.extents, **capacity)
    return replace(case, round=RoundTensors.from_arrays(arrays, case.filled, extents))


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


def encode_of_many_agents(**options):
    """More rows than a block has threads, and twice as many agents as it has warps: a tile full."""
    case = testing.random_round(
        5, agents=16, masters=(35, 9), private_length=2, block_size=32, num_kv_heads=1,
        head_dim=128, whole_uses=True, room_for_all=True, slack=False, **options,
    )  # fmt: skip
    dense = test_diff_encode.restored(case)
    for agent, length in enumerate(case.length.tolist()):
        test_diff_encode.alter(dense, agent, range(agent, length, 5))
    return with_capacity(case, master_pages=600), dense


@for_all_dtypes
def test_encode_of_many_agents_in_a_tile(ptx, dtype):
    case, dense = encode_of_many_agents(dtype=dtype)
    test_diff_encode.check(ptx, test_diff_encode.forget_mirrors(case), dense)
    assert ptx.launched.launches[0].tile.agents == 16


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


# Indices that are not legal --------------------------------------------------------------------


def moves_with_bad_indices(**options):
    """Moves of which some have no row or no angles, and the same moves without those."""
    moves = test_rope_rotate.random_moves(1, rows=9, destinations=2, **options)
    rows_in, rows_out = (rows.shape[0] * rows.shape[1] for rows in (moves.x, moves.out))
    moves.row_in[0], moves.row_in[3] = -1, rows_in
    moves.row_out[4, 1] = rows_out
    limit = moves.cos.shape[0]
    moves.position_from[5:7] = torch.tensor([0, limit])
    moves.position_to[5, 0], moves.position_to[6, 1] = limit, 0
    moves.position_to[5, 1], moves.position_to[6, 0] = 1, limit + 1
    # Shifts that 32 bits take for 1 and -1; of the same rows others stay where they are.
    moves.position_from[7], moves.position_to[7] = LAST, torch.tensor([-LAST - 1, LAST])
    moves.position_from[8], moves.position_to[8] = -LAST - 1, torch.tensor([LAST, -LAST - 1])
    skipped = moves.copy()
    skipped.row_in[0] = skipped.row_in[3] = 0
    skipped.row_out[0] = skipped.row_out[3] = -1
    skipped.row_out[4, 1] = skipped.row_out[5, 0] = skipped.row_out[6, 1] = -1
    skipped.row_out[7:, 0] = -1
    skipped.position_from[7:] = skipped.position_to[7:] = 0
    return moves, test_rope_rotate.expectation(skipped)


@for_all_dtypes
def test_rotation_skips_indices_out_of_range(ptx, dtype):
    """A host that checks contents refuses them; a kernel reads and writes nothing for them."""
    moves, expected = moves_with_bad_indices(dtype=dtype, layout="padded", out_layout="padded")
    test_rope_rotate.check(ptx, moves, expected)


def keys_with_bad_indices(dtype, interleaved=False, layout="padded"):
    """Keys of which some are not there or have no angles, and the deviation of the others.

    What the first two agents lack the next two lack as well: a kernel asks for their keys by
    instructions of their own. The fifth has all but one."""
    arguments = test_key_deviation.random_keys(
        1, agents=5, tokens=9, dtype=dtype, interleaved=interleaved, lacking=0.0, layout=layout,
        cached_layout=layout,
    )  # fmt: skip
    fresh, fresh_row, fresh_position, cached, cached_row, cached_position, cos = arguments[:7]
    for rows, index in ((fresh, fresh_row[1]), (cached, cached_row)):
        last = rows.shape[0] * rows.shape[1] - 1  # the first and the last row are there
        for token, row in ((7, 0), (8, last)):
            rows[row // rows.shape[1], row % rows.shape[1]] = 0.5
            index[token] = row
    limit = cos.shape[0]
    fresh_row[:, 0] = fresh_row[:, 1]
    cached_position[1:] = torch.tensor([3, 5, 0, limit, limit - 1, 8, 0, 1])
    fresh_position[:4, 3:6] = torch.tensor([limit, 0, 0])
    fresh_position[4, 3:6] = torch.tensor([1, limit, 3])
    fresh_position[:, 7] = limit - 1
    known = [item.clone() if isinstance(item, torch.Tensor) else item for item in arguments]
    # A shift that 32 bits take for -1.
    cached_position[0], fresh_position[:4, 0], fresh_position[4, 0] = LAST, -LAST - 1, LAST
    known[1][:4, 0], known[2][:, 0] = -1, known[5][0]
    known[4][1:3] = 0  # tokens without a cached key have no deviation
    known[1][:, 1:3] = -1
    cached_row[1], cached_row[2] = -1, cached.shape[0] * cached.shape[1]
    known[1][:4, 3:5] = known[1][:, 6] = known[1][0, 7] = -1
    beyond = fresh.shape[0] * fresh.shape[1]
    fresh_row[:, 6] = torch.tensor([-1, beyond, beyond, beyond, beyond])
    fresh_row[0, 7] = beyond
    expected = test_key_deviation.expectation(known)
    return arguments, expected


@for_all_dtypes
def test_deviation_skips_indices_out_of_range(ptx, dtype):
    test_key_deviation.check(ptx, *keys_with_bad_indices(dtype))


def restore_with_bad_indices(layout="padded", out_dtype=None, **options):
    """A round in which a page, a shift, slots and positions are not there, dense rows, and what is
    restored of the rest."""
    case = testing.random_round(
        15, agents=3, masters=(20, 37), whole_uses=True, masks="none", slack=False, layout=layout,
        **options,
    )  # fmt: skip
    dense = testing.dense_cache(case, 1, layout=layout, dtype=out_dtype)
    known, known_dense = case.copy(), dense.copy()
    size = case.filled.block_size
    round, skipped = case.round, known_dense.slot_mapping
    for use in range(case.filled.uses):
        agent, master = (int(f[use]) for f in (round.use_agent, round.use_master))
        delta = int(round.use_delta[use])
        if master == 1:  # two of its pages do not exist
            skipped[agent, delta + size : delta + 37] = -1
    second = int(round.master_page_indptr[1]) + 1
    round.master_pages[second : second + 2] = torch.tensor([case.k_pool[0].shape[0], -1])
    limit = case.cos.shape[0]
    for use, shift in ((0, -limit), (2, limit), (4, -(2**31))):
        delta, length = int(round.use_delta[use]), int(round.use_length[use])
        round.use_shift[use] = shift
        skipped[int(round.use_agent[use]), delta : delta + length] = -1
    used = known.round.own_length.nonzero().flatten().tolist()
    for agent, illegal in zip(used, (-1, skipped.shape[1]), strict=False):
        first = int(round.own_page_indptr[agent]) * size
        skipped[agent, int(round.own_position[first])] = -1
        round.own_position[first] = illegal
    last = int(round.use_agent[case.filled.uses - 1])
    position = int(round.use_delta[case.filled.uses - 1])
    rows = dense.k[0].shape[0] * dense.k[0].shape[1]
    dense.slot_mapping[last, position : position + 2] = torch.tensor([-1, rows])
    skipped[last, position : position + 2] = -1
    return case, dense, test_diff_restore.expectation(known, known_dense)


@for_all_dtypes
def test_restore_skips_indices_out_of_range(ptx, dtype):
    test_diff_restore.check(ptx, *restore_with_bad_indices(dtype=dtype))


def clear_last_page(dense):
    """Moves its rows to slots that nobody has; the number of slots before it."""
    slots = dense.slot_mapping
    first = (dense.k[0].shape[0] - 1) * dense.k[0].shape[1]
    moved = (slots >= first) & (slots < first + dense.k[0].shape[1])
    free = sorted(set(range(first)) - set(slots.flatten().tolist()))
    to = torch.tensor(free[: int(moved.sum())])
    for rows in dense.k + dense.v:
        reference.scatter_rows(rows, to, reference.gather_rows(rows, slots[moved]))
    slots[moved] = to
    return first


def encode_with_bad_indices(layout="padded", **options):
    """A round in which no row is its Master's: some have no slot or no page, some uses have no
    angles, one begins before position 0, a Master lacks pages. And what is encoded of it.

    Behind the last slot is a row that equals its Master's: who reads it would not store it."""
    module = test_diff_encode
    case = testing.random_round(
        22, agents=3, masters=(20, 37), whole_uses=True, masks="none", slack=False, table_slack=5,
        room_for_all=True, layout=layout, **options,
    )  # fmt: skip
    case.round.use_shift[:2] = 0
    dense = module.restored(case, layout=layout)
    size, num_rows = case.filled.block_size, clear_last_page(dense)
    for tensor in dense.k + dense.v:
        tensor[-1, 0] = reference.gather_rows(tensor, dense.slot_mapping[2, 20:21])[0]
    for agent, length in enumerate(case.length.tolist()):
        kept = set()  # rows that are their Master's, as long as these do not move
        for use in range(2):
            if int(case.round.use_agent[use]) == agent:
                begin = int(case.round.use_delta[use])
                kept |= set(range(begin, begin + int(case.round.use_length[use])))
        module.alter(dense, agent, [at for at in range(length) if at not in kept])
    blank = module.forget_mirrors(case)
    blank.round.use_shift[:2] = 1
    expected = module.expectation(blank, dense)
    limit, page = case.cos.shape[0], int(case.round.master_page_indptr[1])
    for round in (blank.round, expected.round):
        round.use_shift[:3] = torch.tensor([limit, -limit, -(2**31)])
        round.master_pages[page : page + 2] = torch.tensor([-1, case.k_pool[0].shape[0]])
    first = case.round.use_delta.tolist().index(0)
    for round in (blank.round, expected.round):
        round.use_delta[first] = -3
    expected.round.use_masks[int(case.round.use_page_indptr[first])] &= ~7
    dense = replace(dense, k=[rows[:-1] for rows in dense.k], v=[rows[:-1] for rows in dense.v])
    for agent, position, slot in ((2, 6, -1), (1, 9, num_rows), (2, 20, num_rows)):
        dense.slot_mapping[agent, position] = slot
        page = int(case.round.own_pages[int(case.round.own_page_indptr[agent]) + position // size])
        for pool in expected.k_pool + expected.v_pool:
            pool[page, position % size] = torch.nan
    for agent, illegal in ((1, -1), (2, case.k_pool[0].shape[0])):
        index = int(case.round.own_page_indptr[agent]) + 2
        for pool in expected.k_pool + expected.v_pool:
            pool[int(case.round.own_pages[index])] = torch.nan
        for round in (blank.round, expected.round):
            round.own_pages[index] = illegal
    return blank, dense, expected


@for_all_dtypes
def test_encode_skips_indices_out_of_range(ptx, dtype):
    blank, dense, expected = encode_with_bad_indices(dtype=dtype)
    test_diff_encode.check(ptx, blank, dense, expected=expected)


def check_in_place(backend, dtype, wide, interleaved=False):
    """More rows than the interpreter runs together: a block that moved a row of another would move
    what that one has moved already."""
    rows = 340
    x = torch.randn(rows, 5, 80).to(dtype)
    x = x if wide else test_merge_states.unaligned(x)
    tables = testing.random_round(0, agents=1, masters=(30,), whole_uses=True, head_dim=80)
    to = torch.arange(rows, dtype=torch.int32) % 30
    results = []
    for module, device in ((backend, backend.device), (reference, "cpu")):
        copies = testing.StorageCopies(device)
        rotated = copies(x)
        arguments = copies(to), copies(tables.cos), copies(tables.sin)
        module.rope_rotate_(rotated, None, None, *arguments, interleaved, 1.0)
        results.append(rotated)
    testing.assert_same_bits(*results)


@for_all_dtypes
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_rotation_in_place_of_many_rows(ptx, dtype, wide):
    check_in_place(ptx, dtype=dtype, wide=wide)


# Offsets beyond 32 bits ----------------------------------------------------------------------

FAR = 1_100_000_000  # 16-bit elements between pages, of which the third lies beyond 2^32 bytes
far_rows = [
    pytest.param(torch.bfloat16, False, FAR, id="bf16"),
    pytest.param(torch.float16, True, FAR, id="fp16_interleaved"),
    pytest.param(torch.float32, False, FAR, id="fp32"),
    pytest.param(torch.bfloat16, True, FAR + 1, id="bf16_interleaved_narrow"),
    pytest.param(torch.float32, False, FAR + 1, id="fp32_narrow"),
]
far_quantized_rows = [
    pytest.param(torch.float8_e4m3fn, False, 2 * FAR, id="e4m3"),
    pytest.param(torch.float8_e4m3fn, True, 2 * FAR + 1, id="e4m3_interleaved_narrow"),
]
for_far_keys = pytest.mark.parametrize(("dtype", "interleaved", "stride"), far_rows)
for_far_rows = pytest.mark.parametrize(
    ("dtype", "interleaved", "stride"), far_rows + far_quantized_rows
)


def small_round(dtype, interleaved=False):
    return testing.random_round(
        4, agents=2, masters=(20,), whole_uses=True, room_for_all=True, dtype=dtype,
        interleaved=interleaved,
    )  # fmt: skip


@for_far_rows
def test_rotation_of_pages_that_lie_far_apart(ptx, dtype, interleaved, stride):
    tables = small_round(dtype)
    generator = torch.Generator().manual_seed(6)
    rows = test_rope_rotate.random_rows((24, 2, 64), dtype, generator).view(3, 8, 2, 64)
    near = torch.zeros_like(rows)
    far, out = (testing.far_apart(pages, stride) for pages in (rows, near))
    row_in, row_out = torch.tensor([23, 0, 9]), torch.tensor([16, 23, 7])
    to = torch.tensor([3, 0, 21], dtype=torch.int32)
    arguments = (row_in, row_out, None, to, tables.cos, tables.sin, interleaved, 1.0)
    reference.rope_rotate_out(rows, *arguments, near)
    ptx.rope_rotate_out(far, *arguments, out)
    testing.assert_same_bits(out, near)


@for_far_keys
def test_deviation_of_pages_that_lie_far_apart(ptx, dtype, interleaved, stride):
    case = small_round(dtype)
    rows = torch.randn(3, 8, 2, 64, generator=torch.Generator().manual_seed(7)).to(dtype)
    position = torch.tensor([4, 2], dtype=torch.int32)
    arguments = (torch.tensor([[22, 1]]), None), (torch.tensor([17, 20]), position)
    tables = (case.cos, case.sin, interleaved, 1.0)
    got, far = torch.empty(2), testing.far_apart(rows, stride)
    ptx.key_deviation_out(far, *arguments[0], far, *arguments[1], *tables, got)
    want = reference.key_deviation(rows, *arguments[0], rows, *arguments[1], *tables)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0.0)


def with_far_pool(case, stride):
    """The same round whose pool's pages lie far apart."""
    return replace(
        case,
        round=RoundTensors(case.round.buffer.clone(), case.round.extents),
        k_pool=[testing.far_apart(pages, stride) for pages in case.k_pool],
        v_pool=[testing.far_apart(pages, stride) for pages in case.v_pool],
    )


def with_far_pages(dense, stride):
    return testing.DenseCache(
        [testing.far_apart(rows, stride) for rows in dense.k],
        [testing.far_apart(rows, stride) for rows in dense.v],
        dense.slot_mapping,
    )


@for_far_rows
def test_restore_from_and_to_pages_that_lie_far_apart(ptx, dtype, interleaved, stride):
    case = small_round(dtype, interleaved)
    near = testing.dense_cache(case, 5)
    far = with_far_pages(near, stride)
    test_diff_restore.restored(reference, case, near)
    test_diff_restore.restored(ptx, with_far_pool(case, stride), far)
    for got, want in zip(far.k + far.v, near.k + near.v, strict=True):
        testing.assert_same_bits(got, want)


@for_far_rows
def test_encode_of_pages_that_lie_far_apart(ptx, dtype, interleaved, stride):
    case = small_round(dtype, interleaved)
    dense = test_diff_encode.restored(case)
    blank = test_diff_encode.forget_mirrors(case)
    near, far = blank.copy(), with_far_pool(blank, stride)
    test_diff_encode.encoded(reference, near, dense)
    test_diff_encode.encoded(ptx, far, with_far_pages(dense, stride))
    testing.assert_same_bits(far.round.buffer, near.round.buffer)
    for got, want in zip(far.k_pool + far.v_pool, near.k_pool + near.v_pool, strict=True):
        testing.assert_same_bits(got, want)


# Other architectures -------------------------------------------------------------------------


@pytest.mark.ptx
def test_sm_90():
    """nvcc's PTX for another architecture does the same; a subset, for the source is one."""
    newer = PtxBackend("90")
    case = small_round(torch.bfloat16)
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


@pytest.mark.ptx
@pytest.mark.parametrize("counts", [[5, 3], [0, 3], [70]])
def test_a_merge_that_begins_early_waits_before_it_reads_partials(counts):
    """What it reads before is what attention does not write; what it reads then is not kept in the
    read-only cache. A row without partials waits, too."""
    merge = ptxrun.Module(ptx_of_source(CUDA_SOURCES / "collective_attention_merge.cu", "90"))
    newer = PtxBackend("90", modules={"collective_attention": merge}, follow=0)
    paths.merge_partials(newer, counts)
    name = newer.launched.launches[0].name.decode()
    instructions = [merge.instructions(name)[position] for position in newer.stats[0].path]
    [wait] = [i for i, each in enumerate(instructions) if each.opcode == "griddepcontrol"]
    loads = [i for i, each in enumerate(instructions) if each.text.startswith("ld.global")]
    read_only = {i for i in loads if "nc" in instructions[i].modifiers}
    assert read_only >= {i for i in loads if i < wait}
    vectors = {i for i in loads if "v4" in instructions[i].modifiers}
    assert bool(vectors) == (counts[0] > 0)
    assert not vectors & read_only


@pytest.mark.ptx
def test_quantized_rows_on_sm_90():
    """Where there are instructions that convert."""
    newer = PtxBackend("90")
    e4m3 = torch.float8_e4m3fn
    for interleaved, layout in ((False, "padded"), (True, "unaligned")):
        options = {"interleaved": interleaved, "layout": layout}
        test_rope_rotate.check(newer, test_rope_rotate.every_interval(torch.float32, **options))
        for dtype in (e4m3, torch.float16):
            for made in (test_rope_rotate.every_code, test_rope_rotate.scaled_codes):
                every = made(dtype, **options)
                test_rope_rotate.check(newer, every, any_nan=dtype != e4m3)
        for pair in ((e4m3, e4m3), (e4m3, torch.float16), (torch.float32, e4m3)):
            scaled = test_rope_rotate.conversion(1, *pair, out_layout=layout, **options)
            test_rope_rotate.check(newer, scaled)
        case = testing.random_round(4, agents=2, masters=(20,), room_for_all=True, dtype=e4m3)
        for dtype in (e4m3, torch.bfloat16):
            dense = testing.dense_cache(case, 5, dtype=dtype, layout=layout)
            test_diff_restore.check(newer, case, dense)
        dense = test_diff_encode.restored(case)
        blank = test_diff_encode.forget_mirrors(case)
        test_diff_encode.check(newer, blank, dense)
        test_diff_encode.check(newer, blank, dense, 0.02, 0.1)
