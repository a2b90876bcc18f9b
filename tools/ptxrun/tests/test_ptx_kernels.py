import math
import struct

import ml_dtypes
import numpy as np
import ptxrun
import pytest
from ptxrun import PtxError, RaceError

bf16 = ml_dtypes.bfloat16
rng = np.random.default_rng


@pytest.mark.parametrize("max_lanes", [32, 256, 8192])
def test_reduce(basic, max_lanes):
    x = rng(0).standard_normal(5000).astype("f4")
    out = np.zeros(1, "f4")
    st = basic.launch("reduce", 5, 256, [x, out, 5000], race=True, max_lanes=max_lanes)
    np.testing.assert_allclose(out[0], x.sum(dtype="f8"), rtol=1e-4)
    assert st.global_load_bytes == 5000 * 4 + 5 * 4  # + atomics
    assert st.by_class["shfl"] == 5 * 8 * 5 + 5 * 5


def test_collatz(basic):
    n, reps = 777, 3
    x = rng(1).integers(1, 5000, n).astype("i4")
    s = np.zeros(n, "i4")
    basic.launch("collatz", (n + 95) // 96, 96, [x, s, n, reps])
    ref = np.zeros(n, int)
    for i in range(n):
        t, stop = 0, False
        for r in range(reps):
            v = int(x[i]) + r
            while v != 1 and not stop:
                v = 3 * v + 1 if v & 1 else v >> 1
                t += 1
                stop = t > 2000
        ref[i] = t
    assert (s == ref).all()


@pytest.mark.parametrize("n", [7, 33, 64, 100])
def test_early_exit(basic, n):
    x = rng(2).integers(0, 1000, (5, n)).astype("i4")
    y = np.zeros_like(x)
    basic.launch("early", 5, 128, [x, y, n], shared_bytes=4 * n, race=True)
    v = x[:, ::-1]
    assert (y == np.roll(v * 2, -1, axis=1) + v).all()


def test_compact(basic, arch):
    N = 512
    x = rng(3).integers(-50, 50, N).astype("i4")
    out, cnt, ex = np.full(N, -999, "i4"), np.zeros(1, "i4"), np.zeros(4 * N, "u4")
    basic.launch("compact", 4, 128, [x, out, cnt, ex])
    k = (x > 0).sum()
    assert cnt[0] == k
    assert sorted(out[:k]) == sorted(x[x > 0])
    assert (out[k:] == -999).all()
    w = x.reshape(-1, 32)
    m = np.array(
        [
            [sum(1 << j for j in range(32) if (r[j] & 3) == (r[i] & 3)) for i in range(32)]
            for r in w
        ],
        "u4",
    )
    assert (ex[:N] == m.reshape(-1)).all()
    assert (ex[N : 2 * N].reshape(-1, 32) == ((w & 255).max(1) + 32000)[:, None]).all()
    b = np.array([sum(1 << j for j in range(32) if r[j] > 0) for r in w], "u4")
    assert (ex[2 * N : 3 * N] == np.where(w > 0, b[:, None], 0).reshape(-1)).all()
    assert (ex[3 * N :] == 0xFFFFFFFF).all()


def test_atomics(basic):
    n = 300
    x = rng(4).integers(0, 10000, n).astype("i4")
    a = np.zeros(64 + n, "i4")
    a[20], a[21] = 10**9, -(10**9)
    u, l, f = np.zeros(8, "u4"), np.zeros(1, "u8"), np.zeros(8, "f4")
    basic.launch("atomics", 3, 128, [a, u, l, f, x, n], race=True)
    assert (a[:16] == np.bincount(x & 15, minlength=16)).all()
    assert a[16] == max((x[i * 128 : (i + 1) * 128] & 1023).max() for i in range(3))
    assert a[20] == x.min()
    assert a[21] == x.max()
    assert a[22] == n
    assert sorted(a[64:]) == list(range(n))
    assert u[0] == n % 10
    assert l[0] == x.sum()
    assert f[0] == n
    assert f[1] == n / 2
    assert u[1] == np.bitwise_or.reduce(np.uint32(1) << (x & 31).astype("u4"))
    assert u[2] == np.bitwise_xor.reduce(x)
    assert u[4] in x


def test_rope(basic):
    rows, D = 37, 64
    x = rng(5).standard_normal((rows, D)).astype(bf16)
    ang = rng(6).random((rows, D // 2)).astype("f4")
    cs = np.stack([np.cos(ang), np.sin(ang)], -1).astype("f4")
    y = np.zeros_like(x)
    st = basic.launch("rope", (rows * D // 8 + 63) // 64, 64, [x, cs, y, rows, D // 8])
    a, b = x[:, 0::2].astype("f4"), x[:, 1::2].astype("f4")
    c, s = cs[..., 0], cs[..., 1]
    ref = np.empty_like(x)
    ref[:, 0::2] = (a.astype("f8") * c - (b * s).astype("f8")).astype("f4").astype(bf16)
    ref[:, 1::2] = (a.astype("f8") * s + (b * c).astype("f8")).astype("f4").astype(bf16)
    d = np.abs(ref.view("i2").astype(int) - y.view("i2").astype(int))
    assert (d <= 1).all()
    assert (d > 0).mean() < 0.01
    assert st.global_store_bytes == rows * D * 2
    big = [v for v in st.global_instr.values() if "st.global" in v["text"]]
    assert len(big) == 1
    assert big[0]["sectors"] == big[0]["ideal"]


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_softmax(basic, threads):
    x = rng(7).standard_normal((6, 333)).astype("f4") * 3
    y = np.zeros_like(x)
    basic.launch("softmax", 6, threads, [x, y, 333, 0.7], race=True)
    z = np.exp((x.astype("f8") - x.max(1, keepdims=True)) * 0.7)
    np.testing.assert_allclose(y, z / z.sum(1, keepdims=True), rtol=3e-5)


def test_struct(basic):
    n = 200
    ins = [rng(i).random(n).astype("f4") for i in range(4)]
    out = np.zeros(n, "f4")
    a = struct.pack("<5Qif4i", *[basic.ptr(q) for q in ins], basic.ptr(out), n, 2.5, 1, 2, 3, 4)
    a += b"\0" * (-len(a) % 8)
    basic.launch("structk", 2, 128, [a])
    i = np.arange(n)
    ref = np.stack(ins)[i & 3, i] * np.float32(2.5) + ((i >> 2) & 3) + 1
    np.testing.assert_allclose(out, ref, rtol=1e-6)
    with pytest.raises(PtxError, match="bytes"):
        basic.launch("structk", 2, 128, [a + b"x"])


@pytest.mark.parametrize(
    ("name", "dt", "k", "tol"),
    [
        ("axpyIfLi2E", "f4", 2, 1e-6),
        ("axpyIdLi3E", "f8", 3, 1e-14),
        ("axpyI6__halfLi1E", "f2", 1, 2e-3),
        ("axpyI13__nv_bfloat16Li1E", bf16, 1, 2e-2),
    ],
)
def test_templates(basic, name, dt, k, tol):
    x, y = rng(8).random(100).astype(dt), rng(9).random(100).astype(dt)
    ref = y.astype("f8") + k * 1.5 * x.astype("f8")
    a = np.array(1.5, dt) if np.dtype(dt).itemsize == 2 else 1.5
    basic.launch(name, 1, 128, [x, y, a, 100])
    np.testing.assert_allclose(y.astype("f8"), ref, rtol=tol)


def test_big_dynamic_shared(basic):
    n = 25000
    x, y = rng(10).random(n).astype("f4"), np.zeros(n, "f4")
    basic.launch("bigsmem", 1, 256, [x, y, n], shared_bytes=4 * n, race=True)
    assert (y == x[::-1]).all()
    with pytest.raises(PtxError, match="out-of-bounds shared store"):
        basic.launch("bigsmem", 1, 256, [x, y, n], shared_bytes=4 * n - 16)
    with pytest.raises(PtxError, match="shared memory exceed"):
        basic.launch("bigsmem", 1, 256, [x, y, n], shared_bytes=300000)


def _s(v, bits):
    v &= (1 << bits) - 1
    return v - (1 << bits) if v >> (bits - 1) else v


def _div(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def _rem(a, b):
    return a - _div(a, b) * b


def _byte_perm(x, y, s):
    b = [(x >> (8 * i)) & 255 for i in range(4)] + [(y >> (8 * i)) & 255 for i in range(4)]
    return sum(b[(s >> (4 * i)) & 7] << (8 * i) for i in range(4))


def test_ints(basic):
    n = 400
    r = rng(11)
    a = r.integers(-(2**31), 2**31, n).astype("i4")
    b = r.integers(-(2**31), 2**31, n).astype("i4")
    a[:20] = r.integers(-20, 20, 20)
    b[:30] = r.integers(-5, 6, 30)
    b[40:60] = a[40:60]
    a[60], b[61] = 0, 0
    K = 31
    o, l = np.zeros((K, n), "i4"), np.zeros((8, n), "i8")
    basic.launch("ints", 4, 128, [a, b, o, l, n])
    M = 0xFFFFFFFF
    for i in range(n):
        x, y = int(a[i]), int(b[i])
        ux, uy = x & M, y & M

        def by(v):
            return [_s(v >> (8 * j), 8) for j in range(4)]

        def s24(v):
            return _s(v, 24)

        ffs = (ux & -ux).bit_length()
        sel = ux & 0x7777
        ref = [
            x + y,
            x - y,
            x * y,
            (x * y) >> 32,
            (ux * uy) >> 32,
            _div(x, y or 1),
            _rem(x, y or 1),
            ux // (uy | 1),
            ux % (uy | 1),
            32 - ux.bit_length(),
            bin(ux).count("1"),
            int(f"{ux:032b}"[::-1], 2),
            ffs,
            x >> (uy & 31),
            ux >> (uy & 31),
            x << (uy & 31),
            ((uy << 32 | ux) << 5) >> 32,
            (uy << 32 | ux) >> (ux & 31),
            _byte_perm(ux, uy, 0x3715),
            _byte_perm(ux, uy, sel),
            min(x, y),
            max(ux, uy),
            abs(x),
            (x & y) | (~x & 0x0F0F0F0F) ^ y,
            sum(p * q for p, q in zip(by(x), by(y), strict=False)) + 7,
            s24(x) * s24(y),
            abs(x - y) + 3,
            (ux >> 5) & 0x3F,
            _s(x, 16),
            _s(y >> 3, 8),
            5 if x == y else 6 if x < y else 7,
        ]
        for k, v in enumerate(ref):
            assert int(o[k, i]) == _s(v, 32), (k, x, y)
        lx, ly = _s(x * y, 64), _s((y << 32) ^ x, 64)
        m64 = (1 << 64) - 1
        ulx, uly = lx & m64, ly & m64
        ref = [
            lx + ly,
            lx * ly,
            _div(ly, lx | 1),
            uly % ((lx | 1) & m64),
            ly >> (ux & 63),
            (lx * ly) >> 64,
            (ulx * uly) >> 64,
            64 - uly.bit_length() + 100 * bin(uly).count("1"),
        ]
        for k, v in enumerate(ref):
            assert int(l[k, i]) == _s(v, 64), (k, lx, ly)


def test_floats(basic):
    n = 500
    r = rng(12)
    a = (r.standard_normal(n) * 4).astype("f4")
    b = (r.standard_normal(n) * 4).astype("f4")
    a[:4] = [np.nan, np.inf, 1e-40, 0.0]
    a[4:8] = [2.5, -3.5, 0.5, 1e6]
    o, q, d = np.zeros((33, n), "f4"), np.zeros((12, n), "i4"), np.zeros((8, n), "f8")
    basic.launch("floats", 4, 128, [a, b, o, q, d, n])
    A, B = a.astype("f8"), b.astype("f8")
    f = np.float32
    erf = np.array([math.erf(v) for v in A])
    with np.errstate(all="ignore"):
        ref = [
            a + b,
            a * b,
            a / b,
            (A * B + A).astype(f),
            np.sqrt(abs(a)),
            1 / np.sqrt(abs(A)),
            1 / a,
            np.fmin(a, b),
            np.fmax(a, b),
            np.exp2(A),
            np.log2(abs(B)),
            np.exp(B),
            np.log(abs(A)),
            np.sin(A),
            np.cos(B),
            np.tanh(A),
            np.floor(a),
            np.ceil(b),
            np.rint(a),
            np.trunc(b),
            np.copysign(a, b),
            np.sin(A),
            np.exp(B),
            erf,
            abs(A) ** B,
            np.fmod(A, B),
            None,
            None,
            None,
            a.astype("f2").astype(f),
            None,
            a.astype(bf16).astype(f),
            np.clip(np.where(np.isnan(a), 0, a), 0, 1),
        ]
        tol = {
            3: 1e-7,
            5: 3e-7,
            9: 3e-7,
            10: 1e-6,
            11: 1e-6,
            12: 1e-6,
            13: 1e-6,
            14: 1e-6,
            15: 2e-6,
            21: 3e-6,
            22: 2e-6,
            23: 2e-6,
            24: 1e-5,
            25: 1e-6,
        }
        for k, v in enumerate(ref):
            if v is not None:
                g = (
                    ~((k in (13, 15, 21)) & (abs(A) > 1e5))
                    if k in (13, 15, 21)
                    else np.ones(n, bool)
                )
                np.testing.assert_allclose(
                    o[k][g],
                    v.astype(f)[g],
                    rtol=tol.get(k, 0),
                    atol=2e-6 if k in (13, 14, 10, 12, 21) else 0,
                    err_msg=f"float op {k}",
                )
        fin = np.isfinite(A)
        S = (A + B)[fin]
        assert (abs(o[26][fin].astype("f8")) <= abs(S)).all()
        assert (abs(o[26][fin] - S) <= abs(S) * 2.4e-7).all()
        assert (o[27][fin].astype("f8") >= (A * B)[fin]).all()
        assert (o[28][fin].astype("f8") <= (A * B + B)[fin] + 1e-15).all()
        assert (abs(o[30]) <= abs(b)).all()
        assert (abs(o[30] - b) <= abs(b) * 1e-3).all()

        def sat(v, lo, hi):
            return np.where(np.isnan(v), 0, np.clip(v, lo, hi)).astype("i8").astype("i4")

        I = (-(2**31), 2**31 - 1)
        qr = [
            sat(np.trunc(A), *I),
            sat(np.rint(B), *I),
            np.where(np.isnan(A), 0, np.clip(np.trunc(abs(A)), 0, 2**32 - 1))
            .astype("i8")
            .astype("u4")
            .view("i4"),
            sat(np.ceil(A), *I),
            sat(np.floor(B), *I),
            np.isnan(a),
            a < b,
            ~(a >= b),
            sat(np.trunc((a * f(1e12)).astype("f8")), *I),
            a.view("i4"),
            np.trunc((b * f(1000)).astype("f8")).astype("i8").astype("i4"),
            None,
        ]
        for k, v in enumerate(qr):
            if v is not None:
                ok = slice(None) if k != 9 else ~np.isnan(a)
                assert (q[k][ok] == np.asarray(v).astype("i4")[ok]).all(), k
        dr = [
            A * B + A,
            np.sqrt(abs(A)) / B,
            np.exp(B),
            np.rint(A * 3.7),
            None,
            A * B + 1e-9,
            np.sin(A),
            abs(A) ** B,
        ]
        for k, v in enumerate(dr):
            if v is not None:
                np.testing.assert_allclose(
                    d[k], v, rtol=1e-13, atol=1e-14, err_msg=f"double op {k}"
                )
        assert (d[4][4:] == np.trunc(A[4:] * 1e5)).all()


def test_packed(basic):
    n = 300
    r = rng(13)
    h = [(r.standard_normal((n, 2)) * 2).astype("f2") for _ in range(2)]
    c = [(r.standard_normal((n, 2)) * 2).astype(bf16) for _ in range(2)]
    o, p = np.zeros((15, n, 2), "f2"), np.zeros((10, n, 2), bf16)
    basic.launch("packed", 3, 128, [h[0], h[1], o, c[0], c[1], p, n])
    x, y = h
    X, Y = x.astype("f8"), y.astype("f8")
    fma = (X * Y + X).astype("f2")
    ref = [
        x + y,
        x * y,
        fma,
        x - y,
        np.maximum(x, y),
        np.minimum(x, y),
        -x,
        abs(y),
        np.exp2(X).astype("f2"),
        (x > y).astype("f2"),
        None,
        np.stack([x[:, 1], y[:, 0]], 1),
        np.maximum(fma, np.float16(0)),
        (1 / X).astype("f2"),
        np.stack([np.exp2(X[:, 0]), np.log2(abs(Y[:, 1]))], 1).astype("f2"),
    ]
    for k, v in enumerate(ref):
        if v is not None:
            np.testing.assert_allclose(
                o[k].astype("f4"),
                v.astype("f4"),
                rtol=2e-3 if k in (8, 13, 14) else 0,
                atol=1e-3 if k in (14,) else 0,
                err_msg=f"half op {k}",
            )
    np.testing.assert_allclose(o[10].astype("f4"), (X / Y).astype("f4"), rtol=2e-3)
    u, v = c
    U, V = u.astype("f4"), v.astype("f4")
    fm = U.astype("f8") * V + U
    ref = [
        U + V,
        U * V,
        fm,
        U - V,
        np.maximum(U, V),
        np.minimum(U, V),
        -U,
        abs(V),
        (U < V).astype("f4"),
        np.stack([U[:, 1], V[:, 0]], 1),
    ]
    for k, w in enumerate(ref):
        e = w.astype(bf16)
        bad = p[k] != e
        assert bad.mean() <= (0.002 if k == 2 else 0), f"bf16 op {k}"


def test_calls_switch_const(basic):
    n = 150
    x = rng(14).random(n).astype("f4")
    y, z = np.zeros(n, "f4"), np.zeros(n, "i4")
    basic.launch("calls", 2, 96, [x, y, z, n])
    pk = [
        lambda v: v + 1,
        lambda v: v * 3,
        lambda v: v - 7,
        lambda v: v ^ 0x55,
        lambda v: v << 2,
        lambda v: ~v,
        lambda v: v % 7,
        lambda v: v // 3,
        lambda v: -v,
        lambda v: 99,
        lambda v: 99,
    ]
    for i in range(n):
        loc = [1 + ((k + i) & 7) for k in range(8)]
        ref = sum(loc[k] * float(x[i]) ** k for k in range((i & 7) + 1)) + loc[i & 7]
        assert abs(y[i] - ref) < 1e-4 * ref
        assert z[i] == pk[i % 11](i) + 5
    assert basic.symbol("dcount").view("i4")[0] == 6
    basic.symbol("ctab").view("f4")[:] = 0
    basic.launch("calls", 2, 96, [x, y, z, n])
    assert (y == 0).all()


def test_named_barriers(basic):
    x, y = rng(15).integers(0, 99, 128).astype("i4"), np.zeros(224, "i4")
    basic.launch("named", 1, 96, [x, y], race=True)
    assert (y[:128].reshape(4, 32) == 2 * x.reshape(4, 32)[:, ::-1]).all()
    assert (y[128:] == 48 * 100 + 10).all()


@pytest.mark.parametrize("max_lanes", [64, 8192])
def test_spin_lock(basic, max_lanes):
    x, last = np.zeros(1, "i4"), np.zeros(1, "i4")
    basic.launch("locks", 3, 64, [x, last], max_lanes=max_lanes)
    assert x[0] == 192
    assert last[0] == 192


# ---- planted bugs ---------------------------------------------------------
def test_race_missing_barrier(basic):
    x, y = rng(16).random(128).astype("f4"), np.zeros(128, "f4")
    basic.launch("racyPKfPfi", 1, 128, [x, y, 1], race=True)
    assert (y == x[::-1]).all()
    with pytest.raises(RaceError, match=r"conflicts with write by warp"):
        basic.launch("racyPKfPfi", 1, 128, [x, y, 0], race=True)
    st = basic.launch("racyPKfPfi", 1, 128, [x, y, 0], race="report")
    assert len(st.races) >= 1
    assert "shared byte" in st.races[0]


def test_race_in_loop(basic):
    y = np.zeros(64, "f4")
    basic.launch("racy_loop", 1, 64, [y, 4, 1], race=True)
    assert (y == 6).all()
    with pytest.raises(RaceError, match="conflicts with read"):
        basic.launch("racy_loop", 1, 64, [y, 4, 0], race=True)


def test_oob(basic):
    x, y = np.zeros(256, "f4"), np.zeros(256, "f4")
    basic.launch("3oobPKfPfi", 2, 128, [x, y, 0])
    with pytest.raises(
        PtxError,
        match=r"oob.*out-of-bounds global load of 4 bytes.*PTX line \d+.*block \(1,0,0\) thread \(127,0,0\), address 0x",
    ):
        basic.launch("3oobPKfPfi", 2, 128, [x, y, 1])
    with pytest.raises(PtxError, match=r"block \(0,0,0\) thread \(0,0,0\)"):
        basic.launch("3oobPKfPfi", 2, 128, [x, y, -1])
    y.flags.writeable = False
    m2 = ptxrun.Module(basic.text)
    with pytest.raises(PtxError, match="read-only"):
        m2.launch("3oobPKfPfi", 2, 128, [x, y, 0])
    with pytest.raises(PtxError, match="out-of-bounds shared store"):
        basic.launch("oobs", 1, 64, [np.zeros(64, "f4"), 1])


def test_null_pointer(basic):
    with pytest.raises(PtxError, match="null pointer"):
        basic.launch("3oobPKfPfi", 1, 32, [0, np.zeros(32, "f4"), 0])


def test_misaligned(basic):
    with pytest.raises(PtxError, match="misaligned 16-byte load"):
        basic.launch("misalign", 1, 4, [np.zeros(128, "u1"), np.zeros((4, 4), "f4")])


def test_divergent_barrier(basic):
    with pytest.raises(PtxError, match="aligned barrier from different places"):
        basic.launch("divbar", 1, 32, [np.zeros(4, "i4")])


def test_deadlock(basic):
    with pytest.raises(PtxError, match="deadlock"):
        basic.launch("deadbar", 1, 96, [np.zeros(96, "i4")])


def test_poisoned_shared(basic):
    y = np.zeros(64, "f4")
    basic.launch("uninit", 1, 64, [y])
    assert np.isnan(y[5])
    assert (np.delete(y, 5) == 1).all()


# ---- statistics -------------------------------------------------------------
@pytest.mark.parametrize(("s", "sec"), [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors(basic, s, sec):
    x, y = rng(17).random(32 * 32).astype("f4"), np.zeros(32, "f4")
    st = basic.launch("strided", 1, 32, [x, y, s])
    ld = [v for v in st.global_instr.values() if v["text"].startswith("ld.global")]
    assert len(ld) == 1
    assert ld[0]["sectors"] == sec
    assert ld[0]["ideal"] == 4
    assert (y == x[::s][:32]).all()


@pytest.mark.parametrize(("s", "deg"), [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts(basic, s, deg):
    st = basic.launch("5banksPfi", 1, 64, [np.zeros(64, "f4"), s], shared_bytes=64 * 4 * s)
    for v in st.shared_instr.values():
        assert v["phases"] == 2
        assert v["wavefronts"] == 2 * deg


@pytest.mark.parametrize(("s", "deg"), [(1, 1), (2, 2), (3, 1), (8, 8), (9, 1)])
def test_bank_conflicts_16(basic, s, deg):
    st = basic.launch("banks16", 1, 32, [np.zeros((32, 4), "f4"), s], shared_bytes=32 * 16 * s)
    for v in st.shared_instr.values():
        assert v["phases"] == 4
        assert v["wavefronts"] == 4 * deg


def test_unsupported_is_named():
    t = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k() {
 .reg .b64 %rd<2>;
 mbarrier.init.shared.b64 [%rd1], 3;
 ret;
}"""
    with pytest.raises(ptxrun.UnsupportedError, match=r"mbarrier.init.shared.b64.*line 6"):
        ptxrun.Module(t).launch("k", 1, 32, [])
