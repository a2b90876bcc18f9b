"""Every operator under `torch.library.opcheck` and `torch.compile`, and without an allocation."""

from __future__ import annotations

import pytest
import torch
from backends import METHODS
from operator_arguments import QUANTIZED_OPERATORS, arguments_of, tensors_in

from tokendance import testing
from tokendance.device import operators as ops

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.tokendance, name).default, arguments_of(name))


@pytest.mark.parametrize("dtype", testing.QUANTIZED, ids=str)
@pytest.mark.parametrize("name", QUANTIZED_OPERATORS)
def test_opcheck_of_quantized_arguments(name, dtype):
    operator = getattr(torch.ops.tokendance, name).default
    checks = ["test_autograd_registration", "test_faketensor"]
    if dtype == torch.int8:  # it compares by `allclose`, which torch has not for e4m3
        checks.append("test_schema")
    torch.library.opcheck(operator, arguments_of(name, dtype), test_utils=checks)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ops.OPERATORS),
        *((name, torch.float8_e4m3fn) for name in QUANTIZED_OPERATORS),
    ],
)
def test_compiled_whole(name, dtype):
    """One graph, the same results, the same mutations."""
    operator = getattr(torch.ops.tokendance, name)

    def call(*arguments):
        return operator(*arguments)

    eager, compiled = arguments_of(name, dtype), arguments_of(name, dtype)
    expected = call(*eager)
    torch._dynamo.reset()
    # What an earlier build's schemas were compiled to may still be in the compiler's cache.
    with torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(call, fullgraph=True)(*compiled)
    results = zip(tensors_in([got]), tensors_in([expected]), strict=True)
    for mine, wanted in (*results, *zip(tensors_in(compiled), tensors_in(eager), strict=True)):
        testing.assert_same_bits(mine, wanted)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in METHODS),
        *((name, torch.int8) for name in METHODS if name in QUANTIZED_OPERATORS),
    ],
)
def test_variants_with_outputs_allocate_no_tensor(name, dtype):
    operator, arguments = getattr(torch.ops.tokendance, name), arguments_of(name, dtype)
    operator(*arguments)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        operator(*arguments)
    events = [event for event in profile.events() if event.name == f"tokendance::{name}"]
    assert len(events) == 1
    assert events[0].cpu_memory_usage == 0
    assert not [event.name for event in events[0].cpu_children]


def test_every_operator_has_a_cpu_kernel():
    assert sorted(ops.registered("CPU")) == sorted(ops.OPERATORS)
