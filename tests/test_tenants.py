"""Tenants: the same names and the same words, and nothing of one is another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import dense_rows
import numpy as np
import pytest
import torch
from driving import GEOMETRY, ROPE, run_prefill, run_round, run_step, tokens
from store_books import check_store

import tokendance as td
from tokendance.store import Tenant

BLOCK = 8
PAGE = BLOCK * GEOMETRY.row_bytes
A, B, MINE = tokens(1, 40), tokens(2, 24), tokens(3, 13)
KEYS = [bytes([n]) * 16 for n in (1, 2)]


def make_store(pages: int = 100, host_pages: int = 40) -> td.DiffStore:
    return td.DiffStore(
        GEOMETRY, ROPE, pages * PAGE, block_size=BLOCK, host_capacity=host_pages * PAGE
    )


def two(store: td.DiffStore, pages: int = 30, host_pages: int = 10) -> list[Tenant]:
    return [
        store.tenant(name, key, pages * PAGE, host_pages * PAGE)
        for name, key in zip(("ada", "ben"), KEYS, strict=True)
    ]


def prompts(tenant: Tenant) -> dict[str, list[td.Segment]]:
    return {
        "a": [tenant.private(MINE), tenant.shared(A), tenant.shared(B)],
        "b": [tenant.shared(B), tenant.shared(A)],
    }


def put(tenant: Tenant, seed: int) -> dict[str, dense_rows.Rows]:
    rng = np.random.default_rng(seed)
    given = prompts(tenant)
    rows = {agent: dense_rows.drawn(sum(map(len, given[agent])), rng) for agent in given}
    dense = {agent: tuple(zip(*mine, strict=True)) for agent, mine in rows.items()}
    tenant.put_round(dense, given)
    return rows


def test_the_same_names_and_words_are_each_tenants_own() -> None:
    store = make_store()
    ada, ben = two(store)
    rows = [put(ada, 0), put(ben, 1)]
    outside = {"a": [td.private(MINE), td.shared(A)]}
    run_round(td.KVCollector(store), outside)
    check_store(store)
    for tenant, mine in zip((ada, ben), rows, strict=True):
        assert tenant.agents == ["a", "b"]
        for agent, expected in mine.items():
            length = tenant.length(agent)
            assert dense_rows.same(dense_rows.of_store(tenant, agent, length), expected)
    ada.release("a")
    assert (ada.agents, ben.agents, store.agents) == (["b"], ["a", "b"], ["a"])
    assert store.length("a") == 53
    check_store(store)


def test_no_segment_of_a_tenant_is_found_by_another() -> None:
    """Not even where each takes the other's segments for its own."""
    store = make_store()
    ada, ben = two(store)
    digests = {made(A).digest for made in (ada.shared, ben.shared, td.shared)}
    assert len(digests) == 3
    assert len({made(A).space for made in (ada.shared, ben.shared, td.shared)}) == 3
    assert ada.shared(A) == ada.shared(A)
    assert ada.shared(A) != ada.shared(A, namespace="lora")
    parts = ada.split_round([1, 2, 0, 3, 4], [0])
    assert parts == [ada.shared([1, 2, 0]), ada.shared([3, 4])]
    put(ada, 0)
    assert ada.scheduler.find(ada.shared(A)) is not None
    for one in (ada.shared(A), ben.shared(A), td.shared(A)):
        assert ben.scheduler.find(one) is None
        assert store.scheduler.find(one) is None
    collector = td.KVCollector(ben, selection=td.Nothing())
    plan = collector.plan(prompts(ben))
    assert (
        sum(span.end - span.begin for span in plan.spans("a") if span.kind.value == "reused") == 0
    )
    plan.abort()


