"""Threads on one store: nothing is lost, or read while others write it; no wait has no end."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dense_rows
import numpy as np
import pytest
import stress
import torch
from driving import make_store, project, run_prefill, run_round, run_step, tokens
from symbolic_device import check_books
from torch.utils._python_dispatch import TorchDispatchMode

import tokendance as td
from tokendance.store import DiffStore

A, B, MINE = tokens(1, 40), tokens(2, 24), tokens(3, 13)


@pytest.fixture
def busy_interpreter() -> Iterator[None]:
    """Threads take turns at almost every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_interpreter")
@pytest.mark.parametrize("zero_freed", [False, True])
def test_threads_do_what_they_like_and_every_page_is_accounted_for(zero_freed: bool) -> None:
    store = stress.make_store(zero_freed=zero_freed)
    counts = stress.run(threads=6, acts=300, seed=int(zero_freed), store=store)
    for act in ("round", "put", "read", "read_others", "release", "evict", "look"):
        assert counts[act], (act, counts)


# The lock -----------------------------------------------------------------------------------------


class LockIsFree(TorchDispatchMode):
    """Fails where anything is computed or copied by a thread that holds the store's lock."""

    def __init__(self, store: DiffStore) -> None:
        super().__init__()
        self.condition = store.lock._condition
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not self.condition._is_owned(), func  # type: ignore[attr-defined]
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def prompts() -> dict[str, list[td.Segment]]:
    return {
        "a": [td.private(MINE), td.shared(A), td.shared(B)],
        "b": [td.private(tokens(4, 29)), td.shared(B), td.shared(A)],
    }


@pytest.mark.parametrize("selection", stress.SELECTIONS, ids=lambda one: type(one).__name__)
def test_nothing_is_computed_or_copied_by_whoever_holds_the_lock(
    selection: td.LeadingTokens, tmp_path: Any
) -> None:
    store = stress.make_store()
    collector = td.KVCollector(store, selection=selection)
    with LockIsFree(store) as mode:
        run_round(collector, prompts())
        longer = {agent: [*segments, td.private([1, 2])] for agent, segments in prompts().items()}
        plan = collector.plan(longer)  # carries rows over: they are copied
        run_prefill(collector, plan)
        run_step(collector.step({"a": torch.tensor([3, 4]), "b": iter([5])}, prefill=()))
        audit = collector.audit(plan, "b", rows=0.5)
        for step in audit.steps():
            out = run_step(step)
            audit.add(out[step.logit_rows].flatten(1))
        audit.report()
        for to in ("host", "nowhere"):
            plan.suspend("a", to=to)
            plan.resume("a")
            run_prefill(collector, plan)
        dense_rows.of_store(store, "b", plan.length("b"), plan)
        with collector.decoder(max_agents=2, max_rows=2, max_pages=60).prepare({"a": [1]}):
            pass
        plan.commit()
        dense_rows.of_store(store, "a", store.length("a"))
        rows = dense_rows.drawn(50, np.random.default_rng(0))
        store.put_round({"c": tuple(zip(*rows, strict=True))}, {"c": [td.shared(tokens(5, 50))]})
        store.export_agents(tmp_path / "store")
    for operator in ("rope_rotate_out", "collective_attention_out", "diff_restore", "diff_encode"):
        assert any(operator in name for name in mode.seen), operator
    if isinstance(selection, td.KeyDeviation):
        assert any("key_deviation" in name for name in mode.seen)
    check_books(store.scheduler)


def test_token_ids_on_a_device_are_fetched_before_the_lock_is_taken() -> None:
    """As are those of an iterator, which may wait for anything."""
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan({"a": [td.private([1])]})
    run_prefill(collector, plan)
    free = []

    def ids() -> Iterator[int]:
        free.append(not store.lock._condition._is_owned())  # type: ignore[attr-defined]
        yield 5

    run_step(collector.step({"a": ids()}))
    plan.append({"a": ids()})
    plan.add({"b": (td.private([i]) for i in ids())})
    assert free == [True] * 3
    assert plan.output("a") == [5, 5]
    plan.abort()


def test_what_the_log_is_told_is_written_without_the_lock(caplog: Any) -> None:
    store = make_store()
    with caplog.at_level("INFO", "tokendance"), store.lock:
        with store.lock:
            store.lock.tell("so many: %d", 7)
        assert not caplog.messages
    assert caplog.messages == ["so many: 7"]


# Races, one by one --------------------------------------------------------------------------------


