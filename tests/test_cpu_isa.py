"""The operators give the same on every instruction set: part of their tests, run for each."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokendance.device import operators as ops

TESTS = Path(__file__).parent
MODULES = (
    "test_rope_rotate.py",
    "test_key_deviation.py",
    "test_diff_encode.py",
    "test_diff_restore.py",
    "test_collective_attention.py",
    "test_merge_states.py",
    "test_coded_pages.py",
)
# All dtypes, head dims and styles, odd rotary dims and group sizes, special values.
SUBSET = (
    "bit_for_bit or mirrors_come_back or every_row or test_deviation or test_attention or "
    "test_merging or partial or only_rotary or special or scales or groups or tolerances"
)


def isa_in_use() -> str:
    library = ctypes.CDLL(str(ops.LIBRARY))
    library.tokendance_cpu_isa.restype = ctypes.c_char_p
    return library.tokendance_cpu_isa().decode()


def run_with(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TOKENDANCE_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


def others() -> list[str]:
    """What this machine has besides what the operators use anyway."""
    all_of_them = ["avx512", "avx2", "portable"]
    best = isa_in_use()
    return all_of_them[all_of_them.index(best) + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("isa", others())
def test_operators_on_another_instruction_set(isa):
    code = (
        "import sys, pytest, test_cpu_isa; print('in use:', test_cpu_isa.isa_in_use());"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    modules = [str(TESTS / module) for module in MODULES]
    command = ["-q", "-p", "no:cacheprovider", "--backend", "cpu", "-k", SUBSET, *modules]
    environment_path = f"import sys; sys.path.insert(0, {str(TESTS)!r});"
    finished = run_with(isa, "-c", environment_path + code, *command)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]
    assert finished.stdout.startswith(f"in use: {isa}\n")


def test_an_unknown_instruction_set_is_refused():
    code = (
        "import torch; from tokendance.device import operators as ops; x = torch.zeros(1, 1, 64);"
        "t = torch.zeros(1, 32); p = torch.zeros(1, dtype=torch.int32);"
        "ops.rope_rotate(x, None, None, p, t, t)"
    )
    finished = run_with("mmx", "-c", code)
    assert finished.returncode != 0
    assert "TOKENDANCE_CPU_ISA: expected one of" in finished.stderr
    assert "portable, got mmx" in finished.stderr
