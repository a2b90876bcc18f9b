"""Float arithmetic, functions and conversions against numpy.

Every table lists what a kernel stores, in order, with the tolerance that the hardware's
approximations need; exact results have none.
"""

import math

import ml_dtypes
import numpy as np
import pytest

bf16 = ml_dtypes.bfloat16


def check(results, expected):
    """Compare rows of results with (title, values, rtol, atol); None checks nothing."""
    for result, (title, values, rtol, atol) in zip(results, expected, strict=True):
        if values is not None:
            want = np.asarray(values).astype(result.dtype).astype("f8")
            got = result.astype("f8")
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=title)


def to_int(values, low=-(2**31), high=2**31 - 1):
    """Clamped, NaN gives 0."""
    return np.where(np.isnan(values), 0, np.clip(values, low, high)).astype("i8").astype("i4")


@pytest.fixture
def floats(kernels):
    """Inputs in f32 and what `floats` makes of them: f32, i32 and f64 rows."""
    n = 500
    random = np.random.default_rng(12)
    a = (random.standard_normal(n) * 4).astype("f4")
    b = (random.standard_normal(n) * 4).astype("f4")
    a[:4] = [np.nan, np.inf, 1e-40, 0.0]
    a[4:8] = [2.5, -3.5, 0.5, 1e6]
    out, ints, doubles = np.zeros((33, n), "f4"), np.zeros((12, n), "i4"), np.zeros((8, n))
    kernels.launch("floats", 4, 128, [a, b, out, ints, doubles, n])
    with np.errstate(all="ignore"):
        yield a, b, out, ints, doubles


def test_f32(floats):
    a, b, out, _, _ = floats
    x, y = a.astype("f8"), b.astype("f8")
    # Reducing large arguments loses what f32 has left of the angle.
    small = np.where(np.abs(x) > 1e5, np.nan, x)
    erf = np.array([math.erf(value) for value in x])
    expected = [
        ("x + y", a + b, 0, 0),
        ("x * y", a * b, 0, 0),
        ("x / y", a / b, 0, 0),
        ("fmaf(x, y, x)", x * y + x, 1e-7, 0),
        ("sqrtf", np.sqrt(abs(a)), 0, 0),
        ("rsqrtf", 1 / np.sqrt(abs(x)), 3e-7, 0),
        ("1 / x", 1 / a, 0, 0),
        ("fminf", np.fmin(a, b), 0, 0),
        ("fmaxf", np.fmax(a, b), 0, 0),
        ("exp2f", np.exp2(x), 3e-7, 0),
        ("log2f", np.log2(abs(y)), 1e-6, 2e-6),
        ("expf", np.exp(y), 1e-6, 0),
        ("logf", np.log(abs(x)), 1e-6, 2e-6),
        ("sinf", np.sin(small), 1e-6, 2e-6),
        ("cosf", np.cos(y), 1e-6, 2e-6),
        ("tanhf", np.tanh(x), 2e-6, 0),
        ("floorf", np.floor(a), 0, 0),
        ("ceilf", np.ceil(b), 0, 0),
        ("rintf", np.rint(a), 0, 0),
        ("truncf", np.trunc(b), 0, 0),
        ("copysignf", np.copysign(a, b), 0, 0),
        ("__sinf", np.sin(small), 3e-6, 2e-6),
        ("__expf", np.exp(y), 2e-6, 0),
        ("erff", erf, 2e-6, 0),
        ("powf", abs(x) ** y, 1e-5, 0),
        ("fmodf", np.fmod(x, y), 1e-6, 0),
        ("__fadd_rz", None, 0, 0),
        ("__fmul_ru", None, 0, 0),
        ("__fmaf_rd", None, 0, 0),
        ("__float2half_rn", a.astype("f2"), 0, 0),
        ("__float2half_rz", None, 0, 0),
        ("__float2bfloat16_rn", a.astype(bf16).astype("f4"), 0, 0),
        ("__saturatef", np.clip(np.where(np.isnan(a), 0, a), 0, 1), 0, 0),
    ]
    for row in (13, 21):
        out[row][np.isnan(small)] = np.nan
    check(out, expected)


def test_directed_rounding(floats):
    a, b, out, _, _ = floats
    finite = np.isfinite(a)
    x, y = a[finite].astype("f8"), b[finite].astype("f8")
    add_rz, mul_ru, fma_rd = out[26:29, finite].astype("f8")
    assert (abs(add_rz) <= abs(x + y)).all()
    assert (abs(add_rz - (x + y)) <= abs(x + y) * 2.4e-7).all()
    assert (mul_ru >= x * y).all()
    assert (fma_rd <= x * y + y + 1e-15).all()
    half_rz = out[30]
    assert (abs(half_rz) <= abs(b)).all()
    assert (abs(half_rz - b) <= abs(b) * 1e-3).all()


