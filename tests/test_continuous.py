"""Rounds that trickle in: agents that come late, several plans, steps that mix them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from driving import (
    GEOMETRY,
    make_store,
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
from torch import Tensor

import tokendance as td
from tokendance import Phase
from tokendance.host.selection import Selection

A, B, C = tokens(1, 40), tokens(2, 24), tokens(3, 33)
END = td.private(tokens(13, 9))
SELECTIONS = [td.LeadingTokens(4, unseen=96), td.KeyDeviation(0.3), td.Everything(), td.Nothing()]
by_selection = pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: type(s).__name__)

Outputs = dict[str, list[Tensor]]
"""Of the last layer, by agent: its prompt's last row, and each decoded row."""


def prompts() -> dict[str, list[td.Segment]]:
    """All share three segments, each in an order of its own, behind private parts."""
    a, b, c = td.shared(A), td.shared(B), td.shared(C)
    return {
        "a": [td.private(tokens(10, 13)), a, b, c, END],
        "b": [td.private(tokens(11, 29)), b, a, c, END],
        "c": [td.private(tokens(12, 5)), c, b, a, END],
        "d": [td.private(tokens(14, 21)), a, b, c, END],
    }


def collector_of(selection: Selection | None = None, source: str = "master") -> td.KVCollector:
    return td.KVCollector(make_store(), source, selection)


def check(collector: td.KVCollector) -> None:
    check_books(collector.store.scheduler)


def run(step: td.Step | None, found: Outputs) -> bool:
    """Runs a step, if there is one, and keeps its logit rows."""
    if step is None:
        return False
    out = run_step(step)
    for agent, row in zip(step.logit_agents, out[step.logit_rows], strict=True):
        found.setdefault(agent, []).append(row)
    return True


def run_all(collector: td.KVCollector, found: Outputs, max_rows: int = 8192) -> int:
    steps = 0
    while run(collector.step(max_rows=max_rows), found):
        check(collector)
        steps += 1
    return steps


def assert_close(
    ours: Mapping[str, Sequence[Tensor]], other: Mapping[str, Sequence[Tensor]]
) -> None:
    assert ours.keys() == other.keys()
    for agent in ours:
        mine, theirs = torch.stack(list(ours[agent])), torch.stack(list(other[agent]))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


def expected(agents: Sequence[str], fed: Sequence[int] = ()) -> Outputs:
    """Outputs of agents that share nothing: keys depend on tokens alone here."""
    found: Outputs = {}
    for agent in agents:
        collector = collector_of(td.Everything())
        plan = collector.plan({agent: prompts()[agent]})
        run_all(collector, found)
        for token in fed:
            run(collector.step({agent: [token]}), found)
        plan.abort()
    return found


# What comes late ----------------------------------------------------------------------------------


