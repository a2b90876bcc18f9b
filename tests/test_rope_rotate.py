"""`rope_rotate` against the reference, bit for bit, untouched memory included."""

from __future__ import annotations

from dataclasses import dataclass

import e4m3
import pytest
import ties
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance import testing
from tokendance.device.rope import Rope
from tokendance.testing import reference

OPERATOR = "rope_rotate"
E4M3 = torch.float8_e4m3fn
PLAIN = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*PLAIN, *testing.QUANTIZED]
HEAD_DIMS = [64, 80, 96, 128, 256]
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Moves:
    """Rows to move, and where to; `arguments` are those of the operator."""

    x: torch.Tensor
    row_in: torch.Tensor | None
    row_out: torch.Tensor | None
    position_from: torch.Tensor | None
    position_to: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    scale: float
    out: torch.Tensor
    x_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None

    def copy(self, device="cpu") -> Moves:
        to = testing.StorageCopies(device)
        return Moves(
            *(
                to(item) if isinstance(item, torch.Tensor) else item
                for item in self.__dict__.values()
            )
        )

    def arguments(self) -> list:
        return list(self.__dict__.values())


def row_tensor(rows, heads, head_dim, dtype, layout, block_size):
    """A row tensor of at least so many rows, NaN throughout."""
    pages = -(-rows // block_size)
    return testing.pools(pages, block_size, heads, head_dim, dtype, layout)[rows % 2]


def random_rows(shape, dtype, generator, scale=None):
    """Normally distributed; quantized, a few are limited to the largest element."""
    rows = torch.randn(shape, generator=generator)
    if not testing.is_quantized(dtype):
        return rows.to(dtype)
    largest = 448 if dtype.is_floating_point else 127
    scale = torch.ones(shape[1]) if scale is None else scale
    return reference.quantize_rows(rows * scale[:, None] * largest / 3, scale, dtype)


def random_scales(heads, seed):
    return torch.rand(heads, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.001


def random_moves(
    seed,
    *,
    rows=7,
    heads=2,
    head_dim=64,
    dtype=torch.float32,
    out_dtype=None,
    interleaved=False,
    rotary_dim=None,
    layout="separate",
    out_layout="separate",
    block_size=8,
    destinations=None,
    skip=0.0,
    scale=1.0,
    max_position=100,
):
    """Gathers rows (some twice) of one row tensor and scatters them over another."""
    generator = torch.Generator().manual_seed(seed)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    x = row_tensor(2 * rows + 3, heads, head_dim, dtype, layout, block_size)
    out_rows = rows * (destinations or 1) + 5
    out = row_tensor(out_rows, heads, head_dim, out_dtype or dtype, out_layout, block_size)
    row_in = integers(2 * rows + 3, rows)
    reference.scatter_rows(x, row_in, random_rows((rows, heads, head_dim), dtype, generator))
    shape = (rows,) if destinations is None else (rows, destinations)
    count = rows * (destinations or 1)
    row_out = torch.randperm(out.shape[0] * out.shape[1], generator=generator)[:count]
    row_out[torch.rand(count, generator=generator) < skip] = -1
    position_from = integers(max_position, rows)
    position_to = integers(max_position, *shape)
    if rows > 2:  # no move, and from end to end of the table
        position_to.view(rows, -1)[0] = position_from[0]
        position_from[1], position_from[2] = 0, max_position - 1
        position_to.view(rows, -1)[1] = max_position - 1
        position_to.view(rows, -1)[2] = 0
    if rotary_dim == 0:
        cos = sin = torch.empty(1, 0)  # of no position but 0: none is needed
    else:
        rope = Rope.default(head_dim, 10000.0, max_position, rotary_dim, interleaved)
        cos, sin = rope.cos, rope.sin
    return Moves(
        x,
        row_in,
        row_out.view(shape),
        position_from.int(),
        position_to.int(),
        cos,
        sin,
        interleaved,
        scale,
        out,
    )


def expectation(moves):
    """What the reference makes of a copy."""
    expected = moves.copy()
    reference.rope_rotate_out(*expected.arguments())
    return expected


def check(backend, moves, expected=None, any_nan=False):
    """Runs the operator on a copy and compares all of the storages with the reference's.

    ``any_nan``: a NaN that is written may have any bits.
    """
    expected = expected or expectation(moves)
    actual = moves.copy(backend.device)
    backend.rope_rotate_out(*actual.arguments())
    testing.assert_same_storage(actual.out, expected.out, "out", any_nan)
    testing.assert_same_storage(actual.x, moves.x, "x")
    return actual


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_move_bit_for_bit(backend, dtype, head_dim, interleaved):
    moves = random_moves(head_dim, head_dim=head_dim, dtype=dtype, interleaved=interleaved)
    actual = check(backend, moves)
    moved = reference.gather_rows(actual.out.cpu(), moves.row_out)
    exact = reference.exact_rotation(
        reference.gather_rows(moves.x, moves.row_in),
        moves.position_to - moves.position_from,
        moves.cos,
        moves.sin,
        interleaved,
    )
    if testing.is_quantized(dtype):
        return assert_within_half_a_step(moved, exact)
    rounding = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (moved.double() - exact).abs().max() <= rounding * exact.abs().max()


def assert_within_half_a_step(moved, exact):
    """A moved row is off by half an ulp of e4m3, 2^-4 of the element, or by half a step of int8."""
    is_float = moved.dtype.is_floating_point
    largest = 448.0 if is_float else 127.0
    exact = exact.clamp(-largest, largest)
    half_step = (exact.abs() * 2**-4).clamp(min=2**-10) if is_float else 0.5
    error = (moved.double() - exact).abs()
    assert (error <= half_step + 2e-7 * largest).all()


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 0), (64, 2), (64, 34), (80, 32), (96, 94), (128, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *testing.QUANTIZED], ids=str)
def test_only_rotary_dims_are_rotated(backend, dtype, head_dim, rotary_dim, interleaved):
    moves = random_moves(
        rotary_dim, head_dim=head_dim, rotary_dim=rotary_dim, dtype=dtype, interleaved=interleaved
    )
    actual = check(backend, moves)
    before = reference.gather_rows(moves.x, moves.row_in)[..., rotary_dim:]
    after = reference.gather_rows(actual.out.cpu(), moves.row_out)[..., rotary_dim:]
    testing.assert_same_bits(after, before)


