"""Vectorised arithmetic helpers used by the generated code (all operate on 1-D arrays of lanes)."""

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64

_T32 = u32(0x7FFFFF)


def ftz(x):
    tiny = np.finfo(x.dtype).tiny if x.dtype != f16 else f16(6.104e-05)
    s = np.abs(x) < tiny
    return np.where(s, np.copysign(x.dtype.type(0), x), x)


def sat(x):
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


# ---- rounding f64 -> f32 ------------------------------------------------------------------
def d2f(x, mode="rn"):
    y = np.asarray(x).astype(f32)
    if mode == "rn":
        return y
    d = y.astype(f64)
    if mode == "rz":
        bad = np.abs(d) > np.abs(x)
        return np.where(bad, np.nextafter(y, f32(0)), y)
    if mode == "rm":
        return np.where(d > x, np.nextafter(y, f32(-np.inf)), y)
    if mode == "rp":
        return np.where(d < x, np.nextafter(y, f32(np.inf)), y)
    raise ValueError(mode)


def _odd(s, e):
    """Round-to-odd fix-up: s = fl(a+b) in f64 with error term e -> sticky low bit."""
    bits = s.view(u64) if isinstance(s, np.ndarray) else np.asarray(s).view(u64)
    fix = (e != 0) & np.isfinite(s) & ((bits & u64(1)) == 0)
    toward = np.where((e > 0), np.inf, -np.inf)
    return np.where(fix, np.nextafter(s, toward), s)


def fma_f32(a, b, c, mode="rn"):
    """Exactly rounded fma in f32 (f64 sum; ties are re-examined through the TwoSum error)."""
    a, b, c = np.asarray(a), np.asarray(b), np.asarray(c)
    p = a.astype(f64) * b
    s = p + c
    if mode == "rn":
        t = np.atleast_1d(s).view(u64) & u64(0x1FFFFFFF)
        small = np.abs(s) < 1.2e-38
        if not ((t == u64(0x10000000)) | small).any():
            return s.astype(f32)
    c = c.astype(f64)
    bb = s - p
    e = (p - (s - bb)) + (c - bb)
    s = _odd(s, e)
    return d2f(s, mode)


def add_f32(a, b, mode):
    a, b = np.asarray(a).astype(f64), np.asarray(b).astype(f64)
    s = a + b
    bb = s - a
    e = (a - (s - bb)) + (b - bb)
    return d2f(_odd(s, e), mode)


def mul_f32(a, b, mode):
    return d2f(np.asarray(a).astype(f64) * b, mode)


def div_f32(a, b, mode="rn"):
    q = np.asarray(a, f32) / b
    if mode == "rn":
        return q
    a, b = np.asarray(a).astype(f64), np.asarray(b).astype(f64)
    return d2f(a / b, mode)


def sqrt_f32(a, mode="rn"):
    return np.sqrt(a) if mode == "rn" else d2f(np.sqrt(np.asarray(a).astype(f64)), mode)


_LD = np.longdouble


def fma_f64(a, b, c, mode="rn"):
    """f64 fma: Dekker product + long double sum (exact product; error below 2^-63 relative of the sum)."""
    a, b, c = np.asarray(a), np.asarray(b), np.asarray(c)
    p = a * b
    with np.errstate(all="ignore"):
        sp = f64(134217729.0)
        ah = a * sp
        ah = ah - (ah - a)
        al = a - ah
        bh = b * sp
        bh = bh - (bh - b)
        bl = b - bh
        e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
        ok = np.isfinite(p) & np.isfinite(e)
        s = p + c
        bb = s - p
        e2 = (p - (s - bb)) + (c - bb)
        r = (s.astype(_LD) + (e2.astype(_LD) + e)).astype(f64)
    return np.where(ok & np.isfinite(s), r, s)


def rint(x, mode):
    if mode == "rni":
        return np.rint(x)
    if mode == "rzi":
        return np.trunc(x)
    if mode == "rmi":
        return np.floor(x)
    if mode == "rpi":
        return np.ceil(x)
    raise ValueError(mode)


_IR = {
    i8: (-128, 127),
    u8: (0, 255),
    i16: (-32768, 32767),
    u16: (0, 65535),
    i32: (-(2**31), 2**31 - 1),
    u32: (0, 2**32 - 1),
    i64: (-(2**63), 2**63 - 1),
    u64: (0, 2**64 - 1),
}


