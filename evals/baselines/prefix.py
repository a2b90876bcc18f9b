"""Prefix caching: rows of a prefix that was computed before are taken over (vLLM, SGLang).

Exact, and helpless against a round: the first private token ends what two prompts have in common.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evals.baselines.flops import causal_pairs
from evals.baselines.rows import DenseCache, DenseSystem
from tokendance.host.segments import Segment

__all__ = ["PrefixCaching"]


@dataclass(slots=True)
class _Sequence:
    """What an agent was fed, prompt and decoded tokens, and its cache."""

    token_ids: npt.NDArray[np.int32]
    cache: DenseCache


class PrefixCaching(DenseSystem):
    """Computes what follows the longest prefix that any cached sequence has in common with a
    prompt.

    Cached are the prompts of this round, one after the other, and every agent's prompt and decoded
    tokens of the round before. Prefixes match to the token, not to a page of 16, in the baseline's
    favour. The last row of a prompt is always computed, for its logits. Stored bytes count every
    distinct prefix once, as paged caches hold them.
    """

    name = "prefix"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._cached: dict[str, _Sequence] = {}

    @torch.inference_mode()
    def prefill_round(self, prompts: Mapping[str, Sequence[Segment]]) -> dict[str, torch.Tensor]:
        """See `evals.baselines.System`."""
        token_ids = self._begin(prompts)
        model, stats = self._rows, self.stats
        earlier = list(self._cached.values())
        current: dict[str, _Sequence] = {}
        logits: dict[str, torch.Tensor] = {}
        for agent, ids in token_ids.items():
            began = time.perf_counter()
            cache = model.new_cache(len(ids))
            start = _take_prefix(cache, ids, [*current.values(), *earlier])
            rows = model.rows(np.arange(start, len(ids)))
            hidden = model.embed(ids[start:])
            for layer in range(model.num_layers):
                hidden = model.layer(layer, hidden, cache, rows)
            logits[agent] = model.logits(hidden[-1:])[0]
            cache.length = len(ids)
            stats.prefill_seconds += time.perf_counter() - began
            current[agent] = _Sequence(ids, cache)
            stats.rows += len(rows.positions)
            pairs = causal_pairs(start, len(ids))
            stats.linear_flops += model.flops.linear(
                model.num_layers * len(rows.positions), logit_rows=1
            )
            stats.attention_flops += model.flops.attention(model.num_layers * pairs)
        self._cached = current
        self._caches = {agent: sequence.cache for agent, sequence in current.items()}
        stats.kv_bytes_stored = _distinct_prefixes(token_ids.values()) * model.row_bytes
        return logits

    def decode(self, token_ids: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """See `evals.baselines.System`."""
        logits = super().decode(token_ids)
        for agent, fed in token_ids.items():
            sequence = self._cached[agent]
            sequence.token_ids = np.concatenate(
                [sequence.token_ids, np.asarray(fed, dtype=np.int32)]
            )
        return logits

    def reset(self) -> None:
        """See `evals.baselines.System`."""
        super().reset()
        self._cached = {}


def _take_prefix(
    cache: DenseCache, token_ids: npt.NDArray[np.int32], candidates: Sequence[_Sequence]
) -> int:
    """Copies the longest cached prefix; returns its length, at most all but the last row."""
    best, source = 0, None
    for candidate in candidates:
        common = min(_common_prefix(candidate.token_ids, token_ids), len(token_ids) - 1)
        if common > best:
            best, source = common, candidate.cache
    if source is not None:
        cache.keys[:, :, :best] = source.keys[:, :, :best]
        cache.values[:, :, :best] = source.values[:, :, :best]
    return best


def _common_prefix(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _distinct_prefixes(prompts: Iterable[npt.NDArray[np.int32]]) -> int:
    """Nodes of the prompts' prefix tree: among sorted prompts only neighbours share the most."""
    ordered = sorted(prompts, key=lambda ids: ids.astype(">i4").tobytes())
    shared = sum(_common_prefix(a, b) for a, b in pairwise(ordered))
    return sum(map(len, ordered)) - shared
