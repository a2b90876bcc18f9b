"""What exists, to be compared with: three ways of serving a round, each as fast as its idea allows.

- `FullPrefill`: transformers' own forward over every prompt;
- `PrefixCaching`: rows of a common prefix are computed once (vLLM, SGLang);
- `PerRequestBlend`: position-independent caching per request (CacheBlend).

All of them, and whatever else a replay compares with them, have the interface of `System`.
"""

from evals.baselines.flops import ModelFlops, causal_pairs
from evals.baselines.full import FullPrefill
from evals.baselines.pic import PerRequestBlend
from evals.baselines.prefix import PrefixCaching
from evals.baselines.system import RoundStats, System

__all__ = [
    "FullPrefill",
    "ModelFlops",
    "PerRequestBlend",
    "PrefixCaching",
    "RoundStats",
    "System",
    "causal_pairs",
]
