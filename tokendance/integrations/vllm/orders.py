"""What the scheduler's side sends to the workers', with the metadata of each engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from tokendance.host.record import AppendRecord, DeviceProfile, RestoreRecord, StepRecord


@dataclass
class ReadBack:
    """Decoded rows that lie in vLLM's cache become the agent's.

    Attributes:
        record: where they go to.
        slots: int64 ``[R]``: where they lie, block * block size + row of the block.
    """

    record: AppendRecord
    slots: NDArray[np.int64]


@dataclass
class Forget:
    """The scheduler's side knows what was lost; from here on nothing of it is used."""


Order = StepRecord | RestoreRecord | ReadBack | Forget
"""A pass over the model, rows into vLLM's cache, rows out of it, and a new start."""


@dataclass
class Lost(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What a worker says when an order failed: no row of its store is to be trusted.

    Attributes:
        reason: the first error.
    """

    reason: str

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Lost:
        return self


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """Of one engine step.

    Attributes:
        orders: run in this order.
    """

    orders: list[Order] = field(default_factory=list)

    @property
    def reads(self) -> bool:
        """Whether blocks are read, which belong to nobody any more."""
        return any(isinstance(order, ReadBack) for order in self.orders)


@dataclass
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker tells the scheduler's side once its cache is there.

    Attributes:
        profile: of its device.
        windows: sliding windows of the model's layers, 0 for none.
    """

    profile: DeviceProfile
    windows: list[int]