def in_a_thread(act: Callable[[], object]) -> object:
    """Another thread does it while this one is where it is."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it waits for ever"
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, target: object, name: str, act: Callable[[], object]
) -> None:
    """The first call of a method is preceded by what another thread does."""
    inside = getattr(target, name)
    once = iter([act])

    def outside(*args: Any, **kwargs: Any) -> Any:
        for one in once:
            in_a_thread(one)
        return inside(*args, **kwargs)

    monkeypatch.setattr(target, name, outside)


def fill(store: td.DiffStore) -> None:
    """Somebody takes every free page and writes to it."""
    collector = td.KVCollector(store, selection=td.Nothing())
    rows = store.stats().free_pages * store.block_size
    with collector.plan({"filler": [td.private(tokens(9, rows))]}) as plan:
        run_prefill(collector, plan)
        plan.abort()


@pytest.mark.parametrize("again", [False, True])
def test_rows_that_are_restored_stay_while_others_let_go_of_them(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stress.make_store(60)
    collector = td.KVCollector(store, selection=td.Everything())
    run_round(collector, {"a": prompts()["a"]})
    length = store.length("a")
    if again:  # by a record that has been kept
        dense_rows.of_store(store, "a", length)

    def drop() -> None:
        store.release("a")
        store.evict(60)
        fill(store)

    meanwhile(monkeypatch, store.executor, "restore", drop)
    found = dense_rows.of_store(store, "a", length)
    assert dense_rows.same(found, dense_rows.computed(np.concatenate([MINE, A, B])))
    check_books(store.scheduler)
    assert store.stats().used_pages == 0


def test_rows_of_a_plan_that_are_restored_stay_when_it_is_aborted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = stress.make_store(60)
    collector = td.KVCollector(store, selection=td.Everything())
    plan = collector.plan({"a": prompts()["a"]})
    run_prefill(collector, plan)
    run_step(collector.step({"a": [7]}))

    def drop() -> None:
        plan.truncate("a", plan.length("a") - 1)
        plan.abort()
        store.evict(60)
        fill(store)

    meanwhile(monkeypatch, store.executor, "restore", drop)
    ids = np.concatenate([MINE, A, B, [7]])
    found = dense_rows.of_store(store, "a", len(ids), plan)
    assert dense_rows.same(found, dense_rows.computed(ids))
    check_books(store.scheduler)
    assert store.stats().used_pages == 0


def test_rows_that_are_written_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from tokendance.files.directory import Directory

    store = stress.make_store(60)
    run_round(td.KVCollector(store, selection=td.Everything()), {"a": prompts()["a"]})

    def drop() -> None:
        store.release("a")
        store.evict(60)
        fill(store)

    meanwhile(monkeypatch, Directory, "write", drop)
    store.export_agents(tmp_path / "store")
    assert store.stats().used_pages == 0
    loaded = td.DiffStore.open(tmp_path / "store", stress.GEOMETRY, stress.ROPE, "1MiB")
    found = dense_rows.of_store(loaded, "a", loaded.length("a"))
    assert dense_rows.same(found, dense_rows.computed(np.concatenate([MINE, A, B])))


def test_threads_flush_rest_plan_and_restore_one_store(
    tmp_path: Any, busy_interpreter: None
) -> None:
    """Whoever waits for files holds no lock, and whoever holds the lock waits for no file."""
    page = 8 * stress.GEOMETRY.row_bytes
    names = ["a", "b", "c"]
    with td.DiffStore.open(
        tmp_path / "store", stress.GEOMETRY, stress.ROPE, 60 * page, block_size=8
    ) as store:
        collector = td.KVCollector(store, selection=td.Everything())
        given = {name: [td.private(tokens(i, 9)), td.shared(A)] for i, name in enumerate(names)}
        ids = {name: np.concatenate([one.token_ids for one in given[name]]) for name in names}
        run_round(collector, given)
        end = time.monotonic() + 1.5
        done: Counter[str] = Counter()

        def repeat(act: Callable[[], object], what: str) -> None:
            while time.monotonic() < end:
                act()
                done[what] += 1

        def plan_again() -> None:
            with collector.plan({"a": [*given["a"], td.private([5])]}) as plan:
                while plan.prefilling:
                    step = collector.step(prefill=["a"], timeout=10)
                    if step is not None:
                        run_step(step)
                plan.abort()

        def restore() -> None:
            found = dense_rows.of_store(store, "b", len(ids["b"]))
            assert dense_rows.same(found, dense_rows.computed(ids["b"]))

        acts = {
            "rest": lambda: store.rest(["b", "c"]),
            "prefetch": lambda: store.prefetch(names),
            "flush": store.flush,
            "restore": restore,
            "plan": plan_again,
            "look": lambda: (store.stats(), store.agents, store.resting, store.damaged),
        }
        with ThreadPoolExecutor(len(acts)) as pool:
            waiting = [pool.submit(repeat, act, what) for what, act in acts.items()]
            for one in waiting:
                one.result(timeout=60)
        assert set(done) == set(acts)
        assert store.verify() == {}
        check_books(store.scheduler)
    again = td.DiffStore.open(tmp_path / "store", stress.GEOMETRY, stress.ROPE, 60 * page)
    for name in names:
        found = dense_rows.of_store(again, name, len(ids[name]))
        assert dense_rows.same(found, dense_rows.computed(ids[name]))


def test_an_agent_whose_rows_are_carried_over_is_in_no_step_before_they_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they are copied from may be released meanwhile."""
    store = stress.make_store(60)
    collector = td.KVCollector(store, selection=td.Everything())
    run_round(collector, {"a": [td.private(MINE)]})
    ids = np.concatenate([MINE, A])

    def others() -> None:
        assert collector.step() is None
        assert store.scheduler.holds_up(None)
        store.release("a")
        fill(store)

    meanwhile(monkeypatch, store.lock, "_copy", others)
    plan = collector.plan({"a": [td.private(ids)]})
    assert plan.spans("a")[0].end == len(MINE)
    run_prefill(collector, plan)
    plan.commit()
    assert dense_rows.same(dense_rows.of_store(store, "a", len(ids)), dense_rows.computed(ids))
    check_books(store.scheduler)


