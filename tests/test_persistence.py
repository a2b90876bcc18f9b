"""Stores that are opened again: the same content, and rounds that go on as if nothing was."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driving import (
    GEOMETRY,
    ROPE,
    make_store,
    restored,
    run_prefill,
    run_round,
    same_snapshot,
    snapshot,
    tokens,
)
from stored_rounds import (
    contents,
    continued,
    files_of,
    open_store,
    output,
    play,
    prompts,
    put,
    same_contents,
)

import tokendance as td
from tokendance.files import directory
from tokendance.files.page_file import PageFile


@pytest.mark.parametrize("source", ["master", "producer"])
def test_what_was_flushed_is_there_again_and_the_next_round_is_the_same(
    tmp_path: Path, source: str
) -> None:
    """Against a store that was never closed."""
    store = make_store()
    play(td.KVCollector(store, source), prompts())
    with open_store(tmp_path / "store") as first:
        play(td.KVCollector(first, source), prompts())
    again = open_store(tmp_path / "store")
    assert same_snapshot(snapshot(store), snapshot(again))

    later = continued(prompts())
    here, there = (play(td.KVCollector(one, source), later) for one in (store, again))
    assert here.rows_computed == there.rows_computed < here.rows / 2
    assert same_snapshot(snapshot(store), snapshot(again))


def test_a_durable_commit_needs_no_flush(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    play(td.KVCollector(store), prompts(), durable=True)
    before = snapshot(store)
    run_round(td.KVCollector(store), {"d": [td.shared(tokens(77, 50))]})  # is not durable
    store.close(flush=False)
    again = open_store(tmp_path / "store")
    assert again.agents == ["a", "b", "c"]
    assert same_snapshot(before, snapshot(again))


def test_a_durable_commit_of_a_store_in_memory_is_refused_before_it_is_made() -> None:
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    with pytest.raises(ValueError, match=r"durable: expected a store of DiffStore.open, got"):
        plan.commit(durable=True)
    assert store.agents == []
    plan.commit()
    with pytest.raises(ValueError, match=r"store: expected one of DiffStore.open, got"):
        store.flush()


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    collector = td.KVCollector(store, "producer")
    play(collector, prompts(), durable=True)
    sizes = {name: (tmp_path / "store" / name).stat().st_size for name in files_of(store_at(store))}
    masters = store.stats().master_rows
    store.flush()
    assert files_of(store_at(store)) == list(sizes)
    play(collector, continued(prompts()), durable=True)
    [added] = set(files_of(store_at(store))) - sizes.keys()
    own = store.stats().own_rows
    new = own + store.stats().master_rows - masters
    assert own <= new < own + masters
    payload = new * GEOMETRY.row_bytes
    assert payload < (store_at(store) / added).stat().st_size < payload + 4096


def store_at(store: td.DiffStore) -> Path:
    return Path(store._on_disk.path)


def test_many_groups_are_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "GROUPS", 3)
    with open_store(tmp_path / "store") as store:
        rows = put(store, {"ada": 21, "ben": 13, "eve": 9, "dan": 7})
    assert len(files_of(tmp_path / "store")) == 3  # own rows of each, and three Masters
    assert same_contents(contents(open_store(tmp_path / "store")), rows)


def test_only_its_owner_can_read_a_store(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    put(store, {"ada": 21})
    store.flush()
    modes = {one.name: one.stat().st_mode & 0o777 for one in (tmp_path / "store").iterdir()}
    assert set(modes.values()) == {0o600}
    assert {"catalogue.sqlite", "catalogue.sqlite-wal", "lock"} < modes.keys()
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


def test_files_are_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    store = open_store(tmp_path / "store")
    rows = put(store, {"ada": 45})
    store.flush()
    [name] = files_of(tmp_path / "store")
    with safetensors.safe_open(tmp_path / "store" / name, "pt") as file:
        assert file.metadata()["format"] == "tokendance.pages"
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    by_rows = {one.shape[2]: one for one in found.values()}
    assert by_rows.keys() == {5, 40}  # own rows and the Master's, without padding
    want = rows["ada"].transpose(0, 1)
    assert torch.equal(by_rows[5], want[:, :, :5])
    assert torch.equal(by_rows[40], want[:, :, 5:])


def engine_pool(num_pages: int, block_size: int) -> tuple[td.PagePool, list[int]]:
    """A pool with an engine's allocator, and the pages that it has."""
    free = list(range(num_pages))

    def allocate(count: int) -> list[int] | None:
        if count > len(free):
            return None
        taken, free[:] = free[:count], free[count:]
        return taken

    own = td.PagePool.own(GEOMETRY, num_pages, block_size, "cpu")
    return td.PagePool(own.k_pools, own.v_pools, allocate, free.extend), free


