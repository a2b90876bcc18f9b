"""A transformers model's own forward over whole prompts: what reuse is compared with.

How far it is from itself, when the same rows are computed in other chunks or beside others, is the
noise floor: a divergence below it says nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tokendance.audit import divergence_of

CHUNK = 64
"""Rows of a chunk where the noise floor is measured."""


@dataclass(frozen=True)
class Continuation:
    """A prompt and what full recompute makes of it.

    Attributes:
        token_ids: of the prompt.
        fed: the greedy continuation, without its last token.
        logits: ``[len(fed) + 1, vocabulary]``: of the prompt's last row and of ``fed``.
    """

    token_ids: list[int]
    fed: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Noise:
    """KL in nats of full recompute against itself, means over prompts and tokens.

    Attributes:
        chunks: prompts in chunks of `CHUNK` rows, instead of at once.
        batch: every prompt twice in one batch, instead of alone.
    """

    chunks: float
    batch: float

    @property
    def floor(self) -> float:
        """The greater of both: a limit below it has no answer."""
        return max(self.chunks, self.batch)


@torch.inference_mode()
def continue_greedily(model: Any, token_ids: Sequence[int], new_tokens: int) -> Continuation:
    """Computes a prompt and continues it by its likeliest tokens.

    Args:
        token_ids: at least one.
        new_tokens: rows of logits, at least 1.
    """
    cache = _Cache(model)
    prompt = list(token_ids)
    rows = [cache.forward([prompt], 1)[0]]
    fed: list[int] = []
    while len(rows) < new_tokens:
        fed.append(int(rows[-1][-1].argmax()))
        rows.append(cache.forward([fed[-1:]], 1)[0])
    return Continuation(prompt, fed, torch.cat(rows))


@torch.inference_mode()
def recompute(model: Any, one: Continuation, chunk: int | None = None, copies: int = 1) -> Tensor:
    """The rows of ``one.logits`` again, all tokens given.

    Args:
        chunk: rows of a forward pass; None: all at once.
        copies: of the prompt in one batch, of which the first counts.
    """
    cache = _Cache(model)
    token_ids = [*one.token_ids, *one.fed]
    size = chunk or len(token_ids)
    wanted = len(token_ids) - len(one.fed) - 1  # the first row whose logits are wanted
    rows = []
    for begin in range(0, len(token_ids), size):
        part = token_ids[begin : begin + size]
        kept = min(begin + len(part) - wanted, len(part))
        logits = cache.forward([part] * copies, max(kept, 1))[0]
        if kept > 0:
            rows.append(logits)
    return torch.cat(rows)


def noise_of(model: Any, continuations: Sequence[Continuation]) -> Noise:
    """How far the model is from itself on some prompts."""
    chunks, batch = (
        torch.cat(
            [divergence_of(one.logits, recompute(model, one, **how)) for one in continuations]
        )
        for how in ({"chunk": CHUNK}, {"copies": 2})
    )
    return Noise(float(chunks.mean()), float(batch.mean()))


class _Cache:
    """Forwards of one model over one growing cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"
        self._arguments = {name: DynamicCache(config=model.config), "use_cache": True}

    def forward(self, token_ids: Sequence[Sequence[int]], kept: int) -> Tensor:
        """``[batch, kept, vocabulary]``: logits of the last rows."""
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._model.device)
        output = self._model(input_ids=ids, logits_to_keep=kept, **self._arguments)
        logits: Tensor = output.logits.float()
        return logits
