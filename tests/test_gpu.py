"""What only a GPU can show: CUDA graphs, streams, a second device; and all of the kernels on one.

``make test-gpu`` runs this with the operators' own tests, ``make sanitize-gpu`` its compact cases
under compute-sanitizer. What is captured or put on a stream here is also run on the CPU, call by
call: so it is known that rounds, arguments and comparisons are right.
"""

from __future__ import annotations

import contextlib
from dataclasses import fields, replace
from typing import ClassVar

import backends
import kernel_cases
import pytest
import test_diff_encode
import torch
import torch.nn.functional as F
from attention_rounds import attention_round

from tokendance import testing
from tokendance.device import operators as ops
from tokendance.device.rounds import RoundTensors
from tokendance.host.round import RoundExtents
from tokendance.testing import reference

pytestmark = pytest.mark.usefixtures("one_thread")
E4M3 = torch.float8_e4m3fn
NUM_GPUS = torch.cuda.device_count()
for_pools = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, E4M3], ids=str)
SLEEP = 20_000_000  # cycles of a GPU: far longer than the host takes to enqueue two calls


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


# Calls whose contents change ---------------------------------------------------------------------


def of_one_size(cases):
    """The rounds in buffers, pools, queries and tables of one size, so that each may stand where
    another stood."""
    names = [field.name for field in fields(RoundExtents)]
    most = {name: max(getattr(case.round.extents, name) for case in cases) for name in names}
    extents = RoundExtents(**most)
    num_pages = max(len(case.k_pool[0]) for case in cases)
    longest = max(cases, key=lambda case: len(case.cos))

    def grown(x, length):
        result = torch.full((length, *x.shape[1:]), torch.nan, dtype=x.dtype)
        result[: len(x)] = x
        return result

    return [
        replace(
            case,
            round=RoundTensors.from_arrays(case.arrays, case.filled, extents),
            k_pool=[grown(pool, num_pages) for pool in case.k_pool],
            v_pool=[grown(pool, num_pages) for pool in case.v_pool],
            q=grown(case.q, extents.rows),
            cos=longest.cos,
            sin=longest.sin,
            length=F.pad(case.length, (0, extents.agents - len(case.length))),
        )
        for case in cases
    ]


class Call:
    """A call of an operator in memory that stays where it is."""

    options: ClassVar = {}  # of the rounds

    def __init__(self, case, device):
        self.case = case.copy(device)

    def load(self, case):
        """The contents of another round of this size; all results become NaN."""
        pairs = [(self.case.round.buffer, case.round.buffer), (self.case.q, case.q)]
        pairs.append((self.case.length, case.length))
        pairs += zip(self.case.k_pool, case.k_pool, strict=True)
        pairs += zip(self.case.v_pool, case.v_pool, strict=True)
        if case.k_scale is not None:
            pairs += [(self.case.k_scale, case.k_scale), (self.case.v_scale, case.v_scale)]
        for mine, other in pairs:
            mine.copy_(other)
        for result in self.results:
            result.fill_(torch.nan)


def of_first_layer(case):
    """Scales of keys and of values, where the pools have any."""
    return [scale if scale is None else scale[0] for scale in (case.k_scale, case.v_scale)]


class Attention(Call):
    """`collective_attention`."""

    def __init__(self, case, device):
        super().__init__(case, device)
        rows, heads, head_dim = case.q.shape
        floats = case.round.extents.partials * heads * (head_dim + 1)
        self.workspace = torch.empty(floats, device=device)
        self.out = torch.empty(case.q.shape, dtype=case.q.dtype, device=device)
        self.lse = torch.empty(rows, heads, device=device)
        self.results = [self.workspace, self.out, self.lse]

    def __call__(self):
        case = self.case
        ops.collective_attention_out(
            *(case.q, case.k_pool[0], case.v_pool[0], case.cos, case.sin, case.interleaved),
            *(case.round, case.scale, 0, 0.0, None, 1.0, self.workspace, self.out, self.lse),
            *of_first_layer(case),
        )

    def check(self, case):
        expected, expected_lse = reference.collective_attention(
            *(case.q, case.k_pool[0], case.v_pool[0], case.cos, case.sin, case.interleaved),
            *(case.round, case.scale, 0, 0.0, None, 1.0, *of_first_layer(case)),
        )
        out, lse, real = self.out.cpu(), self.lse.cpu(), case.real_rows
        testing.assert_close(out[real], expected[real], case.q.dtype, "out")
        tolerance = testing.tolerance(case.q.dtype)
        torch.testing.assert_close(
            lse[real].double(), expected_lse[real], rtol=tolerance, atol=tolerance
        )
        padding = case.round.row_agent < 0
        assert out[padding].isnan().all()
        assert lse[padding].isnan().all()


