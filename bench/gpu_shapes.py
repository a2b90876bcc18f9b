"""The calls that `python -m bench.gpu` measures, and what each has to move or to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokendance as td
from bench import gpu_peers
from bench.mirrors import DECODE, BenchRound, make_round
from tokendance import testing
from tokendance.device import operators as ops
from tokendance.device.rounds import RoundTensors

FARTHEST = 8192  # positions that rows move by, at most
RUN = 256  # rows that move together
# Beyond these the CPU takes too long: bytes of arguments, FLOPs.
MOST_BYTES, MOST_FLOPS = 8 << 30, 10**12
f32, f16, bf16, e4m3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """An operator's call that is measured.

    Attributes:
        arguments: of the operator, the results among them.
        results: picks what the operator writes out of its arguments.
        bytes: of rows that it has to read and write; 0 where FLOPs bound it.
        flops: of its products, otherwise.
        peers: other ways to the same result; each makes the call that is measured, or raises.
    """

    name: str
    dtype: torch.dtype
    operator: Callable[..., object]
    arguments: Sequence[Any]
    results: Callable[[Sequence[Any]], list[Tensor]]
    bytes: int = 0
    flops: int = 0
    peers: Mapping[str, gpu_peers.Peer] = field(default_factory=dict)

    def call(self) -> None:
        self.operator(*self.arguments)

    def difference(self) -> float | None:
        """The largest from the CPU operator's results, over the largest of these; 0 where all bits
        agree, None where the CPU would take too long."""
        nbytes = sum(tensor.nbytes for tensor in _tensors(self.arguments))
        if nbytes > MOST_BYTES or self.flops > MOST_FLOPS:
            return None
        arguments = _on_cpu(self.arguments)
        self.call()
        self.operator(*arguments)
        worst = 0.0
        for found, expected in zip(
            self.results(self.arguments), self.results(arguments), strict=True
        ):
            found, expected = (x.detach().cpu() for x in (found, expected))
            if testing.same_bits(found, expected).all():
                continue
            found, expected = found.double(), expected.double()
            different = (found != expected) & ~(found.isnan() & expected.isnan())
            if different.any():
                apart = (found - expected)[different].abs().max() / expected.abs().max()
                worst = max(worst, float(apart)) if apart.isfinite() else float("inf")
        return worst


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, RoundTensors):
        return [value.buffer]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return []


def _on_cpu(value: Any) -> Any:
    """A copy with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, RoundTensors):
        return RoundTensors(_on_cpu(value.buffer), value.extents)
    if isinstance(value, list | tuple):
        return [_on_cpu(one) for one in value]
    return value


def name_of(operator: str, dtype: torch.dtype, heads: int, head_dim: int, text: str) -> str:
    return f"{operator:20} {str(dtype)[6:]:8} {f'{heads}x{head_dim}':6} {text}"


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_()


# Rows that move ----------------------------------------------------------------------------------


