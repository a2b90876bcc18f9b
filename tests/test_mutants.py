"""`python -m tools.mutate`: a sample of mutants does not get past the cases."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ptx_backend import PtxBackend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernel_cases
from ptxrun.mutate import Mutation

from tools import kernel_ptx, mutate
from tools.equivalent_mutants import EQUIVALENT, explanation

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or ""),
]


@pytest.mark.slow
def test_a_sample_of_mutants_is_killed():
    """Of 20 mutants of all operators at least 95 % are noticed, or explained."""
    kernels = [
        kernel
        for operator in kernel_ptx.operators()
        for kernel in mutate.kernels_of(operator, kernel_cases.REPRESENTATIVE)
    ]
    found = [
        verdict
        for kernel, indices in mutate.sampled(kernels, 20, seed=0)
        for verdict in mutate.verdicts(kernel, indices)
    ]
    assert len(found) == 20
    survived = [verdict for verdict in found if mutate.outcome(verdict) == "survived"]
    assert len(survived) <= 1, survived
    assert sum(verdict.killed for verdict in found) >= 14


def test_a_sample_is_repeatable_and_even():
    kernels = mutate.kernels_of("rope_rotate", kernel_cases.REPRESENTATIVE[:1])
    kernels += mutate.kernels_of("merge_states", kernel_cases.REPRESENTATIVE[:1])
    chosen = mutate.sampled(kernels, 7, seed=3)
    assert chosen == mutate.sampled(kernels, 7, seed=3)
    assert chosen != mutate.sampled(kernels, 7, seed=4)
    assert [len(indices) for _, indices in chosen] == [3, 4]


def test_a_survivor_comes_with_its_source(monkeypatch):
    """Cases that look at nothing let everything past, and the line is named."""
    [kernel] = mutate.kernels_of("rope_rotate", kernel_cases.REPRESENTATIVE[:1])
    monkeypatch.setattr(mutate, "is_killed", lambda kernel, ptx: False)
    found = list(mutate.verdicts(kernel, range(30)))
    assert {mutate.outcome(verdict) for verdict in found} <= {"survived", "equivalent"}
    assert any("rope_rotate.cuh" in verdict.source for verdict in found)


def test_kernels_apart_keep_their_lines():
    ptx = "head\n.visible .entry a(\n)\n{\nret;\n}\n.visible .entry b()\n{\nret;\n}\n"
    assert kernel_ptx.only_kernels(ptx, {"a", "b"}) == ptx
    assert kernel_ptx.only_kernels(ptx, {"b"}).split("\n")[6:] == ptx.split("\n")[6:]
    assert "entry a" not in kernel_ptx.only_kernels(ptx, {"b"})


def test_explanations():
    assert all(entry.reason and entry.change for entry in EQUIVALENT)
    swapped = Mutation("swap operands: sub.f32 %f1, %f2, %f3 -> sub.f32 %f1, %f3, %f2", 1, "")
    assert "distance" in explanation("key_deviation_f32", swapped, "x_difference = a - b;")
    assert explanation("rope_rotate_f32", swapped, "float x = a - b;") == ""
