"""Matrix products: a double-buffered kernel, mistakes in its pipeline, and every type of mma."""

import ml_dtypes
import numpy as np
import pytest
from ptxrun import RaceError

bf16, e4m3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
GEMM = {bf16: "gemmI13__nv_bfloat16Li0E", np.float16: "gemmI6__halfLi0E"}
WAITS_FOR_TOO_LITTLE, NO_BARRIER_AFTER, NO_BARRIER_BEFORE = 1, 2, 3


def normal(seed, shape, dtype="f4"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def product(a, b_transposed):
    return a.astype("f8") @ b_transposed.astype("f8").T


@pytest.mark.parametrize("dtype", [bf16, np.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 32), (128, 192, 96), (100, 72, 136)])
def test_gemm(gemm, dtype, m, n, k):
    a, b, c = normal(0, (m, k), dtype), normal(1, (k, n), dtype), np.full((m, n), np.nan, "f4")
    grid = ((n + 63) // 64, (m + 63) // 64)
    stats = gemm.launch(GEMM[dtype], grid, 128, [a, b, c, m, n, k], race=True)
    np.testing.assert_allclose(c, a.astype("f8") @ b.astype("f8"), rtol=1e-5, atol=1e-4)
    assert stats.by_class["mma"] == grid[0] * grid[1] * 4 * ((k + 31) // 32) * 2 * 8
    for counters in stats.shared_instr.values():
        if "ldmatrix" in counters["text"]:
            assert counters["wavefronts"] == counters["phases"], counters
    assert not stats.warnings


def launch_faulty(gemm, fault, race):
    m, n, k = 64, 64, 128
    a, b, c = np.ones((m, k), "f2"), np.ones((k, n), "f2"), np.zeros((m, n), "f4")
    gemm.launch(f"gemmI6__halfLi{fault}E", 1, 128, [a, b, c, m, n, k], race=race)
    return c


def test_wait_for_too_few_groups(gemm):
    assert np.isnan(launch_faulty(gemm, WAITS_FOR_TOO_LITTLE, "report")).all()


@pytest.mark.parametrize("fault", [NO_BARRIER_AFTER, NO_BARRIER_BEFORE])
def test_missing_barrier(gemm, fault):
    with pytest.raises(RaceError, match=r"cp\.async"):
        launch_faulty(gemm, fault, True)


# ---- one warp ----
def test_mma_f16_accumulator(gemm):
    a, b, c = (
        normal(seed, shape, "f2") for seed, shape in ((2, (16, 16)), (3, (8, 16)), (4, (16, 8)))
    )
    d = np.zeros((16, 8), "f2")
    gemm.launch("mma_f16acc", 1, 32, [a, b, c, d])
    np.testing.assert_allclose(d, product(a, b) + c, rtol=1e-3, atol=1e-3)


def test_mma_tf32(gemm):
    a, b, d = normal(5, (16, 8)), normal(6, (8, 8)), np.zeros((16, 8), "f4")
    gemm.launch("mma_tf32", 1, 32, [a, b, d])

    def rounded(x):
        return ((x.view("u4") + 0x1000) & 0xFFFFE000).astype("u4").view("f4")

    np.testing.assert_allclose(d, product(rounded(a), rounded(b)), rtol=1e-6, atol=1e-6)


def test_mma_s8(gemm):
    random = np.random.default_rng(7)
    a, b = (random.integers(-128, 128, (rows, 32)).astype("i1") for rows in (16, 8))
    d = np.zeros((16, 8), "i4")
    gemm.launch("mma_s8", 1, 32, [a, b, d])
    assert (d == a.astype(int) @ b.T.astype(int)).all()


def test_transposes(gemm, arch):
    x = np.arange(256, dtype="u2").reshape(4, 8, 8)
    y = np.zeros(160 + 128, "u4")
    gemm.launch("3ldm", 1, 32, [x, y], race=True)
    transposed = x.transpose(0, 2, 1)
    assert (y[:128].view("u2").reshape(4, 8, 8) == transposed).all()
    assert (y[128:160].view("u2").reshape(8, 8) == x[0]).all()
    if arch != "80":  # stmatrix
        assert (y[160:].view("u2").reshape(4, 8, 8) == transposed).all()


@pytest.mark.parametrize("arch", ["90", "100"])
def test_fp8(gemm):
    n = 300
    x = normal(9, (n, 2)) * 60
    x[0], x[1] = [1000, -1000], [np.nan, 0.001]
    bits, back = np.zeros((n, 2), "u1"), np.zeros((n, 2), "f2")
    gemm.launch("3fp8", 3, 128, [x, bits, back, n])
    want, numbers = np.clip(x, -448, 448).astype(e4m3), ~np.isnan(x)
    assert (bits[numbers] == want.view("u1")[numbers]).all()
    assert (back[numbers] == want.astype("f2")[numbers]).all()
    assert np.isnan(back[1, 0])

    a, b, d = normal(10, (16, 32), e4m3), normal(11, (8, 32), e4m3), np.zeros((16, 8), "f4")
    gemm.launch("mma_e4m3", 1, 32, [a, b, d])
    np.testing.assert_allclose(d, product(a, b), rtol=1e-6, atol=1e-5)
