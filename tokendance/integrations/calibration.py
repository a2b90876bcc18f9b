"""How near to full recompute a model stays under several selections, on rounds of one's own.

What holds on one model need not hold on the next. A calibration runs some rounds and says what
reuse loses there, what it computes, and which selection is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokendance.audit import divergence_of
from tokendance.collector import KVCollector
from tokendance.host.segments import Segment
from tokendance.host.selection import Selection
from tokendance.integrations.calibration_rounds import Round
from tokendance.integrations.full_recompute import (
    Continuation,
    Noise,
    continue_greedily,
    noise_of,
)
from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of
from tokendance.store import DiffStore

_BLOCK_SIZE = 16
_NOISE_PROMPTS = 2
_DRAWS = 2000


@dataclass(frozen=True)
class Reuse:
    """One selection over all rounds.

    Attributes:
        selection: which rows were recomputed.
        rows: computed, whole rows, Masters included.
        kl: KL(full recompute || reuse) in nats of each sibling of each round, mean over its tokens.
            Siblings are the agents that share segments and are Master agents under none of the
            selections: a Master agent computes all of its rows itself.
        rounds: number of the round of each sibling.
        top1: share of the siblings' tokens for which both have the same likeliest token.
    """

    selection: Selection
    rows: float
    kl: list[float]
    rounds: list[int]
    top1: float

    @property
    def mean(self) -> float:
        """KL, mean over the siblings."""
        return float(np.mean(self.kl))

    def percentile(self, share: float) -> float:
        """Of the siblings' KL, interpolated linearly."""
        return float(np.percentile(self.kl, share))

    @property
    def upper(self) -> float:
        """Upper end of the mean's 95 % interval, by a bootstrap of `_DRAWS` draws.

        Siblings of one round have heard the same. So a draw takes as many rounds as there are, with
        replacement, and of each of them as many siblings as it has, with replacement. With a single
        round only siblings are drawn: the end says nothing about other rounds.
        """
        by_round: dict[int, list[float]] = {}
        for number, kl in zip(self.rounds, self.kl, strict=True):
            by_round.setdefault(number, []).append(kl)
        found = [np.array(one) for one in by_round.values()]
        generator = np.random.default_rng(0)
        means = [
            np.concatenate(
                [
                    generator.choice(found[i], len(found[i]))
                    for i in generator.choice(len(found), len(found))
                ]
            ).mean()
            for _ in range(_DRAWS)
        ]
        return float(np.percentile(means, 97.5))


@dataclass(frozen=True)
class Calibration:
    """What a model's rounds came to.

    Attributes:
        prompt_rows: tokens of all prompts.
        noise: of full recompute against itself.
        reuses: per selection.
    """

    prompt_rows: int
    noise: Noise
    reuses: list[Reuse]

    def recommended(self, kl: float) -> Reuse | None:
        """The one with the fewest rows among those whose siblings' mean KL is at most ``kl``."""
        near = [one for one in self.reuses if one.mean <= kl]
        return min(near, key=lambda one: one.rows, default=None)


def calibrate(
    model: Any, rounds: Sequence[Round], selections: Sequence[Selection], new_tokens: int = 12
) -> Calibration:
    """Runs the rounds, one after the other as one session, under each selection.

    Every other way is fed full recompute's greedy continuation.

    Args:
        model: see `TransformersEngine`.
        rounds: per round each agent's prompt, at least one token each.
        selections: at least one.
        new_tokens: tokens per agent whose distributions are compared.

    Raises:
        ValueError: nothing to run, a model that `TransformersEngine` refuses, or in no round an
            agent that reuses what another computed.
    """
    if not rounds or not selections:
        raise ValueError(
            f"rounds, selections: expected some of each, got {len(rounds)} and {len(selections)}"
        )
    _engine(model, rounds, new_tokens, selections[0])  # refuses a model before the long part
    full = [
        {
            agent: continue_greedily(model, _token_ids(prompt), new_tokens)
            for agent, prompt in one.items()
        }
        for one in rounds
    ]
    prompts = [one for agents in full for one in agents.values()]
    noise = noise_of(model, prompts[:_NOISE_PROMPTS])
    runs = [_run(model, rounds, full, selection) for selection in selections]
    siblings = sorted(set[tuple[int, str]].intersection(*(set(one.agents) for one in runs)))
    if not siblings:
        raise ValueError(
            "rounds: expected agents that reuse what another computed, got none; mark as shared "
            "what several of a round's prompts have in common"
        )
    reuses = []
    for selection, one in zip(selections, runs, strict=True):
        kl, top1 = zip(*(one.agents[key] for key in siblings), strict=True)
        numbers = [number for number, _ in siblings]
        reuses.append(Reuse(selection, one.rows, list(kl), numbers, float(np.mean(top1))))
    return Calibration(sum(len(one.token_ids) for one in prompts), noise, reuses)


