"""Device, host memory, disk: what is longest unused moves down, and up when it is needed."""

from __future__ import annotations

import errno
import gc
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from driving import GEOMETRY, ROPE, run_prefill, run_round, run_step, tokens
from faulty_disk import NO_SPACE, READ_ONLY, FaultyDisk
from store_books import check_store
from stored_rounds import contents, continued, open_store, play, prompts, put, same_contents

import tokendance as td

PAGE = 8 * GEOMETRY.row_bytes


def make_store(pages: int, host: int) -> td.DiffStore:
    return td.DiffStore(GEOMETRY, ROPE, pages * PAGE, block_size=8, host_capacity=host * PAGE)


def tiers(store: td.DiffStore) -> dict[str, tuple[int, int]]:
    """Agents and pages in each tier."""
    check_store(store)
    found = store.stats().tiers
    return {name: (one.agents, one.used_bytes // PAGE) for name, one in found.items()}


def test_the_longest_unused_moves_to_host_memory() -> None:
    store = make_store(19, 40)
    rows = put(store, {"ada": 40})
    rows |= put(store, {"ben": 40})
    contents(store, ["ada"])  # used after ben
    rows |= put(store, {"eve": 60})
    assert store.resting == ["ben"]
    assert store.agents == ["ada", "eve", "ben"]
    # Its Master is above as well: nobody has wanted those pages yet.
    assert tiers(store) == {"device": (2, 6 + 8 + 5), "host": (1, 6)}
    assert store.stats().evictable_pages == 5
    assert store.length("ben") == 40
    assert store.resting == ["ben"]  # its length is known without its rows
    assert same_contents(contents(store), rows)
    stats = store.stats().tiers
    assert stats["device"].demoted == 2  # another for ben to come up again
    assert (stats["device"].evictions, stats["host"].evictions) == (0, 0)
    assert (stats["device"].capacity, stats["host"].capacity) == (19 * PAGE, 40 * PAGE)


def test_pinned_agents_stay_and_others_move_instead() -> None:
    store = make_store(18, 40)
    rows = put(store, {"ada": 40})
    store.pin("ada")
    rows |= put(store, {"ben": 40})
    contents(store, ["ada", "ben"])
    rows |= put(store, {"eve": 60})
    assert store.resting == ["ben"]
    with pytest.raises(
        ValueError, match=r"agents: expected agents that are not pinned, got \['ada'"
    ):
        store.rest(["ada", "eve"])
    store.pin(["eve"])
    with pytest.raises(td.OutOfPagesError, match=r"capacity: expected \d free pages"):
        store.pin("ben")
    assert store.resting == ["ben"]
    store.unpin(["ada", "nobody"])
    store.prefetch("ben")
    assert store.resting == ["ada"]
    store.release("eve")
    assert same_contents(contents(store), {name: rows[name] for name in ("ben", "ada")})
    with pytest.raises(KeyError, match="got 'x'"):
        store.pin("x")


@pytest.mark.parametrize("source", ["master", "producer"])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_round_of_agents_that_moved_is_that_of_agents_that_stayed(
    tmp_path: Path, source: str, where: str
) -> None:
    """Whatever is where: the same is reused and computed, bit for bit."""
    stayed = make_store(400, 0)
    play(td.KVCollector(stayed, source), prompts())
    moved = make_store(400, 200) if where == "host" else open_store(tmp_path / "store")
    play(td.KVCollector(moved, source), prompts())
    moved.rest("a")
    # b and c still use the Masters that a has left.
    assert same_contents(contents(moved, ["b", "c"]), contents(stayed, ["b", "c"]))
    moved.rest(["b", "c"])
    moved.evict(1000)
    assert moved.stats().used_pages == 0
    later = continued(prompts())
    here, there = (play(td.KVCollector(one, source), later) for one in (stayed, moved))
    assert here.rows_computed == there.rows_computed < here.rows / 2
    assert same_contents(contents(stayed), contents(moved))
    check_store(moved)


def test_a_master_follows_the_last_mirror_that_needs_it() -> None:
    store = make_store(100, 100)
    news = td.shared(tokens(1, 64))
    collector = td.KVCollector(store)
    run_round(collector, {"ada": [news], "ben": [td.private(tokens(2, 5)), news]})
    want = contents(store)
    store.rest("ada")
    assert store.stats().masters == 1
    books = store.books
    [master] = books.masters.values()
    assert books.coldest(100, lambda _: False) == (["ben"], [])
    store.rest("ben")
    assert books.coldest(100, lambda _: False) == ([], [master])
    # Both use one copy.
    assert store.stats().tiers["host"].masters == 1
    store.evict(100)
    assert store.stats().used_pages == 0
    assert same_contents(contents(store), want)
    assert store.stats().masters == 1


@pytest.mark.parametrize("times", [1, 2])
def test_idle_masters_move_too_and_later_prompts_find_them(times: int) -> None:
    store = make_store(20, 40)
    news = [td.shared(tokens(1, 64))] * times
    run_round(td.KVCollector(store), {"ada": news})
    store.release("ada")
    put(store, {"ben": 120})
    assert store.stats().masters == 1  # ben's
    assert store.stats().tiers["host"].masters == times
    plan = run_round(td.KVCollector(store), {"eve": [td.private(tokens(2, 5)), *news]})
    assert plan.rows_computed < 64
    assert store.stats().evictions == 0


def test_host_memory_moves_to_disk_and_is_read_from_there(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", 20 * PAGE, host_capacity=8 * PAGE)
    rows = {}
    for number in range(6):
        rows |= put(store, {f"agent{number}": 60})
    found = tiers(store)
    assert [found[name][0] for name in ("device", "host", "disk")] == [2, 1, 3]
    assert found["host"][1] == 8
    assert same_contents(contents(store), rows)
    assert store.verify() == {}
    store.close()
    assert same_contents(contents(open_store(tmp_path / "store")), rows)


def test_the_disk_evicts_masters_of_nobody_and_then_says_that_it_is_full(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", 20 * PAGE, disk_capacity=24 * PAGE)
    for seed in range(5):  # four pages each, of nobody
        run_round(td.KVCollector(store), {"ada": [td.shared(tokens(seed, 32))]})
    store.release("ada")
    rows = put(store, {"ben": 60})
    rows |= put(store, {"eve": 60})
    for agent in ("dan", "fay"):
        rows |= put(store, {agent: 60})
        disk = store.stats().tiers["disk"]
        assert disk.used_bytes <= 24 * PAGE
    assert disk.evictions == 3
    assert store.stats().evictions == 0
    full = (
        r"capacity: expected \d+ free pages.*; nothing moves down: .*disk_capacity: expected at "
        rf"most {24 * PAGE} bytes of rows, got \d+ more.*{tmp_path}"
    )
    with pytest.raises(td.OutOfPagesError, match=full):
        put(store, {"gus": 60})
    assert set(store.agents) == rows.keys()
    with pytest.raises(OSError, match="disk_capacity: expected at most") as error:
        store.flush()
    assert error.value.errno == errno.ENOSPC
    assert same_contents(contents(store, store.mirrors), {a: rows[a] for a in store.mirrors})
    store.release("ben")
    rows |= put(store, {"gus": 60})
    del rows["ben"]
    assert set(store.agents) == rows.keys()
    assert store.verify() == {}


@pytest.mark.parametrize(
    ("fault", "text"), [(NO_SPACE, "No space left"), (READ_ONLY, "Read-only file system")]
)
def test_a_disk_that_fails_while_room_is_made_loses_nothing(
    tmp_path: Path, fault: object, text: str
) -> None:
    store = open_store(tmp_path / "store", 20 * PAGE)
    rows = put(store, {"ada": 60, "ben": 60})
    disk = FaultyDisk()
    store._on_disk._directory._disk = disk
    at = 0
    while True:
        disk.at, disk.fault = len(disk.done) + at, fault
        try:
            rows |= put(store, {"eve": 60})
        except td.OutOfPagesError as error:
            assert text in str(error)  # noqa: PT017
        else:
            break
        assert store.agents == ["ada", "ben"]
        assert tiers(store)["disk"] == (0, 0)
        at += 1
    assert at > 3
    disk.at = None
    assert same_contents(contents(store), {name: rows[name] for name in store.agents})
    assert set(store.agents) == rows.keys()


def test_a_directory_that_has_vanished_is_named_and_idle_masters_make_room(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", 20 * PAGE)
    run_round(td.KVCollector(store), {"ada": [td.shared(tokens(1, 64))]})
    store.release("ada")
    rows = put(store, {"ben": 60})
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    rows |= put(store, {"eve": 60})
    assert store.stats().evictions == 1
    with pytest.raises(td.OutOfPagesError, match=f"nothing moves down: .*{tmp_path}/store"):
        put(store, {"dan": 60})
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    rows |= put(store, {"dan": 60})
    assert same_contents(contents(store), {name: rows[name] for name in store.agents})


def test_host_memory_that_is_full_is_named(tmp_path: Path) -> None:
    store = make_store(20, 9)
    rows = put(store, {"ada": 60, "ben": 60})
    rows |= put(store, {"eve": 60})
    assert store.resting == ["ada"]
    full = "nothing moves down: host_capacity: expected 8 free pages, got 1"
    with pytest.raises(td.OutOfPagesError, match=full):
        put(store, {"dan": 60})
    with pytest.raises(
        td.OutOfPagesError, match=r"host_capacity: .*give the store more host memory"
    ):
        store.rest("ben")
    assert tiers(store) == {"device": (2, 16), "host": (1, 8)}
    store.release("ben")
    assert same_contents(contents(store), {name: rows[name] for name in ("ada", "eve")})


def test_copies_that_fail_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(20, 40)
    rows = put(store, {"ada": 60, "ben": 60})
    before = tiers(store)
    with monkeypatch.context() as patch:

        def broken(pairs: object, *, to_host: bool) -> None:
            raise RuntimeError("the device is gone")

        patch.setattr(store.executor, "move", broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            put(store, {"eve": 60})
        assert tiers(store) == before
        with pytest.raises(RuntimeError, match="the device is gone"):
            store.rest("ada")
    store.rest("ada")
    with monkeypatch.context() as patch:
        patch.setattr(store.executor, "move", broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            store.prefetch("ada")
        assert store.resting == ["ada"]
    assert same_contents(contents(store), {"ben": rows["ben"], "ada": rows["ada"]})


def test_decoded_rows_and_prompts_that_wait_get_room() -> None:
    store = make_store(20, 40)
    put(store, {"ada": 60, "ben": 60})
    collector = td.KVCollector(store)
    plan = collector.plan({"eve": [td.private(tokens(1, 30))]})
    assert store.resting == []
    run_prefill(collector, plan)
    run_step(collector.step({"eve": [5]}, prefill=()))  # and a page for its output
    assert store.resting == ["ada"]
    plan.add({"dan": [td.private(tokens(2, 90))]}, wait=True)
    assert plan.phase("dan") is td.Phase.PREFILL
    assert store.resting == ["ada", "ben"]
    plan.add({"fay": [td.private(tokens(3, 90))]}, wait=True)
    assert plan.phase("fay") is td.Phase.WAITING
    run_step(collector.step(prefill=["dan"]))
    assert collector.step() is None
    plan.commit("dan")
    run_step(collector.step())  # dan leaves for fay
    assert plan.phase("fay") is td.Phase.DECODE
    assert store.resting == ["ada", "ben", "dan"]
    plan.abort()


def test_agents_of_plans_stay_and_suspended_rows_come_before_resting_ones(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", 30 * PAGE, host_capacity=8 * PAGE)
    put(store, {"ada": 60})
    store._tiers.to_host(["ada"])
    assert store._tiers.on_host == ["ada"]
    collector = td.KVCollector(store)
    plan = collector.plan({"eve": [td.private(tokens(1, 60))]})
    run_prefill(collector, plan)
    plan.suspend("eve", to="host")
    assert store._tiers.on_disk == ["ada"]
    assert tiers(store)["host"] == (0, 8)
    plan.resume("eve")
    plan.commit()
    with collector.plan({"eve": [td.private(tokens(1, 60)), td.private(tokens(2, 9))]}):
        store.rest("eve")  # a plan has its rows, and they are on disk
        put(store, {"ben": 120})
        check_store(store)
    with collector.plan({"ben": [td.private(range(5))]}):
        with pytest.raises(td.OutOfPagesError):
            put(store, {"gus": 160})
        assert "ben" in store.mirrors


def test_a_tenants_host_memory_is_its_own() -> None:
    store = make_store(60, 80)
    ada, ben = (
        store.tenant(name, name.encode() * 6, 20 * PAGE, 40 * PAGE) for name in ("ada", "ben")
    )
    rows = {}
    for tenant in (ada, ben):
        run_round(td.KVCollector(tenant), {"x": [tenant.private(tokens(1, 100))]})
        rows[tenant.name] = contents(tenant)
    run_round(td.KVCollector(ada), {"y": [ada.private(tokens(2, 100))]})
    assert (ada.resting, ben.resting) == (["x"], [])
    found = store.stats().tenants
    assert found["ada"].tiers["host"].used_bytes == 13 * PAGE
    assert found["ben"].tiers["host"].used_bytes == 0
    assert same_contents(contents(ada, ["x"]), rows["ada"])
    ada.close()
    assert store.stats().tiers["host"].used_bytes == 0
    host = store.executor.host
    assert host is not None
    assert not host.pages_of(0, np.arange(30))[0].any()


def test_threads_share_tiers_that_are_too_small_for_them(tmp_path: Path) -> None:
    """Each has agents of its own, and finds them as it has left them."""
    store = open_store(tmp_path / "store", 40 * PAGE, host_capacity=20 * PAGE)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            torch.manual_seed(number)
            mine: dict[str, torch.Tensor] = {}
            for turn in range(12):
                name = f"{number}.{turn % 3}"
                mine |= put(store, {name: 20 + 7 * turn % 40})
                if turn % 4 == 3:
                    store.rest(name)
                for agent, want in mine.items():
                    if not torch.equal(contents(store, [agent])[agent], want):
                        wrong.append((agent, turn))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(store.agents) == 12
    check_store(store)
    want = contents(store)
    store.close()
    assert same_contents(contents(open_store(tmp_path / "store")), want)


def test_a_thread_keeps_pages_free_ahead() -> None:
    store = td.DiffStore(
        GEOMETRY, ROPE, 20 * PAGE, block_size=8, host_capacity=60 * PAGE, spare=6 * PAGE
    )
    rows = put(store, {"ada": 60})
    assert store._tiers._freeing is None
    rows |= put(store, {"ben": 60})
    assert store._tiers._freeing is not None
    store._tiers._freeing.result(timeout=60)
    assert store.resting == ["ada"]
    assert store.stats().free_pages >= 6
    store.pin("ben")
    before = store.stats()
    assert before.free_pages < 20
    rows |= put(store, {"eve": 60})
    store._tiers._freeing.result(timeout=60)
    assert store.resting == ["ada", "eve"]
    assert same_contents(contents(store), {name: rows[name] for name in ("ben", "ada", "eve")})
    with pytest.raises(ValueError, match="spare: expected bytes or text"):
        td.DiffStore(GEOMETRY, ROPE, 20 * PAGE, spare="few")


def test_a_disk_that_fails_is_told_to_the_log_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path / "store", 20 * PAGE, spare=10 * PAGE)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    put(store, {"ada": 60, "ben": 60})
    assert store._tiers._freeing is not None
    store._tiers._freeing.result(timeout=60)
    for _ in range(5):
        store.stats()
    store._tiers._freeing.result(timeout=60)
    told = [one.message for one in caplog.records if "moves down ahead" in one.message]
    assert len(told) == 1
    assert str(tmp_path / "store") in told[0]
    assert store.agents == ["ada", "ben"]


def test_nobody_waits_for_a_copy_that_others_need(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(60, 60)
    rows = put(store, {"ada": 60})
    store.rest("ada")
    begun, go_on = threading.Event(), threading.Event()
    move = store.executor.move

    def slow(pairs: object, *, to_host: bool) -> None:
        begun.set()
        assert go_on.wait(60)
        move(pairs, to_host=to_host)  # type: ignore[arg-type]

    monkeypatch.setattr(store.executor, "move", slow)
    coming = store.prefetch("ada", wait=False)
    assert begun.wait(60)
    run_round(td.KVCollector(store), {"ben": [td.private(tokens(1, 60))]})
    rows |= contents(store, ["ben"])
    assert store.resting == ["ada"]
    assert not coming.done()
    go_on.set()
    coming.result(timeout=60)
    assert store.resting == []
    assert same_contents(contents(store), {name: rows[name] for name in ("ben", "ada")})
    with pytest.raises(KeyError, match="got 'x'"):
        store.prefetch("x", wait=False).result(timeout=60)
    assert store.prefetch("ada").done()


@pytest.mark.parametrize("fits", [True, False])
def test_room_that_is_made_keeps_no_plan_alive(fits: bool) -> None:
    """Errors that are dealt with refer to the frames of their callers."""
    store = make_store(20, 8 if fits else 1)
    put(store, {"ada": 60})
    collector = td.KVCollector(store)
    gc.collect()
    gc.disable()
    try:
        plan = collector.plan({"eve": [td.private(tokens(1, 30))]})

        def join(plan: td.Plan) -> None:
            with suppress(td.OutOfPagesError):
                plan.add({"dan": [td.private(tokens(2, 80))]})

        join(plan)
        assert store.resting == (["ada"] if fits else [])
        with pytest.warns(ResourceWarning, match="before the plan is dropped"):
            del plan
        assert store.stats().held_pages == (0 if fits else 8)
    finally:
        gc.enable()
