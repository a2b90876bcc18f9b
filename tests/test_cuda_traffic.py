"""The CUDA kernels move the bytes that their headers promise, and no more (bench/traffic.py)."""

from __future__ import annotations

import pytest
from ptx_backend import PtxBackend

from bench import traffic

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or ""),
]


@pytest.fixture(scope="module")
def ptx():
    return PtxBackend(race=False)


@pytest.mark.parametrize(("measure", "arguments"), traffic.SHAPES)
def test_traffic(ptx, measure, arguments):
    measured = measure(ptx, *arguments)
    assert measured.fewest_read <= measured.read <= 1.05 * measured.fewest_read
    assert measured.fewest_written <= measured.written <= 1.05 * measured.fewest_written
    assert measured.conflicts == 0
    # Half a head of 160 bytes is 2.5 sectors (rope_rotate.cuh), and so is a head of 80.
    splits_sectors = (measure is traffic.rope_rotate and arguments[1:4] == (4, 80, False)) or (
        measure is traffic.collective_attention and arguments[:4] == (traffic.e4m3, 2, 2, 80)
    )
    assert measured.sector_ratio <= (1.25 if splits_sectors else 1.1)


def test_a_master_page_is_read_once_for_all_agents(ptx):
    """What restore writes grows with the agents; what it reads of Masters does not."""
    measured = traffic.diff_restore(ptx, traffic.bf16, 2, 64, False)
    assert ptx.launched.launches[0].tile.agents == 6
    assert measured.written > 3 * measured.read