def test_who_was_waiting_is_in_the_step_that_admits_it_with_carried_rows() -> None:
    store = stress.make_store(8)
    collector = td.KVCollector(store, selection=td.Everything())
    run_round(collector, {"a": [td.private(MINE)]})
    filler = collector.plan({"b": [td.private(tokens(8, 40))]})
    run_prefill(collector, filler)
    plan = collector.plan({"a": [td.private(np.concatenate([MINE, B]))]}, wait=True)
    assert collector.step() is None
    filler.abort()
    step = collector.step()
    assert set(step.agents) == {"a"}
    run_step(step)
    plan.commit()
    found = dense_rows.of_store(store, "a", 37)
    assert dense_rows.same(found, dense_rows.computed(np.concatenate([MINE, B])))


@pytest.mark.parametrize("aborts", [False, True])
@pytest.mark.parametrize("way", ["suspend", "resume"])
def test_pages_stay_while_rows_go_to_host_memory_and_come_back(
    way: str, aborts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stress.make_store(60)
    collector = td.KVCollector(store, selection=td.Everything())
    other = collector.plan({"b": [td.private(tokens(7, 24))]})
    plan = collector.plan({"a": [td.private(MINE)]})
    run_prefill(collector, plan)
    run_prefill(collector, other)
    run_step(collector.step({"a": [7]}))
    if way == "resume":
        plan.suspend("a", to="host")

    def others() -> None:
        for act in (plan.truncate, plan.suspend, plan.commit):
            with pytest.raises(ValueError, match=r"in no open step, got 'a'"):
                act("a", 13) if act == plan.truncate else act("a")
        fill(store)
        other.suspend("b", to="host")  # takes host pages, and gives its own back
        if aborts:
            plan.abort("a")
        fill(store)

    meanwhile(monkeypatch, store.lock, "_copy", others)
    plan.suspend("a", to="host") if way == "suspend" else plan.resume("a")
    check_books(store.scheduler)
    if not aborts:
        if way == "suspend":
            plan.resume("a")
        ids = [*MINE, 7]
        found = dense_rows.of_store(store, "a", len(ids), plan)
        assert dense_rows.same(found, dense_rows.computed(ids))
        plan.abort()
    other.resume("b")
    found = dense_rows.of_store(store, "b", 24, other)
    assert dense_rows.same(found, dense_rows.computed(tokens(7, 24)))
    other.abort()
    assert store.stats().used_pages == 0
    assert store.scheduler.host_pages.num_free == 60
    check_books(store.scheduler)


class CopyError(Exception):
    """Of a device that makes no copies any more."""


def test_copies_that_cannot_be_made_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    store = stress.make_store(60)
    collector = td.KVCollector(store, selection=td.Everything())
    run_round(collector, {"a": [td.private(MINE)], "b": [td.private(MINE[::-1])]})
    longer = {"a": [td.private([*MINE, 1])], "b": [td.private([*MINE[::-1], 1])]}
    plan = collector.plan(longer)
    run_prefill(collector, plan)
    run_step(collector.step({"a": [7]}))

    def refuse(_: object) -> None:
        raise CopyError

    def refused(act: Callable[[], object]) -> None:
        before = store.stats(), [plan.phase(agent) for agent in "ab"]
        with monkeypatch.context() as patch:
            patch.setattr(store.lock, "_copy", refuse)
            with pytest.raises(CopyError):
                act()
        assert (store.stats(), [plan.phase(agent) for agent in "ab"]) == before
        check_books(store.scheduler)

    refused(lambda: plan.suspend(["a", "b"], to="host"))
    plan.suspend("b", to="host")
    refused(lambda: plan.resume("b"))
    plan.resume("b")
    plan.suspend(["a", "b"])
    refused(lambda: plan.resume(["a", "b"]))
    plan.resume(["a", "b"])
    run_prefill(collector, plan)
    for agent, ids in (("a", [*MINE, 1, 7]), ("b", [*MINE[::-1], 1])):
        found = dense_rows.of_store(store, agent, len(ids), plan)
        assert dense_rows.same(found, dense_rows.computed(ids))
    plan.abort()
    before = store.stats()
    with monkeypatch.context() as patch:
        patch.setattr(store.lock, "_copy", refuse)
        with pytest.raises(CopyError):
            collector.plan(longer)
    assert store.stats() == before
    waits = collector.plan({"c": [td.private(tokens(6, 440))]})
    late = collector.plan(longer, wait=True)
    waits.abort()
    with monkeypatch.context() as patch:
        patch.setattr(store.lock, "_copy", refuse)
        with pytest.raises(CopyError):
            collector.step()
    assert late.ended
    assert store.stats() == before
    check_books(store.scheduler)
    run_round(collector, longer)


def test_a_step_waits_for_the_rows_that_another_thread_computes() -> None:
    store = make_store()
    collector = td.KVCollector(store, selection=td.Nothing())
    first = collector.plan({"a": prompts()["a"]})
    second = collector.plan({"b": prompts()["b"]})
    step = collector.step(prefill=["a"])
    assert collector.step(prefill=["b"]).cancel() is None  # its own rows, up to the Master
    run_step(collector.step(prefill=["b"]))
    assert second.prefilling == ["b"]
    assert collector.step(prefill=["b"]) is None
    assert collector.step(prefill=["b"], timeout=0.01) is None
    found: list[td.Step | None] = []
    waiting = threading.Thread(
        target=lambda: found.append(collector.step(prefill=iter(["b"]), timeout=60))
    )
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    run_step(step)
    waiting.join(30)
    assert found
    if found[0] is not None:
        run_step(found[0])
    assert not second.prefilling
    assert collector.step(timeout=60) is None  # there is nothing to wait for
    with pytest.raises(ValueError, match="timeout: expected at least 0 seconds, got -1"):
        collector.step(timeout=-1)
    first.commit()
    second.commit()


def test_a_step_that_fails_ends_no_plan_that_was_not_asked_for() -> None:
    """Another thread's agent, whose rows this one waited for, has them computed again."""
    store = make_store()
    collector = td.KVCollector(store, selection=td.Everything())
    theirs = collector.plan({"a": [td.shared(A)]})
    mine = collector.plan({"b": [td.shared(A), td.private(MINE)]})
    step = collector.step(prefill=["b"])
    assert {"a", "b"} <= set(step.agents)
    step.__enter__()
    step.attend(0, *project(step.token_ids, 0))
    step.__exit__(LookupError, LookupError(), None)
    assert mine.ended
    assert theirs.prefilling == ["a"]
    check_books(store.scheduler)
    run_prefill(collector, theirs)
    theirs.commit()
    assert dense_rows.same(dense_rows.of_store(store, "a", 40), dense_rows.computed(A))


def test_garbage_is_collected_by_any_thread_in_the_middle_of_anything() -> None:
    store = make_store()
    collector = td.KVCollector(store)
    run_round(collector, prompts())
    before = store.stats()
    plan = collector.plan({"x": [td.private(MINE)], "y": [td.private(MINE)]})
    run_prefill(collector, plan)
    audit = collector.audit(plan, "x").steps()
    step = next(audit)
    circle: list[object] = [plan, step, audit]
    circle.append(circle)
    del plan, step, audit
    with warnings.catch_warnings(record=True) as told, store.lock:
        warnings.simplefilter("always")
        del circle
        in_a_thread(gc.collect)  # which does not wait for the lock
        assert store.scheduler.books.used_pages > before.used_pages
    assert {str(one.message).split(":")[0] for one in told} >= {"plan"}
    assert store.stats() == before
    check_books(store.scheduler)


# Processes ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_refused_even_if_a_thread_held_the_lock() -> None:
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan({"a": [td.private([1])]})
    read, write = os.pipe()
    with store.lock:
        child = os.fork()
        if not child:
            found = []
            for act in (store.stats, plan.abort, collector.step, lambda: repr(plan)):
                try:
                    act()
                except RuntimeError as error:
                    found.append(str(error))
            os.write(write, "\n".join(found).encode())
            os._exit(0)
    os.waitpid(child, 0)
    lines = os.read(read, 10_000).decode().splitlines()
    for fd in (read, write):
        os.close(fd)
    wanted = (
        f"store: expected the process that made it ({os.getpid()}), got a fork of it ({child}); "
        "make a store in each process, or start processes by 'spawn'"
    )
    assert lines == [wanted] * 4
    plan.abort()