def f2i(x, mode, dt):
    src64 = x.dtype == f64
    y = rint(x.astype(f64), mode)
    lo, hi = _IR[dt]
    nan = np.isnan(y)
    y = np.where(nan, 0.0, y)
    big, small = y >= float(hi), y <= float(lo)
    z = np.where(big | small, 0.0, y)
    r = z.astype(i64).astype(dt) if dt is not u64 else _f2u64(z)
    r = np.where(big, dt(hi), np.where(small, dt(lo), r))
    if nan.any():
        if src64 or dt in (i64, u64):
            nv = (
                dt(1 << 63)
                if dt is u64
                else (
                    dt(-(2**63))
                    if dt is i64
                    else dt(0)
                    if not src64
                    else np.asarray(1 << (8 * np.dtype(dt).itemsize - 1), u64).astype(dt)
                )
            )
        else:
            nv = dt(0)
        r = np.where(nan, nv, r)
    return r


def _f2u64(z):
    h = z >= 9223372036854775808.0
    return np.where(
        h,
        (np.where(h, z - 9223372036854775808.0, 0)).astype(i64).astype(u64) + u64(1 << 63),
        np.where(h, 0, z).astype(i64).astype(u64),
    )


def i2i_sat(x, dt):
    lo, hi = _IR[dt]
    if x.dtype == u64:
        return np.minimum(x, u64(hi)).astype(dt)
    x = x.astype(i64)
    return np.clip(x, max(lo, -(2**63)), min(hi, 2**63 - 1)).astype(dt)


# ---- bf16 ---------------------------------------------------------------------------------
def bf2f(h):
    """u16 bf16 bits -> f32"""
    return (np.asarray(h).astype(u32) << u32(16)).view(f32)


def f2bf(x, mode="rn"):
    """f32 -> bf16 bits (u16)"""
    x = np.asarray(x)
    if x.dtype == f64:
        x = d2f_odd(x)
    b = np.ascontiguousarray(x).view(u32)
    if mode == "rn":
        r = (b + (u32(0x7FFF) + ((b >> u32(16)) & u32(1)))) >> u32(16)
    elif mode == "rna":
        r = (b + u32(0x8000)) >> u32(16)
    elif mode == "rz":
        r = b >> u32(16)
    elif mode in ("rm", "rp"):
        r = b >> u32(16)
        neg = (b >> u32(31)) == 1
        inc = ((b & u32(0xFFFF)) != 0) & (neg if mode == "rm" else ~neg)
        r = r + inc
    else:
        raise ValueError(mode)
    r = r.astype(u16)
    nan = np.isnan(x)
    if nan.any():
        r = np.where(nan, u16(0x7FFF), r)
    return r


def d2f_odd(x):
    y = x.astype(f32)
    d = y.astype(f64)
    inex = (d != x) & np.isfinite(y) & ~np.isnan(x)
    over = np.isinf(y) & np.isfinite(x)
    yi = y.view(u32).copy()
    yi -= ((np.abs(d) > np.abs(x)) & (inex | over)).astype(u32)
    yi |= (inex | over).astype(u32)
    return yi.view(f32)


def split2(x):
    return (x & u32(0xFFFF)).astype(u16), (x >> u32(16)).astype(u16)


def pack2(lo, hi):
    return np.asarray(lo).astype(u32) | (np.asarray(hi).astype(u32) << u32(16))


def h2f(x):
    """u32 f16x2 -> f16 array of twice the length (interleaved)"""
    return np.ascontiguousarray(x).view(f16)


def f2h(x):
    return np.ascontiguousarray(x).view(u32)


def b2f(x):
    """u32 bf16x2 -> f32 array of twice the length (interleaved)"""
    return bf2f(np.ascontiguousarray(x).view(u16))


def f2b(x, mode="rn"):
    return np.ascontiguousarray(f2bf(x, mode)).view(u32)


def bfma(a, b, c):
    """bf16-valued f32 inputs -> exactly rounded bf16 fma as f64 sum (product is exact)"""
    return np.asarray(a).astype(f64) * b + c