class Restore(Call):
    """`diff_restore` into the rows of every agent, one agent after the other."""

    def __init__(self, case, device):
        super().__init__(case, device)
        agents, length = case.round.extents.agents, len(case.cos)
        self.slots = torch.arange(agents * length, device=device).view(agents, length)
        shape = (agents * length, *case.k_pool[0].shape[2:])
        layers = range(len(case.k_pool))
        self.k = [torch.empty(shape, dtype=case.q.dtype, device=device) for _ in layers]
        self.v = [torch.empty(shape, dtype=case.q.dtype, device=device) for _ in layers]
        self.results = self.k + self.v

    def __call__(self):
        case = self.case
        ops.diff_restore(
            *(case.k_pool, case.v_pool, case.cos, case.sin, case.interleaved, case.round),
            *(self.slots, self.k, self.v, case.k_scale, case.v_scale),
        )

    def check(self, case):
        k = [torch.full_like(rows, torch.nan, device="cpu") for rows in self.k]
        v = [torch.full_like(rows, torch.nan, device="cpu") for rows in self.v]
        reference.diff_restore(
            *(case.k_pool, case.v_pool, case.cos, case.sin, case.interleaved, case.round),
            *(self.slots.cpu(), k, v, case.k_scale, case.v_scale),
        )
        for got, want in zip(self.results, k + v, strict=True):
            testing.assert_same_bits(got, want)


class Rotate(Call):
    """`rope_rotate` of the first heads of all queries to their positions, stored as keys are."""

    def __init__(self, case, device):
        super().__init__(case, device)
        self.keys = self.case.q[:, : case.k_pool[0].shape[2]]
        self.out = torch.empty(self.keys.shape, dtype=case.k_pool[0].dtype, device=device)
        self.results = [self.out]

    def __call__(self):
        case = self.case
        scale, _ = of_first_layer(case)
        ops.rope_rotate_out(
            *(self.keys, None, None, None, case.round.row_position),
            *(case.cos, case.sin, case.interleaved, 1.0, self.out, None, scale),
        )

    def check(self, case):
        real = case.real_rows
        expected = torch.full(self.out.shape, torch.nan, dtype=self.out.dtype)
        keys = case.q[:, : self.keys.shape[1]]
        scale, _ = of_first_layer(case)
        reference.rope_rotate_out(
            *(keys, real, real, None, case.round.row_position[real]),
            *(case.cos, case.sin, case.interleaved, 1.0, expected, None, scale),
        )
        testing.assert_same_bits(self.out.cpu()[real], expected[real])


class Deviation(Call):
    """`key_deviation` of the first heads of all queries, moved to their positions, from themselves,
    for two agents."""

    def __init__(self, case, device):
        super().__init__(case, device)
        self.keys = self.case.q[:, : case.k_pool[0].shape[2]]
        row = torch.arange(len(case.q), device=device)
        self.rows = torch.stack([row, row]), row
        self.out = torch.empty(len(case.q), device=device)
        self.results = [self.out]

    def arguments(self, case, keys):
        fresh, cached = (rows.to(keys.device) for rows in self.rows)
        position = case.round.row_position
        tables = (case.cos, case.sin, case.interleaved, 1.0)
        return keys, fresh, None, keys, cached, position, *tables

    def __call__(self):
        ops.key_deviation_out(*self.arguments(self.case, self.keys), self.out)

    def check(self, case):
        keys = case.q[:, : self.keys.shape[1]]
        want = reference.key_deviation(*self.arguments(case, keys))
        assert (want[case.real_rows] > 0).all()
        torch.testing.assert_close(
            self.out.cpu().double(), want, rtol=1e-5, atol=1e-8, equal_nan=True
        )


class Encode(Call):
    """`diff_encode` of what the Mirrors of a round stand for, some rows of it altered."""

    options: ClassVar = {"room_for_all": True}

    def __init__(self, case, device):
        super().__init__(case, device)
        agents, length = case.round.extents.agents, len(case.cos)
        pool = case.k_pool[0]
        shape = (agents * length, *pool.shape[2:])
        layers = range(len(case.k_pool))
        self.dense = testing.DenseCache(
            [torch.empty(shape, dtype=pool.dtype, device=device) for _ in layers],
            [torch.empty(shape, dtype=pool.dtype, device=device) for _ in layers],
            torch.arange(agents * length, device=device).view(agents, length),
        )
        self.results = self.dense.k + self.dense.v

    def dense_of(self, case):
        """On the CPU; rows that no token has are NaN."""
        dense = self.dense.copy()
        for rows in dense.k + dense.v:
            rows.fill_(torch.nan)
        reference.diff_restore(
            *(case.k_pool, case.v_pool, case.cos, case.sin, case.interleaved, case.round),
            *(dense.slot_mapping, dense.k, dense.v),
        )
        for agent, length in enumerate(case.length.tolist()):
            test_diff_encode.alter(dense, agent, range(0, length, 5), layer=1)
        return dense

    def load(self, case):
        super().load(test_diff_encode.forget_mirrors(case))
        dense = self.dense_of(case.copy())
        for mine, other in zip(self.results, dense.k + dense.v, strict=True):
            mine.copy_(other)

    def __call__(self):
        case = self.case
        ops.diff_encode(
            *(self.dense.k, self.dense.v, self.dense.slot_mapping, case.length, case.k_pool),
            *(case.v_pool, case.cos, case.sin, case.interleaved, case.round, 0.0, 0.0),
            *(case.k_scale, case.v_scale),
        )

    def check(self, case):
        expected = test_diff_encode.forget_mirrors(case)
        test_diff_encode.encoded(reference, expected, self.dense_of(case))
        testing.assert_same_bits(self.case.round.buffer, expected.round.buffer)
        pools = self.case.k_pool + self.case.v_pool, expected.k_pool + expected.v_pool
        for got, want in zip(*pools, strict=True):
            testing.assert_same_bits(got, want)


