"""Flash-attention forward: swizzled cp.async double buffering, ldmatrix(.trans), mma, online softmax, struct argument."""

import struct

import ml_dtypes
import numpy as np
import pytest

bf16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("S", [64, 200])
def test_attention(load, arch, S, causal):
    m = load("attn", arch)
    H = 3
    r = np.random.default_rng(S)
    q, k, v = (r.standard_normal((H, S, 64)).astype(bf16) for _ in range(3))
    o, lse = np.zeros((H, S, 64), bf16), np.full((H, S), np.nan, "f4")
    a = struct.pack("<5Qifi4x", *(m.ptr(x) for x in (q, k, v, o, lse)), S, 0.125, causal)
    st = m.launch("attn", ((S + 63) // 64, H), 128, [a], shared_bytes=40960, race=True)
    x = np.einsum("hqd,hkd->hqk", q.astype("f8"), k.astype("f8")) * 0.125
    if causal:
        x = np.where(np.tril(np.ones((S, S), bool)), x, -np.inf)
    mx = x.max(-1, keepdims=True)
    p = np.exp(x - mx)
    ref = p @ v.astype("f8") / p.sum(-1, keepdims=True)
    np.testing.assert_allclose(o.astype("f4"), ref, atol=1.5e-2)
    np.testing.assert_allclose(lse, (mx + np.log(p.sum(-1, keepdims=True)))[..., 0], atol=1e-4)
    for d in st.shared_instr.values():
        assert d["wavefronts"] == d["phases"], d  # the swizzle is conflict-free
