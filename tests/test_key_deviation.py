"""`key_deviation` against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance import testing
from tokendance.device.rope import Rope
from tokendance.testing import reference

OPERATOR = "key_deviation"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_DIMS = [64, 80, 96, 128, 256]
pytestmark = pytest.mark.usefixtures("one_thread")


def random_keys(
    seed,
    *,
    agents=3,
    tokens=7,
    heads=2,
    head_dim=64,
    rotary_dim=None,
    dtype=torch.float32,
    interleaved=False,
    layout="separate",
    cached_layout="separate",
    block_size=8,
    fresh_position=True,
    lacking=0.2,
    scale=1.0,
    max_position=100,
):
    """Arguments of the operator but for `out`: fresh keys of agents that see the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim

    def rows_of(count, layout):
        pages = (count + 3) // block_size + 1
        rows = testing.pools(pages, block_size, heads, head_dim, dtype, layout)[0]
        index = torch.randperm(pages * block_size, generator=generator)[:count]
        content = torch.randn(count, heads, head_dim, generator=generator).to(dtype)
        reference.scatter_rows(rows, index, content)
        return rows, index

    fresh, fresh_row = rows_of(agents * tokens, layout)
    cached, cached_row = rows_of(tokens, cached_layout)
    fresh_row = fresh_row.view(agents, tokens)
    fresh_row[torch.rand(agents, tokens, generator=generator) < lacking] = -1
    if fresh_position:
        fresh_position = torch.randint(max_position, (agents, tokens), generator=generator).int()
    else:
        fresh_position = None
    cached_position = torch.randint(max_position, (tokens,), generator=generator).int()
    if tokens >= 2:  # a token that no agent has, and one that does not move
        fresh_row[:, 0] = -1
        if fresh_position is not None:
            fresh_position[:, 1] = cached_position[1]
    if rotary_dim:
        rope = Rope.default(head_dim, 10000.0, max_position, rotary_dim, interleaved)
        cos, sin = rope.cos, rope.sin
    else:
        cos = sin = torch.empty(max_position, 0)
    return [
        *(fresh, fresh_row, fresh_position, cached, cached_row, cached_position),
        *(cos, sin, interleaved, scale),
    ]


def run(backend, arguments):
    to = testing.StorageCopies(backend.device)
    out = to(torch.full((arguments[4].numel() + 2,), torch.nan))
    here = [to(item) if isinstance(item, torch.Tensor) else item for item in arguments]
    backend.key_deviation_out(*here, out[:-2])
    assert out[-2:].isnan().all()
    return out[:-2].cpu()


def expectation(arguments):
    return reference.key_deviation(*arguments)


def check(backend, arguments, expected=None):
    expected = expectation(arguments) if expected is None else expected
    got = run(backend, arguments)
    assert not got.isnan().any()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-8)
    return got


@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deviation(backend, dtype, head_dim, interleaved):
    arguments = random_keys(head_dim, head_dim=head_dim, dtype=dtype, interleaved=interleaved)
    got = check(backend, arguments)
    assert got[0] == 0  # no agent has it
    assert (got[1:] > 1).any()


@pytest.mark.parametrize("rotary_dim", [0, 2, 34, 64])
@pytest.mark.parametrize("fresh_position", [False, True], ids=["fresh", "rotated"])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_partial_rotation_and_scale(backend, rotary_dim, fresh_position, scale):
    check(
        backend,
        random_keys(
            1,
            head_dim=80,
            rotary_dim=rotary_dim,
            fresh_position=fresh_position,
            scale=scale,
            dtype=torch.float16,
        ),
    )


@pytest.mark.parametrize("cached_layout", testing.LAYOUTS)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides(backend, layout, cached_layout):
    check(
        backend,
        random_keys(2, layout=layout, cached_layout=cached_layout, dtype=torch.bfloat16, heads=3),
    )


@pytest.mark.parametrize("agents", [0, 1, 2, 33])
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_sizes(backend, agents, tokens):
    got = check(backend, random_keys(3, agents=agents, tokens=tokens, heads=1))
    assert got.shape == (tokens,)
    assert agents or (got == 0).all()


@pytest.mark.parametrize("heads", [1, 5, 16])
def test_heads(backend, heads):
    check(backend, random_keys(4, heads=heads, head_dim=96, dtype=torch.float16))


def equal_keys(**options):
    """Arguments of which every fresh key but the first token's is the cached one."""
    arguments = random_keys(5, agents=2, lacking=0.0, **options)
    fresh, fresh_row, fresh_position, cached, cached_row, cached_position = arguments[:6]
    fresh_row[:, 0] = fresh_row[:, 1]
    fresh_position[:] = cached_position
    for agent in range(2):
        rows = reference.gather_rows(cached, cached_row)
        reference.scatter_rows(fresh, fresh_row[agent, 1:], rows[1:])
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_keys_at_equal_positions_have_no_deviation(backend, dtype):
    check_equal(backend, equal_keys(dtype=dtype))


def equal_keys_that_stay(**options):
    """Such keys, at other positions, and angles by which nothing turns."""
    arguments = equal_keys(**options)
    arguments[2][:] = arguments[5] + torch.tensor([[-1], [1]])
    arguments[2].clamp_(0)
    arguments[6].fill_(1.0)
    arguments[7].fill_(0.0)
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turning_by_nothing_leaves_keys_as_they_are(backend, dtype):
    check_equal(backend, equal_keys_that_stay(dtype=dtype))


def check_equal(backend, arguments):
    assert (check(backend, arguments)[1:] == 0).all()


def test_moved_keys_have_hardly_any_deviation(backend):
    """Fresh keys that are the cached ones moved differ by roundings only."""
    arguments = random_keys(6, agents=2, lacking=0.0, head_dim=128)
    fresh, fresh_row, fresh_position, cached, cached_row, cached_position, cos, sin = arguments[:8]
    for agent in range(2):
        moved = reference.move_rows(
            reference.gather_rows(cached, cached_row),
            fresh_position[agent] - cached_position,
            cos,
            sin,
            False,
        )
        reference.scatter_rows(fresh, fresh_row[agent, 1:], moved[1:])
    assert check(backend, arguments).max() < 1e-9


def test_twice_gives_the_same_bits(backend):
    arguments = random_keys(7, agents=9, tokens=12, head_dim=96)
    testing.assert_same_bits(run(backend, arguments), run(backend, arguments))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    agents=st.integers(0, 12),
    tokens=st.integers(0, 80),
    heads=st.sampled_from([1, 2, 3, 8]),
    head_dim=st.sampled_from(HEAD_DIMS),
    part=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    layout=st.sampled_from(testing.LAYOUTS),
    cached_layout=st.sampled_from(testing.LAYOUTS),
    block_size=st.sampled_from([1, 16]),
    fresh_position=st.booleans(),
    lacking=st.sampled_from([0.0, 0.5, 1.0]),
    scale=st.sampled_from([1.0, 1.3]),
)
def test_random_keys(fast_backend, seed, head_dim, part, **options):
    rotary_dim = int(head_dim * part) // 2 * 2
    check(
        fast_backend,
        random_keys(seed, head_dim=head_dim, rotary_dim=rotary_dim, max_position=3000, **options),
    )


def test_functional_variant_gives_the_same(fast_backend):
    arguments = random_keys(8, dtype=torch.float16)
    here = [
        item.to(fast_backend.device) if isinstance(item, torch.Tensor) else item
        for item in arguments
    ]
    testing.assert_same_bits(
        torch.ops.tokendance.key_deviation(*here), run(fast_backend, arguments)
    )