@dataclass
class _Run:
    """One selection: rows computed, and by round and agent KL and top-1 of who may be a sibling."""

    rows: float
    agents: dict[tuple[int, str], tuple[float, float]]


def _run(
    model: Any,
    rounds: Sequence[Round],
    full: Sequence[Mapping[str, Continuation]],
    selection: Selection,
) -> _Run:
    new_tokens = max(len(one.logits) for agents in full for one in agents.values())
    engine = _engine(model, rounds, new_tokens, selection)
    run = _Run(0.0, {})
    for number, (prompts, reference) in enumerate(zip(rounds, full, strict=True)):
        plan = engine.collector.plan(prompts)
        first = engine.prefill(plan)
        rest = engine.decode(plan, {agent: one.fed for agent, one in reference.items() if one.fed})
        run.rows += plan.rows_computed
        siblings = _who_shares(prompts) - set(plan.master_agents)
        for agent, one in reference.items():
            plan.truncate(agent, plan.length(agent) - len(one.fed))
            if agent not in siblings:
                continue
            logits = torch.cat([first[agent][None], *([rest[agent]] if one.fed else [])])
            kl = float(divergence_of(one.logits, logits).mean())
            run.agents[number, agent] = kl, _agreement(one.logits, logits)
        plan.commit()
    return run


def _who_shares(prompts: Round) -> set[str]:
    """Agents with a segment that another one of the round has, too."""
    agents: dict[bytes, set[str]] = {}
    for agent, prompt in prompts.items():
        for segment in prompt:
            if segment.is_shared:
                agents.setdefault(segment.digest, set()).add(agent)
    return {agent for sharing in agents.values() if len(sharing) > 1 for agent in sharing}


def _engine(
    model: Any, rounds: Sequence[Round], new_tokens: int, selection: Selection
) -> TransformersEngine:
    """Over an empty store with room for all rounds, whatever is reused."""
    geometry = geometry_of(model)
    pages = longest = 0
    for prompt in (prompt for one in rounds for prompt in one.values()):
        lengths = [segment.length for segment in prompt]
        longest = max(longest, sum(lengths) + new_tokens)
        # Every segment may become a Master of its own, and every row one of the agent's own.
        for length in (*lengths, sum(lengths) + new_tokens):
            pages += -(-length // _BLOCK_SIZE)
    store = DiffStore(
        geometry,
        rope_of(model, longest),
        pages * _BLOCK_SIZE * geometry.row_bytes,
        device=model.device,
        block_size=_BLOCK_SIZE,
    )
    return TransformersEngine(model, KVCollector(store, selection=selection))


def _agreement(reference: Tensor, logits: Tensor) -> float:
    return float((reference.argmax(-1) == logits.argmax(-1)).double().mean())


def _token_ids(prompt: Iterable[Segment]) -> list[int]:
    return [int(token) for segment in prompt for token in segment.token_ids]


def load_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer, as transformers finds them.

    Args:
        name: a model directory, or what transformers takes for one.
        dtype: ``"auto"``: that of the weights; or a name such as ``"bfloat16"``.

    Raises:
        ValueError: another dtype, or a model that transformers cannot read.
        OSError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if dtype != "auto" and not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype: expected auto or the name of a torch dtype, got {dtype!r}")
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)
