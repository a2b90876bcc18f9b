"""Calls on a GPU as engines make them: over and over, first in a capture, in threads, by layers.

Like those of ``test_gpu.py`` they also run on the CPU, less often and without a graph.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_gpu
import torch
from attention_rounds import attention_round
from test_gpu import (
    E4M3,
    OPERATORS,
    Call,
    for_pools,
    of_one_size,
    recorded,
    rounds,
    stream_of_its_own,
)

from tokendance import testing
from tokendance.device import operators as ops
from tokendance.testing import reference

pytestmark = pytest.mark.usefixtures("one_thread")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TIMES = {"cpu": 5, "cuda": 200}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


# Over and over -----------------------------------------------------------------------------------


def busy_round(dtype, **options):
    """More items and rows than a small GPU runs at once."""
    if dtype == E4M3:
        options["query_dtype"] = BF16
    case = attention_round(
        6, agents=24, masters=(331, 200, 45), rows=3, work="planned", num_layers=2, dtype=dtype,
        **options,
    )  # fmt: skip
    return of_one_size([case])[0]


class Repeated:
    """A call in memory that is put back, on the device, to what it was before the call."""

    def __init__(self, operator, case, device):
        self.call = operator(case, device)
        self.call.load(case)
        case = self.call.case
        self.written = [case.round.buffer, *case.k_pool, *case.v_pool, *self.call.results]
        self.before = [tensor.clone() for tensor in self.written]

    def __call__(self):
        for tensor, before in zip(self.written, self.before, strict=True):
            tensor.copy_(before)
        self.call()


@for_pools
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_call_gives_the_same_bits(device, operator, dtype):
    """Two hundred times on a GPU, without waiting in between."""
    case = busy_round(dtype, **operator.options)
    repeated = Repeated(operator, case, device)
    repeated()
    repeated.call.check(case)
    first = [tensor.clone() for tensor in repeated.written]
    same = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(TIMES[device.type]):
        repeated()
        for tensor, expected in zip(repeated.written, first, strict=True):
            same &= testing.same_bits(tensor, expected).all()
    assert same


# First in a capture ------------------------------------------------------------------------------


def first_call_is_captured(name, device):
    """A call whose kernels this process has not loaded, as part of a graph that is replayed."""
    device = torch.device(device)
    operator = getattr(test_gpu, name)
    first, second, *_ = rounds(BF16, **operator.options)
    call = operator(first, device)
    call.load(first)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        repeat = test_gpu.captured(call)
    else:
        repeat = call
    for case in (first, second):
        call.load(case)
        repeat()
        call.check(case)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_a_first_call_is_captured(device, operator):
    if device.type == "cpu":
        first_call_is_captured(operator.__name__, device)
        return
    code = f"import test_gpu_calls as t; t.first_call_is_captured({operator.__name__!r}, 'cuda')"
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_MODULE_LOADING": "LAZY"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, env=environment, cwd=here, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# In threads --------------------------------------------------------------------------------------


SIZES = (
    {"head_dim": 64, "num_q_heads": 4, "num_kv_heads": 2, "dtype": BF16},
    {"head_dim": 128, "num_q_heads": 8, "num_kv_heads": 1, "dtype": F16, "agents": 7},
    {"head_dim": 256, "num_q_heads": 3, "num_kv_heads": 3, "dtype": F32, "rows": 2},
)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_threads_with_different_sizes(device, operator):
    """Kernels that ask for more shared memory than others, on a stream per thread."""
    cases = [
        of_one_size([attention_round(11 + i, num_layers=2, **size, **operator.options)])[0]
        for i, size in enumerate(SIZES)
    ]
    calls = [Repeated(operator, case, device) for case in cases]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    together = threading.Barrier(len(calls))

    def work(call):
        together.wait()
        with stream_of_its_own(device):
            for _ in range(TIMES[device.type]):
                call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with ThreadPoolExecutor(len(calls)) as pool:
        for finished in [pool.submit(work, call) for call in calls]:
            finished.result()
    for repeated, case in zip(calls, cases, strict=True):
        repeated.call.check(case)


# By layers ---------------------------------------------------------------------------------------


def own_positions(case, agent):
    """The positions of an agent's own rows, ascending, and the first of its pages in the list."""
    arrays, size = case.arrays, case.filled.block_size
    begin, length = int(arrays["own_page_indptr"][agent]), int(arrays["own_length"][agent])
    return arrays["own_position"][begin * size : begin * size + length].tolist(), begin


def at_own_rows(case):
    """The round with query rows moved back to own rows of their agents, one to each."""
    case, taken = case.copy(), set()
    for row in case.real_rows.tolist():
        agent, last = int(case.round.row_agent[row]), int(case.round.row_position[row])
        own = [
            position
            for position in own_positions(case, agent)[0]
            if position <= last and (agent, position) not in taken
        ]
        if own:
            case.round.row_position[row] = own[-1]
            taken.add((agent, own[-1]))
    return case


def slots_of_own_rows(case):
    """int64 ``[R]``: where a query row's key and value stand in the pools; -1 where they are a
    Master's or another query row's."""
    size = case.filled.block_size
    slots, taken = torch.full((len(case.q),), -1), set()
    for row in case.real_rows.tolist():
        agent, position = int(case.round.row_agent[row]), int(case.round.row_position[row])
        own, begin = own_positions(case, agent)
        if position in own and (agent, position) not in taken:
            page, offset = divmod(own.index(position), size)
            slots[row] = int(case.arrays["own_pages"][begin + page]) * size + offset
            taken.add((agent, position))
    return slots


