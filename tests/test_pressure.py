"""Memory that runs out: exact needs, waiting, preemption, eviction, and an engine on top."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from drawn_prompts import SELECTIONS, SOURCES, prompts_of, segments_of
from driving import (
    GEOMETRY,
    ROPE,
    run_prefill,
    tokens,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from symbolic_device import SymbolicDevice, check_books, profile

import tokendance as td
from tokendance import Phase
from tokendance.host.books import OutOfPagesError
from tokendance.host.plan import Plan, Policy
from tokendance.host.scheduler import Scheduler

BLOCK = 8


# Exact needs --------------------------------------------------------------------------------------


policies = st.builds(
    Policy,
    st.sampled_from(SELECTIONS),
    st.sampled_from(SOURCES),
)


# The same cases in every run: a new one found elsewhere says nothing about the change at hand.
@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.data())
def test_a_plan_fits_exactly_if_as_many_pages_as_needed_are_free_or_evictable(
    data: st.DataObject,
) -> None:
    device = SymbolicDevice(profile(data.draw(st.integers(4, 60))))
    scheduler, books = device.scheduler, device.scheduler.books
    live: list[Plan] = []
    for number in range(data.draw(st.integers(1, 8))):
        names = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
        taken = [name for plan in live for name in plan.agents if plan.is_active(name)]
        prompts = {
            f"agent {name}": segments_of(name, data.draw(prompts_of))
            for name in names
            if f"agent {name}" not in taken
        }
        policy = data.draw(policies)
        needed = scheduler.pages_needed(prompts, policy)
        there = books.free_pages + books.evictable_pages
        check_books(scheduler, device.free)
        try:
            plan = scheduler.plan(prompts, policy)
        except OutOfPagesError:
            assert needed > there, number
        else:
            assert needed <= there, number
            live.append(plan)
        check_books(scheduler, device.free)
        act = data.draw(st.sampled_from(["run", "chunk", "commit", "abort", "release"]))
        if act == "run":
            run_all(device)
        elif act == "chunk" and (step := scheduler.step(max_rows=13)):
            device.run(step)
        elif act == "commit":
            run_all(device)
            for plan in live:
                plan.commit()
        elif act == "abort" and live:
            live[data.draw(st.integers(0, len(live) - 1))].abort()
        elif act == "release" and books.mirrors:
            books.drop(data.draw(st.sampled_from(sorted(books.mirrors))))
        check_books(scheduler, device.free)
    for plan in live:
        plan.abort()
    check_books(scheduler, device.free)


def run_all(device: SymbolicDevice, max_rows: int = 2048) -> int:
    steps = 0
    while step := device.scheduler.step(max_rows=max_rows):
        device.run(step)
        steps += 1
    return steps


def test_a_prompt_that_joins_a_round_needs_the_pages_that_it_needs_alone() -> None:
    """A segment that it holds twice has a Master for each place: they fit a pool of just those."""
    twice = [td.shared(tokens(1, 40))] * 2
    capacity = 10 * 8 * GEOMETRY.row_bytes
    store = td.DiffStore(GEOMETRY, ROPE, capacity, block_size=8)
    collector = td.KVCollector(store, selection=td.LeadingTokens(24))
    plan = collector.plan({"first": []})
    assert plan.pages_needed({"late": twice}) == collector.pages_needed({"late": twice}) == 10
    plan.add({"late": twice})
    run_prefill(collector, plan)
    plan.commit()
    assert collector.store.stats().held_pages == 10


# An engine that lives on it -----------------------------------------------------------------------


@dataclass
class Request:
    """One agent's prompt in one round: when it comes, how many tokens it decodes, how it ends."""

    agent: str
    segments: list[td.Segment]
    arrival: int
    tokens: int
    end: str  # "commit", "abort", or "cancel" (aborted after half of its tokens)
    plan: Plan | None = None
    fed: int = 0

    @property
    def wanted(self) -> int:
        return self.tokens // 2 if self.end == "cancel" else self.tokens

    def phase(self) -> Phase:
        assert self.plan is not None
        return self.plan.phase(self.agent)


