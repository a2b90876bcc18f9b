"""Runs step records on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendance.device import operators as ops
from tokendance.device.arrays import Array, as_tensor, as_tensors
from tokendance.device.codec import EXACT, Codec
from tokendance.device.geometry import KVGeometry
from tokendance.device.host_pages import host_pages as make_host_pages
from tokendance.device.layer_ropes import layer_ropes, same_rope
from tokendance.device.pool import PagePool
from tokendance.device.rope import Rope
from tokendance.device.rounds import RoundTensors
from tokendance.host.record import (
    VERSION,
    AppendRecord,
    Choice,
    Copies,
    DeviceProfile,
    MovedRows,
    PackedRound,
    RestoreRecord,
    StepRecord,
    WorkShape,
)
from tokendance.host.round import IntArray
from tokendance.host.uncopied import Uncopied

# Query heads x rows that a work item may have: the height of the kernels' tiles. On a GPU some
# kernels have tall tiles, too (has_tall_tiles in collective_attention_plan.h).
_TILE_HEIGHT = 64
_TALL_TILE_HEIGHT = 128
_TALL_HEAD_DIMS = (64, 128)
# Items that keep a device busy. On a GPU as many as run at once, two blocks on a multiprocessor,
# over all KV heads. On a CPU a few per thread share the work evenly; more would only split tiles
# further, and each part loads and rotates its queries again.
_BLOCKS_PER_MULTIPROCESSOR = 2
_ITEMS_PER_THREAD = 4
_MAX_WINDOW = np.iinfo(np.int32).max
_ALIGNMENT = 16  # bytes, of each array in an upload

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Adds fp32 ``[rows]`` up over the ranks that share the KV heads, in place or not."""

Choose: TypeAlias = Callable[[list[IntArray]], StepRecord]
"""Takes the rows that were chosen of each Master, and returns the record that goes on."""


