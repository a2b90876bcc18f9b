"""`encode_pages` and `decode_pages` against the reference, and how far off each code is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance import testing
from tokendance.device import operators as ops
from tokendance.device.codec import CODES, PageCodec
from tokendance.testing import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(8, 1, 64), (16, 3, 80), (32, 2, 96), (16, 1, 128), (8, 2, 256)]
STEPS = {"int8": 1 / 127, "int4": 1 / 7}
pytestmark = pytest.mark.usefixtures("one_thread")


def pages(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    layout: testing.Layout = "separate",
    seed: int = 0,
) -> torch.Tensor:
    """Seven pages of keys, one channel of which is far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    pool, _ = testing.pools(7, *shape, dtype, layout)
    rows = torch.randn(7, *shape, generator=generator) * 3
    rows[..., 5] *= 50
    return pool.copy_(rows)


def codec_of(code: str, pool: torch.Tensor, per_channel: bool) -> PageCodec:
    return PageCodec(code, pool.shape[1], pool.shape[2:], pool.dtype, per_channel)


def through(codec: PageCodec, rows: torch.Tensor) -> torch.Tensor:
    """Pages that are coded and decoded."""
    page = torch.arange(len(rows))
    counts = torch.full((len(rows),), rows.shape[1], dtype=torch.int32)
    coded = torch.empty(len(rows), codec.page_bytes, dtype=torch.uint8)
    codec.encode(rows, page, counts, coded)
    found = torch.full_like(rows, torch.nan)
    codec.decode(coded, None, counts, found, page)
    return found


