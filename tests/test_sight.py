"""What one sees of a store: metrics, the log, and names in a profile."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from driving import GEOMETRY, ROPE, make_store, run_prefill, run_round, run_step, tokens
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import tokendance as td
from tokendance.device import ranges
from tokendance.metrics import StoreMetrics

BLOCK = 8
PAGE = BLOCK * GEOMETRY.row_bytes
A, B = tokens(1, 40), tokens(2, 24)


def store_and_tenant() -> tuple[td.DiffStore, td.Tenant]:
    store = td.DiffStore(GEOMETRY, ROPE, 60 * PAGE, block_size=BLOCK)
    return store, store.tenant("ada", bytes(16), 20 * PAGE)


# Metrics ------------------------------------------------------------------------------------------


def test_metrics_are_the_statistics_of_a_store_and_its_tenants() -> None:
    store, ada = store_and_tenant()
    run_round(td.KVCollector(store), {"a": [td.shared(A)], "b": [td.private(B)]})
    run_round(td.KVCollector(ada), {"a": [ada.shared(B)]})
    store.release("a")
    store.evict(1)
    registry = CollectorRegistry()
    registry.register(StoreMetrics({"main": store, "other": make_store()}))
    stats = store.stats()
    assert stats.evictions == 1
    for tenant, one in (("", stats), ("ada", stats.tenants["ada"])):
        of = {"store": "main", "tenant": tenant}

        def value(name: str, of: dict[str, str] = of, **labels: str) -> float | None:
            return registry.get_sample_value(f"tokendance_{name}", {**of, **labels})

        assert value("agents") == one.agents == 1
        assert value("masters") == one.masters
        assert value("evictions_total") == one.evictions
        assert value("folded_total") == one.folded
        for state in ("free", "evictable", "held"):
            assert value("pages", state=state) == getattr(one, f"{state}_pages")
        for kind in ("dense", "master", "own"):
            assert value("rows", kind=kind) == getattr(one, f"{kind}_rows")
        for kind in ("dense", "row", "stored"):
            assert value("bytes", kind=kind) == getattr(one, f"{kind}_bytes")
    pages = [
        registry.get_sample_value(
            "tokendance_pages", {"store": "main", "tenant": tenant, "state": state}
        )
        for tenant in ("", "ada")
        for state in ("free", "evictable", "held")
    ]
    assert sum(map(float, pages)) == 60  # type: ignore[arg-type]
    assert registry.get_sample_value("tokendance_agents", {"store": "other", "tenant": ""}) == 0


def test_metrics_tell_tiers_apart() -> None:
    store = td.DiffStore(GEOMETRY, ROPE, 10 * PAGE, block_size=BLOCK, host_capacity=20 * PAGE)
    for agent, ids in (("a", A), ("b", B)):
        run_round(td.KVCollector(store), {agent: [td.private(ids)]})
    store.rest("a")
    registry = CollectorRegistry()
    registry.register(StoreMetrics({"main": store}))
    for name, tier in store.stats().tiers.items():
        of = {"store": "main", "tenant": "", "tier": name}
        found = [
            registry.get_sample_value(f"tokendance_tier_{kind}", of)
            for kind in ("agents", "bytes", "demotions_total")
        ]
        assert found == [1, tier.used_bytes, 1 if name == "device" else 0]
        assert tier.used_bytes > 0


def test_metrics_are_prometheus_text() -> None:
    store, ada = store_and_tenant()
    registry = CollectorRegistry()
    registry.register(StoreMetrics({"": store}))
    families = {
        one.name: one for one in text_string_to_metric_families(generate_latest(registry).decode())
    }
    assert sorted(families) == [
        f"tokendance_{name}"
        for name in (
            *("agents", "bytes", "evictions", "folded", "masters", "pages", "rows"),
            *("tier_agents", "tier_bytes", "tier_demotions"),
        )
    ]
    assert families["tokendance_evictions"].type == "counter"
    assert families["tokendance_pages"].type == "gauge"
    assert {one.labels["tenant"] for one in families["tokendance_pages"].samples} == {"", "ada"}
    mine = CollectorRegistry()
    mine.register(StoreMetrics({"": ada}))
    assert b'tenant="ada"' not in generate_latest(mine)  # a tenant counts its own alone
    ada.close()
    assert b'tenant="ada"' not in generate_latest(registry)


def test_metrics_are_counted_when_they_are_asked_for_and_not_before() -> None:
    store, _ = store_and_tenant()
    registry = CollectorRegistry(auto_describe=True)
    with store.lock:
        registering = threading.Thread(
            target=lambda: registry.register(StoreMetrics({"": store})), daemon=True
        )
        registering.start()
        registering.join(10)
        assert not registering.is_alive()
    run_round(td.KVCollector(store), {"a": [td.private(B)]})
    assert registry.get_sample_value("tokendance_agents", {"store": "", "tenant": ""}) == 1


# The log ------------------------------------------------------------------------------------------


def test_the_log_has_rounds_evictions_and_refusals(caplog: pytest.LogCaptureFixture) -> None:
    store, ada = store_and_tenant()
    collector = td.KVCollector(store, selection=td.Nothing())
    with caplog.at_level("INFO", "tokendance"):
        run_round(collector, {"a secret": [td.shared(A)], "b": [td.shared(A), td.private(B)]})
        store.release("a secret")
        store.release("b")
        plan = collector.plan({"c": [td.private(tokens(3, 304))]})
        with pytest.raises(td.OutOfPagesError):
            collector.plan({"d": [td.private(tokens(4, 24))]})
        run_prefill(collector, plan)
        with pytest.raises(td.OutOfPagesError):
            plan.suspend("c", to="host")
        plan.abort()
        with pytest.raises(td.OutOfPagesError):
            td.KVCollector(ada).plan({"x": [ada.private(tokens(4, 200))]})
    assert caplog.messages == [
        "planned 2 agents: 104 rows, 64 of them to be computed",
        "committed 2 agents of 104 rows",
        "evicted 1 Masters of 5 pages",
        "planned 1 agents: 304 rows, 304 of them to be computed",
        "refused 3 pages: 2 are free, and 0 evictable, of 40",
        "refused 38 pages of host memory",
        "tenant 'ada': refused 25 pages: 20 are free, and 0 evictable, of 20",
    ]
    assert {one.name for one in caplog.records} == {"tokendance"}


def test_nothing_is_kept_for_a_log_that_nobody_wants(caplog: pytest.LogCaptureFixture) -> None:
    store = make_store()
    with caplog.at_level("WARNING", "tokendance"), store.lock:
        store.lock.tell("planned %d agents", 1)
        assert not store.lock._told
    assert not caplog.messages


def test_a_log_that_uses_the_store_waits_for_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A handler may take long, or ask the store itself."""
    store = make_store()
    seen: list[Any] = []

    class Asking:
        level = 0

        def handle(self, record: object) -> None:
            asking = threading.Thread(target=lambda: seen.append(store.stats().agents), daemon=True)
            asking.start()
            asking.join(10)
            assert not asking.is_alive()

    logger = logging.getLogger("tokendance")
    with caplog.at_level("INFO", "tokendance"):
        logger.addHandler(Asking())  # type: ignore[arg-type]
        run_round(td.KVCollector(store), {"a": [td.private(B)]})
        logger.handlers = [one for one in logger.handlers if not isinstance(one, Asking)]
    assert seen == [0, 1]


