"""Position-independent caching per request, as CacheBlend does it (Yao et al., 2405.16444).

Every shared block is computed once, alone, at positions 0, 1, ...; each request that holds it takes
a copy, its keys moved to the block's place in that prompt by one rotation. What is lost is the
attention between blocks. To repair it, all rows of the request are computed at the first layer; at
the second their fresh keys are compared with the cached ones, and the reused rows that deviate most
are computed anew from there on, together with the private rows and the last one.

Nothing is shared between requests but the blocks: each one moves every key, selects its own rows
and keeps a dense cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evals.baselines.flops import causal_pairs
from evals.baselines.rows import DenseCache, DenseSystem, RowSet
from tokendance.device.rope import Rope
from tokendance.host.segments import Segment

__all__ = ["PerRequestBlend"]

_SELECTION_LAYER = 1


@dataclass(frozen=True, slots=True)
class _Block:
    """A block computed alone: ``[layers, kv_heads, length, head_dim]`` each, keys at 0, 1, ..."""

    keys: torch.Tensor
    values: torch.Tensor


class PerRequestBlend(DenseSystem):
    """CacheBlend, request by request, in the order of the round.

    A block stays cached until `reset`. Stored bytes are the agents' dense caches, which they decode
    from, and the blocks of the round's prompts.

    Args:
        model: a transformers ``ForCausalLM`` model that `RowModel` takes, in eval mode.
        ratio: of a request's reused rows, the share that is recomputed: 0.15 in CacheBlend; 0
            repairs nothing, 1 equals full prefill.

    Raises:
        ValueError: ``ratio`` is outside 0 .. 1, or the model is none that can be taken.
    """

    name = "pic"

    def __init__(self, model: Any, ratio: float = 0.15) -> None:
        super().__init__(model)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio: expected 0 .. 1, got {ratio}")
        self.ratio = ratio
        rope = Rope.from_config(model.config)
        if not isinstance(rope, Rope):
            raise ValueError("rope_parameters: expected the same for all layers, got several")
        self._rope = rope
        self._blocks: dict[bytes, _Block] = {}

    @torch.inference_mode()
    def prefill_round(self, prompts: Mapping[str, Sequence[Segment]]) -> dict[str, torch.Tensor]:
        """See `evals.baselines.System`."""
        token_ids = self._begin(prompts)
        self._caches = {}
        stats = self.stats
        logits: dict[str, torch.Tensor] = {}
        for agent, prompt in prompts.items():
            began = time.perf_counter()
            self._compute_missing(prompt)
            logits[agent] = self._prefill(agent, prompt, token_ids[agent])
            stats.prefill_seconds += time.perf_counter() - began
        used = {one.digest: one.length for prompt in prompts.values() for one in _reused(prompt)}
        stats.kv_bytes_stored = stats.kv_bytes_dense + sum(used.values()) * self._rows.row_bytes
        return logits

    def reset(self) -> None:
        """See `evals.baselines.System`."""
        super().reset()
        self._blocks = {}

    def _compute_missing(self, prompt: Sequence[Segment]) -> None:
        """Computes the prompt's blocks that are not cached, each alone, in one batch of rows."""
        missing = {one.digest: one for one in _reused(prompt) if one.digest not in self._blocks}
        if not missing:
            return
        model, flops, last = self._rows, self._rows.flops, self._rows.num_layers - 1
        lengths = [one.length for one in missing.values()]
        positions = [np.arange(length) for length in lengths]
        angles = model.angles(torch.from_numpy(np.concatenate(positions)))
        chunks = [model.chunks(own) for own in positions]
        hidden = model.embed(np.concatenate([one.token_ids for one in missing.values()]))
        shape = (model.num_layers, model.num_kv_heads, len(hidden), model.head_dim)
        keys = torch.empty(shape, dtype=torch.float32, device="cpu")
        values = torch.empty_like(keys)
        for layer in range(model.num_layers):
            normed = model.normed(layer, hidden)
            keys[layer] = model.keys(layer, normed, angles).transpose(0, 1)
            values[layer] = model.values(layer, normed).transpose(0, 1)
            if layer == last:
                break  # Nobody asks for a block's output.
            queries = torch.split(model.queries(layer, normed, angles), lengths)
            each = zip(
                queries,
                torch.split(keys[layer], lengths, dim=1),
                torch.split(values[layer], lengths, dim=1),
                chunks,
                strict=True,
            )
            hidden = model.finish(layer, hidden, torch.cat([model.attend(*one) for one in each]))
        for digest, k, v in zip(
            missing,
            torch.split(keys, lengths, dim=2),
            torch.split(values, lengths, dim=2),
            strict=True,
        ):
            self._blocks[digest] = _Block(k, v)
        rows = sum(lengths)
        pairs = sum(causal_pairs(0, length) for length in lengths)
        self.stats.rows += rows
        self.stats.linear_flops += flops.row * rows * last + (flops.key + flops.value) * rows
        self.stats.attention_flops += flops.attention(pairs * last)

    def _prefill(
        self, agent: str, prompt: Sequence[Segment], token_ids: npt.NDArray[np.int32]
    ) -> torch.Tensor:
        model, flops, stats = self._rows, self._rows.flops, self.stats
        count = len(token_ids)
        cache = model.new_cache(count)
        reused = self._move_blocks(prompt, cache)
        rows = model.rows(np.arange(count))
        hidden = model.embed(token_ids)
        for layer in range(model.num_layers):
            if layer == _SELECTION_LAYER:
                kept = self._select(layer, hidden, cache, rows, reused)
                if len(kept) < count:
                    rows, hidden = model.rows(kept), hidden[torch.from_numpy(kept)]
            hidden = model.layer(layer, hidden, cache, rows)
            seen = int(rows.positions.sum()) + len(rows.positions)
            stats.rows += len(rows.positions) / model.num_layers
            stats.linear_flops += flops.linear(len(rows.positions), logit_rows=0)
            stats.attention_flops += flops.attention(seen)
        stats.linear_flops += flops.head
        stats.rows_overridden += int(reused[rows.positions].sum())
        cache.length = count
        self._caches[agent] = cache
        return model.logits(hidden[-1:])[0]

    def _move_blocks(self, prompt: Sequence[Segment], cache: DenseCache) -> npt.NDArray[np.bool_]:
        """Fills the cache with the prompt's blocks; True for each row that came from one."""
        reused = np.zeros(sum(segment.length for segment in prompt), dtype=bool)
        half = self._rows.head_dim // 2
        start = 0
        for segment in prompt:
            stop = start + segment.length
            if segment.is_shared and segment.length:
                block = self._blocks[segment.digest]
                # All layers at once: the shift is the same everywhere. Computed at 0, so the shift
                # is the start, and one row of the table moves the whole block.
                cos, sin = self._rope.cos[start], self._rope.sin[start]
                a, b = block.keys[..., :half], block.keys[..., half:]
                moved = cache.keys[:, :, start:stop]
                torch.mul(a, cos, out=moved[..., :half]).addcmul_(b, sin, value=-1)
                torch.mul(b, cos, out=moved[..., half:]).addcmul_(a, sin)
                cache.values[:, :, start:stop] = block.values
                reused[start:stop] = True
            start = stop
        return reused

    def _select(
        self,
        layer: int,
        hidden: torch.Tensor,
        cache: DenseCache,
        rows: RowSet,
        reused: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int64]:
        """Positions to compute from this layer on, ascending."""
        model = self._rows
        chosen = ~reused
        chosen[-1] = True
        count = math.ceil(self.ratio * int(reused.sum()))
        if count:
            fresh = model.keys(layer, model.normed(layer, hidden), rows.angles)
            self.stats.linear_flops += model.flops.key * len(hidden)
            cached = cache.keys[layer, :, : len(hidden)].transpose(0, 1)
            deviation = (fresh - cached).square().sum(dim=(1, 2))
            deviation[torch.from_numpy(~reused)] = -1.0
            chosen[torch.topk(deviation, count).indices.numpy()] = True
        return np.flatnonzero(chosen)


def _reused(prompt: Sequence[Segment]) -> list[Segment]:
    return [segment for segment in prompt if segment.is_shared and segment.length]
