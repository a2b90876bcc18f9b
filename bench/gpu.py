"""The CUDA operators on this machine's GPU, one line per shape.

    python -m bench.gpu [--only attention] [--samples 30]

A line has the median time of a call; bytes or FLOPs per second; that rate's fraction of the best
copy or matrix product of the same run; and how many times as long others take to the same result:
``sdpa``, torch's scaled_dot_product_attention over dense copies, one per agent, and ``cascade``,
FlashInfer's, where it is installed and has a kernel. FlashInfer gets the case that it can serve,
Masters at the same positions in all prompts.

Bytes are those of rows that have to be read and written, each once; indices, tables and the packed
round are not counted, nor are the queries of attention. A call finds nothing in L2, and the device
waits before it until the host has enqueued it, so that launches are not measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokendance as td
from bench.mirrors import DECODE, BenchRound, make_round
from tokendance.device import operators as ops

WARM_UP = 5  # calls before the samples
AHEAD = 2_000_000  # cycles that the device waits for the host: about a millisecond
COPIED = 1 << 30  # bytes
GEMM_SIZE = 8192
SHIFT = 700  # positions that rows move by
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """An operator's call that is measured.

    Attributes:
        bytes: of rows that it has to read and write; 0 where FLOPs bound it.
        flops: of its products, otherwise.
        peers: other ways to the same result.
    """

    name: str
    dtype: torch.dtype
    call: Callable[[], object]
    bytes: int = 0
    flops: int = 0
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)


# Shapes ------------------------------------------------------------------------------------------


def _name(operator: str, dtype: torch.dtype, heads: int, head_dim: int, text: str) -> str:
    return f"{operator:20} {str(dtype)[6:]:8} {f'{heads}x{head_dim}':6} {text}"


def _normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def rope_rotate(
    device: torch.device,
    *,
    dtype: torch.dtype,
    rows: int,
    destinations: int = 1,
    heads: int = 8,
    head_dim: int = 128,
) -> Shape:
    """Rows of a cache, each to random places, from a position of its own."""
    x = _normal(rows, heads, head_dim, dtype=dtype, device=device)
    out = torch.empty(rows * destinations, heads, head_dim, dtype=dtype, device=device)
    rope = td.Rope.default(head_dim=head_dim, theta=10000.0, max_position=32768).to(device)
    row_out = torch.randperm(rows * destinations, device=device).view(rows, destinations)
    origin = torch.arange(rows, dtype=torch.int32, device=device) % (32768 - SHIFT)
    to = (origin + SHIFT)[:, None].repeat(1, destinations)
    return Shape(
        _name("rope_rotate", dtype, heads, head_dim, f"{rows} rows to {destinations}"),
        dtype,
        lambda: ops.rope_rotate_out(
            x, None, row_out, origin, to, rope.cos, rope.sin, rope.interleaved, 1.0, out
        ),
        bytes=rows * (1 + destinations) * heads * head_dim * dtype.itemsize,
    )


def key_deviation(
    device: torch.device,
    *,
    dtype: torch.dtype,
    tokens: int,
    agents: int = 8,
    heads: int = 8,
    head_dim: int = 128,
) -> Shape:
    """Fresh keys of a group, as they stand in the agents' prompts, against the cached ones."""
    fresh = _normal(agents * tokens, heads, head_dim, dtype=dtype, device=device)
    cached = _normal(tokens // 16, 16, heads, head_dim, dtype=dtype, device=device)
    rope = td.Rope.default(head_dim=head_dim, theta=10000.0, max_position=tokens + SHIFT)
    rope = rope.to(device)
    fresh_row = torch.arange(agents * tokens, device=device).view(agents, tokens)
    at = torch.arange(tokens, dtype=torch.int32, device=device)
    fresh_position, cached_row = (at + SHIFT).repeat(agents, 1), torch.arange(tokens, device=device)
    out = torch.empty(tokens, device=device)
    return Shape(
        _name("key_deviation", dtype, heads, head_dim, f"{agents} agents, {tokens} tokens"),
        dtype,
        lambda: ops.key_deviation_out(
            *(fresh, fresh_row, fresh_position, cached, cached_row, at),
            *(rope.cos, rope.sin, rope.interleaved, 1.0, out),
        ),
        bytes=(agents + 1) * tokens * heads * head_dim * dtype.itemsize,
    )


def merge_states(
    device: torch.device,
    *,
    dtype: torch.dtype,
    rows: int,
    partials: int = 4,
    heads: int = 32,
    head_dim: int = 128,
) -> Shape:
    """Partial outputs of attention, and their LSEs, into one."""
    partial_out = _normal(partials, rows, heads, head_dim, dtype=dtype, device=device)
    partial_lse = torch.randn(partials, rows, heads, device=device)
    out, lse = torch.empty_like(partial_out[0]), torch.empty_like(partial_lse[0])
    return Shape(
        _name("merge_states", dtype, heads, head_dim, f"{partials} partials of {rows} rows"),
        dtype,
        lambda: ops.merge_states_out(partial_out, partial_lse, None, out, lse),
        bytes=(partials + 1) * rows * heads * (head_dim * dtype.itemsize + 4),
    )


@dataclass(frozen=True)
class _Dense:
    """A round of ten agents that keep 64 private rows and 4 of each of 4 Masters themselves, and
    room for its dense KV, one agent after the other."""

    case: BenchRound
    slots: Tensor
    k: list[Tensor]
    v: list[Tensor]
    own: int  # rows that agents keep themselves
    hidden: int  # rows of the Masters that every agent keeps itself
    row_bytes: int  # K and V of all layers

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, shared: int, layers: int) -> _Dense:
        agents, private, segments, overridden = 10, 64, 4, 4
        case = make_round(
            agents=agents,
            shared=shared,
            private=private,
            segments=segments,
            overridden=overridden,
            num_layers=layers,
            dtype=dtype,
            device=device,
        )
        heads, head_dim = case.geometry.num_kv_heads, case.geometry.head_dim
        slots = torch.arange(agents * case.length, device=device).view(agents, case.length)
        dense = [
            torch.empty(slots.numel(), heads, head_dim, dtype=dtype, device=device)
            for _ in range(2 * layers)
        ]
        own = agents * (private + segments * overridden)
        row_bytes = 2 * layers * heads * head_dim * dtype.itemsize
        hidden = segments * overridden
        return cls(case, slots, dense[0::2], dense[1::2], own, hidden, row_bytes)

    def restore(self) -> None:
        case = self.case
        ops.diff_restore(
            *(case.k_pools, case.v_pools, *case.tables, case.round, self.slots, self.k, self.v)
        )

    def name(self, operator: str) -> str:
        geometry = self.case.geometry
        agents, length = self.slots.shape
        return _name(
            operator,
            geometry.dtype,
            geometry.num_kv_heads,
            geometry.head_dim,
            f"{agents} agents of {length} rows, {geometry.num_layers} layers",
        )