@pytest.mark.parametrize("out_layout", testing.LAYOUTS)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides(backend, layout, out_layout):
    check(
        backend,
        random_moves(3, layout=layout, out_layout=out_layout, dtype=torch.float16, heads=3),
    )


@pytest.mark.parametrize("destinations", [1, 3])
@pytest.mark.parametrize("skip", [0.0, 0.4, 1.0])
def test_one_row_goes_to_several_positions(backend, destinations, skip):
    check(
        backend,
        random_moves(5, destinations=destinations, skip=skip, dtype=torch.bfloat16, rows=11),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.25, 0.7])
def test_scale_multiplies_rotary_dims_only(backend, scale, dtype):
    moves = random_moves(11, scale=scale, rotary_dim=32, dtype=dtype)
    actual = check(backend, moves)
    row, into = int(moves.row_in[0]), int(moves.row_out[0])  # the row that does not move
    before = reference.gather_rows(moves.x, torch.tensor([row]))
    after = reference.gather_rows(actual.out.cpu(), torch.tensor([into]))
    testing.assert_same_bits(after[..., 32:], before[..., 32:])
    scaled = before[..., :32].float() * torch.tensor(scale)
    if testing.is_quantized(dtype):
        scaled = reference.quantize_rows(scaled, None, dtype)
    testing.assert_same_bits(after[..., :32], scaled.to(dtype))


