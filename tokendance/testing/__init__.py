"""Random ragged rounds, and comparisons, for testing an operator or an engine that calls them.

A round made here is legal and as unkind as the contract (``round.h``) allows: whatever must not be
read is NaN (rows and pages without content, gaps between strides) or an absurd number (page ids,
positions and indices in slots beyond the filled part), and fields have more capacity than content.

May import: this package, `tokendance.host`, `tokendance.device` and the planner; nothing of the
library imports it.
"""

from __future__ import annotations

from tokendance.testing.comparisons import (
    assert_close,
    assert_same_bits,
    assert_same_storage,
    same_bits,
    tolerance,
)
from tokendance.testing.dense_caches import DenseCache, dense_cache
from tokendance.testing.layouts import (
    ABSURD,
    LAYOUTS,
    QUANTIZED,
    Layout,
    StorageCopies,
    far_apart,
    is_quantized,
    poison,
    pools,
    whole_storage,
)
from tokendance.testing.random_rounds import EDGE_CASES, Masks, RandomRound, random_round
from tokendance.testing.work_lists import assert_work_covers, random_work

__all__ = [
    "ABSURD",
    "EDGE_CASES",
    "LAYOUTS",
    "QUANTIZED",
    "DenseCache",
    "Layout",
    "Masks",
    "RandomRound",
    "StorageCopies",
    "assert_close",
    "assert_same_bits",
    "assert_same_storage",
    "assert_work_covers",
    "dense_cache",
    "far_apart",
    "is_quantized",
    "poison",
    "pools",
    "random_round",
    "random_work",
    "same_bits",
    "tolerance",
    "whole_storage",
]