def diff_restore(
    device: torch.device, *, dtype: torch.dtype, shared: int, layers: int = 8
) -> Shape:
    """Mirrors into dense caches: rows that some agent sees are read once, all rows written."""
    dense = _Dense.make(device, dtype, shared, layers)
    rows = shared - dense.hidden + dense.own + dense.slots.numel()
    return Shape(dense.name("diff_restore"), dtype, dense.restore, bytes=rows * dense.row_bytes)


def diff_encode(device: torch.device, *, dtype: torch.dtype, shared: int, layers: int = 8) -> Shape:
    """Dense caches into Mirrors: Masters and all rows are read once, own rows written.

    Rows that agents keep differ in the first layer, and no other has to be read of their Masters.
    """
    dense = _Dense.make(device, dtype, shared, layers)
    dense.restore()
    case, (agents, length) = dense.case, dense.slots.shape
    lengths = torch.full((agents,), length, dtype=torch.int32, device=device)
    rows = shared - dense.hidden + dense.slots.numel() + dense.own
    return Shape(
        dense.name("diff_encode"),
        dtype,
        lambda: ops.diff_encode(
            *(dense.k, dense.v, dense.slots, lengths, case.k_pools, case.v_pools),
            *(*case.tables, case.round),
        ),
        bytes=rows * dense.row_bytes + dense.hidden * dense.row_bytes // layers,
    )


def attention_decode(
    device: torch.device,
    *,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    agents: int,
    shared: int,
    private: int,
    pool_dtype: torch.dtype | None = None,
) -> Shape:
    """A row of every agent over the Masters, at another shift for each, and its own rows.

    Args:
        heads: Hk, G and D.
        pool_dtype: of keys and values where they are quantized.
    """
    case = _attention_round(device, dtype, heads, agents, shared, private, 1, pool_dtype)
    num_kv_heads, group, head_dim = heads
    peers = {"sdpa": _sdpa(case, agents, queries=1)}
    if pool_dtype is None and (cascade := _cascade(case)):
        peers["cascade"] = cascade
    kept = "" if pool_dtype is None else " in e4m3"
    itemsize = (pool_dtype or dtype).itemsize
    return Shape(
        _name(
            "attention, decode",
            dtype,
            num_kv_heads,
            head_dim,
            f"G {group}, {agents} agents, {shared} shared, {private} own{kept}",
        ),
        dtype,
        case.attention(),
        bytes=(shared + agents * private) * 2 * num_kv_heads * head_dim * itemsize,
        peers=peers,
    )


