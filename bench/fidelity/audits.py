"""What an audit of a round with the default reuse reports, and what it costs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from bench.fidelity.replays import make_engine, read_workload


def run(model: Any, tokenizer: Any, workload: str, new_tokens: int = 12) -> dict[str, Any]:
    """The first round of a workload, greedily continued, all agents audited."""
    (one, *_) = read_workload(workload, tokenizer)
    engine = make_engine(model, "master", "leading:4:6:24")
    plan = engine.collector.plan(one.prompts)
    began = time.perf_counter()
    rows = {agent: [row] for agent, row in engine.prefill(plan).items()}
    prefill_s = time.perf_counter() - began
    for _ in range(new_tokens - 1):
        fed = {agent: [int(found[-1].argmax())] for agent, found in rows.items()}
        for agent, found in engine.decode(plan, fed).items():
            rows[agent].append(found[0])
    began = time.perf_counter()
    report = engine.audit(plan, {agent: torch.stack(found) for agent, found in rows.items()})
    audit_s = time.perf_counter() - began
    plan.abort()
    reused = [s for found in report.agents.values() for s in found.segments if s.reused]
    layers = {
        name: np.mean([getattr(one, name) for one in reused], axis=0).tolist()
        for name in ("keys", "values")
    }
    return {
        "rows": plan.rows_computed,
        "prompt_rows": plan.rows,
        "audited_rows": report.rows,
        "seconds": {"prefill": prefill_s, "audit": audit_s},
        "agents": {
            name: {
                "kl": found.kl,
                "top1": found.top1,
                "deviation": max([s.deviation for s in found.segments if s.reused], default=0.0),
            }
            for name, found in report.agents.items()
        },
        "deviations": sorted(one.deviation for one in reused),
        "layers": layers,
    }


def text(result: dict[str, Any]) -> str:
    """Markdown: by agent, then by layer, then the costs."""
    lines = ["| agent | KL | top-1 | worst segment's deviation |", "| --- |" + " --- |" * 3]
    for name, one in result["agents"].items():
        lines.append(f"| {name} | {one['kl']:.4f} | {one['top1']:.3f} | {one['deviation']:.3f} |")
    for name, values in result["layers"].items():
        shown = [f"{index}: {values[index]:.3f}" for index in range(0, len(values), 4)]
        lines += ["", f"{name} by layer, mean of the reused segments: " + ", ".join(shown)]
    deviations = result["deviations"]
    lines += [
        "",
        f"deviation of the reused segments: median {np.median(deviations):.3f}, greatest "
        f"{max(deviations):.3f}",
        "",
        f"{result['rows']:.0f} of {result['prompt_rows']} rows computed in "
        f"{result['seconds']['prefill']:.1f} s, {result['audited_rows']} audited in "
        f"{result['seconds']['audit']:.1f} s",
    ]
    return "\n".join(lines)