def _moved(origin: Tensor, parts: int, limit: int) -> Tensor:
    """int32 ``[len(origin), parts]``: positions that rows move to, by a shift of its own for each
    run of ``RUN`` rows and each part."""
    runs = -(-len(origin) // RUN)
    shift = torch.randint(-FARTHEST, FARTHEST, (runs, parts), device=origin.device)
    to = origin[:, None] + shift.repeat_interleave(RUN, dim=0)[: len(origin)]
    return to.clamp(0, limit - 1).int()


def rope_rotate(
    device: torch.device,
    *,
    dtype: torch.dtype,
    rows: int,
    destinations: int = 1,
    fresh: bool = False,
    heads: int = 8,
    head_dim: int = 128,
) -> Shape:
    """Rows of a cache, each to random places, in runs with a shift of their own; or, ``fresh``,
    keys that were just computed, each to its own position."""
    limit = 32768
    x = normal(rows, heads, head_dim, dtype=dtype, device=device)
    out = torch.empty(rows * destinations, heads, head_dim, dtype=dtype, device=device)
    rope = td.Rope.default(head_dim=head_dim, theta=10000.0, max_position=limit).to(device)
    row_out = torch.randperm(rows * destinations, device=device).view(rows, destinations)
    origin = torch.arange(rows, dtype=torch.int32, device=device) % limit
    to = origin[:, None].repeat(1, destinations) if fresh else _moved(origin, destinations, limit)
    begin = None if fresh else origin
    kind = "fresh rows" if fresh else "rows"
    return Shape(
        name_of("rope_rotate", dtype, heads, head_dim, f"{rows} {kind} to {destinations}"),
        dtype,
        ops.rope_rotate_out,
        [x, None, row_out, begin, to, rope.cos, rope.sin, rope.interleaved, 1.0, out],
        lambda arguments: [arguments[9]],
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
    fresh = normal(agents * tokens, heads, head_dim, dtype=dtype, device=device)
    cached = normal(tokens // 16, 16, heads, head_dim, dtype=dtype, device=device)
    limit = tokens + FARTHEST
    rope = td.Rope.default(head_dim=head_dim, theta=10000.0, max_position=limit).to(device)
    fresh_row = torch.arange(agents * tokens, device=device).view(agents, tokens)
    at = torch.arange(tokens, dtype=torch.int32, device=device)
    fresh_position = _moved(at, agents, limit).T.contiguous()
    cached_row, out = torch.arange(tokens, device=device), torch.empty(tokens, device=device)
    return Shape(
        name_of("key_deviation", dtype, heads, head_dim, f"{agents} agents, {tokens} tokens"),
        dtype,
        ops.key_deviation_out,
        [
            *(fresh, fresh_row, fresh_position, cached, cached_row, at),
            *(rope.cos, rope.sin, rope.interleaved, 1.0, out),
        ],
        lambda arguments: [arguments[10]],
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
    partial_out = normal(partials, rows, heads, head_dim, dtype=dtype, device=device)
    partial_lse = torch.randn(partials, rows, heads, device=device)
    out, lse = torch.empty_like(partial_out[0]), torch.empty_like(partial_lse[0])
    return Shape(
        name_of("merge_states", dtype, heads, head_dim, f"{partials} partials of {rows} rows"),
        dtype,
        ops.merge_states_out,
        [partial_out, partial_lse, None, out, lse],
        lambda arguments: list(arguments[3:]),
        bytes=(partials + 1) * rows * heads * (head_dim * dtype.itemsize + 4),
    )


# Mirrors -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
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
    def make(cls, device: torch.device, dtype: torch.dtype, shared: int, layers: int) -> Dense:
        agents, private, segments, overridden = 10, 64, 4, 4
        case = make_round(
            agents=agents,
            shared=shared,
            private=private,
            segments=segments,
            overridden=overridden,
            num_layers=layers,
            dtype=dtype,
            shuffled=True,
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

    @property
    def restored(self) -> list[Any]:
        """Arguments of `diff_restore`."""
        case = self.case
        pools = [case.k_pools, case.v_pools, *case.tables, case.round]
        return [*pools, self.slots, self.k, self.v]

    def name(self, operator: str) -> str:
        geometry = self.case.geometry
        agents, length = self.slots.shape
        return name_of(
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
    dense = Dense.make(device, dtype, shared, layers)
    rows = shared - dense.hidden + dense.own + dense.slots.numel()
    return Shape(
        dense.name("diff_restore"),
        dtype,
        ops.diff_restore,
        dense.restored,
        lambda arguments: [*arguments[7], *arguments[8]],
        bytes=rows * dense.row_bytes,
    )


def diff_encode(device: torch.device, *, dtype: torch.dtype, shared: int, layers: int = 8) -> Shape:
    """Dense caches into Mirrors: Masters and all rows are read once, own rows written.

    Rows that agents keep differ in the first layer, and no other has to be read of their Masters.
    """
    dense = Dense.make(device, dtype, shared, layers)
    ops.diff_restore(*dense.restored)
    case, (agents, length) = dense.case, dense.slots.shape
    lengths = torch.full((agents,), length, dtype=torch.int32, device=device)
    rows = shared - dense.hidden + dense.slots.numel() + dense.own
    return Shape(
        dense.name("diff_encode"),
        dtype,
        ops.diff_encode,
        [
            *(dense.k, dense.v, dense.slots, lengths, case.k_pools, case.v_pools),
            *(*case.tables, case.round),
        ],
        lambda arguments: [*arguments[4], *arguments[5], arguments[9].buffer],
        bytes=rows * dense.row_bytes + dense.hidden * dense.row_bytes // layers,
    )


# Attention ---------------------------------------------------------------------------------------


def attention_decode(
    device: torch.device,
    *,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    agents: int,
    shared: int,
    private: int,
    segments: int = 8,
    pool_dtype: torch.dtype | None = None,
) -> Shape:
    """A row of every agent over the Masters, at another shift for each, and its own rows.

    Args:
        heads: Hk, G and D.
        pool_dtype: of keys and values where they are quantized.
    """
    num_kv_heads, group, head_dim = heads
    case = _attention_round(
        device, dtype, heads, agents, shared, private, 1, segments=segments, pool_dtype=pool_dtype
    )
    kept = "" if pool_dtype is None else " in e4m3"
    pieces = f" of {segments} Masters" if segments != 8 else ""
    return Shape(
        name_of(
            "attention, decode",
            dtype,
            num_kv_heads,
            head_dim,
            f"G {group}, {agents} agents, {shared} shared{pieces}, {private} own{kept}",
        ),
        dtype,
        ops.collective_attention_out,
        case.attention_arguments(),
        _outputs,
        bytes=(shared + agents * private)
        * 2
        * num_kv_heads
        * head_dim
        * (pool_dtype or dtype).itemsize,
        peers=gpu_peers.of_decode(case),
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
        name_of(
            "attention, prefill",
            dtype,
            num_kv_heads,
            head_dim,
            f"G {group}, {agents} agents, {shared} shared, {private} own",
        ),
        dtype,
        ops.collective_attention_out,
        case.attention_arguments(),
        _outputs,
        flops=4 * pairs * num_kv_heads * group * head_dim,
        peers=gpu_peers.of_prefill(case),
    )


def _outputs(arguments: Sequence[Any]) -> list[Tensor]:
    return list(arguments[13:15])


def _attention_round(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    agents: int,
    shared: int,
    private: int,
    rows: int,
    segments: int = 8,
    pool_dtype: torch.dtype | None = None,
) -> BenchRound:
    num_kv_heads, group, head_dim = heads
    return make_round(
        agents=agents,
        shared=shared,
        private=private,
        rows=rows,
        segments=segments,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=dtype,
        pool_dtype=pool_dtype,
        shuffled=True,
        device=device,
    )


# Which -------------------------------------------------------------------------------------------


def _attention(heads: Any, agents: int, shared: int, private: int, **more: Any) -> dict[str, Any]:
    return {"heads": heads, "agents": agents, "shared": shared, "private": private, **more}


PREFILL = [((3, 3, 64), 8, 4096, 64), ((4, 7, 128), 4, 4096, 64), ((8, 4, 128), 4, 4096, 64)]
LLAMA = (8, 4, 128)  # Hk, G and D of Llama 3 8B
Sizes = list[tuple[Callable[..., Shape], dict[str, Any]]]

USUAL: Sizes = [
    *((rope_rotate, {"dtype": dtype, "rows": 1 << 18}) for dtype in (bf16, f16, f32)),
    (rope_rotate, {"dtype": bf16, "rows": 1 << 18, "fresh": True}),
    (rope_rotate, {"dtype": bf16, "rows": 1 << 15, "destinations": 8}),
    (rope_rotate, {"dtype": bf16, "rows": 1 << 18, "head_dim": 80}),
    *((key_deviation, {"dtype": dtype, "tokens": 1 << 15}) for dtype in (bf16, f32)),
    *((diff_encode, {"dtype": dtype, "shared": 4096}) for dtype in (bf16, f32)),
    *((diff_restore, {"dtype": dtype, "shared": 4096}) for dtype in (bf16, f32)),
    *((merge_states, {"dtype": dtype, "rows": 1 << 13}) for dtype in (bf16, f32)),
    *((attention_decode, _attention(*sizes, dtype=bf16)) for sizes in DECODE),
    *((attention_decode, _attention(*sizes, dtype=f16)) for sizes in DECODE[2:3]),
    *((attention_decode, _attention(*sizes, dtype=f32)) for sizes in DECODE[2:3]),
    *((attention_decode, _attention(*sizes, dtype=bf16, pool_dtype=e4m3)) for sizes in DECODE[1:4]),
    *((attention_prefill, _attention(*sizes, dtype=bf16)) for sizes in PREFILL),
    (attention_prefill, _attention((8, 1, 64), 2, 4096, 64, dtype=f32)),
]
# A few hundred MB and more: launches and tails no longer count. Up to 512 queries of a KV head.
LARGER: Sizes = [
    (rope_rotate, {"dtype": bf16, "rows": 1 << 20}),
    (diff_restore, {"dtype": bf16, "shared": 16384, "layers": 16}),
    (diff_encode, {"dtype": bf16, "shared": 16384, "layers": 16}),
    (attention_decode, _attention(LLAMA, 32, 3200, 256, segments=50, dtype=bf16)),
    (attention_decode, _attention(LLAMA, 64, 32768, 1024, dtype=bf16)),
    (attention_decode, _attention(LLAMA, 64, 32768, 1024, dtype=bf16, pool_dtype=e4m3)),
    (attention_decode, _attention(LLAMA, 256, 8192, 256, dtype=bf16)),
    (attention_decode, _attention((8, 1, 128), 256, 8192, 64, dtype=bf16)),
    (attention_decode, _attention((8, 8, 128), 64, 8192, 256, dtype=bf16)),
    (attention_prefill, _attention(LLAMA, 8, 8192, 256, dtype=bf16)),
]


def smaller(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The same with few rows and agents, for a rehearsal."""
    least = {"rows": 16, "tokens": 32, "shared": 64, "private": 4, "agents": 2, "layers": 2}
    few = {
        name: min(sizes[name], max(sizes[name] // 64, least[name]))
        for name in least
        if name in sizes
    }
    if "segments" in sizes:
        few["segments"] = 4
    return {**sizes, **few}
