"""Kernels under test: every `cu/*.cu` is compiled once a run for each architecture."""

import functools
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import ptxrun  # noqa: E402
from ptxrun.nvcc import compile_ptx, find_nvcc  # noqa: E402


@functools.cache
def _ptx(source, arch, options):
    return compile_ptx(HERE / "cu" / f"{source}.cu", arch, options)


@pytest.fixture
def load():
    """Function (source, arch, nvcc options) -> fresh ptxrun.Module."""
    if find_nvcc() is None:
        pytest.skip("needs nvcc: put it on PATH, or set NVCC or CUDA_HOME")
    return lambda source, arch, options=(): ptxrun.Module(_ptx(source, arch, options))


@pytest.fixture(params=["80", "90", "100"])
def arch(request):
    return request.param


@pytest.fixture
def basic(load, arch):
    return load("basic", arch)


@pytest.fixture
def gemm(load, arch):
    return load("gemm", arch)


@pytest.fixture
def more(load, arch):
    return load("more", arch)