def f2h_mode(x, mode):
    """f32/f64 -> f16 with rounding mode"""
    x = np.asarray(x)
    y = x.astype(f16)
    if mode == "rn":
        return y
    d = y.astype(f64)
    x = x.astype(f64)
    if mode == "rz":
        return np.where(np.abs(d) > np.abs(x), np.nextafter(y, f16(0)), y)
    if mode == "rm":
        return np.where(d > x, np.nextafter(y, f16(-np.inf)), y)
    if mode == "rp":
        return np.where(d < x, np.nextafter(y, f16(np.inf)), y)
    raise ValueError(mode)


def to_tf32(x, mode):
    b = np.ascontiguousarray(x).view(u32)
    if mode == "rna":
        r = (b + u32(0x1000)) & u32(0xFFFFE000)
    elif mode == "rn":
        r = (b + (u32(0xFFF) + ((b >> u32(13)) & u32(1)))) & u32(0xFFFFE000)
    else:
        r = b & u32(0xFFFFE000)
    special = (b & u32(0x7F800000)) == u32(0x7F800000)
    return np.where(special, b, r)


def _fp8(kind):
    import ml_dtypes

    return {
        "e4m3": (ml_dtypes.float8_e4m3fn, 448.0, 0x7F),
        "e5m2": (ml_dtypes.float8_e5m2, 57344.0, 0x7F),
    }[kind]


_fp8_tab = {}


def fp8_to_f32(b, kind):
    if kind not in _fp8_tab:
        t = _fp8(kind)[0]
        _fp8_tab[kind] = np.arange(256, dtype=u8).view(t).astype(f32)
    return _fp8_tab[kind][b]


def f32_to_fp8(x, kind):
    t, mx, nanb = _fp8(kind)
    x = np.asarray(x).astype(f32)
    r = np.clip(x, -f32(mx), f32(mx)).astype(t).view(u8)
    return np.where(np.isnan(x), u8(nanb), r)


# ---- float min/max etc. -------------------------------------------------------------------
def fminmax(a, b, which, nan=False, absx=False):
    if absx:
        s = np.signbit(a) ^ np.signbit(b)
        a, b = np.abs(a), np.abs(b)
    if which == "min":
        r = np.minimum(a, b) if nan else np.fmin(a, b)
        z = np.signbit(a) | np.signbit(b)
    else:
        r = np.maximum(a, b) if nan else np.fmax(a, b)
        z = np.signbit(a) & np.signbit(b)
    both0 = (a == 0) & (b == 0)
    if both0.any():
        zero = r.dtype.type(0)
        r = np.where(both0, np.where(z, -zero, zero), r)
    if absx:
        r = np.where(s, -r, r)
    return r


def relu(x):
    return np.where(np.isnan(x), x, np.maximum(x, x.dtype.type(0)))


def rsqrt(x):
    return (1.0 / np.sqrt(np.asarray(x).astype(f64))).astype(f32)


def ex2(x):
    return np.exp2(np.asarray(x).astype(f64)).astype(f32)


def lg2(x):
    return np.log2(np.asarray(x).astype(f64)).astype(f32)


def sin_(x):
    return np.sin(np.asarray(x).astype(f64)).astype(f32)


def cos_(x):
    return np.cos(np.asarray(x).astype(f64)).astype(f32)


def tanh_(x):
    return np.tanh(np.asarray(x).astype(f64)).astype(f32)


# ---- integers -----------------------------------------------------------------------------
def idiv(a, b):
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    dt = a.dtype
    z = b == 0
    bb = np.where(z, dt.type(1), b)
    if dt.kind == "u":
        q = a // bb
        return np.where(z, dt.type(np.iinfo(dt).max), q)
    q = a // bb
    r = a - q * bb
    q = q + ((r != 0) & ((a < 0) != (bb < 0)))
    return np.where(z, dt.type(-1), q.astype(dt))


def irem(a, b):
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    z = b == 0
    bb = np.where(z, a.dtype.type(1), b)
    return np.where(z, a, a - idiv(a, bb) * bb)


def mulhi(a, b):
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    dt = a.dtype
    if dt.itemsize < 8:
        w = (
            {1: i16, 2: i32, 4: i64}[dt.itemsize]
            if dt.kind == "i"
            else {1: u16, 2: u32, 4: u64}[dt.itemsize]
        )
        sh = w(8 * dt.itemsize)
        return ((a.astype(w) * b.astype(w)) >> sh).astype(dt)
    ua, ub = a.astype(u64), b.astype(u64)
    m = u64(0xFFFFFFFF)
    s = u64(32)
    al, ah, bl, bh = ua & m, ua >> s, ub & m, ub >> s
    t = al * bl
    k = t >> s
    t = ah * bl + k
    w1, w2 = t & m, t >> s
    t = al * bh + w1
    hi = ah * bh + w2 + (t >> s)
    if dt.kind == "i":
        hi = hi - np.where(a < 0, ub, u64(0)) - np.where(b < 0, ua, u64(0))
        return hi.view(i64) if isinstance(hi, np.ndarray) else hi.astype(i64)
    return hi


