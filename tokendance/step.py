"""A step: the rows that an engine runs through the model at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendance import _planner, ops
from tokendance.arrays import Array, as_tensor, as_tensors
from tokendance.geometry import KVGeometry
from tokendance.mirror import Use, round_arrays, slots_of
from tokendance.plan import AgentState, Phase, Plan
from tokendance.rounds import IntArray, RoundExtents, RoundTensors
from tokendance.selection import KeyDeviation
from tokendance.uncopied import Uncopied

# Query heads x rows that a work item may have: the height of the kernels' tiles.
_TILE_HEIGHT = 64
# Items that keep a device busy. On a GPU as many as run at once, two blocks on a multiprocessor,
# over all KV heads. On a CPU a few per thread share the work evenly; more would only split tiles
# further, and each part loads and rotates its queries again.
_BLOCKS_PER_MULTIPROCESSOR = 2
_ITEMS_PER_THREAD = 4
_MAX_SPLITS = 64
_MAX_WINDOW = np.iinfo(np.int32).max


@dataclass
class AgentRows:
    """Rows of one agent in a step."""

    state: AgentState
    positions: IntArray
    token_ids: NDArray[np.int64]


class Step(Uncopied, instead="ask the collector for the next step"):
    """Rows of one forward pass, and the attention over the round's KV.

    Use it as a context manager; inside, call `attend` once per layer, in order, and `keep` after
    it. Leaving it by an exception aborts the whole plan. Leaving it before the last layer is an
    error. While it is open its agents can be in no other step, nor committed, aborted or truncated.

    Attributes:
        token_ids: int64 ``[R]`` on the store's device.
        positions: int32 ``[R]`` absolute positions.
        agents: name of every row's agent; None for a segment that is computed alone.
        logit_rows: int64, rows whose logits the engine wants: the last row of each prompt in a
            prefill step, every row in a decode step, and in an audit's step the rows that are
            compared. They count the rows that are there after the last layer.
        logit_agents: the agents of ``logit_rows``.
    """

    def __init__(
        self,
        plan: Plan,
        states: Sequence[AgentState],
        make_rows: Callable[[], list[AgentRows]],
        decode: bool,
    ) -> None:
        self._plan = plan
        self._store = plan.store
        self._states = states
        self._make_rows = make_rows
        self._decode = decode
        self._layer = 0
        self._kept: Tensor | None = None
        self._open = False
        self._held: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Step:
        if self._open or self._layer:
            raise ValueError("step: expected a step that has not been entered, got one that has")
        self._check_states()
        lengths = [state.length for state in self._states]
        try:
            self._rows = self._make_rows()
            self._choosing = not self._decode and any(rows.state.candidates for rows in self._rows)
            tokens = [np.empty(0, np.int64), *[rows.token_ids for rows in self._rows]]
            self.token_ids = torch.from_numpy(np.concatenate(tokens)).to(self._store.device)
            self._describe_rows()
        except BaseException:
            for state, length in zip(self._states, lengths, strict=True):
                self._plan.shorten(state, length)
            raise
        for state in self._states:
            state.busy = True
        self._open = True
        return self

    def _check_states(self) -> None:
        wanted = Phase.DECODE if self._decode else Phase.PREFILL
        for state in self._states:
            agent = state.layout.agent
            if state.phase is not wanted:
                raise ValueError(
                    f"step: expected agents in {wanted.value}, got {agent!r} ({state.phase.value})"
                )
            if state.busy:
                raise ValueError(f"step: expected agents in no open step, got {agent!r}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        layers = self._store.geometry.num_layers
        if kind is not None or self._layer != layers:
            if not self._plan.ended:
                self._plan.abort_open()
            if kind is None:
                raise ValueError(
                    f"step: expected {layers} layers, got {self._layer}; the plan is aborted"
                )
            return
        for rows in self._rows:
            state = rows.state
            state.busy = False
            if state.phase is Phase.PREFILL:
                state.pending = state.pending[state.pending > rows.positions[-1]]
                if not len(state.pending):
                    state.phase = Phase.DECODE
        if any(state.layout.agent is None for state in self._states):
            self._plan.end_unneeded()

    @property
    def num_rows(self) -> int:
        """R: rows that are in the step at present."""
        return int(self.positions.shape[0])

    @property
    def kept(self) -> Tensor | None:
        """int64: the rows that the last `attend` kept, until `keep` is called; None = all."""
        return self._kept

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: Array | None = None,
    ) -> Tensor:
        """Rotates, stores and attends for one layer.

        Args:
            layer: 0, 1, ... in order.
            q: ``[R, Hq, D]`` (or ``[R, Hq * D]``) queries before RoPE.
            k, v: ``[R, Hk, D]`` (or ``[R, Hk * D]``) keys before RoPE, and values.
            scale: of the scores; default ``D ** -0.5``.
            window: a row sees keys fewer than this many positions back; 0 = all.
            soft_cap: scores become ``cap * tanh(score / cap)``; 0 = none.
            sinks: fp32 ``[Hq]`` sink logits.

        Returns:
            ``[R', Hq, D]``; R' < R only in the layer where `KeyDeviation` drops rows (see `kept`).

        Raises:
            ValueError: the step is not open, the layer is out of order, or a number or a tensor
                does not fit; then nothing has changed, and the call can be repeated.
        """
        geometry = self._store.geometry
        if not self._open:
            raise ValueError("step: expected an entered step (`with step:`), got one that is not")
        if self._plan.aborted:
            raise ValueError("step: expected a plan that goes on, got one that was aborted")
        if not 0 <= layer < geometry.num_layers:
            raise ValueError(f"layer: expected 0 .. {geometry.num_layers - 1}, got {layer}")
        if layer != self._layer:
            raise ValueError(f"layer: expected {self._layer}, got {layer}")
        if self._kept is not None:
            raise ValueError("step: expected keep() after the layer that dropped rows")
        queries = self._checked("q", q, geometry.num_q_heads)
        keys = self._checked("k", k, geometry.num_kv_heads)
        values = self._checked("v", v, geometry.num_kv_heads)
        scale = geometry.head_dim**-0.5 if scale is None else scale
        _check_scores(scale, window, soft_cap)
        sinks = None if sinks is None else self._checked_sinks(sinks)
        rows, pairs = self.num_rows, int(self._host_positions.sum(dtype=np.int64)) + self.num_rows
        if self._choosing:
            queries, keys, values = self._choose(layer, queries, keys, values)
        self._write(layer, keys, values, self._slots, self.positions)
        rope = self._store.layer_rope(layer)
        round_ = self._round(window)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        lse = queries.new_empty(queries.shape[:2], dtype=torch.float32)
        floats = round_.extents.partials * geometry.num_q_heads * (geometry.head_dim + 1)
        ops.collective_attention_out(
            queries,
            self._store.pool.k_pools[layer],
            self._store.pool.v_pools[layer],
            rope.cos,
            rope.sin,
            rope.interleaved,
            round_,
            scale,
            window,
            soft_cap,
            sinks,
            rope.attention_factor,
            queries.new_empty(floats, dtype=torch.float32),
            out,
            lse,
            *self._store.pool.scales(layer),
        )
        self._layer += 1
        if not self._decode:
            self._plan.count_prefill(rows, pairs)
        return out

    def keep(self, *tensors: Array) -> tuple[Tensor, ...]:
        """The rows of ``tensors`` (first dim R) that are still in the step.

        Rows are dropped in one layer at the most; everywhere else the same rows come back, not
        copied.
        """
        if self._kept is None:
            return tuple(as_tensors(tensors))
        kept, self._kept = self._kept, None
        return tuple(tensor[kept] for tensor in as_tensors(tensors))

    # ----------------------------------------------------------------------------------------------

    def _checked(self, name: str, array: Array, heads: int) -> Tensor:
        x = as_tensor(array)
        geometry = self._store.geometry
        shape = (self.num_rows, heads, geometry.head_dim)
        if x.dim() == 2 and tuple(x.shape) == (shape[0], shape[1] * shape[2]):
            x = x.view(shape) if x.is_contiguous() else x.reshape(shape)
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
        if x.dtype != geometry.dtype or x.device != self._store.device:
            raise ValueError(
                f"{name}: expected {geometry.dtype} on {self._store.device}, "
                f"got {x.dtype} on {x.device}"
            )
        return x if x.stride(-1) == 1 else x.contiguous()

    def _checked_sinks(self, array: Array) -> Tensor:
        sinks = as_tensor(array)
        heads, device = self._store.geometry.num_q_heads, self._store.device
        if tuple(sinks.shape) != (heads,):
            raise ValueError(f"sinks: expected [{heads}], got {list(sinks.shape)}")
        if sinks.dtype != torch.float32 or sinks.device != device:
            raise ValueError(
                f"sinks: expected {torch.float32} on {device}, got {sinks.dtype} on {sinks.device}"
            )
        return sinks.contiguous()

    def _describe_rows(self) -> None:
        """Everything that follows from which rows the step has."""
        block, device = self._store.block_size, self._store.device
        positions = [np.empty(0, np.int32), *[rows.positions for rows in self._rows]]
        slots = [rows.state.slots(rows.positions, block) for rows in self._rows]
        counts = [len(rows.positions) for rows in self._rows]
        self._host_positions = np.concatenate(positions)
        self._row_agent = np.repeat(np.arange(len(self._rows), dtype=np.int32), counts)
        self.positions = torch.from_numpy(self._host_positions).to(device)
        self._slots = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *slots])).to(device)
        self._rounds: dict[int, RoundTensors] = {}
        self.agents = [rows.state.layout.agent for rows in self._rows for _ in rows.positions]
        if self._decode:
            wanted = np.arange(len(self._row_agent), dtype=np.int64)
        else:
            layouts = [rows.state.layout for rows in self._rows]
            first = np.array([one.length - one.logit_rows for one in layouts], dtype=np.int32)
            named = np.array([one.agent is not None for one in layouts])
            wanted = np.flatnonzero(
                (self._host_positions >= first[self._row_agent]) & named[self._row_agent]
            )
        self.logit_rows = torch.from_numpy(wanted).to(device)
        self.logit_agents = [name for row in wanted if (name := self.agents[row]) is not None]

    def _round(self, window: int) -> RoundTensors:
        """The round's fields with the work list of a window; layers of one window share it."""
        if window not in self._rounds:
            block = self._store.block_size
            geometry = self._store.geometry
            arrays, extents = round_arrays([rows.state for rows in self._rows], block)
            arrays, extents = with_work(
                arrays,
                extents,
                self._row_agent,
                self._host_positions,
                geometry,
                self._store.device,
                window,
            )
            self._rounds[window] = RoundTensors.from_arrays(
                arrays, extents, device=self._store.device
            )
        return self._rounds[window]

    def _write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Rotates keys to their positions and puts both into the pool."""
        rope = self._store.layer_rope(layer)
        pool = self._store.pool
        tables = (rope.cos, rope.sin, rope.interleaved)
        k_scale, v_scale = pool.scales(layer)
        ops.rope_rotate_out(
            *(k, None, slots, None, positions, *tables, rope.attention_factor),
            pool.k_pools[layer],
            out_scale=k_scale,
        )
        ops.rope_rotate_out(
            *(v, None, slots, None, None, *tables, 1.0), pool.v_pools[layer], out_scale=v_scale
        )

    # KeyDeviation ---------------------------------------------------------------------------------

    def _choose(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Holds fresh rows back until the selection layer; drops all but the chosen there."""
        selection = self._plan.selection
        assert isinstance(selection, KeyDeviation)
        last_layer = self._store.geometry.num_layers - 1
        if layer < min(selection.layer, last_layer):
            self._held[layer:] = [(k, v)]
            return q, k, v
        # The Masters' rows of this very step are what fresh keys are compared with.
        self._write(layer, k, v, self._slots, self.positions)
        self._choose_rows(layer, k, selection)
        kept = self._drop_rows()
        self._choosing = False
        self._kept = torch.from_numpy(kept).to(self._store.device)
        self.token_ids = self.token_ids[self._kept]
        self._describe_rows()
        for earlier, (held_k, held_v) in enumerate(self._held):
            self._write(
                earlier, held_k[self._kept], held_v[self._kept], self._slots, self.positions
            )
        self._held.clear()
        return q[self._kept], k[self._kept], v[self._kept]

    def _choose_rows(self, layer: int, k: Tensor, selection: KeyDeviation) -> None:
        """Ranks the rows of every Master that has not been ranked in this round."""
        store, block = self._store, self._store.block_size
        uses: dict[int, list[tuple[int, Use]]] = {}
        for agent, rows in enumerate(self._rows):
            for use in rows.state.candidates:
                uses.setdefault(id(use.master), []).append((agent, use))
        starts = np.concatenate([[0], np.cumsum([len(rows.positions) for rows in self._rows])])
        rope = store.layer_rope(layer)
        for key, group in uses.items():
            length = max(use.length for _, use in group)
            fresh = np.full((len(group), length), -1, dtype=np.int64)
            for line, (agent, use) in zip(fresh, group, strict=True):
                wanted = np.arange(use.delta, use.delta + use.length, dtype=np.int32)
                line[: use.length] = starts[agent] + np.searchsorted(
                    self._rows[agent].positions, wanted
                )
            master = group[0][1].master
            at = np.arange(master.origin, master.origin + length, dtype=np.int32)
            slots = torch.from_numpy(slots_of(master.pages, length, block)).to(store.device)
            cached, slots = self._readable(layer, k, slots)
            deviation = ops.key_deviation(
                k,
                torch.from_numpy(fresh).to(store.device),
                None,
                cached,
                slots,
                torch.from_numpy(at).to(store.device),
                rope.cos,
                rope.sin,
                rope.interleaved,
                rope.attention_factor,
            )
            top = torch.topk(deviation, selection.rows_of(length)).indices
            self._plan.chosen[key] = top.sort().values.cpu().numpy().astype(np.int32)

    def _readable(self, layer: int, k: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of the pool, and where they stand, in a tensor of the dtype of fresh keys ``k``."""
        pool, rope = self._store.pool, self._store.layer_rope(layer)
        if pool.quantization is None:
            return pool.k_pools[layer], slots
        rows = k.new_empty((slots.shape[0], *k.shape[1:]))
        ops.rope_rotate_out(
            *(pool.k_pools[layer], slots, None, None, None),
            *(rope.cos, rope.sin, rope.interleaved, 1.0, rows),
            x_scale=pool.scales(layer)[0],
        )
        return rows, torch.arange(slots.shape[0], device=slots.device)

    def _drop_rows(self) -> NDArray[np.int64]:
        """Makes the chosen rows own rows and forgets the others; returns the rows that stay."""
        kept, start = [], 0
        for rows in self._rows:
            reused = np.zeros(len(rows.positions), dtype=bool)
            for use in rows.state.candidates:
                reused |= (rows.positions >= use.delta) & (rows.positions < use.delta + use.length)
            rows.state.settle(self._plan.chosen, self._store.block_size)
            stays = ~reused | np.isin(rows.positions, rows.state.own_position)
            kept.append(start + np.flatnonzero(stays))
            start += len(rows.positions)
            rows.positions = rows.positions[stays]
            rows.token_ids = rows.token_ids[stays]
        return np.concatenate(kept)


def _check_scores(scale: float, window: int, soft_cap: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not isinstance(window, int | np.integer) or not 0 <= window <= _MAX_WINDOW:
        raise ValueError(f"window: expected an int in 0 .. {_MAX_WINDOW}, got {window}")
    if not (math.isfinite(soft_cap) and soft_cap >= 0):
        raise ValueError(f"soft_cap: expected a finite number of at least 0, got {soft_cap}")


def with_work(
    arrays: Mapping[str, IntArray],
    extents: RoundExtents,
    row_agent: IntArray,
    row_position: IntArray,
    geometry: KVGeometry,
    device: torch.device | str,
    window: int = 0,
) -> tuple[dict[str, IntArray], RoundExtents]:
    """Adds the query rows of a step, and their work list, to the fields of a round.

    Args:
        arrays, extents: as `round_arrays` gives them.
        row_agent, row_position: int32 ``[R]``; the rows of an agent are adjacent and ascend.
        geometry: of the model: its heads, and the dtype of its queries.
        device: that the work is cut for.
        window: sliding window that the work list may rely on; 0 = none.
    """
    tile_rows = max(1, _TILE_HEIGHT * geometry.num_kv_heads // geometry.num_q_heads)
    on_cpu = torch.device(device).type == "cpu"
    # Tensor cores are done with a full tile before its pages are read; in fp32, and on a CPU,
    # arithmetic takes longer from a quarter of a tile on.
    reads_longest = not on_cpu and geometry.dtype != torch.float32
    work = _planner.plan_work(
        row_agent,
        row_position,
        arrays["use_agent"],
        arrays["use_master"],
        arrays["use_delta"],
        arrays["use_length"],
        arrays["master_page_indptr"],
        arrays["own_length"],
        arrays["own_page_indptr"],
        arrays["own_position"],
        block_size=extents.block_size,
        max_tile_rows=tile_rows,
        read_bound_rows=tile_rows if reads_longest else -(-tile_rows // 4),
        target_items=items_per_kv_head(geometry.num_kv_heads, device),
        max_splits=_MAX_SPLITS,
        window=window,
    )
    extents = replace(
        extents,
        rows=len(row_agent),
        work=len(work["work"]),
        work_rows=len(work["work_rows"]),
        work_chunks=len(work["work_chunks"]),
        partials=len(work["row_partials"]),
    )
    fields = {
        "row_agent": row_agent,
        "row_position": row_position,
        "work": work["work"],
        "work_rows": work["work_rows"],
        "work_chunks": work["work_chunks"],
        "row_partial_indptr": work["row_partial_indptr"],
        "row_partials": work["row_partials"],
    }
    return {**arrays, **fields}, extents


def items_per_kv_head(num_kv_heads: int, device: torch.device | str) -> int:
    """Work items that keep ``device`` busy; each is run once per KV head."""
    device = torch.device(device)
    if device.type == "cpu":
        return _ITEMS_PER_THREAD * torch.get_num_threads()
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return -(-_BLOCKS_PER_MULTIPROCESSOR * count // num_kv_heads)


def is_to_compute(state: AgentState, positions: IntArray) -> bool:
    """Whether rows are the next ones that a state has to compute."""
    pending = state.pending[: len(positions)]
    return state.phase is Phase.PREFILL and np.array_equal(pending, positions)


def rows_for_prefill(parts: Sequence[tuple[AgentState, IntArray]]) -> list[AgentRows]:
    """Rows of a prefill step; the rows that `KeyDeviation` may drop join their agents' parts."""
    result = []
    for state, positions in parts:
        if not is_to_compute(state, positions):
            raise ValueError(
                f"step: expected rows that are still to be computed, got {state.layout.agent!r}'s"
            )
        for use in state.candidates:
            reused = np.arange(use.delta, use.delta + use.length, dtype=np.int32)
            positions = np.union1d(positions, reused).astype(np.int32)
        result.append(AgentRows(state, positions, state.token_ids(positions)))
    return result
