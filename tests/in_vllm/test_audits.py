"""The gate inside vLLM: members that are compared with full recompute before vLLM gets them."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import serving
from small_rounds import EXACT, NEVER, a_round, answers, join, nothing_left

REUSING = EXACT | {"selection": "leading:2"}


@pytest.mark.parametrize("shared", [False, True])
def test_a_member_that_is_audited_is_answered_as_without_it(tiny: Path, shared: bool) -> None:
    rounds = [a_round(50 + number) for number in range(3)]
    with serving(REUSING, model=str(tiny)) as engine:
        expected = [engine.serve(f"{i}", prompts) for i, prompts in enumerate(rounds)]
    for fraction in (0.4, 1.0):
        gate = {"fraction": fraction, "deviation": 1e-6}
        with serving(REUSING | {"gate": gate, "shared_decode": shared}, model=str(tiny)) as engine:
            free = engine.free_blocks()
            found = [engine.serve(f"{i}", prompts) for i, prompts in enumerate(rounds)]
            assert found == expected
            counts = engine.counts()
            # The agent that makes all Masters reuses nothing inexact.
            most = 3 * (len(rounds[0]) - 1)
            assert counts["audits"] == most if fraction == 1 else 0 < counts["audits"] < most
            assert counts["rows_audited"] > 100 * counts["audits"]
            assert counts["findings"] > 0
            assert not engine.rounds.audits.opted_out.segments  # it only warns
            nothing_left(engine, free)


def test_what_is_found_is_full_recompute(tiny: Path, messages: list[str]) -> None:
    """A comparison of rows that are exact, and called otherwise, finds them equal."""
    gate = {"fraction": 1.0, "deviation": 1e-3}
    with serving(EXACT | {"gate": gate}, model=str(tiny)) as engine:
        free = engine.free_blocks()
        prompts = a_round(53)
        join(engine, "exact", prompts, agents=4)
        while not engine.rounds.members or not all(
            one.is_ready for one in engine.rounds.members.values()
        ):
            engine.step()
        plan = next(iter(engine.rounds.members.values())).plan
        for request, member in engine.rounds.members.items():
            plan._live.state(member.agent).exact_length = 0
            engine.rounds.audits.consider(request, member.agent, plan)
        engine.run()
        counts = engine.counts()
        assert counts["audits"] == 4
        assert "findings" not in counts or counts["findings"] == 0
        assert not [one for one in messages if "expected deviation" in one]
        nothing_left(engine, free)


def test_a_segment_that_falls_back_is_computed_from_then_on(tiny: Path) -> None:
    prompts = a_round(51)
    gate = {"fraction": 1.0, "deviation": 1e-6, "action": "fall back"}
    with serving(REUSING | {"gate": gate}, model=str(tiny)) as engine:
        free = engine.free_blocks()
        engine.serve("before", prompts)
        before = engine.counts()
        assert before["rows_computed"] < 0.7 * before["rows"]
        assert len(engine.rounds.audits.opted_out.segments) == 3
        named = {f"{agent}!": segments for agent, segments in prompts.items()}
        found = engine.serve("after", named)
        counts = engine.counts()
        assert counts.get("audits", 0) == 0  # nothing inexact is left
        assert counts["rows_computed"] > 0.8 * counts["rows"]  # but what is reused exactly
        assert list(found.values()) == list(engine.serve("alone", prompts, joining=False).values())
        nothing_left(engine, free)
        assert not engine.rounds.audits.opted_out.segments


@pytest.mark.parametrize("capacity", ["8MiB", 70 * 8 * 2 * 2 * 2 * 64 * 4])
def test_aborts_and_resets_during_audits(tiny: Path, capacity: int | str) -> None:
    prompts = a_round(52)
    gate = {"fraction": 1.0}
    options = REUSING | {"gate": gate, "max_rows": 16, "capacity": capacity}
    with serving(options, model=str(tiny), kv_load_failure_policy="recompute") as engine:
        free = engine.free_blocks()
        expected = engine.serve("first", prompts)
        for steps in range(0, 70, 3):
            name = f"audited {steps}"
            engine.rounds.reset()
            join(engine, name, prompts, agents=4, patience=NEVER)
            for _ in range(steps):
                engine.step()
            if steps % 2:
                gone = ["agent 1", "agent 2"]
                engine.engine.abort_request([f"{name} {one}" for one in gone], internal=False)
            else:
                gone = []
                assert engine.scheduler.reset_prefix_cache(
                    reset_running_requests=True, reset_connector=True
                )
            engine.run()
            if gone:
                left = set(prompts) - set(gone)
                assert {one: engine.done[f"{name} {one}"] for one in left} == {
                    one: expected[one] for one in left
                }
            else:
                assert len(answers(engine, name, prompts)) == 4
        nothing_left(engine, free)


@pytest.mark.slow
def test_workers_add_up_what_their_heads_differ_by(tiny: Path, messages: list[str]) -> None:
    gate = {"fraction": 1.0, "deviation": 1e-6}
    prompts, found = a_round(54), []
    for size in (1, 2):
        more = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        with serving(
            REUSING | {"gate": gate}, model=str(tiny), **(more if size > 1 else {})
        ) as one:
            one.serve("audited", prompts)
        findings = [text.rsplit(" got ", 1) for text in messages if " got " in text]
        found.append({what: float(value) for what, value in findings})
        messages.clear()
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) >= 6
    assert found[1] == pytest.approx(found[0], rel=1e-3)
