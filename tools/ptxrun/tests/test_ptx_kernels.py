"""Ordinary kernels end to end: results, and what the counters say about them."""

import struct

import ml_dtypes
import numpy as np
import pytest
from ptxrun import Module, PtxError

bf16 = ml_dtypes.bfloat16
rng = np.random.default_rng


@pytest.mark.parametrize("max_lanes", [32, 256, 8192])
def test_reduce(kernels, max_lanes):
    x, out = rng(0).standard_normal(5000).astype("f4"), np.zeros(1, "f4")
    stats = kernels.launch("reduce", 5, 256, [x, out, 5000], race=True, max_lanes=max_lanes)
    np.testing.assert_allclose(out[0], x.sum(dtype="f8"), rtol=1e-4)
    assert stats.global_load_bytes == 5000 * 4 + 5 * 4  # every block's atomic reads too
    assert stats.by_class["shfl"] == 5 * 8 * 5 + 5 * 5


@pytest.mark.parametrize("n", [7, 33, 64, 100])
def test_early_exit(kernels, n):
    x = rng(2).integers(0, 1000, (5, n)).astype("i4")
    y = np.zeros_like(x)
    kernels.launch("early", 5, 128, [x, y, n], shared_bytes=4 * n, race=True)
    mirrored = x[:, ::-1]
    assert (y == np.roll(mirrored * 2, -1, axis=1) + mirrored).all()


def test_compact(kernels):
    n = 512
    x = rng(3).integers(-50, 50, n).astype("i4")
    out, count, extra = np.full(n, -999, "i4"), np.zeros(1, "i4"), np.zeros((4, n), "u4")
    kernels.launch("compact", 4, 128, [x, out, count, extra])
    kept = (x > 0).sum()
    assert count[0] == kept
    assert sorted(out[:kept]) == sorted(x[x > 0])
    assert (out[kept:] == -999).all()

    warps = x.reshape(-1, 32)
    bit = np.uint32(1) << np.arange(32, dtype="u4")
    same = (warps[:, :, None] & 3) == (warps[:, None, :] & 3)
    matched, reduced, active, everyone = extra.reshape(4, -1, 32)
    assert (matched == (same * bit).sum(2)).all()
    assert (reduced == (warps & 255).max(1, keepdims=True) + 32 * 1000).all()
    positive = ((warps > 0) * bit).sum(1, keepdims=True)
    assert (active == np.where(warps > 0, positive, 0)).all()
    assert (everyone == 0xFFFFFFFF).all()


