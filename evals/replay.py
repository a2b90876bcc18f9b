"""Recorded rounds replayed through several systems, and what each costs and loses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evals.baselines import (
    FullPrefill,
    ModelFlops,
    PerRequestBlend,
    PrefixCaching,
    RoundStats,
    System,
)
from tokendance.audit import divergence_of
from tokendance.collector import KVCollector
from tokendance.host.plan import Plan
from tokendance.host.segments import Segment
from tokendance.host.selection import Selection
from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of
from tokendance.store import DiffStore

SYSTEMS = ("full", "prefix", "pic", "tokendance")


class CollectiveReuse:
    """This library as a system of a replay: `TransformersEngine` over a `KVCollector`.

    Args:
        model: see `TransformersEngine`.
        source, selection: see `KVCollector`.
        capacity: of the store; memory is used as pages are filled.
        block_size: of the store.
    """

    name = "tokendance"

    def __init__(
        self,
        model: Any,
        source: str = "master",
        selection: Selection | None = None,
        capacity: int | str = "16GiB",
        block_size: int = 8,
    ) -> None:
        self.stats = RoundStats()
        self._model = model
        self._options = (source, selection, capacity, block_size)
        self._plan: Plan | None = None
        self._flops = ModelFlops.from_config(model.config)
        self.reset()

    @property
    def plan(self) -> Plan | None:
        """The plan of the current round."""
        return self._plan

    def prefill_round(self, prompts: Mapping[str, Sequence[Segment]]) -> dict[str, Tensor]:
        """See `evals.baselines.System`. The round before is committed without its output."""
        for agent, segments in prompts.items():
            if not any(segment.length for segment in segments):
                raise ValueError(f"prompts[{agent!r}]: expected at least one token, got none")
        store = self._engine.collector.store
        self._end_round()
        began = time.perf_counter()
        plan = self._plan = self._engine.collector.plan(prompts)
        logits = {agent: row.float() for agent, row in self._engine.prefill(plan).items()}
        seconds = time.perf_counter() - began
        layers = store.geometry.num_layers
        self.stats = RoundStats(
            prompt_rows=plan.rows,
            rows=plan.rows_computed,
            rows_overridden=plan.rows_overridden,
            linear_flops=self._flops.linear(round(plan.rows_computed * layers), len(logits)),
            attention_flops=self._flops.attention(round(plan.pairs_computed * layers)),
            kv_bytes_dense=plan.rows * store.geometry.row_bytes,
            kv_bytes_stored=plan.stored_bytes,
            prefill_seconds=seconds,
        )
        return {agent: logits[agent] for agent in prompts}

    def decode(self, token_ids: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """See `evals.baselines.System`."""
        if self._plan is None:
            raise KeyError("token_ids: expected agents of a round, got no round")
        began = time.perf_counter()
        logits = {
            agent: rows.float()
            for agent, rows in self._engine.decode(self._plan, token_ids).items()
        }
        self.stats.decode_seconds += time.perf_counter() - began
        self.stats.decode_tokens += sum(len(ids) for ids in token_ids.values())
        return logits

    def reset(self) -> None:
        """Ends all agents and forgets whatever was kept."""
        source, selection, capacity, block_size = self._options
        max_position = self._model.config.max_position_embeddings
        store = DiffStore(
            geometry_of(self._model),
            rope_of(self._model, max_position),
            capacity,
            block_size=block_size,
        )
        collector = KVCollector(store, source, selection)
        self._engine = TransformersEngine(self._model, collector)
        self._plan = None

    def _end_round(self) -> None:
        if self._plan is None:
            return
        for agent in self._plan.agents:
            spans = self._plan.spans(agent)
            self._plan.truncate(agent, spans[-1].end if spans else 0)
        self._plan.commit()
        self._plan = None


def make_system(
    name: str, model: Any, selection: Selection | None = None, capacity: int | str = "16GiB"
) -> System:
    """A system of `SYSTEMS` by its name.

    ``selection``, of which None is the default, and the store's ``capacity`` are tokendance's.
    Raises ``ValueError`` for another name.
    """
    makers: dict[str, Callable[[Any], System]] = {
        "full": FullPrefill,
        "prefix": PrefixCaching,
        "pic": PerRequestBlend,
        "tokendance": partial(CollectiveReuse, selection=selection, capacity=capacity),
    }
    if name not in makers:
        raise ValueError(f"systems: expected some of {SYSTEMS}, got {name!r}")
    return makers[name](model)


@dataclass
class SystemResult:
    """One system in one round. Bytes and rows are totals of the round.

    Attributes:
        prefill_s: seconds.
        rows: rows computed, row-layers / layers.
        rows_overridden: rows of shared segments computed again.
        linear_flops, attention_flops: of the prefill; ``flops`` is their sum.
        kv_bytes_dense, kv_bytes_stored: one dense cache per agent, and what is held.
        decode_tokens_per_s: over all agents, in one batch.
        kl: KL(full || system) in nats, mean over agents and tokens, teacher-forced on full's greedy
            continuation; None without ``full``.
        kl_siblings: the same without the Master agents; None without ``tokendance``, which names
            them, or when every agent is one.
        top1: share of tokens where both systems' likeliest token is the same.
    """

    prefill_s: float
    rows: float
    rows_overridden: int
    linear_flops: int
    attention_flops: int
    kv_bytes_dense: int
    kv_bytes_stored: int
    decode_tokens_per_s: float
    kl: float | None
    kl_siblings: float | None
    top1: float | None

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops


@dataclass
class RoundResult:
    """One replayed round: its prompts' tokens, those of distinct segments, and each system."""

    session: str
    round: int
    agents: int
    prompt_tokens: int
    distinct_tokens: int
    systems: dict[str, SystemResult]


