"""Rows that pass between the pool and an engine's own cache."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from driving import GEOMETRY, ROPE, make_store, project, restored, run_prefill, run_step, tokens
from torch import Tensor

import tokendance as td
from tokendance.device.executor import Executor
from tokendance.device.pool import PagePool
from tokendance.host.record import VERSION, AppendRecord, RestoreRecord, StepRecord
from tokendance.host.scheduler import Scheduler

A, B = tokens(1, 20), tokens(2, 30)
MINE, YOURS = tokens(10, 13), tokens(11, 29)
PROMPTS = {
    "a": [td.private(MINE), td.shared(A), td.shared(B)],
    "b": [td.private(YOURS), td.shared(B), td.shared(A)],
}
SAID = [int(token) for token in tokens(20, 11)]


def blank(rows: int) -> list[Tensor]:
    return [torch.full((rows, 1, 64), torch.nan) for _ in range(GEOMETRY.num_layers)]


def projected(token_ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys before RoPE and values of every layer."""
    both = [project(torch.tensor(token_ids), layer)[1:] for layer in range(GEOMETRY.num_layers)]
    return [k for k, _ in both], [v for _, v in both]


def rows_in(executor: Executor, record: RestoreRecord, rows: int) -> list[tuple[Tensor, Tensor]]:
    keys, values = blank(rows), blank(rows)
    executor.restore(record, range(GEOMETRY.num_layers), keys, values)
    return list(zip(keys, values, strict=True))


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a, b, strict=True)
    )


def test_a_plans_rows_before_commit_are_those_that_the_store_has_after_it() -> None:
    collector = td.KVCollector(make_store())
    store = collector.store
    plan = collector.plan(PROMPTS)
    run_prefill(collector, plan)
    run_step(collector.step({"b": SAID}, prefill=()))
    lengths = {agent: plan.length(agent) for agent in PROMPTS}
    assert lengths == {"a": 63, "b": 79 + 11}
    before = {
        agent: rows_in(store.executor, plan.restore(agent, np.arange(rows)), rows)
        for agent, rows in lengths.items()
    }
    # The same by the store's method, both agents and one layer at a time, behind each other.
    slots = torch.full((2, 90), -1)
    slots[0, :63], slots[1] = torch.arange(63), torch.arange(63, 153)
    for layer in range(GEOMETRY.num_layers):
        (k,), (v,) = blank(153)[:1], blank(153)[:1]
        store.restore(["a", "b"], layer, k, v, slots, plan=plan)
        assert same([(k[:63], v[:63]), (k[63:], v[63:])], [before[a][layer] for a in PROMPTS])
    plan.commit()
    for agent in PROMPTS:
        assert same(before[agent], restored(store, agent))


def test_slots_say_which_rows_go_where() -> None:
    collector = td.KVCollector(make_store())
    plan = collector.plan(PROMPTS)
    run_prefill(collector, plan)
    executor = collector.store.executor
    whole = rows_in(executor, plan.restore("b", np.arange(79)), 79)
    slots = np.full(70, -1)
    slots[20:70] = np.arange(50)[::-1]
    some = rows_in(executor, plan.restore("b", slots), 51)
    for (k, v), (all_k, all_v) in zip(some, whole, strict=True):
        assert torch.equal(k[:50], all_k[20:70].flip(0))
        assert torch.equal(v[:50], all_v[20:70].flip(0))
        assert k[50:].isnan().all()
    plan.abort()


@pytest.mark.parametrize("rotated", [False, True])
def test_appended_rows_are_those_of_a_decode_step(rotated: bool) -> None:
    decoded = td.KVCollector(make_store(), source="producer", selection=td.LeadingTokens(4))
    plan = decoded.plan(PROMPTS)
    run_prefill(decoded, plan)
    run_step(decoded.step({"b": SAID, "a": SAID[:3]}, prefill=()))
    plan.commit()

    given = td.KVCollector(make_store(), source="producer", selection=td.LeadingTokens(4))
    plan = given.plan(PROMPTS)
    run_prefill(given, plan)
    record = plan.append({"b": SAID, "a": SAID[:3]})
    assert record.positions.tolist() == [*range(79, 90), *range(63, 66)]
    keys, values = projected([*SAID, *SAID[:3]])
    if rotated:  # as an engine's cache has them
        caches = [restored(decoded.store, "b"), restored(decoded.store, "a")]
        keys = [
            torch.cat([caches[0][layer][0][79:], caches[1][layer][0][63:]])
            for layer in range(GEOMETRY.num_layers)
        ]
    given.store.executor.append(record, keys, values, rotated=rotated)
    assert plan.output("b") == SAID
    plan.append({"b": [7]})  # and a draft that is rejected
    plan.truncate("b", 90)
    plan.commit()
    for agent in PROMPTS:
        assert same(restored(given.store, agent), restored(decoded.store, agent))
    assert given.store.stats() == decoded.store.stats()
    again = {"c": [td.private(MINE), td.shared(SAID), td.private(YOURS)]}
    plans = [one.plan(again) for one in (given, decoded)]
    assert plans[0].spans("c") == plans[1].spans("c")
    assert any(span.kind.value == "reused" for span in plans[0].spans("c"))
    for one in plans:
        one.abort()


