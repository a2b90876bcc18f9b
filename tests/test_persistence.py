"""Stores that are saved and loaded: the same content, and rounds that go on as if nothing was."""

from __future__ import annotations

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
    run_step,
    same_snapshot,
    snapshot,
    tokens,
)

import tokendance as td
from tokendance.files import one_file


def prompts(seed: int = 0) -> dict[str, list[td.Segment]]:
    news = [td.shared(tokens(10 + i, 40 + 7 * i)) for i in range(3)]
    return {
        "a": [td.private(tokens(seed + 1, 9)), *news],
        "b": [td.private(tokens(seed + 2, 21)), *news[::-1], td.private(tokens(seed + 3, 4))],
        "c": [news[1], td.private(tokens(seed + 4, 2)), news[0]],
    }


def output(agent: str) -> list[int]:
    return [500 + 10 * ord(agent) % 100 + token for token in range(6)]


def play(collector: td.KVCollector, round_: dict[str, list[td.Segment]]) -> td.Plan:
    plan = collector.plan(round_)
    run_prefill(collector, plan)
    for token in range(6):
        run_step(collector.step({agent: [output(agent)[token]] for agent in round_}, prefill=()))
    plan.commit()
    return plan


def continued(round_: dict[str, list[td.Segment]]) -> dict[str, list[td.Segment]]:
    said = {agent: td.shared(output(agent)) for agent in round_}
    return {
        agent: [*segments, said[agent], *[said[other] for other in said if other != agent]]
        for agent, segments in round_.items()
    }


@pytest.mark.parametrize("source", ["master", "producer"])
def test_what_was_saved_is_loaded_and_the_next_round_is_the_same(
    tmp_path: Path, source: str
) -> None:
    store = make_store()
    play(td.KVCollector(store, source), prompts())
    store.save(tmp_path / "store")
    loaded = td.DiffStore.load(tmp_path / "store", ROPE, "64MiB")
    assert same_snapshot(snapshot(store), snapshot(loaded))

    later = continued(prompts())
    here, there = (play(td.KVCollector(one, source), later) for one in (store, loaded))
    assert here.rows_computed == there.rows_computed < here.rows / 2
    assert same_snapshot(snapshot(store), snapshot(loaded))


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
    store.save(tmp_path / "store")
    pool, free = engine_pool(500, 16)
    del free[:13]
    rope = td.Rope.default(head_dim=64, theta=10000.0, max_position=8192)
    loaded = td.DiffStore.load(tmp_path / "store", rope, pool=pool)
    for agent in store.agents:
        for mine, other in zip(restored(store, agent), restored(loaded, agent), strict=True):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])
    assert loaded.stats().used_pages == store.stats().used_pages


def test_16_bit_pages_and_an_empty_store(tmp_path: Path) -> None:
    geometry = td.KVGeometry(2, 2, 1, 64, torch.bfloat16)
    store = td.DiffStore(geometry, ROPE, "1MiB")
    store.save(tmp_path / "empty")
    assert td.DiffStore.load(tmp_path / "empty", ROPE, "1MiB").stats() == store.stats()
    keys = torch.randn(2, 30, 1, 64).to(torch.bfloat16)
    store.put_round({"a": (list(keys), list(-keys))}, {"a": [td.shared(tokens(1, 30))]})
    store.save(tmp_path / "store")
    loaded = td.DiffStore.load(tmp_path / "store", ROPE, "1MiB")
    out = torch.zeros(2, 30, 1, 64, dtype=torch.bfloat16)
    loaded.restore("a", 1, out[0], out[1], torch.arange(30))
    assert torch.equal(out[0], keys[1])
    assert torch.equal(out[1], -keys[1])