def test_left_out_arguments(backend):
    moves = random_moves(13, rows=6)
    moves.x = torch.randn(6, 2, 64)
    moves.out = torch.full((6, 2, 64), torch.nan)
    for row_in in (None, torch.arange(6).flip(0)):
        for position_from in (None, moves.position_from):
            moves.row_in, moves.row_out, moves.position_from = row_in, None, position_from
            check(backend, moves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_positions_rows_are_copied(backend, dtype):
    moves = random_moves(17, dtype=dtype, destinations=2, skip=0.3, layout="padded")
    moves.position_from = moves.position_to = None
    check(backend, moves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("some", [True, False], ids=["some_rows", "all_rows"])
def test_in_place(backend, dtype, layout, some):
    moves = random_moves(19, dtype=dtype, layout=layout)
    total = moves.x.shape[0] * moves.x.shape[1]
    rows = moves.row_in.unique() if some else None
    count = rows.numel() if some else total
    if not some:
        reference.scatter_rows(
            moves.x, torch.arange(total), random_rows((total, *moves.x.shape[2:]), dtype, None)
        )
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(100, (count,), generator=generator).int() for _ in range(2))
    results = []
    for module, device in ((reference, "cpu"), (backend, backend.device)):
        copies = testing.StorageCopies(device)
        x = copies(moves.x)
        arguments = (None if rows is None else copies(rows), copies(source), copies(target))
        module.rope_rotate_(x, *arguments, copies(moves.cos), copies(moves.sin), False, 1.0)
        results.append(x)
    testing.assert_same_storage(results[1], results[0])


@pytest.mark.parametrize("dtype", [*PLAIN, torch.float8_e4m3fn], ids=str)
def test_special_values(backend, dtype):
    """Zeros of both signs, subnormals, the largest values (which overflow), infinities."""
    info = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, info.smallest_normal / 4, -info.smallest_normal / 2, info.max, info.min],
        dtype=torch.float64,
    )
    moves = random_moves(23, dtype=dtype, rows=8)
    index = torch.randint(6, (8, 2, 64), generator=torch.Generator().manual_seed(2))
    moves.row_in = torch.arange(8)
    reference.scatter_rows(moves.x, moves.row_in, values[index].to(dtype))
    check(backend, moves)


def any_bits(shape, dtype):
    """Elements of any bits, NaN of all kinds among them."""
    bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]
    info = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(3)
    return torch.randint(info.min, info.max, shape, generator=generator).to(bits).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_stays_keeps_every_bit(backend, dtype):
    moves = random_moves(29, dtype=dtype, rows=5)
    pattern = any_bits((5, 2, 64), dtype)
    moves.row_in, moves.position_to = torch.arange(5), moves.position_from
    if dtype in PLAIN:
        pattern[0, 0, :2] = torch.tensor([torch.inf, torch.nan])
    reference.scatter_rows(moves.x, moves.row_in, pattern)
    actual = check(backend, moves)
    testing.assert_same_bits(reference.gather_rows(actual.out.cpu(), moves.row_out), pattern)


def halfway_moves(dtype, by_scale=False, **options):
    """Rows that are moved halfway between two values by the angles, or by the scale alone."""
    moves = random_moves(43, dtype=dtype, **options)
    moves.x.copy_(moves.x.float().nan_to_num(0.0))
    ties.fill_odd_even(moves.x)
    if by_scale:
        moves.position_to = moves.position_from
        moves.scale = ties.factor(moves.out.dtype)
    else:
        ties.set_angles(moves.cos, moves.sin, moves.out.dtype)
    return moves