def shl(a, n):
    """a: unsigned array, n: u32 counts (clamped)"""
    a, n = np.asarray(a), np.asarray(n)
    w = 8 * a.dtype.itemsize
    return np.where(n >= w, a.dtype.type(0), a << (np.minimum(n, u32(w - 1)).astype(a.dtype)))


def shr(a, n):
    a, n = np.asarray(a), np.asarray(n)
    w = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(n, u32(w - 1)).astype(a.dtype)
    return np.where(n >= w, a.dtype.type(0), a >> (np.minimum(n, u32(w - 1)).astype(a.dtype)))


def shf(a, b, c, right, clamp):
    c = np.asarray(c)
    n = (np.minimum(c, u32(32)) if clamp else (c & u32(31))).astype(u64)
    v = np.asarray(a).astype(u64) | (np.asarray(b).astype(u64) << u64(32))
    if right:
        return (v >> n).astype(u32)
    return ((v << n) >> u64(32)).astype(u32)


def lop3(a, b, c, lut):
    r = None
    if lut == 0xFF:
        return ~(a & 0) if isinstance(a, np.ndarray) else u32(0xFFFFFFFF)
    simple = {
        0x80: lambda: a & b & c,
        0xFE: lambda: a | b | c,
        0x96: lambda: a ^ b ^ c,
        0xF8: lambda: a | (b & c),
        0xEA: lambda: (a & b) | c,
        0xCA: lambda: (a & b) | (~a & c),
        0xE8: lambda: (a & b) | (a & c) | (b & c),
        0xC0: lambda: a & b,
        0xFC: lambda: a | b,
        0x3C: lambda: a ^ b,
        0xE0: lambda: a & (b | c),
        0xA8: lambda: (a | b) & c,
        0x78: lambda: a ^ (b & c),
        0x6A: lambda: (a & b) ^ c,
    }
    if lut in simple:
        return simple[lut]()
    for i in range(8):
        if lut >> i & 1:
            t = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            r = t if r is None else r | t
    return u32(0) & a if r is None else r


def prmt(a, b, c, mode=None):
    a, b, c = np.broadcast_arrays(np.asarray(a), np.asarray(b), np.asarray(c))
    v = a.astype(u64) | (b.astype(u64) << u64(32))
    out = np.zeros(a.shape, u32)
    if mode:
        s = c & u32(3)
        tabs = {
            "f4e": [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
            "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
            "rc8": [[0] * 4, [1] * 4, [2] * 4, [3] * 4],
            "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
            "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
            "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
        }
        t = np.array(tabs[mode], u64)[s]
        for i in range(4):
            out |= ((v >> (t[..., i] * u64(8))) & u64(0xFF)).astype(u32) << u32(8 * i)
        return out
    for i in range(4):
        sel = (c >> u32(4 * i)) & u32(0xF)
        byte = ((v >> ((sel & u32(7)).astype(u64) * u64(8))) & u64(0xFF)).astype(u32)
        sg = np.where(byte & u32(0x80), u32(0xFF), u32(0))
        byte = np.where(sel & u32(8), sg, byte)
        out |= byte << u32(8 * i)
    return out


def prmt_const(a, b, sel):
    """prmt with a compile-time selector and no sign replication"""
    out = None
    if sel == 0x5410:
        return (a & u32(0xFFFF)) | (b << u32(16))
    if sel == 0x7632:
        return (a >> u32(16)) | (b & u32(0xFFFF0000))
    for i in range(4):
        s = sel >> (4 * i) & 7
        src = a if s < 4 else b
        sh = 8 * (s & 3) - 8 * i
        t = (src >> u32(sh)) if sh > 0 else (src << u32(-sh)) if sh < 0 else src
        t = t & u32(0xFF << (8 * i))
        out = t if out is None else out | t
    return out


def popc(x):
    return np.bitwise_count(x).astype(u32)


def clz(x):
    x = np.asarray(x)
    w = 8 * x.dtype.itemsize
    for s in (1, 2, 4, 8, 16, 32):
        if s < w:
            x = x | (x >> x.dtype.type(s))
    return u32(w) - np.bitwise_count(x).astype(u32)


def bfind(x, shiftamt=False):
    x = np.asarray(x)
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x)
        x = x.astype(u32 if x.dtype.itemsize == 4 else u64)
    w = 8 * x.dtype.itemsize
    c = clz(x)
    r = np.where(c == w, u32(0xFFFFFFFF), u32(w - 1) - c)
    if shiftamt:
        r = np.where(c == w, u32(0xFFFFFFFF), c)
    return r


