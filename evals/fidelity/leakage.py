"""Leakage: does a sibling become likelier to repeat what only the Master agent was told?

One agent of a recorded round gets a secret of its own at the end of its private first segment, and
makes the Masters. Then the siblings' log-probability of the secret, asked for by its first words,
is compared with full recompute's, where nothing can have leaked, and with that of a secret that
nobody was told. Secret, agent and round are changed, and counted one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.fidelity.replays import make_engine, read_workload
from tokendance.host.segments import Segment, private

FULL = "master/everything"
SECRETS = ("violet heron", "copper lantern", "frozen orchard", "silver anvil", "salt chapel")
_LEAD = "\nThe password is"

Sample = dict[str, float]
"""Log-probabilities in nats: siblings' of the ``secret`` and of the ``control``, means over them,
and of the secret by the ``told`` agent; ``makes Masters``: whether that one did."""


def run(
    model: Any, tokenizer: Any, workload: str, secrets: int, rounds: int, selection: str
) -> dict[str, list[Sample]]:
    """Per case one sample of every round and secret; the n-th secret is the n-th agent's.

    The cases are `FULL`, nothing repaired, and ``selection`` with two sources.
    """
    if not 1 <= secrets < len(SECRETS):
        raise ValueError(f"secrets: expected 1..{len(SECRETS) - 1}, got {secrets}")
    encode = partial(tokenizer.encode, add_special_tokens=False)
    lead = encode(_LEAD)
    cases = (FULL, "master/nothing", f"master/{selection}", f"alone/{selection}")
    result: dict[str, list[Sample]] = {case: [] for case in cases}
    for one in read_workload(workload, tokenizer)[:rounds]:
        for number in range(secrets):
            told, control = (encode(f" {secret}.") for secret in SECRETS[number : number + 2])
            # The Master agent comes first among those that cover as much.
            names = [*list(one.prompts)[number:], *list(one.prompts)[:number]]
            prompts = {name: list(one.prompts[name]) for name in names}
            first = prompts[names[0]]
            place = next(index for index, segment in enumerate(first) if segment.is_shared)
            first.insert(place, private([*lead, *told]))
            for case in cases:
                result[case].append(_sample(model, case, prompts, lead, told, control))
                print(f"round {one.number}, {names[0]}, {case}: {result[case][-1]}", flush=True)
    return result


def _sample(
    model: Any,
    case: str,
    prompts: Mapping[str, list[Segment]],
    lead: list[int],
    told: list[int],
    control: list[int],
) -> Sample:
    source, _, selection = case.partition("/")
    engine = make_engine(model, source, selection)
    plan = engine.collector.plan(prompts)
    agent, *siblings = prompts
    makes = agent in plan.master_agents
    engine.prefill(plan)
    found, unknown = (_log_probability(engine, plan, prompts, lead, ids) for ids in (told, control))
    plan.abort()
    return {
        "secret": float(np.mean([found[name] for name in siblings])),
        "control": float(np.mean([unknown[name] for name in siblings])),
        "told": found[agent],
        "makes Masters": float(makes),
    }


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


def gains(samples: Sequence[Sample], full: Sequence[Sample]) -> list[float]:
    """By sample how much likelier the secret became than full recompute has it, beyond what the
    control did."""
    return [
        (one["secret"] - other["secret"]) - (one["control"] - other["control"])
        for one, other in zip(samples, full, strict=True)
    ]


def text(result: Mapping[str, Sequence[Sample]]) -> str:
    """Markdown: means over the samples, and the gain with its least and its greatest."""
    lines = [
        "| reuse | samples | secret | control | gain over full | least | greatest | told agent |",
        "| --- |" + " --- |" * 7,
    ]
    for case, samples in result.items():
        secret, control, told = (
            np.mean([one[key] for one in samples]) for key in ("secret", "control", "told")
        )
        gain = gains(samples, result[FULL])
        lines.append(
            f"| {case} | {len(samples)} | {secret:.3f} | {control:.3f} | {np.mean(gain):+.3f} "
            f"| {min(gain):+.3f} | {max(gain):+.3f} | {told:.3f} |"
        )
    return "\n".join(lines)
