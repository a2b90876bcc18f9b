"""Agents that are suspended and resumed, engines' own pools, and what a store gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from driving import (
    GEOMETRY,
    ROPE,
    restored,
    run_prefill,
    run_round,
    run_step,
    same_snapshot,
    snapshot,
    tokens,
)
from symbolic_device import check_books

import tokendance as td
from tokendance import Phase

BLOCK = 8
SELECTIONS = [td.LeadingTokens(4, unseen=96), td.KeyDeviation(0.3), td.Everything(), td.Nothing()]


# Preemption ---------------------------------------------------------------------------------------


A, B = tokens(1, 40), tokens(2, 24)


def prompts() -> dict[str, list[td.Segment]]:
    return {
        "a": [td.private(tokens(10, 13)), td.shared(A), td.shared(B), td.private(tokens(13, 9))],
        "b": [td.private(tokens(11, 29)), td.shared(B), td.shared(A), td.private(tokens(13, 9))],
    }


def make_store(pages: int = 200, host_pages: int = 100) -> td.DiffStore:
    page = BLOCK * GEOMETRY.row_bytes
    return td.DiffStore(
        GEOMETRY, ROPE, pages * page, block_size=BLOCK, host_capacity=host_pages * page
    )


def check(store: td.DiffStore) -> None:
    check_books(store.scheduler)


def decode(collector: td.KVCollector, agents: str, ids: list[int]) -> list[torch.Tensor]:
    """Outputs of tokens that are fed one by one."""
    found = []
    for token in ids:
        step = collector.step({agent: [token] for agent in agents}, prefill=())
        found += list(run_step(step))
    return found


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("source", ["master", "alone", "producer"])
@pytest.mark.parametrize("to", ["nowhere", "host", "both"])
def test_a_suspended_agent_goes_on_where_it_was(
    selection: td.LeadingTokens, source: str, to: str
) -> None:
    """Same outputs, same KV, same output that others reuse; nothing is left behind."""
    results = []
    for suspends in (False, True):
        store = make_store()
        collector = td.KVCollector(store, source, selection)
        plan = collector.plan(prompts())
        run_prefill(collector, plan)
        found = decode(collector, "ab", [3, 4, 5, 6, 7])
        if suspends:
            before = store.stats()
            for place in ["host", "nowhere"] if to == "both" else [to]:
                plan.suspend("b", to=place)
                check(store)
            assert plan.phase("b") is Phase.SUSPENDED
            assert (plan.length("b"), plan.output("b")) == (29 + 64 + 9 + 5, [3, 4, 5, 6, 7])
            assert store.stats().held_pages < before.held_pages
            held = store.stats().held_pages * store.pool.page_bytes
            assert plan.stored_bytes == held
            # Other agents write to the pages that it left.
            other = collector.plan({"x": [td.private(tokens(30, 400))]})
            run_prefill(collector, other)
            other.abort()
            needed = plan.pages_to_resume("b")
            assert needed <= store.stats().free_pages + store.stats().evictable_pages
            plan.resume("b")
            check(store)
            again = run_prefill(collector, plan)
            if to == "host":
                assert not again
                assert store.stats() == before
            else:
                torch.testing.assert_close(again["b"], found[-1], rtol=1e-5, atol=2e-6)
        found += decode(collector, "ab", [8, 9])
        plan.commit()
        check(store)
        late = collector.plan(
            {"z": [td.private([1]), td.shared([3, 4, 5, 6, 7, 8, 9]), td.shared(A)]}
        )
        results.append((found, [restored(store, agent) for agent in "ab"], late.rows))
        late.abort()
        for agent in "ab":
            store.release(agent)
        store.evict(200)
        assert store.stats().used_pages == 0
        check(store)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=2e-6)


def test_suspended_agents_can_only_be_resumed_aborted_or_suspended_further() -> None:
    store = make_store()
    collector = td.KVCollector(store, selection=td.Nothing())
    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    decode(collector, "b", [3])
    for place in ("host", "nowhere"):
        plan.suspend("b", to=place)
        before = store.stats()
        with pytest.raises(ValueError, match=r"got 'b' \(suspended\)"):
            plan.truncate("b", 102)
        with pytest.raises(ValueError, match=r"(got 'b' \(suspended\))"):
            plan.commit("b")
        with pytest.raises(ValueError, match=r"(got 'b' \(suspended\))"):
            collector.step({"b": [1]})
        with pytest.raises(ValueError, match="suspended"):
            list(collector.audit(plan, "b").steps())
        with pytest.raises(ValueError, match=r"suspended agents, got 'a' \(decode\)"):
            plan.resume(["b", "a"])
        with pytest.raises(ValueError, match="got 'b'"):
            plan.suspend("b", to="host")
        assert collector.step() is None
        assert store.stats() == before
        check(store)
    with pytest.raises(ValueError, match=r"suspended agent, got 'a' \(decode\)"):
        plan.pages_to_resume("a")
    with pytest.raises(KeyError, match="'x'"):
        plan.resume("x")
    with pytest.raises(ValueError, match="to: expected 'nowhere' or 'host', got 'disk'"):
        plan.suspend("a", to="disk")
    plan.commit("a")
    plan.abort("b")
    assert plan.ended
    check(store)
    collector.plan({"b": [td.private([1])]}).abort()


@pytest.mark.parametrize("to", ["nowhere", "host"])
def test_suspended_agents_may_be_aborted(to: str) -> None:
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    decode(collector, "ab", [3])
    plan.suspend(["a", "b"], to=to)
    check(store)
    plan.abort("a")
    check(store)
    with pytest.warns(ResourceWarning, match=r"got \['b'\] left"):
        del plan
    store.evict(200)
    assert store.stats().used_pages == 0
    check(store)
    assert store.scheduler.host_pages.num_free == 100


@pytest.mark.parametrize("rows", [0, 13, 30, 60])
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: type(s).__name__)
def test_agents_may_be_suspended_in_prefill(rows: int, selection: td.LeadingTokens) -> None:
    """Whoever makes Masters that others wait for goes on making them, for no agent."""
    store = make_store()
    collector = td.KVCollector(store, selection=selection)
    plan = collector.plan(prompts())
    if rows:
        run_step(collector.step(max_rows=rows))
    maker = next(agent for agent in "ab" if plan.phase(agent) is Phase.PREFILL)
    with pytest.raises(ValueError, match=r"agents in decode, got .* \(prefill\)"):
        plan.suspend(maker, to="host")
    plan.suspend(maker)
    check(store)
    assert plan.phase(maker) is Phase.SUSPENDED
    other = "b" if maker == "a" else "a"
    found = run_prefill(collector, plan)
    assert set(found) == {other} or plan.phase(other) is Phase.DECODE
    check(store)
    plan.resume(maker)
    check(store)
    again = run_prefill(collector, plan)
    for agent, row in {**found, **again}.items():
        alone = td.KVCollector(make_store(), selection=td.Everything())
        with alone.plan({agent: prompts()[agent]}) as dense:
            torch.testing.assert_close(row, run_prefill(alone, dense)[agent], rtol=1e-5, atol=2e-6)
    plan.commit()
    check(store)


@pytest.mark.parametrize("to", ["nowhere", "host"])
def test_a_resume_that_fails_changes_nothing(to: str) -> None:
    store = make_store(40)
    collector = td.KVCollector(store, selection=td.Nothing())
    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    decode(collector, "ab", [3, 4])
    plan.suspend(["a", "b"], to=to)
    free = store.stats().free_pages + store.stats().evictable_pages
    needed = plan.pages_to_resume("a")
    filler = collector.plan({"x": [td.private(tokens(30, BLOCK * (free - needed)))]})
    before = store.stats()
    lengths = plan.length("a"), plan.length("b")
    with pytest.raises(td.OutOfPagesError):
        plan.resume(["a", "b"])
    assert [plan.phase(agent) for agent in "ab"] == [Phase.SUSPENDED] * 2
    assert (plan.length("a"), plan.length("b")) == lengths
    assert store.stats().held_pages == before.held_pages
    check(store)
    plan.resume("a")
    check(store)
    run_step(collector.step(prefill=["x"]))
    filler.abort()
    plan.resume("b")
    run_prefill(collector, plan)
    found = decode(collector, "ab", [5])
    plan.commit()
    for agent, row in zip("ab", found, strict=True):
        alone = td.KVCollector(make_store(), selection=td.Everything())
        dense = alone.plan({agent: [*prompts()[agent], td.private([3, 4, 5])]})
        expected = run_prefill(alone, dense)[agent]
        dense.abort()
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=2e-6)
    check(store)


def test_host_memory_that_is_full_changes_nothing() -> None:
    store = make_store(host_pages=3)
    collector = td.KVCollector(store)
    plan = collector.plan({"a": [td.private(tokens(1, 20))], "b": [td.private(tokens(2, 8))]})
    run_prefill(collector, plan)
    before = snapshot(store)
    with pytest.raises(td.OutOfPagesError, match="expected 4 free host pages, got 3 of 3"):
        plan.suspend(["a", "b"], to="host")
    assert same_snapshot(snapshot(store), before)
    check(store)
    plan.suspend("a", to="host")
    with pytest.raises(td.OutOfPagesError, match="expected 1 free host pages, got 0 of 3"):
        plan.suspend("b", to="host")
    check(store)
    plan.resume("a")
    plan.suspend("b", to="host")
    plan.abort()
    check(store)
    without = td.KVCollector(td.DiffStore(GEOMETRY, ROPE, "1MiB"))
    plan = without.plan({"a": [td.private([1])]})
    run_prefill(without, plan)
    with pytest.raises(td.OutOfPagesError, match="got 0 of 0"):
        plan.suspend("a", to="host")
    plan.abort()


@pytest.mark.parametrize("to", ["nowhere", "host"])
def test_drafts_are_rejected_and_audits_agree_after_a_resume(to: str) -> None:
    store = make_store()
    collector = td.KVCollector(store, selection=td.Everything())
    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    decode(collector, "b", [3, 4, 5, 6, 7, 8, 9, 10, 11])
    plan.suspend("b", to=to)
    plan.resume("b")
    if to == "nowhere":
        with pytest.raises(ValueError, match=r"got 'b' \(prefill\)"):
            collector.step({"b": [1]})
        plan.truncate("b", 102 + 8)  # before the last is computed again
    else:
        plan.truncate("b", 102 + 8)
    run_prefill(collector, plan)
    plan.truncate("b", 102 + 2)
    check(store)
    assert plan.output("b") == [3, 4]
    (row,) = decode(collector, "b", [12])
    audit = collector.audit(plan, "b")
    for step in audit.steps():
        out = run_step(step)
        audit.add(out[step.logit_rows].flatten(1))
    report = audit.report({"b": row.flatten()[None]})
    assert max(one.deviation for one in report.agents["b"].segments) < 1e-5
    plan.truncate("b", 102)
    plan.commit()
    assert store.length("b") == 102
    check(store)


# Engines' pools -----------------------------------------------------------------------------------


def engine_store(
    pages: int, allocate: Callable[[list[int], int], Any], says: bool
) -> tuple[td.DiffStore, list[int]]:
    free = list(range(pages))
    pools = [torch.full((pages, BLOCK, 1, 64), torch.nan) for _ in range(2 * GEOMETRY.num_layers)]
    pool = td.PagePool(
        pools[0::2],
        pools[1::2],
        lambda count: allocate(free, count),
        free.extend,
        num_free=free.__len__ if says else None,
    )
    return td.DiffStore(GEOMETRY, ROPE, pool=pool), free


def returns_none(free: list[int], count: int) -> list[int] | None:
    return [free.pop() for _ in range(count)] if count <= len(free) else None


def raises(free: list[int], count: int) -> np.ndarray:
    if count > len(free):
        raise MemoryError(f"{count} blocks")
    return np.array([free.pop() for _ in range(count)])


@pytest.mark.parametrize("says", [False, True])
@pytest.mark.parametrize("allocate", [returns_none, raises])
def test_engines_allocators_may_return_none_or_raise(allocate: Any, says: bool) -> None:
    store, free = engine_store(20, allocate, says)
    collector = td.KVCollector(store, selection=td.Nothing())
    mine = [free.pop() for _ in range(4)]  # the engine's own requests
    run_round(collector, {"a": [td.shared(tokens(1, 40))], "b": [td.shared(tokens(2, 24))]})
    assert len(free) == 8
    assert store.stats().free_pages == (8 if says else 12)
    store.release("a")
    store.release("b")
    assert (store.stats().evictable_pages, store.stats().held_pages) == (8, 0)
    check(store)
    with pytest.raises(td.OutOfPagesError) as full:
        collector.plan({"c": [td.private(tokens(3, 17 * BLOCK))]})
    assert isinstance(full.value.__cause__, MemoryError) == (allocate is raises)
    assert store.stats().masters == (2 if says else 0)  # it can only try
    check(store)
    plan = collector.plan({"c": [td.private(tokens(3, 16 * BLOCK))]})
    assert len(free) == 0
    check(store)
    run_prefill(collector, plan)
    with pytest.raises(td.OutOfPagesError):
        collector.step({"c": [1]})
    assert plan.length("c") == 16 * BLOCK
    free.extend(mine)
    run_step(collector.step({"c": [1]}))
    plan.abort()
    assert sorted(free) == list(range(20))


@pytest.mark.parametrize(
    ("give", "text"),
    [
        (lambda free, n: [free.pop() for _ in range(n - 1)], "expected 3 page ids, got"),
        (lambda free, n: [float(free.pop()) for _ in range(n)], "expected integers, got float64"),
        (lambda free, n: [99] * n, r"expected pages 0\.\.19, got 99\.\.99"),
        (lambda free, n: [5] * n, "expected 3 different pages, got 1"),
        (lambda free, n: [0, 1, 2], r"expected pages not in use, got \[0, 1\]"),
    ],
)
def test_pages_that_an_engine_cannot_have_meant_are_refused(give: Any, text: str) -> None:
    given = [lambda free, n: [0, 1]]
    store, _ = engine_store(20, lambda free, n: given[0](free, n), says=False)
    collector = td.KVCollector(store)
    plan = collector.plan({"a": [td.private(tokens(1, 16))]})
    given[0] = give
    before = store.stats()
    with pytest.raises(ValueError, match=f"allocate: {text}"):
        collector.plan({"b": [td.private(tokens(2, 24))]})
    assert store.stats() == before
    check(store)
    plan.abort()


# What the store gives back ------------------------------------------------------------------------


def test_evict_gives_idle_pages_back_the_longest_unused_first() -> None:
    store, free = engine_store(40, returns_none, says=True)
    collector = td.KVCollector(store, selection=td.Nothing())
    segments = [td.shared(tokens(i, 8 * (i + 1))) for i in range(4)]  # 1, 2, 3, 4 pages
    for i, segment in enumerate(segments):
        run_round(collector, {f"agent {i}": [segment]})
    assert store.evict(100) == 0
    for i in (2, 0, 3):
        store.release(f"agent {i}")
    assert store.stats().evictable_pages == 8
    assert store.evict(0) == 0
    assert store.evict(1) == 3  # that of agent 2
    assert store.scheduler.find(segments[2]) is None
    collector.plan({"x": [segments[0]]}).abort()  # used again
    assert store.evict(2) == 4
    assert store.scheduler.find(segments[0]) is not None
    assert store.evict(100) == 1
    assert store.stats().evictions == 3
    assert store.agents == ["agent 1"]
    assert len(free) == 38
    check(store)


def test_clear_forgets_everything_but_refuses_while_something_lives() -> None:
    store, free = engine_store(40, returns_none, says=True)
    collector = td.KVCollector(store)
    run_round(collector, prompts())
    plan = collector.plan({"x": [td.private([1])]})
    for wait in (False, True):
        with pytest.raises(ValueError, match=r"agents of plans that have not ended, got \['x'\]"):
            store.clear()
        plan.abort()
        plan = collector.plan({"x": [td.private([1])]}, wait=wait)
    run_prefill(collector, plan)
    steps = collector.audit(plan).steps()
    audited = collector.plan(prompts())
    run_prefill(collector, audited)
    steps = collector.audit(audited, fraction=1.0, agents=["a"]).steps()
    step = next(steps)
    plan.commit()
    audited.commit()
    with pytest.raises(ValueError, match=r"got \['a'\]"):
        store.clear()
    step.cancel()
    steps.close()
    store.clear()
    assert (store.agents, store.stats().masters, store.stats().used_pages) == ([], 0, 0)
    assert sorted(free) == list(range(40))
    check(store)
    run_round(collector, prompts())
    check(store)
