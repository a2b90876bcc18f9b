"""What torch makes by default, and where, changes nothing: tensors name their dtype and device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from operator_arguments import QUANTIZED_OPERATORS, arguments_of, case_and_dense, tensors_in

from tokendance import testing
from tokendance.device import operators as ops
from tokendance.device.rounds import RoundTensors
from tokendance.testing import reference

pytestmark = pytest.mark.usefixtures("one_thread")
DEFAULTS = [torch.bfloat16, torch.float64, "meta"]
"""A tensor that is made without a device lands on "meta", and fails with the first that is not."""


@contextmanager
def default(kind):
    """A default dtype, or the default device."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_device(kind) if isinstance(kind, str) else torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)


def round_of(dtype):
    return case_and_dense(dtype)[0].round


def wrapped(name, dtype):
    """Arguments of the typed wrapper, or of the reference: one object for the round."""
    arguments = arguments_of(name, dtype)
    parameters = [argument.name for argument in operator_of(name)._schema.arguments]
    if "round" in parameters:
        at = parameters.index("round")
        round = round_of(dtype)
        round = RoundTensors(arguments[at], round.extents)
        arguments[at : at + 2] = [round]
    return arguments


def operator_of(name):
    return getattr(torch.ops.tokendance, name).default


def outcome(call, arguments):
    result = call(*arguments)
    buffers = [a.buffer for a in arguments if isinstance(a, RoundTensors)]
    return [*tensors_in([result]), *tensors_in(arguments), *buffers]


REFERENCES = [name for name in ops.OPERATORS if hasattr(reference, name)]
CASES = [
    *((ops, name, torch.bfloat16) for name in ops.OPERATORS),
    *((ops, name, torch.int8) for name in QUANTIZED_OPERATORS),
    *((reference, name, torch.bfloat16) for name in REFERENCES),
    *((reference, name, torch.int8) for name in QUANTIZED_OPERATORS if name in REFERENCES),
    *((reference, name, torch.float8_e4m3fn) for name in QUANTIZED_OPERATORS if name in REFERENCES),
]


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
@pytest.mark.parametrize(
    ("module", "name", "dtype"), CASES, ids=[f"{m.__name__}-{n}-{d}" for m, n, d in CASES]
)
def test_operators_and_references(module, name, dtype, kind):
    arguments, again = wrapped(name, dtype), wrapped(name, dtype)
    expected = outcome(getattr(module, name), arguments)
    with default(kind):
        got = outcome(getattr(module, name), again)
    for mine, wanted in zip(got, expected, strict=True):
        assert mine.device == wanted.device
        testing.assert_same_bits(mine, wanted)


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
def test_tolerances_of_the_reference(kind):
    """With a tolerance, and with scales, the reference of `diff_encode` computes one of its own."""
    for dtype in (torch.bfloat16, torch.int8):
        arguments, again = wrapped("diff_encode", dtype), wrapped("diff_encode", dtype)
        arguments[10:12] = again[10:12] = [0.1, 0.01]
        expected = outcome(reference.diff_encode, arguments)
        with default(kind):
            got = outcome(reference.diff_encode, again)
        for mine, wanted in zip(got, expected, strict=True):
            testing.assert_same_bits(mine, wanted)


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
@pytest.mark.parametrize("name", ops.OPERATORS)
def test_fakes(name, kind):
    mode = torch._subclasses.FakeTensorMode()
    arguments = arguments_of(name)
    expected = list(tensors_in([operator_of(name)(*arguments)]))
    fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
    with default(kind), mode:
        got = list(tensors_in([operator_of(name)(*fakes)]))
    assert [(t.shape, t.dtype, t.device) for t in got] == [
        (t.shape, t.dtype, t.device) for t in expected
    ]


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
def test_rounds(kind):
    case = testing.random_round(3)
    with default(kind):
        made = RoundTensors.from_arrays(case.arrays, case.filled, case.round.extents)
        viewed = RoundTensors(case.round.buffer.numpy(), case.round.extents)
        assert made.device == viewed.device == torch.device("cpu")
        for name in case.round.extents.shapes():
            assert getattr(made, name).dtype == getattr(viewed, name).dtype == torch.int32
            assert getattr(made, name).device == torch.device("cpu")
    assert torch.equal(viewed.buffer, case.round.buffer)


@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_random_rounds(dtype, kind):
    """Tables of rotations are those of `Rope`."""
    options = {"dtype": dtype, "rotary_dim": 0}
    expected = testing.random_round(3, **options)
    with default(kind):
        got = testing.random_round(3, **options)
        dense = testing.dense_cache(got, 1)
    for field in vars(expected):
        mine, wanted = (list(tensors_in([getattr(case, field)])) for case in (got, expected))
        assert len(mine) == len(wanted)
        for one, other in zip(mine, wanted, strict=True):
            testing.assert_same_bits(one, other, field)
    assert torch.equal(got.round.buffer, expected.round.buffer)
    wanted = testing.dense_cache(expected, 1)
    assert torch.equal(dense.slot_mapping, wanted.slot_mapping)
    assert {rows.device.type for rows in (*dense.k, *dense.v)} == {"cpu"}
