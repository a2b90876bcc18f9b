"""The launcher of CUDA kernels (csrc/cuda/launch.cuh) with a runtime that only keeps what it is
told: no CUDA needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "cpp"


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    program = tmp_path_factory.mktemp("launcher") / "launcher"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-Wall", "-Werror", "-pthread"]
    command += [
        f"-I{SOURCES / 'fake_cuda'}",
        f"-I{ROOT / 'csrc' / 'include'}",
        f"-I{ROOT / 'csrc'}",
    ]
    subprocess.run([*command, str(SOURCES / "launcher.cpp"), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize(
    "case", ["threads", "devices", "little_shared_memory", "waits", "refusals", "divisors"]
)
def test_launcher(launcher, case):
    result = subprocess.run([launcher, case], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
