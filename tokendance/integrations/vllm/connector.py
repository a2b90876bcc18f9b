"""The class that vLLM makes: in the engine's scheduler one, in each worker one."""

from __future__ import annotations

import logging
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
)

from tokendance.integrations.vllm import null_blocks
from tokendance.integrations.vllm.options import Options, refusals, refuse
from tokendance.integrations.vllm.orders import Handshake, Orders, Told
from tokendance.integrations.vllm.scheduler_decode import SharedDecode
from tokendance.integrations.vllm.scheduler_side import SchedulerSide
from tokendance.integrations.vllm.sharing import obstacles
from tokendance.integrations.vllm.stats import RoundMetrics, RoundStats

_log = logging.getLogger("vllm.tokendance")


class TokenDanceConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Rounds of agents inside vLLM; see docs/vllm.md.

    Raises:
        ValueError: an option that is not understood, or something that vLLM is asked to do beside
            it and that it cannot do.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = Options.parse(self._kv_transfer_config.kv_connector_extra_config)
        self._options = options
        reasons = refusals(vllm_config)
        groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
        if len(groups) > 1:
            reasons.append(f"model: expected one KV cache group, got {len(groups)}")
        refuse(reasons)
        self._scheduler: SchedulerSide | None = None
        self._worker: Any = None
        self._unshared: list[str] = []  # why members' decode is not shared, if it is to be
        if role is KVConnectorRole.SCHEDULER:
            block = groups[0].kv_cache_spec.block_size
            self._scheduler = SchedulerSide(vllm_config, options, block)
            self._unshared = obstacles(vllm_config, groups)
            if options.shared_decode and not self._unshared:
                null_blocks.install(groups)
        else:
            # The scheduler's process needs no kernels.
            from tokendance.integrations.vllm.worker_side import WorkerSide

            self._worker = WorkerSide(vllm_config, options, kv_cache_config)

    # Scheduler ------------------------------------------------------------------------------------

    @property
    def rounds(self) -> SchedulerSide:
        """The scheduler's side."""
        assert self._scheduler is not None
        return self._scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Handshake]) -> None:
        handshakes = [metadata[rank] for rank in sorted(metadata)]
        self.rounds.meet(handshakes)
        if not self._options.shared_decode:
            return
        reasons = [*self._unshared, *(why for one in handshakes for why in one.unshared)]
        if reasons:
            _log.warning("tokendance: decode is not shared: %s", "; ".join(dict.fromkeys(reasons)))
            return
        (books,) = self._kv_cache_manager.coordinator.single_type_managers
        self.rounds.shared = books.members = SharedDecode(self.rounds)

    def on_new_request(self, request: Any) -> None:
        self.rounds.arrive(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.rounds.rows_for(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            (block_ids,) = blocks.get_block_ids()
            self.rounds.load(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders = self.rounds.step(scheduler_output.num_scheduled_tokens)
        # Loads are awaited by what vLLM computes in this step, and it knows of them. It does not
        # know of what is read, before it writes to these blocks what it computes.
        scheduler_output.has_sync_kv_loads |= orders.reads
        return orders

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.rounds.end(request, block_ids)
        return False, None

    def update_connector_output(self, connector_output: Any) -> None:
        told = connector_output.kv_connector_worker_meta
        if told is None:
            return
        if told.lost is not None:
            self.rounds.lose(told.lost.reason)
        elif told.compared:
            self.rounds.audits.take(told.compared)

    def reset_cache(self) -> bool:
        return self.rounds.reset()

    # Worker ---------------------------------------------------------------------------------------

    @property
    def worker(self) -> Any:
        """The worker's side."""
        assert self._worker is not None
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.worker.register(kv_caches)

    def get_handshake_metadata(self) -> Handshake:
        worker = self.worker
        return Handshake(worker.executor.profile, worker.windows, worker.unshared)

    def handle_preemptions(self, kv_connector_metadata: Orders) -> None:
        """Called before vLLM puts its batch together, whether anything was preempted or not."""
        if kv_connector_metadata.decoding is not None:
            self.worker.begin(kv_connector_metadata.decoding)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        if orders.orders:
            self.worker.run(orders)

    def get_block_ids_with_load_errors(self) -> set[int]:
        missing: set[int] = self.worker.take_missing()
        return missing

    def build_connector_worker_meta(self) -> Told | None:
        return None if self._worker is None else self._worker.take_told()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Rows are there before the forward pass begins."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Rows are read when their request has ended."""

    def wait_for_save(self) -> None:
        """Nothing is saved during a forward pass, but it has ended."""
        self.worker.finish()

    # Both -----------------------------------------------------------------------------------------

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Members' attention has other work in each step, so that no graph can hold it."""
        return bool(extra_config.get("shared_decode"))

    def get_kv_connector_stats(self) -> RoundStats | None:
        return None if self._scheduler is None else self._scheduler.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> RoundStats:
        return RoundStats() if data is None else RoundStats(data=data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> RoundMetrics:
        return RoundMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