def attention_prefill(
    device: torch.device,
    *,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    agents: int,
    shared: int,
    private: int,
) -> Shape:
    """Every row of every agent's prompt."""
    num_kv_heads, group, head_dim = heads
    length = shared + private
    case = _attention_round(device, dtype, heads, agents, shared, private, rows=length)
    pairs = agents * length * (length + 1) // 2  # of a row and a key that it sees
    return Shape(
        _name(
            "attention, prefill",
            dtype,
            num_kv_heads,
            head_dim,
            f"G {group}, {agents} agents, {shared} shared, {private} own",
        ),
        dtype,
        case.attention(),
        flops=4 * pairs * num_kv_heads * group * head_dim,
        peers={"sdpa": _sdpa(case, agents, queries=length)},
    )


def _attention_round(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    agents: int,
    shared: int,
    private: int,
    rows: int,
    pool_dtype: torch.dtype | None = None,
) -> BenchRound:
    num_kv_heads, group, head_dim = heads
    return make_round(
        agents=agents,
        shared=shared,
        private=private,
        rows=rows,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=dtype,
        pool_dtype=pool_dtype,
        device=device,
    )


def _sdpa(case: BenchRound, agents: int, queries: int) -> Callable[[], object]:
    """torch's attention over a dense copy of every agent's KV, whose last rows ask."""
    geometry, device = case.geometry, case.q.device
    q_heads, kv_heads = geometry.num_q_heads, geometry.num_kv_heads
    shape = (case.length, geometry.head_dim)
    q = _normal(agents, q_heads, queries, shape[1], dtype=geometry.dtype, device=device)
    k = _normal(agents, kv_heads, *shape, dtype=geometry.dtype, device=device)
    v = _normal(agents, kv_heads, *shape, dtype=geometry.dtype, device=device)
    options = {"is_causal": queries == case.length, "enable_gqa": q_heads > kv_heads}
    return lambda: F.scaled_dot_product_attention(q, k, v, **options)


def cascade_pages(case: BenchRound) -> list[list[Tensor]]:
    """The round's pages as FlashInfer's cascade takes them: all Masters for all agents, then own
    pages. Masters end with their last page.

    Returns:
        For both levels: the ranges of query rows, the ranges of pages, page ids and the rows of the
        last pages, all int32.
    """

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=case.q.device)

    uses, agents = case.mirrors[0].uses, len(case.mirrors)
    assert all(use.length % case.block_size == 0 for use in uses)
    shared = [int(page) for use in uses for page in use.master.pages]
    own_pages, own_indptr, own_last = [], [0], []
    for mirror in case.mirrors:
        own_pages += [int(page) for page in mirror.own_pages]
        own_indptr.append(len(own_pages))
        own_last.append((len(mirror.own_position) - 1) % case.block_size + 1)
    return [
        [int32([0, agents]), int32(list(range(agents + 1)))],
        [int32([0, len(shared)]), int32(own_indptr)],
        [int32(shared), int32(own_pages)],
        [int32([case.block_size]), int32(own_last)],
    ]


def _cascade(case: BenchRound) -> Callable[[], object] | None:
    """FlashInfer's cascade over the very pages, or None where it is not to be had."""
    geometry = case.geometry
    if case.q.device.type != "cuda" or find_spec("flashinfer") is None:
        return None
    if geometry.dtype == f32 or geometry.head_dim not in (64, 128, 256):
        return None
    import flashinfer

    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=case.q.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    wrapper.plan(
        *cascade_pages(case),
        geometry.num_q_heads,
        geometry.num_kv_heads,
        geometry.head_dim,
        case.block_size,
        q_data_type=geometry.dtype,
    )
    return lambda: wrapper.run(case.q, (case.k_pools[0], case.v_pools[0]))


PREFILL = [((3, 3, 64), 8, 4096, 64), ((4, 7, 128), 4, 4096, 64), ((8, 4, 128), 4, 4096, 64)]


def _attention(heads: Any, agents: int, shared: int, private: int, **more: Any) -> dict[str, Any]:
    return {"heads": heads, "agents": agents, "shared": shared, "private": private, **more}


