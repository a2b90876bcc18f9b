"""What the CUDA launches of collective_attention do beyond the operator's own tests: every kernel,
tiles and pages that those are too small for, and what is launched at all."""

from __future__ import annotations

from dataclasses import replace

import cuda_params
import illegal_rounds
import ptx_backend
import pytest
import test_collective_attention
import torch
from attention_rounds import (
    attention_round,
    beyond_the_tables_round,
    demanding_round,
    first_round,
)
from ptx_backend import PtxBackend
from test_collective_attention import check

from tokendance import testing
from tokendance.device.rounds import RoundTensors

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or ""),
]
DTYPES = test_collective_attention.DTYPES
SHORT = [torch.float16, torch.bfloat16]
E4M3 = torch.float8_e4m3fn
HEAD_DIMS = test_collective_attention.HEAD_DIMS
ALIGNED = 1 << 20


@pytest.fixture(scope="module")
def ptx():
    return PtxBackend()


# What is launched ------------------------------------------------------------------------------


def plan(head_dim=128, dtype=2, **changes):
    heads, size = 4, 16
    extents = {"rows": 24, "work": 5, "partials": 30, "block_size": size}
    extents |= changes.pop("extents", {})
    row = heads * head_dim
    members = {
        "q": ALIGNED,
        "out": ALIGNED,
        "k_pool": ALIGNED,
        "v_pool": ALIGNED,
        "workspace": ALIGNED,
        "q_row_stride": 4 * row,
        "q_head_stride": head_dim,
        "out_row_stride": 4 * row,
        "out_head_stride": head_dim,
        "k_layout": cuda_params.RowLayout(1 << 16, size * row, row, head_dim, size),
        "v_layout": cuda_params.RowLayout(1 << 16, size * row, row, head_dim, size),
        "round": cuda_params.RoundView(extents=cuda_params.Extents(**extents)),
        "num_q_heads": 4 * heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "pool_dtype": dtype,
    }
    params = cuda_params.CollectiveAttentionParams(**(members | changes))
    planned = ptx_backend.plan("collective_attention", params)
    return planned.launches[: planned.num_launches]


def names(launches):
    prefix = "tokendance_collective_attention_"
    return [launch.name.decode().removeprefix(prefix) for launch in launches]


def test_a_block_per_item_and_kv_head_and_a_merge_of_partials():
    attention, merge = plan()
    assert names([attention, merge]) == ["bf16_d128", "merge_bf16"]
    assert (list(attention.grid), list(attention.block)) == ([20, 1, 1], [128, 1, 1])
    # 24 rows of 16 heads are few: a block each, of eight groups of 32 vectors.
    assert (list(merge.grid), list(merge.block)) == ([24, 16, 1], [32, 8, 1])
    assert (attention.waits, merge.waits) == (False, True)
    # Of 20 vectors 12 groups would fit; they are doubled.
    [_, merge] = plan(num_q_heads=4, head_dim=80)
    assert (list(merge.grid), list(merge.block)) == ([24, 4, 1], [20, 8, 1])
    # No more groups than partials, and none where there are blocks enough.
    [_, merge] = plan(extents={"partials": 3})
    assert (list(merge.grid), list(merge.block)) == ([24, 8, 1], [32, 4, 2])
    [_, merge] = plan(num_q_heads=20, extents={"rows": 300})
    assert (list(merge.grid), list(merge.block)) == ([300, 3, 1], [32, 1, 8])
    assert names(plan(extents={"partials": 0})) == ["bf16_d128"]
    [merge] = plan(extents={"work": 0})
    assert (names([merge]), merge.waits) == (["merge_bf16"], False)
    assert names(plan(extents={"rows": 0})) == []


def test_the_launch_depends_on_capacities_only():
    """So that it can be captured in a CUDA graph."""
    filled = cuda_params.RoundView(
        extents=cuda_params.Extents(rows=24, work=5, partials=30, block_size=16),
        work=ALIGNED,
        row_partials=ALIGNED,
    )
    assert [bytes(x) for x in plan(round=filled)] == [bytes(x) for x in plan()]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", range(3))
