"""Decode that reads Masters once: members' rows stay in the store, and take none of vLLM's blocks.

Nothing inexact is reused; engines of other kinds are in test_shared_decode_engines.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import Serving, serving, token_ids
from small_rounds import NEVER, SHARED, a_round, alone, answers, join, nothing_left, until_decoding

import tokendance as td


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Serving]:
    with serving(SHARED, model=str(tiny), enable_prefix_caching=True) as engine:
        assert engine.rounds.shared is not None
        yield engine


@pytest.fixture
def free(engine: Serving) -> Iterator[int]:
    """Free blocks at the start; at the end as many are, and no page is used."""
    engine.scheduler.reset_prefix_cache()
    before = engine.free_blocks()
    yield before
    engine.scheduler.reset_prefix_cache()
    nothing_left(engine, before)
    assert not engine.rounds.shared._promised
    assert not engine.rounds.shared._stopped


def test_others_in_the_same_batch_are_answered_as_ever(engine: Serving, free: int) -> None:
    prompts, others = a_round(20, agents=3), a_round(21, agents=3)
    expected = alone(engine, "beside", prompts, new=40), alone(engine, "others", others, new=30)
    engine.scheduler.reset_prefix_cache()
    # Some come before the members, some while they decode: rows stand in any order.
    early, *late = others
    engine.add("early", token_ids(others[early]), None, 30)
    for _ in range(3):
        engine.step()
    join(engine, "beside", prompts, agents=3, new=40)
    until_decoding(engine, 3)
    for agent in late:
        engine.add(f"late {agent}", token_ids(others[agent]), None, 30)
    batches = set()
    while engine.scheduler.has_requests():
        engine.step()
        rows = engine.worker._members._rows
        if rows is not None:
            batches.add((len(rows), engine.worker._members.has_others))
    assert (3, True) in batches
    assert answers(engine, "beside", prompts) == expected[0]
    assert engine.done["early"] == expected[1][early]
    for agent in late:
        assert engine.done[f"late {agent}"] == expected[1][agent]


def test_members_of_several_rounds_decode_together(engine: Serving, free: int) -> None:
    one, two = a_round(22, agents=2), a_round(23, agents=3)
    two = {f"other {agent}": segments for agent, segments in two.items()}
    expected = alone(engine, "one", one, new=30), alone(engine, "two", two, new=20)
    engine.scheduler.reset_prefix_cache()
    join(engine, "one", one, agents=2, new=30)
    until_decoding(engine, 2)
    join(engine, "two", two, agents=3, new=20)
    until_decoding(engine, 5)
    engine.step()
    assert len(engine.worker._members._rows) == 5
    engine.run()
    assert answers(engine, "one", one) == expected[0]
    assert answers(engine, "two", two) == expected[1]


def test_an_agents_next_prompt_takes_over_what_it_said(engine: Serving, free: int) -> None:
    prompts = a_round(24, agents=2)
    found = engine.serve("first", prompts)
    longer = {
        agent: [*segments, td.private([*found[agent], 7, 8, 9])]
        for agent, segments in prompts.items()
    }
    engine.counts()
    assert engine.serve("second", longer) == alone(engine, "second", longer)
    # Twelve tokens were sampled, eleven of them fed.
    assert engine.counts()["rows_computed"] == 2 * (1 + 3)


def test_members_hold_no_blocks_and_leave_nothing_to_be_found(engine: Serving, free: int) -> None:
    prompts = a_round(25)
    pool = engine.scheduler.kv_cache_manager.block_pool
    join(engine, "empty", prompts, agents=4, new=40)
    until_decoding(engine, 4, tokens=30)
    assert engine.free_blocks() == free
    assert not len(pool.cached_block_hash_to_block)
    for request in engine.scheduler.running:
        (blocks,) = engine.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        assert set(blocks) == {0}
    engine.run()
    found = answers(engine, "empty", prompts)
    assert found == alone(engine, "empty", prompts, new=40)
    assert {engine.cached[f"empty alone {agent}"] for agent in prompts} == {0}


# Ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 6, 8, 12])
def test_an_abort_in_any_phase_leaves_the_others_right(
    engine: Serving, free: int, steps: int
) -> None:
    prompts = a_round(27)
    expected = alone(engine, f"abort {steps}", prompts)
    engine.scheduler.reset_prefix_cache()
    name = f"aborted {steps}"
    join(engine, name, prompts, agents=4, patience=NEVER)
    for _ in range(steps):
        engine.step()
    engine.engine.abort_request([f"{name} agent 0", f"{name} agent 2"], internal=False)
    engine.run()
    for agent in ("agent 1", "agent 3"):
        assert engine.done[f"{name} {agent}"] == expected[agent]


def test_random_rounds_with_aborts_leak_nothing(
    engine: Serving, free: int, pytestconfig: pytest.Config
) -> None:
    random = np.random.default_rng(1)
    rounds, aborted = pytestconfig.getoption("--rounds"), 0
    whole = [a_round(100 + which, agents=5) for which in range(5)]
    expected = [alone(engine, f"{which}", prompts, new=20) for which, prompts in enumerate(whole)]
    engine.scheduler.reset_prefix_cache()
    asked: dict[str, list[int]] = {}
    for number in range(rounds):
        prompts = a_round(100 + number % 5, agents=int(random.integers(1, 6)))
        name, new = f"random {number}", int(random.integers(1, 20))
        patience = float(random.choice([0.0, 0.01]))
        join(engine, name, prompts, new=new, patience=patience)
        asked |= {f"{name} {agent}": expected[number % 5][agent][:new] for agent in prompts}
        for _ in range(int(random.integers(0, 12))):
            engine.step()
        for agent in prompts:
            if random.random() < 0.3:
                engine.engine.abort_request([f"{name} {agent}"], internal=False)
                aborted += 1
    engine.run()
    assert aborted > rounds / 2
    finished = {name: engine.done[name] for name in asked if name in engine.done}
    assert finished == {name: asked[name] for name in finished}
    assert len(finished) > rounds


def test_when_weights_change_members_are_planned_again_and_say_on(
    engine: Serving, free: int
) -> None:
    prompts = a_round(28)
    expected = alone(engine, "changed", prompts, new=30)
    for steps in (1, 4, 8, 20):
        for running in (False, True):
            name = f"changed {steps} {running}"
            join(engine, name, prompts, agents=4, new=30, patience=NEVER)
            for _ in range(steps):
                engine.step()
            engine.engine.abort_request([f"{name} agent 3"], internal=False)
            engine.scheduler.reset_prefix_cache(
                reset_running_requests=running, reset_connector=True
            )
            assert engine.rounds.host.books.used_pages == 0
            engine.run()
            for agent in list(prompts)[:3]:
                assert engine.done[f"{name} {agent}"] == expected[agent]
