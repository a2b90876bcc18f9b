"""Shared decode in engines of other kinds: real prompts, few blocks, a small store, failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import asynchronously, recorded_rounds, serving, token_ids
from small_rounds import SHARED, a_round, alone, answers, join, nothing_left, until_decoding
from tiny_model import write_tiny_model

PAGE = 8 * 2 * 2 * 2 * 64 * 4  # rows, keys and values, layers, KV heads, elements, bytes
ROUNDS = {"agents": 4, "which": "1:3"}
NEW = 8


@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_where_nothing_inexact_is_reused_tokens_are_those_of_requests_without_a_round(
    prefix_caching: bool,
) -> None:
    options = {"selection": "everything", "block_size": 8, "shared_decode": True}
    with serving(options, enable_prefix_caching=prefix_caching) as engine:
        free = engine.free_blocks()
        for i, prompts in enumerate(recorded_rounds(**ROUNDS)):
            found = engine.serve(f"round {i}", prompts, new=NEW)
            assert found == alone(engine, f"round {i}", prompts, new=NEW)
        assert engine.counts()["members"] == 8
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)


@pytest.mark.slow
def test_the_default_answers_as_without_shared_decode() -> None:
    found = []
    for shared in (False, True):
        with serving({"block_size": 8, "shared_decode": shared}) as engine:
            found.append(
                [
                    engine.serve(f"round {i}", prompts, new=NEW)
                    for i, prompts in enumerate(recorded_rounds(**ROUNDS))
                ]
            )
            counts = engine.counts()
            assert counts["rows_computed"] < counts["rows"]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_answer_as_vllm_alone(tiny: Path, tmp_path: Path, workers: int) -> None:
    model = tiny
    if workers == 3:
        # Heads, and padded tokens, of which each worker has a third.
        sizes = {"hidden_size": 96, "vocab_size": 384}
        sizes |= {"num_attention_heads": 6, "num_key_value_heads": 3}
        model = write_tiny_model(tmp_path / "of_three", **sizes)
    with serving(
        SHARED,
        model=str(model),
        tensor_parallel_size=workers,
        distributed_executor_backend="mp",
        enable_prefix_caching=True,
    ) as engine:
        free = engine.free_blocks()
        for seed in (1, 2):
            prompts = a_round(seed)
            join(engine, f"round {seed}", prompts, agents=4)
            until_decoding(engine, 4)
            assert engine.free_blocks() == free
            engine.run()
            assert engine.counts()["members"] == len(prompts)
            expected = alone(engine, f"round {seed}", prompts)
            assert answers(engine, f"round {seed}", prompts) == expected
            engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)


@pytest.mark.slow
def test_three_workers_of_a_real_model_answer_as_vllm_alone() -> None:
    """Of which each has one of the model's three KV heads; its 9 heads cannot be halved."""
    options = {"selection": "everything", "max_rows": 512, "shared_decode": True}
    with serving(options, tensor_parallel_size=3, distributed_executor_backend="mp") as engine:
        free = engine.free_blocks()
        for i, prompts in enumerate(recorded_rounds(**ROUNDS)):
            assert engine.rounds.shared is not None
            found = engine.serve(f"round {i}", prompts, new=NEW)
            assert engine.counts()["members"] == len(prompts)
            assert found == alone(engine, f"round {i}", prompts, new=NEW)
        nothing_left(engine, free)


def test_more_members_run_than_would_fit_into_vllms_cache(tiny: Path) -> None:
    few = {"block_size": 32, "num_gpu_blocks_override": 24, "max_model_len": 512}
    prompts = a_round(26, agents=8)
    most = {}
    for shared in (False, True):
        options = dict(SHARED, shared_decode=shared)
        with serving(options, model=str(tiny), **few) as engine:
            free = engine.free_blocks()
            expected = alone(engine, "few", prompts, new=60)
            running, preempted = [], 0
            join(engine, "few", prompts, agents=8, new=60)
            while engine.scheduler.has_requests():
                engine.step()
                running.append(len(engine.scheduler.running))
                requests = engine.scheduler.requests.values()
                preempted += any(one.num_preemptions for one in requests)
            assert answers(engine, "few", prompts) == expected
            most[shared] = max(running)
            assert bool(preempted) != shared
            nothing_left(engine, free)
    assert most[False] < most[True] == 8


# Preemption ---------------------------------------------------------------------------------------


def test_members_that_are_preempted_for_others_go_on_with_their_rows(tiny: Path) -> None:
    few = {"block_size": 32, "num_gpu_blocks_override": 12, "max_model_len": 256}
    prompts, others = a_round(29, agents=4), a_round(30, agents=2)
    with serving(SHARED, model=str(tiny), **few) as engine:
        free = engine.free_blocks()
        expected = alone(engine, "few", prompts, new=60), alone(engine, "others", others, new=60)
        # Two others have too few blocks for what they will say, and the members came last.
        for agent, segments in others.items():
            engine.add(f"other {agent}", token_ids(segments), None, 60)
        engine.step()
        join(engine, "few", prompts, agents=4, new=60)
        engine.counts()
        preempted: set[str] = set()
        while engine.scheduler.has_requests():
            engine.step()
            for request in engine.scheduler.requests.values():
                if request.num_preemptions and request.request_id in engine.rounds.members:
                    preempted.add(request.request_id)
        assert preempted
        assert answers(engine, "few", prompts) == expected[0]
        for agent in others:
            assert engine.done[f"other {agent}"] == expected[1][agent]
        # Nothing was computed twice for it.
        counts = engine.counts()
        assert counts["members"] == 4
        assert counts["rows_computed"] == sum(len(token_ids(one)) for one in prompts.values())
        nothing_left(engine, free)


