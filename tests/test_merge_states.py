"""`merge_states` against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokendance import testing
from tokendance.testing import reference

OPERATOR = "merge_states"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_DIMS = [64, 80, 96, 128, 256]
# Outputs are weighted means of values that the dtype holds exactly; only the last rounding counts.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
pytestmark = pytest.mark.usefixtures("one_thread")


def partials(seed, count, rows, heads, head_dim, dtype, blind=0.0, spread=3.0):
    """Partial outputs and LSEs; a share `blind` of them saw nothing."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(count, rows, heads, head_dim, generator=generator)
    lse = torch.randn(count, rows, heads, generator=generator) * spread
    nothing = torch.rand(count, rows, heads, generator=generator) < blind
    lse[nothing] = -torch.inf
    out[nothing] = 0
    return out.to(dtype), lse


def unaligned(tensor):
    """The same, one element behind the start of its storage."""
    storage = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
    return storage[1:].view(tensor.shape).copy_(tensor)


def expectation(partial_out, partial_lse, sinks=None):
    return reference.merge_states(partial_out, partial_lse, sinks)


def check(backend, partial_out, partial_lse, sinks=None, expected=None, place=torch.clone):
    """Compares with the reference; ``place`` puts the output somewhere."""
    expected_out, expected_lse = expected or expectation(partial_out, partial_lse, sinks)
    to = testing.StorageCopies(backend.device)
    out = torch.full(partial_out.shape[1:], torch.nan, dtype=partial_out.dtype)
    out = to(place(out))
    lse = to(torch.full(partial_lse.shape[1:], torch.nan))
    sinks = None if sinks is None else to(sinks)
    backend.merge_states_out(to(partial_out), to(partial_lse), sinks, out, lse)
    scale = max(1.0, float(partial_out.float().abs().max())) if partial_out.numel() else 1.0
    error = (out.cpu().double() - expected_out).abs()
    assert not error.isnan().any()
    assert not error.numel() or error.max() <= ROUNDING[partial_out.dtype] * scale
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-6, atol=1e-6)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no_sinks", "sinks"])
def test_merging(backend, dtype, head_dim, with_sinks):
    out, lse = partials(head_dim, 5, 7, 3, head_dim, dtype, blind=0.3)
    check(backend, out, lse, torch.tensor([0.5, -2.0, 4.0]) if with_sinks else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no_sinks", "sinks"])
def test_results_that_are_not_aligned(backend, dtype, with_sinks):
    out, lse = partials(7, 4, 6, 3, 80, dtype, blind=0.3)
    sinks = torch.tensor([0.5, -2.0, 4.0]) if with_sinks else None
    check(backend, out, lse, sinks, place=unaligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partials_that_are_not_aligned_are_for_the_cpu(backend, dtype):
    out, lse = partials(7, 4, 6, 3, 80, dtype, blind=0.3)
    if backend.name == "cpu":
        check(backend, unaligned(out), lse)
        return
    if backend.name == "ptx":
        backend.merge_states_out(unaligned(out), lse, None, out[0].clone(), lse[0].clone())
        assert backend.launched.num_launches == 0
        return
    with pytest.raises(RuntimeError, match="partial_out: expected memory at a multiple of 16"):
        check(backend, unaligned(out), lse)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 33])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_sizes(backend, count, rows):
    check(backend, *partials(1, count, rows, 2, 64, torch.float32, blind=0.2), torch.zeros(2))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.0, torch.inf * -1])])
def test_rows_that_nothing_was_seen_for(backend, sinks):
    out, lse = check(backend, *partials(2, 3, 9, 2, 64, torch.float16, blind=1.0), sinks)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def check_broken(backend, dtype, broken, others, place=torch.clone):
    """Rows with one such LSE are not rows that nothing was seen for."""
    lse = torch.full((5, 5, 1), others)
    lse[torch.arange(5), torch.arange(5)] = broken
    to = testing.StorageCopies(backend.device)
    out = to(place(torch.zeros(5, 1, 64, dtype=dtype)))
    merged_lse = to(torch.zeros(5, 1))
    partial_out = to(torch.ones(5, 5, 1, 64, dtype=dtype))
    backend.merge_states_out(partial_out, to(lse), None, out, merged_lse)
    assert out.isnan().all()
    assert merged_lse.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("others", [0.0, -torch.inf])
def test_an_lse_that_is_no_number_makes_results_that_are_none(backend, dtype, broken, others):
    check_broken(backend, dtype, broken, others)


def test_one_partial_passes_through(backend):
    out, lse = partials(3, 1, 6, 2, 128, torch.bfloat16)
    merged, merged_lse = check(backend, out, lse)
    testing.assert_same_bits(merged, out[0])
    torch.testing.assert_close(merged_lse, lse[0], rtol=1e-6, atol=1e-6)


