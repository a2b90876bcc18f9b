"""Threads among one another: divergence, collectives, barriers, locks and flags."""

import numpy as np
import pytest
from ptxrun import Module

rng = np.random.default_rng


# ---- divergence ----
def test_nested_loops(kernels):
    n, repetitions = 777, 3
    x, steps = rng(1).integers(1, 5000, n).astype("i4"), np.zeros(n, "i4")
    kernels.launch("collatz", (n + 95) // 96, 96, [x, steps, n, repetitions])
    for i in range(n):
        total = 0
        for r in range(repetitions):
            value = int(x[i]) + r
            while value != 1 and total <= 2000:
                value = 3 * value + 1 if value & 1 else value >> 1
                total += 1
        assert steps[i] == total


def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


@pytest.mark.parametrize("max_lanes", [64, 8192])
def test_break_and_continue(instructions, max_lanes):
    n = 256
    x, out = rng(7).integers(0, 30, n).astype("i4"), np.zeros(n, "i4")
    instructions.launch("4deep", 2, 128, [x, out, n], max_lanes=max_lanes)
    sums = np.zeros(n, int)
    for i in range(n):
        for a in range(x[i]):
            for b in range(a):
                if (a * b + i) % 7 == 3:
                    break
                if (a ^ b) & 1:
                    continue
                sums[i] += fibonacci(b % 9)
            if sums[i] > 500:
                break
    assert (out == sums + sums.reshape(-1, 2, 16)[:, ::-1].reshape(-1)).all()


# ---- collectives ----
@pytest.mark.parametrize("width", [32, 8])
def test_shuffle_widths(instructions, width):
    n = 64
    x = rng(1).integers(0, 1000, n).astype("i4")
    out = np.zeros((28, n), "i4")
    instructions.launch(f"shufILi{width}E", 1, n, [x, out, n])
    rows = iter(out)
    i = np.arange(n)
    lane, warp = i & 31, i & ~31
    first = lane & ~(width - 1)
    for by in range(1, 40, 6):
        distance = by & 31  # shuffles take it modulo the warp's size
        sources = [
            np.where(lane - distance >= first, lane - distance, lane),
            np.where(lane + distance < first + width, lane + distance, lane),
            np.where(lane ^ distance < first + width, lane ^ distance, lane),
            first | (i * by) & (width - 1),
        ]
        for mode, source in zip(("up", "down", "xor", "idx"), sources, strict=True):
            assert (next(rows) == x[warp + source]).all(), (by, mode)


def test_half_masks(instructions):
    out = np.zeros(64, "i4")
    instructions.launch("halfmask", 1, 64, [out])
    for first in (0, 32):
        lanes = range(16)
        total = 2 * sum(first + lane + 100 * (lane % 3) for lane in lanes)
        assert (out[first : first + 16] == total).all()
        assert (out[first + 16 : first + 32 : 2] == first + 31).all()
        assert (out[first + 17 : first + 32 : 2] == first + 31 + 6).all()


def test_cooperative_groups(instructions):
    x, out = rng(2).integers(-50, 50, 64).astype("i4"), np.zeros(4 * 64, "i4")
    instructions.launch("coop", 1, 64, [x, out])
    tiles = x.reshape(8, 8)
    total, largest, before = np.moveaxis(out[:192].reshape(8, 8, 3), 2, 0)
    assert (total == tiles.sum(1)[:, None]).all()
    assert (largest == tiles.max(1)[:, None]).all()
    assert (before == np.cumsum(tiles, 1) - tiles).all()
    for first in (0, 32):
        odd = [i for i in range(first, first + 32) if x[i] & 1]
        assert [out[192 + i] for i in odd] == [100 * k + len(odd) for k in range(len(odd))]


# ---- barriers ----
def test_named_barriers(kernels):
    x, y = rng(15).integers(0, 99, 128).astype("i4"), np.zeros(224, "i4")
    kernels.launch("named", 1, 96, [x, y], race=True)
    assert (y[:128].reshape(4, 32) == 2 * x.reshape(4, 32)[:, ::-1]).all()
    assert (y[128:] == 48 * 100 + 10).all()  # 48 odd threads; one is 3; not all are below 95


@pytest.mark.parametrize("iterations", [1, 2, 5, 8])
def test_producer_and_consumers(instructions, iterations):
    x, y = rng(9).random((iterations, 3, 32)).astype("f4"), np.zeros((4, 3), "f4")
    instructions.launch("5wspec", 4, 128, [x, y, iterations], race="warp")
    want = np.zeros(3)
    for part in x:
        want = want * 0.5 + part.sum(1)
    np.testing.assert_allclose(y, np.tile(want, (4, 1)), rtol=1e-5)


# ---- waiting without barriers ----
@pytest.mark.parametrize("max_lanes", [64, 8192])
def test_spin_lock(kernels, max_lanes):
    x, last = np.zeros(1, "i4"), np.zeros(1, "i4")
    kernels.launch("locks", 3, 64, [x, last], max_lanes=max_lanes)
    assert x[0] == 192
    assert last[0] == 192


def test_flag(instructions):
    out = np.zeros(128, "i4")
    instructions.launch("5flags", 1, 64, [out])
    assert (out[:32] == 7).all()


def test_work_queue(instructions):
    taken, out = np.zeros(1, "i4"), np.zeros(40, "i4")
    instructions.launch("5queue", 3, 64, [taken, out, 40], race=True)
    assert (out == [i * (i - 1) // 2 for i in range(40)]).all()
    assert taken[0] == 43  # each of three blocks takes one more and stops


# ---- order ----
@pytest.mark.parametrize("max_lanes", [32, 8192])
@pytest.mark.parametrize(("last_block_first", "last"), [(False, 6), (True, 0)])
def test_order_of_blocks(max_lanes, last_block_first, last):
    """All blocks write one word: the one that comes last is seen."""
    ptx = """
    .version 7.0
    .target sm_80
    .address_size 64
    .visible .entry all(.param .u64 out)
    {
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %ctaid.x;
    st.global.u32 [%rd1], %r1;
    ret;
    }
    """
    out = np.full(1, -1, "i4")
    Module(ptx).launch("all", 7, 32, [out], max_lanes=max_lanes, last_block_first=last_block_first)
    assert out[0] == last
