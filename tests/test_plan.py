"""Plans whose agents end early, and steps that meet a plan that has changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from driving import (
    GEOMETRY,
    make_store,
    prefill_steps,
    project,
    restored,
    run_prefill,
    run_round,
    run_step,
    same_snapshot,
    snapshot,
    tokens,
    without_idle,
)
from symbolic_device import check_books

import tokendance as td
from tokendance import Phase
from tokendance.host import scheduler
from tokendance.host.selection import Selection

A, B = tokens(1, 40), tokens(2, 24)
MINE, YOURS, THEIRS = tokens(10, 13), tokens(11, 29), tokens(12, 5)
END = td.private(tokens(13, 9))


def pair() -> dict[str, list[td.Segment]]:
    """Prompts without anything in common."""
    return {"a": [td.private(tokens(3, 64))], "b": [td.private(tokens(4, 64))]}


def siblings() -> dict[str, list[td.Segment]]:
    """The first agent makes the Masters."""
    return {
        "a": [td.private(MINE), td.shared(A), td.shared(B), END],
        "b": [td.private(YOURS), td.shared(A), END],
        "c": [td.private(THEIRS), td.shared(B), END],
    }


SELECTIONS = [td.LeadingTokens(4), td.KeyDeviation(0.3), td.Everything(), td.Nothing()]


def test_an_aborted_agent_is_not_computed_any_more() -> None:
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan(pair())
    steps = prefill_steps(collector, plan, 16)
    run_step(next(steps))
    plan.abort("a")
    run_round(collector, {"x": [td.private(tokens(5, 64))]})  # on the pages that a has given back
    before = snapshot(store)
    for step in steps:
        run_step(step)
        assert set(step.agents) == {"b"}
    assert same_snapshot(snapshot(store), before)
    assert plan.rows_computed == 16 + 64
    plan.commit()
    alone = make_store()
    run_round(td.KVCollector(alone), {"b": pair()["b"]})
    for mine, other in zip(restored(store, "b"), restored(alone, "b"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("source", ["master", "alone"])
@pytest.mark.parametrize("run_before", [0, 1, 2])
def test_masters_outlive_an_agent_that_is_aborted_in_prefill(
    source: str, selection: Selection, run_before: int
) -> None:
    results = []
    for aborts in (False, True):
        store = make_store()
        empty = snapshot(store)
        collector = td.KVCollector(store, source, selection)
        plan = collector.plan(siblings())
        steps = prefill_steps(collector, plan, 16)
        for _ in range(run_before):
            run_step(next(steps))
        if aborts and plan._live.state("a").phase is Phase.PREFILL:
            plan.abort("a")
            with pytest.raises(ValueError, match="not ended, got 'a'"):
                plan.length("a")
            assert not plan.is_active("a")
        found = {}
        for step in steps:
            out = run_step(step)
            found.update(zip(step.logit_agents, out[step.logit_rows], strict=True))
        plan.commit(["b", "c"])
        results.append((found, restored(store, "b"), restored(store, "c")))
        if not plan.ended:
            plan.abort()
        for agent in store.agents:
            store.release(agent)
        assert store.stats().own_rows == empty[0].own_rows == 0
        pages = sum(-(-len(ids) // 8) for ids in (A, B)) if source == "alone" else None
        assert pages is None or store.stats().used_pages <= pages
    (whole, *kept), (rest, *others) = results
    for agent in ("b", "c"):
        torch.testing.assert_close(rest[agent], whole[agent], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, kept, rtol=1e-5, atol=1e-6)


def test_an_aborted_agent_is_computed_up_to_the_last_master_that_is_awaited() -> None:
    store = make_store()
    collector = td.KVCollector(store, selection=td.Nothing())
    empty = snapshot(store)
    plan = collector.plan(siblings())
    assert plan.spans("a")[1].kind.value == "master"
    plan.abort("a")
    pending = {state.agent: len(state.pending) for state in plan._live.states}
    assert pending[None] == 13 + 40 + 24
    plan.abort("c")
    pending = {state.agent: len(state.pending) for state in plan._live.states}
    assert pending[None] == 13 + 40
    plan.abort("b")
    assert plan.ended
    assert same_snapshot(snapshot(store), empty)

    plan = collector.plan(siblings())
    plan.abort("a")
    run_prefill(collector, plan)
    plan.abort()
    assert same_snapshot(without_idle(store), without_idle(make_store()))


def test_a_step_that_is_not_run_gives_back_what_it_took() -> None:
    store = make_store()
    collector = td.KVCollector(store, "producer")
    plan = collector.plan(pair())
    step = collector.step(max_rows=16)
    step.cancel()
    plan.abort("a")
    run_prefill(collector, plan)
    before = snapshot(store)
    step = collector.step({"b": list(range(20))})
    assert plan.length("b") == 84
    assert not same_snapshot(snapshot(store), before)
    step.cancel()
    assert plan.length("b") == 64
    assert same_snapshot(snapshot(store), before)
    step = collector.step({"b": list(range(20))})
    with pytest.warns(ResourceWarning, match="expected a step to be run or cancelled"):
        del step
    assert same_snapshot(snapshot(store), before)
    plan.commit()


ACTS: list[Callable[[td.KVCollector, td.Plan], object]] = [
    lambda _, plan: plan.commit(),
    lambda _, plan: plan.commit("a"),
    lambda _, plan: plan.truncate("a", 64),
    lambda _, plan: plan.suspend("a"),
    lambda collector, plan: run_step(collector.step({"b": [7], "a": [8]}, prefill=())),
]


@pytest.mark.parametrize("act", ACTS)
def test_an_open_step_keeps_its_agents(act: Callable[..., object]) -> None:
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan(pair())
    run_prefill(collector, plan)
    run_step(collector.step({"a": [1], "b": [2]}, prefill=()))
    with collector.step({"a": [3]}, prefill=()) as step:
        for layer in range(GEOMETRY.num_layers):
            with pytest.raises(ValueError, match="no open step, got 'a'"):
                act(collector, plan)
            step.attend(layer, *project(step.token_ids, layer))
    assert (plan.output("a"), plan.output("b")) == ([1, 3], [2])
    run_step(collector.step({"a": [4], "b": [5]}, prefill=()))
    plan.commit()
    for agent, ids in (("a", [1, 3, 4]), ("b", [2, 5])):
        whole = np.concatenate([pair()[agent][0].token_ids, ids])
        for layer, (_, v) in enumerate(restored(store, agent)):
            assert torch.equal(v, project(torch.from_numpy(whole).long(), layer)[2])


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_goes_on_when_an_exception_in_another_ends_its_plan(fails: bool) -> None:
    """Others may have rows in it; the pages of those who ended stay until it has ended."""
    store = make_store()
    collector = td.KVCollector(store)
    empty = snapshot(store)
    plan = collector.plan(pair())
    run_prefill(collector, plan)
    held = store.stats().held_pages
    outer = collector.step({"a": [1]}, prefill=()).__enter__()
    with pytest.raises(LookupError), collector.step({"b": [1]}, prefill=()):
        raise LookupError
    assert plan.ended
    assert 0 < store.stats().held_pages < held
    with pytest.raises(ValueError, match="no open steps, got 1"):
        store.clear()
    for layer in range(GEOMETRY.num_layers):
        outer.attend(layer, *project(outer.token_ids, layer))
    outer.__exit__(*((LookupError, LookupError(), None) if fails else (None, None, None)))
    assert same_snapshot(snapshot(store), empty)


@pytest.mark.parametrize("rows", [0, 16])
def test_agents_may_be_aborted_in_an_open_step(rows: int) -> None:
    """In decode, or in a prefill that makes a Master; its pages are given back with the step."""
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan(pair())
    if rows:
        step = collector.step(max_rows=rows)
    else:
        run_prefill(collector, plan)
        step = collector.step({"a": [1], "b": [2]}, prefill=())
    plan.abort("a")
    assert plan.phase("a") is td.Phase.ENDED
    other = collector.plan({"a": pair()["b"]})  # the name is free
    out = run_step(step)
    assert len(out) == len(step.agents)
    check_books(store.scheduler)
    run_prefill(collector, plan)
    plan.abort()
    other.abort()
    check_books(store.scheduler)
    assert store.stats().held_pages == 0


def test_a_step_that_fails_to_open_leaves_the_plan_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan(pair())
    run_prefill(collector, plan)
    run_step(collector.step({"a": [1]}, prefill=()))
    before = store.stats()
    for target, name in ((scheduler, "PlannedStep"), (store.executor, "upload")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_step(collector.step({"a": list(range(20)), "b": [4]}, prefill=()))
        assert store.stats() == before
        assert (plan.output("a"), plan.output("b")) == ([1], [])
    run_step(collector.step({"a": list(range(20)), "b": [4]}, prefill=()))
    assert plan.output("b") == [4]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("at", ["prefill", "decode"])
def test_a_resumed_agent_has_the_rows_that_it_had(at: str, selection: Selection) -> None:
    results = []
    for suspends in (False, True):
        store = make_store()
        collector = td.KVCollector(store, selection=selection)
        plan = collector.plan(siblings())
        if suspends and at == "prefill":
            plan.suspend(["b", "c"])
            plan.resume(["b", "c"])
        run_prefill(collector, plan)
        run_step(collector.step({"b": [7, 8, 9], "c": [5]}))
        if suspends and at == "decode":
            plan.suspend(["b", "c"])
            plan.resume(["b", "c"])
            assert plan.output("b") == [7, 8, 9]
            run_prefill(collector, plan)
        run_step(collector.step({"b": [10], "c": [11] * 9}))
        spans = {agent: plan.spans(agent) for agent in "bc"}
        plan.commit()
        results.append(([restored(store, agent) for agent in "bc"], spans, store.stats()))
    (rows, spans, stats), (rows_again, spans_again, stats_again) = results
    torch.testing.assert_close(rows_again, rows, rtol=1e-5, atol=1e-6)
    assert stats_again == stats
    assert spans_again == spans