@by_selection
@pytest.mark.parametrize("source", ["master", "alone", "producer"])
@pytest.mark.parametrize("one_plan", [False, True])
def test_agents_that_come_one_by_one_compute_what_the_round_at_once_computes(
    selection: Selection, source: str, one_plan: bool
) -> None:
    """Each comes while the former is in prefill, and is decoded while others prefill."""
    once = collector_of(selection, source)
    whole = once.plan(prompts())
    found: Outputs = {}
    run_all(once, found)
    for token in (5, 6):
        run(once.step({agent: [token] for agent in prompts()}), found)
    whole.commit()

    collector = collector_of(selection, source)
    plans: list[td.Plan] = []
    late: Outputs = {}
    waiting = {agent: [5, 6] for agent in prompts()}
    for agent, segments in prompts().items():
        if plans and one_plan:
            plans[0].add({agent: segments})
        else:
            plans.append(collector.plan({agent: segments}))
        check(collector)
        assert plans[-1].phase(agent) is Phase.PREFILL
        run(collector.step(max_rows=50), late)
        check(collector)
    while True:
        decode = {a: [ids.pop(0)] for a, ids in waiting.items() if a in late and ids}
        if not run(collector.step(decode, max_rows=60), late):
            break
        check(collector)
    # Three short segments: until an agent makes one of the Masters again, those before it repair
    # more of what the first one made.
    repaired = selection.most if isinstance(selection, td.LeadingTokens) and one_plan else 0
    rows = sum(plan.rows_computed for plan in plans)
    assert rows <= 1.05 * whole.rows_computed + repaired
    assert sum(plan.rows for plan in plans) == whole.rows
    for plan in plans:
        plan.commit()
    check(collector)
    assert_close(late, found)
    for agent in prompts():
        for mine, other in zip(
            restored(collector.store, agent), restored(once.store, agent), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("selection", [td.LeadingTokens(4), td.Everything(), td.Nothing()], ids=str)
def test_agents_that_come_before_the_first_step_get_the_very_bits_of_a_plan_at_once(
    selection: Selection,
) -> None:
    shared = prompts()["a"][1:]
    stores, outputs = [], []
    for late in (False, True):
        collector = collector_of(selection)
        given = {agent: [segments[0], *shared] for agent, segments in prompts().items()}
        first = {"a": given.pop("a")}
        plans = [collector.plan(first if late else {**first, **given})]
        if late:
            plans[0].add({"b": given.pop("b")})
            plans += [collector.plan({agent: segments}) for agent, segments in given.items()]
        elif not isinstance(selection, td.Everything):
            assert plans[0].master_agents == ["a"]
        found: Outputs = {}
        assert run_all(collector, found) == 1
        for plan in plans:
            plan.commit()
        outputs.append(found)
        stores.append(snapshot(collector.store))
    for agent, (row,) in outputs[0].items():
        assert torch.equal(row, outputs[1][agent][0])
    assert same_snapshot(*stores)


def test_a_segment_that_no_agent_of_the_round_has_is_computed_by_who_joins_it() -> None:
    """An agent's own history, stored in another context, as in a round at once."""
    heard = td.shared(A)
    history = {agent: td.shared(tokens(60 + i, 20)) for i, agent in enumerate("abc")}

    def stored() -> td.KVCollector:
        collector = collector_of(td.LeadingTokens(4))
        speaker = [td.private(tokens(70, 11)), *history.values(), END]
        run_round(collector, {"speaker": speaker})
        return collector

    def kinds(plan: td.Plan, agent: str) -> list[str]:
        return [span.kind.value for span in plan.spans(agent)]

    given = {
        agent: [td.private(tokens(80 + i, 5)), history[agent], heard, END]
        for i, agent in enumerate("abc")
    }
    collector = stored()
    whole = collector.plan(given)
    at_once = {agent: kinds(whole, agent) for agent in given}
    whole.abort()
    assert at_once["b"][:1] == ["own"]
    collector = stored()
    plan = collector.plan({"a": given["a"]})
    assert kinds(plan, "a")[:3] == ["own", "repaired", "reused"]  # it cannot tell
    for agent in "bc":
        needed = plan.pages_needed({agent: given[agent]})
        assert needed >= collector.pages_needed({agent: given[agent]})
        before = collector.store.stats()
        plan.add({agent: given[agent]})
        after = collector.store.stats()
        there = before.free_pages + before.evictable_pages
        assert after.free_pages + after.evictable_pages == there - needed
        assert kinds(plan, agent) == at_once[agent]
    run_prefill(collector, plan)
    plan.suspend("b")
    plan.resume("b")  # its own segments are not those of others
    assert kinds(plan, "b") == at_once["b"]
    plan.abort()
    check(collector)


def orders(**given: list[td.Segment]) -> dict[str, list[td.Segment]]:
    """Prompts of shared segments in some order, each behind a private part of its own."""
    return {
        agent: [td.private(tokens(90 + i, 6 + i)), *order, END]
        for i, (agent, order) in enumerate(given.items())
    }


def made_by(plan: td.Plan, agent: str) -> list[bytes]:
    return [use.master.digest for use in plan._live.decisions[agent].made]


def test_who_joins_with_more_in_front_makes_a_master_again() -> None:
    """The first agent's first segment has seen nothing, the other one has it behind all others."""
    a, b, c = td.shared(A), td.shared(B), td.shared(C)
    given = orders(first=[a, b, c], last=[c, b, a], middle=[c, a, b])
    collector = collector_of(td.LeadingTokens(4, unseen=96))
    find = collector.store.scheduler.find
    plan = collector.plan({"first": given["first"]})
    run_prefill(collector, plan)
    first = find(a)
    plan.add({"last": given["last"]})
    assert made_by(plan, "last") == [a.digest]
    assert find(a) not in (None, first)  # whoever comes now waits for it
    check(collector)
    plan.add({"middle": given["middle"]})
    assert made_by(plan, "middle") == [b.digest]  # and not a, which has been made again
    run_prefill(collector, plan)
    second = find(a)
    assert second is not None
    assert second[0].stored
    assert first is not None
    assert not first[0].stored
    plan.suspend("first")  # nobody else has the first one: its pages are free
    assert not first[0].holders
    check(collector)
    plan.resume("first")
    assert made_by(plan, "first") == []
    run_prefill(collector, plan)
    plan.commit()
    check(collector)
    plan = collector.plan({"next round": given["middle"]})
    assert made_by(plan, "next round") == []
    plan.abort()


def test_who_gives_up_a_master_that_it_makes_again_leaves_the_first_one() -> None:
    a, b, c = td.shared(A), td.shared(B), td.shared(C)
    given = orders(first=[a, b, c], last=[c, b, a])
    collector = collector_of(td.LeadingTokens(4, unseen=96))
    plan = collector.plan({"first": given["first"]})
    run_prefill(collector, plan)
    first = collector.store.scheduler.find(a)
    plan.add({"last": given["last"]})
    assert collector.store.scheduler.find(a) != first
    plan.abort("last")
    assert collector.store.scheduler.find(a) == first
    check(collector)
    plan.abort()


def test_an_idle_master_that_is_made_again_gives_its_pages_back() -> None:
    a, b, c = td.shared(A), td.shared(B), td.shared(C)
    given = orders(first=[a, b, c], last=[c, b, a])
    collector = collector_of(td.LeadingTokens(4, unseen=96))
    plan = collector.plan({"first": given["first"]})
    run_prefill(collector, plan)
    plan.abort("first")
    plan.add({"last": given["last"]})
    found = collector.store.scheduler.books.masters[a.digest]
    assert not found.holders
    run_prefill(collector, plan)
    assert not found.stored
    check(collector)  # nobody has its pages
    plan.abort()


@pytest.mark.parametrize("selection", [td.Nothing(), td.Everything()], ids=str)
def test_no_master_is_made_again_where_what_it_saw_does_not_matter(selection: Selection) -> None:
    a, b, c = td.shared(A), td.shared(B), td.shared(C)
    plan = collector_of(selection).plan({})
    for agent, segments in orders(first=[a, b, c], last=[c, b, a]).items():
        plan.add({agent: segments})
    assert made_by(plan, "last") == []
    plan.abort()


def test_a_master_that_another_agent_takes_over_exactly_is_not_made_again() -> None:
    a, b, c = td.shared(A), td.shared(B), td.shared(C)
    given = orders(first=[a, b, c], last=[c, b, a])
    plan = collector_of(td.LeadingTokens(4)).plan({})
    for agent in ("first", "twin"):
        plan.add({agent: given["first"]})
    plan.add({"last": given["last"]})
    assert made_by(plan, "last") == []
    plan.abort()


ENDS: dict[str, Callable[[td.KVCollector, td.Plan], object]] = {
    "goes on": lambda collector, plan: None,
    "aborts": lambda collector, plan: plan.abort("a"),
    "fails": lambda collector, plan: fail(collector.step(prefill=["a"])),
    "is suspended": lambda collector, plan: plan.suspend("a"),
    "is dropped": lambda collector, plan: None,
}


def fail(step: td.Step | None) -> None:
    assert step is not None
    with pytest.raises(LookupError):
        _fail(step)


def _fail(step: td.Step) -> None:
    with step:
        step.attend(0, *project(step.token_ids, 0))
        raise LookupError("the engine's own mistake")


@pytest.mark.parametrize("end", [*ENDS, "commits"])
def test_a_master_serves_from_its_last_row_on(end: str) -> None:
    collector = collector_of(td.Nothing())
    plan = collector.plan({"a": prompts()["a"]})
    found: Outputs = {}
    if end == "commits":
        run_all(collector, found)
        plan.commit()
    else:
        run(collector.step(max_rows=13 + 40 + 3), found)  # all of A, three rows of B
        ENDS[end](collector, plan)
        if end == "is dropped":
            with pytest.warns(ResourceWarning, match=r"got \['a'\] left"):
                del plan
    late = collector.plan({"x": [td.private(tokens(15, 6)), td.shared(A), END]})
    check(collector)
    spans = [(span.end, span.kind.value) for span in late.spans("x")]
    assert spans == [(6, "own"), (46, "reused"), (55, "own")]
    found = {}
    run(collector.step(prefill=["x"]), found)
    assert late.rows_computed == 6 + 9
    assert set(found) == {"x"}
    late.commit()
    check(collector)


def test_a_master_is_not_found_before_its_agent_has_announced_it_or_after_it_gave_up() -> None:
    """Rows that an aborted agent has not computed are computed by who comes next."""
    collector = collector_of(td.Nothing())
    plan = collector.plan({"a": prompts()["a"]})
    waiting = collector.plan({"w": [td.private(tokens(15, 6)), td.shared(A), END]})
    plan.abort()  # A is completed for w, B and C are not
    check(collector)
    found: Outputs = {}
    late = collector.plan({"x": [td.private(tokens(16, 4)), td.shared(B), td.shared(A), END]})
    spans = [(span.end, span.kind.value) for span in late.spans("x")]
    assert spans == [(4, "own"), (28, "master"), (68, "reused"), (77, "own")]
    run_all(collector, found)
    dense: Outputs = {}
    alone = collector_of(td.Everything())
    segments = {
        "w": [td.private(tokens(15, 6)), td.shared(A), END],
        "x": [td.private(tokens(16, 4)), td.shared(B), td.shared(A), END],
    }
    with alone.plan(segments):
        run_all(alone, dense)
    assert_close(found, dense)
    waiting.commit()
    late.commit()
    check(collector)


# Waiting for rows ---------------------------------------------------------------------------------


def rows_of(step: td.Step) -> dict[str | None, list[int]]:
    """Positions of the step's rows, by agent."""
    rows: dict[str | None, list[int]] = {}
    for agent, position in zip(step.agents, step.record.positions.tolist(), strict=True):
        rows.setdefault(agent, []).append(position)
    return rows


def test_who_comes_late_waits_for_just_the_rows_that_it_sees() -> None:
    collector = collector_of(td.Nothing())
    first = collector.plan({"a": prompts()["a"]})
    run_step(collector.step(max_rows=20))  # seven rows of A
    late = collector.plan({"x": [td.private(tokens(15, 6)), td.shared(A), END]})
    # Nothing stands between x and rows that no Master of others is needed for.
    step = collector.step(prefill=["x"], max_rows=10)
    assert rows_of(step) == {"a": list(range(20, 30))}
    run_step(step)
    step = collector.step(prefill=["x"], max_rows=30)
    assert rows_of(step) == {"a": list(range(30, 53)), "x": [*range(6), 46]}
    run_step(step)
    step = collector.step(prefill=["x"], max_rows=30)
    assert rows_of(step) == {"x": list(range(47, 55))}
    run_step(step)
    assert late.phase("x") is Phase.DECODE
    late.commit()
    assert first.phase("a") is Phase.PREFILL
    assert collector.step(prefill=()) is None
    step = collector.step(prefill=["a"])
    assert rows_of(step) == {"a": list(range(53, 13 + 40 + 24 + 33 + 9))}
    step.cancel()
    check(collector)


def test_rows_before_an_awaited_master_do_not_wait() -> None:
    collector = collector_of(td.Nothing())
    first = collector.plan({"a": prompts()["a"]})
    late = collector.plan({"x": [td.private(tokens(15, 6)), td.shared(A), END]})
    step = collector.step(prefill=["a"], max_rows=30)  # open: a can be in no other step
    other = collector.step(prefill=["x"])
    assert rows_of(other) == {"x": list(range(6))}
    assert collector.step() is None
    run_step(other)
    assert collector.step() is None
    run_step(step)
    step = collector.step()
    assert set(rows_of(step)) == {"a", "x"}
    run_step(step)
    assert [plan.phase(plan.agents[0]) for plan in (first, late)] == [Phase.DECODE] * 2
    check(collector)


@by_selection
@pytest.mark.parametrize("max_rows", [1, 7, 64])
def test_chains_of_agents_that_wait_for_each_other(selection: Selection, max_rows: int) -> None:
    """Each waits for a Master of the one before it; the last one alone is asked for."""
    segments = [td.shared(tokens(40 + i, 20)) for i in range(5)]
    chain = {
        f"agent {i}": [td.private(tokens(50 + i, 3 + i)), segments[i], segments[i + 1], END]
        for i in range(4)
    }
    collector = collector_of(selection)
    plans = [collector.plan({agent: prompt}) for agent, prompt in chain.items()]
    found: Outputs = {}
    while run(collector.step(prefill=["agent 3"], max_rows=max_rows), found):
        check(collector)
    assert "agent 3" in found
    run_all(collector, found, max_rows)
    dense: Outputs = {}
    alone = collector_of(td.Everything())
    with alone.plan(chain):
        run_all(alone, dense)
    assert_close(found, dense)
    for plan in plans:
        plan.commit()
    check(collector)


# What others see ----------------------------------------------------------------------------------


def test_own_rows_are_visible_to_nobody_before_commit_and_outputs_only_then() -> None:
    collector = collector_of(td.LeadingTokens(4), "producer")
    store = collector.store
    mine = tokens(20, 30)
    plan = collector.plan({"a": [td.private(mine), td.shared(A), END]})
    run_prefill(collector, plan)
    run_step(collector.step({"a": [1, 2, 3, 4, 5, 6, 7, 8]}, prefill=()))
    output = td.shared([1, 2, 3, 4, 5, 6, 7, 8])
    assert store.agents == []
    with pytest.raises(KeyError):
        store.length("a")
    for segment in (td.shared(mine), td.private(mine), output):
        assert store.scheduler.find(segment) is None
    assert store.scheduler.find(td.shared(A)) is not None
    other = collector.plan({"b": [td.shared(mine), output, td.shared(A)]})
    origins = {span.kind.value for span in other.spans("b")[:1]}
    assert origins == {"master"}
    other.abort()
    plan.commit()
    assert store.scheduler.find(output) is not None
    assert store.scheduler.find(td.shared(mine)) is None
    assert store.agents == ["a"]
    check(collector)


def test_repaired_rows_of_a_sibling_change_nothing_for_others() -> None:
    outputs = []
    for with_sibling in (False, True):
        collector = collector_of(td.LeadingTokens(4))
        plans = [collector.plan({"a": prompts()["a"]})]
        run_all(collector, {})
        if with_sibling:
            plans.append(collector.plan({"b": prompts()["b"]}))
            run_all(collector, {})
            assert plans[1].rows_overridden > 0
        plans.append(collector.plan({"c": prompts()["c"]}))
        found: Outputs = {}
        run_all(collector, found)
        outputs.append(found["c"][0])
    assert torch.equal(*outputs)


def test_an_agent_lives_in_one_plan_at_a_time() -> None:
    collector = collector_of()
    given = {"a": prompts()["a"]}
    plan = collector.plan(given)

    def refused() -> None:
        before = collector.store.stats()
        for wait in (False, True):
            with pytest.raises(ValueError, match="agents of no live plan, got 'a' a second time"):
                collector.plan({"x": [END], **given}, wait=wait)
            with pytest.raises(ValueError, match="agents of no live plan, got 'a' a second time"):
                plan.add(given, wait=wait)
        assert collector.store.stats() == before
        assert plan.agents == ["a"]
        check(collector)

    refused()
    run_prefill(collector, plan)
    refused()
    plan.suspend("a")
    refused()
    plan.abort()
    check(collector)
    again = collector.plan(given)
    with pytest.raises(ValueError, match="agents of no live plan, got 'a' a second time"):
        plan.add(given)
    again.abort()


# Ends ---------------------------------------------------------------------------------------------


MAKER_ENDS = ["abort", "step of both", "step of its own", "dropped", "suspended", "left by with"]


@by_selection
@pytest.mark.parametrize("end", MAKER_ENDS)
@pytest.mark.parametrize("run_before", [0, 3])
def test_others_that_wait_outlive_the_plan_that_computes_for_them(
    selection: Selection, end: str, run_before: int
) -> None:
    collector = collector_of(selection)
    plan = collector.plan({"a": prompts()["a"]})
    waiting = collector.plan({"b": prompts()["b"]})
    added = collector.plan({"c": prompts()["c"]})
    for _ in range(run_before):
        run_step(collector.step(prefill=["a"], max_rows=19))
    survivors = ["b", "c"]
    if end == "abort":
        plan.abort()
    elif end == "suspended":
        plan.suspend("a")
    elif end == "step of its own":
        fail(collector.step(prefill=["a"], max_rows=19))
    elif end == "step of both":
        step = collector.step(prefill=["a", "b"])
        survivors = ["c"] if "b" in step.agents else survivors
        fail(step)
        assert waiting.ended == ("b" not in survivors)
    elif end == "left by with":
        with pytest.raises(LookupError), plan:
            raise LookupError
    else:
        with pytest.warns(ResourceWarning, match="commit or abort of every agent"):
            del plan
    check(collector)
    found: Outputs = {}
    run_all(collector, found, 37)
    assert_close({agent: found[agent] for agent in survivors}, expected(survivors))
    if end == "suspended":
        plan.resume("a")
        run_all(collector, found)
        assert_close({"a": found["a"]}, expected(["a"]))
        plan.abort()
    for agent, one in (("b", waiting), ("c", added)):
        if agent in survivors:
            one.commit()
            collector.store.release(agent)
    check(collector)
    assert same_snapshot(without_idle(collector.store), without_idle(make_store()))


def test_an_exception_ends_the_plans_of_its_step_and_no_other() -> None:
    collector = collector_of(td.Nothing())
    store = collector.store
    plans = {agent: collector.plan({agent: segments}) for agent, segments in prompts().items()}
    run_step(collector.step(prefill=["a"]))
    assert plans["a"].phase("a") is Phase.DECODE
    run_step(collector.step({"a": [7]}, prefill=["d"]))
    fail(collector.step({"a": [1]}, prefill=["b"]))
    assert [plan.ended for plan in plans.values()] == [True, True, False, False]
    check(collector)
    assert store.scheduler.find(td.shared(A)) is not None  # finished Masters stay
    found: Outputs = {}
    run(collector.step({"d": [5]}), found)
    run_all(collector, found)
    assert_close({"c": found["c"]}, expected(["c"]))
    plans["c"].commit()
    plans["d"].commit()
    assert store.agents == ["c", "d"]
    check(collector)


def test_an_open_step_of_another_plan_survives_if_its_rows_do() -> None:
    collector = collector_of(td.Nothing())
    plan = collector.plan({"a": prompts()["a"], "z": [END]})
    other = collector.plan({"b": prompts()["b"]})
    mixed = collector.step(prefill=["a", "b"])
    assert {"a", "b"} <= set(mixed.agents)
    plan_step = collector.step(prefill=["z"])
    fail(plan_step)
    assert plan.ended
    check(collector)
    found: Outputs = {}
    run(mixed, found)  # of a, which is computed for b alone now
    check(collector)
    assert_close({"b": found["b"]}, expected(["b"]))
    other.commit()
    check(collector)

    gone = collector.plan({"a": [td.private(tokens(3, 30))], "z": [END]})
    kept = collector.plan({"c": [td.private(tokens(4, 30))]})
    mixed = collector.step(prefill=["a", "c"])
    fail(collector.step(prefill=["z"]))
    assert gone.ended
    check(collector)  # the pages of a are kept for the step
    run(mixed, found)
    check(collector)
    run_prefill(collector, kept)
    kept.commit()
    check(collector)


def test_a_dropped_plan_gives_its_pages_back() -> None:
    collector = collector_of()
    empty = snapshot(collector.store)
    plan = collector.plan({agent: prompts()[agent] for agent in ("a", "b")})
    run_step(collector.step(max_rows=5))
    step = collector.step(max_rows=5)
    with pytest.warns(ResourceWarning, match=r"before the plan is dropped, got \['a', 'b'\] left"):
        del plan
    with pytest.warns(ResourceWarning, match="a step to be run or cancelled"):
        del step
    assert same_snapshot(snapshot(collector.store), empty)
    check(collector)
    assert collector.step() is None
    plan = collector.plan({"a": prompts()["a"]})  # the names are free again
    plan.abort()
    del plan
    with pytest.warns(ResourceWarning, match=r"got \['a'\] left"):
        collector.plan({"a": prompts()["a"]}, wait=True)
    assert collector.step() is None


# What one sees ------------------------------------------------------------------------------------


def test_repr_tells_what_one_wants_to_see() -> None:
    store = make_store("256KiB")
    collector = td.KVCollector(store)
    pages = store.stats().total_pages
    assert repr(store) == (
        f"DiffStore(0 agents, 0 Masters; pages: {pages} free, 0 evictable, 0 held)"
    )
    assert repr(collector) == (
        f"KVCollector({store!r}, source=master, "
        "selection=LeadingTokens(count=12, unseen=None, most=24))"
    )
    plan = collector.plan({"a": prompts()["a"], "b": prompts()["d"]})
    assert repr(plan) == "Plan(2 agents: 2 prefill; 0 of 246 prompt rows computed)"
    step = collector.step(max_rows=20)
    assert repr(step) == "Step(20 rows of 1 agents, not entered)"
    with step:
        assert repr(step) == "Step(20 rows of 1 agents, open)"
        for layer in range(GEOMETRY.num_layers):
            step.attend(layer, *project(step.token_ids, layer))
    assert repr(step) == "Step(20 rows of 1 agents, ended)"
    run_prefill(collector, plan)
    plan.suspend("b")
    plan.add({"w": [td.private(tokens(9, 8 * pages - 50))]}, wait=True)
    assert plan.phase("w") is Phase.WAITING
    assert repr(plan).startswith("Plan(3 agents: 1 waiting, 1 decode, 1 suspended; ")
    plan.commit("a")
    plan.abort()
    assert repr(plan).startswith("Plan(3 agents: 3 ended; ")
    assert repr(store).startswith("DiffStore(1 agents, 3 Masters; pages: ")


# KeyDeviation -------------------------------------------------------------------------------------


def test_each_plan_chooses_its_rows_once() -> None:
    collector = collector_of(td.KeyDeviation(0.3))
    first = collector.plan({agent: prompts()[agent] for agent in ("a", "b")})
    late = collector.plan({"c": prompts()["c"]})
    step = collector.step()
    choices = step.record.choices
    # b of the first plan, and c of the other, choose from the Masters of a, each for itself.
    assert sorted(len(one.fresh) for one in choices) == [1] * 6
    assert sorted(one.count for one in choices) == sorted([12, 8, 10] * 2)
    run_step(step)
    check(collector)
    assert first.rows_overridden == late.rows_overridden == 12 + 8 + 10
    # Who joins the first plan later takes over what was chosen there.
    first.add({"d": prompts()["d"]})
    step = collector.step()
    assert not step.record.choices
    assert step.record.num_rows == 21 + 9 + 12 + 8 + 10
    found: Outputs = {}
    run(step, found)
    assert_close(found, expected(["d"]))
    rows = {
        agent: [use.overridden(8).tolist() for use in plan._live.state(agent).uses]
        for plan, agent in ((first, "b"), (first, "d"))
    }
    assert sorted(rows["b"]) == sorted(rows["d"])
    first.commit()
    late.commit()
    check(collector)


# Mixed steps --------------------------------------------------------------------------------------


@by_selection
@pytest.mark.parametrize("source", ["master", "alone", "producer"])
def test_steps_that_mix_decode_and_prefill_equal_separate_ones(
    selection: Selection, source: str
) -> None:
    outputs, stores = [], []
    for mixed in (False, True):
        collector = collector_of(selection, source)
        early = collector.plan({agent: prompts()[agent] for agent in ("a", "b")})
        found: Outputs = {}
        run_all(collector, found)
        late = collector.plan({agent: prompts()[agent] for agent in ("c", "d")})
        fed = {"a": [1], "b": [2, 3, 4]}
        if mixed:
            step = collector.step(fed)
            assert step.agents[:4] == ["a", "b", "b", "b"]
            assert set(step.agents[4:]) == {"c", "d"}
            run(step, found)
        else:
            run(collector.step(fed, prefill=()), found)
            run(collector.step(prefill=["c", "d"]), found)
        assert collector.step() is None
        early.commit()
        late.commit()
        check(collector)
        outputs.append(found)
        stores.append(collector.store)
    assert [len(outputs[0][agent]) for agent in "abcd"] == [2, 4, 1, 1]
    assert_close(*outputs)
    assert stores[0].stats() == stores[1].stats()
    for agent in stores[0].agents:
        for mine, other in zip(*(restored(store, agent) for store in stores), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)


def test_decode_rows_come_first_and_prefill_has_the_room_that_they_leave() -> None:
    collector = collector_of(td.Nothing())
    plan = collector.plan({"a": [td.private(tokens(3, 10))]})
    run_prefill(collector, plan)
    plan.add({"b": [td.private(tokens(4, 10))]})
    step = collector.step({"a": [1, 2, 3]}, max_rows=5)
    assert rows_of(step) == {"a": [10, 11, 12], "b": [0, 1]}
    assert step.logit_agents == ["a"] * 3
    run_step(step)
    step = collector.step({"a": [1, 2, 3, 4, 5, 6]}, max_rows=5)
    assert rows_of(step) == {"a": list(range(13, 19))}
    run_step(step)
    plan.abort()


def test_source_alone_is_computed_once_for_plans_that_come_one_by_one() -> None:
    collector = collector_of(td.Nothing(), "alone")
    plans, found = [], {}
    for agent, segments in prompts().items():
        plans.append(collector.plan({agent: segments}))
        check(collector)
        run(collector.step(max_rows=30), found)
    run_all(collector, found)
    # Three segments once, then private rows; every prompt ends in END.
    assert sum(plan.rows_computed for plan in plans) == 40 + 24 + 33 + 13 + 29 + 5 + 21 + 4 * 9
    assert not collector.store.scheduler.roster.orphans
    for plan in plans:
        assert plan.master_agents == []
        plan.commit()
    masters = collector.store.books.masters.values()
    assert sorted(master.length for master in masters) == [24, 33, 40]
    assert {master.origin for master in masters} == {0}
    check(collector)


def test_outputs_of_producers_serve_plans_that_come_before_others_have_ended() -> None:
    collector = collector_of(td.Nothing(), "producer")
    plan = collector.plan({agent: prompts()[agent] for agent in ("a", "b")})
    run_prefill(collector, plan)
    ids = list(range(30, 42))
    for token in ids:
        run_step(collector.step({"a": [token], "b": [token + 1]}))
    plan.commit("a")
    assert plan.phase("b") is Phase.DECODE
    late = collector.plan({"x": [td.private(tokens(15, 6)), td.shared([*ids, 99]), END]})
    spans = [(span.end, span.kind.value) for span in late.spans("x")]
    assert spans == [(6, "own"), (18, "reused"), (19, "own"), (28, "own")]
    found: Outputs = {}
    run(collector.step({"b": [50]}), found)
    assert set(found) == {"b", "x"}
    plan.commit()
    late.commit()
    check(collector)


def test_dense_caches_are_not_encoded_against_masters_that_are_being_computed() -> None:
    dense, given = {}, {"x": [td.private(tokens(15, 6)), td.shared(A), td.shared(B)]}
    source = collector_of(td.Everything())
    run_round(source, given)
    dense["x"] = tuple(map(list, zip(*restored(source.store, "x"), strict=True)))
    collector = collector_of(td.Nothing())
    store = collector.store
    plan = collector.plan({"a": prompts()["a"]})
    run_step(collector.step(max_rows=13 + 40 + 3))  # all of A, three rows of B
    store.put_round(dense, given)
    assert store.scheduler.find(td.shared(B))[0].is_computed
    assert all(master.is_computed for master in store.mirror("x").uses.masters)
    check(collector)
    before = restored(store, "x")
    run_prefill(collector, plan)
    check(collector)
    for now, then, there in zip(
        restored(store, "x"), before, restored(source.store, "x"), strict=True
    ):
        for mine, old, other in zip(now, then, there, strict=True):
            assert torch.equal(mine, old)
            assert torch.equal(mine, other)
    plan.commit()
    check(collector)


def test_rows_to_be_chosen_bring_all_that_they_see() -> None:
    """Who waits for the first Master of an agent whose rows are chosen from a later one waits for
    that one too: the agent's rows are in one step."""
    collector = collector_of(td.Everything())
    chosen = td.KVCollector(collector.store, selection=td.KeyDeviation(0.3))
    first = collector.plan({"x": [td.shared(B)]})
    second = chosen.plan({"y": [td.shared(A), td.shared(B), END]})
    third = collector.plan({"z": [td.shared(A), END]})
    while third.phase("z") is Phase.PREFILL:
        run_step(collector.step(prefill=["z"]))
    assert first.phase("x") is second.phase("y") is Phase.DECODE
    for plan in (first, second, third):
        plan.abort()
    check(collector)