class Executor(Uncopied, instead="make another over a pool of its own"):
    """The device half of the library: pools, tables and operators; it runs `StepRecord`s.

    It knows no agents' names, no segments and no counts of users. Records are run in the order of
    their numbers.

    Args:
        geometry: of the model, or of this rank's part of its heads.
        rope: of all layers, or one (None: no RoPE) per layer.
        pool: the pages.
        host_pages: pages of host memory, for rows of suspended agents and for what rests.
        host_codec: how rows are kept there.

    Attributes:
        host: the pages of host memory; None where there are none.

    Raises:
        ValueError: geometry, rope, pool and codec do not fit each other.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        rope: Rope | Sequence[Rope | None],
        pool: PagePool,
        host_pages: int = 0,
        host_codec: Codec = EXACT,
    ) -> None:
        if pool.num_layers != geometry.num_layers:
            raise ValueError(f"pool: expected {geometry.num_layers} layers, got {pool.num_layers}")
        shape = pool.k_pools[0].shape
        if tuple(shape[2:]) != (geometry.num_kv_heads, geometry.head_dim):
            raise ValueError(
                f"pool: expected [num_pages, {pool.block_size}, {geometry.num_kv_heads}, "
                f"{geometry.head_dim}], got {list(shape)}"
            )
        if pool.quantization is None and pool.dtype != geometry.dtype:
            raise ValueError(
                f"pool: expected {geometry.dtype} or a quantized dtype, got {pool.dtype}"
            )
        self.geometry = geometry
        self.pool = pool
        self.ropes, self.max_position = layer_ropes(geometry, rope, pool.device)
        self._uploaded: WeakKeyDictionary[RestoreRecord, tuple[RoundTensors, Tensor]] = (
            WeakKeyDictionary()
        )
        self._host_pages = host_pages
        self.host = make_host_pages(pool, host_pages, host_codec) if host_pages else None

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def profile(self) -> DeviceProfile:
        """What a `tokendance.host.Scheduler` has to know of this device."""
        pool = self.pool
        return DeviceProfile(
            num_layers=self.geometry.num_layers,
            num_pages=pool.num_pages,
            block_size=pool.block_size,
            page_bytes=pool.page_bytes,
            max_position=self.max_position,
            work=work_shape(self.geometry, self.device, pool.dtype),
            host_pages=self._host_pages,
        )

    def open(
        self,
        record: StepRecord,
        *,
        choose: Choose | None = None,
        reduce: Reduce | None = None,
        round_of: Callable[[int], PackedRound] | None = None,
    ) -> Run:
        """A forward pass, to be entered: ``with executor.open(record) as run``.

        The record's copies are made at once, and what it uploads is on its way: one copy, from
        pinned memory, that nobody waits for.

        Args:
            choose: asked once, in the layer in which `KeyDeviation` drops rows, with the rows that
                were chosen; only for records with ``choices``.
            reduce: adds deviations up over the ranks of a tensor-parallel engine, which otherwise
                would choose different rows.
            round_of: makes the round of a sliding window that the record has no work list for.

        Raises:
            ValueError: a record of another version, or one with choices and no ``choose``.
        """
        _check_version(record)
        if record.choices and choose is None:
            raise ValueError("choose: expected a function for a record with choices, got None")
        self.copy(record.copies)
        return Run(self, record, choose, reduce, round_of)

    def restore(
        self,
        record: RestoreRecord,
        layers: Sequence[int],
        k_caches: Sequence[Array],
        v_caches: Sequence[Array],
        slots: Array | None = None,
    ) -> None:
        """Writes agents' rows, keys at the agents' own positions, into an engine's cache.

        A record may be run for a few layers at a time; it is uploaded once.

        Args:
            layers: which.
            k_caches, v_caches: written, an array for each of the layers: ``[rows, Hk, D]`` or
                ``[num_pages, block, Hk, D]``, of the pool's dtype; of a quantized pool in fp32,
                fp16 or bf16 what its elements stand for.
            slots: int64 ``[N, T]`` on the device, instead of the record's.

        Raises:
            ValueError: a record of another version, an unknown layer, lists of different lengths,
                or values in the memory of the keys.
            RuntimeError: wrong shapes, dtypes or devices, naming the argument.
        """
        _check_version(record)
        layers = [int(layer) for layer in layers]
        keys, values = as_tensors(k_caches), as_tensors(v_caches)
        self._check_caches(layers, keys, values)
        if record not in self._uploaded:
            self.copy(record.copies)
            there = self.upload({"round": record.packed.buffer, "slots": record.slots})
            round_ = RoundTensors(there["round"], record.packed.extents)
            self._uploaded[record] = (round_, there["slots"])
        round_, given = self._uploaded[record]
        where = given if slots is None else as_tensor(slots)
        for same in same_rope(layers, self.ropes):
            rope, which = self.ropes[layers[same[0]]], [layers[i] for i in same]
            ops.diff_restore(
                [self.pool.k_pools[layer] for layer in which],
                [self.pool.v_pools[layer] for layer in which],
                rope.cos,
                rope.sin,
                rope.interleaved,
                round_,
                where,
                [keys[i] for i in same],
                [values[i] for i in same],
                *self.pool.scales_of(which),
            )

    def _check_caches(
        self, layers: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        if len(keys) != len(layers) or len(values) != len(layers):
            raise ValueError(
                f"k_cache: expected {len(layers)} tensors of k_cache and v_cache, "
                f"got {len(keys)} and {len(values)}"
            )
        for key, value in zip(keys, values, strict=True):
            if key.numel() and key.data_ptr() == value.data_ptr():
                raise ValueError("v_cache: expected memory of its own, got that of k_cache")
        for layer in layers:
            if not 0 <= layer < self.geometry.num_layers:
                raise ValueError(f"layers: expected 0..{self.geometry.num_layers - 1}, got {layer}")

    def append(
        self,
        record: AppendRecord,
        keys: Sequence[Array],
        values: Sequence[Array],
        *,
        rotated: bool,
    ) -> None:
        """Puts rows that an engine has computed into the pool.

        Args:
            keys, values: of each layer ``[R, Hk, D]`` (or ``[R, Hk * D]``) of the model's dtype.
            rotated: whether the keys stand at the rows' positions already, as in engines' caches:
                they are kept bit for bit then. Otherwise they are as before RoPE.

        Raises:
            ValueError: a record of another version, another number of layers, or a tensor that does
                not fit; then nothing has been written.
        """
        _check_version(record)
        layers, heads = self.geometry.num_layers, self.geometry.num_kv_heads
        if len(keys) != layers or len(values) != layers:
            raise ValueError(
                f"keys: expected {layers} tensors of keys and of values, got {len(keys)} and "
                f"{len(values)}"
            )
        rows = record.num_rows
        fresh = [self.checked(f"keys[{i}]", one, rows, heads) for i, one in enumerate(keys)]
        others = [self.checked(f"values[{i}]", one, rows, heads) for i, one in enumerate(values)]
        self.copy(record.copies)
        there = self.upload({"slots": record.slots, "positions": record.positions})
        positions = None if rotated else there["positions"]
        for layer, (k, v) in enumerate(zip(fresh, others, strict=True)):
            self.write(layer, k, v, there["slots"], positions)

    def copy(self, copies: Sequence[Copies]) -> None:
        """Makes copies of pages and rows, in order."""
        for one in copies:
            self._move_pages(one.to_host, to_host=True)
            self._move_pages(one.to_device, to_host=False)
            if len(one.rows):
                rows = torch.from_numpy(np.ascontiguousarray(one.rows.T)).to(self.device)
                for layer in range(self.pool.num_layers):
                    k, v = self.pool.k_pools[layer], self.pool.v_pools[layer]
                    self.pool.write_rows(layer, k, v, rows[1], rows[0])

    def move(self, copies: IntArray, *, to_host: bool) -> None:
        """Copies pages to host memory, or from it, and returns when host memory may be read.

        Args:
            copies: as of `Copies`.
        """
        self._move_pages(copies, to_host=to_host)
        if to_host and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _move_pages(self, copies: IntArray, *, to_host: bool) -> None:
        if not len(copies):
            return
        assert self.host is not None
        if to_host:
            self.host.take(self.pool, copies)
        else:
            self.host.give(self.pool, copies)

    def move_rows(self, moved: MovedRows) -> None:
        """Copies rows of the pool to others of it, keys rotated on to other positions as `restore`
        rotates them."""
        there = self.upload(
            {
                "source": moved.source,
                "target": moved.target,
                "from": moved.position_from,
                "to": moved.position_to,
            }
        )
        source, target = there["source"], there["target"]
        for layer, rope in enumerate(self.ropes):
            tables = (rope.cos, rope.sin, rope.interleaved)
            k, v = self.pool.k_pools[layer], self.pool.v_pools[layer]
            ops.rope_rotate_out(k, source, target, there["from"], there["to"], *tables, 1.0, k)
            ops.rope_rotate_out(v, source, target, None, None, *tables, 1.0, v)

    def clear(self, pages: IntArray) -> None:
        """Overwrites pages of the pool with zeros."""
        at = torch.from_numpy(pages.astype(np.int64)).to(self.device)
        for layer in (*self.pool.k_pools, *self.pool.v_pools):
            bits = layer.view(torch.uint8) if layer.element_size() == 1 else layer
            bits.index_fill_(0, at, 0)

    def clear_host(self, pages: IntArray) -> None:
        """Overwrites pages of host memory with zeros."""
        if self.host is not None and len(pages):
            self.host.clear(pages)

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """Arrays on the device, by one copy that nobody waits for."""
        if self.device.type == "cpu":
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        starts, total = {}, 0
        for name, array in arrays.items():
            starts[name] = total
            total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        # The allocator of pinned memory gives it to nobody else before the copy is done.
        staged = torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=True)
        bytes_ = staged.numpy()
        for name, array in arrays.items():
            raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            bytes_[starts[name] : starts[name] + array.nbytes] = raw
        there = staged.to(self.device, non_blocking=True)
        return {
            name: there[starts[name] : starts[name] + array.nbytes]
            .view(torch.from_numpy(array).dtype)
            .view(array.shape)
            for name, array in arrays.items()
        }

    def write(
        self, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor | None
    ) -> None:
        """Rotates keys to their positions (None: they are there) and puts both into the pool."""
        rope, pool = self.ropes[layer], self.pool
        tables = (rope.cos, rope.sin, rope.interleaved)
        factor = 1.0 if positions is None else rope.attention_factor
        k_scale, v_scale = pool.scales(layer)
        ops.rope_rotate_out(
            *(k, None, slots, None, positions, *tables, factor),
            pool.k_pools[layer],
            out_scale=k_scale,
        )
        ops.rope_rotate_out(
            *(v, None, slots, None, None, *tables, 1.0), pool.v_pools[layer], out_scale=v_scale
        )

    def attend(
        self,
        layer: int,
        queries: Tensor,
        round_: RoundTensors,
        scores: Scores,
        workspace: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        """Attention of one layer over a round, into ``out`` and ``lse``."""
        rope, pool = self.ropes[layer], self.pool
        ops.collective_attention_out(
            queries,
            pool.k_pools[layer],
            pool.v_pools[layer],
            rope.cos,
            rope.sin,
            rope.interleaved,
            round_,
            scores.softmax_scale,
            scores.window,
            scores.soft_cap,
            scores.sinks,
            rope.attention_factor,
            workspace,
            out,
            lse,
            *pool.scales(layer),
        )

    def checked(self, name: str, array: Array, rows: int, heads: int) -> Tensor:
        """``[rows, heads, D]`` (or ``[rows, heads * D]``) of the model's dtype, on the device."""
        x = as_tensor(array)
        shape = (rows, heads, self.geometry.head_dim)
        if x.dim() == 2 and tuple(x.shape) == (shape[0], shape[1] * shape[2]):
            x = x.view(shape) if x.is_contiguous() else x.reshape(shape)
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
        if x.dtype != self.geometry.dtype or x.device != self.device:
            raise ValueError(
                f"{name}: expected {self.geometry.dtype} on {self.device}, "
                f"got {x.dtype} on {x.device}"
            )
        return x if x.stride(-1) == 1 else x.contiguous()


