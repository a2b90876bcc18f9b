import ml_dtypes
import numpy as np
import pytest
from ptxrun import RaceError

rng = np.random.default_rng
M32, M64 = 0xFFFFFFFF, (1 << 64) - 1


def s(v, b=32):
    v &= (1 << b) - 1
    return v - (1 << b) if v >> (b - 1) else v


def bfe(a, b, c, w, signed):  # PTX ISA pseudo-code
    pos, ln, msb = b & 0xFF, c & 0xFF, w - 1
    sbit = 0 if not signed or ln == 0 else a >> min(pos + ln - 1, msb) & 1
    d = 0
    for i in range(w):
        d |= ((a >> (pos + i) & 1) if (i < ln and pos + i <= msb) else sbit) << i
    return d


def bfi(a, b, c, d, w):
    pos, ln, f = c & 0xFF, d & 0xFF, b
    for i in range(ln):
        if pos + i < w:
            f = f & ~(1 << (pos + i)) | ((a >> i & 1) << (pos + i))
    return f


def prmt(a, b, c, mode=None):
    by = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    if mode is None:
        sel = [(c >> 4 * i) & 15 for i in range(4)]
    else:
        q = c & 3
        sel = {
            "f4e": [q, q + 1, q + 2, q + 3],
            "b4e": [q, (q - 1) % 8, (q - 2) % 8, (q - 3) % 8],
            "rc8": [q] * 4,
            "ecl": [max(q, i) for i in range(4)],
            "ecr": [min(q, i) for i in range(4)],
            "rc16": [2 * (q & 1), 2 * (q & 1) + 1] * 2,
        }[mode]
    r = 0
    for i, x in enumerate(sel):
        v = by[x & 7]
        if x & 8:
            v = 255 if v & 128 else 0
        r |= v << 8 * i
    return r


