"""The reference against formulas that share nothing with it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tokendance import testing
from tokendance.device.rope import Rope
from tokendance.testing import reference

pytestmark = pytest.mark.usefixtures("one_thread")


def rounded_once(value: Fraction) -> np.float32:
    """The fp32 value nearest to a rational, ties to even."""
    near = np.float32(float(value))
    low, high = (np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf))
    return min(
        (low, near, high),
        key=lambda candidate: (
            abs(Fraction(float(candidate)) - value) if np.isfinite(candidate) else Fraction(10**60),
            int(candidate.view(np.int32)) & 1,
        ),
    )


def hard_sums() -> torch.Tensor:
    """Triples (a, b, c) whose sum lies at, or next to, the middle between two fp32 values."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(600, generator=generator) for _ in range(2))
    product = a.double() * b.double()
    nearly = -(product.float())  # cancels nearly everything
    tiny = torch.tensor([2.0**-60, -(2.0**-60), 2.0**-30, -(2.0**-30)]).repeat(150)
    halfway = 1 + 2.0**-23 * torch.randint(0, 99, (600,), generator=generator)
    # 2^-24 is half a unit in the last place of `halfway`. These products are that, and that and so
    # little less or more that fp64 cannot hold it beside 1.
    factors = torch.tensor(
        [
            (1.0, 1.0),
            (1 + 2.0**-16, 1 - 2.0**-16),
            (1 + 2896 * 2.0**-23, 1 - 2895 * 2.0**-23),
        ]
    ).repeat(200, 1)
    x, y = (factors * 2.0**-12).unbind(1)
    return torch.cat(
        [
            torch.stack([a, b, nearly], 1),
            torch.stack([a, b, torch.randn(600, generator=generator)], 1),
            torch.stack([x, y, halfway], 1),
            torch.stack([-x, y, halfway], 1),
            torch.stack([x, y, -halfway], 1),
            torch.stack([a * 2.0**-75, b * 2.0**-72, tiny * 2.0**-90], 1),  # subnormal results
        ]
    )


def test_fused_multiply_add_rounds_once():
    a, b, c = hard_sums().unbind(1)
    got = reference.fused_multiply_add(a, b, c).numpy()
    twice = (a.double() * b.double() + c.double()).float().numpy()
    differs = 0
    for i, (x, y, z) in enumerate(hard_sums().tolist()):
        wanted = rounded_once(Fraction(x) * Fraction(y) + Fraction(z))
        assert got[i] == wanted, (x, y, z)
        differs += twice[i] != wanted
    assert differs > 0, "no case in which rounding twice goes wrong"


def test_fused_multiply_add_of_special_values():
    inf, nan = torch.inf, torch.nan
    a = torch.tensor([inf, 0.0, nan, 3e38, 1.0, -0.0])
    b = torch.tensor([2.0, inf, 1.0, 3e38, -inf, 5.0])
    c = torch.tensor([1.0, 1.0, 1.0, 0.0, inf, -0.0])
    got = reference.fused_multiply_add(a, b, c)
    assert got.isnan().tolist() == [False, True, True, False, True, False]
    assert got[0] == inf
    assert got[3] == inf
    assert got[5] == 0
    assert got[5].signbit()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 34), (80, 2)])