class Scores:
    """How scores become weights; the arguments of `Run.attend`, checked."""

    def __init__(
        self,
        executor: Executor,
        softmax_scale: float | None,
        window: int,
        soft_cap: float,
        sinks: Array | None,
    ) -> None:
        geometry, device = executor.geometry, executor.device
        self.softmax_scale = geometry.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.window = window
        self.soft_cap = soft_cap
        if not math.isfinite(self.softmax_scale):
            raise ValueError(f"softmax_scale: expected a finite number, got {softmax_scale}")
        if not isinstance(window, int | np.integer) or not 0 <= window <= _MAX_WINDOW:
            raise ValueError(f"window: expected an int in 0 .. {_MAX_WINDOW}, got {window}")
        if not (math.isfinite(soft_cap) and soft_cap >= 0):
            raise ValueError(f"soft_cap: expected a finite number of at least 0, got {soft_cap}")
        self.sinks = None if sinks is None else as_tensor(sinks)
        if self.sinks is None:
            return
        heads = geometry.num_q_heads
        if tuple(self.sinks.shape) != (heads,):
            raise ValueError(f"sinks: expected [{heads}], got {list(self.sinks.shape)}")
        if self.sinks.dtype != torch.float32 or self.sinks.device != device:
            raise ValueError(
                f"sinks: expected {torch.float32} on {device}, got {self.sinks.dtype} on "
                f"{self.sinks.device}"
            )
        self.sinks = self.sinks.contiguous()


