"""Drives a collector without a model: keys and values that depend only on token and layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import tokendance as td

GEOMETRY = td.KVGeometry(
    num_layers=2, num_q_heads=2, num_kv_heads=1, head_dim=64, dtype=torch.float32
)
ROPE = td.Rope.default(head_dim=64, theta=10000.0, max_position=4096)


def make_store(
    capacity: str = "64MiB", block_size: int = 8, quantization: td.Quantization | None = None
) -> td.DiffStore:
    return td.DiffStore(GEOMETRY, ROPE, capacity, block_size=block_size, quantization=quantization)


def tokens(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, count)


def project(token_ids: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[R, 2, 64]``, k and v ``[R, 1, 64]``, before RoPE."""
    generator = torch.Generator().manual_seed(layer)
    table = torch.randn(1000, 256, generator=generator, dtype=torch.float32, device="cpu")
    q, k, v = table[token_ids % 1000].split([128, 64, 64], dim=1)
    return q.reshape(-1, 2, 64), k.reshape(-1, 1, 64), v.reshape(-1, 1, 64)


def run_step(step: td.Step) -> Tensor:
    """Output of the last layer, rows that the step kept."""
    with step:
        out = torch.empty(0)
        ids = step.token_ids
        for layer in range(GEOMETRY.num_layers):
            q, k, v = project(ids, layer)
            out = step.attend(layer, q, k, v)
            (ids,) = step.keep(ids)
    return out


def prefill_steps(
    collector: td.KVCollector, plan: td.Plan, max_rows: int = 8192
) -> Iterator[td.Step]:
    """The steps that compute a plan's prompts; each is to be run before the next."""
    while step := collector.step(prefill=plan.prefilling, max_rows=max_rows):
        yield step


def run_prefill(
    collector: td.KVCollector, plan: td.Plan, max_rows: int = 8192
) -> dict[str, Tensor]:
    """The last row's output of each agent."""
    result: dict[str, Tensor] = {}
    for step in prefill_steps(collector, plan, max_rows):
        out = run_step(step)
        result.update(zip(step.logit_agents, out[step.logit_rows], strict=True))
    return result


def run_round(
    collector: td.KVCollector,
    prompts: Mapping[str, Sequence[td.Segment]],
    max_rows: int = 8192,
) -> td.Plan:
    plan = collector.plan(prompts)
    run_prefill(collector, plan, max_rows)
    plan.commit()
    return plan


def restored(store: td.DiffStore, agent: str) -> list[tuple[Tensor, Tensor]]:
    """Dense keys and values ``[length, 1, 64]`` of every layer."""
    length = store.length(agent)
    slots = torch.arange(length, device="cpu")
    result = []
    for layer in range(GEOMETRY.num_layers):
        k = torch.full((length, 1, 64), torch.nan, dtype=torch.float32, device="cpu")
        v = k.clone()
        store.restore(agent, layer, k, v, slots)
        result.append((k, v))
    return result


def snapshot(store: td.DiffStore) -> tuple[td.StoreStats, dict[str, list[tuple[Tensor, Tensor]]]]:
    """All that an observer can see of a store, but for what the lower tiers hold."""
    return replace(store.stats(), tiers={}), {
        agent: restored(store, agent) for agent in store.agents
    }


def without_idle(
    store: td.DiffStore,
) -> tuple[td.StoreStats, dict[str, list[tuple[Tensor, Tensor]]]]:
    """All that an observer can see of a store once the Masters that nobody uses are gone."""
    store.evict(store.stats().total_pages)
    stats, caches = snapshot(store)
    return replace(stats, evictions=0), caches


def same_snapshot(a: object, b: object) -> bool:
    stats_a, caches_a = a  # type: ignore[misc]
    stats_b, caches_b = b  # type: ignore[misc]
    return (
        stats_a == stats_b
        and caches_a.keys() == caches_b.keys()
        and all(
            torch.equal(x, y)
            for agent in caches_a
            for layer_a, layer_b in zip(caches_a[agent], caches_b[agent], strict=True)
            for x, y in zip(layer_a, layer_b, strict=True)
        )
    )
