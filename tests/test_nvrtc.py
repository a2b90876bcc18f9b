"""The kernels in front of CUDA 12's compiler."""

from __future__ import annotations

import re

import ptx_backend
import pytest

from tools import nvrtc

SOURCES = [path for name in ptx_backend.OPERATORS for path in ptx_backend.sources_of(name)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_only_launchers_are_cut_off(source):
    whole, kernels = source.read_text(), nvrtc.kernels_of(source)
    assert not re.search(r"launch\.(cuh|h)\"|cudaError|int cuda_", kernels)
    defined = re.compile(r"^TOKENDANCE_\w+\(TOKENDANCE_DEFINE.*|__global__", re.M)
    assert defined.findall(kernels) == defined.findall(whole)
    assert kernels.count("{") == kernels.count("}")


def test_a_kernel_compiles(capsys):
    merge = ptx_backend.CUDA_SOURCES / "merge_states.cu"
    outcome = nvrtc.main([str(merge), "--archs", "80"])
    out, err = capsys.readouterr()
    if outcome:
        assert "nvidia: expected the packages" in err
        pytest.skip(err)
    assert re.fullmatch(r"NVRTC 12\.\d+: merge_states.cu for sm_80, \d+ bytes\n", out)
