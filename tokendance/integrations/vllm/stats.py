"""What vLLM logs and exports of the connector."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats


@dataclass
class RoundStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since they were taken last: ``rounds``, ``members``, prompt ``rows``, those of them
    that were ``rows_computed``, and requests that were left to vLLM ``alone``."""

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.data[name] = self.data.get(name, 0) + count

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> RoundStats:
        self.add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data