@pytest.mark.parametrize("make", [td.shared, None])
def test_segments_of_others_are_refused(make: Callable[..., td.Segment] | None) -> None:
    store = make_store()
    ada, ben = two(store)
    segment = (make or ben.shared)(A)
    collector = td.KVCollector(ada)
    before = store.stats()
    wrong = {"a": [ada.private(MINE), segment]}
    text = r"prompts\['a'\]: expected segments of tenant 'ada' .*, got Segment\(shared, length=40"
    rows = dense_rows.drawn(53, np.random.default_rng(0))
    plan = collector.plan({})
    acts: list[Callable[[], object]] = [
        lambda: collector.plan(wrong),
        lambda: collector.pages_needed(wrong),
        lambda: plan.add(wrong),
        lambda: plan.pages_needed(wrong),
        lambda: ada.put_round({"a": tuple(zip(*rows, strict=True))}, wrong),
    ]
    for act in acts:
        with pytest.raises(ValueError, match=text):
            act()
        assert store.stats() == before
    assert td.KVCollector(ada).plan({"a": [ada.shared(A, namespace="image")]}).abort() is None


def test_what_an_agent_says_is_the_tenants_own_segment() -> None:
    store = make_store()
    ada, ben = two(store)
    for tenant in (ada, ben):
        collector = td.KVCollector(tenant, "producer", td.Everything())
        plan = collector.plan({"a": [tenant.private(MINE)]})
        run_prefill(collector, plan)
        for token in range(8):
            run_step(collector.step({"a": [token]}))
        plan.commit(namespace="said")
        assert tenant.scheduler.find(tenant.shared(range(8), namespace="said")) is not None
        assert tenant.scheduler.find(td.shared(range(8), namespace="said")) is None
        plan = collector.plan(
            {"a": [tenant.private(MINE), tenant.shared(range(8), namespace="said")]}
        )
        assert plan.spans("a")[0].kind.value == "earlier"
        plan.abort()
    check_store(store)


def test_handles_of_another_tenant_are_refused() -> None:
    store = make_store()
    ada, ben = two(store)
    mine, other = td.KVCollector(ada), td.KVCollector(ben)
    plan = mine.plan(prompts(ada))
    run_prefill(mine, plan)
    assert other.step() is None
    assert td.KVCollector(store).step() is None
    with pytest.raises(KeyError, match=r"expected one of \[\], got 'a'"):
        other.step({"a": [1]})
    with pytest.raises(ValueError, match="plan: expected one of this collector's store"):
        other.audit(plan)
    rows = torch.zeros(77, 1, 64)
    for one in (ben, store):
        with pytest.raises(ValueError, match="plan: expected one of this collector's store"):
            one.restore("a", 0, rows, rows.clone(), torch.arange(77), plan)
    plan.commit()
    for one in (ben, store):
        with pytest.raises(KeyError, match=r"expected one of \[\], got 'a'"):
            one.restore("a", 0, rows, rows.clone(), torch.arange(77))
        for act in (one.release, one.length, one.mirror):
            with pytest.raises(KeyError, match=r"expected one of \[\], got 'a'"):
                act("a")
    assert not rows.any()
    ben.evict(100)
    ben.clear()
    assert ada.agents == ["a", "b"]
    check_store(store)


def test_what_one_tenant_does_changes_no_count_of_another() -> None:
    store = make_store()
    ada, ben = two(store)
    put(ben, 0)
    ben.release("a")
    before = ben.stats(), repr(ben)
    needed = td.KVCollector(ben).pages_needed(prompts(ben))
    collector = td.KVCollector(ada, selection=td.Nothing())
    for round_ in range(5):  # fills its quota, and evicts
        run_round(collector, {"x": [ada.shared(tokens(10 + round_, 90)), ada.private([round_])]})
    with pytest.raises(td.OutOfPagesError):
        collector.plan({"y": [ada.private(tokens(5, 241))]})
    assert ada.stats().evictions > 0
    assert (ben.stats(), repr(ben)) == before
    assert td.KVCollector(ben).pages_needed(prompts(ben)) == needed
    stats = store.stats()
    assert stats.tenants == {"ada": ada.stats(), "ben": ben.stats()}
    assert replace(stats, tenants={}) == make_smaller().stats()
    assert not ada.stats().tenants
    assert [stats.tenants[name].total_pages for name in ("ada", "ben")] == [30, 30]
    assert repr(ada).startswith("Tenant('ada', DiffStore(1 agents, ")
    check_store(store)


