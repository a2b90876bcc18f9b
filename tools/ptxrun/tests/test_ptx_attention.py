"""Flash attention: swizzled double buffers of cp.async, ldmatrix, mma, and a struct argument."""

import struct

import ml_dtypes
import numpy as np
import pytest

bf16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("length", [64, 200])
def test_attention(load, arch, length, causal):
    module = load("attention", arch)
    heads, scale = 3, 0.125
    random = np.random.default_rng(length)
    q, k, v = (random.standard_normal((heads, length, 64)).astype(bf16) for _ in range(3))
    out, lse = np.zeros((heads, length, 64), bf16), np.full((heads, length), np.nan, "f4")
    pointers = [module.ptr(array) for array in (q, k, v, out, lse)]
    args = struct.pack("<5Qifi4x", *pointers, length, scale, causal)
    grid = ((length + 63) // 64, heads)
    stats = module.launch("attn", grid, 128, [args], shared_bytes=40960, race=True)

    scores = np.einsum("hqd,hkd->hqk", q.astype("f8"), k.astype("f8")) * scale
    if causal:
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out.astype("f4"), weights @ v.astype("f8") / total, atol=1.5e-2)
    np.testing.assert_allclose(lse, (largest + np.log(total))[..., 0], atol=1e-4)
    assert stats.bank_conflicts == 0  # that is what the swizzle is for
