"""`torch.compile` and `torch.export` see each operator once, whatever its sizes are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from operator_arguments import QUANTIZED_OPERATORS, arguments_of, tensors_in
from torch._dynamo.testing import CompileCounterWithBackend

from tokendance import testing
from tokendance.device import operators as ops

pytestmark = pytest.mark.usefixtures("one_thread", "sizes_that_happen_to_agree")
SIZES = (1, 3, 2, 5)
CASES = [
    *((name, torch.bfloat16) for name in ops.OPERATORS),
    *((name, torch.float8_e4m3fn) for name in QUANTIZED_OPERATORS),
]


@pytest.fixture
def sizes_that_happen_to_agree():
    """torch takes sizes that agree in the first call for one, of whatever arguments they are."""
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield


def sized(name, dtype, size):
    """Arguments none of which is a view: torch follows the sizes of what a view was taken from."""

    def whole(argument):
        if isinstance(argument, torch.Tensor):
            return testing.StorageCopies()(argument) if argument._base is None else argument.clone()
        return [whole(item) for item in argument] if isinstance(argument, list) else argument

    return [whole(argument) for argument in arguments_of(name, dtype, size)]


def assert_same_call(call, operator, arguments, again):
    """The same results and the same mutations as the operator's own; `again` are the arguments."""
    expected, got = operator(*arguments), call(*again)
    results = zip(tensors_in([got]), tensors_in([expected]), strict=True)
    for mine, wanted in (*results, *zip(tensors_in(again), tensors_in(arguments), strict=True)):
        testing.assert_same_bits(mine, wanted)


class Compiled:
    """A function, compiled for all sizes, that counts its compilations after the first call.

    The first compiles twice where an argument is a float, which torch first takes for a tensor.
    """

    def __init__(self, function):
        torch._dynamo.reset()
        self._counter = CompileCounterWithBackend("aot_eager")
        self._call = torch.compile(function, backend=self._counter, dynamic=True, fullgraph=True)
        self._of_first_call = 0

    def __call__(self, *arguments):
        result = self._call(*arguments)
        self._of_first_call = self._of_first_call or self._counter.frame_count
        return result

    @property
    def recompilations(self):
        assert self._of_first_call in (1, 2)
        return self._counter.frame_count - self._of_first_call


def test_what_is_compiled_again_is_counted():
    compiled = Compiled(lambda x, twice: x + x if twice else x * 3)
    for size, twice in ((2, True), (3, True), (4, False), (5, False)):
        compiled(torch.ones(size), twice)
    assert compiled.recompilations == 1


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_an_operator_is_compiled_once_for_all_sizes(name, dtype):
    operator = getattr(torch.ops.tokendance, name)
    compiled = Compiled(lambda *arguments: operator(*arguments))
    for size in SIZES:
        arguments, again = (sized(name, dtype, size) for _ in range(2))
        assert_same_call(compiled, operator, arguments, again)
    assert compiled.recompilations == 0


@pytest.mark.parametrize("paged", [False, True])
def test_all_rows_of_a_tensor_are_compiled_once(paged):
    """Without `row_in` the number of results is that of the rows, which nothing else tells."""
    compiled = Compiled(lambda *arguments: torch.ops.tokendance.rope_rotate(*arguments))
    for pages in (2, 5, 3):
        x = torch.randn((pages, 8, 2, 64) if paged else (pages, 2, 64))
        rows = x.shape[:-2].numel()
        positions = torch.arange(rows, dtype=torch.int32)
        tables = torch.rand(64, 32), torch.rand(64, 32)
        got = compiled(x, None, None, positions, *tables)
        wanted = torch.ops.tokendance.rope_rotate(x, None, None, positions, *tables)
        testing.assert_same_bits(got, wanted)
    assert compiled.recompilations == 0


def rounds():
    """Rounds of different sizes, some of whose extents are 0 or 1, at first, too."""
    for seed, options in enumerate(
        (
            {"agents": 2, "masters": (9,), "whole_uses": True, "private_length": 0, "slack": False},
            {"agents": 4, "masters": (40, 33), "rows_per_item": 2},
            {"agents": 2, "masters": (20,), "whole_uses": True},
            {"agents": 9, "masters": (20, 9, 33), "rows": 1},
        )
    ):
        case = testing.random_round(seed, **{"rows": 4, "work": "planned", **options})
        if len(case.q) > 1:
            yield case


def test_a_round_of_any_extents_is_compiled_once():
    """Through the typed wrapper, with the round as an object."""

    def attend(q, k_pool, v_pool, cos, sin, round):
        return ops.collective_attention(q, k_pool, v_pool, cos, sin, False, round, 0.125)

    compiled = Compiled(attend)
    cases = list(rounds())
    extents = torch.tensor([case.extents for case in cases])
    assert len(cases) == 4
    assert ((extents == 0) | (extents == 1)).any(dim=1).sum() >= 2
    for case in cases:
        case = replace(case, interleaved=False)
        arguments = case.q, case.k_pool[0], case.v_pool[0], case.cos, case.sin, case.round
        rows = case.real_rows
        for mine, wanted in zip(compiled(*arguments), attend(*arguments), strict=True):
            testing.assert_same_bits(mine[rows], wanted[rows])
    assert compiled.recompilations == 0


def dynamic_in(argument):
    """Dynamic shapes of an argument: all that torch allows to be."""
    if isinstance(argument, torch.Tensor):
        return [torch.export.Dim.AUTO] * argument.dim()
    if isinstance(argument, list):
        return [dynamic_in(item) for item in argument]
    return torch.export.Dim.AUTO if type(argument) is int else None


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_an_exported_operator_takes_all_sizes(name, dtype):
    operator = getattr(torch.ops.tokendance, name)

    class Call(torch.nn.Module):
        def forward(self, *arguments):
            return operator(*arguments)

    first = sized(name, dtype, 2)
    shapes = (tuple(dynamic_in(argument) for argument in first),)
    exported = torch.export.export(Call(), tuple(first), dynamic_shapes=shapes)
    for size in SIZES:
        arguments, again = (sized(name, dtype, size) for _ in range(2))
        assert_same_call(exported.module(), operator, arguments, again)