@pytest.mark.parametrize("pages", [110, 90, 45])
def test_where_the_store_is_full_members_are_preempted_and_planned_again(
    tiny: Path, pages: int
) -> None:
    prompts = a_round(31, agents=4)
    again = 0
    with serving(dict(SHARED, capacity=pages * PAGE), model=str(tiny)) as engine:
        free = engine.free_blocks()
        expected = alone(engine, "full", prompts, new=80)
        for number in range(2):
            name = f"full {number}"
            preempted = 0
            for agent, segments in prompts.items():  # in rounds of their own, each of which fits
                join(engine, f"{name} {agent}", {agent: segments}, new=80, patience=0.0)
            while engine.scheduler.has_requests():
                engine.step()
                requests = engine.scheduler.requests.values()
                preempted = max([preempted, *(one.num_preemptions for one in requests)])
            again += engine.counts().get("planned_again", 0)
            for agent in prompts:
                assert engine.done[f"{name} {agent} {agent}"] == expected[agent]
            assert preempted > 0
        assert again
        nothing_left(engine, free)


def test_a_member_that_outgrows_the_store_is_left_to_vllm(tiny: Path, messages: list[str]) -> None:
    prompts = a_round(32, agents=1)
    rows = len(token_ids(prompts["agent 0"]))
    pages = -(-rows // 8) + 6
    with serving(dict(SHARED, capacity=pages * PAGE), model=str(tiny)) as engine:
        free = engine.free_blocks()
        expected = alone(engine, "large", prompts, new=80)
        assert engine.serve("large", prompts, new=80) == expected
        (left,) = [one for one in messages if "left to vLLM alone" in one]
        assert "the store is too small for what it says" in left
        assert engine.serve("again", prompts, new=4) == {
            agent: said[:4] for agent, said in expected.items()
        }
        nothing_left(engine, free)


# What fails, and what does not go together --------------------------------------------------------


def fails_once(owner: Any, name: str, call: int, when: Callable[[], bool]) -> list[bool]:
    """Has one call of a method fail, of those that come when something is so; which did."""
    original = getattr(owner, name)
    calls: list[bool] = []

    def fail(*arguments: Any, **more: Any) -> Any:
        if when():
            calls.append(len(calls) + 1 == call)
            if calls[-1]:
                raise MemoryError("no room for activations")
        return original(*arguments, **more)

    setattr(owner, name, fail)
    return calls


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("where", ["open", "attend", "compute"])
def test_a_worker_that_fails_loses_the_store_and_goes_on(
    tiny: Path, where: str, policy: str, messages: list[str]
) -> None:
    with serving(SHARED, model=str(tiny), kv_load_failure_policy=policy) as engine:
        free = engine.free_blocks()
        first, second, third = (a_round(seed) for seed in (33, 34, 35))
        expected = [
            alone(engine, f"{i}", prompts, new=20) for i, prompts in enumerate((first, second))
        ]
        worker = engine.worker
        members = worker._members
        kinds = {
            "open": (members, "open", 5, lambda: True),
            # In the second layer of the third step.
            "attend": (worker.executor, "attend", 6, lambda: members.is_open),
            "compute": (worker, "_compute", 2, lambda: True),
        }
        join(engine, "first", first, agents=4, new=20)
        until_decoding(engine, 4)
        owner, name, call, when = kinds[where]
        calls = fails_once(owner, name, call, when)
        second = {f"other {agent}": segments for agent, segments in second.items()}
        join(engine, "second", second, agents=4, new=20)
        engine.run()
        assert any(calls)
        (left,) = [one for one in messages if "left to vLLM alone" in one]
        assert "a worker failed: MemoryError: no room for activations" in left
        if policy == "recompute" or where == "compute":
            assert answers(engine, "first", first) == expected[0]
        else:  # ended with an error, having said less
            for agent, said in answers(engine, "first", first).items():
                assert len(said) < 20
                assert said == expected[0][agent][: len(said)]
        if policy == "recompute" or where == "compute":
            found = answers(engine, "second", second)
            assert list(found.values()) == list(expected[1].values())
        engine.counts()
        assert engine.serve("third", third) == alone(engine, "third", third)
        assert engine.counts()["members"] == 4
        nothing_left(engine, free)


def test_it_is_off_where_it_cannot_be(tiny: Path, messages: list[str]) -> None:
    prompts = a_round(36)
    with asynchronously(), serving(SHARED, model=str(tiny)) as engine:
        free = engine.free_blocks()
        assert engine.rounds.shared is None
        reason = "async_scheduling: expected none"
        assert [one for one in messages if f"decode is not shared: {reason}" in one]
        join(engine, "off", prompts, agents=4)
        until_decoding(engine, 4)
        assert engine.free_blocks() < free
        engine.run()
        assert answers(engine, "off", prompts) == alone(engine, "off", prompts)
        nothing_left(engine, free)
