"""Drift: live rounds whose prompts hold history and messages that reuse has already touched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.society import PERSONAS, TOPICS, Meeting, Options, Society
from tokendance.host.gate import AgentAudit, Gate, ReuseWarning
from tokendance.host.selection import parse_selection


@dataclass(frozen=True)
class Case:
    """When reuse is interrupted. Rounds and agents that are refreshed compute everything.

    Attributes:
        every: all agents are refreshed in every so manieth round; 0 = never.
        segments: beyond this deviation, in a sample of the rows, a segment falls back.
        agents: beyond this deviation of its reused rows, in a sample of them, an agent is refreshed
            in the round after.
    """

    every: int = 0
    segments: float | None = None
    agents: float | None = None


CASES = {
    "producer": Case(),
    "refreshed every 4 rounds": Case(every=4),
    "segments fall back beyond 0.4": Case(segments=0.4),
    "agents refreshed beyond 0.4": Case(agents=0.4),
}
Figures = dict[str, float]


def run(
    model: Any,
    tokenizer: Any,
    agents: int,
    rounds: int,
    seeds: int,
    new_tokens: int,
    selection: str,
) -> dict[str, list[list[Figures]]]:
    """Per case, seed and round the KL of all agents against full recompute of the same prompts."""
    return {
        name: [
            _run(model, tokenizer, case, agents, rounds, seed, new_tokens, selection)
            for seed in range(seeds)
        ]
        for name, case in CASES.items()
    }


def _run(
    model: Any,
    tokenizer: Any,
    case: Case,
    agents: int,
    rounds: int,
    seed: int,
    new_tokens: int,
    selection: str,
) -> list[Figures]:
    meeting = Meeting(PERSONAS[:agents], TOPICS["bridge"], seed, history=3)
    names = [person.name for person in meeting.people]
    gated = case.segments is not None or case.agents is not None
    gate = Gate(deviation=case.segments, action="fall back") if gated else None
    repairs = parse_selection(selection)
    options = Options(new_tokens, seed=seed, source="producer", selection=repairs, gate=gate)
    society = Society(model, tokenizer, meeting, options, audit=True)
    figures: list[Figures] = []
    refreshed: list[str] = []
    for number in range(rounds):
        if case.every and number % case.every == case.every - 1:
            refreshed = names
        society.collector.opt_out(refreshed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReuseWarning)
            report = society.hold_round()
        society.collector.opt_in(refreshed)
        assert report.audit is not None
        found = report.gate.agents if report.gate else {}
        deviation = {name: deviation_of(one) for name, one in found.items()}
        figures.append(
            {
                "kl": report.audit.kl,
                "top1": report.audit.top1,
                "rows": report.prompt_tokens,
                "computed": report.rows,
                "audited": report.gate.rows if report.gate else 0,
                "refreshed": len(refreshed),
                "segments": society.collector.stats().segments_opted_out,
                **{f"deviation of {name}": one for name, one in deviation.items()},
            }
        )
        print(f"{case}, seed {seed}, round {number + 1}: {figures[-1]}", flush=True)
        limit = np.inf if case.agents is None else case.agents
        refreshed = [name for name, one in deviation.items() if one > limit]
    return figures


def deviation_of(agent: AgentAudit) -> float:
    """Of an agent's reused segments, the mean weighted by the rows that were compared."""
    found = [one for one in agent.segments if one.reused and one.compared]
    rows = sum(one.compared for one in found)
    return sum(one.deviation * one.compared for one in found) / rows if rows else 0.0


def text(result: dict[str, list[list[Figures]]]) -> str:
    """Markdown: KL by round, mean over the seeds; the mean of both halves; every seed's own mean;
    rows computed and audited as shares of the prompts' rows."""
    rounds = len(next(iter(result.values()))[0])
    numbers: Sequence[int] = range(1, rounds + 1)
    head = (
        "| case | "
        + " | ".join(map(str, numbers))
        + " | first half | second half | by seed | computed | audited |"
    )
    lines = [head, "| --- |" + " --- |" * (rounds + 5)]
    for name, seeds in result.items():
        kl = np.array([[one["kl"] for one in figures] for figures in seeds])
        means = [*kl.mean(0), kl[:, : rounds // 2].mean(), kl[:, rounds // 2 :].mean()]
        values = " | ".join(f"{value:.4f}" for value in means)
        by_seed = ", ".join(f"{value:.4f}" for value in kl.mean(1))
        every = [one for figures in seeds for one in figures]
        rows = sum(one["rows"] for one in every)
        shares = [sum(one[key] for one in every) / rows for key in ("computed", "audited")]
        lines.append(f"| {name} | {values} | {by_seed} | {shares[0]:.1%} | {shares[1]:.1%} |")
    return "\n".join(lines)
