"""Runs records over vLLM's model, and moves rows between the store and vLLM's cache."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from tokendance.device.comparison import squared_differences
from tokendance.device.executor import Executor, Run
from tokendance.device.geometry import KVGeometry
from tokendance.device.layer_ropes import layer_ropes
from tokendance.device.pool import PagePool
from tokendance.device.rope import Rope
from tokendance.host.record import RestoreRecord, StepRecord
from tokendance.integrations.vllm.cache import EngineCache
from tokendance.integrations.vllm.options import Options
from tokendance.integrations.vllm.orders import (
    Compare,
    Decoding,
    Forget,
    Lost,
    Order,
    Orders,
    ReadBack,
    Told,
)
from tokendance.integrations.vllm.worker_decode import MemberRows, unwatchable
from tokendance.integrations.vllm.workers import runner_of
from tokendance.sizes import parse_bytes

_log = logging.getLogger("vllm.tokendance")
_COMPARED_POSITIONS = 1024
# vLLM rounds its tables to the model's dtype; what is compared is whether they are the same ones.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class WorkerSide:
    """The part of the connector that lives in a worker.

    Args:
        vllm_config: vLLM's.
        options: the connector's.
        kv_cache_config: of vLLM's cache.

    Attributes:
        executor: the library's device half; there once the caches are registered.
        windows: sliding windows of the layers.
        unshared: why members' decode cannot be shared here, if it is to be.
    """

    executor: Executor
    windows: list[int]
    unshared: list[str]

    def __init__(self, vllm_config: Any, options: Options, kv_cache_config: Any) -> None:
        self._config = vllm_config
        self._options = options
        self._num_blocks = kv_cache_config.num_blocks
        self._missing: set[int] = set()
        self._is_lost = False
        self._untold: Lost | None = None
        self._compared: dict[int, NDArray[np.float64]] = {}
        self._members: MemberRows | None = None

    def register(self, kv_caches: dict[str, Tensor]) -> None:
        """The caches are there: makes the pool, and has vLLM's attention ask for records' steps.

        Raises:
            ValueError: a model or a cache of a kind that is not supported, naming what.
            RuntimeError: the worker's model cannot be found.
        """
        runner = runner_of(self._config)
        self._model = runner.get_model()
        made = self._config.compilation_config.static_forward_context
        self._names = sorted(kv_caches, key=extract_layer_index)
        layers = [made[name] for name in self._names]
        geometry = self._geometry_of(layers)
        config = self._config.model_config
        rope = Rope.from_config(config.hf_text_config, config.max_model_len)
        device = layers[0].kv_cache.device
        _check_rope(self._model, geometry, rope, device)
        block = self._options.block_size
        pages = parse_bytes(self._options.capacity) // (block * geometry.row_bytes)
        if pages < 1:
            raise ValueError(
                f"capacity: expected at least one page of {block * geometry.row_bytes} bytes, got "
                f"{self._options.capacity}"
            )
        self.executor = Executor(geometry, rope, PagePool.own(geometry, pages, block, device))
        self.windows = list(dict.fromkeys(_window_of(layer) for layer in layers))
        self.unshared = unwatchable(runner) if self._options.shared_decode else []
        if self._options.shared_decode and not self.unshared:
            self._members = MemberRows(self.executor, runner, self._lose_members)
        self._cache = EngineCache(layers, self._num_blocks)
        for index, layer in enumerate(layers):
            _divert(layer, index, self._members)

    def _geometry_of(self, layers: list[Any]) -> KVGeometry:
        model = self._config.model_config
        shapes = {(one.num_heads, one.num_kv_heads, one.head_size) for one in layers}
        expected = model.get_num_layers(self._config.parallel_config)
        if len(shapes) != 1 or len(layers) != expected:
            raise ValueError(
                f"model: expected {expected} layers of attention of one shape, each with a cache "
                f"of its own, got {len(layers)} of the shapes {sorted(shapes)}"
            )
        for layer in layers:
            if getattr(layer.impl, "alibi_slopes", None) is not None:
                raise ValueError("model: expected rotated keys, got ALiBi")
        ((heads, kv_heads, head_dim),) = shapes
        return KVGeometry(len(layers), heads, kv_heads, head_dim, model.dtype)

    # A step of the engine -------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(self, decoding: Decoding) -> None:
        """Before vLLM puts the batch of an engine step together that has these rows."""
        assert self._members is not None
        try:
            self._members.open(decoding, self._is_lost)
        except Exception as error:
            self._lose_members(error)
        if self._is_lost:
            self._missing.add(NULL_BLOCK_ID)

    def finish(self) -> None:
        """vLLM's pass has ended."""
        if self._members is not None:
            self._members.close()

    @torch.inference_mode()
    def run(self, orders: Orders) -> None:
        """Runs the orders of one engine step.

        An order that fails loses what the store has: the orders behind it are left out until the
        scheduler's side has begun anew, and rows that were to be in vLLM's cache are reported.
        """
        for order in orders.orders:
            if isinstance(order, Forget):
                self._is_lost = False
                continue
            if not self._is_lost:
                try:
                    self._run_one(order)
                    continue
                except Exception as error:
                    self._lose(error)
            if isinstance(order, RestoreRecord):
                wanted = order.slots[order.slots >= 0]
                self._missing.update((wanted // self._cache.block_size).tolist())

    def _lose(self, error: Exception) -> None:
        _log.exception("tokendance: an order failed; what is stored is lost", exc_info=error)
        self._is_lost, self._untold = True, Lost(f"{type(error).__name__}: {error}")

    def _lose_members(self, error: Exception) -> None:
        """What the pass computes of members is void: vLLM is told so of the block they have."""
        self._missing.add(NULL_BLOCK_ID)
        self._lose(error)

    def _run_one(self, order: Order) -> None:
        if isinstance(order, StepRecord):
            self._compute(order)
        elif isinstance(order, RestoreRecord):
            self._cache.write(self.executor, order)
        elif isinstance(order, Compare):
            given = order.packed, order.positions, order.parts, order.num_parts
            self._compared[order.number] = squared_differences(self.executor, *given)
        else:
            assert isinstance(order, ReadBack)
            rows = self._cache.read(order.slots)
            self.executor.append(order.record, *rows, rotated=True)

    def _compute(self, record: StepRecord) -> None:
        """A pass over vLLM's model. At position 0 its rotation leaves queries and keys as they are,
        so that its attention layers hand over what `Run.attend` wants."""
        with self.executor.open(record) as run:
            metadata = dict.fromkeys(self._names, run)
            rows = run.num_rows
            # Without a slot mapping vLLM's own cache update is left out.
            with set_forward_context(metadata, self._config, num_tokens=rows, slot_mapping={}):
                self._model(
                    input_ids=run.token_ids.to(torch.int32),
                    positions=torch.zeros(rows, dtype=torch.int64, device=run.token_ids.device),
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )

    def take_missing(self) -> set[int]:
        """Blocks of vLLM's cache that were to be written since the last call, and were not."""
        taken, self._missing = self._missing, set()
        return taken

    def take_told(self) -> Told | None:
        """What is to be told since the last call: of an order that failed, and of audits."""
        lost, compared = self._untold, self._compared
        self._untold, self._compared = None, {}
        return Told(lost, compared) if lost or compared else None


def _divert(layer: Any, index: int, members: MemberRows | None) -> None:
    """Attention of a record's pass is the library's, and that of members' rows in vLLM's own; all
    other stays what it is."""
    impl = layer.impl
    original = impl.forward
    sinks = getattr(impl, "sinks", None)
    scores: dict[str, Any] = {
        "softmax_scale": float(impl.scale),
        "window": _window_of(layer),
        "soft_cap": float(getattr(impl, "logits_soft_cap", None) or 0.0),
        "sinks": None if sinks is None else sinks.float(),
    }

    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: Any,
        output: Tensor,
        *others: Any,
        **more: Any,
    ) -> Any:
        if isinstance(metadata, Run):
            attended = metadata.attend(index, query, key, value, **scores)
            return output.copy_(attended.view(output.shape))
        if members is None or not members.is_open:
            return original(module, query, key, value, kv_cache, metadata, output, *others, **more)
        if members.has_others:
            original(module, query, key, value, kv_cache, metadata, output, *others, **more)
        members.attend(index, query, key, value, output, **scores)
        return output

    impl.forward = forward


def _window_of(layer: Any) -> int:
    return int(layer.sliding_window or 0)


def _check_rope(model: Any, geometry: KVGeometry, rope: Any, device: torch.device) -> None:
    """Compares the model's rotation tables with the library's: position 0 must not turn anything,
    and the others must turn as the library does."""
    tables = {id(one): one for one in model.modules() if hasattr(one, "cos_sin_cache")}
    expected = layer_ropes(geometry, rope, device)[0]
    if not tables:
        raise ValueError("model: expected one that rotates queries and keys, got no tables")
    for one in tables.values():
        cos, sin = one.cos_sin_cache[:_COMPARED_POSITIONS].float().chunk(2, dim=-1)
        if not (bool((cos[0] == 1).all()) and bool((sin[0] == 0).all())):
            raise ValueError(
                "model: expected a rotation that leaves position 0 as it is, got one that scales "
                "(YaRN with an attention factor)"
            )
        tolerance = _TOLERANCE[geometry.dtype]
        if not any(_same(cos, sin, other, tolerance) for other in expected):
            raise ValueError("model: expected the rotation of its config, got other tables")


def _same(cos: Tensor, sin: Tensor, other: Any, tolerance: float) -> bool:
    rows = min(len(cos), len(other.cos))
    return cos.shape[1] == other.cos.shape[1] and all(
        bool(((a[:rows].to(b.device) - b[:rows]).abs() <= tolerance).all())
        for a, b in ((cos, other.cos), (sin, other.sin))
    )
