"""The interface that every way of serving a round has, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tokendance.host.segments import Segment

__all__ = ["RoundStats", "System"]


@dataclass(slots=True)
class RoundStats:
    """What one round cost.

    Attributes:
        prompt_rows: tokens of all prompts.
        rows: rows computed in the prefill, in whole rows: the sum over layers of the rows whose key
            and value were computed and kept at that layer, divided by the number of layers.
        rows_overridden: rows of shared segments that were computed again in a prompt although a
            cached row was at hand.
        linear_flops, attention_flops: of the prefill, counted as `flops.ModelFlops` says.
        kv_bytes_dense: of one dense cache per agent at the end of the prefill.
        kv_bytes_stored: of what the system holds at that moment to serve these agents.
        prefill_seconds: wall time of `System.prefill_round`, without the bookkeeping of statistics.
        decode_tokens: fed to `System.decode` since.
        decode_seconds: wall time of those calls.
    """

    prompt_rows: int = 0
    rows: float = 0.0
    rows_overridden: int = 0
    linear_flops: int = 0
    attention_flops: int = 0
    kv_bytes_dense: int = 0
    kv_bytes_stored: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens decoded per second over all agents; 0 before the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class System(Protocol):
    """Serves a society of agents round by round.

    A round is one call of `prefill_round` and then any number of calls of `decode`. What a system
    keeps from one round to the next (prefixes, blocks, Masters) is its own business; `reset` drops
    it, for a new session.

    Attributes:
        name: as on the command line of a replay.
        stats: of the current round, a new object for every `prefill_round`.
    """

    name: str
    stats: RoundStats

    def prefill_round(self, prompts: Mapping[str, Sequence[Segment]]) -> dict[str, torch.Tensor]:
        """Processes the prompts of a round. The agents of the round before end here.

        Args:
            prompts: agent to its prompt, in the order in which the requests arrive; at least one
                token each.

        Returns:
            Agent to the logits that follow its prompt, ``[vocabulary]`` fp32.

        Raises:
            ValueError: a prompt is empty or longer than the model has positions for.
        """
        ...

    def decode(self, token_ids: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Feeds each named agent its next tokens, all agents in one batch.

        Args:
            token_ids: any of the round's agents to one or more tokens that continue what it has
                been fed so far: sampled ones, or given ones (teacher forcing).

        Returns:
            Agent to the logits that follow each of the tokens, ``[tokens, vocabulary]`` fp32.

        Raises:
            KeyError: an agent that is not in the round.
            ValueError: an agent without tokens, or positions beyond the model's.
        """
        ...

    def reset(self) -> None:
        """Ends all agents and forgets whatever was kept."""
        ...
