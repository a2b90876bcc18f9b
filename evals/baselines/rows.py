"""Runs chosen rows of a prompt through a transformers model, layer by layer, over dense caches.

transformers' own forward computes every row that it is given at every layer. Reusing rows means to
compute some of them only, at any positions, and from some layer on fewer of them; so the layers'
modules are called here one by one, with attention over a cache that rows are written into.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from evals.baselines.flops import ModelFlops
from evals.baselines.system import RoundStats
from tokendance.host.segments import Segment

__all__ = ["AttentionChunk", "DenseCache", "DenseSystem", "RowModel", "RowSet", "prompt_token_ids"]

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Query rows that attend at a time. Keys beyond a chunk's last row are left out, so smaller chunks
# compute less of what the causal mask hides; below this, calls and masks cost more than they save.
_CHUNK = 64
# Rows that a fresh cache has left for decoding.
_SPARE_ROWS = 64
_NO_ROWS = torch.empty(0, dtype=torch.float32, device="cpu")


@dataclass(slots=True)
class DenseCache:
    """One agent's keys and values of all layers.

    Attributes:
        keys, values: ``[layers, kv_heads, capacity, head_dim]``, keys rotated.
        length: rows in use.
    """

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    def reserve(self, rows: int) -> None:
        """Makes room for ``rows`` rows in all; the rows in use keep their contents."""
        capacity = self.keys.shape[2]
        if rows <= capacity:
            return
        capacity = max(rows, capacity + capacity // 2) + _SPARE_ROWS
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows of one prompt that pass through layers together.

    Attributes:
        positions: ``[rows]`` ascending.
        angles: cosines and sines at the positions, each ``[rows, 1, head_dim / 2]``.
        chunks: how the rows attend; made once, used at every layer.
    """

    positions: npt.NDArray[np.int64]
    angles: tuple[torch.Tensor, torch.Tensor]
    chunks: list[AttentionChunk]


@dataclass(frozen=True, slots=True)
class AttentionChunk:
    """Rows ``start .. stop - 1`` of a set attend to the keys ``0 .. seen - 1``.

    ``mask`` is ``[stop - start, seen]``, 0 or -inf; None if every row sees every key, or if
    ``causal``, when row i sees the keys ``0 .. i``.
    """

    start: int
    stop: int
    seen: int
    mask: torch.Tensor | None = None
    causal: bool = False