def test_a_larger_pool_with_pages_in_use_and_longer_tables_take_a_store_in(tmp_path: Path) -> None:
    store = make_store(block_size=16)
    run_round(td.KVCollector(store), prompts())
    store.export_agents(tmp_path / "store")
    pool, free = engine_pool(500, 16)
    del free[:13]
    rope = td.Rope.default(head_dim=64, theta=10000.0, max_position=8192)
    loaded = td.DiffStore.open(tmp_path / "store", GEOMETRY, rope, pool=pool)
    assert same_contents(contents(store), contents(loaded))
    assert loaded.stats().used_pages == store.stats().used_pages


def test_16_bit_pages_and_an_empty_store(tmp_path: Path) -> None:
    geometry = td.KVGeometry(2, 2, 1, 64, torch.bfloat16)
    store = td.DiffStore.open(tmp_path / "store", geometry, ROPE, "1MiB")
    assert store.block_size == 16
    store.close()
    store = td.DiffStore.open(tmp_path / "store", geometry, ROPE, "1MiB")
    assert store.agents == []
    keys = torch.randn(2, 30, 1, 64).to(torch.bfloat16)
    store.put_round({"a": (list(keys), list(-keys))}, {"a": [td.shared(tokens(1, 30))]})
    store.put_round({"none": ([keys[0, :0]] * 2, [keys[0, :0]] * 2)}, {"none": []})
    store.close()
    loaded = td.DiffStore.open(tmp_path / "store", geometry, ROPE, "1MiB")
    assert loaded.length("none") == 0
    out = torch.zeros(2, 30, 1, 64, dtype=torch.bfloat16)
    loaded.restore("a", 1, out[0], out[1], torch.arange(30))
    assert torch.equal(out[0], keys[1])
    assert torch.equal(out[1], -keys[1])


