"""Masters that one agent alone uses become own rows of it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driving import GEOMETRY, ROPE, make_store, run_prefill, run_round, tokens
from store_books import check_store
from stored_rounds import contents, open_store, play, prompts, put, same_contents
from torch import Tensor

import tokendance as td
from tokendance.device.executor import Executor

PAGE = 8 * GEOMETRY.row_bytes


def company(
    store: td.DiffStore, agents: str = "ab", rows: int = 44, repaired: int = 12
) -> td.KVCollector:
    """Agents that hear one segment of 44 rows, 6 pages, each at another position."""
    collector = td.KVCollector(store, selection=td.LeadingTokens(repaired))
    news = td.shared(tokens(1, rows))
    run_round(
        collector,
        {name: [td.private(tokens(10 + i, 3 + 4 * i)), news] for i, name in enumerate(agents)},
    )
    return collector


def pages(store: td.DiffStore) -> tuple[int, int]:
    """Held and evictable."""
    check_store(store)
    stats = store.stats()
    return stats.held_pages, stats.evictable_pages


def test_the_last_user_of_a_master_takes_the_rows_that_it_uses() -> None:
    store = make_store()
    company(store)
    # a makes the Master; b repairs 12 of its rows, and computes its prompt's last.
    assert [len(store.mirror(name).own_position) for name in "ab"] == [3, 7 + 12 + 1]
    assert pages(store) == (1 + 3 + 6, 0)
    assert store.fold() == 0  # both use it
    before = contents(store)
    store.release("a")
    # 20 own rows and 31 of 44 are 51: 7 pages instead of 3 and 6.
    assert store.fold() == 2
    assert pages(store) == (7, 6)
    assert store.mirror("b").own_position.tolist() == list(range(51))
    assert len(store.mirror("b").uses) == 0
    assert same_contents(contents(store), {"b": before["b"]})
    assert (store.stats().folded, store.stats().masters, store.stats().evictions) == (1, 1, 0)
    assert store.fold() == 0
    assert store.evict(100) == 6
    assert pages(store) == (7, 0)
    assert same_contents(contents(store), {"b": before["b"]})


def test_nothing_is_folded_that_would_take_as_many_pages() -> None:
    store = make_store()
    # No row of its 48 is replaced, and its pages are full; and 8 private rows fill theirs.
    run_round(td.KVCollector(store), {"a": [td.private(tokens(2, 8)), td.shared(tokens(1, 48))]})
    before = store.mirror("a")
    assert store.fold() == 0
    assert store.mirror("a") is before
    assert (pages(store), store.stats().folded) == ((7, 0), 0)


def test_pages_before_the_first_folded_row_stay() -> None:
    store = make_store()
    collector = td.KVCollector(store, selection=td.LeadingTokens(12))
    news = td.shared(tokens(1, 44))
    run_round(
        collector,
        {"a": [td.private(tokens(2, 60)), news], "b": [td.private(tokens(3, 20)), news]},
    )
    store.release("a")
    before, rows = store.mirror("b").own_pages, contents(store)
    # 20 own rows in front: two full pages of them are not touched.
    assert store.fold() > 0
    assert store.mirror("b").own_pages[:2].tolist() == before[:2].tolist()
    assert same_contents(contents(store), rows)


def test_the_output_of_an_agent_alone_shares_its_last_page() -> None:
    store = make_store()
    play(td.KVCollector(store), {"a": [td.private(tokens(2, 9))]})
    assert pages(store) == (2 + 1, 0)
    rows = contents(store)
    assert store.fold() == 1  # nobody else could have found the output: its page is free at once
    assert pages(store) == (2, 0)
    assert store.mirror("a").own_position.tolist() == list(range(15))
    assert same_contents(contents(store), rows)


def test_later_rounds_find_a_folded_master_and_the_agents_own_rows() -> None:
    def continued(folds: bool) -> tuple[td.Plan, dict[str, Tensor], td.DiffStore]:
        store = make_store()
        collector = company(store)
        store.release("a")
        assert store.fold() == (2 if folds else 0) if folds else True
        news, more = td.shared(tokens(1, 44)), td.private(tokens(5, 10))
        later = {
            "b": [td.private(tokens(11, 7)), news, more],
            "c": [td.private(tokens(6, 2)), news],
        }
        return run_round(collector, later), contents(store), store

    folded, rows, store = continued(True)
    stayed, others, _ = continued(False)
    assert folded.rows_computed == stayed.rows_computed
    # What b had is taken over, bit for bit; what it computes behind sees keys that were rounded.
    assert torch.equal(rows["b"][:, :, :51], others["b"][:, :, :51])
    assert torch.allclose(rows["b"], others["b"], atol=1e-5)
    assert torch.equal(rows["c"], others["c"])
    check_store(store)


def test_agents_of_plans_stay_as_they_are() -> None:
    store = make_store()
    collector = company(store)
    store.release("a")
    plan = collector.plan({"b": [td.private(tokens(5, 10))]})
    assert store.fold() == 0
    run_prefill(collector, plan)
    plan.abort()
    assert store.fold() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [64, 32])
def test_folded_rows_have_the_bits_that_restore_gave(
    dtype: torch.dtype, interleaved: bool, rotary: int
) -> None:
    geometry = replace(GEOMETRY, dtype=dtype)
    rope = td.Rope.default(
        head_dim=64, theta=1e4, max_position=4096, rotary_dim=rotary, interleaved=interleaved
    )
    store = td.DiffStore(geometry, [rope, None], "1MiB", block_size=8)
    news = td.shared(tokens(1, 44))
    prompts = {"a": [td.private(tokens(2, 901)), news], "b": [td.private(tokens(3, 4)), news]}
    dense = {
        name: tuple(
            [torch.randn(sum(map(len, one)), 1, 64).to(dtype) for _ in range(2)] for _ in range(2)
        )
        for name, one in prompts.items()
    }
    store.put_round(dense, prompts, atol=100.0)  # all rows count as the Master's
    store.release("a")
    before = _rows(store, dtype)
    assert store.mirror("b").uses[0].shift == 4 - 901
    assert store.fold() == 1  # 48 rows are 6 pages
    assert len(store.mirror("b").uses) == 0
    assert torch.equal(_rows(store, dtype), before)


def _rows(store: td.DiffStore, dtype: torch.dtype) -> Tensor:
    length = store.length("b")
    k, v = (torch.zeros(2, length, 1, 64, dtype=dtype) for _ in range(2))
    store.restore("b", [0, 1], list(k), list(v), torch.arange(length))
    return torch.stack([k, v])


def test_quantized_masters_are_folded_where_they_were_computed_alone() -> None:
    quantization = td.Quantization.unit(GEOMETRY)
    store = make_store(quantization=quantization)
    company(store)
    want = contents(store)
    mirrors = dict(store.mirrors)
    store.release("a")
    assert store.fold() == 0
    assert store.mirror("b") is mirrors["b"]
    store = make_store(quantization=quantization)
    company(store)
    store.release("b")
    assert store.fold() == 1  # 3 own rows and 44 are 47: 6 pages instead of 1 and 6
    assert same_contents(contents(store), {"a": want["a"]})


def test_a_master_that_one_agent_uses_twice_saves_rows() -> None:
    store = make_store()
    news = td.shared(tokens(1, 44))
    collector = td.KVCollector(store, source="alone")  # others have a Master for each place
    run_round(collector, {"a": [news, td.private(tokens(3, 9)), news]})
    before = store.mirror("a")
    assert len(before.uses) == 2
    assert store.fold() == 0
    assert store.mirror("a") is before


def test_a_store_whose_tiers_are_full_folds_before_it_refuses() -> None:
    store = td.DiffStore(GEOMETRY, ROPE, 20 * PAGE, block_size=8, host_capacity=PAGE)
    company(store)
    store.release("a")
    before = contents(store)
    assert pages(store) == (9, 0)
    before |= put(store, {"c": 97})  # 1 page of 5 rows, and 12 of 92; 11 are free
    assert (store.stats().folded, store.stats().free_pages) == (1, 0)
    assert same_contents(contents(store), before)
    with pytest.raises(td.OutOfPagesError, match="nothing moves down: host_capacity"):
        put(store, {"d": 5})
    assert same_contents(contents(store), before)


def test_folding_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store()
    company(store)
    store.release("a")
    before, rows, stats = store.mirror("b"), contents(store), store.stats()

    def fails(self: Executor, moved: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "move_rows", fails)
        with pytest.raises(MemoryError):
            store.fold()
    check_store(store)
    assert store.mirror("b") is before
    assert same_contents(contents(store), rows)
    assert store.stats() == stats


@pytest.mark.parametrize("comes", ["plan", "commit", "release"])
def test_what_happens_to_an_agent_meanwhile_comes_first(
    monkeypatch: pytest.MonkeyPatch, comes: str
) -> None:
    """No lock is held while rows are copied."""
    store = make_store()
    collector = company(store)
    store.release("a")
    rows, move = contents(store), Executor.move_rows
    plans = []

    def meanwhile(self: Executor, moved: object) -> None:
        prompt = {"b": [td.private(tokens(11, 7)), td.shared(tokens(1, 44))]}
        if comes == "plan":
            plans.append(collector.plan(prompt))
        elif comes == "commit":
            run_round(collector, prompt)
        else:
            store.release("b")
        move(self, moved)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "move_rows", meanwhile)
        thread = threading.Thread(target=store.fold)
        thread.start()
        thread.join()
    check_store(store)
    assert store.stats().folded == 0
    for plan in plans:
        plan.abort()
    assert store.agents == ([] if comes == "release" else ["b"])
    assert same_contents(contents(store), rows if comes != "release" else {})


def test_folded_rows_are_written_to_disk_and_read_again(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        play(td.KVCollector(store), prompts())
        store.flush()
        store.release("a")
        store.release("b")
        rows = contents(store)
        assert store.fold() > 0
        store.rest("c")
        assert same_contents(contents(store), rows)
    again = open_store(tmp_path / "store")
    assert again.verify() == {}
    assert same_contents(contents(again), rows)
    assert not len(again.mirror("c").uses)
    again.close()


def test_a_reader_of_folded_rows_has_them_until_it_is_done() -> None:
    store = make_store()
    company(store)
    store.release("a")
    rows = contents(store)
    [reading] = [one.reading for one in store._restorable.values() if len(one.mirrors) == 1][-1:]
    with reading:
        assert store.fold() == 2
        store.evict(100)
        assert store.stats().used_pages == 7 + len(reading.pages) - 2  # two stay in their place
    check_store(store)
    assert same_contents(contents(store), rows)