@dataclass
class Engine:
    """Admits by `pages_needed`, preempts the youngest, resumes the oldest first.

    Attributes:
        waits: leaves admission to the scheduler (``wait=True``).
        to: where preempted agents' rows go.
        one_plan: all requests are added to one plan while it lives.
    """

    device: SymbolicDevice
    requests: list[Request]
    policy: Policy
    max_rows: int
    to: str
    waits: bool = False
    one_plan: bool = False
    time: int = 0
    alive: list[Request] = field(default_factory=list)
    suspensions: int = 0
    plan: Plan | None = None

    @property
    def scheduler(self) -> Scheduler:
        return self.device.scheduler

    @property
    def there(self) -> int:
        return self.scheduler.books.free_pages + self.scheduler.books.evictable_pages

    def check(self) -> None:
        check_books(self.scheduler, self.device.free)

    def run(self) -> None:
        queue = sorted(self.requests, key=lambda one: one.arrival)
        patience = 100 + 20 * sum(10 + one.tokens + len(one.segments) for one in queue)
        while queue or self.alive:
            self.time += 1
            assert self.time < patience, "the engine gets nowhere"
            self.resume()
            self.admit(queue)
            before = self.suspensions
            step = self.step()
            if step is None:
                if not self.end_finished() and self.suspensions == before:
                    self.make_room(queue)
                continue
            self.device.run(step)
            self.check()
            self.end_finished()

    def suspended(self) -> list[Request]:
        return [one for one in self.alive if one.phase() is Phase.SUSPENDED]

    def resume(self) -> None:
        for one in self.suspended():
            assert one.plan is not None
            needed = one.plan.pages_to_resume(one.agent)
            if needed > self.there:
                with pytest.raises(OutOfPagesError):
                    one.plan.resume(one.agent)
                self.check()
                assert one.phase() is Phase.SUSPENDED
                return
            one.plan.resume(one.agent)
            self.check()

    def admit(self, queue: list[Request]) -> None:
        while queue and queue[0].arrival <= self.time:
            one = queue[0]
            if any(other.agent == one.agent for other in self.alive):
                return
            prompts = {one.agent: one.segments}
            joins = self.one_plan and self.plan is not None and one.agent not in self.plan.agents
            if not self.waits:
                needed = (
                    self.plan.pages_needed(prompts)
                    if joins and self.plan is not None
                    else self.scheduler.pages_needed(prompts, self.policy)
                )
                if self.suspended() or needed > self.there:
                    return
            if joins and self.plan is not None:
                self.plan.add(prompts, wait=self.waits)
            else:
                self.plan = self.scheduler.plan(prompts, self.policy, wait=self.waits)
            one.plan = self.plan
            self.alive.append(queue.pop(0))
            self.check()

    def step(self) -> Any:
        while True:
            decode = {
                one.agent: [one.fed]
                for one in self.alive
                if one.phase() is Phase.DECODE and one.fed < one.wanted
            }
            try:
                step = self.scheduler.step(decode, max_rows=self.max_rows)
            except OutOfPagesError:
                self.check()
                self.preempt()
                continue
            self.check()
            if step is not None:
                for one in self.alive:
                    one.fed += one.agent in decode
            return step

    def preempt(self) -> None:
        """Suspends the youngest agent that has pages."""
        one = [r for r in self.alive if r.phase() in (Phase.DECODE, Phase.PREFILL)][-1]
        self.suspensions += 1
        assert one.plan is not None
        if self.to == "host" and one.phase() is Phase.DECODE:
            try:
                one.plan.suspend(one.agent, to="host")
                self.check()
                return
            except OutOfPagesError:
                self.check()
        one.plan.suspend(one.agent)
        self.check()

    def make_room(self, queue: list[Request]) -> None:
        """Nothing runs, and the next does not fit: what others hold has to go."""
        for one in reversed(self.suspended()):
            assert one.plan is not None
            if one.agent in one.plan._live.by_name:  # in host memory; its Masters are held
                one.plan.suspend(one.agent)
                self.check()
                return
        mirrors = self.scheduler.books.mirrors
        if mirrors:
            self.scheduler.books.drop(next(iter(mirrors)))
            self.check()
            return
        assert not self.alive, "it does not fit into an empty pool"
        assert queue[0].arrival > self.time

    def end_finished(self) -> bool:
        ended = [one for one in self.alive if one.phase() is Phase.DECODE and one.fed == one.wanted]
        for one in ended:
            assert one.plan is not None
            assert one.plan.output(one.agent) == list(range(one.fed))
            one.plan.commit(one.agent) if one.end == "commit" else one.plan.abort(one.agent)
            self.alive.remove(one)
            self.check()
        return bool(ended)


