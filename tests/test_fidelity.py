"""How near to full recompute a replay stays, against per-request CacheBlend with as many rows.

Rounds in which messages are handed round. Siblings' KL(full || tokendance) over the next
12 tokens, averaged over the rounds, is at most a ninth of per-request CacheBlend's on the same
agents, and fewer rows are computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from evals.replay import RoundResult, make_system, replay_round, summarize
from evals.workloads import (
    RecordedRound,
    find_workload,
    read_rounds,
    tokenize_round,
    workloads_directory,
)

pytestmark = pytest.mark.model

NEW_TOKENS = 12


def replay(model_and_tokenizer: tuple[Any, Any], recorded: list[RecordedRound]) -> str:
    """Replays the rounds, checks them and returns the figures."""
    model, tokenizer = model_and_tokenizer
    encode = partial(tokenizer.encode, add_special_tokens=False)
    systems = [make_system(name, model) for name in ("full", "pic", "tokendance")]
    results: list[RoundResult] = []
    session = None
    for one in recorded:
        if one.session != session:
            session = one.session
            for system in systems:
                system.reset()
        prompts = tokenize_round(one, encode)
        results.append(replay_round(systems, prompts, NEW_TOKENS, one.session, one.round))
    summary = summarize(results)
    pic, ours = summary["pic"], summary["tokendance"]
    assert pic["kl_siblings"] is not None
    assert ours["kl_siblings"] is not None
    assert pic["rows"] is not None
    assert ours["rows"] is not None
    ratio = ours["kl_siblings"] / pic["kl_siblings"]
    figures = (
        f"{recorded[0].workload}: siblings' KL {ours['kl_siblings']:.4f} against "
        f"{pic['kl_siblings']:.4f} (ratio {ratio:.4f}), rows {ours['rows']:.0f} against "
        f"{pic['rows']:.0f}"
    )
    print(figures)
    assert ratio <= 1 / 9, figures
    assert ours["rows"] < pic["rows"], figures
    return figures


def test_own_recording(smollm2: tuple[Any, Any]) -> None:
    replay(smollm2, read_rounds(find_workload("town_square"), rounds=(1, 4)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "parts"),
    [
        (
            "debate",
            [
                {"session": "gsm_qwen3-14b/00", "rounds": (1, 3), "chat": True},
                {"session": "gsm_qwen3-14b/01", "rounds": (1, 2), "chat": True},
            ],
        ),
        ("agentsociety", [{"rounds": (1, 2), "agents": 4}]),
        ("generative_agents_25", [{"rounds": (1, 2), "agents": 5, "max_private": 2}]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recorded_workloads(
    smollm2: tuple[Any, Any], workload: str, parts: list[dict[str, Any]]
) -> None:
    if workloads_directory() is None:
        pytest.skip("NOT RUN: the recorded workloads are absent (TOKENDANCE_WORKLOADS)")
    path = find_workload(workload)
    replay(smollm2, [one for part in parts for one in read_rounds(path, **part)])
