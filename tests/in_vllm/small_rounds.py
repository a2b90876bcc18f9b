"""Drawn rounds, and how they are served and what must be left afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
from serving import Serving, token_ids, told

import tokendance as td

NEVER = 1e6  # seconds of patience
EXACT = {"selection": "everything", "block_size": 8, "capacity": "8MiB", "max_rows": 128}
SHARED = {**EXACT, "shared_decode": True}


def drawn(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 250, count)]


def a_round(seed: int, agents: int = 4, blocks: int = 3, size: int = 40) -> Any:
    """Prompts of agents that see the same blocks in other orders behind histories of their own."""
    shared = [td.shared(drawn(1000 * seed + i, size)) for i in range(blocks)]
    prompts = {}
    for i in range(agents):
        order = [*shared[i % blocks :], *shared[: i % blocks]]
        history = td.private(drawn(7000 + 10 * seed + i, 20 + 7 * i))
        prompts[f"agent {i}"] = [history, *order, td.private(drawn(9000 + 10 * seed + i, 9))]
    return prompts


def alone(engine: Serving, name: str, prompts: Any, new: int = 12) -> dict[str, list[int]]:
    """What vLLM answers without a round."""
    return engine.serve(f"{name} alone", prompts, joining=False, new=new)


def join(engine: Serving, name: str, prompts: Any, new: int = 12, **more: Any) -> None:
    for agent, segments in prompts.items():
        parameters = told(name, agent, segments, **more)
        engine.add(f"{name} {agent}", token_ids(segments), parameters, new)


def answers(engine: Serving, name: str, prompts: Any) -> dict[str, list[int]]:
    return {agent: engine.done[f"{name} {agent}"] for agent in prompts}


def until_decoding(engine: Serving, count: int, tokens: int = 2) -> None:
    """Steps until so many members have said so much."""
    for _ in range(200):
        members = engine.rounds.members.values()
        if sum(one.request.num_output_tokens >= tokens for one in members) >= count:
            return
        engine.step()
    raise AssertionError("members that do not decode")


def nothing_left(engine: Serving, free: int) -> None:
    """No request, no block and, once what is stored is forgotten, no page."""
    assert not engine.rounds.members
    assert not engine.rounds._rounds
    assert not engine.rounds._orders.orders
    assert engine.free_blocks() == free
    host = engine.rounds.host
    assert not host.roster.agents
    assert not host.roster.states
    assert engine.rounds.reset()
    assert host.books.used_pages == 0
