"""Memory traffic of the CUDA kernels, counted while their PTX runs on the CPU: no GPU needed.

    python -m bench.traffic [--only restore]

One line per kernel and shape. ``read`` and ``written``: bytes of keys, values and other rows, and
their ratio to the fewest that the operator can do with. ``sectors``: 32-byte sectors that warps'
requests touched, relative to what their bytes would fill; caches may merge them, so that memory
sees fewer. Further bytes that threads asked for, relative to the rows; nearly all are answered by
caches: ``tables``; ``indices`` (with the packed round but for what follows); override ``masks``;
``work`` (items, their rows and chunks, partials of rows); ``queries`` of attention; ``partials``
with log-sum-exps. ``conflicts``: extra wavefronts of shared memory. ``instr/B``: PTX instructions
of threads per byte of rows. Kernel params are constant memory and not counted.

Rounds are small but are planned with the capacity of large ones, so that a block has as many agents
and layers as it would have there. Instructions of blocks that find nothing to do are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from tokendance import testing
from tokendance.device.rounds import RoundTensors
from tokendance.host.round import RoundExtents
from tokendance.testing import reference
from tools.kernel_ptx import ptx_backend

PtxBackend, Traffic = ptx_backend.PtxBackend, ptx_backend.Traffic

ROWS = ("rows", "pool", "partials", "q")
OTHERS = {
    "tables": ("tables",),
    "indices": ("indices", "round"),
    "masks": ("masks",),
    "work": ("work",),
    "queries": ("q",),
    "partials": ("partials", "lse"),
}


@dataclass(frozen=True)
class Measurement:
    """Traffic of one call; the fewest bytes that it has to read and write are given."""

    operator: str
    shape: str
    fewest_read: int
    fewest_written: int
    traffic: dict[str, Traffic]
    conflicts: int
    instructions: int
    rows: tuple[str, ...] = ROWS  # categories of buffers that hold them

    def _total(self, names: tuple[str, ...], counter: str) -> int:
        return sum(getattr(self.traffic.get(name, Traffic()), counter) for name in names)

    @property
    def read(self) -> int:
        return self._total(self.rows, "load_bytes")

    @property
    def written(self) -> int:
        return self._total(self.rows, "store_bytes")

    @property
    def sector_ratio(self) -> float:
        """Sectors of rows, relative to the fewest that hold what the requests asked for."""
        return self._total(self.rows, "sectors") / self._total(self.rows, "ideal")

    def other(self, *names: str) -> float:
        """Bytes of categories that do not hold rows, relative to the rows."""
        others = tuple(name for name in names if name not in self.rows)
        nbytes = self._total(others, "load_bytes") + self._total(others, "store_bytes")
        return nbytes / (self.read + self.written)

    def line(self) -> str:
        moved = self.read + self.written
        written = f"{self.written / self.fewest_written:.3f}" if self.fewest_written else "-"
        return (
            f"{self.operator:20} {self.shape:50} {self.read:9} {self.read / self.fewest_read:6.3f}"
            f" {self.written:9} {written:>6} {self.sector_ratio:7.3f}"
            + "".join(f" {self.other(*names):8.1%}" for names in OTHERS.values())
            + f" {self.conflicts:9} {32 * self.instructions / moved:7.2f}"
        )


def header() -> str:
    return (
        f"{'operator':20} {'shape':50} {'read':>9} {'ratio':>6} {'written':>9} {'ratio':>6}"
        f" {'sectors':>7}"
        + "".join(f" {name:>8}" for name in OTHERS)
        + f" {'conflicts':>9} {'instr/B':>7}"
    )


def _instructions(ptx: PtxBackend) -> int:
    return sum(stats.warp_instructions for stats in ptx.stats)


def _measured(
    ptx: PtxBackend,
    operator: str,
    shape: str,
    fewest_read: int,
    fewest_written: int,
    idle_instructions: int = 0,
    rows: tuple[str, ...] = ROWS,
) -> Measurement:
    return Measurement(
        operator,
        shape,
        fewest_read,
        fewest_written,
        ptx.traffic(),
        sum(stats.bank_conflicts for stats in ptx.stats),
        _instructions(ptx) - idle_instructions,
        rows,
    )


def _shape(dtype: torch.dtype, heads: int, head_dim: int, interleaved: bool, text: str) -> str:
    style = "interleaved" if interleaved else "half-split"
    return f"{_name(dtype):8} {heads}x{head_dim} {style}, {text}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype)[6:].removesuffix("_e4m3fn")


def _of(dtype: torch.dtype, other: torch.dtype) -> str:
    return "" if other == dtype else f" of {_name(other)}"


def _row_bytes(dtype: torch.dtype, heads: int, head_dim: int) -> int:
    return heads * head_dim * dtype.itemsize


def _tables(head_dim: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    case = testing.random_round(
        0, agents=1, masters=(60,), whole_uses=True, head_dim=head_dim, interleaved=interleaved
    )
    return case.cos, case.sin


def rope_rotate(
    ptx: PtxBackend,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    interleaved: bool,
    destinations: int,
    out_dtype: torch.dtype | None = None,
) -> Measurement:
    """Rows of a cache moved to one or several places."""
    rows = 64
    x = torch.randn(rows, heads, head_dim).to(dtype)
    out_dtype = out_dtype or dtype
    out = torch.empty(rows * destinations, heads, head_dim, dtype=out_dtype)
    cos, sin = _tables(head_dim, interleaved)
    row_out = torch.randperm(rows * destinations).view(rows, destinations)
    position = torch.randint(0, 50, (rows, destinations), dtype=torch.int32)
    ptx.rope_rotate_out(
        x, torch.randperm(rows), row_out, position[:, 0], position.flip(0), cos, sin,
        interleaved, 1.0, out,
    )  # fmt: skip
    text = f"{rows} rows to {destinations}{_of(dtype, out_dtype)}"
    shape = _shape(dtype, heads, head_dim, interleaved, text)
    read = rows * _row_bytes(dtype, heads, head_dim)
    return _measured(ptx, "rope_rotate", shape, read, out.nbytes)


def key_deviation(
    ptx: PtxBackend, dtype: torch.dtype, heads: int, head_dim: int, interleaved: bool
) -> Measurement:
    """Fresh keys of a group against the cached ones."""
    agents, tokens = 4, 32
    fresh = torch.randn(agents * tokens, heads, head_dim).to(dtype)
    cached = torch.randn(tokens, heads, head_dim).to(dtype)
    cos, sin = _tables(head_dim, interleaved)
    position = torch.randint(0, 50, (agents, tokens), dtype=torch.int32)
    ptx.key_deviation_out(
        fresh, torch.randperm(agents * tokens).view(agents, tokens), position, cached,
        torch.randperm(tokens), position[0].flip(0), cos, sin, interleaved, 1.0,
        torch.empty(tokens),
    )  # fmt: skip
    shape = _shape(dtype, heads, head_dim, interleaved, f"{agents} agents, {tokens} tokens")
    nbytes = (agents + 1) * tokens * _row_bytes(dtype, heads, head_dim)
    return _measured(ptx, "key_deviation", shape, nbytes, 0)


def merge_states(ptx: PtxBackend, dtype: torch.dtype, heads: int, head_dim: int) -> Measurement:
    """Partial outputs of attention into one."""
    partials, rows = 4, 16
    partial = torch.randn(partials, rows, heads, head_dim).to(dtype)
    out = torch.empty(rows, heads, head_dim, dtype=dtype)
    ptx.merge_states_out(
        partial, torch.randn(partials, rows, heads), None, out, torch.empty(rows, heads)
    )
    shape = f"{str(dtype)[6:]:8} {heads}x{head_dim}, {partials} partials of {rows} rows"
    nbytes = rows * _row_bytes(dtype, heads, head_dim)
    return _measured(ptx, "merge_states", shape, partials * nbytes, nbytes)


def _round(dtype: torch.dtype, heads: int, head_dim: int, interleaved: bool) -> testing.RandomRound:
    case = testing.random_round(
        1,
        agents=6,
        masters=(64, 43),
        private_length=24,
        whole_uses=True,
        masks="none",
        num_layers=2,
        num_kv_heads=heads,
        num_q_heads=heads,
        head_dim=head_dim,
        interleaved=interleaved,
        dtype=dtype,
        room_for_all=True,
        slack=False,
    )
    extents = replace(case.round.extents, master_pages=600)
    return replace(case, round=RoundTensors.from_arrays(case.arrays, case.filled, extents))


def _without_content(case: testing.RandomRound) -> testing.RandomRound:
    """A round of the same capacity in which there is nothing to do."""
    filled = RoundExtents(block_size=case.filled.block_size)
    empty = RoundTensors.from_arrays({}, filled, case.round.extents)
    return replace(case, round=empty, length=torch.zeros_like(case.length))


def _master_rows(case: testing.RandomRound, agents: int) -> int:
    """Master rows that are visible to an agent, each once for a tile of so many agents."""
    total = 0
    num_agents = case.length.numel()
    for first in range(0, num_agents, agents):
        needed: set[int] = set()
        for agent in range(first, min(first + agents, num_agents)):
            rows = reference.mirror_rows(case.round, agent)
            masters = rows.pool_row.numel() - int(case.round.own_length[agent])
            needed.update(rows.pool_row[:masters].tolist())
        total += len(needed)
    return total


def diff_restore(
    ptx: PtxBackend,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    interleaved: bool,
    out_dtype: torch.dtype | None = None,
) -> Measurement:
    """Mirrors of a round into a paged cache."""
    case = _round(dtype, heads, head_dim, interleaved)
    dense = testing.dense_cache(case, 1, dtype=out_dtype)
    for content in (_without_content(case), case):
        idle = _instructions(ptx)  # of the first call, when the second is made
        ptx.diff_restore(
            case.k_pool, case.v_pool, case.cos, case.sin, interleaved, content.round.buffer,
            case.extents, dense.slot_mapping, dense.k, dense.v, case.k_scale, case.v_scale,
        )  # fmt: skip
    assert ptx.launched is not None
    agents = ptx.launched.launches[0].tile.agents
    nbytes = 2 * len(case.k_pool) * _row_bytes(dtype, heads, head_dim)
    out_dtype = dense.k[0].dtype
    written_bytes = 2 * len(case.k_pool) * _row_bytes(out_dtype, heads, head_dim)
    read = _master_rows(case, agents) + int(case.round.own_length.sum())
    written = sum(
        reference.mirror_rows(case.round, agent).pool_row.numel()
        for agent in range(case.length.numel())
    )
    text = f"{case.length.numel()} agents{_of(dtype, out_dtype)}"
    shape = _shape(dtype, heads, head_dim, interleaved, text)
    return _measured(ptx, "diff_restore", shape, read * nbytes, written * written_bytes, idle)


def diff_encode(
    ptx: PtxBackend, dtype: torch.dtype, heads: int, head_dim: int, interleaved: bool
) -> Measurement:
    """Dense KV of a round, every sixth row altered in its last layer, against the Masters."""
    case = _round(dtype, heads, head_dim, interleaved)
    dense = testing.dense_cache(case, 1)
    reference.diff_restore(
        case.k_pool, case.v_pool, case.cos, case.sin, interleaved, case.round,
        dense.slot_mapping, dense.k, dense.v,
    )  # fmt: skip
    for agent, length in enumerate(case.length.tolist()):
        slots = dense.slot_mapping[agent, agent:length:6]
        changed = reference.gather_rows(dense.v[-1], slots).clone()
        changed[:, -1, -1] = (changed[:, -1, -1].float() / 2 + 1).to(dtype)
        reference.scatter_rows(dense.v[-1], slots, changed)
    unmasked = replace(case, round=RoundTensors.from_arrays(case.arrays, case.filled))
    for content in (_without_content(case), case):
        idle = _instructions(ptx)  # of the first call, when the second is made
        ptx.diff_encode(
            dense.k, dense.v, dense.slot_mapping, content.length, case.k_pool, case.v_pool,
            case.cos, case.sin, interleaved, content.round.buffer, case.extents,
        )  # fmt: skip
    assert ptx.launched is not None
    own = int(case.round.own_length.sum())
    agents = ptx.launched.launches[0].tile.agents
    compared = sum(case.arrays["use_length"].tolist())
    read = _master_rows(unmasked, agents) + compared + own
    nbytes = 2 * len(case.k_pool) * _row_bytes(dtype, heads, head_dim)
    shape = _shape(dtype, heads, head_dim, interleaved, f"{case.length.numel()} agents")
    return _measured(ptx, "diff_encode", shape, read * nbytes, own * nbytes, idle)


def _keys_read(case: testing.RandomRound, window: int) -> int:
    """Stored rows that work items have to read: each that a query row of the item sees, once."""
    arrays, size, total = case.arrays, case.filled.block_size, 0
    uses = {
        (agent, master): (delta, length)
        for agent, master, delta, length in zip(
            *(arrays[f"use_{name}"].tolist() for name in ("agent", "master", "delta", "length")),
            strict=True,
        )
    }
    for row_begin, row_end, chunk_begin, chunk_end, *_ in arrays["work"].tolist():
        rows = arrays["work_rows"][row_begin:row_end]
        queries = [(int(arrays["row_agent"][i]), int(arrays["row_position"][i])) for i in rows]
        for source, first, last, _ in arrays["work_chunks"][chunk_begin:chunk_end].tolist():
            seen: set[int] = set()
            for agent, position in queries:
                if source >= 0:
                    delta, length = uses.get((agent, source), (0, 0))
                    positions = [delta + i for i in range(min(length, last))]
                elif agent == -1 - source:
                    begin = int(arrays["own_page_indptr"][agent]) * size
                    positions = arrays["own_position"][begin : begin + last].tolist()
                else:
                    continue
                seen.update(
                    i
                    for i, key in enumerate(positions)
                    if i >= first and 0 <= position - key < (window or 1 << 31)
                )
            total += len(seen)
    return total


def collective_attention(
    ptx: PtxBackend,
    dtype: torch.dtype,
    heads: int,
    group: int,
    head_dim: int,
    agents: int,
    window: int = 0,
    query_dtype: torch.dtype | None = None,
) -> Measurement:
    """Decode: a row of each agent over one Master, at different shifts, and over its own rows."""
    case = testing.random_round(
        31,
        agents=agents,
        masters=(1024,),
        private_length=40,
        rows=1,
        whole_uses=True,
        masks="none",
        num_kv_heads=heads,
        num_q_heads=heads * group,
        head_dim=head_dim,
        dtype=dtype,
        query_dtype=query_dtype,
        work="planned",
        rows_per_item=64 // group,
        window=window,
        slack=False,
    )
    rows, num_q_heads, _ = case.q.shape
    out, lse = torch.empty(case.q.shape, dtype=case.q.dtype), torch.empty(rows, num_q_heads)
    partials = case.round.extents.partials
    ptx.collective_attention_out(
        case.q, case.k_pool[0], case.v_pool[0], case.cos, case.sin, case.interleaved,
        case.round.buffer, case.extents, case.scale, window, 0.0, None, 1.0,
        torch.empty(partials * num_q_heads * (head_dim + 1)), out, lse,
        *(None if scales is None else scales[0] for scales in (case.k_scale, case.v_scale)),
    )  # fmt: skip
    text = f"{rows} rows in {case.filled.work} items" + (f", window {window}" if window else "")
    shape = _shape(dtype, heads, head_dim, case.interleaved, f"G {group}, {text}")
    read = 2 * _keys_read(case, window) * _row_bytes(dtype, heads, head_dim)
    return _measured(ptx, "collective_attention", shape, read, out.nbytes, rows=("pool", "rows"))


bf16, f16, f32, e4m3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
SHAPES: list[tuple[Callable[..., Measurement], tuple[object, ...]]] = [
    (rope_rotate, (bf16, 4, 128, False, 1)),
    (rope_rotate, (bf16, 4, 128, False, 8)),
    (rope_rotate, (bf16, 4, 128, True, 1)),
    (rope_rotate, (f16, 8, 64, False, 1)),
    (rope_rotate, (f16, 2, 256, False, 1)),
    (rope_rotate, (f16, 4, 96, False, 1)),
    (rope_rotate, (bf16, 4, 80, False, 1)),
    (rope_rotate, (f32, 4, 128, False, 1)),
    (rope_rotate, (e4m3, 4, 128, False, 1)),
    (rope_rotate, (e4m3, 4, 128, True, 8)),
    (rope_rotate, (bf16, 4, 128, False, 1, e4m3)),
    (rope_rotate, (e4m3, 4, 128, False, 1, f32)),
    (key_deviation, (bf16, 4, 128, False)),
    (key_deviation, (f16, 8, 64, True)),
    (key_deviation, (f32, 2, 128, False)),
    (diff_encode, (bf16, 4, 128, False)),
    (diff_encode, (bf16, 2, 128, True)),
    (diff_encode, (f16, 8, 64, False)),
    (diff_encode, (f16, 2, 256, False)),
    (diff_encode, (f16, 4, 96, False)),
    (diff_encode, (bf16, 4, 80, False)),
    (diff_encode, (f32, 2, 128, False)),
    (diff_encode, (e4m3, 4, 128, False)),
    (diff_encode, (e4m3, 8, 64, True)),
    (diff_restore, (bf16, 4, 128, False)),
    (diff_restore, (bf16, 2, 128, True)),
    (diff_restore, (f16, 8, 64, False)),
    (diff_restore, (f16, 2, 256, False)),
    (diff_restore, (f16, 4, 96, False)),
    (diff_restore, (bf16, 4, 80, False)),
    (diff_restore, (f32, 2, 128, False)),
    (diff_restore, (e4m3, 4, 128, False)),
    (diff_restore, (e4m3, 4, 128, False, bf16)),
    (diff_restore, (e4m3, 8, 64, True, f32)),
    (merge_states, (bf16, 4, 128)),
    (merge_states, (f32, 4, 128)),
    (collective_attention, (bf16, 2, 4, 128, 8)),
    (collective_attention, (f16, 4, 1, 64, 8)),
    (collective_attention, (bf16, 1, 8, 256, 6)),
    (collective_attention, (f16, 2, 7, 96, 8)),
    (collective_attention, (bf16, 2, 2, 80, 8)),
    (collective_attention, (bf16, 2, 4, 128, 8, 700)),
    (collective_attention, (f32, 2, 2, 64, 4)),
    (collective_attention, (e4m3, 2, 4, 128, 8, 0, bf16)),
    (collective_attention, (e4m3, 4, 1, 64, 8, 0, f16)),
    (collective_attention, (e4m3, 1, 8, 256, 6, 0, bf16)),
    (collective_attention, (e4m3, 2, 7, 96, 8, 0, f16)),
    (collective_attention, (e4m3, 2, 2, 80, 8, 0, bf16)),
]


def measurements(only: str = "") -> Iterator[Measurement]:
    """Every shape whose operator's name contains ``only``."""
    ptx = PtxBackend(race=False)
    torch.manual_seed(0)
    for measure, arguments in SHAPES:
        if only in measure.__name__:
            yield measure(ptx, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic")
    parser.add_argument("--only", default="", help="part of an operator's name")
    options = parser.parse_args()
    print(header())
    for measurement in measurements(options.only):
        print(measurement.line(), flush=True)


if __name__ == "__main__":
    main()