def special(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Elements that rounding may treat in a way of their own."""
    pool = pages(shape, dtype)
    pool[0] = 0
    pool[1] = 0
    pool[1, 1, 0, 7] = torch.finfo(dtype).smallest_normal
    pool[2] *= 2.0**-20
    pool[3, 0, 0, 3] = torch.inf
    pool[3, 2, 0, 4] = -torch.inf
    pool[4, 0, 0, 0] = torch.nan
    pool[5] = torch.finfo(dtype).max
    pool[5, :, :, ::3] *= -1
    halves = torch.arange(pool[6].numel()).view(pool[6].shape) % 255 - 127
    pool[6] = halves + 0.5  # of the steps of int8, where the largest is 127
    pool[6, :, :, 0] = 127
    pool[6, 0] = 127
    return pool


@pytest.mark.parametrize("per_channel", [True, False], ids=["channels", "rows"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coded_bit_for_bit(dtype, shape, code, per_channel):
    check(pages(shape, dtype), code, per_channel)


@pytest.mark.parametrize("per_channel", [True, False], ids=["channels", "rows"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_elements(dtype, code, per_channel):
    check(special((8, 2, 64), dtype), code, per_channel)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_bit_for_bit(layout, code):
    check(pages((16, 3, 80), torch.bfloat16, layout), code, per_channel=True)


def check(pool: torch.Tensor, code: str, per_channel: bool) -> None:
    """Some pages, some of them not full, to slots in another order; nothing else is written."""
    block = pool.shape[1]
    page = torch.tensor([6, 2, 0, 5, 1, 3, 4])
    slot = torch.tensor([8, 0, 3, 2, 5, 1, 7])
    rows = torch.tensor([block, block - 3, block, 1, 0, block, block], dtype=torch.int32)
    codec = codec_of(code, pool, per_channel)
    gaps = torch.full((9, codec.page_bytes + 32), 77, dtype=torch.uint8)
    coded, expected = (gaps.clone()[:, : codec.page_bytes] for _ in range(2))
    ops.encode_pages(pool, page, rows, code, per_channel, coded, slot)
    reference.encode_pages(pool, page, rows, code, per_channel, expected, slot)
    testing.assert_same_storage(
        testing.whole_storage(coded), testing.whole_storage(expected), "coded"
    )
    places = testing.StorageCopies()(pool).fill_(0.25)
    found, wanted = (testing.StorageCopies()(places) for _ in range(2))
    other = page.flip(0)
    ops.decode_pages(coded, slot, rows, code, per_channel, found, other)
    reference.decode_pages(coded, slot, rows, code, per_channel, wanted, other)
    testing.assert_same_bits(testing.whole_storage(found), testing.whole_storage(wanted), "decoded")


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    code=st.sampled_from(CODES[1:]),
    per_channel=st.booleans(),
    size=st.sampled_from([1e-6, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_an_element_is_off_by_half_a_step(shape, dtype, code, per_channel, size, seed):
    rows = (pages(shape, torch.float32, seed=seed) * size).to(dtype)
    rows[0, 0, 0] = 0
    found = through(codec_of(code, rows, per_channel), rows)
    exact = rows.double()
    largest = exact.abs().amax(dim=1 if per_channel else 3, keepdim=True)
    if code == "e4m3":
        half = (exact.abs() * 2.0**-4).maximum(largest / 448 * 2.0**-10)
    else:
        half = largest * STEPS[code] / 2
    info = torch.finfo(dtype)
    rounding = (exact.abs() + half) * info.eps / 2 + info.smallest_normal * info.eps
    assert ((found.double() - exact).abs() <= half * (1 + 1e-4) + rounding).all()
    assert torch.equal(found[exact.abs() == largest], rows[exact.abs() == largest])
    assert torch.equal(through(codec_of(code, rows, per_channel), found), found)


def test_keys_of_a_few_large_channels_want_scales_of_channels():
    keys = torch.randn(16, 16, 2, 64)
    keys[..., [5, 40]] *= 60
    errors = [
        (through(codec_of("int8", keys, per_channel), keys) - keys)[..., :5].abs().mean()
        for per_channel in (True, False)
    ]
    assert errors[0] * 20 < errors[1]


def test_what_is_not_finite_does_not_become_so():
    rows = torch.randn(1, 8, 1, 64)
    rows[0, 2, 0, 3] = torch.nan
    rows[0, 3, 0, 3] = torch.inf
    for code in CODES[1:]:
        found = through(codec_of(code, rows, per_channel=False), rows)
        assert found[0, :2].isfinite().all()
        assert not found[0, 2:4].isfinite().any()


def test_sizes():
    """Of 64 rows in bf16, over those of the rows as they are."""
    sizes = [
        PageCodec(code, 32, (4, 128), torch.bfloat16, per_channel).size(64) / (64 * 4 * 128 * 2)
        for code in CODES
        for per_channel in (True, False)
    ]
    expected = [1 / 2 + 1 / 32, 1 / 2 + 1 / 128]
    assert sizes == [1, 1, *expected, *expected, *(size - 1 / 4 for size in expected)]


def test_a_page_that_is_not_full_ends_behind_its_rows():
    """What is cut off is not needed."""
    rows = pages((8, 2, 64), torch.float32)
    for code in CODES:
        codec = codec_of(code, rows, per_channel=False)
        coded = torch.zeros(1, codec.page_bytes, dtype=torch.uint8)
        counts, page = torch.tensor([5], dtype=torch.int32), torch.tensor([3])
        codec.encode(rows, page, counts, coded)
        coded.view(-1)[codec.size(5) :] = 0xFF
        found = torch.zeros_like(rows)
        codec.decode(coded, None, counts, found, page)
        off = (found[3, :5] - rows[3, :5]).abs().max()
        assert off <= rows.abs().max() / 14
        assert not found[3, 5:].any()


def test_threads_give_the_same():
    rows = torch.randn(200, 16, 4, 128)
    one = through(codec_of("int8", rows, per_channel=True), rows)
    torch.set_num_threads(3)
    assert torch.equal(through(codec_of("int8", rows, per_channel=True), rows), one)


POOL = torch.zeros(4, 8, 2, 64)
PAGE = torch.tensor([0, 3])
ROWS = torch.tensor([8, 2], dtype=torch.int32)
CODED = torch.zeros(5, 1536, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": POOL.to(torch.float8_e4m3fn)}, "pool: expected float32, float16 or bfloat16"),
        ({"pool": POOL[..., :60]}, "pool: expected head_dim"),
        ({"pool": POOL[0]}, r"pool: expected \[num_pages, block_size, heads, head_dim\]"),
        ({"page": PAGE.int()}, "page: expected int64"),
        ({"page": torch.tensor([0, 4])}, r"page\[1\]: expected 0 to 3, got 4"),
        ({"rows": ROWS[:1]}, r"rows: expected \[2\], got \[1\]"),
        ({"rows": ROWS + 1}, r"rows\[0\]: expected 0 to 8, got 9"),
        ({"code": "int2"}, "code: expected exact, e4m3, int8 or int4, got 'int2'"),
        ({"coded": CODED[:, 1:]}, r"coded: expected \[slots, 1536\], got \[5, 1535\]"),
        ({"coded": CODED[:1]}, "coded: expected at least 2 slots, got 1"),
        ({"coded": CODED.char()}, "coded: expected uint8"),
        (
            {"coded": torch.zeros(5, 1544, dtype=torch.uint8)[:, :1536]},
            "coded: expected slots at multiples of 16 bytes",
        ),
        ({"slot": torch.tensor([0, -1])}, r"slot\[1\]: expected 0 to 4, got -1"),
    ],
)
def test_what_is_refused(changes, message):
    given = {
        **{"pool": POOL, "page": PAGE, "rows": ROWS, "code": "int8", "per_channel": True},
        **{"coded": CODED, "slot": None},
        **changes,
    }
    with pytest.raises(RuntimeError, match=message):
        ops.encode_pages(**given)
    with pytest.raises(RuntimeError, match=message):
        ops.decode_pages(**given)