class Merge(Call):
    """`merge_states` of one half of the query rows with the other."""

    def __init__(self, case, device):
        super().__init__(case, device)
        rows, heads, head_dim = len(case.q) // 2, *case.q.shape[1:]
        generator = torch.Generator().manual_seed(9)
        self.partial_lse = torch.randn(2, rows, heads, generator=generator).to(device)
        self.partial_out = self.partials(self.case)
        self.out = torch.empty(rows, heads, head_dim, dtype=case.q.dtype, device=device)
        self.lse = torch.empty(rows, heads, device=device)
        self.results = [self.out, self.lse]

    @staticmethod
    def partials(case):
        return case.q[: len(case.q) // 2 * 2].view(2, -1, *case.q.shape[1:])

    def __call__(self):
        ops.merge_states_out(self.partial_out, self.partial_lse, None, self.out, self.lse)

    def check(self, case):
        out, lse = reference.merge_states(self.partials(case), self.partial_lse.cpu())
        testing.assert_close(self.out, out, case.q.dtype, "out")
        testing.assert_close(self.lse, lse, torch.float32, "lse")


OPERATORS = [Attention, Restore, Rotate, Deviation, Encode, Merge]


def rounds(dtype, **options):
    """Rounds that have little in common, the last of no agents at all."""
    options |= {"dtype": dtype, "num_layers": 2}
    if dtype == E4M3:
        options["query_dtype"] = torch.bfloat16
    return of_one_size(
        [
            attention_round(1, **options),
            attention_round(2, agents=5, masters=(70, 200, 20), rows=1, work="planned", **options),
            attention_round(3, agents=1, masters=(33,), rows=40, **options),
            attention_round(4, agents=0, **options),
        ]
    )


# CUDA graphs -------------------------------------------------------------------------------------


def recorded(call, device):
    """What repeats a call: the replay of a graph, on the CPU the call itself."""
    if device.type == "cpu":
        return call
    with stream_of_its_own(device):
        call()
    torch.cuda.synchronize(device)
    return captured(call)


def captured(call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@for_pools
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_graph_serves_rounds_of_other_contents(device, operator, dtype):
    cases = rounds(dtype, **operator.options)
    call = operator(cases[0], device)
    repeat = recorded(call, device)
    for case in [*cases, cases[0]]:
        call.load(case)
        repeat()
        call.check(case)


# Streams -----------------------------------------------------------------------------------------


def stream_of_its_own(device):
    """A new stream to work on; there is none on the CPU."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


@for_pools
@pytest.mark.parametrize("operator", OPERATORS)
def test_two_streams(device, operator, dtype):
    """Each call waits for what its stream does before: the stream sleeps, then changes the round.

    On another stream it would have seen the round that stood there, and lost its results.
    """
    before, *cases = rounds(dtype, **operator.options)[:3]
    calls = [operator(before, device) for _ in cases]
    contents = [case.copy(device) for case in cases]
    for call, content in zip(calls, contents, strict=True):
        with stream_of_its_own(device):
            if device.type == "cuda":
                torch.cuda._sleep(SLEEP)
            call.load(content)
            call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for call, case in zip(calls, cases, strict=True):
        call.check(case)


# Kernels on devices ------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_operator_has_kernels():
    assert set(backends.METHODS) <= set(ops.registered("CUDA"))


@pytest.mark.gpu
@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_compact_cases(operator):
    """The cases that reach every instruction, of kernels that stand for all."""
    for case in kernel_cases.cases_of(operator):
        case.run(backends.backend("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two CUDA devices, torch finds {NUM_GPUS}")
@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_a_device_that_is_not_the_current_one(operator):
    current = torch.cuda.current_device()
    backend = backends.TorchBackend(f"cuda:{(current + 1) % NUM_GPUS}")
    for case in kernel_cases.cases_of(operator, kernel_cases.REPRESENTATIVE[:1]):
        case.run(backend)
    assert torch.cuda.current_device() == current
