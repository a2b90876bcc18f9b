"""Recorded rounds whose agents arrive one by one, against the same rounds planned at once.

An engine's requests trickle in: each agent comes while those before it are still in prefill or in
decode, and none has ended. What that costs is measured in rows and forward passes, what it loses in
KL against full recompute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evals.baselines import FullPrefill
from tokendance.audit import divergence_of
from tokendance.collector import KVCollector
from tokendance.host.agent import Phase
from tokendance.host.plan import Plan
from tokendance.host.segments import Segment
from tokendance.host.selection import Selection
from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of
from tokendance.store import DiffStore


@dataclass
class WayResult:
    """One round in one way.

    Attributes:
        rows: prompt rows computed, row-layers / layers.
        forwards: forward passes until every agent has its tokens, prefill and decode.
        kl: KL(full recompute || ours) in nats, mean over agents and tokens, teacher-forced on full
            recompute's greedy continuation.
        kl_siblings: the same without the agents that computed Masters for others in one way or the
            other, so that both ways are averaged over the same agents; None when every agent is
            one.
    """

    rows: float
    forwards: int
    kl: float
    kl_siblings: float | None


@dataclass
class _Way:
    """What one way gave, by agent."""

    rows: float
    forwards: int
    divergence: dict[str, Tensor]
    master_agents: list[str]

    def result(self, siblings: Iterable[str]) -> WayResult:
        of_siblings = [self.divergence[agent] for agent in siblings]
        return WayResult(
            self.rows,
            self.forwards,
            _mean(self.divergence.values()),
            _mean(of_siblings) if of_siblings else None,
        )


@dataclass
class ArrivalsResult:
    """One round in both ways: planned at once, and with agents that arrive one by one."""

    session: str
    round: int
    agents: int
    prompt_tokens: int
    at_once: WayResult
    one_by_one: WayResult


class Arrivals:
    """Holds the rounds of a session in both ways, each on a store of its own.

    Args:
        model: see `TransformersEngine`.
        selection: see `KVCollector`.
        new_tokens: tokens per agent whose distributions are compared, at least 1.
        max_rows: rows of a forward pass at most.
        interval: forward passes between two arrivals.
        capacity: of each store.
    """

    def __init__(
        self,
        model: Any,
        selection: Selection | None = None,
        new_tokens: int = 12,
        max_rows: int = 1024,
        interval: int = 1,
        capacity: int | str = "16GiB",
    ) -> None:
        for name, value in (
            ("new_tokens", new_tokens),
            ("max_rows", max_rows),
            ("interval", interval),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self._model = model
        self._selection = selection
        self._new_tokens = new_tokens
        self._max_rows = max_rows
        self._interval = interval
        self._capacity = capacity
        self._full = FullPrefill(model)
        self.reset()

    def reset(self) -> None:
        """Forgets what was kept: another session begins."""
        self._full.reset()
        self._at_once, self._one_by_one = self._engine(), self._engine()

    def _engine(self) -> TransformersEngine:
        rope = rope_of(self._model, self._model.config.max_position_embeddings)
        store = DiffStore(geometry_of(self._model), rope, self._capacity, block_size=8)
        return TransformersEngine(self._model, KVCollector(store, selection=self._selection))

    def hold_round(
        self, prompts: Mapping[str, Sequence[Segment]], session: str = "", number: int = 0
    ) -> ArrivalsResult:
        """Runs a round in both ways; afterwards its agents are committed without their output."""
        fed, reference = self._recompute(prompts)
        ways = [
            self._run(self._at_once, prompts, fed, reference, None),
            self._run(self._one_by_one, prompts, fed, reference, self._interval),
        ]
        siblings = set(prompts).difference(*[way.master_agents for way in ways])
        at_once, one_by_one = [way.result(siblings) for way in ways]
        tokens = sum(one.length for prompt in prompts.values() for one in prompt)
        return ArrivalsResult(session, number, len(prompts), tokens, at_once, one_by_one)

    def _recompute(
        self, prompts: Mapping[str, Sequence[Segment]]
    ) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
        """The greedy continuation of full recompute, and its logits."""
        rows = {agent: [row] for agent, row in self._full.prefill_round(prompts).items()}
        fed: dict[str, list[int]] = {agent: [] for agent in rows}
        for _ in range(self._new_tokens - 1):
            for agent, so_far in rows.items():
                fed[agent].append(int(so_far[-1].argmax()))
            step = self._full.decode({agent: ids[-1:] for agent, ids in fed.items()})
            for agent, logits in step.items():
                rows[agent].append(logits[0])
        return fed, {agent: torch.stack(parts) for agent, parts in rows.items()}

    def _run(
        self,
        engine: TransformersEngine,
        prompts: Mapping[str, Sequence[Segment]],
        fed: Mapping[str, Sequence[int]],
        reference: Mapping[str, Tensor],
        interval: int | None,
    ) -> _Way:
        """Agents arrive every ``interval`` forward passes; None: all at once."""
        collector = engine.collector
        arriving = list(prompts)
        plan = collector.plan(prompts if interval is None else {})
        if interval is None:
            arriving.clear()
        found: dict[str, list[Tensor]] = {agent: [] for agent in prompts}
        forwards = 0
        while True:
            if arriving and forwards % (interval or 1) == 0:
                agent = arriving.pop(0)
                plan.add({agent: prompts[agent]})
            step = collector.step(self._decoded(plan, fed), max_rows=self._max_rows)
            if step is None:
                break
            for agent, row in engine.run(step).items():
                found[agent].append(row.float())
            forwards += 1
        divergence = {
            agent: divergence_of(reference[agent], torch.stack(rows))
            for agent, rows in found.items()
        }
        result = _Way(plan.rows_computed, forwards, divergence, plan.master_agents)
        for agent in prompts:
            plan.truncate(agent, plan.length(agent) - len(plan.output(agent)))
        plan.commit()
        return result

    def _decoded(self, plan: Plan, fed: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        """The next token of every agent that is in decode and has one left."""
        next_tokens: dict[str, Sequence[int]] = {}
        for agent in plan.agents:
            if plan.phase(agent) is Phase.DECODE:
                at = len(plan.output(agent))
                if at < len(fed[agent]):
                    next_tokens[agent] = fed[agent][at : at + 1]
        return next_tokens


def summarize(results: Sequence[ArrivalsResult]) -> ArrivalsResult:
    """All rounds together: sums, and divergences averaged over rounds weighted by agents."""

    def total(ways: Sequence[WayResult]) -> WayResult:
        def average(values: Sequence[float | None]) -> float | None:
            pairs = [
                (one.agents, value)
                for one, value in zip(results, values, strict=True)
                if value is not None
            ]
            weight = sum(agents for agents, _ in pairs)
            return sum(agents * value for agents, value in pairs) / weight if weight else None

        kl = average([way.kl for way in ways])
        assert kl is not None
        return WayResult(
            sum(way.rows for way in ways),
            sum(way.forwards for way in ways),
            kl,
            average([way.kl_siblings for way in ways]),
        )

    return ArrivalsResult(
        "all",
        len(results),
        max(one.agents for one in results),
        sum(one.prompt_tokens for one in results),
        total([one.at_once for one in results]),
        total([one.one_by_one for one in results]),
    )


def _mean(parts: Iterable[Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in parts]).mean())
