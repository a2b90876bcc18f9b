"""One KV cache for many LLM agents: collective reuse, block-sparse diffs, fused RoPE attention.

`host` decides, `device` computes, `files` keeps what outlives a process; `collector`, `store` and
`step` are the front of the three for one process. `integrations` runs models, `cli` has the
commands of ``python -m tokendance``, `testing` is for whoever writes an engine or a kernel.

What is exported here is imported when it is first asked for, so that `tokendance.host` can be used
where there is no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokendance.audit import Audit
    from tokendance.collector import KVCollector
    from tokendance.device.codec import Codec
    from tokendance.device.geometry import KVGeometry
    from tokendance.device.pool import PagePool
    from tokendance.device.quantization import Quantization
    from tokendance.device.rope import Rope
    from tokendance.device.rounds import RoundTensors
    from tokendance.files.errors import DamagedError, StoreInUseError
    from tokendance.host.agent import Phase
    from tokendance.host.books import OutOfPagesError
    from tokendance.host.gate import AuditReport, CollectorStats, Gate, ReuseWarning
    from tokendance.host.plan import Plan
    from tokendance.host.round import RoundExtents
    from tokendance.host.segments import Segment, private, shared, split_round
    from tokendance.host.selection import Everything, KeyDeviation, LeadingTokens, Nothing
    from tokendance.stats import StoreStats, TierStats
    from tokendance.step import Step
    from tokendance.store import DiffStore, Tenant
    from tokendance.stored_calibration import StoredCalibration

try:
    __version__ = version("tokendance")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

_MODULES = {
    "Audit": "audit",
    "AuditReport": "host.gate",
    "Codec": "device.codec",
    "CollectorStats": "host.gate",
    "DamagedError": "files.errors",
    "DiffStore": "store",
    "Everything": "host.selection",
    "Gate": "host.gate",
    "KVCollector": "collector",
    "KVGeometry": "device.geometry",
    "KeyDeviation": "host.selection",
    "LeadingTokens": "host.selection",
    "Nothing": "host.selection",
    "OutOfPagesError": "host.books",
    "PagePool": "device.pool",
    "Phase": "host.agent",
    "Plan": "host.plan",
    "Quantization": "device.quantization",
    "ReuseWarning": "host.gate",
    "Rope": "device.rope",
    "RoundExtents": "host.round",
    "RoundTensors": "device.rounds",
    "Segment": "host.segments",
    "Step": "step",
    "StoreInUseError": "files.errors",
    "StoreStats": "stats",
    "StoredCalibration": "stored_calibration",
    "Tenant": "store",
    "TierStats": "stats",
    "private": "host.segments",
    "shared": "host.segments",
    "split_round": "host.segments",
}

__all__ = [
    "Audit",
    "AuditReport",
    "Codec",
    "CollectorStats",
    "DamagedError",
    "DiffStore",
    "Everything",
    "Gate",
    "KVCollector",
    "KVGeometry",
    "KeyDeviation",
    "LeadingTokens",
    "Nothing",
    "OutOfPagesError",
    "PagePool",
    "Phase",
    "Plan",
    "Quantization",
    "ReuseWarning",
    "Rope",
    "RoundExtents",
    "RoundTensors",
    "Segment",
    "Step",
    "StoreInUseError",
    "StoreStats",
    "StoredCalibration",
    "Tenant",
    "TierStats",
    "__version__",
    "private",
    "shared",
    "split_round",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'tokendance' has no attribute {name!r}")
    value = getattr(import_module(f"tokendance.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
