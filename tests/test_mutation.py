"""What operators write is counted by autograd, or refused."""

from __future__ import annotations

import pytest
import torch
from operator_arguments import named_arguments_of, tensors_in

from tokendance import testing
from tokendance.device import operators as ops

pytestmark = pytest.mark.usefixtures("one_thread")


def is_written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def written(name):
    """Names of the arguments that the schema says are mutated."""
    schema = getattr(torch.ops.tokendance, name).default._schema
    return [argument.name for argument in schema.arguments if is_written(argument)]


MUTATING = [name for name in ops.OPERATORS if written(name)]
EACH_WRITTEN = [(name, argument) for name in MUTATING for argument in written(name)]


def test_operators_that_return_nothing_are_those_that_mutate():
    schemas = {name: getattr(torch.ops.tokendance, name).default._schema for name in ops.OPERATORS}
    assert [name for name, schema in schemas.items() if not schema.returns] == MUTATING
    assert len(EACH_WRITTEN) == 15


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("name", MUTATING)
def test_what_is_written_counts_up_its_version_and_nothing_else_does(name, keywords):
    operator, arguments = getattr(torch.ops.tokendance, name), named_arguments_of(name)
    outputs = [id(t) for argument in written(name) for t in tensors_in([arguments[argument]])]
    storages = {
        t.untyped_storage().data_ptr() for t in tensors_in(arguments.values()) if id(t) in outputs
    }
    before = [(tensor, tensor._version) for tensor in tensors_in(arguments.values())]
    if keywords:
        operator(**arguments)
    else:
        operator(*arguments.values())
    for tensor, version in before:
        if id(tensor) in outputs:
            assert tensor._version > version
        elif tensor.untyped_storage().data_ptr() not in storages:
            assert tensor._version == version


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MUTATING)
def test_versions_without_grad_mode(name, grad_mode):
    """Tensors made in inference mode have no version, and are taken."""
    operator, arguments = getattr(torch.ops.tokendance, name), named_arguments_of(name)
    output = next(tensors_in([arguments[written(name)[0]]]))
    version = output._version
    with grad_mode():
        operator(**arguments)
        operator(**named_arguments_of(name))
    assert output._version > version


def with_grad(value):
    if isinstance(value, list):
        return [*value[:-1], value[-1].detach().requires_grad_()]
    return value.detach().requires_grad_()


FLOATING = [
    (name, argument)
    for name, argument in EACH_WRITTEN
    if next(tensors_in([named_arguments_of(name)[argument]])).is_floating_point()
]


@pytest.mark.parametrize(("name", "argument"), FLOATING)
def test_an_output_that_requires_grad_is_refused_and_left_as_it_was(name, argument):
    operator, arguments = getattr(torch.ops.tokendance, name), named_arguments_of(name)
    arguments[argument] = with_grad(arguments[argument])
    before = [tensor.detach().clone() for tensor in tensors_in(arguments.values())]
    layer = r"\[1\]" if isinstance(arguments[argument], list) else ""
    message = f"^{argument}{layer}: expected a tensor that does not require grad"
    with pytest.raises(RuntimeError, match=message):
        operator(**arguments)
    for tensor, was in zip(tensors_in(arguments.values()), before, strict=True):
        testing.assert_same_bits(tensor, was)
    with torch.no_grad():  # as torch's own operators
        operator(**arguments)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_needs_what_was_overwritten_is_an_error(compiled):
    x, weight = torch.ones(8, 2, 64), torch.ones(8, 2, 64, requires_grad=True)
    tables = torch.rand(16, 32), torch.rand(16, 32)
    positions = torch.arange(8, dtype=torch.int32)

    def overwrite(x):
        ops.rope_rotate_(x, None, None, positions, *tables)

    torch._dynamo.reset()
    product = (x * weight).sum()
    (torch.compile(overwrite, backend="aot_eager") if compiled else overwrite)(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
