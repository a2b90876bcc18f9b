"""`python -m tools.coverage`: the cases that stand for the tests reach all of every kernel."""

from __future__ import annotations

import backends
import kernel_cases
import pytest
import row_cases
from ptx_backend import CUDA_SOURCES, OPERATORS, PtxBackend, sources_of

from tools import coverage, kernel_ptx

pytestmark = pytest.mark.usefixtures("one_thread")
needs_nvcc = pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or "")


def test_the_ptx_backend_has_every_cuda_operator():
    """Whatever has kernels in csrc/cuda has a plan, and is executed by the operators' tests."""
    sources = {path for path in CUDA_SOURCES.glob("*.cu") if path.stem != "error"}
    planned = {path.name.removesuffix("_plan.h") for path in CUDA_SOURCES.glob("*_plan.h")}
    planned -= {"launch", "merge"}
    assert planned == set(kernel_ptx.operators())
    launchers = {CUDA_SOURCES / f"{operator}.cu" for operator in planned}
    assert sources == launchers | {
        source for operator in planned for source in sources_of(operator)
    }
    assert planned <= set(OPERATORS)
    for operator in planned:
        assert backends.has_operator("ptx", operator)
        assert operator in kernel_cases.CASES
        assert any(
            method == operator or method.startswith(f"{operator}_")
            for method in backends.METHODS
            if callable(getattr(PtxBackend, method, None))
        )


@needs_nvcc
@pytest.mark.ptx
def test_what_is_not_reached_is_reported(monkeypatch):
    """Cases of other variants leave out code of these."""
    monkeypatch.setitem(kernel_cases.CASES, "rope_rotate", row_cases.copies)
    [kernel] = coverage.coverage("rope_rotate", kernel_cases.REPRESENTATIVE[:1])
    assert kernel.kernel == "rope_rotate_bf16_half_wide"
    assert any("fma.rn.f32" in missing.what for missing in kernel.never_executed)
    assert any("rope_rotate.cuh" in missing.source for missing in kernel.unexplained)
    assert any("always" in missing.what for missing in kernel.never_taken)