def pages_alone(one: Request, policy: Policy) -> int:
    """Pages of a request that finds nothing stored."""
    needed = Scheduler(profile(4096)).pages_needed({one.agent: one.segments}, policy)
    return needed + -(-one.tokens // BLOCK)


@settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.data())
def test_an_engine_that_preempts_the_youngest_finishes_whatever_fits_alone(
    data: st.DataObject,
) -> None:
    policy = data.draw(policies)
    requests = [
        Request(
            f"agent {data.draw(st.integers(0, 9))}",
            segments_of(number, data.draw(prompts_of)),
            data.draw(st.integers(0, 30)),
            data.draw(st.integers(0, 30)),
            data.draw(st.sampled_from(["commit", "commit", "abort", "cancel"])),
        )
        for number in range(data.draw(st.integers(1, 8)))
    ]
    least = max(pages_alone(one, policy) for one in requests)
    pages = max(1, least + data.draw(st.integers(0, 20)))
    to = data.draw(st.sampled_from(["nowhere", "host"]))
    device = SymbolicDevice(
        profile(pages, host_pages=data.draw(st.sampled_from([0, 5, 200]))),
        copies_at_once=data.draw(st.booleans()),
    )
    engine = Engine(
        device,
        requests,
        policy,
        data.draw(st.sampled_from([5, 33, 2048])),
        to,
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    engine.run()
    books = device.scheduler.books
    for agent in list(books.mirrors):
        books.drop(agent)
    books.evict(books.num_pages)
    assert books.used_pages == 0
    assert len(device.free) == pages
    assert not device.scheduler.roster.states


# Waiting ------------------------------------------------------------------------------------------


def test_prompts_that_wait_are_admitted_in_order_and_after_the_decoded_rows() -> None:
    device = SymbolicDevice(profile(10))
    scheduler = device.scheduler
    first = scheduler.plan({"a": [td.private(tokens(1, 40))]})  # 5 pages
    run_all(device)
    second = scheduler.plan({"b": [td.private(tokens(2, 48))]}, wait=True)  # 6 of 5
    small = scheduler.plan({"c": [td.private(tokens(3, 8))]}, wait=True)  # would fit
    assert [plan.phase(*plan.agents) for plan in (second, small)] == [Phase.WAITING] * 2
    check_books(scheduler, device.free)
    assert scheduler.step() is None
    with pytest.raises(ValueError, match=r"expected one that has pages, got 'b' \(waiting\)"):
        second.length("b")
    for act in (second.spans, lambda agent: second.suspend(agent), second.commit):
        with pytest.raises(ValueError, match=r"pages, got 'b' \(waiting\)"):
            act("b")
    with pytest.raises(ValueError, match=r"decode: .*|agent: .*\(waiting\)"):
        scheduler.step({"b": [1]})
    device.run(scheduler.step({"a": [5]}))  # a sixth page
    assert second.phase("b") is Phase.WAITING
    first.abort("a")
    # Nobody is admitted before a step is planned, and then all that fit, in order.
    assert small.phase("c") is Phase.WAITING
    step = scheduler.step()
    assert list(dict.fromkeys(step.agents)) == ["b", "c"]
    device.run(step)
    for plan in (second, small):
        plan.commit()
    check_books(scheduler, device.free)


def test_decoded_rows_have_pages_before_those_who_wait() -> None:
    device = SymbolicDevice(profile(10))
    scheduler = device.scheduler
    first = scheduler.plan({"a": [td.private(tokens(1, 40))], "b": [td.private(tokens(2, 16))]})
    run_all(device)
    waiting = scheduler.plan({"c": [td.private(tokens(3, 32))]}, wait=True)  # 4 of 3
    first.abort("b")  # 5 free: the decoded row takes one of them, c the rest
    step = scheduler.step({"a": [7]})
    assert step.agents == ["a"] + ["c"] * 32
    device.run(step)
    late = scheduler.plan({"d": [td.private(tokens(4, 8))]}, wait=True)
    device.run(scheduler.step({"a": [7] * 7}))
    with pytest.raises(OutOfPagesError):
        scheduler.step({"a": [8]})
    assert late.phase("d") is Phase.WAITING
    waiting.abort()
    # One page for the decoded row; three are left.
    assert set(scheduler.step({"a": [8]}).agents) == {"a", "d"}


def test_who_waits_may_be_aborted_and_lets_others_pass() -> None:
    device = SymbolicDevice(profile(8))
    scheduler = device.scheduler
    first = scheduler.plan({"a": [td.private(tokens(1, 40))]})
    both = {"b": [td.private(tokens(2, 24))], "c": [td.private(tokens(3, 24))]}
    waiting = scheduler.plan(both, wait=True)
    last = scheduler.plan({"d": [td.private(tokens(4, 8))]}, wait=True)
    assert scheduler.step(prefill=()) is None
    waiting.abort("c")
    assert waiting.phase("c") is Phase.ENDED
    with pytest.raises(ValueError, match="has had pages, got 'c'"):
        waiting.spans("c")
    check_books(scheduler, device.free)
    assert scheduler.step(prefill=()) is None  # b, and nobody after it
    assert [waiting.phase("b"), last.phase("d")] == [Phase.PREFILL, Phase.WAITING]
    check_books(scheduler, device.free)
    waiting.abort()
    assert scheduler.step(prefill=()) is None
    assert last.phase("d") is Phase.PREFILL
    first.abort()
    last.abort()
    check_books(scheduler, device.free)
    assert not scheduler._admission.has_waiting


def test_only_what_can_never_fit_is_refused_at_once() -> None:
    device = SymbolicDevice(profile(10))
    scheduler = device.scheduler
    with pytest.raises(OutOfPagesError, match="at most 10 pages, got 11; they would wait for ever"):
        scheduler.plan({"a": [td.private(tokens(1, 81))]}, wait=True)
    check_books(scheduler, device.free)
    shared = td.shared(tokens(2, 64))  # 8 pages
    plan = scheduler.plan({"a": [shared]})
    run_all(device)
    plan.commit()
    # Beside the Master 6 pages of its own are too many, and so are 14 without it.
    prompts = {"b": [td.private(tokens(3, 40)), shared, td.private(tokens(4, 8))]}
    with pytest.raises(OutOfPagesError, match="at most 10 pages, got 14"):
        scheduler.plan(prompts, wait=True)
    # Repaired rows do not fit beside the Master, but the prompt does without it.
    policy = Policy(td.LeadingTokens(8))
    prompts = {"b": [td.private(tokens(3, 16)), shared]}
    waits = scheduler.plan(prompts, policy, wait=True)
    assert waits.phase("b") is Phase.WAITING
    assert scheduler.step() is None
    scheduler.books.drop("a")
    run_all(device)
    assert waits.phase("b") is Phase.DECODE
    assert [(span.end, span.kind.value) for span in waits.spans("b")][-1] == (80, "master")
    waits.commit()
    check_books(scheduler, device.free)


def test_a_cancelled_step_hands_its_copies_to_the_next() -> None:
    """Rows that are carried over from an earlier round, where records make the copies."""
    device = SymbolicDevice(profile(60), copies_at_once=False)
    scheduler = device.scheduler
    ids = tokens(1, 30)
    first = scheduler.plan({"a": [td.private(ids[:21])], "z": [td.private(tokens(5, 9))]})
    device.run(scheduler.step())
    first.commit("a")
    plan = scheduler.plan({"a": [td.private(ids)]})
    step = scheduler.step({"z": [1]}, prefill=())
    assert len(step.record.copies) == 1
    other = scheduler.step(prefill=["a"])
    step.cancel()
    assert len(other.record.copies) == 1
    other.cancel()
    step = scheduler.step(prefill=["a"])
    assert len(step.record.copies) == 1
    device.run(step)  # checks what its rows see
    step = scheduler.step({"z": [2]})
    assert not step.record.copies
    device.run(step)
    plan.commit()
    first.abort()
    check_books(scheduler, device.free)