class Run:
    """One forward pass over a record's rows; made by `Executor.open`.

    Attributes:
        token_ids: int64 ``[R]`` on the device.
        positions: int32 ``[R]`` absolute positions.
        logit_rows: int64, rows whose logits the engine wants. They count the rows that are there
            after the last layer.
    """

    def __init__(
        self,
        executor: Executor,
        record: StepRecord,
        choose: Choose | None,
        reduce: Reduce | None,
        round_of: Callable[[int], PackedRound] | None,
    ) -> None:
        self._executor = executor
        self._choose = choose
        self._reduce = reduce
        self._round_of = round_of
        self._layer = 0
        self._held: list[tuple[Tensor, Tensor]] = []
        self._kept: Tensor | None = None
        self._take(record)

    def _take(self, record: StepRecord) -> None:
        """Uploads a record."""
        self._record = record
        arrays: dict[str, NDArray[Any]] = {
            "token_ids": record.token_ids,
            "positions": record.positions,
            "slots": record.slots,
            "logit_rows": record.logit_rows,
        }
        if record.kept is not None:
            arrays["kept"] = record.kept
        for window, packed in record.rounds.items():
            arrays[f"round {window}"] = packed.buffer
        there = self._executor.upload(arrays)
        self.token_ids = there["token_ids"]
        self.positions = there["positions"]
        self.logit_rows = there["logit_rows"]
        self._slots = there["slots"]
        self._kept = there.get("kept")
        self._rounds = {
            window: RoundTensors(there[f"round {window}"], packed.extents)
            for window, packed in record.rounds.items()
        }

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.check_finished()

    def check_finished(self) -> None:
        """Raises ``ValueError`` unless all layers have been run."""
        layers = self._executor.geometry.num_layers
        if self._layer != layers:
            raise ValueError(f"step: expected {layers} layers, got {self._layer}")

    @property
    def layer(self) -> int:
        """The layer that comes next."""
        return self._layer

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
        softmax_scale: float | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: Array | None = None,
    ) -> Tensor:
        """Rotates, stores and attends for one layer.

        Args:
            layer: 0, 1, ... in order.
            q: ``[R, Hq, D]`` (or ``[R, Hq * D]``) queries before RoPE.
            k, v: ``[R, Hk, D]`` (or ``[R, Hk * D]``) keys before RoPE, and values.
            softmax_scale: of the scores; default ``D ** -0.5``.
            window: a row sees keys fewer than this many positions back; 0 = all.
            soft_cap: scores become ``cap * tanh(score / cap)``; 0 = none.
            sinks: fp32 ``[Hq]`` sink logits.

        Returns:
            ``[R', Hq, D]``; R' < R only in the layer where `KeyDeviation` drops rows (see `kept`).

        Raises:
            ValueError: the layer is out of order, or a number or a tensor does not fit; then
                nothing has changed, and the call can be repeated.
        """
        executor, geometry = self._executor, self._executor.geometry
        if not 0 <= layer < geometry.num_layers:
            raise ValueError(f"layer: expected 0 .. {geometry.num_layers - 1}, got {layer}")
        if layer != self._layer:
            raise ValueError(f"layer: expected {self._layer}, got {layer}")
        if self._kept is not None:
            raise ValueError("step: expected keep() after the layer that dropped rows")
        queries = executor.checked("q", q, self.num_rows, geometry.num_q_heads)
        keys = executor.checked("k", k, self.num_rows, geometry.num_kv_heads)
        values = executor.checked("v", v, self.num_rows, geometry.num_kv_heads)
        scores = Scores(executor, softmax_scale, window, soft_cap, sinks)
        round_ = self._round(window)
        if self._record.choices:
            queries, keys, values = self._drop(layer, queries, keys, values)
            round_ = self._round(window)
        executor.write(layer, keys, values, self._slots, self.positions)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        lse = queries.new_empty(queries.shape[:2], dtype=torch.float32)
        floats = round_.extents.partials * geometry.num_q_heads * (geometry.head_dim + 1)
        workspace = queries.new_empty(floats, dtype=torch.float32)
        executor.attend(layer, queries, round_, scores, workspace, out, lse)
        self._layer += 1
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

    def _round(self, window: int) -> RoundTensors:
        """The round with the work list of a window; layers of one window share it."""
        if window not in self._rounds:
            if self._round_of is None:
                raise ValueError(
                    f"window: expected one of the record's, {sorted(self._rounds)}, got {window}"
                )
            packed = self._round_of(window)
            there = self._executor.upload({"round": packed.buffer})
            self._rounds[window] = RoundTensors(there["round"], packed.extents)
        return self._rounds[window]

    def _drop(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Holds fresh rows back until the layer of the choice; drops all but the chosen there."""
        if layer < self._record.choice_layer:
            self._held[layer:] = [(k, v)]  # a call may be repeated
            return q, k, v
        # The Masters' rows of this very step are what fresh keys are compared with.
        self._executor.write(layer, k, v, self._slots, self.positions)
        assert self._choose is not None
        chosen = [self._chosen(layer, k, choice) for choice in self._record.choices]
        record = self._choose(chosen)
        self._take(record)
        kept = self._kept
        assert kept is not None
        for earlier, (held_k, held_v) in enumerate(self._held):
            self._executor.write(earlier, held_k[kept], held_v[kept], self._slots, self.positions)
        self._held.clear()
        return q[kept], k[kept], v[kept]

    def _chosen(self, layer: int, k: Tensor, choice: Choice) -> IntArray:
        """The rows of a Master that deviate most."""
        rope = self._executor.ropes[layer]
        there = self._executor.upload(
            {"fresh": choice.fresh, "slots": choice.slots, "positions": choice.positions}
        )
        cached, slots = self._readable(layer, k, there["slots"])
        deviation = ops.key_deviation(
            k,
            there["fresh"],
            None,
            cached,
            slots,
            there["positions"],
            rope.cos,
            rope.sin,
            rope.interleaved,
            rope.attention_factor,
        )
        if self._reduce is not None:
            deviation = self._reduce(deviation)
        top = torch.topk(deviation, choice.count).indices.sort().values
        rows: IntArray = top.cpu().numpy().astype(np.int32)
        return rows

    def _readable(self, layer: int, k: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of the pool, and where they stand, in a tensor of the dtype of fresh keys ``k``."""
        pool, rope = self._executor.pool, self._executor.ropes[layer]
        if pool.quantization is None:
            return pool.k_pools[layer], slots
        rows = k.new_empty((slots.shape[0], *k.shape[1:]))
        ops.rope_rotate_out(
            *(pool.k_pools[layer], slots, None, None, None),
            *(rope.cos, rope.sin, rope.interleaved, 1.0, rows),
            x_scale=pool.scales(layer)[0],
        )
        return rows, torch.arange(slots.shape[0], dtype=torch.int64, device=slots.device)


def _check_version(record: StepRecord | RestoreRecord | AppendRecord) -> None:
    if record.version != VERSION:
        raise ValueError(f"record: expected version {VERSION}, got {record.version}")


def work_shape(
    geometry: KVGeometry, device: torch.device | str, pool_dtype: torch.dtype | None = None
) -> WorkShape:
    """How attention's work is cut for a device; ``pool_dtype`` where it is not the model's."""
    on_cpu = torch.device(device).type == "cpu"
    tall = (
        not on_cpu
        and geometry.dtype != torch.float32
        and pool_dtype in (None, geometry.dtype)
        and geometry.head_dim in _TALL_HEAD_DIMS
    )
    height = _TALL_TILE_HEIGHT if tall else _TILE_HEIGHT
    tile_rows = max(1, height * geometry.num_kv_heads // geometry.num_q_heads)
    # Tensor cores are done with a full tile before its pages are read; in fp32, and on a CPU,
    # arithmetic takes longer from a quarter of a tile on.
    reads_longest = not on_cpu and geometry.dtype != torch.float32
    return WorkShape(
        max_tile_rows=tile_rows,
        read_bound_rows=tile_rows if reads_longest else -(-tile_rows // 4),
        target_items=items_per_kv_head(geometry.num_kv_heads, device),
    )


def items_per_kv_head(num_kv_heads: int, device: torch.device | str) -> int:
    """Work items that keep ``device`` busy; each is run once per KV head."""
    device = torch.device(device)
    if device.type == "cpu":
        return _ITEMS_PER_THREAD * torch.get_num_threads()
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return -(-_BLOCKS_PER_MULTIPROCESSOR * count // num_kv_heads)
