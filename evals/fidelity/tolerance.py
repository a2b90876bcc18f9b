"""Tolerance: own rows dropped where the Master's row is near enough, and what that loses.

A round is run and its Mirrors are written out densely. `DiffStore.put_round` encodes
them again at every tolerance; the agents continue from what it kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evals.fidelity.replays import Prompts, compare, make_engine, read_workload, recompute

TOLERANCES = (0.0, 0.5, 1.0, 2.0, 4.0)
Dense = Mapping[str, tuple[list[Tensor], list[Tensor]]]


def run(
    model: Any, tokenizer: Any, workload: str, selection: str, new_tokens: int = 12
) -> dict[str, Any]:
    """Per absolute tolerance the rows that agents keep, bytes, and KL against full recompute."""
    rounds = read_workload(workload, tokenizer)[:1]
    recompute(model, rounds, new_tokens)
    (one,) = rounds
    dense = _dense(make_engine(model, "master", selection), one.prompts)
    result = {}
    for tolerance in TOLERANCES:
        engine = make_engine(model, "master", selection)
        store = engine.collector.store
        store.put_round(dense, one.prompts, atol=tolerance)
        stats = store.stats()
        plan = engine.collector.plan(one.prompts)  # takes over all rows but the last of each prompt
        first = engine.prefill(plan)
        rest = engine.decode(plan, one.fed)
        plan.abort()
        logits = {agent: torch.cat([first[agent][None], rest[agent]]) for agent in one.prompts}
        kl, top1 = compare(one.logits, logits)
        result[str(tolerance)] = {
            "own_rows": stats.own_rows,
            "mib": stats.stored_bytes / 2**20,
            "kl": sum(kl.values()) / len(kl),
            "top1": sum(top1.values()) / len(top1),
        }
        print(tolerance, result[str(tolerance)], flush=True)
    return result


def _dense(engine: Any, prompts: Prompts) -> Dense:
    plan = engine.collector.plan(prompts)
    engine.prefill(plan)
    plan.commit()
    store = engine.collector.store
    geometry = store.geometry
    layers = list(range(geometry.num_layers))
    result = {}
    for agent in prompts:
        shape = (store.length(agent), geometry.num_kv_heads, geometry.head_dim)
        keys, values = ([torch.empty(shape) for _ in layers] for _ in range(2))
        store.restore(agent, layers, keys, values, torch.arange(shape[0]))
        result[agent] = (keys, values)
    return result


def text(result: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| atol | own rows | stored MiB | KL | top-1 |", "| --- |" + " --- |" * 4]
    for tolerance, one in result.items():
        lines.append(
            f"| {tolerance} | {one['own_rows']} | {one['mib']:.1f} | {one['kl']:.4f} "
            f"| {one['top1']:.3f} |"
        )
    return "\n".join(lines)