def make_smaller() -> td.DiffStore:
    """What the store is without two tenants."""
    return make_store(40, 20)


def test_a_quota_that_is_reached_leaves_nothing_half_done() -> None:
    """In a plan, in a late plan, in a step, in a resume, in host memory and in what is put."""
    store = make_store()
    ada, ben = two(store, 12, 3)
    quota = r"quota of tenant 'ada': expected \d+ free pages, got \d+ and 0 of idle Masters, of 12"
    collector = td.KVCollector(ada, selection=td.Nothing())
    plan = collector.plan({"a": [ada.private(tokens(5, 48))]})
    run_prefill(collector, plan)

    def refused(act: Callable[[], object], text: str = quota) -> None:
        before = store.stats(), plan.agents, [plan.phase(agent) for agent in plan.agents]
        with pytest.raises(td.OutOfPagesError, match=text):
            act()
        assert (store.stats(), plan.agents, [plan.phase(one) for one in plan.agents]) == before
        check_store(store)

    long = {"b": [ada.private(tokens(6, 60))]}
    refused(lambda: collector.plan(long))
    refused(lambda: plan.add(long))
    refused(lambda: collector.plan({"b": [ada.private(tokens(6, 97))]}, wait=True), "at most 12")
    filler = collector.plan({"f": [ada.private(tokens(7, 48))]})
    refused(lambda: collector.step({"a": [1]}))
    assert plan.length("a") == 48
    refused(lambda: plan.suspend("a", to="host"), "expected 6 free host pages, got 3 of 3")
    plan.suspend("a")
    another = collector.plan({"g": [ada.private([1])]})
    refused(lambda: plan.resume("a"))
    another.abort()
    rows = dense_rows.drawn(60, np.random.default_rng(0))
    refused(lambda: ada.put_round({"b": tuple(zip(*rows, strict=True))}, long))
    filler.abort()
    plan.resume("a")
    run_prefill(collector, plan)
    run_step(collector.step({"a": [1]}))
    plan.commit()
    run_round(td.KVCollector(ben), {"a": [ben.shared(A)]})  # its own pages were there all the while
    check_store(store)


def test_agents_wait_for_pages_of_their_tenant() -> None:
    store = make_store()
    ada, ben = two(store, 10)
    collector = td.KVCollector(ada)
    first = collector.plan({"a": [ada.private(tokens(5, 60))]})
    later = collector.plan({"b": [ada.private(tokens(6, 60))]}, wait=True)
    run_prefill(collector, first)
    assert collector.step() is None
    assert later.phase("b") is td.Phase.WAITING
    first.abort()
    run_step(collector.step())
    assert later.phase("b") is td.Phase.DECODE
    assert ben.stats().used_pages == 0
    later.abort()


def test_a_closed_tenant_leaves_zeros_and_gives_its_pages_back() -> None:
    store = make_store(30, 6)
    ada = store.tenant("ada", KEYS[0], 20 * PAGE, 6 * PAGE)
    put(ada, 0)
    ada.release("a")
    collector = td.KVCollector(ada)
    plan = collector.plan({"c": [ada.private(MINE)]})
    run_prefill(collector, plan)
    plan.suspend("c", to="host")
    with pytest.raises(ValueError, match=r"plans that have not ended, got \['c'\]"):
        ada.close()
    assert ada.agents == ["b"]
    plan.resume("c")
    pages = np.flatnonzero(ada.books._page_users)
    plan.abort()
    assert any(pool[pages].any() for pool in store.pool.k_pools)
    host = store.executor.host
    assert host is not None
    ada.close()
    lent = set(range(30)) - set(store.scheduler.books._allocator._allocate(10) or ())  # type: ignore[arg-type]
    for pool in (*store.pool.k_pools, *store.pool.v_pools):
        assert not pool[pages].any()
    assert not any(host.pages_of(part, np.arange(6))[0].any() for part in range(2))
    assert len(lent) == 20
    assert not store.tenants
    assert repr(ada) == "Tenant('ada', closed)"
    for act in (ada.stats, ada.close, lambda: ada.agents, lambda: collector.plan({}).abort()):
        with pytest.raises(ValueError, match="tenant 'ada': expected one that is open, got a clo"):
            act()


