"""What audits of a round with the default reuse report, and what they cost.

Whole prompts are recomputed, and then samples of their rows.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from evals.fidelity.replays import make_engine, read_workload
from tokendance.host.gate import AuditReport

SAMPLES = (0.05, 0.1, 0.25, 0.5)
"""Shares of the rows that the sampling audits recompute."""


def run(
    model: Any, tokenizer: Any, workload: str, selection: str, new_tokens: int = 12
) -> dict[str, Any]:
    """The first round of a workload, greedily continued, all agents audited."""
    (one, *_) = read_workload(workload, tokenizer)
    engine = make_engine(model, "master", selection)
    plan = engine.collector.plan(one.prompts)
    began = time.perf_counter()
    rows = {agent: [row] for agent, row in engine.prefill(plan).items()}
    prefill_s = time.perf_counter() - began
    for _ in range(new_tokens - 1):
        fed = {agent: [int(found[-1].argmax())] for agent, found in rows.items()}
        for agent, found in engine.decode(plan, fed).items():
            rows[agent].append(found[0])
    logits = {agent: torch.stack(found) for agent, found in rows.items()}
    began = time.perf_counter()
    report = engine.audit(plan, logits)
    audit_s = time.perf_counter() - began
    samples = {}
    for share in SAMPLES:
        began = time.perf_counter()
        sample = engine.audit(plan, logits, rows=share)
        samples[str(share)] = {
            "rows": sample.rows,
            "seconds": time.perf_counter() - began,
            "kl": {name: found.kl for name, found in sample.agents.items()},
            "deviation": float(np.median(_deviations(sample))),
            "greatest": max(_deviations(sample)),
            "segments": len(_deviations(sample)),
        }
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
        "samples": samples,
        "agents": {
            name: {
                "kl": found.kl,
                "top1": found.top1,
                "deviation": max([s.deviation for s in found.segments if s.reused], default=0.0),
            }
            for name, found in report.agents.items()
        },
        "deviations": _deviations(report),
        "layers": layers,
    }


def _deviations(report: AuditReport) -> list[float]:
    """Of the reused segments that have compared rows, ascending."""
    found = [one for agent in report.agents.values() for one in agent.segments]
    return sorted(one.deviation for one in found if one.reused and one.compared)


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
        "",
        "| rows sampled | recomputed | s | mean KL | median deviation | greatest | segments |",
        "| --- |" + " --- |" * 6,
    ]
    whole = {
        "rows": result["audited_rows"],
        "seconds": result["seconds"]["audit"],
        "kl": {name: one["kl"] for name, one in result["agents"].items()},
        "deviation": float(np.median(deviations)),
        "greatest": max(deviations),
        "segments": len(deviations),
    }
    for share, one in {**result["samples"], "all": whole}.items():
        kl = np.mean([*one["kl"].values()])
        lines.append(
            f"| {share} | {one['rows']} | {one['seconds']:.1f} | {kl:.4f} "
            f"| {one['deviation']:.3f} | {one['greatest']:.3f} | {one['segments']} |"
        )
    return "\n".join(lines)
