"""One KV cache for many LLM agents: collective reuse, block-sparse diffs, fused RoPE attention."""

from importlib.metadata import PackageNotFoundError, version

from tokendance.audit import Audit, AuditReport, CollectorStats, Gate, ReuseWarning
from tokendance.collector import KVCollector
from tokendance.geometry import KVGeometry
from tokendance.plan import Plan
from tokendance.pool import OutOfPagesError, PagePool
from tokendance.quantization import Quantization
from tokendance.rope import Rope
from tokendance.rounds import RoundExtents, RoundTensors
from tokendance.segments import Segment, private, shared, split_round
from tokendance.selection import Everything, KeyDeviation, LeadingTokens, Nothing
from tokendance.step import Step
from tokendance.store import DiffStore, StoreStats

try:
    __version__ = version("tokendance")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Audit",
    "AuditReport",
    "CollectorStats",
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
    "Plan",
    "Quantization",
    "ReuseWarning",
    "Rope",
    "RoundExtents",
    "RoundTensors",
    "Segment",
    "Step",
    "StoreStats",
    "__version__",
    "private",
    "shared",
    "split_round",
]
