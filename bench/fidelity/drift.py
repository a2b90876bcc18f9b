"""Drift: live rounds whose prompts hold history and messages that reuse has already touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokendance.society import PERSONAS, TOPICS, Meeting, Options, Society

CASES = {
    "producer": ("producer", 0),
    "producer, refreshed every 4 rounds": ("producer", 4),
}
"""Source, and every how many rounds everything is computed; 0 = never."""


def run(model: Any, tokenizer: Any, agents: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Per case and round the KL of all agents against full recompute of the same prompts.

    In a refreshed round all agents opt out of reuse: nothing inexact is taken over, and what they
    compute is what later rounds find.
    """
    result = {}
    for name, (source, refresh) in CASES.items():
        meeting = Meeting(PERSONAS[:agents], TOPICS["bridge"], history=3)
        society = Society(model, tokenizer, meeting, Options(source=source), audit=True)
        figures = []
        for number in range(rounds):
            names = [person.name for person in meeting.people]
            if refresh and number % refresh == refresh - 1:
                society.collector.opt_out(names)
            report = society.hold_round()
            society.collector.opt_in(names)
            assert report.audit is not None
            figures.append(
                {
                    "kl": report.audit.kl,
                    "top1": report.audit.top1,
                    "computed": report.rows / report.prompt_tokens,
                }
            )
            print(f"{name}, round {number + 1}: {figures[-1]}", flush=True)
        result[name] = figures
    return result


def text(result: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: KL by round, then the mean of both halves and the share of rows computed."""
    rounds = len(next(iter(result.values())))
    numbers: Sequence[int] = range(1, rounds + 1)
    head = "| case | " + " | ".join(map(str, numbers)) + " | first half | second half | computed |"
    lines = [head, "| --- |" + " --- |" * (rounds + 3)]
    for name, figures in result.items():
        kl = [one["kl"] for one in figures]
        halves = [kl[: rounds // 2], kl[rounds // 2 :]]
        means = [sum(half) / len(half) for half in halves]
        computed = sum(one["computed"] for one in figures) / rounds
        values = " | ".join(f"{value:.4f}" for value in (*kl, *means))
        lines.append(f"| {name} | {values} | {computed:.1%} |")
    return "\n".join(lines)
