"""Quantized pools: what e4m3 and int8 lose, and what they save.

The first recorded round of a workload, by full prefill (what is lost is the pool's alone) and by
reuse, on pools of the model's dtype and of eight bits. Scales come from one prompt of
another workload, but for those of 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evals.fidelity.replays import make_engine, measure_round, read_workload, recompute
from tokendance.device.quantization import Quantization
from tokendance.integrations.transformers import geometry_of, quantization_of

# Per workload the one from whose prompt scales come.
SAMPLED = {
    "town_square": "debate",
    "debate": "town_square",
    "agentsociety": "debate",
    "generative_agents_3": "town_square",
}


def run(
    model: Any,
    tokenizer: Any,
    workloads: Sequence[str],
    selection: str,
    agents: int | None = None,
    new_tokens: int = 12,
) -> dict[str, Any]:
    """Per workload, selection and pool KL and top-1 against full recompute, and stored bytes, of
    the first ``agents`` of the round. The selections are this one and everything."""
    result: dict[str, Any] = {}
    for workload in workloads:
        pools = _pools(model, tokenizer, SAMPLED[workload])
        (one,) = rounds = read_workload(workload, tokenizer)[:1]
        one.prompts = dict(list(one.prompts.items())[:agents])
        recompute(model, rounds, new_tokens)
        for chosen in ("everything", selection):
            for name, quantization in pools.items():
                engine = make_engine(model, "master", chosen, quantization)
                figures = measure_round(engine, one)
                siblings = [
                    kl for agent, kl in figures.kl.items() if agent not in figures.master_agents
                ]
                stats = engine.collector.store.stats()
                found = {
                    "kl": sum(figures.kl.values()) / len(figures.kl),
                    "worst_kl": max(figures.kl.values()),
                    "siblings_kl": sum(siblings) / len(siblings),
                    "top1": sum(figures.top1.values()) / len(figures.top1),
                    "stored_mib": stats.stored_bytes / 2**20,
                    "dense_mib": stats.dense_bytes / 2**20,
                }
                result.setdefault(workload, {}).setdefault(chosen, {})[name] = found
                print(workload, chosen, name, found, flush=True)
    return result


def _pools(model: Any, tokenizer: Any, sampled: str) -> dict[str, Quantization | None]:
    prompt = next(iter(read_workload(sampled, tokenizer)[0].prompts.values()))
    ids = np.concatenate([segment.token_ids for segment in prompt]).tolist()
    return {
        str(model.dtype).removeprefix("torch."): None,
        "e4m3, scales of 1": Quantization.unit(geometry_of(model)),
        "e4m3, a scale per head": quantization_of(model, [ids]),
        "int8, a scale per head": quantization_of(model, [ids], torch.int8),
    }


def text(result: Mapping[str, Any]) -> str:
    """Markdown: one table per workload."""
    lines = []
    for workload, selections in result.items():
        lines += [
            f"**{workload}**",
            "",
            "| selection | pool | KL | worst agent's | siblings' KL | top-1 | stored MiB "
            "| dense MiB |",
            "| --- |" + " --- |" * 7,
        ]
        lines += [
            f"| {selection} | {name} | {one['kl']:.5f} | {one['worst_kl']:.5f} "
            f"| {one['siblings_kl']:.5f} | {one['top1']:.3f} | {one['stored_mib']:.1f} "
            f"| {one['dense_mib']:.1f} |"
            for selection, pools in selections.items()
            for name, one in pools.items()
        ]
        lines.append("")
    return "\n".join(lines)
