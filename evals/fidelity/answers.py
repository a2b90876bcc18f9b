"""Right answers: does the likeliest answer of a debate change under reuse?

Prompts of a recorded debate are continued with ``The answer is \\boxed{`` and then greedily up to
the closing brace, by every system alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from evals.replay import make_system
from evals.workloads import find_workload, read_rounds, tokenize_round
from tokendance.host.selection import parse_selection

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
        texts = {b.text for agent in one.agents for b in agent.blocks if b.is_shared}
        boxed = [found[-1] for text in texts if (found := re.findall(r"\\boxed\{([^}]*)\}", text))]
        recorded = Counter(boxed).most_common(1)[0][0] if boxed else ""
        found: dict[str, Any] = {"session": session, "recorded": recorded}
        for name, system in systems.items():
            system.reset()
            system.prefill_round(prompts)
            fed = {agent: encode(_LEAD) for agent in prompts}
            ids: dict[str, list[int]] = {agent: [] for agent in prompts}
            for _ in range(_LONGEST):
                logits = system.decode(fed)
                fed = {agent: [int(rows[-1].argmax())] for agent, rows in logits.items()}
                for agent, token in fed.items():
                    ids[agent] += token
            answers = {agent: tokenizer.decode(own) for agent, own in ids.items()}
            found[name] = {agent: text.partition("}")[0] for agent, text in answers.items()}
        result.append(found)
        save(result)
        print(found, flush=True)
    return result


def text(result: Sequence[dict[str, Any]]) -> str:
    """Markdown: over all agents and sessions."""
    lines = ["| system | answers | as full recompute | as recorded |", "| --- |" + " --- |" * 3]
    for name in SYSTEMS:
        pairs = [
            (one[name][a], one["full"][a], one["recorded"]) for one in result for a in one[name]
        ]
        same = sum(mine == full for mine, full, _ in pairs) / len(pairs)
        right = sum(mine.strip() == recorded.strip() for mine, _, recorded in pairs) / len(pairs)
        lines.append(f"| {name} | {len(pairs)} | {same:.1%} | {right:.1%} |")
    return "\n".join(lines)