def test_a_worker_that_has_records_alone_gives_the_same_rows() -> None:
    """The scheduler's copies wait for the next record, of whatever kind."""
    pool = PagePool.own(GEOMETRY, 64, 8, "cpu")
    executor = Executor(GEOMETRY, ROPE, pool, host_pages=16)
    scheduler = Scheduler(executor.profile)
    numbers: list[int] = []

    def sent(record: object) -> object:
        there = pickle.loads(pickle.dumps(record))
        numbers.append(there.number)
        return there

    def run(record: StepRecord) -> None:
        with executor.open(sent(record)) as pass_:  # type: ignore[arg-type]
            for layer in range(GEOMETRY.num_layers):
                pass_.attend(layer, *project(pass_.token_ids, layer))

    plan = scheduler.plan(PROMPTS)
    while step := scheduler.step():
        run(step.record)
        step.finish()
    record = plan.append({"b": SAID})
    executor.append(sent(record), *projected(SAID), rotated=False)  # type: ignore[arg-type]
    plan.suspend("b", to="host")
    plan.resume("b")
    moved = plan.restore("b", np.arange(90))
    assert len(moved.copies) == 2
    there = sent(moved)
    assert isinstance(there, RestoreRecord)
    rows = rows_in(executor, there, 90)
    assert same(rows, rows_in(executor, there, 90))  # copies are made once
    plan.suspend("b", to="host")
    plan.resume("b")
    late = plan.append({"b": [5]})
    assert isinstance(late, AppendRecord)
    assert len(late.copies) == 2
    executor.append(sent(late), *projected([5]), rotated=False)  # type: ignore[arg-type]
    plan.commit()
    assert numbers == sorted(numbers)
    stored = scheduler.restore("b", np.arange(91))
    assert not stored.copies
    again = rows_in(executor, stored, 91)
    assert same([(k[:90], v[:90]) for k, v in again], rows)

    collector = td.KVCollector(make_store())
    plan = collector.plan(PROMPTS)
    run_prefill(collector, plan)
    run_step(collector.step({"b": [*SAID, 5]}, prefill=()))
    plan.commit()
    assert same(again, restored(collector.store, "b"))


