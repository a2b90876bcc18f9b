"""How far a round's distributions are from full recompute, and how long that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evals.baselines import FullPrefill
from tokendance.audit import divergence_of
from tokendance.host.segments import Segment

__all__ = ["Comparison", "Recompute"]


@dataclass(frozen=True)
class Comparison:
    """One round against full recompute of the same prompts and tokens.

    Attributes:
        prefill_s: seconds of the full prefill.
        kl: KL(full || ours) in nats, mean over agents and sampled tokens.
        kl_siblings: the same without the Master agents; None when every agent is one.
        top1: share of sampled tokens where the likeliest token is the same.
    """

    prefill_s: float
    kl: float
    kl_siblings: float | None
    top1: float


class Recompute:
    """Recomputes rounds with transformers' own forward.

    Args:
        model: the model of the rounds.
    """

    def __init__(self, model: Any) -> None:
        self._full = FullPrefill(model)

    def check(
        self,
        prompts: Mapping[str, Sequence[Segment]],
        fed: Mapping[str, Sequence[int]],
        logits: Mapping[str, Tensor],
        master_agents: Sequence[str],
    ) -> Comparison:
        """Compares a round.

        Args:
            prompts: of the round.
            fed: per agent the tokens that were fed after its prompt, at least one.
            logits: per agent ``[rows, vocabulary]``, those that followed the last ``rows`` of the
                fed tokens.
            master_agents: see `Plan.master_agents`.
        """
        self._full.prefill_round(prompts)
        reference = self._full.decode(fed)
        divergence: dict[str, Tensor] = {}
        same: list[Tensor] = []
        for agent, rows in logits.items():
            expected = reference[agent][-len(rows) :]
            divergence[agent] = divergence_of(expected, rows)
            same.append((expected.argmax(-1) == rows.argmax(-1)).double())
        siblings = [rows for agent, rows in divergence.items() if agent not in master_agents]
        prefill_s = self._full.stats.prefill_seconds
        self._full.reset()
        return Comparison(
            prefill_s=prefill_s,
            kl=float(torch.cat(list(divergence.values())).mean()),
            kl_siblings=float(torch.cat(siblings).mean()) if siblings else None,
            top1=float(torch.cat(same).mean()),
        )