def test_rope(kernels):
    rows, dim = 37, 64
    x = rng(5).standard_normal((rows, dim)).astype(bf16)
    angle = rng(6).random((rows, dim // 2)).astype("f4")
    cos_sin = np.stack([np.cos(angle), np.sin(angle)], -1).astype("f4")
    y = np.zeros_like(x)
    blocks = (rows * dim // 8 + 63) // 64
    stats = kernels.launch("rope", blocks, 64, [x, cos_sin, y, rows, dim // 8])
    a, b = x[:, 0::2].astype("f8"), x[:, 1::2].astype("f8")
    cos, sin = cos_sin[..., 0], cos_sin[..., 1]
    want = np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(rows, dim)
    want = want.astype("f4").astype(bf16)
    steps = np.abs(want.view("i2").astype(int) - y.view("i2").astype(int))
    assert steps.max() <= 1
    assert (steps > 0).mean() < 0.01
    assert stats.global_store_bytes == rows * dim * 2
    [stores] = [c for c in stats.global_instr.values() if "st.global" in c["text"]]
    assert stores["sectors"] == stores["ideal"]
    read, _, written = (stats.buffers[kernels.ptr(array)] for array in (x, cos_sin, y))
    assert (read["load_bytes"], read["store_bytes"]) == (x.nbytes, 0)
    assert (written["load_bytes"], written["store_bytes"]) == (0, y.nbytes)
    assert sum(counters["sectors"] for counters in stats.buffers.values()) == stats.sectors
    positions = {instruction.position for instruction in kernels.instructions("rope")}
    assert stats.executed <= positions
    kernels.reset()
    alone = kernels.launch("rope", 1, 64, [x[:1], cos_sin[:1], y[:1], 0, dim // 8])
    assert alone.executed < stats.executed  # all threads are beyond the last row


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_softmax(kernels, threads):
    x = rng(7).standard_normal((6, 333)).astype("f4") * 3
    y = np.zeros_like(x)
    kernels.launch("softmax", 6, threads, [x, y, 333, 0.7], race=True)
    weights = np.exp((x.astype("f8") - x.max(1, keepdims=True)) * 0.7)
    np.testing.assert_allclose(y, weights / weights.sum(1, keepdims=True), rtol=3e-5)


def test_struct_by_value(kernels):
    n = 200
    inputs, out = [rng(i).random(n).astype("f4") for i in range(4)], np.zeros(n, "f4")
    pointers = [kernels.ptr(array) for array in (*inputs, out)]
    args = struct.pack("<5Qif4i", *pointers, n, 2.5, 1, 2, 3, 4)
    args += b"\0" * (-len(args) % 8)
    kernels.launch("structk", 2, 128, [args])
    i = np.arange(n)
    want = np.stack(inputs)[i & 3, i] * np.float32(2.5) + ((i >> 2) & 3) + 1
    np.testing.assert_allclose(out, want, rtol=1e-6)
    with pytest.raises(PtxError, match="bytes"):
        kernels.launch("structk", 2, 128, [args + b"x"])


@pytest.mark.parametrize(
    ("name", "dtype", "times", "tolerance"),
    [
        ("axpyIfLi2E", "f4", 2, 1e-6),
        ("axpyIdLi3E", "f8", 3, 1e-14),
        ("axpyI6__halfLi1E", "f2", 1, 2e-3),
        ("axpyI13__nv_bfloat16Li1E", bf16, 1, 2e-2),
    ],
)
def test_templates(kernels, name, dtype, times, tolerance):
    x, y = rng(8).random(100).astype(dtype), rng(9).random(100).astype(dtype)
    want = y.astype("f8") + times * 1.5 * x.astype("f8")
    factor = np.array(1.5, dtype) if np.dtype(dtype).itemsize == 2 else 1.5
    kernels.launch(name, 1, 128, [x, y, factor, 100])
    np.testing.assert_allclose(y.astype("f8"), want, rtol=tolerance)


def test_calls_tables_and_constants(kernels):
    n = 150
    x = rng(14).random(n).astype("f4")
    y, z = np.zeros(n, "f4"), np.zeros(n, "i4")
    kernels.launch("calls", 2, 96, [x, y, z, n])
    for i in range(n):
        local = [1 + ((k + i) & 7) for k in range(8)]
        want = sum(local[k] * float(x[i]) ** k for k in range((i & 7) + 1)) + local[i & 7]
        assert abs(y[i] - want) < 1e-4 * want
        picks = [i + 1, i * 3, i - 7, i ^ 0x55, i << 2, ~i, i % 7, i // 3, -i, 99, 99]
        assert z[i] == picks[i % 11] + 5
    assert kernels.symbol("dcount").view("i4")[0] == 6
    kernels.symbol("ctab").view("f4")[:] = 0
    kernels.launch("calls", 2, 96, [x, y, z, n])
    assert (y == 0).all()


def test_large_dynamic_shared(kernels):
    n = 25000
    x, y = rng(10).random(n).astype("f4"), np.zeros(n, "f4")
    kernels.launch("bigsmem", 1, 256, [x, y, n], shared_bytes=4 * n, race=True)
    assert (y == x[::-1]).all()
    with pytest.raises(PtxError, match="out-of-bounds shared store"):
        kernels.launch("bigsmem", 1, 256, [x, y, n], shared_bytes=4 * n - 16)
    with pytest.raises(PtxError, match="shared memory exceed"):
        kernels.launch("bigsmem", 1, 256, [x, y, n], shared_bytes=300000)


# ---- counters ----
@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors(kernels, stride, sectors):
    x, y = rng(17).random(32 * 32).astype("f4"), np.zeros(32, "f4")
    stats = kernels.launch("strided", 1, 32, [x, y, stride])
    [loads] = [c for c in stats.global_instr.values() if c["text"].startswith("ld.global")]
    assert loads["sectors"] == sectors
    assert loads["ideal"] == 4
    assert (y == x[::stride][:32]).all()


@pytest.mark.parametrize(("stride", "degree"), [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts(kernels, stride, degree):
    args = [np.zeros(64, "f4"), stride]
    stats = kernels.launch("5banksPfi", 1, 64, args, shared_bytes=64 * 4 * stride)
    for counters in stats.shared_instr.values():
        assert counters["phases"] == 2
        assert counters["wavefronts"] == 2 * degree


@pytest.mark.parametrize(("stride", "degree"), [(1, 1), (2, 2), (3, 1), (8, 8), (9, 1)])
def test_bank_conflicts_of_16_bytes(kernels, stride, degree):
    args = [np.zeros((32, 4), "f4"), stride]
    stats = kernels.launch("banks16", 1, 32, args, shared_bytes=32 * 16 * stride)
    for counters in stats.shared_instr.values():
        assert counters["phases"] == 4
        assert counters["wavefronts"] == 4 * degree


def test_a_thread_is_followed(kernels):
    """The ways of all threads together are what all threads executed."""
    n = 40
    x, steps = rng(4).integers(1, 500, n).astype("i4"), np.zeros(n, "i4")
    stats = [
        kernels.launch("collatz", 1, n, [x, steps, n, 1], follow=thread) for thread in range(n)
    ]
    assert sum(len(each.path) for each in stats) == stats[0].thread_instructions
    instructions = kernels.instructions("collatz")
    assert instructions[stats[0].path[-1]].opcode in ("ret", "exit")
    longest = np.argsort([len(each.path) for each in stats], kind="stable")
    assert (np.diff(steps[longest]) >= 0).all()


def test_a_launch_that_waits_for_the_one_before():
    """Launches follow one another here, so there is nothing to wait for."""
    text = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry dependent(.param .u64 out) {
  .reg .b64 %rd<2>;
  ld.param.u64 %rd1, [out];
  griddepcontrol.wait;
  st.global.u32 [%rd1], 7;
  griddepcontrol.launch_dependents;
  ret;
}
"""
    out = np.zeros(1, "u4")
    Module(text).launch("dependent", 1, 1, [out])
    assert out[0] == 7