def test_bits(more):
    n = 600
    r = rng(0)
    a, b, c = (r.integers(0, 2**32, n).astype("u4") for _ in range(3))
    b[:400] = r.integers(0, 70, 400)
    c[:400] = r.integers(0, 70, 400)
    a[:8] = [0, 1, M32, 1 << 31, 255, 128, 300, 0x7FFFFFFF]
    o, q = np.zeros((34, n), "u4"), np.zeros((9, n), "u8")
    more.launch("4bits", 5, 128, [a, b, c, o, q, n])
    for i in range(n):
        x, y, z = int(a[i]), int(b[i]), int(c[i])
        nx = int(a[(i + 1) % n])
        sx, sy, sz = s(x), s(y), s(z)
        cat = y << 32 | x

        def bf(v):
            return v.bit_length() - 1 if v else M32

        def cl(v):
            return max(-(2**31), min(2**31 - 1, v))

        def by(v):
            return [(v >> 8 * j) & 255 for j in range(4)]

        ref = [
            bfe(x, y, z, 32, False),
            bfe(x, y, z, 32, True),
            bfi(x, nx, y, z, 32),
            (cat << (z & 31)) >> 32,
            cat >> (z & 31),
            (cat << min(z, 32)) >> 32,
            cat >> min(z, 32),
            prmt(x, y, z),
            bf(x),
            bf(x if sx >= 0 else ~x & M32),
            31 - bf(x) if x else M32,
            int(f"{x:032b}"[::-1], 2),
            x << y if y < 32 else 0,
            x >> min(y, 40),
            sx >> min(y, 31),
            cl(sx + sy),
            cl(sx - sy),
            (sx * sy) >> 32,
            ((x * y) >> 32) + z,
            abs(sx - sy) + z,
            *[prmt(x, y, z, m) for m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")],
            max(0, min(255, sx)),
            max(-128, min(127, sx)),
            s(x, 8),
            x if sz >= 0 else y,
            None,
            1 if sx < sy else 2,
            s(x, 16) * by(y)[0] + s(x >> 16, 16) * by(y)[1] + z,
            M32 if sx > sy else 0,
        ]
        l3 = 0
        for k in range(8):
            if 0x5B >> k & 1:
                l3 |= (x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z)
        ref[30] = l3
        for k, v in enumerate(ref):
            assert int(o[k, i]) == v & M32, (
                k,
                hex(x),
                hex(y),
                hex(z),
                hex(int(o[k, i])),
                hex(v & M32),
            )
        X, Y = x << 32 | y, z << 32 | x
        U = (X * Y + X - (Y << 64 | Y)) & ((1 << 128) - 1)
        p, w = y & 127, z & 127
        ref = [
            bfe(X, p, w, 64, False),
            bfe(X, p, w, 64, True),
            bfi(X, Y, p, w, 64),
            U,
            U >> 64,
            X + Y,
            X - Y,
            s(X, 64) >> min(p, 63),
            X << p if p < 64 else 0,
        ]
        for k, v in enumerate(ref):
            assert int(q[k, i]) == v & M64, (k, hex(X), hex(Y), p, w)


@pytest.mark.parametrize("W", [32, 8])
def test_shuffle_widths(more, W):
    n = 64
    x = rng(1).integers(0, 1000, n).astype("i4")
    o = np.zeros((28, n), "i4")
    more.launch(f"shufILi{W}E", 1, n, [x, o, n])
    k = 0
    for d in range(1, 40, 6):
        for mode in range(4):
            for i in range(n):
                w, l = i & ~31, i & 31
                seg = l & ~(W - 1)
                dd = d & 31
                j = [
                    l - dd if l - dd >= seg else l,
                    l + dd if l + dd < seg + W else l,
                    (l ^ dd) if (l ^ dd) < seg + W else l,
                    seg | (i * d) & (W - 1),
                ][mode]
                assert o[k, i] == x[w + j], (d, mode, i)
            k += 1


def test_half_masks(more):
    o = np.zeros(64, "i4")
    more.launch("halfmask", 1, 64, [o])
    for w in range(2):
        v = [32 * w + l + 100 * (l % 3) for l in range(16)]
        assert (o[32 * w : 32 * w + 16] == 2 * sum(v)).all()
        hi = 32 * w + 31
        assert (o[32 * w + 16 : 32 * w + 32 : 2] == hi).all()
        assert (o[32 * w + 17 : 32 * w + 32 : 2] == hi + 6).all()


def test_cooperative_groups(more):
    x = rng(2).integers(-50, 50, 64).astype("i4")
    o = np.zeros(4 * 64, "i4")
    more.launch("coop", 1, 64, [x, o])
    t = x.reshape(8, 8)
    r = o[:192].reshape(8, 8, 3)
    assert (r[..., 0] == t.sum(1)[:, None]).all()
    assert (r[..., 1] == t.max(1)[:, None]).all()
    assert (r[..., 2] == np.cumsum(t, 1) - t).all()
    for w in range(2):
        odd = [i for i in range(32 * w, 32 * w + 32) if x[i] & 1]
        assert [o[192 + i] for i in odd] == [100 * k + len(odd) for k in range(len(odd))]


def test_generic_addresses(more):
    g = np.zeros(256, "f4")
    more.launch("7genericPfi", 1, 64, [g, 64])
    t = np.arange(64)
    assert (g[:64] == np.where(t % 3 == 0, 10, 0)).all()
    assert (g[64:128] == np.where(t % 3 == 1, 14, 3)).all()
    l = np.where(t % 3 == 2, np.where(t & 1, 1201, 211), 201)
    assert (g[128:192] == l).all()
    assert (g[192:] == np.array([4, 1, 2])[t % 3]).all()


def test_cp_async_sizes(more):
    x = rng(3).integers(0, 256, 512).astype("u1")
    y = np.zeros(1024, "u1")
    sz = rng(4).integers(0, 17, 32).astype("i4")
    sz[:4] = [0, 16, 4, 8]
    more.launch("3cpa", 1, 32, [x, y, sz], race=True)
    a = x.reshape(32, 16).copy()
    for i in range(32):
        a[i, sz[i] :] = 0
    assert (y[:512] == a.reshape(-1)).all()
    assert (y[512:768] == x[:256]).all()
    assert (y[768:896].view("u2") == 0x7FFF).all()  # second group has not landed
    late = y[896:].reshape(32, 4)
    assert (late[1::2] == x[:128].reshape(32, 4)[1::2]).all()
    assert (late[::2].copy().view("u2") == 0x7FFF).all()


def test_small_types_3d(more):
    n = 190
    r = rng(5)
    a, b, c = (
        r.integers(-128, 128, n).astype("i1"),
        r.integers(0, 256, n).astype("u1"),
        r.integers(-3000, 3000, n).astype("i2"),
    )
    o, p, d = np.zeros(n, "i1"), np.zeros(n, "i2"), r.random((n, 2))
    d0 = d.copy()
    more.launch("5small", (2, 2, 2), (4, 3, 2), [a, b, c, o, p, d, n])
    A, B, C = a.astype("i4"), b.astype("i4"), c.astype("i4")
    assert (o == (A * B + C).astype("i1")).all()
    assert (p == (A * C).astype("i2") >> 3).all()
    np.testing.assert_allclose(d[:, 0], d0[:, 0] * d0[:, 1] + A, rtol=1e-14, atol=1e-13)
    np.testing.assert_allclose(d[:, 1], -d0[:, 1] / (B + 1.0))


def test_half_atomics(more, arch):
    h, b, q = np.zeros((2, 2), "f2"), np.zeros((1, 2), ml_dtypes.bfloat16), np.zeros(2, "f2")
    more.launch("halfatom", 1, 64, [h, b, q, 64])
    assert (h == [[32, 16], [32, 16]]).all()
    assert (b.astype("f4") == [[64, 128]]).all()
    assert q[0] == 16


@pytest.mark.parametrize("fast", [(), ("-use_fast_math",)])
def test_fast_math(load, arch, fast):
    m = load("more", arch, fast)
    n = 128
    x = rng(6).standard_normal(n).astype("f4")
    o = np.zeros((6, n), "f4")
    m.launch("5fastm", 1, n, [x, o, n])
    X = x.astype("f8")
    ref = [
        np.exp(X) / (1 + X * X),
        np.sin(X) / np.sqrt(abs(X)),
        np.tanh(X),
        np.sqrt(abs(X)) + X / 3,
        None,
        1 / X + np.log2(abs(X)),
    ]
    for k, v in enumerate(ref):
        if v is not None:
            np.testing.assert_allclose(o[k], v, rtol=1e-3 if k == 2 else 3e-6, atol=1e-5)
    assert (o[4] == 0).all() if fast else (o[4] != 0).any()


def test_work_queue(more):
    ctr, out = np.zeros(1, "i4"), np.zeros(40, "i4")
    more.launch("5queue", 3, 64, [ctr, out, 40], race=True)
    assert (out == [i * (i - 1) // 2 for i in range(40)]).all()
    assert ctr[0] == 43


def test_flag_spin(more):
    o = np.zeros(128, "i4")
    more.launch("5flags", 1, 64, [o])
    assert (o[:32] == 7).all()


@pytest.mark.parametrize("ml", [64, 8192])
def test_deep_divergence(more, ml):
    x = rng(7).integers(0, 30, 256).astype("i4")
    o = np.zeros(256, "i4")
    more.launch("4deep", 2, 128, [x, o, 256], max_lanes=ml)

    def fib(n):
        a, b = 0, 1
        for _ in range(n):
            a, b = b, a + b
        return a

    acc = np.zeros(256, int)
    for i in range(256):
        v = 0
        for a in range(x[i]):
            for b in range(a):
                if (a * b + i) % 7 == 3:
                    break
                if (a ^ b) & 1:
                    continue
                v += fib(b % 9)
            if v > 500:
                break
        acc[i] = v
    assert (o == acc + acc.reshape(-1, 2, 16)[:, ::-1].reshape(-1)).all()


def test_intra_warp_race(more):
    x, y = rng(8).integers(0, 99, 64).astype("i4"), np.zeros(64, "i4")
    more.launch("8warprace", 1, 64, [x, y, 3], race="warp")
    v = x.reshape(-1, 2)[:, ::-1].reshape(-1)
    assert (y == 2 * v + 1).all()
    more.launch("8warprace", 1, 64, [x, y, 0], race=True)  # not a cross-warp race
    for sync, kind in (
        (2, "read by warp.*write .other lane"),
        (1, "write by warp.*read .other lane"),
    ):
        with pytest.raises(RaceError, match=kind):
            more.launch("8warprace", 1, 64, [x, y, sync], race="warp")


@pytest.mark.parametrize("iters", [1, 2, 5, 8])
def test_warp_specialised(more, iters):
    x, y = rng(9).random((iters, 3, 32)).astype("f4"), np.zeros((4, 3), "f4")
    more.launch("5wspec", 4, 128, [x, y, iters], race="warp")
    a = np.zeros(3)
    for it in range(iters):
        a = a * 0.5 + x[it].sum(1)
    np.testing.assert_allclose(y, np.tile(a, (4, 1)), rtol=1e-5)


def test_reset(more):
    x = np.zeros(4, "f4")
    p = more.ptr(x)
    assert more.ptr(x) == p
    assert more.ptr(x[1:]) == p + 4
    more.reset()
    assert more.ptr(x) != p