SHAPES: list[tuple[Callable[..., Shape], dict[str, Any]]] = [
    *((rope_rotate, {"dtype": dtype, "rows": 1 << 18}) for dtype in (bf16, f16, f32)),
    (rope_rotate, {"dtype": bf16, "rows": 1 << 15, "destinations": 8}),
    (rope_rotate, {"dtype": bf16, "rows": 1 << 18, "head_dim": 80}),
    *((key_deviation, {"dtype": dtype, "tokens": 1 << 15}) for dtype in (bf16, f32)),
    *((diff_encode, {"dtype": dtype, "shared": 4096}) for dtype in (bf16, f32)),
    *((diff_restore, {"dtype": dtype, "shared": 4096}) for dtype in (bf16, f32)),
    *((merge_states, {"dtype": dtype, "rows": 1 << 13}) for dtype in (bf16, f32)),
    *((attention_decode, _attention(*sizes, dtype=bf16)) for sizes in DECODE),
    *((attention_decode, _attention(*sizes, dtype=f16)) for sizes in DECODE[2:3]),
    *((attention_decode, _attention(*sizes, dtype=f32)) for sizes in DECODE[2:3]),
    *(
        (attention_decode, _attention(*sizes, dtype=bf16, pool_dtype=torch.float8_e4m3fn))
        for sizes in DECODE[1:4]
    ),
    *((attention_prefill, _attention(*sizes, dtype=bf16)) for sizes in PREFILL),
    (attention_prefill, _attention((8, 1, 64), 2, 4096, 64, dtype=f32)),
]


# Measuring ---------------------------------------------------------------------------------------


class Clock:
    """Medians of samples on a GPU."""

    def __init__(self, device: torch.device, samples: int) -> None:
        self._samples = samples
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        # Read, not written: lines that were written would have to leave L2 during the sample.
        self._flush = torch.zeros(max(4 * cache, 256 << 20) // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds of a call."""
        for _ in range(WARM_UP):
            call()
        seconds = []
        for _ in range(self._samples):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.sum()
            torch.cuda._sleep(AHEAD)
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(seconds)


def copy_rate(clock: Clock, device: torch.device) -> float:
    """Bytes read plus bytes written per second."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / clock(lambda: target.copy_(source))


def gemm_rate(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of torch's matrix product; of fp32 without TF32, which kernels do not use."""
    a, b = (_normal(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * GEMM_SIZE**3 / clock(lambda: torch.mm(a, b, out=out))


def line(
    shape: Shape, seconds: float, rates: Mapping[Any, float], peers: Mapping[str, float]
) -> str:
    """One line of the report.

    Args:
        rates: the best copy's under ``"copy"``, the best matrix product's under its dtype.
        peers: seconds of them.
    """
    if shape.bytes:
        rate, best, unit, of = shape.bytes / seconds, rates["copy"], "GB/s", "copy"
        shown = rate / 1e9
    else:
        rate, best, unit, of = shape.flops / seconds, rates[shape.dtype], "TFLOP/s", "gemm"
        shown = rate / 1e12
    return (
        f"{shape.name:<76} {seconds * 1e6:9.1f} us {shown:8.1f} {unit:7} {rate / best:5.2f} of {of}"
        + "".join(f"  {name} {time / seconds:.2f}x" for name, time in peers.items())
    )


def missing() -> str | None:
    """Why nothing can be measured, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None if ops.registered("CUDA") else "the library was built without CUDA kernels"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--only", default="", help="part of an operator's name")
    parser.add_argument("--samples", type=int, default=30, help="timed calls per shape")
    options = parser.parse_args(arguments)
    if reason := missing():
        print(f"python -m bench.gpu: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = Clock(device, options.samples)
    rates: dict[Any, float] = {"copy": copy_rate(clock, device)}
    rates |= {dtype: gemm_rate(clock, device, dtype) for dtype in (bf16, f16, f32)}
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    print(f"copy {rates['copy'] / 1e9:.0f} GB/s", end="")
    for dtype in (bf16, f16, f32):
        print(f", {str(dtype)[6:]} gemm {rates[dtype] / 1e12:.1f} TFLOP/s", end="")
    print(flush=True)
    for make, sizes in SHAPES:
        if options.only not in make.__name__:
            continue
        shape = make(device, **sizes)
        seconds = clock(shape.call)
        peers = {name: clock(call) for name, call in shape.peers.items()}
        print(line(shape, seconds, rates, peers), flush=True)
        del shape
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