# Names in a profile -------------------------------------------------------------------------------


class Profiler:
    """`torch.cuda.nvtx`, where there is none."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[str] = []

    def range_push(self, name: str) -> None:
        self.open.append(name)
        self.seen.append("/".join(self.open))

    def range_pop(self) -> None:
        self.open.pop()

    def range_start(self, name: str) -> str:
        self.range_push(name)
        return name

    def range_end(self, name: str) -> None:
        self.open.remove(name)


def test_on_a_gpu_what_is_done_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = Profiler()
    monkeypatch.setattr(torch.cuda, "nvtx", profiler)
    gpu = torch.device("cuda")
    with ranges.marked(gpu, "outer {0}"), ranges.marked(gpu, "inner"):
        pass
    with pytest.raises(KeyError), ranges.marked(gpu, "fails"):
        raise KeyError
    end = ranges.begun(gpu, "step")
    end()
    assert profiler.seen == ["outer {0}", "outer {0}/inner", "fails", "step"]
    assert not profiler.open
    with ranges.marked(torch.device("cpu"), "nothing"):
        ranges.begun(torch.device("cpu"), "nothing")()
    assert len(profiler.seen) == 4


def test_planning_steps_and_attention_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = Profiler()
    monkeypatch.setattr(torch.cuda, "nvtx", profiler)
    gpu, marked, begun = torch.device("cuda"), ranges.marked, ranges.begun
    for module in ("collector", "step", "store"):
        monkeypatch.setattr(f"tokendance.{module}.marked", lambda _, name: marked(gpu, name))
    monkeypatch.setattr("tokendance.step.begun", lambda _, name: begun(gpu, name))
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan({"a": [td.private(B)]})
    step = collector.step()
    number = step.record.number
    run_step(step)
    with pytest.raises(LookupError), collector.step({"a": [1]}):
        raise LookupError
    rows = torch.zeros(24, 1, 64)
    store.put_round({"a": ([rows, rows], [rows, rows])}, {"a": [td.private(B)]})
    store.restore("a", 0, rows.clone(), rows.clone(), torch.arange(24))
    assert plan.ended
    assert profiler.seen == [
        "tokendance plan",
        "tokendance plan a step",
        f"tokendance step {number}",
        f"tokendance step {number}/tokendance attend",
        f"tokendance step {number}/tokendance attend",
        "tokendance plan a step",
        f"tokendance step {number + 1}",
        "tokendance put_round",
        "tokendance restore",
    ]
    assert not profiler.open