def test_nothing_of_a_plan_is_written_and_released_agents_are_gone(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    collector = td.KVCollector(store)
    run_round(collector, prompts())
    before = replace(store.stats(), tiers={})
    plan = collector.plan({"d": [td.shared(tokens(77, 50))]})
    run_prefill(collector, plan)
    store.close()
    with open_store(tmp_path / "store") as loaded:
        assert loaded.stats().masters == before.masters + 1  # finished Masters are the store's
        loaded.evict(1)
        assert replace(loaded.stats(), evictions=0, tiers={}) == before
        for agent in "abc":
            loaded.release(agent)
    with open_store(tmp_path / "store") as loaded:
        assert loaded.agents == []
        assert loaded.stats().masters == before.masters  # until they are evicted
        loaded.clear()
    assert files_of(tmp_path / "store") == []
    assert open_store(tmp_path / "store").stats().used_pages == 0


def test_masters_are_evicted_in_the_order_of_the_flushed_store(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    collector = td.KVCollector(store)
    first, second = (td.shared(tokens(seed, 64)) for seed in (1, 2))
    for segment in (first, second, first):
        run_round(collector, {"a": [segment]})
    store.release("a")
    store.close()
    page = 8 * GEOMETRY.row_bytes
    # Room for both Masters and two pages more.
    loaded = td.DiffStore.open(tmp_path / "store", GEOMETRY, ROPE, 18 * page)
    run_round(td.KVCollector(loaded), {"b": [td.private(tokens(3, 24))]})
    assert loaded.scheduler.find(first) is not None
    assert loaded.scheduler.find(second) is None
    loaded.close(flush=False)
    with td.DiffStore.open(tmp_path / "store", GEOMETRY, ROPE, 10 * page) as loaded:
        # Room for one of them: the one that was used last.
        assert loaded.scheduler.find(first) is not None
        assert loaded.scheduler.find(second) is None


def test_the_order_goes_on_after_a_store_was_opened(tmp_path: Path) -> None:
    """What was used before is older than what is used now."""
    segments = [td.shared(tokens(seed, 16)) for seed in range(4)]
    for segment in segments:
        with open_store(tmp_path / "store") as store:
            run_round(td.KVCollector(store), {"a": [segment]})
            store.release("a")
    with open_store(tmp_path / "store") as store:
        for gone, segment in enumerate(segments):
            assert [store.scheduler.find(one) is not None for one in segments] == [
                i >= gone for i in range(4)
            ]
            store.evict(1)
            assert store.scheduler.find(segment) is None


def test_a_flush_changes_nothing_in_memory(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    collector = td.KVCollector(store)
    for seed in range(3):
        run_round(collector, {"a": [td.shared(tokens(seed, 24))]})
    store.release("a")
    before = snapshot(store), list(store.books._idle), store.books.state()
    store.flush()
    assert same_snapshot(before[0], snapshot(store))
    assert before[1:] == (list(store.books._idle), store.books.state())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = td.DiffStore.open(path, GEOMETRY, ROPE, "64MiB", block_size=8, model="smollm2@1")
    run_round(td.KVCollector(store), prompts())
    store.close()
    before = {one.name: one.read_bytes() for one in path.iterdir()}

    def refused(error: type[Exception], match: str, **changes: object) -> None:
        given = {"geometry": GEOMETRY, "rope": ROPE, "capacity": "64MiB", "model": "smollm2@1"}
        with pytest.raises(error, match=match):
            td.DiffStore.open(path, **{**given, **changes})

    other = td.Rope.default(head_dim=64, theta=500000.0, max_position=4096)
    refused(ValueError, "rope: expected the tables that the keys of .*store were", rope=other)
    short = td.Rope.default(head_dim=64, theta=10000.0, max_position=64)
    refused(ValueError, "rope: expected at least 256 positions for .*store, got 64", rope=short)
    few = r"capacity: expected \d+ pages for 3 agents of .*store, got 1"
    refused(td.OutOfPagesError, few, capacity=8 * GEOMETRY.row_bytes)
    refused(ValueError, "block_size: expected that of .*, 8, got 16", block_size=16)
    pool = td.PagePool.own(GEOMETRY, 500, 32, "cpu")
    refused(ValueError, "block_size: expected that of .*, 8, got 32", pool=pool, capacity=None)
    for field, value in (("num_layers", 3), ("num_q_heads", 4), ("head_dim", 128)):
        geometry = replace(GEOMETRY, **{field: value})
        rope = td.Rope.default(head_dim=geometry.head_dim, theta=10000.0, max_position=4096)
        text = f"geometry.{field}: expected that of .*store, {getattr(GEOMETRY, field)}, got"
        refused(ValueError, f"{text} {value}", geometry=geometry, rope=rope)
    half = replace(GEOMETRY, dtype=torch.float16)
    refused(
        ValueError, "geometry.dtype: expected that of .*'float32', got 'float16'", geometry=half
    )
    for model in ("", "smollm2@2"):
        refused(ValueError, f"model: expected that of .*'smollm2@1', got '{model}'", model=model)
    assert {one.name: one.read_bytes() for one in path.iterdir()} == before
    again = td.DiffStore.open(path, GEOMETRY, ROPE, "64MiB", model="smollm2@1")
    assert same_contents(contents(store), contents(again))


def test_pages_are_given_back_if_a_store_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    run_round(td.KVCollector(store), prompts())
    store.export_agents(tmp_path / "store")

    def fail(*_: object) -> None:
        raise MemoryError("no memory left")

    pool, free = engine_pool(500, 8)
    monkeypatch.setattr(PageFile, "read", fail)
    with pytest.raises(MemoryError, match="no memory left"):
        td.DiffStore.open(tmp_path / "store", GEOMETRY, ROPE, pool=pool)
    assert sorted(free) == list(range(500))


def test_agents_pass_from_store_to_store(tmp_path: Path) -> None:
    store = make_store()
    play(td.KVCollector(store, "producer"), prompts())
    store.export_agents(tmp_path / "all")
    store.export_agents(tmp_path / "one", ["b"])
    other = open_store(tmp_path / "store")
    assert other.import_agents(tmp_path / "one") == ["b"]
    assert other.import_agents(tmp_path / "all", ["a"]) == ["a"]
    want = {agent: contents(store)[agent] for agent in "ab"}
    assert same_contents(contents(other), want)
    # What both use is there once: Masters are known by their bits.
    used = {m.serial for agent in "ab" for m in store.mirror(agent).uses.masters}
    assert other.stats().masters == len(used)
    assert other.stats().evictable_pages == 0
    other.close()
    assert same_contents(contents(open_store(tmp_path / "store")), want)


def test_what_cannot_be_imported_changes_nothing(tmp_path: Path) -> None:
    store = make_store()
    play(td.KVCollector(store), prompts())
    store.export_agents(tmp_path / "all")
    before = snapshot(store)
    with pytest.raises(ValueError, match=r"agents: expected names that the store does not have"):
        store.import_agents(tmp_path / "all", ["a"])
    with pytest.raises(KeyError, match=r"agents: expected some of \['a', 'b', 'c'\], got 'x'"):
        store.import_agents(tmp_path / "all", ["x"])
    with pytest.raises(FileNotFoundError, match="path: expected a store, got nothing"):
        store.import_agents(tmp_path / "nothing")
    assert same_snapshot(before, snapshot(store))
    small = make_store(capacity=str(30 * 8 * GEOMETRY.row_bytes))
    with pytest.raises(td.OutOfPagesError, match="for 3 agents of"):
        small.import_agents(tmp_path / "all")
    assert small.stats().used_pages == 0
    with pytest.raises(FileExistsError, match="path: expected nothing there"):
        store.export_agents(tmp_path / "all")
    with pytest.raises(KeyError, match="agent: expected one of"):
        store.export_agents(tmp_path / "other", ["x"])
    assert not (tmp_path / "other").exists()


def test_what_a_killed_export_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    store = make_store()
    put(store, {"ada": 20})
    left = tmp_path / ".agents.0badcafe.tmp"
    store.export_agents(left)
    store.export_agents(tmp_path / "agents")
    assert [one.name for one in tmp_path.iterdir()] == ["agents"]


def test_who_opens_a_store_that_is_open_is_told_who_has_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    put(store, {"ada": 20})
    text = rf"got one that process {os.getpid()} has.*store"
    with pytest.raises(td.StoreInUseError, match=text):
        open_store(tmp_path / "store")
    with pytest.raises(td.StoreInUseError, match=text):
        make_store().import_agents(tmp_path / "store")
    script = "import sys; from tokendance.files.directory import Directory; "
    script += "Directory.open(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "StoreInUseError: [Errno 11] path: expected a store that nobody else" in other.stderr
    store.close()
    assert open_store(tmp_path / "store").agents == ["ada"]


def test_a_store_that_is_dropped_gives_its_lock_back_and_flushes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    put(store, {"ada": 20})
    store.flush()
    put(store, {"ben": 20})
    del store
    assert open_store(tmp_path / "store").agents == ["ada"]


def test_a_closed_store_goes_on_in_memory(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    rows = put(store, {"ada": 20})
    store.close()
    store.close()
    rows |= put(store, {"ben": 20})
    assert same_contents(contents(store), rows)
    with pytest.raises(ValueError, match=r"store: expected one of DiffStore.open, got"):
        store.flush()
    assert open_store(tmp_path / "store").agents == ["ada"]


def test_names_of_agents_are_any_text(tmp_path: Path) -> None:
    names = ["", "橋 👋", "a\x00b", "\ud800", "'; DROP TABLE mirrors; --"]
    with open_store(tmp_path / "store") as store:
        rows = put(store, {name: 12 + i for i, name in enumerate(names)})
    again = open_store(tmp_path / "store")
    assert again.agents == names
    assert same_contents(contents(again), rows)


def test_a_forked_process_does_not_write(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    put(store, {"ada": 20})
    child = os.fork()
    if child == 0:
        try:
            store.flush()
        except RuntimeError as error:
            store._close()
            os._exit(7 if "expected the process that made it" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(td.StoreInUseError):
        open_store(tmp_path / "store")
    store.close()
    assert open_store(tmp_path / "store").agents == ["ada"]


def test_restored_rows_are_those_of_agents_that_took_over_earlier_rows(tmp_path: Path) -> None:
    """An agent's pages that its later rounds share are on disk once for each round it is at."""
    store = open_store(tmp_path / "store")
    collector = td.KVCollector(store)
    segments = [td.private(tokens(1, 21))]
    for seed in range(4):
        segments = [*segments, td.shared(tokens(seed + 5, 13)), td.private(tokens(seed + 9, 6))]
        play(collector, {"a": segments}, durable=True)
        segments = [*segments, td.shared(output("a"))]
        want = restored(store, "a")
        store.close(flush=False)
        store = open_store(tmp_path / "store")
        collector = td.KVCollector(store)
        for got, expected in zip(restored(store, "a"), want, strict=True):
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
    assert len(files_of(tmp_path / "store")) <= 5
