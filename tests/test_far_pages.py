"""The CPU operators on pools whose pages lie beyond the reach of 32-bit offsets."""

from __future__ import annotations

from dataclasses import replace

import backends
import pytest
import test_diff_encode
import test_diff_restore
import torch

from tokendance import testing
from tokendance.testing import reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cpu():
    return backends.backend("cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def case(request):
    case = testing.random_round(
        6, agents=2, masters=(37,), whole_uses=True, room_for_all=True, dtype=request.param, rows=4
    )
    assert len(case.real_rows) > 0
    assert case.filled.uses > 0
    return case


def with_far_pools(case):
    return replace(
        case,
        k_pool=[testing.far_apart(pool) for pool in case.k_pool],
        v_pool=[testing.far_apart(pool) for pool in case.v_pool],
    )


def test_rotation(cpu, case):
    rows = case.k_pool[0].nan_to_num(0.5)
    near, far = torch.zeros_like(rows), testing.far_apart(torch.zeros_like(rows))
    total = rows.shape[0] * rows.shape[1]
    row_in, row_out = torch.arange(total), torch.randperm(total)
    to = (torch.arange(total) % case.cos.shape[0]).int()
    for module, x, out in ((reference, rows, near), (cpu, testing.far_apart(rows), far)):
        module.rope_rotate_out(x, row_in, row_out, None, to, case.cos, case.sin, False, 1.0, out)
    testing.assert_same_bits(far, near)


def test_deviation(cpu, case):
    rows = case.k_pool[0].nan_to_num(0.5)
    total = rows.shape[0] * rows.shape[1]
    index = torch.arange(total)
    position = (index % case.cos.shape[0]).int()
    arguments = (index.flip(0)[None], None), (index, position), (case.cos, case.sin, False, 1.0)
    expected = reference.key_deviation(rows, *arguments[0], rows, *arguments[1], *arguments[2])
    far, out = testing.far_apart(rows), torch.empty(total)
    cpu.key_deviation_out(far, *arguments[0], far, *arguments[1], *arguments[2], out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-8)


def test_restore(cpu, case):
    expected = testing.dense_cache(case, 1)
    test_diff_restore.restored(reference, case, expected)
    got = testing.dense_cache(case, 1)
    far = replace(
        got,
        k=[testing.far_apart(rows) for rows in got.k],
        v=[testing.far_apart(rows) for rows in got.v],
    )
    test_diff_restore.restored(cpu, with_far_pools(case), far)
    for mine, want in zip(far.k + far.v, expected.k + expected.v, strict=True):
        testing.assert_same_bits(mine, want)


def test_encode(cpu, case):
    dense = test_diff_encode.restored(case)
    expected = test_diff_encode.forget_mirrors(case)
    far = with_far_pools(expected.copy())
    test_diff_encode.encoded(reference, expected, dense)
    test_diff_encode.encoded(cpu, far, dense)
    testing.assert_same_bits(far.round.buffer, expected.round.buffer)
    for mine, want in zip(far.k_pool + far.v_pool, expected.k_pool + expected.v_pool, strict=True):
        testing.assert_same_bits(mine, want)


def test_attention(cpu, case):
    far = with_far_pools(case)
    tables = (case.cos, case.sin, case.interleaved)
    results = [
        torch.ops.tokendance.collective_attention(
            each.q, each.k_pool[0], each.v_pool[0], *tables, case.round.buffer, case.extents, 0.1
        )
        for each in (case, far)
    ]
    for mine, want in zip(*results, strict=True):
        testing.assert_same_bits(mine[case.real_rows], want[case.real_rows])
