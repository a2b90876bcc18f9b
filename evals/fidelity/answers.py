"""Right answers: does the likeliest answer of a debate change under reuse?

Prompts of a recorded debate are continued with ``The answer is \\boxed{`` and then greedily up to
the closing brace, by every system alike, and by full recompute of the prompts without what the
agents had said. That floor tells how much there is to lose: PGR, the performance gap recovered, is
(score - floor) / (full recompute's score - floor).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from evals.baselines import System
from evals.fidelity.samples import ratio_of_means, ratio_text
from evals.replay import make_system
from evals.workloads import RecordedRound, find_workload, read_rounds, tokenize_round
from tokendance.host.segments import Segment
from tokendance.host.selection import parse_selection

FLOOR = "no context"
SYSTEMS = ("full", "pic", "tokendance")
_LEAD = "The answer is \\boxed{"
_LONGEST = 8  # tokens of an answer


def run(
    model: Any,
    tokenizer: Any,
    sessions: Sequence[str],
    selection: str,
    known: Sequence[dict[str, Any]] = (),
    save: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Per session each system's answer by agent, in the first round that has messages.

    ``recorded`` is what most of the recorded agents answered in the round before. Sessions that
    are ``known`` already are not run again; after each of the others all are handed to ``save``.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    systems = {name: make_system(name, model, parse_selection(selection)) for name in SYSTEMS}
    result = list(known)
    there = {one["session"] for one in known}
    for session in sessions:
        if session in there:
            continue
        (one,) = read_rounds(find_workload("debate"), session=session, rounds=(1, 2), chat=True)
        prompts = tokenize_round(one, encode)
        alone = tokenize_round(without_messages(one), encode)
        # In the order of the round, which decides where as many gave one answer as another.
        texts = dict.fromkeys(b.text for a in one.agents for b in a.blocks if b.is_shared)
        boxed = [box[-1] for text in texts if (box := re.findall(r"\\boxed\{([^}]*)\}", text))]
        recorded = Counter(boxed).most_common(1)[0][0] if boxed else ""
        found: dict[str, Any] = {"session": session, "recorded": recorded}
        found[FLOOR] = _answers(systems["full"], alone, tokenizer)
        for name, system in systems.items():
            found[name] = _answers(system, prompts, tokenizer)
        result.append(found)
        save(result)
        print(found, flush=True)
    return result


def without_messages(one: RecordedRound) -> RecordedRound:
    """The round as if nobody had said anything."""
    agents = tuple(
        replace(agent, blocks=tuple(block for block in agent.blocks if not block.is_shared))
        for agent in one.agents
    )
    return replace(one, agents=agents)


def _answers(
    system: System, prompts: Mapping[str, Sequence[Segment]], tokenizer: Any
) -> dict[str, str]:
    """By agent, up to the closing brace."""
    system.reset()
    system.prefill_round(prompts)
    fed = dict.fromkeys(prompts, tokenizer.encode(_LEAD, add_special_tokens=False))
    ids: dict[str, list[int]] = {agent: [] for agent in prompts}
    for _ in range(_LONGEST):
        logits = system.decode(fed)
        fed = {agent: [int(rows[-1].argmax())] for agent, rows in logits.items()}
        for agent, token in fed.items():
            ids[agent] += token
    return {agent: tokenizer.decode(own).partition("}")[0] for agent, own in ids.items()}


def text(result: Sequence[dict[str, Any]]) -> str:
    """Markdown: over all agents and sessions. Intervals are those of `ratio_of_means`: a draw takes
    sessions, and of each of them agents, whose answers under all systems stay together."""
    lines = [
        "| system | answers | as full recompute (95 %) | as recorded (95 %) | PGR (95 %) |",
        "| --- |" + " --- |" * 4,
    ]
    for name in (*SYSTEMS, FLOOR):
        same, right, gains = [], [], []
        for one in result:
            same.append(_equal(one[name], one["full"]))
            right.append(_as_recorded(one, name))
            floor, full = _as_recorded(one, FLOOR), _as_recorded(one, "full")
            gains.append(
                (
                    [own - low for own, low in zip(right[-1], floor, strict=True)],
                    [top - low for top, low in zip(full, floor, strict=True)],
                )
            )
        answers = sum(map(len, same))
        lines.append(
            f"| {name} | {answers} | {_share(same)} | {_share(right)} | {ratio_text(gains)} |"
        )
    return "\n".join(lines)


def _equal(mine: Mapping[str, str], other: Mapping[str, str]) -> list[float]:
    return [float(mine[agent].strip() == other[agent].strip()) for agent in other]


def _as_recorded(one: Mapping[str, Any], name: str) -> list[float]:
    return _equal(one[name], dict.fromkeys(one["full"], one["recorded"]))


def _share(values: Sequence[Sequence[float]]) -> str:
    found = ratio_of_means([(one, [1.0] * len(one)) for one in values])
    return f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
