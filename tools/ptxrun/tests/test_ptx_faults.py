"""Planted mistakes: each is noticed, and the message says where it is."""

import numpy as np
import pytest
from ptxrun import Module, PtxError, RaceError, UnsupportedError

rng = np.random.default_rng


def test_missing_barrier(faults):
    x, y = rng(16).random(128).astype("f4"), np.zeros(128, "f4")
    faults.launch("racyPKfPfi", 1, 128, [x, y, 1], race=True)
    assert (y == x[::-1]).all()
    with pytest.raises(RaceError, match="conflicts with write by warp"):
        faults.launch("racyPKfPfi", 1, 128, [x, y, 0], race=True)
    stats = faults.launch("racyPKfPfi", 1, 128, [x, y, 0], race="report")
    assert "shared byte" in stats.races[0]


def test_missing_barrier_in_loop(faults):
    y = np.zeros(64, "f4")
    faults.launch("racy_loop", 1, 64, [y, 4, 1], race=True)
    assert (y == 6).all()
    with pytest.raises(RaceError, match="conflicts with read"):
        faults.launch("racy_loop", 1, 64, [y, 4, 0], race=True)


def test_race_within_a_warp(instructions):
    x, y = rng(8).integers(0, 99, 64).astype("i4"), np.zeros(64, "i4")
    instructions.launch("8warprace", 1, 64, [x, y, 3], race="warp")
    neighbour = x.reshape(-1, 2)[:, ::-1].reshape(-1)
    assert (y == 2 * neighbour + 1).all()
    instructions.launch("8warprace", 1, 64, [x, y, 0], race=True)  # warps do not race here
    for barriers, message in (
        (2, r"read by warp.*write \(other lane\)"),
        (1, r"write by warp.*read \(other lane\)"),
    ):
        with pytest.raises(RaceError, match=message):
            instructions.launch("8warprace", 1, 64, [x, y, barriers], race="warp")


def test_out_of_bounds(faults):
    x, y = np.zeros(256, "f4"), np.zeros(256, "f4")
    faults.launch("3oobPKfPfi", 2, 128, [x, y, 0])
    message = (
        r"oob.*out-of-bounds global load of 4 bytes.*PTX line \d+.*"
        r"block \(1,0,0\) thread \(127,0,0\), address 0x"
    )
    with pytest.raises(PtxError, match=message):
        faults.launch("3oobPKfPfi", 2, 128, [x, y, 1])
    with pytest.raises(PtxError, match=r"block \(0,0,0\) thread \(0,0,0\)"):
        faults.launch("3oobPKfPfi", 2, 128, [x, y, -1])
    with pytest.raises(PtxError, match="out-of-bounds shared store"):
        faults.launch("oobs", 1, 64, [np.zeros(64, "f4"), 1])


def test_read_only_array(faults):
    x, y = np.zeros(256, "f4"), np.zeros(256, "f4")
    y.flags.writeable = False
    with pytest.raises(PtxError, match="read-only"):
        faults.launch("3oobPKfPfi", 2, 128, [x, y, 0])


def test_null_pointer(faults):
    with pytest.raises(PtxError, match="null pointer"):
        faults.launch("3oobPKfPfi", 1, 32, [0, np.zeros(32, "f4"), 0])


def test_misaligned(faults):
    with pytest.raises(PtxError, match="misaligned 16-byte load"):
        faults.launch("misalign", 1, 4, [np.zeros(128, "u1"), np.zeros((4, 4), "f4")])


def test_divergent_barrier(faults):
    with pytest.raises(PtxError, match="aligned barrier from different places"):
        faults.launch("divbar", 1, 32, [np.zeros(4, "i4")])


def test_deadlock(faults):
    with pytest.raises(PtxError, match="deadlock"):
        faults.launch("deadbar", 1, 96, [np.zeros(96, "i4")])


def test_uninitialised_shared_is_nan(faults):
    y = np.zeros(64, "f4")
    faults.launch("uninit", 1, 64, [y])
    assert np.isnan(y[5])
    assert (np.delete(y, 5) == 1).all()


def test_unsupported_instruction_is_named():
    ptx = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k() {
 .reg .b64 %rd<2>;
 mbarrier.init.shared.b64 [%rd1], 3;
 ret;
}"""
    with pytest.raises(UnsupportedError, match=r"mbarrier\.init\.shared\.b64.*line 6"):
        Module(ptx).launch("k", 1, 32, [])