def test_nothing_of_a_plan_is_saved_and_released_agents_are_gone(tmp_path: Path) -> None:
    store = make_store()
    collector = td.KVCollector(store)
    run_round(collector, prompts())
    before = store.stats()
    plan = collector.plan({"d": [td.shared(tokens(77, 50))]})
    run_prefill(collector, plan)
    store.save(tmp_path / "store")
    loaded = td.DiffStore.load(tmp_path / "store", ROPE, "64MiB")
    assert loaded.stats().masters == before.masters + 1  # finished Masters are the store's
    loaded.evict(1)
    assert replace(loaded.stats(), evictions=0) == before
    loaded.release("a")
    loaded.release("b")
    loaded.release("c")
    assert loaded.agents == []
    assert loaded.stats().masters == before.masters  # until they are evicted


def test_masters_are_evicted_in_the_order_of_the_saved_store(tmp_path: Path) -> None:
    store = make_store()
    collector = td.KVCollector(store)
    first, second = (td.shared(tokens(seed, 64)) for seed in (1, 2))
    for segment in (first, second, first):
        run_round(collector, {"a": [segment]})
    store.release("a")
    store.save(tmp_path / "store")
    pages = 18  # room for both Masters and two pages more
    capacity = pages * 8 * GEOMETRY.row_bytes
    loaded = td.DiffStore.load(tmp_path / "store", ROPE, capacity)
    run_round(td.KVCollector(loaded), {"b": [td.private(tokens(3, 24))]})
    assert loaded.scheduler.find(first) is not None
    assert loaded.scheduler.find(second) is None


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    store = make_store()
    run_round(td.KVCollector(store), prompts())
    store.save(tmp_path / "store")
    raw = (tmp_path / "store").read_bytes()
    for content in (b"", b"junk", raw[: len(raw) // 2]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match="path: expected a saved DiffStore, got"):
            td.DiffStore.load(tmp_path / "broken", ROPE, "64MiB")
    torch.save({"format": "another"}, tmp_path / "other")
    with pytest.raises(ValueError, match="path: expected a saved DiffStore, got"):
        td.DiffStore.load(tmp_path / "other", ROPE, "64MiB")
    torch.save({"format": "tokendance.DiffStore", "version": 99}, tmp_path / "newer")
    with pytest.raises(ValueError, match="path: expected version 4, got 99"):
        td.DiffStore.load(tmp_path / "newer", ROPE, "64MiB")
    with pytest.raises(OSError, match="missing"):
        td.DiffStore.load(tmp_path / "missing", ROPE, "64MiB")


def test_a_flipped_byte_or_a_cut_file_is_refused(tmp_path: Path) -> None:
    store = make_store()
    run_round(td.KVCollector(store), prompts())
    store.save(tmp_path / "store")
    raw = (tmp_path / "store").read_bytes()
    row = torch.load(tmp_path / "store", weights_only=True)["v_pools"][1][3, 5].numpy().tobytes()
    at = raw.index(row) + 7
    flipped = raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]
    (tmp_path / "broken").write_bytes(flipped)
    with pytest.raises(ValueError, match="path: expected the checksum of what was saved, got"):
        td.DiffStore.load(tmp_path / "broken", ROPE, "64MiB")
    for length in (0, 100, len(raw) // 3, len(raw) - 1):
        (tmp_path / "broken").write_bytes(raw[:length])
        with pytest.raises(ValueError, match="path: expected a saved DiffStore, got"):
            td.DiffStore.load(tmp_path / "broken", ROPE, "64MiB")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("masters"), "a value at masters, got none"),
        (lambda s: s["k_pools"].pop(), "2 layers at k_pools, got 1"),
        (lambda s: s["masters"][1].update(length="9"), r"int at masters\[1\].length, got str"),
        (lambda s: s["masters"][0].update(context="ab"), r"16 bytes .* at masters\[0\].context"),
        (
            lambda s: s["masters"][0]["pages"].fill_(9999),
            r"pages 0\.\.\d+ at masters\[0\].pages, got \[9999",
        ),
        (
            lambda s: s["masters"][1]["pages"].fill_(0),
            r"pages that nothing else has at masters\[\d\].pages",
        ),
        (
            lambda s: s["mirrors"][1].update(own_pages=s["mirrors"][0]["own_pages"]),
            r"(pages that nothing else has|at least .* pages) at mirrors\[1\].own_pages",
        ),
        (
            lambda s: s["mirrors"][0]["own_position"].copy_(
                s["mirrors"][0]["own_position"].flip(0)
            ),
            r"ascending positions below \d+ at mirrors\[0\].own_position",
        ),
        (
            lambda s: s["mirrors"][1].update(agent="a"),
            r"a name of its own at mirrors\[1\].agent, got 'a'",
        ),
        (
            lambda s: s["mirrors"][1].update(length=3),
            r"\d+ tokens of its segments at mirrors\[1\].length, got 3",
        ),
        (
            lambda s: s["mirrors"][0]["uses"][0].update(master=77),
            r"one of \d+ at mirrors\[0\].uses\[0\].master, got 77",
        ),
        (
            lambda s: s["mirrors"][0]["uses"][0].update(masks=torch.zeros(99, dtype=torch.int32)),
            r"\d+ pages at mirrors\[0\].uses\[0\].masks, got 99",
        ),
    ],
)
def test_fields_that_no_store_has_are_named(tmp_path: Path, change: object, text: str) -> None:
    store = make_store()
    run_round(td.KVCollector(store), prompts())
    store.save(tmp_path / "store")
    state = torch.load(tmp_path / "store", weights_only=True)
    change(state)  # type: ignore[operator]
    del state["checksum"]
    one_file.write_state(tmp_path / "store", state)
    pool, free = engine_pool(500, 8)
    with pytest.raises(ValueError, match=f"path: expected {text}.* in .*store"):
        td.DiffStore.load(tmp_path / "store", ROPE, pool=pool)
    assert sorted(free) == list(range(500))