def test_pages_come_back_when_a_tenant_is_closed() -> None:
    store = make_store()
    first = store.stats()
    for round_ in range(3):
        ada = store.tenant("ada", KEYS[round_ % 2], 60 * PAGE, 40 * PAGE)
        assert store.stats().total_pages == 40
        assert store.scheduler.host_pages.limit == 0
        put(ada, round_)
        ada.close()
        assert store.stats() == first
        assert store.scheduler.host_pages.num_free == store.scheduler.host_pages.limit == 40


def test_a_tenant_takes_pages_of_idle_masters_but_of_no_agent() -> None:
    store = make_store(20, host_pages=0)
    run_round(td.KVCollector(store), {"a": [td.shared(A)], "b": [td.private(MINE)]})
    store.release("a")
    with pytest.raises(ValueError, match="quota: expected at most the 18 pages that nobody holds"):
        store.tenant("ada", KEYS[0], 19 * PAGE)
    assert store.stats().evictions == 0
    store.tenant("ada", KEYS[0], 18 * PAGE)
    assert (store.stats().evictions, store.stats().free_pages, store.agents) == (1, 0, ["b"])
    check_store(store)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((7, KEYS[0], PAGE), TypeError, "name: expected a str, got int"),
        (("ada", KEYS[0], PAGE), ValueError, "name: expected one that is not taken, got 'ada'"),
        (("x", "secret", PAGE), TypeError, "key: expected bytes, got str"),
        (("x", b"short", PAGE), ValueError, "key: expected 16 to 64 bytes, got 5"),
        (("x", bytes(65), PAGE), ValueError, "key: expected 16 to 64 bytes, got 65"),
        (("x", KEYS[0], PAGE - 1), ValueError, "quota: expected at least one page of"),
        (("x", KEYS[0], "all"), ValueError, "expected bytes or text"),
        (("x", KEYS[0], PAGE, 99 * PAGE), ValueError, "host_quota: expected at most the 30 pages"),
    ],
)
def test_bad_tenants_are_refused(arguments: tuple, error: type, text: str) -> None:
    store = make_store()
    ada = store.tenant("ada", KEYS[0], 30 * PAGE, 10 * PAGE)
    before = store.stats()
    with pytest.raises(error, match=text):
        store.tenant(*arguments)
    assert store.stats() == before
    assert list(store.tenants) == ["ada"]
    with pytest.raises(ValueError, match="tenant: expected a store, got tenant 'ada' of one"):
        ada.tenant("x", KEYS[1], PAGE)


def test_a_tenant_of_an_engines_pool_has_pages_of_its_allocator() -> None:
    free = list(range(30))
    pools = [torch.full((30, BLOCK, 1, 64), torch.nan) for _ in range(2 * GEOMETRY.num_layers)]
    pool = td.PagePool(
        pools[0::2],
        pools[1::2],
        lambda count: [free.pop() for _ in range(count)] if count <= len(free) else None,
        free.extend,
    )
    store = td.DiffStore(GEOMETRY, ROPE, pool=pool)
    engine = [free.pop() for _ in range(4)]
    with pytest.raises(td.OutOfPagesError):
        store.tenant("ada", KEYS[0], 27 * PAGE)
    assert len(free) == 26
    ada = store.tenant("ada", KEYS[0], 26 * PAGE)
    assert not free
    put(ada, 0)
    ada.close()
    assert sorted(free + engine) == list(range(30))
    with pytest.raises(ValueError, match="quota: expected at most the 30 pages"):
        store.tenant("ada", KEYS[0], 31 * PAGE)


# Zeros --------------------------------------------------------------------------------------------


def is_zero(store: td.DiffStore, pages: Sequence[int]) -> bool:
    return not any(layer[list(pages)].any() for layer in (*store.pool.k_pools, *store.pool.v_pools))


