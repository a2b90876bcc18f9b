"""Lives of requests: members that come late, end early, wait, are preempted, or are left to vLLM.

Nothing inexact is reused unless a test says so: what a member is answered is then what the same
prompt is answered without a round, by the same engine. All of it also where vLLM schedules a step
while the one before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Serving, asynchronously, serving, token_ids, told
from small_rounds import EXACT, NEVER, a_round, alone, answers, drawn, join, nothing_left

import tokendance as td


@pytest.fixture(
    scope="module", params=["in turns", pytest.param("asynchronous", marks=pytest.mark.slow)]
)
def engine(tiny: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    is_asynchronous = request.param == "asynchronous"
    with (
        asynchronously(is_asynchronous),
        serving(EXACT, model=str(tiny), enable_prefix_caching=True) as engine,
    ):
        assert (engine.engine.engine_core.engine_core.batch_queue_size > 1) == is_asynchronous
        yield engine


@pytest.fixture
def free(engine: Serving) -> Iterator[int]:
    """Free blocks at the start; at the end as many are, and no page is used."""
    engine.scheduler.reset_prefix_cache()
    before = engine.free_blocks()
    yield before
    nothing_left(engine, before)


def test_nothing_that_was_reused_is_in_vllms_prefix_cache(engine: Serving, free: int) -> None:
    prompts = a_round(1)
    found = engine.serve("salted", prompts)
    expected = alone(engine, "salted", prompts)
    assert found == expected
    assert {engine.cached[f"salted alone {agent}"] for agent in prompts} == {0}
    # Requests without a round find each other's, and members nothing of theirs.
    assert alone(engine, "salted again", prompts) == expected
    block = engine.scheduler.block_size
    for agent, segments in prompts.items():
        length = len(token_ids(segments))
        assert engine.cached[f"salted again alone {agent}"] == (length - 1) // block * block


def test_a_late_member_joins_and_reuses(engine: Serving, free: int) -> None:
    prompts = a_round(2, agents=5)
    names = list(prompts)
    expected = alone(engine, "late", prompts)
    for steps in (0, 1, 3, 8):
        name = f"late {steps}"
        first = {agent: prompts[agent] for agent in names[:3]}
        join(engine, name, first, patience=0.0)
        for _ in range(steps):
            engine.step()
        join(engine, name, {agent: prompts[agent] for agent in names[3:]})
        engine.run()
        assert answers(engine, name, prompts) == expected
    # What is reused inexactly, too: whoever comes when the round runs computes few rows.
    side = engine.rounds
    options, side._options = side._options, replace(side._options, selection=td.LeadingTokens(2))
    try:
        side.reset()
        join(engine, "reusing", {agent: prompts[agent] for agent in names[:4]}, patience=0.0)
        for _ in range(20):
            engine.step()
        engine.counts()
        join(engine, "reusing", {names[4]: prompts[names[4]]})
        engine.run()
        counts = engine.counts()
        assert counts["members"] == 1
        # Its history, its end and two rows of each run of blocks.
        assert 48 + 9 < counts["rows_computed"] <= 48 + 9 + 6 < counts["rows"]
    finally:
        side._options = options


def test_a_round_waits_for_its_agents_and_no_longer_than_its_patience(
    engine: Serving, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = a_round(3)
    expected = alone(engine, "waits", prompts)
    now = [0.0]
    monkeypatch.setattr(engine.rounds, "_clock", lambda: now[0])
    three = {agent: prompts[agent] for agent in list(prompts)[:3]}
    join(engine, "waits", three, agents=4, patience=5.0)
    for _ in range(10):
        engine.step()
    now[0] = 4.9
    engine.step()
    assert all(member.plan is None for member in engine.rounds.members.values())
    # One that was aborted is not waited for, nor are its rows computed.
    engine.engine.abort_request(["waits agent 0"], internal=False)
    now[0] = 5.0
    engine.run()
    for agent in list(three)[1:]:
        assert engine.done[f"waits {agent}"] == expected[agent]
    assert "waits agent 0" not in engine.done
    # All are there: nobody waits.
    join(engine, "complete", prompts, agents=4, patience=NEVER)
    engine.run()
    assert answers(engine, "complete", prompts) == expected


def test_members_that_start_together_are_written_at_once(
    engine: Serving, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 118 rows, which a step has room for.
    one, two = (a_round(seed, agents=3 - seed, blocks=1, size=8) for seed in (1, 2))
    two = {f"other {agent}": segments for agent, segments in two.items()}
    expected = alone(engine, "one", one), alone(engine, "two", two)
    cache, written = engine.worker._cache, []
    write = cache.write
    monkeypatch.setattr(
        cache, "write", lambda run, record: (written.append(record.slots), write(run, record))
    )
    join(engine, "one", one, agents=2)
    join(engine, "two", two, agents=1)
    engine.run()
    assert answers(engine, "one", one) == expected[0]
    assert answers(engine, "two", two) == expected[1]
    # A record for each round, with the rows of its members but the last of each.
    assert [len(slots) for slots in written] == [2, 1]
    for slots, prompts in zip(written, (one, two), strict=True):
        rows = [len(token_ids(segments)) - 1 for segments in prompts.values()]
        assert (slots >= 0).sum(axis=1).tolist() == rows


def test_members_are_planned_in_the_order_of_their_names(engine: Serving, free: int) -> None:
    prompts = a_round(4)
    plans = []
    for order in (list(prompts), list(prompts)[::-1]):
        engine.rounds.reset()
        join(engine, "order", {agent: prompts[agent] for agent in order}, agents=4)
        engine.step()
        plans.append(next(iter(engine.rounds.members.values())).plan.agents)
        engine.run()
    assert plans[0] == plans[1] == [f"/{agent}" for agent in prompts]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6, 9, 14])
def test_an_abort_in_any_phase_leaves_the_others_right(
    engine: Serving, free: int, steps: int
) -> None:
    prompts = a_round(5)
    expected = alone(engine, f"abort {steps}", prompts)
    name = f"aborted {steps}"
    join(engine, name, prompts, agents=4, patience=NEVER)
    for _ in range(steps):
        engine.step()
    gone = ["agent 0", "agent 2"]
    engine.engine.abort_request([f"{name} {agent}" for agent in gone], internal=False)
    engine.run()
    for agent in prompts:
        if agent not in gone:
            assert engine.done[f"{name} {agent}"] == expected[agent]
    # All of them, then the same round again.
    join(engine, f"{name} all", prompts, agents=4, patience=NEVER)
    for _ in range(steps):
        engine.step()
    engine.engine.abort_request([f"{name} all {agent}" for agent in prompts], internal=False)
    engine.run()
    assert engine.serve(f"{name} again", prompts) == expected


def test_random_rounds_with_aborts_leak_nothing(
    engine: Serving, free: int, pytestconfig: pytest.Config
) -> None:
    random = np.random.default_rng(0)
    rounds, aborted = pytestconfig.getoption("--rounds"), 0
    whole = [a_round(100 + which, agents=5) for which in range(5)]
    expected = [alone(engine, f"{which}", prompts, new=8) for which, prompts in enumerate(whole)]
    asked: dict[str, list[int]] = {}
    for number in range(rounds):
        prompts = a_round(100 + number % 5, agents=int(random.integers(1, 6)))
        name = f"random {number}"
        patience = float(random.choice([0.0, 0.01]))
        new = int(random.integers(1, 9))
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


def test_an_agents_next_prompt_takes_over_its_own_rows(engine: Serving, free: int) -> None:
    prompts = a_round(6, agents=2)
    found = engine.serve("one", prompts)
    longer = {
        agent: [*segments, td.private([*found[agent], *drawn(77, 5)])]
        for agent, segments in prompts.items()
    }
    engine.counts()
    assert engine.serve("two", longer) == alone(engine, "two", longer)
    # Twelve tokens were sampled, eleven of them fed.
    assert engine.counts()["rows_computed"] == 2 * (1 + 5)


def test_one_agent_may_ask_twice(engine: Serving, free: int) -> None:
    prompts = a_round(7, agents=2)
    expected = alone(engine, "twice", prompts)
    join(engine, "twice", prompts, patience=0.0)
    for agent, segments in prompts.items():
        engine.add(f"twice more {agent}", token_ids(segments), told("twice", agent, segments))
    engine.run()
    assert answers(engine, "twice", prompts) == expected
    assert answers(engine, "twice more", prompts) == expected
    assert len(engine.rounds.host.books.mirrors) == 2  # the second ones are not kept


def test_a_round_is_computed_beside_requests_of_vllms_own(engine: Serving, free: int) -> None:
    prompts, others = a_round(8, agents=3), a_round(9, agents=1)
    expected = alone(engine, "beside", prompts), alone(engine, "others", others, new=30)
    engine.add("other", token_ids(others["agent 0"]), None, 30)
    for _ in range(2):
        engine.step()
    join(engine, "beside", prompts, agents=3)
    other = engine.scheduler.requests[next(iter(engine.scheduler.requests))]
    before = other.num_output_tokens
    while not all(one.is_ready for one in engine.rounds.members.values()):
        engine.step()
    assert other.num_output_tokens > before + 2  # it went on all the time
    engine.run()
    assert answers(engine, "beside", prompts) == expected[0]
    assert engine.done["other"] == expected[1]["agent 0"]


def test_the_store_is_cleared_when_weights_change(engine: Serving, free: int) -> None:
    if engine.scheduler.defer_block_free:
        pytest.skip("beside a connector vLLM keeps blocks of a step that runs from being cleared")
    prompts = a_round(10)
    expected = alone(engine, "cleared", prompts)
    for steps in (0, 1, 4, 8):
        join(engine, f"cleared {steps}", prompts, agents=4)
        for _ in range(steps):
            engine.step()
        assert engine.scheduler.reset_prefix_cache(
            reset_running_requests=True, reset_connector=True
        )
        assert engine.rounds.host.books.used_pages == 0
        engine.run()
        assert answers(engine, f"cleared {steps}", prompts) == expected


def test_several_groups_of_caches_are_refused(engine: Serving, free: int) -> None:
    connector = engine.scheduler.connector
    caches = connector._kv_cache_config
    (group,) = caches.kv_cache_groups
    two = replace(caches, kv_cache_groups=[group, group])
    for role in type(connector.role):
        with pytest.raises(ValueError, match="model: expected one KV cache group, got 2"):
            type(connector)(connector._vllm_config, role, two)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"shared": [[5, 3]]}, r"tokendance.shared: expected ascending \[begin, end\]"),
        ({"shared": [[0, 5000]]}, r"within the prompt of \d+ tokens, got \[0, 5000\]"),
        ({"shared": 7}, r"tokendance.shared: expected ascending"),
        ({}, r"tokendance.shared: expected spans of the prompt, got none"),
        ({"shared": [[0, 9]], "agent": 3}, r"tokendance.agent: expected a name, got 3"),
        ({"shared": [[0, 9]], "agents": "six"}, r"tokendance.agents: expected an int"),
        ({"shared": [[0, 9]], "colour": 1}, r"expected round, agent, .* got \['colour'\]"),
        ("round 1", r"tokendance: expected an object, got 'round 1'"),
    ],
)
def test_what_is_not_understood_is_left_to_vllm(
    engine: Serving,
    free: int,
    given: Any,
    reason: str,
    messages: list[str],
) -> None:
    (segments,) = a_round(11, agents=1).values()
    engine.add("wrong", token_ids(segments), {"tokendance": given})
    engine.add("right", token_ids(segments), {"tokendance": False})
    engine.run()
    assert engine.done["wrong"] == engine.done["right"]
    (left,) = messages
    assert re.search(rf"left to vLLM alone: wrong.*{reason}", left)
    assert engine.counts()["alone"] == 1
