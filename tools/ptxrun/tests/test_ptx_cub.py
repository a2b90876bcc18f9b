"""Library code as a stress test: CUB's sorts, scans and reductions, optimised and for debugging."""

import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-lineinfo",), ("-G",)])
def test_cub(load, arch, options):
    module = load("cub", arch, options)
    x = np.random.default_rng(0).integers(-(10**9), 10**9, 1024).astype("i4")
    y, z = np.zeros_like(x), np.zeros(258, "i4")
    module.launch("sortk", 2, 128, [x, y, z], race=True)
    assert (y.reshape(2, 512) == np.sort(x.reshape(2, 512), 1)).all()
    assert (z[:128] == np.cumsum(np.arange(1, 129))).all()
    assert (z[256:] == 8128).all()
    y[:] = 0
    module.launch("wsort", 1, 64, [x, y], race="warp")
    assert (y[:128].reshape(2, 64) == np.sort(x[:128].reshape(2, 64), 1)).all()