def halfway_partials(dtype, count=5):
    """In each row two partials saw something, and with equal weight: any two of five, or of more
    each with the 32nd after it. Their mean lies halfway between neighbours of the dtype: it is
    the even one."""
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    if count > 5:
        pairs = [(a, (a + 32) % count) for a in range(count)]
    out = torch.full((count, len(pairs), 1, 64), torch.nan, dtype=torch.float64)
    lse = torch.full((count, len(pairs), 1), -torch.inf)
    steps = torch.arange(1, 65).double()
    for row, (a, b) in enumerate(pairs):
        out[a, row] = 1 + steps * torch.finfo(dtype).eps
        out[b, row] = 0.25 + torch.finfo(dtype).eps / 2
        lse[[a, b], row] = 0.25
    return out.nan_to_num(0.0).to(dtype), lse, out.nanmean(dim=0).to(dtype)


def check_halfway(backend, partial_out, partial_lse, mean, place=torch.clone):
    merged, _ = check(backend, partial_out, partial_lse, place=place)
    testing.assert_same_bits(merged, mean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [5, 256])
def test_halfway_values_go_to_the_even_neighbour(backend, dtype, count):
    check_halfway(backend, *halfway_partials(dtype, count))


def broken_outputs(dtype, broken):
    """Five partials, of which another is broken in each row: one that saw nothing, then one that
    did, and one so far below the others that it weighs nothing. With it, whether it counts."""
    out, lse = partials(9, 5, 15, 2, 64, dtype)
    rows = torch.arange(15)
    out[rows % 5, rows] = broken
    lse[rows[:5] % 5, rows[:5]] = -torch.inf
    lse[rows[10:] % 5, rows[10:]] = -500.0
    return out, lse, rows >= 5


def check_broken_outputs(backend, partial_out, partial_lse, counts, place=torch.clone):
    to = testing.StorageCopies(backend.device)
    out = to(place(torch.zeros(partial_out.shape[1:], dtype=partial_out.dtype)))
    lse = to(torch.zeros(partial_lse.shape[1:]))
    backend.merge_states_out(to(partial_out), to(partial_lse), None, out, lse)
    assert torch.equal(out.cpu().isnan().all(-1).all(-1), counts)
    assert torch.equal(out.cpu().isnan().any(-1).any(-1), counts)
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_output_counts_unless_it_saw_nothing(backend, dtype):
    check_broken_outputs(backend, *broken_outputs(dtype, torch.nan))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9, 64, 65, 200])
def test_any_partial_may_be_the_highest(backend, count):
    """Far above the others: the exponential of anything but the difference would overflow."""
    rows = 40 if count < 60 else 3
    check(backend, *partials(8, count, rows, 3, 64, torch.float32, blind=0.2, spread=200.0))


@pytest.mark.parametrize("middle", [-500.0, 0.0, 500.0])
def test_large_lse_do_not_overflow(backend, middle):
    out, lse = partials(4, 4, 6, 2, 64, torch.float32, spread=40.0)
    check(backend, out, lse + middle, torch.tensor([middle, -middle]))


def test_a_sink_far_above_leaves_nothing(backend):
    out, lse = partials(5, 3, 5, 2, 64, torch.float32)
    merged, merged_lse = check(backend, out, lse, torch.tensor([200.0, -200.0]))
    assert (merged[:, 0] == 0).all()
    assert merged_lse.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 20),
    rows=st.integers(0, 60),
    heads=st.integers(1, 9),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(DTYPES),
    blind=st.sampled_from([0.0, 0.1, 0.9]),
    with_sinks=st.booleans(),
)
def test_random_partials(fast_backend, seed, heads, with_sinks, **options):
    out, lse = partials(seed, heads=heads, **options)
    check(fast_backend, out, lse, torch.linspace(-2, 3, heads) if with_sinks else None)


def test_functional_variant_gives_the_same(fast_backend):
    out, lse = partials(6, 3, 8, 4, 64, torch.bfloat16, blind=0.2)
    sinks = torch.zeros(4)
    expected = check(fast_backend, out, lse, sinks)
    arguments = (item.to(fast_backend.device) for item in (out, lse, sinks))
    for got, want in zip(torch.ops.tokendance.merge_states(*arguments), expected, strict=True):
        testing.assert_same_bits(got, want)


def test_results_may_not_lie_in_the_partials():
    partial_out, partial_lse = torch.randn(3, 4, 2, 64), torch.randn(3, 4, 2)
    out, lse = torch.empty(4, 2, 64), torch.empty(4, 2)
    for name, results in (("out", (partial_out[1], lse)), ("lse", (out, partial_lse[2]))):
        with pytest.raises(RuntimeError, match=f"{name}: expected memory apart"):
            torch.ops.tokendance.merge_states_out(partial_out, partial_lse, None, *results)