@pytest.mark.parametrize("quantized", [False, True])
def test_freed_pages_are_zeros_when_the_call_returns(quantized: bool) -> None:
    ones = torch.ones(GEOMETRY.num_layers, 1)
    quantization = td.Quantization(torch.float8_e4m3fn, ones, ones) if quantized else None
    store = td.DiffStore(
        GEOMETRY, ROPE, "256KiB", block_size=BLOCK, quantization=quantization, zero_freed=True
    )
    for layer in (*store.pool.k_pools, *store.pool.v_pools):
        layer.view(torch.uint8).fill_(1)
    collector = td.KVCollector(store, selection=td.Nothing())
    run_round(collector, {"a": [td.shared(A)], "b": [td.shared(A), td.private(MINE)]})
    used = np.flatnonzero(store.books._page_users)
    plan = collector.plan({"b": [td.shared(A), td.private([*MINE, 4])]})
    run_prefill(collector, plan)
    leased = np.flatnonzero(store.books._page_users)
    total = store.stats().total_pages
    assert store.stats().free_pages == total - len(leased)
    plan.abort()
    assert is_zero(store, sorted({*leased} - {*used}))
    assert not is_zero(store, used)
    store.release("a")
    store.release("b")
    assert store.evict(100) == 5
    assert is_zero(store, used)
    assert store.stats().free_pages == total
    check_store(store)


def test_an_engine_gets_zeros_back_and_evicted_pages_serve_the_same_call() -> None:
    free = list(range(10))
    pools = [torch.ones((10, BLOCK, 1, 64)) for _ in range(2 * GEOMETRY.num_layers)]
    back: list[int] = []

    def take_back(pages: Sequence[int]) -> None:
        assert not any(pool[list(pages)].any() for pool in pools)
        back.extend(pages)
        free.extend(pages)

    pool = td.PagePool(
        pools[0::2],
        pools[1::2],
        lambda count: [free.pop() for _ in range(count)] if count <= len(free) else None,
        take_back,
        num_free=free.__len__,
    )
    store = td.DiffStore(GEOMETRY, ROPE, pool=pool, zero_freed=True)
    collector = td.KVCollector(store, selection=td.Nothing())
    run_round(collector, {"a": [td.shared(A)]})
    store.release("a")
    plan = collector.plan({"b": [td.private(tokens(5, 64))]})  # 8 pages, 3 of the Master's
    assert store.stats().evictions == 1
    assert len(back) == 2
    run_prefill(collector, plan)
    with pytest.raises(td.OutOfPagesError, match="expected 3 free pages, got 2 and 0 of idle"):
        collector.plan({"c": [td.private(tokens(6, 24))]})
    plan.abort()
    assert sorted(free) == list(range(10))
    check_store(store)
    silent = td.PagePool(pools[0::2], pools[1::2], lambda n: None, take_back)
    with pytest.raises(ValueError, match="zero_freed: expected a pool with num_free, got one with"):
        td.DiffStore(GEOMETRY, ROPE, pool=silent, zero_freed=True)


def test_a_tenant_begins_with_zeros_and_may_leave_zeros_at_once() -> None:
    store = make_store(30, 0)
    run_round(td.KVCollector(store), {"a": [td.shared(A)], "b": [td.private(B)]})
    store.release("a")
    store.release("b")
    ada = store.tenant("ada", KEYS[0], 30 * PAGE, zero_freed=True)
    assert is_zero(store, range(30))
    put(ada, 0)
    assert not is_zero(store, range(30))
    ada.release("a")
    ada.release("b")
    ada.evict(30)
    assert is_zero(store, range(30))
    assert ada.stats().free_pages == 30


@pytest.mark.parametrize("zero_freed", [False, True])
def test_a_tenant_is_not_closed_while_its_rows_are_read(
    zero_freed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    ada = store.tenant("ada", KEYS[0], 30 * PAGE, zero_freed=zero_freed)
    rows = put(ada, 0)["a"]
    restore = ada.executor.restore

    def closing(*args: object) -> None:
        with pytest.raises(ValueError, match="tenant 'ada': expected no thread that uses it, got"):
            ada.close()
        restore(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ada.executor, "restore", closing)
    found = dense_rows.of_store(ada, "a", 77)
    assert dense_rows.same(found, rows)
    assert ada.agents == []
    ada.close()
    assert store.stats().free_pages == 100