def test_pages_are_given_back_if_a_file_cannot_be_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    run_round(td.KVCollector(store), prompts())
    store.save(tmp_path / "store")

    def fail(*_: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(one_file, "_bits", fail)
    pool, free = engine_pool(500, 8)
    with pytest.raises(RuntimeError, match="no memory left"):
        td.DiffStore.load(tmp_path / "store", ROPE, pool=pool)
    assert sorted(free) == list(range(500))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    store = make_store()
    run_round(td.KVCollector(store), prompts())
    store.save(tmp_path / "store")
    other = td.Rope.default(head_dim=64, theta=500000.0, max_position=4096)
    with pytest.raises(ValueError, match="rope: expected the tables that the store was saved with"):
        td.DiffStore.load(tmp_path / "store", other, "64MiB")
    short = td.Rope.default(head_dim=64, theta=10000.0, max_position=64)
    with pytest.raises(ValueError, match="rope: expected at least 166 positions, got 64"):
        td.DiffStore.load(tmp_path / "store", short, "64MiB")
    with pytest.raises(td.OutOfPagesError):
        td.DiffStore.load(tmp_path / "store", ROPE, 8 * GEOMETRY.row_bytes)
    pool = td.PagePool.own(GEOMETRY, 500, 32, "cpu")
    with pytest.raises(ValueError, match="pool: expected block_size 8, got 32"):
        td.DiffStore.load(tmp_path / "store", ROPE, pool=pool)


def test_a_store_is_loaded_for_its_own_model(tmp_path: Path) -> None:
    store = td.DiffStore(GEOMETRY, ROPE, "64MiB", model="smollm2@1")
    run_round(td.KVCollector(store), prompts())
    store.save(tmp_path / "store")
    for other in ("", "smollm2@2"):
        with pytest.raises(ValueError, match=f"model: expected .* 'smollm2@1', got '{other}'"):
            td.DiffStore.load(tmp_path / "store", ROPE, "64MiB", model=other)
    loaded = td.DiffStore.load(tmp_path / "store", ROPE, "64MiB", model="smollm2@1")
    assert loaded.model == "smollm2@1"
    assert loaded.stats().masters == store.stats().masters


def test_a_failed_save_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    run_round(td.KVCollector(store), prompts())
    store.save(tmp_path / "store")
    before = (tmp_path / "store").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        store.save(tmp_path / "store")
    assert (tmp_path / "store").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