def test_rotation_is_complex_multiplication(head_dim, rotary_dim, interleaved):
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    rope = Rope(frequency, 500, interleaved)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, head_dim, generator=generator, dtype=torch.float64)
    position = torch.randint(-499, 500, (40,), generator=generator)
    turn = torch.polar(torch.ones(()).double(), position[:, None] * frequency)[:, None]
    if interleaved:
        pairs = x[..., :rotary_dim].unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    else:
        half = rotary_dim // 2
        turned = torch.complex(x[..., :half], x[..., half:rotary_dim]) * turn
        turned = torch.cat([turned.real, turned.imag], dim=-1)
    expected = torch.cat([turned, x[..., rotary_dim:]], dim=-1)
    got = reference.exact_rotation(x, position, rope.cos, rope.sin, interleaved)
    assert (got - expected).abs().max() < 1e-6  # the tables are fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_moving_rounds_the_exact_rotation_once(dtype, interleaved):
    rope = Rope.default(64, 10000.0, 900, interleaved=interleaved)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 2, 64, generator=generator).to(dtype)
    shift = torch.randint(-899, 900, (200,), generator=generator)
    shift[:5] = 0
    moved = reference.move_rows(x, shift, rope.cos, rope.sin, interleaved)
    exact = reference.exact_rotation(x, shift, rope.cos, rope.sin, interleaved)
    testing.assert_same_bits(moved[:5], x[:5])
    # fp32 arithmetic before the rounding moves a few results over the edge of a rounding interval.
    agrees = (moved == exact.to(dtype)).double().mean()
    assert agrees > (0.6 if dtype == torch.float32 else 0.999)
    assert (moved.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_moving_there_and_back_is_one_composed_rotation():
    rope = Rope.default(128, 10000.0, 4000)
    x = torch.randn(50, 2, 128, dtype=torch.float64)
    a, b = torch.randint(0, 2000, (2, 50))
    there = reference.exact_rotation(x, a, rope.cos, rope.sin, False)
    both = reference.exact_rotation(there, b - a, rope.cos, rope.sin, False)
    once = reference.exact_rotation(x, b, rope.cos, rope.sin, False)
    assert (both - once).abs().max() < 2e-6


def materialised(case, agent, k_pool, v_pool):
    """An agent's cache, row by row: position -> (key moved to that position, value)."""
    round, size = case.round, case.round.extents.block_size
    cache = {}
    for use in range(case.filled.uses):
        if int(round.use_agent[use]) != agent:
            continue
        master = int(round.use_master[use])
        pages = round.master_pages[
            int(round.master_page_indptr[master]) : int(round.master_page_indptr[master + 1])
        ].tolist()
        for row in range(int(round.use_length[use])):
            mask = int(round.use_masks[int(round.use_page_indptr[use]) + row // size])
            if not (mask & 0xFFFFFFFF) >> row % size & 1:
                page, shift = pages[row // size], int(round.use_shift[use])
                key = rotate_one(k_pool[page, row % size], shift, case)
                position = int(round.use_delta[use]) + row
                assert position not in cache
                cache[position] = key, v_pool[page, row % size].double()
    first = int(round.own_page_indptr[agent])
    for row in range(int(round.own_length[agent])):
        page = int(round.own_pages[first + row // size])
        position = int(round.own_position[first * size + row])
        assert position not in cache
        cache[position] = k_pool[page, row % size].double(), v_pool[page, row % size].double()
    return cache


def rotate_one(key, shift, case):
    key, half = key.double().clone(), case.cos.shape[1]
    for i in range(half):
        c, s = case.cos[abs(shift), i].double(), case.sin[abs(shift), i].double()
        s = s if shift >= 0 else -s
        i, j = (2 * i, 2 * i + 1) if case.interleaved else (i, i + half)
        x, y = key[:, i].clone(), key[:, j].clone()
        key[:, i], key[:, j] = x * c - y * s, y * c + x * s
    return key


ROUNDS = {
    "plain": {},
    "interleaved": {"interleaved": True, "rotary_dim": 32},
    "repeat": {"repeat": True, "cut": True},
    "no_rope": {"rotary_dim": 0, "holes": True},
    "half": {"dtype": torch.float16, "block_size": 32, "masks": "leading"},
}


@pytest.mark.parametrize("kind", ROUNDS)
def test_attention_is_sdpa_on_the_materialised_cache(kind):
    case = (
        testing.random_round(5, rows=4, master_length=20, block_size=8)
        if kind == "plain"
        else (testing.random_round(5, rows=4, master_length=20, **ROUNDS[kind]))
    )
    k_pool, v_pool = case.k_pool[0], case.v_pool[0]
    for window in (0, 6):
        out, lse = reference.collective_attention(
            case.q, k_pool, v_pool, case.cos, case.sin, case.interleaved, case.round, 0.1, window
        )
        for row in case.real_rows.tolist():
            agent, position = int(case.round.row_agent[row]), int(case.round.row_position[row])
            cache = materialised(case, agent, k_pool, v_pool)
            seen = [p for p in cache if p <= position and (window == 0 or position - p < window)]
            if not seen:
                assert (out[row] == 0).all()
                assert (lse[row] == -math.inf).all()
                continue
            keys = torch.stack([cache[p][0] for p in seen], dim=1).repeat_interleave(2, dim=0)
            values = torch.stack([cache[p][1] for p in seen], dim=1).repeat_interleave(2, dim=0)
            query = rotate_one(case.q[row], position, case)[:, None]
            expected = torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, scale=0.1
            )
            torch.testing.assert_close(out[row], expected[:, 0], rtol=1e-9, atol=1e-9)
            score = (query * keys).sum(-1) * 0.1
            torch.testing.assert_close(lse[row], score.logsumexp(-1), rtol=1e-9, atol=1e-9)


def test_soft_cap_sinks_and_attention_factor():
    case = testing.random_round(8, agents=2, rows=4, rotary_dim=32)
    arguments = (case.k_pool[0], case.v_pool[0], case.cos, case.sin, False, case.round, 0.3)
    sinks = torch.tensor([0.5, -1.0, 3.0, -torch.inf])
    plain, lse = reference.collective_attention(case.q, *arguments)
    sunk, sunk_lse = reference.collective_attention(case.q, *arguments, sinks=sinks)
    assert torch.equal(lse, sunk_lse)
    share = (lse.exp() / (lse.exp() + sinks.double().exp())).nan_to_num()
    torch.testing.assert_close(sunk, plain * share[..., None])
    testing.assert_same_bits(sunk[:, 3], plain[:, 3])
    barely, _ = reference.collective_attention(case.q, *arguments, soft_cap=1e9)
    torch.testing.assert_close(barely, plain)
    _, capped = reference.collective_attention(case.q, *arguments, soft_cap=0.01)
    keys = (capped - reference.collective_attention(case.q * 0, *arguments)[1]).nan_to_num()
    assert 0 < keys.abs().max() <= 0.01
    scaled_q = case.q.clone()
    scaled_q[..., :32] *= 2
    by_hand, _ = reference.collective_attention(scaled_q, *arguments)
    scaled, _ = reference.collective_attention(case.q, *arguments, attention_factor=2.0)
    torch.testing.assert_close(scaled, by_hand)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.2, -2.0])])
def test_merging_parts_gives_the_whole(sinks):
    generator = torch.Generator().manual_seed(4)
    score = torch.randn(5, 2, 30, generator=generator, dtype=torch.float64)
    values = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    parts = score.split([1, 12, 17], dim=2)
    rows = values.split([1, 12, 17])
    outs = torch.stack([p.softmax(-1) @ v for p, v in zip(parts, rows, strict=True)])
    lses = torch.stack([p.logsumexp(-1) for p in parts])
    out, lse = reference.merge_states(outs, lses, sinks)
    torch.testing.assert_close(lse, score.logsumexp(-1))
    if sinks is not None:
        score = torch.cat([score, sinks.double()[None, :, None].expand(5, 2, 1)], dim=2)
        values = torch.cat([values, torch.zeros(1, 8, dtype=torch.float64)])
    torch.testing.assert_close(out, score.softmax(-1) @ values)


def test_merging_nothing_gives_nothing():
    for sinks in (None, torch.zeros(2)):
        for partials in (0, 1, 3):
            out, lse = reference.merge_states(
                torch.ones(partials, 4, 2, 8), torch.full((partials, 4, 2), -torch.inf), sinks
            )
            assert (out == 0).all()
            assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_encoding_what_was_restored_gives_the_same_mirrors(seed, dtype):
    case = testing.random_round(
        seed, agents=4, num_layers=2, dtype=dtype, room_for_all=True, repeat=True
    )
    tables = (case.cos, case.sin, case.interleaved)
    dense = testing.dense_cache(case, seed)
    reference.diff_restore(
        case.k_pool, case.v_pool, *tables, case.round, dense.slot_mapping, dense.k, dense.v
    )
    again = case.copy()
    again.round.use_masks[: case.filled.use_pages] = -1
    again.round.own_length.fill_(0)
    again.round.own_position.fill_(testing.ABSURD)
    own = case.round.own_pages[: case.filled.own_pages].long()
    for pool in again.k_pool + again.v_pool:
        pool[own] = torch.nan
    reference.diff_encode(
        dense.k,
        dense.v,
        dense.slot_mapping,
        case.length,
        again.k_pool,
        again.v_pool,
        *tables,
        again.round,
    )
    testing.assert_same_bits(again.round.buffer, case.round.buffer)
    for layer in range(2):
        testing.assert_same_storage(again.k_pool[layer], case.k_pool[layer])
        testing.assert_same_storage(again.v_pool[layer], case.v_pool[layer])


def test_deviation_by_hand():
    rope = Rope.default(64, 100.0, 20)
    fresh, cached = torch.randn(6, 2, 64), torch.randn(5, 2, 64)
    fresh_row = torch.tensor([[0, 1, -1], [5, -1, 2]])
    fresh_position = torch.tensor([[3, 9, 0], [3, 0, 12]], dtype=torch.int32)
    cached_row, cached_position = torch.tensor([4, 0, 1]), torch.tensor([3, 4, 19]).int()
    got = reference.key_deviation(
        fresh, fresh_row, fresh_position, cached, cached_row, cached_position, rope.cos, rope.sin
    )

    def distance(row, shift, into):
        angle = torch.tensor([shift])
        moved = reference.exact_rotation(fresh[row : row + 1], angle, rope.cos, rope.sin, False)
        return (moved[0] - cached[into].double()).square().sum()

    torch.testing.assert_close(got[0], distance(0, 0, 4) + distance(5, 0, 4))
    torch.testing.assert_close(got[1], distance(1, -5, 0))
    torch.testing.assert_close(got[2], distance(2, 7, 1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantizing_takes_the_nearest_element_and_ties_go_to_even(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    elements = codes.double()
    elements = elements[elements.isfinite()].unique()
    if dtype == torch.int8:
        elements = elements[1:]  # -128 has no opposite and is never made
    middles = (elements[1:] + elements[:-1]) / 2
    generator = torch.Generator().manual_seed(1)
    between = (torch.rand(4000, generator=generator, dtype=torch.float64) * 2 - 1) * 500
    small = between / 20000  # subnormal in e4m3
    x = torch.cat([elements, middles, between, small]).float()
    scale = torch.tensor([1.0, 0.25])
    got = reference.quantize_rows(x[:, None, None] * scale[:, None], scale, dtype)[..., 0].double()
    distance = (x.double()[:, None] - elements).abs()
    nearest = distance.min(dim=1).values
    for head in range(2):
        assert torch.equal((got[:, head] - x.double()).abs(), nearest)
    index = torch.searchsorted(elements, got[len(elements) : len(elements) + len(middles), 0])
    zero = int((elements == 0).nonzero())
    assert ((index - zero) % 2 == 0).all()  # magnitudes are consecutive codes
    beyond = torch.tensor([[[torch.inf, -torch.inf, 1e30, torch.nan]]])
    ends = reference.quantize_rows(beyond, None, dtype).float()[0, 0]
    largest = float(elements.max())
    assert ends[:3].tolist() == [largest, -largest, largest]
    assert ends[3].isnan() if dtype.is_floating_point else ends[3] == 0