_rev8 = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], u8)


def brev(x):
    x = np.ascontiguousarray(x)
    b = _rev8[x.view(u8).reshape(-1, x.dtype.itemsize)][:, ::-1]
    return np.ascontiguousarray(b).view(x.dtype).reshape(-1)


def bfe(a, pos, ln):
    a = np.asarray(a)
    signed = a.dtype.kind == "i"
    w = 8 * a.dtype.itemsize
    pos = np.asarray(pos) & u32(0xFF)
    ln = np.asarray(ln) & u32(0xFF)
    ua = a.astype(u64)
    if signed:
        top = np.minimum(pos + ln - u32(1), u32(w - 1)).astype(u64)
        sb = (ua >> top) & u64(1)
        sb = np.where(ln == 0, u64(0), sb)
    else:
        sb = u64(0)
    if w == 32:
        ua = ua & u64(0xFFFFFFFF)
    v = np.where(pos >= w, u64(0), ua >> np.minimum(pos, u32(63)).astype(u64))
    m = np.where(
        ln >= 64, u64(0xFFFFFFFFFFFFFFFF), (u64(1) << np.minimum(ln, u32(63)).astype(u64)) - u64(1)
    )
    v = v & m
    if signed:
        avail = np.minimum(ln, np.where(pos >= w, u32(0), u32(w) - np.minimum(pos, u32(w))))
        mv = np.where(
            avail >= 64,
            u64(0xFFFFFFFFFFFFFFFF),
            (u64(1) << np.minimum(avail, u32(63)).astype(u64)) - u64(1),
        )
        v = np.where(sb == 1, v | ~mv, v)
    return v.astype(a.dtype)


def bfi(a, b, pos, ln):
    """insert low `ln` bits of a into b at pos"""
    a, b = np.asarray(a), np.asarray(b)
    w = 8 * a.dtype.itemsize
    pos = (np.asarray(pos) & u32(0xFF)).astype(u64)
    ln = (np.asarray(ln) & u32(0xFF)).astype(u64)
    m = np.where(ln >= 64, u64(0xFFFFFFFFFFFFFFFF), (u64(1) << np.minimum(ln, u64(63))) - u64(1))
    c = np.minimum(pos, u64(63))
    mm = np.where(pos >= w, u64(0), m << c)
    r = (b.astype(u64) & ~mm) | ((a.astype(u64) << c) & mm)
    return r.astype(b.dtype)


def szext(a, n, wrap, signed):
    a = np.asarray(a)
    n = np.asarray(n)
    n = (n & u32(31)) if wrap else np.minimum(n, u32(32))
    n = n.astype(u64)
    v = a.astype(u64) & u64(0xFFFFFFFF) & ((u64(1) << n) - u64(1))
    if signed:
        sb = np.where(n > 0, (v >> (np.maximum(n, u64(1)) - u64(1))) & u64(1), u64(0))
        v = np.where(sb == 1, v | ~((u64(1) << n) - u64(1)), v)
    return v.astype(u32)


def bmsk(a, b, clamp):
    a, b = np.asarray(a).astype(u64), np.asarray(b).astype(u64)
    if clamp:
        a, b = np.minimum(a, u64(32)), np.minimum(b, u64(32))
    else:
        a, b = a & u64(31), b & u64(31)
    return ((((u64(1) << b) - u64(1)) << a) & u64(0xFFFFFFFF)).astype(u32)


def dp4a(a, b, c, sa, sb):
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    x = np.ascontiguousarray(a).view(i8 if sa else u8).reshape(-1, 4).astype(i32)
    y = np.ascontiguousarray(b).view(i8 if sb else u8).reshape(-1, 4).astype(i32)
    return ((x * y).sum(1).astype(i32).view(u32) + c).astype(u32)


