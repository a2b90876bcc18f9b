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

from tokendance.host.record import (
    AppendRecord,
    DeviceProfile,
    PackedRound,
    RestoreRecord,
    StepRecord,
)
from tokendance.host.round import IntArray


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


@dataclass
class Compare:
    """Two agents' rows are compared; see `squared_differences`.

    Attributes:
        number: of the audit.
        packed: both agents' KV.
        positions: of the rows.
        parts, num_parts: in which segment each row stands, of how many.
    """

    number: int
    packed: PackedRound
    positions: IntArray
    parts: NDArray[np.int64]
    num_parts: int


@dataclass
class Decoding:
    """Rows of members in vLLM's own pass.

    Attributes:
        record: of them.
        requests: whose they are, in the order of the record's rows.
    """

    record: StepRecord
    requests: list[str]


Order = StepRecord | RestoreRecord | ReadBack | Compare | Forget
"""A pass over the model, rows into vLLM's cache, rows out of it, an audit, and a new start."""


@dataclass
class Lost:
    """What a worker says when an order failed: no row of its store is to be trusted.

    Attributes:
        reason: the first error.
    """

    reason: str


@dataclass
class Told(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What workers say after an engine step.

    Attributes:
        lost: the first that one has to say, or None.
        compared: by audit, sums over the worker's heads, or over those of all workers.
    """

    lost: Lost | None
    compared: dict[int, NDArray[np.float64]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Told:
        sums = dict(self.compared)
        for number, more in other.compared.items():
            sums[number] = sums[number] + more if number in sums else more
        return Told(self.lost or other.lost, sums)


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """Of one engine step.

    Attributes:
        orders: run in this order.
        decoding: opened before the orders are run; computed by vLLM's pass, before or after them.
    """

    orders: list[Order] = field(default_factory=list)
    decoding: Decoding | None = None

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
        unshared: why the worker cannot share members' decode, if it is to.
    """

    profile: DeviceProfile
    windows: list[int]
    unshared: list[str] = field(default_factory=list)
