"""What vLLM logs and exports of the connector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

COUNTED = {
    "rounds": "Rounds that were started.",
    "members": "Requests that were computed in a round.",
    "rows": "Prompt rows of these requests.",
    "rows_computed": "Prompt rows of them that were computed; the others were reused.",
    "audits": "Members that were compared with full recompute.",
    "rows_audited": "Prompt rows that were recomputed for it.",
    "findings": "What was found beyond the gate's limits.",
    "planned_again": "Members that lost their rows because the store was full.",
    "alone": "Requests that wanted to join a round and were left to vLLM.",
}
MEASURED = {
    "bytes_held": "Bytes of keys and values that members and agents hold in a worker's store.",
}


@dataclass
class RoundStats(KVConnectorStats):  # type: ignore[misc]
    """How often each of `COUNTED` came since they were taken last, and the last `MEASURED`."""

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            before = self.data.get(name, 0) if name in COUNTED else 0
            self.data[name] = before + count

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> RoundStats:
        self.add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class RoundMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The same as Prometheus counters and gauges, ``vllm:tokendance_rounds`` and so on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counters = self._made(self._counter_cls, COUNTED)
        self._gauges = self._made(self._gauge_cls, MEASURED)

    def _made(self, kind: Any, names: dict[str, str]) -> dict[str, Any]:
        found = {}
        for name, what in names.items():
            metric = kind(
                name=f"vllm:tokendance_{name}", documentation=what, labelnames=self._labelnames
            )
            found[name] = create_metric_per_engine(metric, self.per_engine_labelvalues)
        return found

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            if name in MEASURED:
                self._gauges[name][engine_idx].set(count)
            else:
                self._counters[name][engine_idx].inc(count)