def dp2a(a, b, c, sa, sb, hi):
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    x = np.ascontiguousarray(a).view(i16 if sa else u16).reshape(-1, 2).astype(i32)
    y = (
        np.ascontiguousarray(b).view(i8 if sb else u8).reshape(-1, 4)[:, 2:]
        if hi
        else np.ascontiguousarray(b).view(i8 if sb else u8).reshape(-1, 4)[:, :2]
    )
    return ((x * y.astype(i32)).sum(1).astype(i32).view(u32) + c).astype(u32)


# ---- mma ----------------------------------------------------------------------------------
_lane = np.arange(32)
_g, _t = _lane >> 2, _lane & 3


def _frag(nreg, e, rowpair):
    """index arrays (nreg, e, 32) of rows / cols for A-like fragments"""
    r = np.zeros((nreg, e, 32), int)
    c = np.zeros((nreg, e, 32), int)
    for i in range(nreg):
        for j in range(e):
            if rowpair == "A":
                r[i, j] = _g + 8 * (i & 1)
                c[i, j] = _t * e + 4 * e * (i >> 1) + j
            elif rowpair == "B":
                r[i, j] = _t * e + 4 * e * i + j
                c[i, j] = _g
            elif rowpair == "C32":
                r[i, j] = _g + 8 * (i >> 1)
                c[i, j] = _t * 2 + (i & 1)
            elif rowpair == "C16":
                r[i, j] = _g + 8 * i
                c[i, j] = _t * 2 + j
    return r, c


_fcache = {}


def frag(*a):
    if a not in _fcache:
        _fcache[a] = _frag(*a)
    return _fcache[a]


def unpack_elems(reg, ty):
    """u32 array (n,) -> (n, e) float32/int32 elements"""
    reg = np.ascontiguousarray(reg)
    if ty == "f16":
        return reg.view(f16).reshape(-1, 2).astype(f32)
    if ty == "bf16":
        return bf2f(reg.view(u16)).reshape(-1, 2)
    if ty == "tf32":
        return (reg & u32(0xFFFFE000)).view(f32).reshape(-1, 1)
    if ty in ("e4m3", "e5m2"):
        return fp8_to_f32(reg.view(u8), ty).reshape(-1, 4)
    if ty == "s8":
        return reg.view(i8).reshape(-1, 4).astype(i32)
    if ty == "u8":
        return reg.view(u8).reshape(-1, 4).astype(i32)
    raise ValueError(ty)


def _gather(regs, nw, shape, kind, ty, dtype):
    e = {"f16": 2, "bf16": 2, "tf32": 1, "f32": 1, "s32": 1}.get(ty, 4)
    M = np.empty((nw, *shape), dtype)
    r, c = frag(len(regs), e, kind)
    for i, x in enumerate(regs):
        v = x.reshape(nw, 32, 1) if ty in ("f32", "s32") else unpack_elems(x, ty).reshape(nw, 32, e)
        for j in range(e):
            M[:, r[i, j], c[i, j]] = v[:, :, j]
    return M


def mma(nw, m, n, k, dty, aty, bty, cty, A, B, C):
    """A, B: lists of u32 arrays (nw*32 lanes in order); C: list of f32 / u32(f16x2) / i32 arrays"""
    isint = dty == "s32"
    wt = i64 if isint else f64
    a = _gather(A, nw, (m, k), "A", aty, wt)
    b = _gather(B, nw, (k, n), "B", bty, wt)
    if cty == "f16":
        c = _gather(C, nw, (m, n), "C16", "f16", wt)
    else:
        c = _gather(C, nw, (m, n), "C32", cty, wt)
    d = np.matmul(a, b) + c
    out = []
    if dty == "f16":
        d = d.astype(f16)
        r, cc = frag(2, 2, "C16")
        for i in range(2):
            v = np.empty((nw, 32, 2), f16)
            v[:, :, 0] = d[:, r[i, 0], cc[i, 0]]
            v[:, :, 1] = d[:, r[i, 1], cc[i, 1]]
            out.append(v.view(u32).reshape(-1))
    else:
        d = d.astype(i32 if isint else f32)
        r, cc = frag(4, 1, "C32")
        for i in range(4):
            out.append(np.ascontiguousarray(d[:, r[i, 0], cc[i, 0]]).reshape(-1))
    return out
