"""What the host does: digesting segments, planning a round, calling a layer."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

import tokendance as td
from bench import ceilings
from tokendance.host.mirror import round_arrays
from tokendance.host.record import with_work

TOKENS = 32768


def _collector(layers: int = 1) -> td.KVCollector:
    geometry = td.KVGeometry(layers, 1, 1, 64, torch.float16)
    rope = td.Rope.default(head_dim=64, theta=10000.0, max_position=2 * TOKENS)
    return td.KVCollector(td.DiffStore(geometry, rope, "64MiB", block_size=16))


def make_prompts(agents: int, tokens: int) -> dict[str, list[td.Segment]]:
    """All agents share 64 segments in orders of their own, behind 64 private tokens."""
    rng = np.random.default_rng(0)
    length = tokens // 64
    shared = [td.shared(rng.integers(0, 50000, length)) for _ in range(64)]
    return {
        f"agent {a}": [
            td.private(rng.integers(0, 50000, 64)),
            *[shared[i] for i in rng.permutation(64)],
            td.private(rng.integers(0, 50000, 8)),
        ]
        for a in range(agents)
    }


@pytest.mark.parametrize("tokens", [TOKENS // 8, TOKENS])
@pytest.mark.parametrize("agents", [16, 64])
def bench_plan(benchmark: Any, agents: int, tokens: int) -> None:
    """Rounds whose agents share all segments."""
    prompts = make_prompts(agents, tokens)
    collector = _collector()
    plans: list[td.Plan] = []

    def abort() -> None:
        while plans:
            plans.pop().abort()

    benchmark.pedantic(
        lambda: plans.append(collector.plan(prompts)), setup=abort, rounds=15, warmup_rounds=2
    )
    abort()
    uses = agents * 64
    benchmark.extra_info["us_per_use"] = benchmark.stats.stats.min / uses * 1e6


@pytest.mark.parametrize("agents", [16, 64])
def bench_describe(benchmark: Any, agents: int) -> None:
    """The round's fields and the work list of one decode step: once per step, for all layers."""
    collector = _collector()
    plan = collector.plan(make_prompts(agents, TOKENS))
    states, profile = plan._live.states, collector.store.scheduler.profile
    rows = np.arange(agents, dtype=np.int32)
    last = np.array([state.length - 1 for state in states], dtype=np.int32)

    def describe() -> None:
        arrays, extents = round_arrays(states, profile.block_size)
        with_work(arrays, extents, rows, last, profile.work)

    benchmark.pedantic(describe, rounds=15, warmup_rounds=2)
    plan.abort()
    benchmark.extra_info["us_per_use"] = benchmark.stats.stats.min / (agents * 64) * 1e6


def bench_digest(measure: Any) -> None:
    """`shared` of a long segment against BLAKE2b alone over its bytes."""
    ids = np.random.default_rng(0).integers(0, 50000, 4 << 20).astype(np.int64)
    raw = ids.astype(np.uint32).tobytes()
    blake = ceilings.Ceiling("B/s", len(raw), [lambda: hashlib.blake2b(raw).digest()])
    measure(
        lambda: td.shared(ids),
        ceilings={"blake2b": blake},
        floor=lambda rates: len(raw) / rates["blake2b"],
        bytes=len(raw),
    )


def bench_layer_call(benchmark: Any) -> None:
    """`Step.attend` of one decode row over one token: nothing but overhead, per layer."""
    layers = 64
    collector = _collector(layers)
    plan = collector.plan({"a": [td.private([1])]})
    q = torch.randn(1, 1, 64, dtype=torch.float16)
    while step := collector.step():
        _run(step, q, layers)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        plan.truncate("a", 1)
        return (collector.step({"a": [2]}, prefill=()), q, layers), {}

    benchmark.pedantic(_run, setup=setup, rounds=30, warmup_rounds=2)
    benchmark.extra_info["us_per_layer"] = benchmark.stats.stats.min / layers * 1e6
    plan.abort()


def _run(step: td.Step, q: torch.Tensor, layers: int) -> None:
    with step:
        for layer in range(layers):
            step.attend(layer, q, q, q)