def test_every_kernel_has_its_name_and_fits(dtype, head_dim):
    short = ("f32", "f16", "bf16")[dtype]
    attention, merge = plan(head_dim, dtype)
    assert names([attention, merge]) == [f"{short}_d{head_dim}", f"merge_{short}"]
    assert attention.shared_bytes <= 99 * 1024


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [1, 2])
def test_kernels_of_e4m3_pools(dtype, head_dim):
    short = ("f32", "f16", "bf16")[dtype]
    attention, merge = plan(head_dim, dtype, pool_dtype=3)
    assert names([attention, merge]) == [f"{short}_e4m3_d{head_dim}", f"merge_{short}"]
    assert attention.shared_bytes <= 99 * 1024
    [plain, _] = plan(head_dim, dtype)
    assert attention.shared_bytes < plain.shared_bytes
    odd = cuda_params.RowLayout(1 << 16, 16 * 520, 520, head_dim, 16)
    assert names(plan(head_dim, dtype, pool_dtype=3, v_layout=odd)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"k_pool": ALIGNED + 8}, []),
        ({"v_pool": ALIGNED + 8}, []),
        ({"out": ALIGNED + 8}, []),
        ({"workspace": ALIGNED + 4}, []),
        ({"out_head_stride": 129}, []),
        ({"out_row_stride": 2050}, []),
        ({"k_layout": cuda_params.RowLayout(1 << 16, 16 * 513, 513, 128, 16)}, []),
        ({"v_layout": cuda_params.RowLayout(1 << 16, 16 * 512, 512, 130, 16)}, []),
        ({"q": ALIGNED + 2}, ["bf16_d128", "merge_bf16"]),
        ({"q_head_stride": 129}, ["bf16_d128", "merge_bf16"]),
    ],
)
def test_nothing_is_launched_where_vectors_are_not_aligned(changes, expected):
    assert names(plan(**changes)) == expected


# What is computed ------------------------------------------------------------------------------


@pytest.mark.ptx
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_e4m3_pools_on_sm_90(head_dim):
    """Where there are instructions that convert."""
    case = demanding_round(
        27, head_dim=head_dim, dtype=E4M3, query_dtype=torch.bfloat16, rows=2, work="planned"
    )
    check(PtxBackend("90"), case)


@pytest.mark.parametrize(
    "beyond",
    [{"sign": 1}, {"sign": -1}, {"shift": 2**31 - 1}, {"shift": -(2**31)}],
    ids=["above", "below", "highest", "lowest"],
)
def test_rows_and_uses_beyond_the_tables_are_left_out(ptx, beyond):
    """What the CPU refuses, a device cannot say without being waited for."""
    case, damage = beyond_the_tables_round(dtype=torch.bfloat16, **beyond)
    check(ptx, case, damage=damage)