def test_conversions_to_integers(floats):
    a, b, _, ints, _ = floats
    x, y = a.astype("f8"), b.astype("f8")
    big = np.trunc((a * np.float32(1e12)).astype("f8"))
    expected = [
        ("(int)", to_int(np.trunc(x))),
        ("__float2int_rn", to_int(np.rint(y))),
        ("(unsigned)", to_int(np.trunc(abs(x)), 0, 2**32 - 1)),
        ("__float2int_ru", to_int(np.ceil(x))),
        ("__float2int_rd", to_int(np.floor(y))),
        ("isnan", np.isnan(a)),
        ("x < y", a < b),
        ("!(x >= y)", ~(a >= b)),
        ("(int) of large", to_int(big)),
        ("__float_as_int", a.view("i4")),
        ("(long long)", np.trunc((b * np.float32(1000)).astype("f8"))),
        ("__half_as_ushort", None),
    ]
    for result, (title, values) in zip(ints, expected, strict=True):
        if values is not None:
            compared = ~np.isnan(a) if title == "__float_as_int" else slice(None)
            assert (result[compared] == np.asarray(values).astype("i4")[compared]).all(), title


def test_f64(floats):
    a, b, _, _, doubles = floats
    x, y = a.astype("f8"), b.astype("f8")
    expected = [
        ("x * y + x", x * y + x),
        ("sqrt(|x|) / y", np.sqrt(abs(x)) / y),
        ("exp", np.exp(y)),
        ("rint", np.rint(x * 3.7)),
        ("(long long)", None),
        ("fma", x * y + 1e-9),
        ("sin", np.sin(x)),
        ("pow", abs(x) ** y),
    ]
    check(doubles, [(title, values, 1e-13, 1e-14) for title, values in expected])
    assert (doubles[4][4:] == np.trunc(x[4:] * 1e5)).all()


def test_packed(kernels):
    n = 300
    random = np.random.default_rng(13)
    x, y = ((random.standard_normal((n, 2)) * 2).astype("f2") for _ in range(2))
    u, v = ((random.standard_normal((n, 2)) * 2).astype(bf16) for _ in range(2))
    halves, brains = np.zeros((15, n, 2), "f2"), np.zeros((10, n, 2), bf16)
    kernels.launch("packed", 3, 128, [x, y, halves, u, v, brains, n])

    wide_x, wide_y = x.astype("f8"), y.astype("f8")
    fma = (wide_x * wide_y + wide_x).astype("f2")
    exp2_log2 = np.stack([np.exp2(wide_x[:, 0]), np.log2(abs(wide_y[:, 1]))], 1)
    expected = [
        ("__hadd2", x + y, 0, 0),
        ("__hmul2", x * y, 0, 0),
        ("__hfma2", fma, 0, 0),
        ("__hsub2", x - y, 0, 0),
        ("__hmax2", np.maximum(x, y), 0, 0),
        ("__hmin2", np.minimum(x, y), 0, 0),
        ("__hneg2", -x, 0, 0),
        ("__habs2", abs(y), 0, 0),
        ("h2exp2", np.exp2(wide_x), 2e-3, 0),
        ("__hgt2", x > y, 0, 0),
        ("__h2div", wide_x / wide_y, 2e-3, 0),
        ("high and low", np.stack([x[:, 1], y[:, 0]], 1), 0, 0),
        ("__hfma2_relu", np.maximum(fma, 0), 0, 0),
        ("h2rcp", 1 / wide_x, 2e-3, 0),
        ("hexp2 and hlog2", exp2_log2, 2e-3, 1e-3),
    ]
    check(halves, expected)

    p, q = u.astype("f8"), v.astype("f8")
    expected = [
        ("__hadd2", p + q, 0, 0),
        ("__hmul2", p * q, 0, 0),
        ("__hfma2", None, 0, 0),
        ("__hsub2", p - q, 0, 0),
        ("__hmax2", np.maximum(p, q), 0, 0),
        ("__hmin2", np.minimum(p, q), 0, 0),
        ("__hneg2", -p, 0, 0),
        ("__habs2", abs(q), 0, 0),
        ("__hlt2", p < q, 0, 0),
        ("high and low", np.stack([p[:, 1], q[:, 0]], 1), 0, 0),
    ]
    check(brains, expected)
    # numpy rounds the f64 sum to f32 on its way to bf16, and so twice.
    assert (brains[2] != (p * q + p).astype(bf16)).mean() <= 0.002


@pytest.mark.parametrize("options", [(), ("-use_fast_math",)])
def test_fast_math(load, arch, options):
    module = load("instructions", arch, options)
    n = 128
    a, out = np.random.default_rng(6).standard_normal(n).astype("f4"), np.zeros((6, n), "f4")
    module.launch("5fastm", 1, n, [a, out, n])
    x = a.astype("f8")
    expected = [
        ("__expf", np.exp(x) / (1 + x * x), 3e-6, 1e-5),
        ("sinf", np.sin(x) / np.sqrt(abs(x)), 3e-6, 1e-5),
        ("tanhf", np.tanh(x), 1e-3, 1e-5),
        ("sqrtf and __fdividef", np.sqrt(abs(x)) + x / 3, 3e-6, 1e-5),
        ("subnormal", None, 0, 0),
        ("__frcp_rn and log2f", 1 / x + np.log2(abs(x)), 3e-6, 1e-5),
    ]
    check(out, expected)
    flushed = bool(options)
    assert (out[4] == 0).all() == flushed