@pytest.mark.parametrize("by_scale", [False, True], ids=["by_angles", "by_scale"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("dtype", [*PLAIN, torch.float8_e4m3fn], ids=str)
def test_halfway_values_go_to_the_even_neighbour(backend, dtype, interleaved, by_scale):
    actual = check(backend, halfway_moves(dtype, by_scale, interleaved=interleaved))
    moved = reference.gather_rows(actual.out.cpu(), actual.row_out.cpu())
    assert dtype == torch.float32 or (moved[1, :, 1::2] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [-1, 1])
def test_one_position(backend, dtype, step):
    moves = random_moves(47, dtype=dtype, rows=2)
    moves.position_from = torch.tensor([5, 5], dtype=torch.int32)
    moves.position_to = moves.position_from + step
    check(backend, moves)


def test_no_rows(backend):
    moves = random_moves(31, rows=0)
    actual = check(backend, moves)
    assert actual.out.isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 150),
    heads=st.sampled_from([1, 2, 3, 8]),
    head_dim=st.sampled_from(HEAD_DIMS),
    part=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    dtype=st.sampled_from(PLAIN),
    interleaved=st.booleans(),
    layout=st.sampled_from(testing.LAYOUTS),
    out_layout=st.sampled_from(testing.LAYOUTS),
    block_size=st.sampled_from([1, 8, 16, 32]),
    destinations=st.sampled_from([None, 1, 2, 5]),
    scale=st.sampled_from([1.0, 1.1]),
)
def test_random_moves(fast_backend, head_dim, part, **options):
    rotary_dim = int(head_dim * part) // 2 * 2
    check(
        fast_backend,
        random_moves(
            **options, head_dim=head_dim, rotary_dim=rotary_dim, skip=0.1, max_position=3000
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_tails_do_not_change_bits(fast_backend, dtype):
    """Enough rows for several threads, on tables of 32K positions."""
    moves = random_moves(
        37, rows=2001, heads=4, head_dim=96, rotary_dim=72, dtype=dtype, max_position=1 << 15
    )
    check(fast_backend, moves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *testing.QUANTIZED], ids=str)
def test_functional_variant_gives_the_same(fast_backend, dtype):
    moves = random_moves(41, dtype=dtype, layout="heads_first").copy(fast_backend.device)
    x, row_in, _, *rest, _, _, _ = moves.arguments()
    out = torch.ops.tokendance.rope_rotate(x, row_in, *rest)
    expected = reference.rope_rotate(
        x.cpu(),
        *(item.cpu() if isinstance(item, torch.Tensor) else item for item in (row_in, *rest)),
    )
    assert out.is_contiguous()
    testing.assert_same_bits(out, expected)


# Quantized rows ---------------------------------------------------------------------------------


def conversion(seed, dtype, out_dtype, scales=True, heads=2, **options):
    """Moves between dtypes, with scales of what is quantized."""
    moves = random_moves(seed, dtype=dtype, out_dtype=out_dtype, heads=heads, **options)
    if scales and testing.is_quantized(dtype):
        moves.x_scale = random_scales(heads, seed)
    if scales and testing.is_quantized(out_dtype):
        moves.out_scale = random_scales(heads, seed + 1)
        if not testing.is_quantized(dtype):
            moves.out_scale = moves.out_scale / 10  # a few of what is stored are limited
    return moves


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("plain", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_fresh_rows_are_quantized_and_come_back(backend, dtype, plain, head_dim, interleaved):
    options = {"head_dim": head_dim, "interleaved": interleaved, "scale": 1.25}
    written = check(backend, conversion(1, plain, dtype, **options))
    exact = reference.exact_rotation(
        reference.gather_rows(written.x.cpu(), written.row_in.cpu()),
        (written.position_to - written.position_from).cpu(),
        written.cos.cpu(),
        written.sin.cpu(),
        interleaved,
        1.25,
    )
    elements = exact / written.out_scale.double().cpu()[:, None]
    moved = reference.gather_rows(written.out.cpu(), written.row_out.cpu())
    assert_within_half_a_step(moved, elements)
    check(backend, conversion(2, dtype, plain, **options))


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_rows_change_their_scales(backend, dtype):
    moves = conversion(3, dtype, dtype, destinations=3, skip=0.2, rows=11)
    check(backend, moves)
    moves.out_scale = moves.x_scale
    actual = check(backend, moves)
    stays = reference.gather_rows(moves.x, moves.row_in[:1])
    testing.assert_same_bits(reference.gather_rows(actual.out.cpu(), moves.row_out[0, :1]), stays)


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_conversions_without_scales_or_positions(backend, dtype):
    for pair in ((torch.float32, dtype), (dtype, torch.bfloat16)):
        check(backend, conversion(4, *pair, scales=False))
        moves = conversion(5, *pair, layout="padded", out_layout="heads_first", scale=1.5)
        moves.position_from = None
        check(backend, moves)
        moves.position_to = None  # copies are not scaled
        check(backend, moves)


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
def test_what_lies_beyond_the_largest_element_is_limited(backend, dtype):
    moves = conversion(6, torch.float32, dtype, rows=8)
    values = torch.tensor([0.0, -0.0, 1e-9, 1e30, torch.inf, -torch.inf, torch.nan, 1e-3])
    index = torch.randint(8, (8, 2, 64), generator=torch.Generator().manual_seed(6))
    moves.row_in, moves.position_from = torch.arange(8), None
    moves.position_to = None
    reference.scatter_rows(moves.x, moves.row_in, values[index])
    check(backend, moves)


def staying_and_turned(rows, out_dtype, **options):
    """Each of these rows to two places: where it stays and where it is turned."""
    count, heads, head_dim = rows.shape
    options |= {"rows": count, "heads": heads, "head_dim": head_dim, "dtype": rows.dtype}
    moves = random_moves(12, out_dtype=out_dtype, destinations=2, **options)
    moves.row_in, there = torch.arange(count), moves.position_from
    moves.position_to = torch.stack([there, (there + 7) % 100], dim=1)
    reference.scatter_rows(moves.x, moves.row_in, rows)
    return moves


def every_code(out_dtype, **options):
    return staying_and_turned(e4m3.every_code(), out_dtype, **options)


def scaled_codes(out_dtype, **options):
    rows, scale = e4m3.scaled_codes(out_dtype)
    moves = staying_and_turned(rows, out_dtype, **options)
    moves.x_scale = scale
    if out_dtype == E4M3:
        moves.out_scale = torch.ones_like(scale)
    return moves


def every_interval(dtype, **options):
    return staying_and_turned(e4m3.every_interval(dtype), E4M3, **options)


@pytest.mark.parametrize("out_dtype", [E4M3, *PLAIN], ids=str)
def test_every_element_in_every_lane(backend, out_dtype):
    any_nan = out_dtype != E4M3
    check(backend, every_code(out_dtype), any_nan=any_nan)
    check(backend, scaled_codes(out_dtype), any_nan=any_nan)


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_every_element_and_what_lies_between(backend, dtype):
    moves = every_interval(dtype)
    check(backend, moves)
    moves.out_scale = torch.tensor([1 - 2**-23, 1 + 2**-23])  # just beside what is halfway
    check(backend, moves)
    if dtype != torch.float32:
        bits = moves.x.view(torch.int16)
        infinity = torch.tensor(torch.inf, dtype=dtype).view(torch.int16)
        bits[moves.x.isnan()] = infinity + 1  # another NaN, of the fewest bits
        check(backend, moves)


@pytest.mark.parametrize("to", ["in", "out"])
@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 150),
    heads=st.sampled_from([1, 2, 3, 8]),
    head_dim=st.sampled_from(HEAD_DIMS),
    part=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    other=st.sampled_from([*PLAIN, None]),
    interleaved=st.booleans(),
    layout=st.sampled_from(testing.LAYOUTS),
    out_layout=st.sampled_from(testing.LAYOUTS),
    block_size=st.sampled_from([1, 8, 16, 32]),
    destinations=st.sampled_from([None, 1, 2, 5]),
    scale=st.sampled_from([1.0, 1.1]),
    scales=st.booleans(),
)
def test_random_quantized_moves(fast_backend, dtype, to, head_dim, part, other, **options):
    pair = (other or dtype, dtype)[:: 1 if to == "in" else -1]
    rotary_dim = int(head_dim * part) // 2 * 2
    options |= {"head_dim": head_dim, "rotary_dim": rotary_dim, "skip": 0.1, "max_position": 3000}
    check(fast_backend, conversion(options.pop("seed"), *pair, **options))