def replay_round(
    systems: Sequence[System],
    prompts: Mapping[str, Sequence[Segment]],
    new_tokens: int,
    session: str = "",
    number: int = 0,
) -> RoundResult:
    """Runs one round through all systems; they get the same ids and are fed the same tokens.

    The tokens fed are the greedy continuation of the first system, which is ``full`` if that is
    among them; only then are divergences measured.

    Args:
        systems: the first one leads.
        prompts: see `System.prefill_round`.
        new_tokens: tokens per agent whose distributions are compared, at least 1.
        session, number: of the round, for the result.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens: expected at least 1, got {new_tokens}")
    fed: dict[str, list[int]] = {agent: [] for agent in prompts}
    distributions: dict[str, dict[str, Tensor]] = {}
    for system in systems:
        rows = {agent: [row] for agent, row in system.prefill_round(prompts).items()}
        for at in range(new_tokens - 1):
            if system is systems[0]:
                for agent, so_far in rows.items():
                    fed[agent].append(int(so_far[-1].argmax()))
            step = system.decode({agent: ids[at : at + 1] for agent, ids in fed.items()})
            for agent, logits in step.items():
                rows[agent].append(logits[0])
        distributions[system.name] = {agent: torch.stack(parts) for agent, parts in rows.items()}
    reference = distributions[systems[0].name] if systems[0].name == "full" else None
    siblings = _siblings(systems, prompts)
    distinct = {segment.digest: segment.length for p in prompts.values() for segment in p}
    return RoundResult(
        session=session,
        round=number,
        agents=len(prompts),
        prompt_tokens=sum(segment.length for p in prompts.values() for segment in p),
        distinct_tokens=sum(distinct.values()),
        systems={
            system.name: _result(system.stats, reference, distributions[system.name], siblings)
            for system in systems
        },
    )


def _siblings(systems: Sequence[System], agents: Iterable[str]) -> list[str] | None:
    """Agents that are no Master agents in the collective system's plan."""
    for system in systems:
        if isinstance(system, CollectiveReuse) and system.plan is not None:
            return [agent for agent in agents if agent not in system.plan.master_agents]
    return None


def _result(
    stats: RoundStats,
    reference: Mapping[str, Tensor] | None,
    distributions: Mapping[str, Tensor],
    siblings: Sequence[str] | None,
) -> SystemResult:
    kl = kl_siblings = top1 = None
    if reference is not None and reference:
        divergence = {
            agent: divergence_of(reference[agent], logits)
            for agent, logits in distributions.items()
        }
        kl = _mean(divergence.values())
        top1 = _mean(
            (logits.argmax(-1) == reference[agent].argmax(-1)).double()
            for agent, logits in distributions.items()
        )
        if siblings:
            kl_siblings = _mean(divergence[agent] for agent in siblings)
    return SystemResult(
        prefill_s=stats.prefill_seconds,
        rows=stats.rows,
        rows_overridden=stats.rows_overridden,
        linear_flops=stats.linear_flops,
        attention_flops=stats.attention_flops,
        kv_bytes_dense=stats.kv_bytes_dense,
        kv_bytes_stored=stats.kv_bytes_stored,
        decode_tokens_per_s=stats.decode_tokens_per_second,
        kl=kl,
        kl_siblings=kl_siblings,
        top1=top1,
    )


def _mean(parts: Iterable[Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in parts]).mean())


def summarize(rounds: Sequence[RoundResult]) -> dict[str, dict[str, float | None]]:
    """Per system: sums over the rounds; divergences averaged over rounds weighted by agents.

    Tokens per second are averaged over rounds too.
    """
    summary: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(name for one in rounds for name in one.systems):
        rows = [(one.agents, asdict(one.systems[name])) for one in rounds if name in one.systems]
        total: dict[str, float | None] = {}
        for key in rows[0][1]:
            values = [(agents, row[key]) for agents, row in rows if row[key] is not None]
            if not values:
                total[key] = None
            elif key in ("kl", "kl_siblings", "top1", "decode_tokens_per_s"):
                weight = sum(agents for agents, _ in values)
                total[key] = sum(agents * value for agents, value in values) / weight
            else:
                total[key] = sum(value for _, value in values)
        summary[name] = total
    return summary
