"""Engines of other sizes: few run slots and blocks, a small store, a separator."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import asynchronously, serving, spans, token_ids
from small_rounds import EXACT, a_round, alone, answers, drawn, join, nothing_left

import tokendance as td


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fewer_run_slots_than_agents_and_preemption(tiny: Path, ahead: bool) -> None:
    prompts = a_round(12, agents=6)
    few = {"max_num_seqs": 4, "block_size": 32, "num_gpu_blocks_override": 24, "max_model_len": 512}
    few["enable_prefix_caching"] = True
    with asynchronously(ahead), serving(EXACT, model=str(tiny), **few) as engine:
        free = engine.free_blocks()
        expected = alone(engine, "few", prompts, new=60)
        engine.scheduler.reset_prefix_cache()
        preempted: list[int] = []
        for name in ("few", "again"):
            join(engine, name, prompts, agents=6, new=60)
            while engine.scheduler.has_requests():
                engine.step()
                waiting = engine.scheduler.requests.values()
                preempted.append(max((one.num_preemptions for one in waiting), default=0))
            assert answers(engine, name, prompts) == expected
        assert max(preempted) > 0
        nothing_left(engine, free)


def test_a_full_store_forgets_who_was_kept_longest_and_then_leaves_requests_alone(
    tiny: Path, messages: list[str]
) -> None:
    prompts = a_round(13, agents=3)
    needs = {"selection": "everything", "block_size": 8, "max_rows": 128}
    page = 8 * 2 * 2 * 2 * 64 * 4  # rows, keys and values, layers, KV heads, elements, bytes
    with serving(dict(needs, capacity=80 * page), model=str(tiny)) as engine:
        free = engine.free_blocks()
        expected = alone(engine, "full", prompts)
        # Each agent has a store's third: another round's agents take their place.
        for number in range(4):
            named = {f"{agent} of {number}": segments for agent, segments in prompts.items()}
            found = engine.serve(f"round {number}", named)
            assert list(found.values()) == list(expected.values())
            assert engine.counts()["members"] == 3
            kept = list(engine.rounds.host.books.mirrors)
            assert [name for name in kept if name.endswith(f"of {number}")] == kept[-3:]
        # Two rounds at once: the second waits until there is room, or is there at once.
        join(engine, "first", prompts, agents=3)
        more = {f"{agent}!": segments for agent, segments in a_round(14, agents=3).items()}
        join(engine, "second", more, agents=3)
        engine.run()
        assert answers(engine, "first", prompts) == expected
        assert answers(engine, "second", more) == alone(engine, "more", more)
        assert not [one for one in messages if "left to vLLM alone" in one]
        # One that never fits.
        large = a_round(15, agents=6, size=120)
        assert engine.serve("large", large) == alone(engine, "large", large)
        (left,) = [one for one in messages if "left to vLLM alone" in one]
        assert "the store is full" in left
        nothing_left(engine, free)


def test_prompts_are_cut_and_joined_by_a_separator(tiny: Path) -> None:
    cut = [1, 2]  # no token of the drawn ones
    prompts: dict[str, list[int]] = {}
    for agent, segments in a_round(16).items():
        prompts[agent] = [token for one in segments for token in [*token_ids([one]), *cut]]
    options = {"selection": "leading:2", "block_size": 8, "separator": cut, "patience": 0.05}
    with serving(options, model=str(tiny)) as engine:
        free = engine.free_blocks()
        for agent, ids in prompts.items():
            engine.add(f"text {agent}", ids)
        engine.add("none", drawn(1, 30))
        engine.add("refused", prompts["agent 0"], {"tokendance": False})
        engine.step()
        assert len(engine.rounds.members) == 4
        engine.run()
        counts = engine.counts()
        assert counts["members"] == 4
        assert counts["rounds"] == 1
        assert counts["rows_computed"] < 0.7 * counts["rows"]
        assert engine.done["text agent 0"] == engine.done["refused"]  # it computed the Masters
        # The same agents, known by how their prompts begin.
        for agent, ids in prompts.items():
            said = engine.done[f"text {agent}"]
            engine.add(f"next {agent}", [*ids, *said, *cut, *drawn(2, 3)])
        engine.run()
        # What was said is cut as one with the separator behind it, and not computed again: the
        # last token was not fed.
        assert engine.counts()["rows_computed"] == 4 * (1 + len(cut) + 3)
        assert len(engine.rounds.host.books.mirrors) == 4
        nothing_left(engine, free)


def test_spans_are_those_of_the_shared_segments() -> None:
    assert spans([td.private([1]), td.shared([2, 3]), td.shared([4]), td.private([5])]) == [
        [1, 3],
        [3, 4],
    ]


def test_what_cannot_be_done_is_refused_at_the_start(tiny: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"TokenDanceConnector: kv_role: expected kv_both"),
        serving(EXACT, model=str(tiny), kv_role="kv_consumer"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"expected options among .* got \['pages'\]"),
        serving({"pages": 3}, model=str(tiny)),
    ):
        pass
    with (
        asynchronously(),
        pytest.raises(ValueError, match=r"kv_load_failure_policy: expected fail"),
        serving(EXACT, model=str(tiny), kv_load_failure_policy="recompute"),
    ):
        pass


def test_a_step_may_be_scheduled_while_the_one_before_it_runs(tiny: Path) -> None:
    prompts = a_round(17)
    with asynchronously(), serving(EXACT, model=str(tiny), enable_prefix_caching=True) as engine:
        free = engine.free_blocks()
        expected = alone(engine, "ahead", prompts)
        assert engine.serve("ahead", prompts) == expected
        longer = {
            agent: [*segments, td.private([*expected[agent], *drawn(5, 9)])]
            for agent, segments in prompts.items()
        }
        engine.counts()
        assert engine.serve("longer", longer) == alone(engine, "longer", longer)
        # What was said is kept, but for the token that was not fed.
        assert engine.counts()["rows_computed"] == 4 * (1 + 9)
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)


@pytest.mark.parametrize("kind", ["_compute", "write", "read"])
def test_a_worker_that_fails_loses_the_store_and_no_request(
    tiny: Path, kind: str, messages: list[str]
) -> None:
    with serving(EXACT, model=str(tiny), kv_load_failure_policy="recompute") as engine:
        free = engine.free_blocks()
        rounds = [a_round(seed) for seed in (20, 21, 22)]
        expected = [alone(engine, f"lost {i}", prompts) for i, prompts in enumerate(rounds)]
        assert engine.serve("before", rounds[0]) == expected[0]
        worker = engine.worker
        owner = worker if kind == "_compute" else worker._cache
        original = getattr(owner, kind)
        calls = []

        def fail(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) == 2:
                raise MemoryError("no room for activations")
            return original(*arguments)

        setattr(owner, kind, fail)
        found = engine.serve("failing", rounds[1])
        assert len(calls) >= 2
        assert found == expected[1]
        (left,) = [one for one in messages if "left to vLLM alone" in one]
        assert "a worker failed: MemoryError: no room for activations" in left
        # What comes next has a store again.
        engine.counts()
        assert engine.serve("after", rounds[2]) == expected[2]
        assert engine.counts()["members"] == len(rounds[2])
        nothing_left(engine, free)
