"""Operators on pools whose pages lie beyond the reach of 32-bit offsets."""

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


BEYOND = 2_200_000_000  # elements: more than an int32 counts


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def operators(request):
    return backends.backend(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def case(request):
    case = testing.random_round(
        6, agents=2, masters=(37,), whole_uses=True, room_for_all=True, dtype=request.param, rows=4
    )
    assert len(case.real_rows) > 0
    assert case.filled.uses > 0
    return case


def far_apart(pages, device):
    """The pages on a device, the last of them ``BEYOND`` elements behind the first or more."""
    if device.type == "cpu":
        return testing.far_apart(pages)
    stride = -(-BEYOND // (len(pages) - 1))
    total = (len(pages) - 1) * stride + pages[0].numel()
    torch.cuda.empty_cache()
    if total * pages.element_size() > torch.cuda.mem_get_info(device)[0]:
        pytest.skip(f"needs {total * pages.element_size() >> 30} GiB more of the device's memory")
    memory = torch.empty(total, dtype=pages.dtype, device=device)
    return memory.as_strided(pages.shape, (stride, *pages[0].contiguous().stride())).copy_(pages)


def with_far_pools(case, device):
    """The round on a device, its pools far apart."""
    return replace(
        case.copy(device),
        k_pool=[far_apart(pool, device) for pool in case.k_pool],
        v_pool=[far_apart(pool, device) for pool in case.v_pool],
    )


def test_rotation(operators, case):
    device, rows = operators.device, case.k_pool[0].nan_to_num(0.5)
    near, far = torch.zeros_like(rows), far_apart(torch.zeros_like(rows), device)
    total = rows.shape[0] * rows.shape[1]
    row_in, row_out = torch.arange(total), torch.randperm(total)
    to = (torch.arange(total) % case.cos.shape[0]).int()
    for module, x, out in ((reference, rows, near), (operators, far_apart(rows, device), far)):
        arguments = (row_in, row_out, None, to, case.cos, case.sin)
        arguments = [None if one is None else one.to(x.device) for one in arguments]
        module.rope_rotate_out(x, *arguments, False, 1.0, out)
    testing.assert_same_bits(far, near)


def test_deviation(operators, case):
    device, rows = operators.device, case.k_pool[0].nan_to_num(0.5)
    total = rows.shape[0] * rows.shape[1]
    index = torch.arange(total)
    position = (index % case.cos.shape[0]).int()
    fresh, others = index.flip(0)[None], (index, position, case.cos, case.sin)
    expected = reference.key_deviation(rows, fresh, None, rows, *others, False, 1.0)
    far, out = far_apart(rows, device), torch.empty(total, device=device)
    others = [one.to(device) for one in others]
    operators.key_deviation_out(far, fresh.to(device), None, far, *others, False, 1.0, out)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-8)


def test_restore(operators, case):
    device, expected = operators.device, testing.dense_cache(case, 1)
    test_diff_restore.restored(reference, case, expected)
    got = testing.dense_cache(case, 1)
    far = replace(
        got,
        k=[far_apart(rows, device) for rows in got.k],
        v=[far_apart(rows, device) for rows in got.v],
        slot_mapping=got.slot_mapping.to(device),
    )
    test_diff_restore.restored(operators, with_far_pools(case, device), far)
    for mine, want in zip(far.k + far.v, expected.k + expected.v, strict=True):
        testing.assert_same_bits(mine, want)


def test_encode(operators, case):
    dense = test_diff_encode.restored(case)
    expected = test_diff_encode.forget_mirrors(case)
    far = with_far_pools(expected, operators.device)
    test_diff_encode.encoded(reference, expected, dense)
    test_diff_encode.encoded(operators, far, dense.copy(operators.device))
    testing.assert_same_bits(far.round.buffer, expected.round.buffer)
    for mine, want in zip(far.k_pool + far.v_pool, expected.k_pool + expected.v_pool, strict=True):
        testing.assert_same_bits(mine, want)


def test_attention(operators, case):
    near, far = case.copy(operators.device), with_far_pools(case, operators.device)
    results = [
        torch.ops.tokendance.collective_attention(
            *(each.q, each.k_pool[0], each.v_pool[0], each.cos, each.sin, each.interleaved),
            *(each.round.buffer, each.extents, 0.1),
        )
        for each in (near, far)
    ]
    for mine, want in zip(*results, strict=True):
        testing.assert_same_bits(mine.cpu()[case.real_rows], want.cpu()[case.real_rows])
