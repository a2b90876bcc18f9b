"""Agents that are on disk and not in the pool, until somebody needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driving import GEOMETRY, make_store, run_round, same_snapshot, snapshot, tokens
from stored_rounds import (
    contents,
    continued,
    flip,
    group_of,
    open_store,
    play,
    prompts,
    put,
    same_contents,
)

import tokendance as td

PAGE = 8 * GEOMETRY.row_bytes


def test_a_store_that_is_opened_without_agents_brings_up_whom_it_needs(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        rows = put(store, {"ada": 21, "ben": 13, "eve": 30})
    store = open_store(tmp_path / "store", agents=())
    assert store.agents == store.resting == ["ada", "ben", "eve"]
    assert store.stats().held_pages == 0
    assert store.length("ben") == 13
    assert store.resting == ["ada", "eve"]
    store.prefetch(["eve"])
    assert store.resting == ["ada"]
    assert same_contents(contents(store), rows)
    with pytest.raises(KeyError, match=r"agent: expected one of \['ada', 'ben', 'eve'\], got 'x'"):
        store.prefetch("x")
    store.close()
    with pytest.raises(KeyError, match=r"agents: expected some of .*, got \['x'\]"):
        open_store(tmp_path / "store", agents=["ada", "x"])
    assert open_store(tmp_path / "store", agents=["eve"]).resting == ["ada", "ben"]


@pytest.mark.parametrize("source", ["master", "producer"])
def test_a_round_of_agents_at_rest_is_that_of_agents_in_memory(tmp_path: Path, source: str) -> None:
    """What is reused, what is computed, and every bit, against a store that was never closed."""
    store = make_store()
    play(td.KVCollector(store, source), prompts())
    with open_store(tmp_path / "store") as first:
        play(td.KVCollector(first, source), prompts())
    again = open_store(tmp_path / "store", agents=())
    again.evict(again.stats().total_pages)
    later = continued(prompts())
    here, there = (play(td.KVCollector(one, source), later) for one in (store, again))
    assert here.rows_computed == there.rows_computed < here.rows / 2
    assert again.resting == []
    assert same_contents(contents(store), contents(again))


def test_who_joins_a_round_is_brought_up_too(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        play(td.KVCollector(store), prompts())
    store = open_store(tmp_path / "store", agents=["a"])
    store.evict(1000)
    collector = td.KVCollector(store)
    with collector.plan({"a": prompts()["a"]}) as plan:
        plan.pages_needed({"b": prompts()["b"]})
        assert store.resting == ["c"]
        plan.add({"c": prompts()["c"]})
        assert store.resting == []


@pytest.mark.parametrize("times", [1, 2])
def test_masters_that_only_agents_at_rest_have_used_are_found(tmp_path: Path, times: int) -> None:
    news = [td.shared(tokens(1, 64))] * times
    store = open_store(tmp_path / "store")
    run_round(td.KVCollector(store), {"ada": [*news, td.private(tokens(2, 5))]})
    store.rest("ada")
    store.evict(1000)
    assert store.stats().used_pages == 0
    store.flush()  # the Master stays: ada needs it
    plan = run_round(td.KVCollector(store), {"ben": [td.private(tokens(3, 7)), *news]})
    assert plan.rows_computed < 64
    assert store.resting == ["ada"]
    # Both use the same ones, in memory and on disk.
    want = contents(store)
    store.prefetch("ada")
    assert store.stats().masters == times
    store.close()
    again = open_store(tmp_path / "store")
    assert again.stats().masters == times
    assert torch.equal(contents(again)["ben"], want["ben"])


def test_more_agents_than_the_pool_holds(tmp_path: Path) -> None:
    """One after the other, each as it was."""
    store = open_store(tmp_path / "store", str(14 * PAGE))
    rows = {}
    for agent in ("ada", "ben", "eve", "dan"):
        rows |= put(store, {agent: 60})  # eight pages
        store.rest(agent)
        store.evict(1000)
    assert store.stats().used_pages == 0
    with pytest.raises(td.OutOfPagesError, match=r"expected 32 pages for 4 agents of .*, got 14"):
        store.prefetch(store.resting)
    assert store.resting == list(rows)
    for agent, want in rows.items():
        found = torch.empty(60, 1, 64), torch.empty(60, 1, 64)
        store.restore(agent, 1, *found, torch.arange(60))
        assert torch.equal(torch.stack(found), want[:, 1])
        store.rest(agent)
        store.evict(1000)
    assert store.verify() == {}
    store.close()
    few = r"capacity: expected 32 pages for 4 agents of .*, got 14"
    with pytest.raises(td.OutOfPagesError, match=few):
        open_store(tmp_path / "store", str(14 * PAGE))
    assert same_contents(contents(open_store(tmp_path / "store")), rows)


def test_a_plan_computes_again_what_cannot_be_brought_up(tmp_path: Path) -> None:
    """And what it commits is newer than what is at rest."""
    store = open_store(tmp_path / "store", str(20 * PAGE))
    segments = [td.private(tokens(1, 100))]
    run_round(td.KVCollector(store), {"ada": segments})
    store.rest("ada")
    run_round(td.KVCollector(store), {"ben": [td.private(tokens(2, 64))]})
    store.pin("ben")
    shorter = [td.private(tokens(1, 90))]
    run_round(td.KVCollector(store), {"ada": shorter})
    assert (store.length("ada"), store.resting) == (90, [])
    assert store.agents == ["ben", "ada"]
    store.prefetch("ada")
    store.release("ben")  # now there would be room for what is at rest
    with td.KVCollector(store).plan({"ada": shorter}) as plan:
        assert plan.pages_needed({"ben": [td.private(range(9))]}) == 2
    assert store.length("ada") == 90
    want = contents(store)
    store.close()
    assert same_contents(contents(open_store(tmp_path / "store")), want)


def test_agents_at_rest_are_released_replaced_and_exported(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    rows = put(store, {"ada": 21, "ben": 13, "eve": 30})
    store.rest(["ada", "ben", "eve"])
    store.release("ada")
    rows |= put(store, {"ben": 17})
    assert store.agents == ["ben", "eve"]
    store.export_agents(tmp_path / "exported", ["eve"])
    with pytest.raises(
        ValueError, match=r"expected names that the store does not have, got \['eve'"
    ):
        store.import_agents(tmp_path / "exported")
    store.rest("eve")
    with pytest.raises(
        ValueError, match=r"expected names that the store does not have, got \['eve'"
    ):
        store.import_agents(tmp_path / "exported")
    del rows["ada"]
    store.close()
    again = open_store(tmp_path / "store", agents=())
    again.clear()
    again.close(flush=False)
    again = open_store(tmp_path / "store")
    assert same_contents(contents(again), rows)
    again.rest("eve")
    again.clear()
    again.close()
    assert open_store(tmp_path / "store").agents == []


def test_a_flush_writes_nothing_of_agents_at_rest_again(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        play(td.KVCollector(store, "producer"), prompts())
        want = snapshot(store)
    before = {one.name: one.stat().st_mtime_ns for one in (tmp_path / "store").glob("0*")}
    with open_store(tmp_path / "store", agents=()) as store:
        store.flush()
        store.prefetch(["b"])
        store.flush()
        store.rest("b")
        store.prefetch(["a", "b", "c"])
    after = {one.name: one.stat().st_mtime_ns for one in (tmp_path / "store").glob("0*")}
    assert before == after
    assert same_snapshot(snapshot(open_store(tmp_path / "store")), want)


def test_damage_is_found_when_an_agent_is_brought_up(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        rows = put(store, {"ada": 21, "ben": 13})
    file, begin = group_of(tmp_path / "store", "ada")
    flip(file, begin)
    store = open_store(tmp_path / "store", agents=())
    with pytest.raises(td.DamagedError, match="agent: expected one that is whole, got 'ada'"):
        store.length("ada")
    assert list(store.damaged) == ["ada"]
    assert (store.agents, store.resting) == (["ben"], ["ben"])
    assert torch.equal(contents(store)["ben"], rows["ben"])
    run_round(td.KVCollector(store), {"ada": [td.private(range(5))]})
    store.close()
    assert open_store(tmp_path / "store").agents == ["ben", "ada"]


def test_a_store_in_memory_has_nobody_at_rest() -> None:
    store = make_store()
    put(store, {"ada": 21})
    assert store.resting == []
    store.prefetch("ada")
    with pytest.raises(ValueError, match=r"store: expected one of DiffStore.open, got"):
        store.rest("ada")