class RowModel:
    """A transformers ``ForCausalLM`` model of Llama's architecture, called row by row.

    The model stays what it is; its modules are called, its weights read. fp32 on the CPU, so that
    what a baseline loses is lost by its idea and not by rounding.

    Raises:
        ValueError: the model has another architecture, dtype or device, or a sliding window.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        if config.model_type not in _MODEL_TYPES:
            raise ValueError(
                f"model_type: expected one of {', '.join(_MODEL_TYPES)}, got {config.model_type!r}"
            )
        if model.dtype != torch.float32 or model.device.type != "cpu":
            raise ValueError(
                f"model: expected torch.float32 on the cpu, got {model.dtype} on {model.device}"
            )
        self.model = model
        self.flops = ModelFlops.from_config(config)
        self._layers: list[Any] = list(model.model.layers)
        attention = self._layers[0].self_attn
        for index, layer in enumerate(self._layers):
            window = getattr(layer.self_attn, "sliding_window", None)
            if window is None and config.model_type == "mistral":
                window = config.sliding_window
            if window is not None:
                raise ValueError(f"sliding_window of layer {index}: expected none, got {window}")
        self.num_layers = len(self._layers)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(attention.head_dim)
        self._scale = float(attention.scaling)
        self.max_position = int(config.max_position_embeddings)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's keys and values at all layers."""
        elements = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return elements * torch.float32.itemsize

    def new_cache(self, rows: int) -> DenseCache:
        """An empty cache with room for ``rows`` rows and some decoded ones."""
        shape = (self.num_layers, self.num_kv_heads, rows + _SPARE_ROWS, self.head_dim)
        keys = torch.empty(shape, dtype=torch.float32, device="cpu")
        return DenseCache(keys, torch.empty_like(keys))

    def embed(self, token_ids: npt.NDArray[np.int32]) -> torch.Tensor:
        """``[rows]`` token ids to ``[rows, hidden]``."""
        ids = torch.from_numpy(token_ids.astype(np.int64))
        hidden: torch.Tensor = self.model.model.embed_tokens(ids)
        return hidden

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own cosines and sines for fresh rows, each ``[rows, 1, head_dim / 2]``."""
        cos, sin = self.model.model.rotary_emb(_NO_ROWS, positions[None])
        half = self.head_dim // 2
        return cos[0, :, None, :half], sin[0, :, None, :half]

    def normed(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden [rows, hidden]`` as the projections of attention take it."""
        normed: torch.Tensor = self._layers[layer].input_layernorm(hidden)
        return normed

    def queries(
        self, layer: int, normed: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Rotated queries ``[rows, query_heads, head_dim]``."""
        attention = self._layers[layer].self_attn
        q = attention.q_proj(normed).view(len(normed), -1, self.head_dim)
        if hasattr(attention, "q_norm"):
            q = attention.q_norm(q)
        return _rotate(q, *angles)

    def keys(
        self, layer: int, normed: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Rotated keys ``[rows, kv_heads, head_dim]``."""
        attention = self._layers[layer].self_attn
        k = attention.k_proj(normed).view(len(normed), -1, self.head_dim)
        if hasattr(attention, "k_norm"):
            k = attention.k_norm(k)
        return _rotate(k, *angles)

    def values(self, layer: int, normed: torch.Tensor) -> torch.Tensor:
        """Values ``[rows, kv_heads, head_dim]``."""
        v: torch.Tensor = self._layers[layer].self_attn.v_proj(normed)
        return v.view(len(normed), -1, self.head_dim)

    def rows(self, positions: npt.NDArray[np.int64]) -> RowSet:
        """The rows at ascending ``positions``, for `layer`."""
        angles = self.angles(torch.from_numpy(positions))
        return RowSet(positions, angles, self.chunks(positions))

    def chunks(self, positions: npt.NDArray[np.int64]) -> list[AttentionChunk]:
        """Cuts the rows at ascending ``positions`` for causal attention over a cache."""
        count = len(positions)
        if count and positions[-1] + 1 == count:  # every row of a prompt
            return [AttentionChunk(0, count, count, causal=True)]
        chunks = []
        for start in range(0, count, _CHUNK):
            own = positions[start : start + _CHUNK]
            seen = int(own[-1]) + 1
            mask = None
            if len(own) > 1:
                hidden = torch.from_numpy(np.arange(seen)[None, :] > own[:, None])
                mask = torch.zeros(hidden.shape, dtype=torch.float32, device="cpu")
                mask.masked_fill_(hidden, float("-inf"))
            chunks.append(AttentionChunk(start, start + len(own), seen, mask))
        return chunks

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        chunks: Sequence[AttentionChunk],
    ) -> torch.Tensor:
        """Attention of rows over a cache that holds every row up to the last of them.

        Args:
            q: ``[rows, query_heads, head_dim]``.
            keys, values: ``[kv_heads, rows of the cache, head_dim]``.
            chunks: of the rows.

        Returns:
            ``[rows, query_heads * head_dim]``.
        """
        grouped = q.view(len(q), self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3)
        out = torch.empty_like(q)
        # KV heads are the batch and the query heads of one KV head its heads: no key is repeated.
        grouped_out = out.view(len(q), self.num_kv_heads, -1, self.head_dim).permute(1, 2, 0, 3)
        group = grouped.shape[1]
        for chunk in chunks:
            grouped_out[:, :, chunk.start : chunk.stop] = F.scaled_dot_product_attention(
                grouped[:, :, chunk.start : chunk.stop],
                keys[:, None, : chunk.seen].expand(-1, group, -1, -1),
                values[:, None, : chunk.seen].expand(-1, group, -1, -1),
                attn_mask=chunk.mask,
                is_causal=chunk.causal,
                scale=self._scale,
            )
        return out.view(len(q), -1)

    def finish(self, layer: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output ``[rows, hidden]`` from its input and its attention's output."""
        module = self._layers[layer]
        hidden = hidden + module.self_attn.o_proj(attended)
        out: torch.Tensor = hidden + module.mlp(module.post_attention_layernorm(hidden))
        return out

    def layer(
        self, layer: int, hidden: torch.Tensor, cache: DenseCache, rows: RowSet
    ) -> torch.Tensor:
        """One whole layer for ``hidden [rows, hidden]``; writes the rows' keys and values.

        Every row of ``cache`` left of a row's position must hold its key and value by then.
        """
        keys, values = cache.keys[layer], cache.values[layer]
        normed = self.normed(layer, hidden)
        _write(keys, rows.positions, self.keys(layer, normed, rows.angles))
        _write(values, rows.positions, self.values(layer, normed))
        queries = self.queries(layer, normed, rows.angles)
        return self.finish(layer, hidden, self.attend(queries, keys, values, rows.chunks))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden]`` after the last layer to ``[rows, vocabulary]`` fp32."""
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits


class DenseSystem:
    """A system with one dense cache per agent: batched decoding and the books, for subclasses.

    A subclass fills ``_caches`` in `prefill_round`.

    Args:
        model: a transformers ``ForCausalLM`` model that `RowModel` takes, in eval mode.
    """

    name: str

    def __init__(self, model: Any) -> None:
        self._rows = RowModel(model)
        self._caches: dict[str, DenseCache] = {}
        self.stats = RoundStats()

    @torch.inference_mode()
    def decode(self, token_ids: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """See `evals.baselines.System`."""
        model = self._rows
        caches = [self._caches[agent] for agent in token_ids]
        counts = [len(ids) for ids in token_ids.values()]
        for agent, cache, count in zip(token_ids, caches, counts, strict=True):
            if count == 0:
                raise ValueError(f"token_ids[{agent!r}]: expected at least one token, got none")
            _check_positions(f"token_ids[{agent!r}]", cache.length + count, model.max_position)
        if not caches:
            return {}
        began = time.perf_counter()
        positions = []
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve(cache.length + count)
            positions.append(np.arange(cache.length, cache.length + count))
        angles = model.angles(torch.from_numpy(np.concatenate(positions)))
        chunks = [model.chunks(own) for own in positions]
        fed = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in token_ids.values()])
        hidden = model.embed(fed)
        for layer in range(model.num_layers):
            # The linear layers see all agents' rows at once: their weights are read once.
            normed = model.normed(layer, hidden)
            q = torch.split(model.queries(layer, normed, angles), counts)
            k = torch.split(model.keys(layer, normed, angles), counts)
            v = torch.split(model.values(layer, normed), counts)
            attended = []
            for index, cache in enumerate(caches):
                own = slice(cache.length, cache.length + counts[index])
                cache.keys[layer, :, own] = k[index].transpose(0, 1)
                cache.values[layer, :, own] = v[index].transpose(0, 1)
                keys, values = cache.keys[layer], cache.values[layer]
                attended.append(model.attend(q[index], keys, values, chunks[index]))
            hidden = model.finish(layer, hidden, torch.cat(attended))
        logits = torch.split(model.logits(hidden), counts)
        for cache, count in zip(caches, counts, strict=True):
            cache.length += count
        self.stats.decode_seconds += time.perf_counter() - began
        self.stats.decode_tokens += sum(counts)
        return dict(zip(token_ids, logits, strict=True))

    def reset(self) -> None:
        """See `evals.baselines.System`."""
        self._caches = {}
        self.stats = RoundStats()

    def _begin(self, prompts: Mapping[str, Sequence[Segment]]) -> dict[str, npt.NDArray[np.int32]]:
        """Checks the prompts, opens the round's statistics, and gives each prompt's token ids."""
        token_ids = {agent: prompt_token_ids(prompt) for agent, prompt in prompts.items()}
        for agent, ids in token_ids.items():
            if len(ids) == 0:
                raise ValueError(f"prompts[{agent!r}]: expected at least one token, got none")
            _check_positions(f"prompts[{agent!r}]", len(ids), self._rows.max_position)
        rows = sum(len(ids) for ids in token_ids.values())
        self.stats = RoundStats(prompt_rows=rows, kv_bytes_dense=rows * self._rows.row_bytes)
        return token_ids


def prompt_token_ids(prompt: Sequence[Segment]) -> npt.NDArray[np.int32]:
    """The token ids of a prompt's segments put together, ``[tokens]`` int32."""
    runs = [segment.token_ids for segment in prompt]
    return np.concatenate(runs) if runs else np.empty(0, dtype=np.int32)


def _check_positions(argument: str, needed: int, available: int) -> None:
    if needed > available:
        raise ValueError(
            f"{argument}: expected at most {available} positions (max_position_embeddings), "
            f"got {needed}"
        )


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation of ``[rows, heads, head_dim]`` by ``[rows, 1, head_dim / 2]`` each."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _write(cached: torch.Tensor, positions: npt.NDArray[np.int64], fresh: torch.Tensor) -> None:
    """Puts ``fresh [rows, kv_heads, head_dim]`` at ``positions`` of one layer's cache."""
    first, end = int(positions[0]), int(positions[-1]) + 1
    if end - first == len(positions):
        cached[:, first:end] = fresh.transpose(0, 1)
    else:
        cached.index_copy_(1, torch.from_numpy(positions), fresh.transpose(0, 1))
