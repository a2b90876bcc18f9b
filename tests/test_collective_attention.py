"""`collective_attention` against attention over materialised, moved caches in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import backends
import pytest
import torch
from attention_rounds import (
    TILE_ROWS,
    attention_round,
    blind_tile_round,
    boundary_round,
    by_one_position,
    demanding_round,
    equal_keys_round,
    first_keys_hidden_round,
    lacking_round,
    lonely_round,
    neighbours_round,
    nine_partials_round,
    one_of_four_round,
    opposite_values_round,
    rising_round,
    unnamed_use_round,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokendance import _planner, testing
from tokendance.testing import reference

OPERATOR = "collective_attention"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
E4M3, INT8 = testing.QUANTIZED
# Of pools and queries.
QUANTIZED = [(E4M3, torch.bfloat16), (E4M3, torch.float32), (INT8, torch.float16)]
HEAD_DIMS = [64, 80, 96, 128, 256]
# Others are for the CPU.
ALIGNED_LAYOUTS = [layout for layout in testing.LAYOUTS if layout != "unaligned"]
pytestmark = pytest.mark.usefixtures("one_thread")


def expectation(case, *, window=0, soft_cap=0.0, sinks=None, attention_factor=1.0, scale=None):
    """What the reference makes of a case, (out, lse)."""
    scale = case.scale if scale is None else scale
    tables = (case.cos, case.sin, case.interleaved)
    options = (scale, window, soft_cap, sinks, attention_factor, *scales_of(case))
    return reference.collective_attention(
        case.q, case.k_pool[0], case.v_pool[0], *tables, case.round, *options
    )


def scales_of(case):
    """Of the layer that attention is tested on."""
    return [None if scales is None else scales[0] for scales in (case.k_scale, case.v_scale)]


def check(
    backend,
    case,
    *,
    window=0,
    soft_cap=0.0,
    sinks=None,
    attention_factor=1.0,
    scale=None,
    wide=False,
    gap=None,
    lse_tolerance=None,
    expected=None,
    empty=False,
    damage=None,
):
    """Compares with the reference; nothing but rows that are not padding may be written.

    A round without query rows compares nothing: it has to be meant (``empty``). Outputs lie apart
    where they are ``wide``, or have gaps of so many elements between heads. The operator gets
    what ``damage`` makes of a copy of the case; rows that are there in it alone see nothing.
    """
    assert empty or len(case.real_rows) > 0, "the round has no query rows"
    dtype, (rows, num_q_heads, head_dim) = case.q.dtype, case.q.shape
    options = {"window": window, "soft_cap": soft_cap, "sinks": sinks}
    options |= {"attention_factor": attention_factor, "scale": scale}
    expected, expected_lse = expected or expectation(case, **options)
    scale = case.scale if scale is None else scale
    given = case.copy()
    if damage:
        damage(given)
    mine = given.copy(backend.device)
    to = testing.StorageCopies(backend.device)
    gap = 16 * wide if gap is None else gap
    out = to(torch.full((rows, num_q_heads + wide, head_dim + gap), torch.nan, dtype=dtype))
    lse = to(torch.full((rows, num_q_heads), torch.nan))
    partials = case.round.extents.partials
    workspace = to(torch.full((partials * num_q_heads * (head_dim + 1) + 5,), torch.nan))
    backend.collective_attention_out(
        mine.q,
        mine.k_pool[0],
        mine.v_pool[0],
        *(mine.cos, mine.sin, mine.interleaved),
        mine.round.buffer,
        mine.extents,
        *(scale, window, soft_cap, None if sinks is None else to(sinks), attention_factor),
        workspace,
        out[:, :num_q_heads, :head_dim],
        lse,
        *scales_of(mine),
    )
    for name, got, want in (
        ("q", mine.q, given.q),
        ("k_pool", mine.k_pool[0], given.k_pool[0]),
        ("v_pool", mine.v_pool[0], given.v_pool[0]),
        ("round", mine.round.buffer, given.round.buffer),
    ):
        testing.assert_same_storage(got, want, name)
    assert workspace[partials * num_q_heads * (head_dim + 1) :].isnan().all()
    out, lse, real = out.cpu(), lse.cpu(), case.real_rows
    written = torch.zeros(out.shape, dtype=torch.bool)
    written[given.real_rows, :num_q_heads, :head_dim] = True
    assert out[~written].isnan().all(), "something beside the rows was written"
    padding = given.round.row_agent < 0
    assert lse[padding].isnan().all(), "the LSE of a padding row was written"
    damaged = (case.round.row_agent < 0) & ~padding
    assert (out[damaged, :num_q_heads, :head_dim] == 0).all(), "a damaged row saw something"
    assert (lse[damaged] == -torch.inf).all(), "a damaged row saw something"
    rows_of = out[real, :num_q_heads, :head_dim]
    testing.assert_close(rows_of, expected[real], dtype, "out")
    tolerance = lse_tolerance or testing.tolerance(dtype)
    torch.testing.assert_close(
        lse[real].double(), expected_lse[real], rtol=tolerance, atol=tolerance
    )
    blind = expected_lse[real] == -torch.inf
    assert (rows_of[blind] == 0).all()
    return rows_of, lse[real]


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(backend, dtype, head_dim, interleaved):
    case = demanding_round(head_dim, head_dim=head_dim, dtype=dtype, interleaved=interleaved)
    check(backend, case)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("dtype", "query_dtype"), QUANTIZED, ids=str)
def test_quantized_pools(backend, dtype, query_dtype, head_dim, interleaved):
    options = {"dtype": dtype, "query_dtype": query_dtype, "interleaved": interleaved}
    check(backend, demanding_round(head_dim, head_dim=head_dim, **options))


@pytest.mark.parametrize(("dtype", "query_dtype"), QUANTIZED, ids=str)
def test_quantized_pools_with_every_option(backend, dtype, query_dtype):
    options = {"dtype": dtype, "query_dtype": query_dtype}
    case = demanding_round(300, head_dim=96, rotary_dim=64, **options)
    sinks = torch.tensor([0.5, -3.0, 8.0, -torch.inf])
    check(backend, case, soft_cap=2.0)
    check(backend, case, sinks=sinks)
    check(backend, case, soft_cap=4.0, sinks=sinks, attention_factor=0.9, scale=0.1, window=90)
    check(backend, replace(case, k_scale=None), scale=0.001)
    check(backend, replace(case, v_scale=None))
    for layout in ALIGNED_LAYOUTS:
        check(backend, demanding_round(500, layout=layout, **options), wide=True)
    for heads in ((1, 1), (8, 1), (14, 2)):
        check(backend, demanding_round(600, num_q_heads=heads[0], num_kv_heads=heads[1], **options))
    check(backend, demanding_round(800, agents=2, rows=110, num_kv_heads=4, **options))
    check(backend, attention_round(900, agents=4, work="planned", rows=1, **options))


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_elements_are_widened_exactly(backend, dtype):
    """Every element there is, subnormals included, as a value that one key alone gives."""
    case = testing.random_round(
        1, agents=1, masters=0, private_length=1, rows=1, head_dim=256, dtype=dtype,
        query_dtype=torch.bfloat16, slack=False,
    )  # fmt: skip
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    page = int(case.round.own_pages[0])
    case.v_pool[0][page, 0] = torch.where(codes.float().isnan(), 0.0, codes.float()).to(dtype)
    rows, _ = check(backend, replace(case, v_scale=None))
    expected = case.v_pool[0][page, 0, :1].float().expand_as(rows)
    assert rows.shape[0] == 1
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", ["random", "all", "leading"])
def test_masks_and_block_sizes(backend, masks, dtype, block_size):
    check(
        backend,
        demanding_round(
            100, dtype=dtype, block_size=block_size, masks=masks, repeat=masks == "leading"
        ),
    )


@pytest.mark.parametrize("window", [1, 7, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows(backend, window, dtype):
    check(backend, demanding_round(200 + window, dtype=dtype), window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_cap_sinks_and_scales(backend, dtype):
    case = demanding_round(300, dtype=dtype, head_dim=96, rotary_dim=64)
    sinks = torch.tensor([0.5, -3.0, 8.0, -torch.inf])
    check(backend, case, soft_cap=2.0)
    check(backend, case, sinks=sinks)
    check(backend, case, attention_factor=1.2)
    check(backend, case, scale=0.25)
    check(backend, case, soft_cap=4.0, sinks=sinks, attention_factor=0.9, scale=0.1, window=90)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 0), (64, 2), (80, 32), (96, 34)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_partial_rotation(backend, dtype, head_dim, rotary_dim, interleaved):
    check(
        backend,
        demanding_round(
            400, head_dim=head_dim, rotary_dim=rotary_dim, dtype=dtype, interleaved=interleaved
        ),
    )


@pytest.mark.parametrize("layout", ALIGNED_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(backend, layout, dtype):
    check(backend, demanding_round(500, layout=layout, dtype=dtype), wide=True)


def pools_at(case, offset, gap):
    """The case with copies of its pools that begin so many elements behind 16 bytes, with gaps of
    so many between heads."""

    def moved(pool):
        shape = (*pool.shape[:-1], pool.shape[-1] + gap)
        memory = torch.full((math.prod(shape) + offset,), torch.nan, dtype=pool.dtype)
        place = memory[offset:].view(shape)[..., : pool.shape[-1]]
        return place.copy_(pool)

    return replace(case, k_pool=[moved(case.k_pool[0])], v_pool=[moved(case.v_pool[0])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("offset", "gap", "message"),
    [
        (1, 0, "k_pool: expected memory at a multiple of 16 bytes, got"),
        (0, 1, "k_pool: expected strides that are multiples of 16 bytes, "),
    ],
)
def test_pools_that_are_not_aligned_are_for_the_cpu(backend, dtype, offset, gap, message):
    case = pools_at(demanding_round(500, dtype=dtype), offset, gap)
    refused_but_on_the_cpu(backend, message, lambda: check(backend, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_that_are_not_aligned_are_for_the_cpu(backend, dtype):
    case = demanding_round(500, dtype=dtype)
    message = "out: expected strides that are multiples of 16 bytes, "
    refused_but_on_the_cpu(backend, message, lambda: check(backend, case, gap=1))


def refused_but_on_the_cpu(backend, message, call):
    if backend.name == "cpu":
        call()
    elif backend.name == "ptx":
        with pytest.raises(AssertionError):  # nothing is written
            call()
        assert backend.launched.num_launches == 0
    else:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (3, 3), (8, 1), (6, 2), (14, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_groups_of_heads(backend, num_q_heads, num_kv_heads, dtype):
    case = demanding_round(600, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, dtype=dtype)
    check(backend, case, sinks=torch.linspace(-1, 1, num_q_heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_agents_decode_together(backend, dtype):
    """Rows of many agents, at different shifts, in one tile."""
    check(backend, demanding_round(700, agents=21, masters=(333,), rows=2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_prefill(backend, dtype):
    """More rows than a tile has, most of them next to each other."""
    check(backend, demanding_round(800, agents=2, rows=110, dtype=dtype, num_kv_heads=4))


@pytest.mark.parametrize("work", ["random", "planned"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_more_than_64_query_rows_of_agents_that_are_mixed(backend, dtype, head_dim, work):
    """Tiles of 128 query rows, and of 64 where an item has fewer."""
    case = demanding_round(
        900, agents=5, masters=(333, 45), rows=3, num_q_heads=36, head_dim=head_dim, dtype=dtype,
        rows_per_item=7, masks="half", work=work,
    )  # fmt: skip
    heights = {18 * (item[1] - item[0]) for item in case.arrays["work"].tolist()}
    assert max(heights) > 64
    check(backend, case, window=200, soft_cap=20.0, sinks=torch.linspace(-1, 1, 36))


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("rows", [1, 70])
def test_planned_work(backend, rows, window):
    for dtype in (torch.float32, torch.bfloat16):
        case = attention_round(900, agents=4, work="planned", window=window, rows=rows, dtype=dtype)
        check(backend, case, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_before_position_0_holes_and_rows_that_see_nothing(backend, dtype):
    seen_nothing = 0
    for seed in range(1000, 1004):
        case = attention_round(
            seed,
            masters=(330, 20, 9),
            whole_uses=False,
            agents=5,
            cut=True,
            holes=True,
            private_length=3,
            dtype=dtype,
        )
        for sinks in (None, torch.zeros(4)):
            _, lse = check(backend, case, sinks=sinks, window=2)
        seen_nothing += int((lse == -torch.inf).sum())
    assert seen_nothing > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_and_last_keys(backend, dtype):
    for own_first in (False, True):
        case = boundary_round(64, own_first, dtype=dtype)
        check(backend, case, window=64)
    check(backend, boundary_round(64, dtype=dtype), window=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_first_keys_of_pages(backend, dtype):
    check(backend, first_keys_hidden_round(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_small_pages(backend, dtype):
    """A page of 8 rows after the other, each with half of them hidden."""
    case = attention_round(
        19, agents=6, masters=(70,), masks="half", rows=2, block_size=8, dtype=dtype
    )
    check(backend, case)


@pytest.mark.parametrize("cap", [30.0, 50.0])
def test_soft_caps_in_fp32(backend, cap):
    """The LSE of a row that sees one key is its capped score; the product is exact here."""
    case = testing.random_round(
        1, agents=1, masters=0, private_length=1, rows=1, num_q_heads=64, num_kv_heads=1,
        rotary_dim=0, slack=False,
    )  # fmt: skip
    case.q.zero_()
    case.k_pool[0].zero_()
    scores = torch.logspace(-3, 2.5, 32)
    case.q[0, :, 5] = torch.cat((scores, -scores))
    case.k_pool[0][int(case.round.own_pages[0]), 0, 0, 5] = 1.0
    _, lse = check(backend, case, soft_cap=cap, scale=1.0)
    expected = cap * torch.tanh(case.q[0, :, 5].double() / cap)
    torch.testing.assert_close(lse[0].double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("query_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_nan_in_hidden_rows_of_e4m3(backend, query_dtype):
    check_nan_in_hidden_rows(backend, query_dtype)


def check_nan_in_hidden_rows(backend, query_dtype):
    """Rows that no row sees, between others that are seen."""
    case = attention_round(
        19, agents=1, masters=(70, 40), masks="half", rows=4, dtype=E4M3, query_dtype=query_dtype
    )
    size, hidden = case.filled.block_size, 0

    def damage(given):
        nonlocal hidden
        for use in range(case.filled.uses):
            master = int(case.round.use_master[use])
            first_page = int(case.round.master_page_indptr[master])
            masks = case.round.use_masks[int(case.round.use_page_indptr[use]) :]
            for row in range(int(case.round.use_length[use])):
                if int(masks[row // size]) >> row % size & 1:
                    page = int(case.round.master_pages[first_page + row // size])
                    for pool in (given.k_pool[0], given.v_pool[0]):
                        pool[page, row % size].view(torch.uint8).fill_(0x7F + 0x80 * (row % 2))
                    hidden += 1

    check(backend, case, damage=damage)
    assert hidden > 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_of_one_row(backend, dtype):
    check(backend, attention_round(15, masters=(40, 20), dtype=dtype, work="planned"), window=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_rows_that_see_nothing_before_others_that_do(backend, dtype):
    _, lse = check(backend, blind_tile_round(dtype=dtype))
    assert (lse == -torch.inf).all(dim=1).sum() == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_own_rows(backend, dtype):
    case = lonely_round(dtype=dtype)
    check(backend, case)
    check(backend, case, window=3)


@pytest.mark.parametrize(("first", "second"), [(63, 127), (127, 63)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maxima_that_rise_in_half_of_a_warp(backend, dtype, first, second):
    check(backend, rising_round(first, second, dtype=dtype, rotary_dim=0))


@pytest.mark.parametrize("work", ["random", "planned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_of_equal_keys(backend, dtype, work):
    check(backend, equal_keys_round(dtype=dtype, work=work), lse_tolerance=1e-6)


@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [E4M3], ids=str)
def test_opposite_values_of_equal_keys(backend, dtype, query_dtype):
    case = opposite_values_round(dtype=dtype, query_dtype=query_dtype)
    out, lse = check(backend, case, window=2, lse_tolerance=1e-5)
    assert (out == 0).all()
    assert lse.abs().min() > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partials_far_apart(backend, dtype):
    """A weight relative to any but the highest of the partials would be infinite."""
    case = attention_round(
        19, num_q_heads=3, num_kv_heads=3, work="planned", agents=4, rows=1, rows_per_item=2,
        masters=(300,), rotary_dim=0, dtype=dtype,
    )  # fmt: skip
    check(backend, case, scale=60.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masters_that_some_agents_lack(backend, dtype):
    check(backend, lacking_round(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_row_of_four_has_a_master(backend, dtype):
    check(backend, one_of_four_round(dtype=dtype))


@pytest.mark.parametrize("work", ["random", "planned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_query_row_is_of_another_agent(backend, dtype, work):
    case = neighbours_round(dtype=dtype, work=work)
    assert case.filled.rows > 16
    check(backend, case)
    check(backend, by_one_position(case))


@pytest.mark.parametrize("kind", ["no_agents", "no_masters", "empty_masters", "no_rows", "no_page"])
def test_rounds_with_little_in_them(backend, kind):
    options = {"no_rows": {"rows": 0}, "no_page": {"masters": 0, "private_length": 0}}
    for slack in (True, False):
        arguments = options.get(kind) or testing.EDGE_CASES[kind]
        case = attention_round(3, dtype=torch.float16, slack=slack, **arguments)
        check(backend, case, sinks=torch.zeros(4), empty=kind in ("no_agents", "no_rows"))


@pytest.mark.parametrize("kind", testing.EDGE_CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edge_cases(fast_backend, kind, dtype):
    arguments = {"rows": 9, "dtype": dtype, **testing.EDGE_CASES[kind]}
    cases = [
        testing.random_round(seed, work=("random", "planned")[seed % 2], **arguments)
        for seed in range(4)
    ]
    assert kind == "no_agents" or sum(len(case.real_rows) > 0 for case in cases) >= 3
    for case in cases:
        check(fast_backend, case, empty=True)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    agents=st.integers(0, 8),
    masters=st.integers(0, 5),
    master_length=st.sampled_from([3, 40, 200]),
    private_length=st.sampled_from([0, 9, 50]),
    rows=st.sampled_from([1, 5, 80]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4, 7]),
    head_dim=st.sampled_from(HEAD_DIMS),
    part=st.sampled_from([0.0, 0.5, 1.0, 1.0]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    layout=st.sampled_from(ALIGNED_LAYOUTS),
    block_size=st.sampled_from([8, 16, 32]),
    start=st.sampled_from([0, 0, 8000]),
    repeat=st.booleans(),
    cut=st.booleans(),
    holes=st.booleans(),
    work=st.sampled_from(["random", "planned"]),
    window=st.sampled_from([0, 0, 1, 16, 33]),
    soft_cap=st.sampled_from([0.0, 0.0, 3.0]),
    with_sinks=st.booleans(),
)
def test_random_rounds(
    fast_backend, num_kv_heads, group, head_dim, part, window, soft_cap, with_sinks, **options
):
    num_q_heads = num_kv_heads * group
    case = testing.random_round(
        **options,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * part) // 2 * 2,
        rows_per_item=TILE_ROWS // group,
        window=window,
    )
    sinks = torch.linspace(-2, 2, num_q_heads) if with_sinks else None
    check(fast_backend, case, window=window, soft_cap=soft_cap, sinks=sinks, empty=True)


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    agents=st.integers(0, 8),
    masters=st.integers(0, 5),
    master_length=st.sampled_from([3, 40, 200]),
    private_length=st.sampled_from([0, 9, 50]),
    rows=st.sampled_from([1, 5, 80]),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4, 7]),
    head_dim=st.sampled_from(HEAD_DIMS),
    query_dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    layout=st.sampled_from(ALIGNED_LAYOUTS),
    block_size=st.sampled_from([8, 16, 32]),
    repeat=st.booleans(),
    cut=st.booleans(),
    holes=st.booleans(),
    work=st.sampled_from(["random", "planned"]),
    window=st.sampled_from([0, 0, 16]),
)
def test_random_quantized_rounds(fast_backend, dtype, num_kv_heads, group, window, **options):
    assume(backends.takes(fast_backend.name, {"dtype": dtype, **options}))
    case = testing.random_round(
        **options,
        dtype=dtype,
        num_q_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        rows_per_item=TILE_ROWS // group,
        window=window,
    )
    check(fast_backend, case, window=window, empty=True)


@pytest.mark.parametrize("work", ["random", "planned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_see_a_master_by_the_use_that_the_work_list_names(backend, dtype, work):
    case, damage = unnamed_use_round(dtype=dtype, work=work)
    check(backend, case, damage=damage)


@pytest.mark.parametrize("turn", [0, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partials_are_merged_by_the_highest_of_all(backend, dtype, turn):
    check(backend, nine_partials_round(turn, dtype=dtype), scale=60.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partials_that_weigh_alike(backend, dtype):
    check(backend, nine_partials_round(0, dtype=dtype))


def test_how_the_work_is_cut_hardly_matters(fast_backend):
    """Two work lists of one round differ by roundings only."""
    first, second = (
        attention_round(12, agents=5, rows=9, slack=False, work=work)
        for work in ("random", "planned")
    )
    out, lse = check(fast_backend, first)
    other, other_lse = check(fast_backend, second)
    torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, other_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twice_gives_the_same_bits(fast_backend, dtype):
    case = attention_round(13, agents=6, rows=20, dtype=dtype)
    for first, second in zip(check(fast_backend, case), check(fast_backend, case), strict=True):
        testing.assert_same_bits(first, second)


def test_functional_variant_gives_the_same(fast_backend):
    case = attention_round(14, agents=4, dtype=torch.bfloat16, layout="interleaved")
    sinks = torch.linspace(-1, 1, 4)
    expected = check(fast_backend, case, sinks=sinks, window=50)
    here = case.copy(fast_backend.device)
    got = torch.ops.tokendance.collective_attention(
        here.q,
        here.k_pool[0],
        here.v_pool[0],
        *(here.cos, here.sin, here.interleaved, here.round.buffer, here.extents),
        *(here.scale, 50, 0.0, sinks.to(fast_backend.device)),
    )
    for mine, want in zip(got, expected, strict=True):
        testing.assert_same_bits(mine[case.real_rows.to(mine.device)], want)


@pytest.mark.parametrize("rows", [1, 4])
def test_workspace_does_not_grow_with_the_shared_part(rows):
    """8 agents over 64K shared tokens: as many partials as the capacity, which knows no S."""
    splits = 16
    capacity = _planner.work_capacity(
        agents=8,
        rows=8 * rows,
        uses=8,
        masters=1,
        max_tile_rows=16,
        target_items=132,
        max_splits=splits,
    )["partials"]
    counts = [len(planned_decode(1 << log2, rows, splits)["row_partials"]) for log2 in (10, 16, 20)]
    assert all(count <= capacity for count in counts)
    assert counts[1] == counts[2] == 8 * rows * (splits + 1)


def planned_decode(shared, rows, splits, agents=8, block_size=16):
    def int32(values):
        return torch.tensor(values, dtype=torch.int32).numpy()

    return _planner.plan_work(
        row_agent=int32([agent for agent in range(agents) for _ in range(rows)]),
        row_position=int32([shared + row for _ in range(agents) for row in range(rows)]),
        use_agent=int32(range(agents)),
        use_master=int32([0] * agents),
        use_delta=int32([0] * agents),
        use_length=int32([shared] * agents),
        master_page_indptr=int32([0, shared // block_size]),
        own_length=int32([rows] * agents),
        own_page_indptr=int32(range(agents + 1)),
        own_position=int32([shared + i for _ in range(agents) for i in range(block_size)]),
        block_size=block_size,
        max_tile_rows=16,
        target_items=132,
        max_splits=splits,
    )
