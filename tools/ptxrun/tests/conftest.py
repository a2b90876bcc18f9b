"""Kernels under test: every `cu/*.cu` is compiled once a run for each architecture."""

import functools
from pathlib import Path

import pytest
from ptxrun import Module
from ptxrun.nvcc import compile_ptx, find_nvcc

HERE = Path(__file__).resolve().parent


@functools.cache
def _ptx(source, arch, options):
    return compile_ptx(HERE / "cu" / f"{source}.cu", arch, options)


@pytest.fixture
def load():
    """Function (source, arch, nvcc options) -> a fresh Module."""
    if find_nvcc() is None:
        pytest.skip("needs nvcc: put it on PATH, or set NVCC or CUDA_HOME")

    def module(source, arch, options=()):
        return Module(_ptx(source, arch, options))

    return module


@pytest.fixture(params=["80", "90", "100"])
def arch(request):
    return request.param


@pytest.fixture
def kernels(load, arch):
    return load("kernels", arch)


@pytest.fixture
def instructions(load, arch):
    return load("instructions", arch)


@pytest.fixture
def faults(load, arch):
    return load("faults", arch)


@pytest.fixture
def gemm(load, arch):
    return load("gemm", arch)
