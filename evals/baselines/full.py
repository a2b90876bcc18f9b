"""Full prefill: transformers' own forward over every prompt, one after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evals.baselines.flops import causal_pairs
from evals.baselines.rows import DenseCache, DenseSystem
from tokendance.host.segments import Segment

__all__ = ["FullPrefill"]


class FullPrefill(DenseSystem):
    """Computes every row of every prompt; what the others are measured against.

    The prefill is ``model(...)`` itself with its SDPA attention, batch 1, logits of the last row
    only. The caches it returns are decoded from in one batch (`DenseSystem.decode`), as the other
    systems' are.
    """

    name = "full"

    @torch.inference_mode()
    def prefill_round(self, prompts: Mapping[str, Sequence[Segment]]) -> dict[str, torch.Tensor]:
        """See `evals.baselines.System`."""
        token_ids = self._begin(prompts)
        self._caches = {}
        model, stats = self._rows, self.stats
        logits: dict[str, torch.Tensor] = {}
        for agent, ids in token_ids.items():
            inputs = torch.from_numpy(ids).long()[None]
            began = time.perf_counter()
            output = model.model(input_ids=inputs, use_cache=True, logits_to_keep=1)
            stats.prefill_seconds += time.perf_counter() - began
            logits[agent] = output.logits[0, -1]
            self._caches[agent] = self._adopted(output.past_key_values, len(ids))
            pairs = causal_pairs(0, len(ids))
            stats.rows += len(ids)
            stats.linear_flops += model.flops.linear(model.num_layers * len(ids), logit_rows=1)
            stats.attention_flops += model.flops.attention(model.num_layers * pairs)
        stats.kv_bytes_stored = stats.kv_bytes_dense
        return logits

    def _adopted(self, past: Any, rows: int) -> DenseCache:
        cache = self._rows.new_cache(rows)
        for layer, held in enumerate(past.layers):
            cache.keys[layer, :, :rows] = held.keys[0]
            cache.values[layer, :, :rows] = held.values[0]
        cache.length = rows
        return cache
