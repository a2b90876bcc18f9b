"""Leakage: does a sibling become likelier to repeat what only the Master agent was told?

Each agent of the first recorded round gets a secret of its own at the end of its private first
segment. Then the siblings' log-probability of the Master agent's secret, asked for by its first
words, is compared with full recompute's, where nothing can have leaked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.fidelity.replays import make_engine, read_workload
from tokendance.segments import Segment, private

CASES = ("master/everything", "master/nothing", "master/leading:4:96:24", "alone/leading:4:96:24")
SECRETS = ("violet heron", "copper lantern", "frozen orchard", "silver anvil", "salt chapel")
_LEAD = "\nThe password is"


def run(model: Any, tokenizer: Any, workload: str) -> dict[str, dict[str, float]]:
    """Per case the mean log-probability in nats of the first agent's secret and of a secret that
    nobody has, over all its siblings; and of the first agent itself."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    prompts = {agent: list(p) for agent, p in read_workload(workload, tokenizer)[0].prompts.items()}
    names = list(prompts)
    told, control = (encode(f" {secret}.") for secret in SECRETS[:2])
    first = prompts[names[0]]
    place = next(index for index, one in enumerate(first) if one.is_shared)
    lead = encode(_LEAD)
    first.insert(place, private([*lead, *told]))
    result = {}
    for case in CASES:
        source, _, selection = case.partition("/")
        engine = make_engine(model, source, selection)
        # The Master agent comes first among those that cover as much.
        plan = engine.collector.plan(prompts)
        makers = plan.master_agents
        engine.prefill(plan)
        found = {
            name: _log_probability(engine, plan, prompts, lead, ids)
            for name, ids in (("secret", told), ("control", control))
        }
        plan.abort()
        siblings = [name for name in names[1:] if names[0] in makers or not makers]
        result[case] = {
            "secret": _mean(found["secret"], siblings),
            "control": _mean(found["control"], siblings),
            "first agent": found["secret"][names[0]],
            "first agent makes Masters": float(names[0] in makers),
        }
        print(case, result[case], flush=True)
    return result


def _log_probability(
    engine: Any,
    plan: Any,
    prompts: Mapping[str, list[Segment]],
    lead: list[int],
    ids: list[int],
) -> dict[str, float]:
    logits = engine.decode(plan, {name: [*lead, *ids] for name in prompts})
    result = {}
    for name, rows in logits.items():
        scores: Tensor = rows.double().log_softmax(-1)[len(lead) - 1 : -1]
        result[name] = float(scores[torch.arange(len(ids)), torch.tensor(ids)].sum())
        plan.truncate(name, plan.length(name) - len(lead) - len(ids))
    return result


def _mean(values: Mapping[str, float], names: list[str]) -> float:
    return sum(values[name] for name in names) / len(names) if names else float("nan")


def text(result: dict[str, dict[str, float]]) -> str:
    """Markdown; the gain is the secret's over the control's, against full recompute."""
    lines = ["| reuse | secret | control | gain over full | told agent |", "| --- |" + " --- |" * 4]
    full = result["master/everything"]
    for case, one in result.items():
        gain = (one["secret"] - full["secret"]) - (one["control"] - full["control"])
        lines.append(
            f"| {case} | {one['secret']:.3f} | {one['control']:.3f} | {gain:+.3f} "
            f"| {one['first agent']:.3f} |"
        )
    return "\n".join(lines)
