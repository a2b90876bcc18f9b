"""Rows repaired by what the model says of them, as far as anybody could know it.

The deviation of a row is how far its values are from its Master's: an oracle, since it takes full
recompute of every sibling. The attention that a Master agent's last rows pay to it is known before
any sibling is computed. Both are of the layers between the middle and three quarters of the depth,
where reuse diverges most.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from evals.fidelity.repairs import Choose, reused_rows
from tokendance.host.decide import AgentDecision

_ASKING = 16
"""Rows at a prompt's end whose attention is noted."""

Floats = NDArray[np.float32]
Score = Callable[["_Prompt", slice, "_Prompt", slice], Floats]
"""Of rows of a sibling's prompt, and of the Master agent's prompt where they were computed."""


@dataclass(frozen=True)
class _Prompt:
    """Values ``[layers, rows, heads * dim]`` and attention ``[rows]``, mean of layers and heads."""

    values: Floats
    attention: Floats


def _deviation(own: _Prompt, rows: slice, master: _Prompt, origin: slice) -> Floats:
    apart = own.values[:, rows] - master.values[:, origin]
    distance: Floats = np.linalg.norm(apart, axis=2).mean(axis=0)
    return distance


def _attention(own: _Prompt, rows: slice, master: _Prompt, origin: slice) -> Floats:
    return master.attention[origin]


def _product(own: _Prompt, rows: slice, master: _Prompt, origin: slice) -> Floats:
    return _deviation(own, rows, master, origin) * _attention(own, rows, master, origin)


SCORES: Mapping[str, Score] = {
    "deviation of values (an oracle)": _deviation,
    "the Master agent's attention": _attention,
    "their product": _product,
}


class Signals:
    """Keeps what a model says of the prompts that were asked for.

    Args:
        model: a transformers causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._prompts: dict[bytes, _Prompt] = {}
        self._made: dict[int, tuple[AgentDecision, int]] = {}

    def most(self, name: str, share: float) -> Choose:
        """For `repaired_beside`: of every sibling's reused rows the ``share`` that score highest.

        Args:
            name: of `SCORES`.
        """

        def choose(decisions: Sequence[AgentDecision]) -> list[NDArray[np.int32]]:
            for one in decisions:
                self._made |= {use.master.serial: (one, use.delta) for use in one.made}
            return [self._chosen(one, SCORES[name], share) for one in decisions]

        return choose

    def _chosen(self, one: AgentDecision, score: Score, share: float) -> NDArray[np.int32]:
        reused = reused_rows(one)
        if not len(reused):
            return reused
        scores = np.full(one.length, -np.inf, dtype=np.float32)
        for use in one.uses:
            made, origin = self._made[use.master.serial]
            rows = slice(use.delta, use.delta + use.length)
            there = slice(origin, origin + use.length)
            scores[rows] = score(self._of(one), rows, self._of(made), there)
        count = int(share * len(reused))
        return np.sort(reused[np.argsort(-scores[reused], kind="stable")[:count]])

    def _of(self, one: AgentDecision) -> _Prompt:
        if one.context not in self._prompts:
            self._prompts[one.context] = self._asked(
                np.concatenate([segment.token_ids for segment in one.segments])
            )
        return self._prompts[one.context]

    @torch.inference_mode()
    def _asked(self, token_ids: NDArray[np.int32]) -> _Prompt:
        model = self._model
        cache: Any = DynamicCache(config=model.config)
        parameters = inspect.signature(model.forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"
        held = {name: cache, "use_cache": True, "logits_to_keep": 1}
        ids = torch.from_numpy(token_ids).long()[None]
        usual = model.config._attn_implementation
        model(input_ids=ids[:, :-_ASKING], **held)
        model.set_attn_implementation("eager")  # the only one that returns what it weighs
        found = model(input_ids=ids[:, -_ASKING:], output_attentions=True, **held).attentions
        model.set_attn_implementation(usual)
        half = len(found) // 2
        layers = range(half, max(3 * len(found) // 4, half + 1))
        values = [cache.layers[layer].values[0].transpose(0, 1).flatten(1) for layer in layers]
        attention = torch.stack([found[layer][0].mean((0, 1)) for layer in layers]).mean(0)
        return _Prompt(torch.stack(values).numpy(), attention.numpy())
