import ml_dtypes
import numpy as np
import pytest
from ptxrun import RaceError

bf16 = ml_dtypes.bfloat16
rng = np.random.default_rng
NAME = {"bf16": "gemmI13__nv_bfloat16Li0E", "f16": "gemmI6__halfLi0E"}


@pytest.mark.parametrize("ty", ["bf16", "f16"])
@pytest.mark.parametrize(("M", "N", "K"), [(64, 64, 32), (128, 192, 96), (100, 72, 136)])
def test_gemm(gemm, ty, M, N, K):
    dt = {"bf16": bf16, "f16": np.float16}[ty]
    a, b = rng(0).standard_normal((M, K)).astype(dt), rng(1).standard_normal((K, N)).astype(dt)
    c = np.full((M, N), np.nan, "f4")
    st = gemm.launch(NAME[ty], ((N + 63) // 64, (M + 63) // 64), 128, [a, b, c, M, N, K], race=True)
    ref = a.astype("f8") @ b.astype("f8")
    np.testing.assert_allclose(c, ref, rtol=1e-5, atol=1e-4)
    blocks = ((N + 63) // 64) * ((M + 63) // 64)
    assert st.by_class["mma"] == blocks * 4 * ((K + 31) // 32) * 2 * 8
    for v in st.shared_instr.values():
        if "ldmatrix" in v["text"]:
            assert v["wavefronts"] == v["phases"], v
    assert not st.warnings


def test_gemm_wrong_wait(gemm):
    """wait_group 2 instead of 1: copies land too late, the result must be visibly wrong (poison)"""
    M = N = 64
    K = 128
    a, b = np.ones((M, K), "f2"), np.ones((K, N), "f2")
    c = np.zeros((M, N), "f4")
    gemm.launch("gemmI6__halfLi1E", 1, 128, [a, b, c, M, N, K], race="report")
    assert np.isnan(c).all()


@pytest.mark.parametrize("bug", [2, 3])
def test_gemm_missing_barrier(gemm, bug):
    """no barrier before the stage is refilled (2) / between wait_group and ldmatrix (3)"""
    M = N = 64
    K = 128
    a, b = np.ones((M, K), "f2"), np.ones((K, N), "f2")
    c = np.zeros((M, N), "f4")
    with pytest.raises(RaceError, match="cp.async"):
        gemm.launch(f"gemmI6__halfLi{bug}E", 1, 128, [a, b, c, M, N, K], race=True)


def test_mma_f16_accumulate(gemm):
    a, b, c = (
        rng(i).standard_normal(s).astype("f2")
        for i, s in ((2, (16, 16)), (3, (8, 16)), (4, (16, 8)))
    )
    d = np.zeros((16, 8), "f2")
    gemm.launch("mma_f16acc", 1, 32, [a, b, c, d])
    np.testing.assert_allclose(d, a.astype("f8") @ b.T.astype("f8") + c, rtol=1e-3, atol=1e-3)


def test_mma_tf32(gemm):
    a, b = rng(5).standard_normal((16, 8)).astype("f4"), rng(6).standard_normal((8, 8)).astype("f4")
    d = np.zeros((16, 8), "f4")
    gemm.launch("mma_tf32", 1, 32, [a, b, d])

    def t(x):
        return ((x.view("u4") + 0x1000) & 0xFFFFE000).astype("u4").view("f4").astype("f8")

    np.testing.assert_allclose(d, t(a) @ t(b).T, rtol=1e-6, atol=1e-6)


def test_mma_s8(gemm):
    a, b = (
        rng(7).integers(-128, 128, (16, 32)).astype("i1"),
        rng(8).integers(-128, 128, (8, 32)).astype("i1"),
    )
    d = np.zeros((16, 8), "i4")
    gemm.launch("mma_s8", 1, 32, [a, b, d])
    assert (d == a.astype(int) @ b.T.astype(int)).all()


def test_ldmatrix_trans_stmatrix_movmatrix(gemm, arch):
    x = np.arange(256, dtype="u2").reshape(4, 8, 8)
    y = np.zeros(160 + 128, "u4")
    gemm.launch("3ldm", 1, 32, [x, y], race=True)
    t = x.transpose(0, 2, 1)
    assert (y[:128].view("u2").reshape(4, 8, 8) == t).all()
    assert (y[128:160].view("u2").reshape(8, 8) == x[0]).all()
    if arch != "80":
        assert (y[160:].view("u2").reshape(4, 8, 8) == t).all()


def test_fp8(gemm, arch):
    if arch == "80":
        pytest.skip("e4m3 needs sm_89")
    n = 300
    x = (rng(9).standard_normal((n, 2)) * 60).astype("f4")
    x[0], x[1] = [1000, -1000], [np.nan, 0.001]
    y, z = np.zeros((n, 2), "u1"), np.zeros((n, 2), "f2")
    gemm.launch("3fp8", 3, 128, [x, y, z, n])
    ref = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    ok = ~np.isnan(x)
    assert (y[ok] == ref.view("u1")[ok]).all()
    assert (z[ok] == ref.astype("f2")[ok]).all()
    assert np.isnan(z[1, 0])
    a, b = (
        rng(i).standard_normal((m, 32)).astype(ml_dtypes.float8_e4m3fn)
        for i, m in ((10, 16), (11, 8))
    )
    d = np.zeros((16, 8), "f4")
    gemm.launch("mma_e4m3", 1, 32, [a, b, d])
    np.testing.assert_allclose(d, a.astype("f8") @ b.astype("f8").T, rtol=1e-6, atol=1e-5)