@pytest.mark.ptx
def test_nan_in_hidden_rows_of_e4m3_on_sm_90():
    """Where conversions keep NaN."""
    test_collective_attention.check_nan_in_hidden_rows(PtxBackend("90"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_items_that_the_round_does_not_have(ptx, dtype):
    case, damage = illegal_rounds.illegal_items(dtype=dtype)
    check(ptx, case, damage=damage)


@pytest.mark.parametrize("missing", [-1, 1 << 20])
def test_pages_that_the_pool_does_not_have(ptx, missing):
    """Nothing of them is seen: as if uses, and own rows, had ended before."""
    case, damage = illegal_rounds.missing_pages(missing, dtype=torch.bfloat16, layout="padded")
    check(ptx, case, damage=damage)


@pytest.mark.parametrize(("field", "value"), illegal_rounds.INDICES)
def test_indices_that_the_round_does_not_have(ptx, field, value):
    illegal_rounds.check_illegal_index(ptx, field, value, dtype=torch.bfloat16)


def test_e4m3_pages_that_lie_far_apart(ptx):
    case = attention_round(
        28, agents=2, masters=(40,), whole_uses=True, dtype=E4M3, query_dtype=torch.float16, rows=2
    )
    stride = 2_200_000_000 + 16
    far = replace(
        case,
        k_pool=[testing.far_apart(case.k_pool[0], stride)],
        v_pool=[testing.far_apart(case.v_pool[0], stride)],
    )
    outputs = [torch.full(case.q.shape, torch.nan, dtype=case.q.dtype) for _ in range(2)]
    for each, out in zip((case, far), outputs, strict=True):
        run(ptx, each, out)
    assert outputs[0][case.real_rows].isfinite().all()
    testing.assert_same_bits(outputs[0], outputs[1])


def run(ptx, case, out):
    rows, heads, head_dim = case.q.shape
    ptx.collective_attention_out(
        case.q,
        case.k_pool[0],
        case.v_pool[0],
        *(case.cos, case.sin, case.interleaved, case.round.buffer, case.extents),
        *(case.scale, 0, 0.0, None, 1.0),
        torch.empty(case.round.extents.partials * heads * (head_dim + 1)),
        out,
        torch.empty(rows, heads),
    )


@pytest.mark.parametrize(("group", "rows_per_item"), [(2, 80), (70, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_items_with_more_query_rows_than_a_tile(ptx, dtype, group, rows_per_item):
    case = attention_round(
        22,
        num_q_heads=group,
        num_kv_heads=1,
        rows=40 if group == 2 else 2,
        rows_per_item=rows_per_item,
        masters=(150, 20),
        dtype=dtype,
    )
    most = max(item[1] - item[0] for item in case.arrays["work"].tolist())
    assert most * group > 64
    check(ptx, case)


@pytest.mark.parametrize(
    ("head_dim", "heads", "ldmatrix"),
    [
        (128, 16, 8 + 4 * 8 + 4 * 8),
        (64, 16, 2 * (4 + 4 * 4 + 4 * 4)),
        (128, 32, 2 * 8 + 2 * 8 + 2 * 8),
        (64, 32, 2 * (2 * 4 + 2 * 4 + 2 * 4)),
    ],
)
def test_a_fragment_meets_all_rows_of_a_warp(ptx, head_dim, heads, ldmatrix):
    """What is read of queries, keys and values for 128 mma: of four rows with 32 heads each
    fragment of keys and values meets twice the query rows."""
    case = first_round(
        lambda case: case.filled.rows == 4, 0, agents=1, num_q_heads=heads, num_kv_heads=1,
        rows_per_item=4, masters=(150,), work="planned", head_dim=head_dim, dtype=torch.bfloat16,
    )  # fmt: skip
    assert max(item[1] - item[0] for item in case.arrays["work"].tolist()) == 4
    run(ptx, case, torch.empty_like(case.q))
    executed = ptx.stats[0].by_class
    assert executed["ldmatrix"] / executed["mma"] == ldmatrix / 128


@pytest.mark.parametrize(("dtype", "tile_rows"), [(torch.float32, 32), (torch.float16, 64)])
def test_work_that_is_read_again(ptx, dtype, tile_rows):
    """With 256 dims an item is read anew for the next query rows, of two KV heads here."""
    case = attention_round(
        24,
        num_q_heads=tile_rows + 2,
        num_kv_heads=2,
        head_dim=256,
        rows=2,
        rows_per_item=2,
        masters=(40, 20),
        dtype=dtype,
    )
    queries = [(item[1] - item[0]) * (tile_rows // 2 + 1) for item in case.arrays["work"].tolist()]
    assert len(queries) > 1
    assert max(queries) > tile_rows
    check(ptx, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sources_that_take_turns(ptx, dtype):
    """Queries turn to every Master and back; own rows of all agents share a rotation."""
    case = attention_round(
        23, masters=(70, 40, 90, 30), agents=4, rows=2, dtype=dtype, block_size=8, repeat=True
    )
    chunks = case.arrays["work_chunks"][:, 0]
    assert (chunks[1:] != chunks[:-1]).sum() > 8
    check(ptx, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_that_lie_far_apart(ptx, dtype):
    """Offsets beyond 2^32 bytes."""
    near = attention_round(24, agents=2, masters=(40,), whole_uses=True, dtype=dtype, rows=2)
    stride = 1_100_000_000
    far = replace(
        near,
        round=RoundTensors(near.round.buffer.clone(), near.round.extents),
        k_pool=[testing.far_apart(near.k_pool[0], stride)],
        v_pool=[testing.far_apart(near.v_pool[0], stride)],
    )
    outputs = [torch.full(near.q.shape, torch.nan, dtype=dtype) for _ in range(2)]
    for case, out in zip((near, far), outputs, strict=True):
        run(ptx, case, out)
    assert outputs[0][near.real_rows].isfinite().all()
    testing.assert_same_bits(outputs[0], outputs[1])


def test_twice_gives_the_same_bits(ptx):
    case = attention_round(25, dtype=torch.bfloat16, masters=(150, 20))
    outputs = [torch.full(case.q.shape, torch.nan, dtype=case.q.dtype) for _ in range(2)]
    for out in outputs:
        run(ptx, case, out)
    testing.assert_same_bits(outputs[0], outputs[1])


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sm_90(dtype):
    """nvcc's PTX for another architecture does the same; a subset, for the source is one."""
    case = attention_round(26, dtype=dtype, masters=(150, 20))
    check(PtxBackend("90"), case, window=100, soft_cap=3.0, sinks=torch.linspace(-1, 1, 4))
