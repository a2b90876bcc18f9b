"""A store and two tenants of it as a state machine, beside a dictionary of dense rows.

What can be done at all is done in any order: a call that has to be refused is refused and changes
nothing. After every call the books are counted anew, in each of the three, and at the end of a run
nothing is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import dense_rows
import numpy as np
import pytest
from drawn_prompts import SELECTIONS, SOURCES, prompts_of, segments_of
from driving import GEOMETRY, ROPE, run_step
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_books import check_store
from symbolic_device import check_books

import tokendance as td
from tokendance import Phase
from tokendance.store import Tenant

BLOCK = 8
PAGE = BLOCK * GEOMETRY.row_bytes
AGENTS = 4
COUNTS: Counter[str] = Counter()
"""Calls of all machines of this process, by name."""


@dataclass(eq=False)
class Round:
    """A plan, and what each of its agents that have not ended was given."""

    collector: td.KVCollector
    plan: td.Plan
    prompts: dict[str, list[td.Segment]] = field(default_factory=dict)

    @property
    def is_exact(self) -> bool:
        return isinstance(self.collector.selection, td.Everything)

    def token_ids(self, agent: str) -> np.ndarray:
        parts = [one.token_ids for one in self.prompts[agent]]
        return np.concatenate([np.empty(0, np.int64), *parts, self.plan.output(agent)])

    def forget_ended(self) -> None:
        self.prompts = {a: p for a, p in self.prompts.items() if self.plan.is_active(a)}


@dataclass(eq=False)
class OpenStep:
    """A step that has not been run.

    Attributes:
        agents: whose rows it has, with their rounds, but for those that were aborted since.
        asked: the rounds that it was asked for.
    """

    step: td.Step
    agents: list[tuple[Round, str]]
    asked: list[Round]


@dataclass(eq=False)
class Place:
    """A store or a tenant, and all that is expected of it."""

    store: td.DiffStore
    rows: dict[str, dense_rows.Rows] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    steps: list[OpenStep] = field(default_factory=list)

    @property
    def makers(self) -> object:
        return self.store if isinstance(self.store, Tenant) else td

    def free(self) -> list[int]:
        """Numbers of the agents that are in no round."""
        taken = {agent for one in self.rounds for agent in one.prompts}
        return [number for number in range(AGENTS) if f"agent {number}" not in taken]

    def is_in_step(self, round_: Round, agent: str) -> bool:
        return any((round_, agent) in one.agents for one in self.steps)

    def live(self, *phases: Phase) -> list[tuple[Round, str]]:
        """Agents that have not ended, or are so far."""
        return [
            (one, agent)
            for one in self.rounds
            for agent in one.prompts
            if not phases or one.plan.phase(agent) in phases
        ]

    @property
    def has_lower(self) -> bool:
        """Whether agents may move to host memory."""
        return self.store._tiers.host is not None

    def fits(self, pages: int) -> bool:
        stats = self.store.stats()
        return pages <= stats.free_pages + stats.evictable_pages


Does = Callable[[Place], object]


def has_free(place: Place) -> object:
    return place.free()


def has_rounds(place: Place) -> object:
    return place.rounds


def has_steps(place: Place) -> object:
    return place.steps


def has_agents(place: Place) -> object:
    return place.live()


def has_decoded(place: Place) -> object:
    return place.live(Phase.DECODE)


def has_pages(place: Place) -> object:
    return place.live(Phase.DECODE, Phase.PREFILL)


def has_suspended(place: Place) -> object:
    return place.live(Phase.SUSPENDED)


def has_rows(place: Place) -> object:
    return place.rows


def anywhere(place: Place) -> object:
    return True


ACTS: dict[str, tuple[int, Does]] = {
    "step": (4, has_rounds),
    "plan": (3, has_free),
    "whole_round": (2, has_free),
    "put": (1, has_free),
    "end_step": (1, has_steps),
    "run_all": (1, has_rounds),
    "truncate": (1, has_decoded),
    "suspend": (2, has_pages),
    "resume": (3, has_suspended),
    "commit": (2, has_agents),
    "abort": (1, has_agents),
    "drop": (1, has_rounds),
    "release": (1, anywhere),
    "evict": (1, anywhere),
    "fold": (2, has_rows),
    "restore": (1, anywhere),
    "rest": (2, has_rows),
    "prefetch": (1, has_rows),
    "pin": (1, has_rows),
    "reopen": (1, anywhere),
}
"""What there is to do, how often, and where something is to be done."""
OFTEN = [name for name, (weight, _) in ACTS.items() for _ in range(weight)]


class MemoryMachine(RuleBasedStateMachine):
    """One rule, so that none is left out of a run: hypothesis switches some off at random."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place] = []

    @initialize(
        pages=st.tuples(*[st.integers(12, 50)] * 3),
        host=st.tuples(*[st.sampled_from([0, 4, 30])] * 3),
        zero_freed=st.tuples(*[st.booleans()] * 3),
    )
    def begin(
        self, pages: tuple[int, ...], host: tuple[int, ...], zero_freed: tuple[bool, ...]
    ) -> None:
        self.store = td.DiffStore(
            GEOMETRY,
            ROPE,
            sum(pages) * PAGE,
            block_size=BLOCK,
            host_capacity=sum(host) * PAGE,
            zero_freed=zero_freed[2],
        )
        for layer in (*self.store.pool.k_pools, *self.store.pool.v_pools):
            layer.zero_()
        tenants = [
            self.store.tenant(
                name, key * 16, pages[i] * PAGE, host[i] * PAGE, zero_freed=zero_freed[i]
            )
            for i, (name, key) in enumerate((("ada", b"a"), ("ben", b"b")))
        ]
        self.places = [Place(one) for one in (self.store, *tenants)]

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if self.places:
            check_store(self.store)
        for place in self.places:
            assert set(place.store.agents) == set(place.rows)
            assert not place.store.books.pinned & set(place.store.resting)

    def teardown(self) -> None:
        if not self.places:
            return
        for place in self.places:
            for one in place.steps:
                one.step.cancel()
            for round_ in place.rounds:
                round_.plan.abort()
            check_books(place.store.scheduler)
            for agent in place.store.agents:  # the later ones rest, and there is room by then
                self.check(place, agent)
                place.store.release(agent)
            place.store.evict(place.store.books.num_pages)
            assert place.store.stats().used_pages == 0
            place.store.clear()
            assert not place.store.scheduler.roster.states
            assert (
                place.store.scheduler.host_pages.num_free == place.store.scheduler.host_pages.limit
            )
        for place in self.places[1:]:
            place.store.close()  # type: ignore[attr-defined]
        assert self.store.stats().free_pages == self.store.pool.num_pages
        if self.store.books._clears:
            assert not any(
                layer.any() for layer in (*self.store.pool.k_pools, *self.store.pool.v_pools)
            )

    def check(self, place: Place, agent: str) -> None:
        expected = place.rows[agent]
        length = len(expected[0][0])
        assert place.store.length(agent) == length
        assert dense_rows.same(dense_rows.of_store(place.store, agent, length), expected)

    def a(self, data: st.DataObject, label: str, choices: list) -> object:
        return choices[data.draw(st.integers(0, len(choices) - 1), label)]

    def drawn(self, data: st.DataObject, place: Place, most: int) -> dict[str, list[td.Segment]]:
        """Prompts of agents that are in no round."""
        chosen = data.draw(
            st.lists(st.sampled_from(place.free()), min_size=1, max_size=most, unique=True),
            "agents",
        )
        return {
            f"agent {number}": segments_of(number, data.draw(prompts_of), place.makers)
            for number in chosen
        }

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        can = {name: list(filter(does, self.places)) for name, (_, does) in ACTS.items()}
        name: str = self.a(data, "act", [one for one in OFTEN if can[one]])  # type: ignore[assignment]
        place: Place = self.a(data, "place", can[name])  # type: ignore[assignment]
        getattr(self, name)(data, place)

    # Rounds ---------------------------------------------------------------------------------------

    def put(self, data: st.DataObject, place: Place) -> None:
        prompts = self.drawn(data, place, 2)
        rows = {}
        for agent, segments in prompts.items():
            ids = [one.token_ids for one in segments]
            rows[agent] = dense_rows.computed(np.concatenate([np.empty(0, np.int64), *ids]))
        before = place.store.stats()
        try:
            place.store.put_round(
                {agent: tuple(zip(*mine, strict=True)) for agent, mine in rows.items()}, prompts
            )
        except td.OutOfPagesError:
            assert place.store.stats().held_pages <= before.held_pages
            COUNTS["put, out of pages"] += 1
            return
        place.rows |= rows
        COUNTS["put"] += 1

    def plan(self, data: st.DataObject, place: Place) -> None:
        """A round of its own, or agents that join one."""
        wait = data.draw(st.booleans(), "wait")
        joins = bool(place.rounds) and data.draw(st.booleans(), "joins")
        prompts = self.drawn(data, place, 3)
        if joins:
            round_: Round = self.a(data, "round", place.rounds)  # type: ignore[assignment]
            prompts = {a: p for a, p in prompts.items() if a not in round_.plan.agents}
            needed = round_.plan.pages_needed(prompts)
        else:
            selection = data.draw(st.sampled_from(SELECTIONS), "selection")
            source = data.draw(st.sampled_from(SOURCES), "source")
            collector = td.KVCollector(place.store, source.value, selection)
            round_ = Round(collector, collector.plan({}))
            needed = collector.pages_needed(prompts)
        fits = place.fits(needed)
        try:
            if joins:
                round_.plan.add(prompts, wait=wait)
            else:
                round_.plan = round_.collector.plan(prompts, wait=wait)
        except td.OutOfPagesError:
            assert not fits
            COUNTS["plan, out of pages"] += 1
            return
        waits = any(round_.plan.phase(agent) is Phase.WAITING for agent in prompts)
        assert fits or wait or not prompts or place.has_lower
        COUNTS["plan, waits" if waits else "plan, joins" if joins else "plan"] += 1
        round_.prompts |= prompts
        if not joins:
            place.rounds.append(round_)

    def step(self, data: st.DataObject, place: Place) -> None:
        how = data.draw(st.sampled_from(["run"] * 4 + ["open", "open", "cancel", "fail"]), "how")
        max_rows = data.draw(st.sampled_from([5, 33, 2048]), "max_rows")
        everybody = data.draw(st.booleans(), "everybody")
        collector = place.rounds[0].collector
        ready = [
            (round_, agent)
            for round_, agent in place.live(Phase.DECODE)
            if not place.is_in_step(round_, agent) and data.draw(st.booleans(), f"decode {agent}")
        ]
        decode = {agent: data.draw(ids_of, f"ids of {agent}") for _, agent in ready}
        prefill = None if everybody else [a for _, a in place.live() if data.draw(st.booleans())]
        lengths = {agent: round_.plan.length(agent) for round_, agent in ready}
        try:
            step = collector.step(decode, prefill, max_rows)
        except td.OutOfPagesError:
            assert {agent: round_.plan.length(agent) for round_, agent in ready} == lengths
            COUNTS["step, out of pages"] += 1
            return
        if step is None:
            assert not decode
            COUNTS["step, nothing to do"] += 1
            return
        assert (
            decode
            or len(step.agents) <= max_rows
            or any(isinstance(one.collector.selection, td.KeyDeviation) for one in place.rounds)
        )
        named = {*decode, *(step.agents if prefill is None else prefill)}
        asked = [one for one in place.rounds if named & set(one.prompts) & set(step.agents)]
        agents = [(one, a) for one in place.rounds for a in one.prompts if a in step.agents]
        place.steps.append(OpenStep(step, agents, asked))
        COUNTS["step, open"] += how == "open"
        if how != "open":
            self.end(place, place.steps[-1], how)

    def end_step(self, data: st.DataObject, place: Place) -> None:
        one: OpenStep = self.a(data, "step", place.steps)  # type: ignore[assignment]
        self.end(place, one, data.draw(st.sampled_from(["run", "run", "cancel", "fail"]), "how"))

    def end(self, place: Place, one: OpenStep, how: str) -> None:
        place.steps.remove(one)
        if how == "run":
            run_step(one.step)
        elif how == "cancel":
            one.step.cancel()
        else:
            one.step.__enter__()
            one.step.__exit__(LookupError, LookupError(), None)
            for round_ in one.asked:
                assert round_.plan.ended
        for round_ in place.rounds:
            round_.forget_ended()
        place.rounds = [round_ for round_ in place.rounds if round_.prompts]
        COUNTS[f"step, {how}"] += 1

    def run_all(self, data: st.DataObject, place: Place) -> None:
        """Prompts are computed to the end, as far as there are pages."""
        while place.rounds and (step := place.rounds[0].collector.step()):
            run_step(step)
        if not place.steps:
            assert not place.live(Phase.PREFILL)
        COUNTS["run all"] += 1

    def truncate(self, data: st.DataObject, place: Place) -> None:
        live = place.live(Phase.DECODE)
        round_, agent = self.a(data, "agent", live)  # type: ignore[misc]
        prompt = sum(map(len, round_.prompts[agent]))
        length = data.draw(st.integers(prompt, round_.plan.length(agent)), "length")
        if place.is_in_step(round_, agent):
            with pytest.raises(ValueError, match="no open step"):
                round_.plan.truncate(agent, length)
            return
        round_.plan.truncate(agent, length)
        assert round_.plan.length(agent) == length
        COUNTS["truncate"] += 1

    def suspend(self, data: st.DataObject, place: Place) -> None:
        to = data.draw(st.sampled_from(["nowhere", "host"]), "to")
        live = place.live(Phase.PREFILL, Phase.DECODE)
        round_, agent = self.a(data, "agent", live)  # type: ignore[misc]
        length = round_.plan.length(agent)
        if place.is_in_step(round_, agent):
            with pytest.raises(ValueError, match="no open step"):
                round_.plan.suspend(agent, to=to)
            return
        if to == "host" and round_.plan.phase(agent) is Phase.PREFILL:
            with pytest.raises(ValueError, match="agents in decode"):
                round_.plan.suspend(agent, to=to)
            return
        try:
            round_.plan.suspend(agent, to=to)
        except td.OutOfPagesError:
            assert to == "host"
            COUNTS["suspend, out of pages"] += 1
            return
        assert round_.plan.phase(agent) is Phase.SUSPENDED
        assert round_.plan.length(agent) == length
        COUNTS[f"suspend to {to}"] += 1

    def resume(self, data: st.DataObject, place: Place) -> None:
        live = place.live(Phase.SUSPENDED)
        round_, agent = self.a(data, "agent", live)  # type: ignore[misc]
        length, fits = round_.plan.length(agent), place.fits(round_.plan.pages_to_resume(agent))
        try:
            round_.plan.resume(agent)
        except td.OutOfPagesError:
            assert not fits
            assert round_.plan.phase(agent) is Phase.SUSPENDED
            COUNTS["resume, out of pages"] += 1
            return
        assert fits or place.has_lower
        assert round_.plan.length(agent) == length
        COUNTS["resume"] += 1

    def commit(self, data: st.DataObject, place: Place) -> None:
        live = place.live()
        round_, agent = self.a(data, "agent", live)  # type: ignore[misc]
        if round_.plan.phase(agent) is not Phase.DECODE or place.is_in_step(round_, agent):
            with pytest.raises(ValueError, match=r"no open step|finished prefill|has pages"):
                round_.plan.commit(agent)
            COUNTS["commit, refused"] += 1
            return
        self.keep(place, round_, agent)
        COUNTS["commit"] += 1

    def keep(self, place: Place, round_: Round, agent: str) -> None:
        ids = round_.token_ids(agent)
        expected = dense_rows.computed(ids)
        if not round_.is_exact:
            found = dense_rows.of_store(place.store, agent, len(ids), round_.plan)
            assert dense_rows.close(found, expected)
            expected = found
        round_.plan.commit(agent)
        place.rows[agent] = expected
        self.check(place, agent)
        self.forget(place, round_)

    def abort(self, data: st.DataObject, place: Place) -> None:
        live = place.live()
        round_, agent = self.a(data, "agent", live)  # type: ignore[misc]
        round_.plan.abort(agent)
        COUNTS["abort, in a step" if place.is_in_step(round_, agent) else "abort"] += 1
        for one in place.steps:
            one.agents = [pair for pair in one.agents if pair != (round_, agent)]
        self.forget(place, round_)

    def forget(self, place: Place, round_: Round) -> None:
        round_.forget_ended()
        if not round_.prompts:
            place.rounds.remove(round_)

    def drop(self, data: st.DataObject, place: Place) -> None:
        """A plan becomes garbage; whose agents are in steps ends with them."""
        index = data.draw(st.integers(0, len(place.rounds) - 1), "round")
        dropped = place.rounds[index]
        for one in place.steps:
            one.asked = [round_ for round_ in one.asked if round_ is not dropped]
            one.agents = [pair for pair in one.agents if pair[0] is not dropped]
        del dropped
        with pytest.warns(ResourceWarning, match="before the plan is dropped"):
            del place.rounds[index]
        COUNTS["drop"] += 1

    def whole_round(self, data: st.DataObject, place: Place) -> None:
        """What most rounds are: planned, computed, decoded, committed."""
        prompts = self.drawn(data, place, 3)
        selection = data.draw(st.sampled_from(SELECTIONS), "selection")
        collector = td.KVCollector(place.store, "producer", selection)
        needed = collector.pages_needed(prompts)
        if place.steps or not place.fits(needed):
            return
        round_ = Round(collector, collector.plan(prompts), prompts)
        place.rounds.append(round_)
        while step := collector.step(prefill=list(prompts)):
            run_step(step)
        with suppress(td.OutOfPagesError):
            run_step(collector.step({agent: [7, 8] for agent in prompts}, prefill=()))
        for agent in prompts:
            self.keep(place, round_, agent)
        COUNTS["whole round"] += 1

    # The store ------------------------------------------------------------------------------------

    def release(self, data: st.DataObject, place: Place) -> None:
        agent = f"agent {data.draw(st.integers(0, AGENTS - 1), 'agent')}"
        if agent not in place.rows:
            with pytest.raises(KeyError):
                place.store.release(agent)
            return
        if self.comes_up(place, agent):
            self.check(place, agent)
        place.store.release(agent)
        del place.rows[agent]
        COUNTS["release"] += 1

    def evict(self, data: st.DataObject, place: Place) -> None:
        pages, there = data.draw(st.integers(0, 20)), place.store.stats().evictable_pages
        assert min(pages, there) <= place.store.evict(pages) <= there
        COUNTS["evict"] += 1

    def fold(self, _: st.DataObject, place: Place) -> None:
        before = place.store.stats()
        saved = place.store.fold()
        after = place.store.stats()
        # What a step has of an agent that was aborted comes free with the step.
        assert before.held_pages - after.held_pages == saved or place.steps
        assert (saved > 0) == (after.folded > before.folded)
        for agent in place.store.mirrors:
            self.check(place, agent)
        COUNTS["fold" if saved else "fold, nothing to save"] += 1

    def restore(self, _: st.DataObject, place: Place) -> None:
        for agent in place.rows:
            if self.comes_up(place, agent):
                self.check(place, agent)
        for round_, agent in place.live(Phase.DECODE):
            if not place.is_in_step(round_, agent):
                ids = round_.token_ids(agent)
                found = dense_rows.of_store(place.store, agent, len(ids), round_.plan)
                assert dense_rows.close(found, dense_rows.computed(ids))
        COUNTS["restore"] += 1

    def comes_up(self, place: Place, agent: str) -> bool:
        """Whether there is room for an agent that rests."""
        try:
            place.store.prefetch(agent)
        except td.OutOfPagesError:
            assert agent in place.store.resting
            COUNTS["prefetch, out of pages"] += 1
            return False
        assert agent not in place.store.resting
        return True

    def rest(self, data: st.DataObject, place: Place) -> None:
        agents = sorted(place.rows)
        names = data.draw(st.sets(st.sampled_from(agents), min_size=1), "agents")
        if names & place.store.books.pinned:
            with pytest.raises(ValueError, match="expected agents that are not pinned"):
                place.store.rest(names)
            return
        if not place.has_lower:
            with pytest.raises(ValueError, match=r"DiffStore.open"):
                place.store.rest(names)
            return
        busy = {agent for one in place.rounds for agent in one.prompts}
        try:
            place.store.rest(names)
        except td.OutOfPagesError:
            COUNTS["rest, out of pages"] += 1
            return
        assert set(place.store.resting) >= names - busy
        COUNTS["rest"] += 1

    def prefetch(self, data: st.DataObject, place: Place) -> None:
        agent: str = self.a(data, "agent", sorted(place.rows))  # type: ignore[assignment]
        length = place.store.length(agent)
        assert length == len(place.rows[agent][0][0])
        self.comes_up(place, agent)
        COUNTS["prefetch"] += 1

    def pin(self, data: st.DataObject, place: Place) -> None:
        agent: str = self.a(data, "agent", sorted(place.rows))  # type: ignore[assignment]
        if agent in place.store.books.pinned:
            place.store.unpin(agent)
            return
        with suppress(td.OutOfPagesError):
            place.store.pin(agent)
            COUNTS["pin"] += 1

    def reopen(self, data: st.DataObject, place: Place) -> None:
        """A tenant is closed, if nothing of it lives, and made anew; a store is emptied."""
        tenant = place.store
        if place.rounds or place.steps:
            with pytest.raises(ValueError, match=r"that have not ended|no open steps"):
                tenant.clear()
            return
        if not isinstance(tenant, Tenant):
            tenant.clear()
            place.rows.clear()
            return
        host = tenant.scheduler.host_pages.limit
        tenant.close()
        stats = self.store.stats()
        most = min(50, stats.free_pages + stats.evictable_pages)
        pages = data.draw(st.integers(min(12, most), most), "quota")
        again = self.store.tenant(tenant.name, bytes(16), pages * PAGE, host * PAGE)
        self.places[self.places.index(place)] = Place(again)
        COUNTS["reopen"] += 1


ids_of = st.lists(st.integers(0, 999), min_size=1, max_size=3)
