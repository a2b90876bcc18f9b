"""One way to count floating-point operations, for every system that a replay compares.

A multiply-add counts two. With ``E`` the hidden size, ``Hq`` and ``Hk`` the query and key/value
heads, ``D`` the head dim, ``F`` the width of the MLP and ``V`` the vocabulary:

- a row at a layer: projections ``2 E D`` per query, key and value head, output ``2 Hq D E``, gated
  MLP ``6 E F``;
- attention: a query row that sees a key costs ``4 Hq D`` at that layer (``2 D`` per head for the
  score and ``2 D`` for the value). A row at position p sees p + 1 keys: what a mask hides is not
  counted, even where a kernel computes it;
- a row of logits: ``2 E V``.

Norms, rotations, softmax and embedding lookups are left out: they are linear in the rows with small
factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ModelFlops", "causal_pairs"]


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Operations of one model's parts, see the module.

    Attributes:
        num_layers: how often a row passes through a layer.
        query, key, value: projection of one row at one layer, all heads.
        output: output projection and MLP of one row at one layer.
        pair: attention of one query row and one key at one layer, all query heads.
        head: logits of one row.
    """

    num_layers: int
    query: int
    key: int
    value: int
    output: int
    pair: int
    head: int

    @classmethod
    def from_config(cls, config: Any) -> ModelFlops:
        """Of a transformers config of a dense decoder with a gated MLP."""
        hidden = int(config.hidden_size)
        query_heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or hidden // query_heads
        query_width = query_heads * int(head_dim)
        kv_width = int(config.num_key_value_heads) * int(head_dim)
        return cls(
            num_layers=int(config.num_hidden_layers),
            query=2 * hidden * query_width,
            key=2 * hidden * kv_width,
            value=2 * hidden * kv_width,
            output=2 * query_width * hidden + 6 * hidden * int(config.intermediate_size),
            pair=4 * query_width,
            head=2 * hidden * int(config.vocab_size),
        )

    @property
    def row(self) -> int:
        """All linear layers of one row at one layer."""
        return self.query + self.key + self.value + self.output

    def linear(self, row_layers: int, logit_rows: int) -> int:
        """All linear layers of a prefill in which rows pass through whole layers.

        Args:
            row_layers: rows computed, summed over layers.
            logit_rows: rows whose logits are computed.
        """
        return self.row * row_layers + self.head * logit_rows

    def attention(self, pair_layers: int) -> int:
        """Of (query row, visible key) pairs, summed over layers."""
        return self.pair * pair_layers


def causal_pairs(start: int, stop: int) -> int:
    """Keys that the rows at positions ``start .. stop - 1`` see, themselves included."""
    return (start + 1 + stop) * (stop - start) // 2