def test_rows_that_are_not_there_are_refused() -> None:
    collector = td.KVCollector(make_store())
    store = collector.store
    plan = collector.plan(PROMPTS)
    with pytest.raises(
        ValueError, match=r"agents: expected a finished prefill, got 'a' in prefill"
    ):
        plan.restore("a", np.arange(3))
    with pytest.raises(ValueError, match=r"rows: expected agents in decode, got 'a' \(prefill\)"):
        plan.append({"a": [1]})
    run_prefill(collector, plan)
    step = collector.step({"a": [1]}, prefill=())
    for act in (lambda: plan.restore("a", np.arange(3)), lambda: plan.append({"a": [1]})):
        with pytest.raises(ValueError, match=r"expected (one that is|agents) in no open step"):
            act()
    step.cancel()
    with pytest.raises(KeyError, match=r"agent: expected one of \['a', 'b'\], got 'c'"):
        plan.restore("c", np.arange(3))
    with pytest.raises(KeyError, match=r"agent: expected one of \['a', 'b'\], got 'c'"):
        plan.append({"c": [1]})
    with pytest.raises(KeyError, match=r"agent: expected one of \[\], got 'a'"):
        store.scheduler.restore("a", np.arange(3))
    with pytest.raises(ValueError, match=r"slots: expected int64 \[2, T\], got int64 \[3\]"):
        plan.restore(["a", "b"], np.arange(3))
    with pytest.raises(ValueError, match=r"slots: expected int64 \[1, T\], got float64 \[1, 3\]"):
        plan.restore("a", np.zeros((1, 3)))
    other = make_store()
    with pytest.raises(ValueError, match=r"plan: expected one of this collector's store"):
        other.restore("a", 0, *blank(1), torch.arange(1), plan=plan)

    record = plan.restore("a", np.arange(3))
    keys, values = blank(3), blank(3)
    executor = store.executor
    with pytest.raises(ValueError, match=r"layers: expected 0..1, got 2"):
        executor.restore(record, [0, 2], keys, values)
    with pytest.raises(ValueError, match=r"k_cache: expected 1 tensors of k_cache and v_cache"):
        executor.restore(record, [0], keys, values)
    with pytest.raises(ValueError, match=r"v_cache: expected memory of its own"):
        executor.restore(record, [0], keys[:1], keys[:1])
    record.version += 1
    with pytest.raises(ValueError, match=f"record: expected version {VERSION}, got {VERSION + 1}"):
        executor.restore(record, [0, 1], keys, values)

    appended = plan.append({"a": [1, 2]})
    keys, values = projected([1, 2])
    with pytest.raises(ValueError, match=r"keys: expected 2 tensors of keys and of values, got 1"):
        executor.append(appended, keys[:1], values, rotated=True)
    with pytest.raises(ValueError, match=r"values\[1\]: expected \[2, 1, 64\], got \[1, 1, 64\]"):
        executor.append(appended, keys, [values[0], values[1][:1]], rotated=True)
    appended.version += 1
    with pytest.raises(ValueError, match=f"record: expected version {VERSION}, got {VERSION + 1}"):
        executor.append(appended, keys, values, rotated=True)
    plan.abort()
    assert store.stats().held_pages == 0


def test_the_last_row_is_computed_again_for_its_logits_and_nothing_is_written() -> None:
    collector = td.KVCollector(make_store())
    store, scheduler = collector.store, collector.store.scheduler
    plan = collector.plan(PROMPTS)
    first = run_prefill(collector, plan)  # 'a' ends in a Master that it made, 'b' in a reused one
    before = [pool.clone() for pool in (*store.pool.k_pools, *store.pool.v_pools)]

    def again(agents: Sequence[str], decode: dict[str, list[int]]) -> dict[str, list[Tensor]]:
        planned = scheduler.step(decode, prefill=(), again=agents)
        assert planned is not None
        out = run_step(td.Step(store.executor, planned, None))
        rows: dict[str, list[Tensor]] = {}
        for agent, row in zip(planned.logit_agents, out[planned.record.logit_rows], strict=True):
            rows.setdefault(agent, []).append(row)
        return rows

    found = again(["b", "a"], {})
    assert {agent: len(rows) for agent, rows in found.items()} == {"a": 1, "b": 1}
    for agent, (row,) in found.items():
        torch.testing.assert_close(row, first[agent], rtol=1e-5, atol=1e-5)
    for pool, old in zip((*store.pool.k_pools, *store.pool.v_pools), before, strict=True):
        assert torch.equal(pool, old)
    assert {agent: plan.length(agent) for agent in PROMPTS} == {"a": 63, "b": 79}
    # Before rows that are decoded, beside an agent that decodes only.
    mixed = again(["b"], {"a": SAID[:2], "b": SAID[:3]})
    assert {agent: len(rows) for agent, rows in mixed.items()} == {"a": 2, "b": 4}
    torch.testing.assert_close(mixed["b"][0], first["b"], rtol=1e-5, atol=1e-5)
    assert plan.length("b") == 79 + 3
    # A decoded row.
    torch.testing.assert_close(again(["b"], {})["b"][0], mixed["b"][3], rtol=1e-5, atol=1e-5)
    # Cancelled, it has changed nothing.
    planned = scheduler.step({"a": [7]}, prefill=(), again=["a"])
    assert planned is not None
    with pytest.raises(ValueError, match="expected one that is in no open step, got 'a'"):
        scheduler.step(prefill=(), again=["a"])
    planned.cancel()
    assert plan.output("a") == SAID[:2]
    plan.add({"c": PROMPTS["a"], "d": []})
    with pytest.raises(ValueError, match=r"again: expected agents .* got 'c' \(prefill, 63 rows\)"):
        scheduler.step(prefill=(), again=["c"])
    with pytest.raises(ValueError, match=r"again: expected agents .* got 'd' \(decode, 0 rows\)"):
        scheduler.step(prefill=(), again=["d"])
    with pytest.raises(KeyError, match=r"agent: expected one of .* got 'e'"):
        scheduler.step(prefill=(), again=["e"])
    plan.abort()
