"""Memory: atomics, generic addresses, cp.async, small types and registered arrays."""

import ml_dtypes
import numpy as np

rng = np.random.default_rng


def test_atomics(kernels):
    n = 300
    x = rng(4).integers(0, 10000, n).astype("i4")
    a = np.zeros(64 + n, "i4")
    a[20], a[21] = 10**9, -(10**9)
    u, wide, f = np.zeros(8, "u4"), np.zeros(1, "u8"), np.zeros(8, "f4")
    kernels.launch("atomics", 3, 128, [a, u, wide, f, x, n], race=True)
    assert (a[:16] == np.bincount(x & 15, minlength=16)).all()
    assert a[16] == max((x[i * 128 : (i + 1) * 128] & 1023).max() for i in range(3))
    assert a[20] == x.min()
    assert a[21] == x.max()
    assert a[22] == n
    assert sorted(a[64:]) == list(range(n))
    assert u[0] == n % 10
    assert u[1] == np.bitwise_or.reduce(np.uint32(1) << (x & 31).astype("u4"))
    assert u[2] == np.bitwise_xor.reduce(x)
    assert u[4] in x
    assert wide[0] == x.sum()
    assert f[0] == n
    assert f[1] == n / 2


def test_atomics_of_small_floats(instructions):
    h, b, q = np.zeros((2, 2), "f2"), np.zeros((1, 2), ml_dtypes.bfloat16), np.zeros(2, "f2")
    instructions.launch("halfatom", 1, 64, [h, b, q, 64])
    assert (h == [[32, 16], [32, 16]]).all()
    assert (b.astype("f4") == [[64, 128]]).all()
    assert q[0] == 16


def test_generic_addresses(instructions):
    g = np.zeros((4, 64), "f4")
    instructions.launch("7genericPfi", 1, 64, [g, 64])
    t = np.arange(64)
    in_global, in_shared, in_local, is_space = g
    assert (in_global == np.where(t % 3 == 0, 10, 0)).all()
    assert (in_shared == np.where(t % 3 == 1, 14, 3)).all()
    assert (in_local == np.where(t % 3 == 2, np.where(t & 1, 1201, 211), 201)).all()
    assert (is_space == np.array([4, 1, 2])[t % 3]).all()


def test_cp_async_sizes(instructions):
    x, y = rng(3).integers(0, 256, 512).astype("u1"), np.zeros(1024, "u1")
    sizes = rng(4).integers(0, 17, 32).astype("i4")
    sizes[:4] = [0, 16, 4, 8]
    instructions.launch("3cpa", 1, 32, [x, y, sizes], race=True)
    beyond = np.arange(16) >= sizes[:, None]
    assert (y[:512].reshape(32, 16) == np.where(beyond, 0, x.reshape(32, 16))).all()
    assert (y[512:768] == x[:256]).all()
    assert (y[768:896].view("u2") == 0x7FFF).all()  # the second group has not landed
    late = y[896:].reshape(32, 4)
    assert (late[1::2] == x[:128].reshape(32, 4)[1::2]).all()
    assert (late[::2].copy().view("u2") == 0x7FFF).all()  # these threads copied nothing


def test_small_types_in_three_dimensions(instructions):
    n = 190
    random = rng(5)
    a = random.integers(-128, 128, n).astype("i1")
    b = random.integers(0, 256, n).astype("u1")
    c = random.integers(-3000, 3000, n).astype("i2")
    bytes_out, shorts_out, pairs = np.zeros(n, "i1"), np.zeros(n, "i2"), random.random((n, 2))
    before = pairs.copy()
    args = [a, b, c, bytes_out, shorts_out, pairs, n]
    instructions.launch("5small", (2, 2, 2), (4, 3, 2), args)
    x, y, z = a.astype("i4"), b.astype("i4"), c.astype("i4")
    assert (bytes_out == (x * y + z).astype("i1")).all()
    assert (shorts_out == (x * z).astype("i2") >> 3).all()
    want = before[:, 0] * before[:, 1] + x
    np.testing.assert_allclose(pairs[:, 0], want, rtol=1e-14, atol=1e-13)
    np.testing.assert_allclose(pairs[:, 1], -before[:, 1] / (y + 1.0))


def test_registered_arrays(instructions):
    x = np.zeros(4, "f4")
    address = instructions.ptr(x)
    assert instructions.ptr(x) == address
    assert instructions.ptr(x[1:]) == address + 4
    instructions.reset()
    assert instructions.ptr(x) != address