class DecodeLayers(Call):
    """Projections, keys and values into the pools, attention, and the projection back, by layer."""

    def __init__(self, case, device):
        super().__init__(case, device)
        rows, heads, head_dim = case.q.shape
        kv_heads, layers = case.k_pool[0].shape[2], len(case.k_pool)
        generator = torch.Generator().manual_seed(3)

        def weights(inputs, outputs):
            values = torch.randn(layers, inputs, outputs, generator=generator) * inputs**-0.5
            return values.to(case.q.dtype).to(device)

        self.splits = [heads, kv_heads, kv_heads]
        width = (heads + 2 * kv_heads) * head_dim
        self.into, self.back = (
            weights(heads * head_dim, width),
            weights(heads * head_dim, heads * head_dim),
        )
        self.slots = torch.empty(rows, dtype=torch.int64, device=device)
        floats = case.round.extents.partials * heads * (head_dim + 1)
        self.workspace = torch.empty(floats, device=device)
        self.qkv = torch.empty(layers, rows, width, dtype=case.q.dtype, device=device)
        self.out = torch.empty(layers, *case.q.shape, dtype=case.q.dtype, device=device)
        self.lse = torch.empty(layers, rows, heads, device=device)
        self.results = [self.workspace, self.qkv, self.out, self.lse]

    def load(self, case):
        super().load(case)
        self.slots.copy_(slots_of_own_rows(case))

    def __call__(self):
        case, head_dim = self.case, self.case.q.shape[2]
        tables, position = (case.cos, case.sin, case.interleaved), case.round.row_position
        x = case.q.flatten(1)
        for layer in range(len(case.k_pool)):
            torch.mm(x, self.into[layer], out=self.qkv[layer])
            rows = self.qkv[layer].view(len(x), -1, head_dim)
            q, k, v = rows.split(self.splits, dim=1)
            k_scale, v_scale = scales_of(case, layer)
            for new, at, pool, scale in (
                (k, position, case.k_pool, k_scale),
                (v, None, case.v_pool, v_scale),
            ):
                ops.rope_rotate_out(
                    *(new, None, self.slots, None, at, *tables, 1.0, pool[layer], None, scale)
                )
            ops.collective_attention_out(
                *(q, case.k_pool[layer], case.v_pool[layer], *tables, case.round, case.scale),
                *(0, 0.0, None, 1.0, self.workspace, self.out[layer], self.lse[layer]),
                *(k_scale, v_scale),
            )
            x = x + torch.mm(self.out[layer].flatten(1), self.back[layer])

    def check(self, case):
        case, real, slots = case.copy(), case.real_rows, slots_of_own_rows(case)
        new = (slots >= 0).nonzero().flatten()
        x = case.q.flatten(1).double()
        for layer in range(len(case.k_pool)):
            found = self.qkv[layer].cpu()
            expected = x @ self.into[layer].cpu().double()
            testing.assert_close(found[real], expected[real], case.q.dtype, f"qkv of {layer}")
            q, k, v = found.view(*found.shape[:1], -1, case.q.shape[2]).split(self.splits, dim=1)
            tables, scales = (case.cos, case.sin, case.interleaved), scales_of(case, layer)
            for rows, at, pool, scale in (
                (k, case.round.row_position[new], case.k_pool[layer], scales[0]),
                (v, None, case.v_pool[layer], scales[1]),
            ):
                reference.rope_rotate_out(
                    *(rows, new, slots[new], None, at, *tables, 1.0, pool, None, scale)
                )
            testing.assert_same_bits(self.case.k_pool[layer], case.k_pool[layer])
            testing.assert_same_bits(self.case.v_pool[layer], case.v_pool[layer])
            out, lse = reference.collective_attention(
                *(q, case.k_pool[layer], case.v_pool[layer], *tables, case.round, case.scale),
                *(0, 0.0, None, 1.0, *scales),
            )
            testing.assert_close(
                self.out[layer].cpu()[real], out[real], case.q.dtype, f"attention of {layer}"
            )
            tolerance = testing.tolerance(case.q.dtype)
            torch.testing.assert_close(
                self.lse[layer].cpu()[real].double(), lse[real], rtol=tolerance, atol=tolerance
            )
            given = self.out[layer].cpu().double().flatten(1)
            x = x + given @ self.back[layer].cpu().double()


def scales_of(case, layer):
    """Of keys and of values, where the pools have any."""
    return [scale if scale is None else scale[layer] for scale in (case.k_scale, case.v_scale)]


@for_pools
def test_decode_layers_are_replayed(device, dtype):
    options = {"private_length": 40, "rows": 4, "dtype": dtype, "num_layers": 2}
    if dtype == E4M3:
        options["query_dtype"] = BF16
    cases = of_one_size(
        [
            attention_round(6, agents=6, **options),
            attention_round(6, agents=9, masters=(70, 200, 20), work="planned", **options),
            attention_round(6, agents=1, masters=(33,), **options),
            attention_round(4, agents=0, **options),
        ]
    )
    cases = [at_own_rows(case) for case in cases]
    assert [int((slots_of_own_rows(case) >= 0).sum()) for case in cases] == [9, 15, 4, 0]
    layers = DecodeLayers(cases[0], device)
    layers.load(cases[0])
    repeat = recorded(layers, device)
    for case in [*cases, cases[0]]:
        layers.load(case)
        repeat()
        layers.check(case)
