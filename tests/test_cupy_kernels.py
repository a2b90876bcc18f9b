"""`python -m bench.cupy_kernels`: what it checks without a GPU, and what it launches with one."""

from __future__ import annotations

import cuda_params
import ptx_backend
import pytest

from bench import cupy_kernels

CUPY, NO_CUPY = cupy_kernels.device()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        ptx_backend.PtxBackend.missing() is not None,
        reason=ptx_backend.PtxBackend.missing() or "",
    ),
]


@pytest.mark.skipif(CUPY is not None, reason="CuPy finds a CUDA device")
def test_without_a_gpu_it_compiles_and_checks_and_says_so(capsys):
    assert cupy_kernels.main(["--kernel", "rope_rotate", "collective_attention"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rope_rotate: 40 kernels take their structs by value"
    assert "tokendance_rope_rotate_f16_half_wide (8192, 1, 1) x (8, 8, 4)" in lines[1]
    assert "tokendance_collective_attention_f16_d128" in lines[3]
    assert lines[-1] == f"Nothing was launched: {NO_CUPY}."


def test_a_kernel_that_takes_something_else_is_noticed(monkeypatch):
    monkeypatch.setitem(ptx_backend.OPERATORS, "merge_states", cuda_params.RopeTables)
    with pytest.raises(ValueError, match="expected parameters of \\[32, 64\\] bytes, got \\["):
        cupy_kernels.check_signatures("merge_states", "80")


def test_a_struct_is_one_element_with_its_bytes():
    """CuPy passes NumPy arrays of one element by value, and no others."""
    struct = cuda_params.Tile(1, 2, 3, 4)
    value = cupy_kernels.by_value(struct)
    assert (value.size, value.itemsize) == (1, 64)
    assert value.tobytes() == bytes(struct)


@pytest.mark.skipif(CUPY is None, reason=NO_CUPY)
@pytest.mark.parametrize("operator", cupy_kernels.CALLS)
def test_kernels_give_what_the_cpu_operators_give(operator, capsys):
    cupy_kernels.measure(CUPY, operator)
    assert "GB/s" in capsys.readouterr().out
