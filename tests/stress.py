"""Threads that do at random what a store can do, each against a dictionary of dense rows.

A thread's agents are its own; Masters, pages and steps are everybody's: what one thread waits for
another may compute, evict, or leave half done. At the end every page has to be accounted for.
"""

from __future__ import annotations

import faulthandler
import gc
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import dense_rows
import numpy as np
from driving import GEOMETRY, ROPE, run_step, tokens
from symbolic_device import check_books

import tokendance as td

BLOCK = 8
PATIENCE = 60.0  # seconds after which a thread that waits is a deadlock
SELECTIONS = [td.Everything(), td.LeadingTokens(4), td.KeyDeviation(0.3), td.Nothing()]
HEARD = [tokens(100 + i, n) for i, n in enumerate((16, 21, 40, 9, 33))]
WRITTEN = [tokens(200 + i, n) for i, n in enumerate((24, 17, 30))]


class StepError(Exception):
    """Of the engine, in the middle of a step."""


class Client(threading.Thread):
    """One thread: its agents, and what their rows are."""

    def __init__(
        self,
        name: str,
        collectors: list[td.KVCollector],
        seed: list[int],
        go_on: Callable[[], bool],
        versions: dict[str, list[dense_rows.Rows]],
        **kinds: list[td.Segment],
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.collectors = collectors
        self.store = collectors[0].store
        self.rng = np.random.default_rng(seed)
        self.go_on = go_on
        self.versions = versions  # of all threads' agents, everything that they ever had
        self.heard = kinds["heard"]
        self.written = kinds["written"]
        self.rows: dict[str, dense_rows.Rows] = {}
        self.prompts: dict[str, list[td.Segment]] = {}
        self.counts: Counter[str] = Counter()
        self.error: BaseException | None = None

    def run(self) -> None:
        acts = [
            (self.round, 8),
            (self.put, 3),
            (self.read, 6),
            (self.read_others, 8),
            (self.release, 2),
            (self.evict, 1),
            (self.look, 2),
        ]
        every = [act for act, weight in acts for _ in range(weight)]
        try:
            while self.go_on():
                act = every[self.rng.integers(len(every))]
                try:
                    act()
                    self.counts[act.__name__] += 1
                except td.OutOfPagesError:
                    self.counts["out of pages"] += 1
                except StepError:
                    self.counts["failed steps"] += 1
            for agent in self.rows:
                try:
                    self.check(agent)
                except td.OutOfPagesError:  # both tiers are full: there is no room to change places
                    self.counts["out of pages"] += 1
        except BaseException as error:
            self.error = error

    def names(self, count: int) -> list[str]:
        chosen = self.rng.choice(6, size=count, replace=False)
        return [f"{self.name} agent {number}" for number in chosen]

    def some(self, segments: list[td.Segment]) -> list[td.Segment]:
        count = self.rng.integers(0, len(segments))
        return [segments[i] for i in self.rng.permutation(len(segments))[:count]]

    # What a thread does ---------------------------------------------------------------------------

    def read(self) -> None:
        if self.rows:
            self.check(sorted(self.rows)[self.rng.integers(len(self.rows))])

    def check(self, agent: str) -> None:
        expected = self.rows[agent]
        length = len(expected[0][0])
        assert self.store.length(agent) == length, agent
        assert dense_rows.same(dense_rows.of_store(self.store, agent, length), expected), agent

    def read_others(self) -> None:
        """What another thread has committed, and may be replacing or releasing."""
        agents = self.store.agents
        if not agents:
            return
        agent = agents[self.rng.integers(len(agents))]
        try:
            length = self.store.length(agent)
            found = dense_rows.of_store(self.store, agent, length)
        except KeyError:
            self.counts["released meanwhile"] += 1
            return
        versions = list(self.versions[agent])
        assert any(dense_rows.begins_with(found, rows) for rows in versions), agent

    def keep(self, agent: str, rows: dense_rows.Rows) -> None:
        """What the agent has from now on; whoever finds it there already may read it."""
        self.versions.setdefault(agent, []).append(rows)
        self.rows[agent] = rows

    def release(self) -> None:
        for agent in self.names(1):
            if agent in self.rows:
                self.store.release(agent)
                del self.rows[agent], self.prompts[agent]
            else:
                with suppress(KeyError):
                    self.store.release(agent)
                    raise AssertionError(f"{agent} was never there")

    def evict(self) -> None:
        self.store.evict(int(self.rng.integers(0, 12)))

    def look(self) -> None:
        stats = self.store.stats()
        assert stats.used_pages == stats.held_pages + stats.evictable_pages
        # Pages that are being overwritten are neither.
        assert stats.used_pages + stats.free_pages <= stats.total_pages
        if not self.store.books._clears:
            assert stats.used_pages + stats.free_pages == stats.total_pages
        assert set(self.rows) <= set(self.store.agents)
        assert "DiffStore(" in repr(self.store)

    def put(self) -> None:
        prompts, dense = {}, {}
        for agent in self.names(int(self.rng.integers(1, 3))):
            # No prompt of a round begins with them: rows of a model do not follow rows of none.
            mine = td.private(self.rng.integers(500, 1000, self.rng.integers(1, 20)))
            prompts[agent] = [mine, *self.some(self.written)]
            dense[agent] = dense_rows.drawn(sum(map(len, prompts[agent])), self.rng)
        given = {agent: tuple(zip(*rows, strict=True)) for agent, rows in dense.items()}
        for agent, rows in dense.items():
            self.versions.setdefault(agent, []).append(rows)
        self.store.put_round(given, prompts)
        self.rows |= dense
        self.prompts |= {agent: [] for agent in prompts}

    def prompt(self, agent: str) -> list[td.Segment]:
        """Mostly what the agent had, and more."""
        before = self.prompts.get(agent, [])
        if self.rng.random() < 0.4 or sum(map(len, before)) > 150:
            before = []
        fresh = td.private(self.rng.integers(0, 500, self.rng.integers(1, 20)))
        return [*before, *self.some(self.heard), fresh]

    def round(self) -> None:
        collector = self.collectors[self.rng.integers(len(self.collectors))]
        prompts = {one: self.prompt(one) for one in self.names(int(self.rng.integers(1, 4)))}
        plan = collector.plan(prompts, wait=bool(self.rng.random() < 0.2))
        if self.rng.random() < 0.05:
            self.run_one(collector, plan, may_fail=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del plan  # garbage, which any thread may collect
            self.counts["dropped"] += 1
            return
        with plan:
            if not self.is_admitted(collector, plan):
                return
            self.prefill(collector, plan)
            if self.rng.random() < 0.1:
                self.audit(collector, plan)
            for _ in range(int(self.rng.integers(0, 4))):
                self.decode(collector, plan)
            if self.rng.random() < 0.3:
                self.move(collector, plan)
            for agent in prompts:
                if not plan.is_active(agent):
                    continue
                if self.rng.random() < 0.25:
                    plan.abort(agent)
                else:
                    self.commit(collector, plan, agent, prompts[agent])

    def is_admitted(self, collector: td.KVCollector, plan: td.Plan) -> bool:
        """All its agents have pages; none does if others do not give theirs back for a while."""
        for _ in range(20):
            if not any(plan.phase(agent) is td.Phase.WAITING for agent in plan.agents):
                return True
            self.counts["waited"] += 1
            step = collector.step(prefill=plan.prefilling)
            if step is not None:
                run_step(step)
            time.sleep(1e-3)
        return False

    def prefill(self, collector: td.KVCollector, plan: td.Plan) -> None:
        while plan.prefilling:
            self.run_one(collector, plan, may_fail=True)

    def run_one(self, collector: td.KVCollector, plan: td.Plan, may_fail: bool) -> None:
        max_rows = int(self.rng.choice([13, 64, 2048]))
        wanted = plan.prefilling
        step = collector.step(prefill=wanted, max_rows=max_rows, timeout=PATIENCE)
        if step is None:  # another thread has computed what was left; who waited may have begun
            assert not set(wanted) & set(plan.prefilling)
            return
        chance = self.rng.random()
        if chance < 0.05:
            step.cancel()
        elif chance < 0.1 and may_fail:
            with step:
                raise StepError
        else:
            run_step(step)
            self.counts["steps"] += 1

    def decode(self, collector: td.KVCollector, plan: td.Plan) -> None:
        agents = [agent for agent in plan.agents if plan.is_active(agent)]
        ids = {agent: self.rng.integers(0, 1000, self.rng.integers(1, 4)) for agent in agents}
        if not ids:
            return
        before = {agent: plan.length(agent) for agent in ids}
        run_step(collector.step(ids, prefill=()))
        for agent, fed in ids.items():
            kept = int(self.rng.integers(0, len(fed) + 1))
            plan.truncate(agent, before[agent] + kept)

    def move(self, collector: td.KVCollector, plan: td.Plan) -> None:
        agents = [agent for agent in plan.agents if plan.is_active(agent)]
        to = "host" if self.rng.random() < 0.5 else "nowhere"
        plan.suspend(agents, to=to)
        self.counts[f"suspended to {to}"] += 1
        self.look()
        plan.resume(agents)
        self.prefill(collector, plan)

    def audit(self, collector: td.KVCollector, plan: td.Plan) -> None:
        audit = collector.audit(plan, plan.agents[:1])
        for step in audit.steps(max_rows=64):
            out = run_step(step)
            audit.add(out[step.logit_rows].flatten(1))
            if self.rng.random() < 0.1:
                return  # in the middle
        audit.report()
        self.counts["audits"] += 1

    def commit(
        self, collector: td.KVCollector, plan: td.Plan, agent: str, prompt: list[td.Segment]
    ) -> None:
        output = plan.output(agent)
        ids = np.concatenate([*[one.token_ids for one in prompt], output])
        expected = dense_rows.computed(ids)
        if not isinstance(collector.selection, td.Everything):
            found = dense_rows.of_store(self.store, agent, len(ids), plan)
            assert dense_rows.close(found, expected), agent
            expected = found
        self.keep(agent, expected)
        plan.commit(agent)
        self.prompts[agent] = [*prompt, td.shared(output)] if output else prompt
        self.check(agent)


def make_store(pages: int = 220, zero_freed: bool = False, spare: int = 0) -> td.DiffStore:
    page = BLOCK * GEOMETRY.row_bytes
    store = td.DiffStore(
        GEOMETRY,
        ROPE,
        pages * page,
        block_size=BLOCK,
        host_capacity=60 * page,
        spare=spare * page,
        zero_freed=zero_freed,
    )
    for layer in (*store.pool.k_pools, *store.pool.v_pools):
        layer.zero_()
    return store


def run(threads: int, acts: int, seed: int, store: td.DiffStore | None = None) -> Counter[str]:
    """So many acts of all threads together; returns how many of which.

    Raises:
        AssertionError: rows that are others than those in the dictionary, or a page too few.
    """
    store = store or make_store(spare=8)
    heard, written = ([td.shared(ids) for ids in kind] for kind in (HEARD, WRITTEN))
    collectors = [
        td.KVCollector(store, source, selection)
        for selection in SELECTIONS
        for source in ("master", "alone", "producer")
    ]
    left = iter(range(acts))
    versions: dict[str, list[dense_rows.Rows]] = {}
    turn, failed = threading.Lock(), threading.Event()

    def go_on() -> bool:
        with turn:
            return not failed.is_set() and next(left, None) is not None

    clients = [
        Client(f"thread {i}", collectors, [seed, i], go_on, versions, heard=heard, written=written)
        for i in range(threads)
    ]
    with watched(acts):
        for client in clients:
            client.start()
        for client in clients:
            client.join()
            if client.error is not None:
                failed.set()
    for client in clients:
        if client.error is not None:
            raise AssertionError(f"seed {seed}, {client.name}") from client.error
    gc.collect()
    settle(store)
    check_books(store.scheduler)
    owners = {agent: client for client in clients for agent in client.rows}
    assert set(store.agents) == set(owners)
    for agent in store.agents:  # those in the pool first: the others come up in their place
        owners[agent].check(agent)
        store.release(agent)
    store.evict(store.stats().total_pages)
    settle(store)
    check_books(store.scheduler)
    assert store.stats().used_pages == 0
    assert store.stats().free_pages == store.pool.num_pages
    if store.books._clears:
        assert not any(layer.any() for layer in (*store.pool.k_pools, *store.pool.v_pools))
    assert not store.scheduler.roster.states
    counts: Counter[str] = Counter()
    for client in clients:
        counts += client.counts
    return counts


def settle(store: td.DiffStore) -> None:
    """Returns when nothing is on its way to another tier."""
    store._tiers.later(lambda: None).result(PATIENCE)


@contextmanager
def watched(acts: int) -> Iterator[None]:
    """Ends the process, and shows where each thread stands, if it gets nowhere."""
    faulthandler.dump_traceback_later(2 * PATIENCE + acts, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
