"""Plans, steps and their ends: what is computed, kept and given back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from driving import (
    GEOMETRY,
    ROPE,
    make_store,
    prefill_steps,
    project,
    restored,
    run_prefill,
    run_round,
    run_step,
    same_snapshot,
    snapshot,
    tokens,
    without_idle,
)

import tokendance as td
from tokendance.host.selection import Selection
from tokendance.testing.reference import exact_rotation

A, B, C = (tokens(seed, count) for seed, count in ((1, 20), (2, 30), (3, 17)))
MINE, YOURS, THEIRS = tokens(10, 13), tokens(11, 29), tokens(12, 5)


def prompts() -> dict[str, list[td.Segment]]:
    return {
        "a": [td.private(MINE), td.shared(A), td.shared(B), td.private(C)],
        "b": [td.private(YOURS), td.shared(B), td.shared(A), td.shared(B)],
        "c": [td.private(THEIRS), td.shared(A), td.private(C)],
    }


def fail_in(step: td.Step) -> None:
    with step:
        step.attend(0, *project(step.token_ids, 0))
        raise LookupError("the engine's own mistake")


def _with_plan(collector: td.KVCollector, prompts: object, act: Callable[[], object]) -> None:
    with collector.plan(prompts):  # type: ignore[arg-type]
        act()


SELECTIONS = [td.LeadingTokens(4), td.KeyDeviation(0.3), td.Everything(), td.Nothing()]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("source", ["master", "alone", "producer"])
def test_chunks_do_not_change_the_result(source: str, selection: object) -> None:
    results = []
    for max_rows in (8192, 19, 1):
        collector = td.KVCollector(make_store(), source, selection)  # type: ignore[arg-type]
        plan = collector.plan(prompts())
        results.append(run_prefill(collector, plan, max_rows))
        plan.commit()
    for other in results[1:]:
        for agent, row in results[0].items():
            torch.testing.assert_close(other[agent], row, rtol=1e-5, atol=1e-6)


def test_kv_of_computed_rows_is_that_of_their_tokens_at_their_positions() -> None:
    """Keys depend on the token alone here, so every stored row is known, moved or not."""
    for selection in SELECTIONS:
        store = make_store()
        run_round(td.KVCollector(store, selection=selection), prompts(), max_rows=50)
        for agent, segments in prompts().items():
            ids = torch.from_numpy(np.concatenate([segment.token_ids for segment in segments]))
            for layer, (k, v) in enumerate(restored(store, agent)):
                _, fresh_k, fresh_v = project(ids.long(), layer)
                moved = exact_rotation(fresh_k, torch.arange(len(ids)), ROPE.cos, ROPE.sin, False)
                torch.testing.assert_close(k.double(), moved, rtol=0, atol=2e-6)
                assert torch.equal(v, fresh_v)


def test_rows_are_counted_exactly() -> None:
    store = make_store(block_size=8)
    collector = td.KVCollector(store, selection=td.LeadingTokens(4))
    plan = run_round(collector, prompts())
    stats = store.stats()
    private = len(MINE) + len(C) + len(YOURS) + len(THEIRS) + len(C)
    # b: the runs B and A; c: one run. Only b has B a second time: it computes a Master of it.
    overridden = 2 * 4 + 4
    assert plan.rows_overridden == overridden
    assert stats.master_rows == len(A) + 2 * len(B)
    assert stats.own_rows == private + overridden
    assert plan.rows_computed == private + overridden + len(A) + 2 * len(B)
    assert stats.dense_rows == plan.rows == sum(s.length for p in prompts().values() for s in p)
    assert stats.row_bytes == (stats.master_rows + stats.own_rows) * GEOMETRY.row_bytes


def test_more_rows_are_repaired_of_what_a_master_saw_less_in_front() -> None:
    round_ = {
        "a": [td.private(MINE), td.shared(A), td.shared(B), td.private(C)],
        "b": [td.private(YOURS), td.shared(B), td.shared(A), td.shared(B), td.private(C)],
    }

    def repaired(**options: int) -> list[int]:
        collector = td.KVCollector(make_store(), selection=td.LeadingTokens(**options))
        plan = collector.plan(round_)
        assert plan.spans("a")[1].kind.value == "master"
        result = [len(use.overridden(8)) for use in plan._live.state("b").uses]
        plan.abort()
        return result

    # B's Master has seen A. A's has not seen the 30 tokens of B, of a prompt of 126; the second B
    # is not reused: only b has it.
    assert repaired(count=4) == [4, 4, 0]
    assert repaired(count=4, unseen=21) == [4, 4 + 5, 0]
    assert repaired(count=0, unseen=4) == [0, 0, 0]
    assert repaired(count=0, unseen=5) == [0, 1, 0]
    assert repaired(count=4, unseen=126) == [4, 20, 0]  # A has no more
    assert repaired(count=4, unseen=63) == [4, 4 + 15, 0]
    assert repaired(count=4, unseen=126, most=11) == [4, 11, 0]
    assert repaired(count=6, unseen=126, most=2) == [6, 6, 0]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: type(s).__name__)
def test_abort_and_exceptions_leave_the_store_as_it_was(selection: object) -> None:
    store = make_store()
    collector = td.KVCollector(store, "producer", selection)  # type: ignore[arg-type]
    run_round(collector, {"a": prompts()["a"], "z": [td.private(C), td.shared(A)]})
    before = without_idle(store)

    collector.plan(prompts()).abort()
    assert same_snapshot(snapshot(store), before)

    with collector.plan(prompts()):
        pass
    assert same_snapshot(snapshot(store), before)

    plan = collector.plan(prompts())
    run_step(next(prefill_steps(collector, plan, 10)))
    with pytest.raises(LookupError), plan:
        raise LookupError
    assert plan.ended
    assert same_snapshot(without_idle(store), before)

    plan = collector.plan(prompts())
    steps = prefill_steps(collector, plan, 10)
    run_step(next(steps))
    with pytest.raises(LookupError, match="the engine's own"):
        fail_in(next(steps))
    assert plan.ended
    assert same_snapshot(without_idle(store), before)

    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    run_step(collector.step({"a": [1, 2, 3], "b": [4]}, prefill=()))
    plan.abort("b")
    with pytest.raises(ValueError, match="layer"), collector.step({"a": [1]}, prefill=()) as step:
        step.attend(1, *project(step.token_ids, 1))
    assert plan.ended
    assert same_snapshot(without_idle(store), before)

    plan = collector.plan(prompts())
    with (
        pytest.raises(ValueError, match="expected 2 layers, got 0"),
        next(prefill_steps(collector, plan)),
    ):
        pass
    assert same_snapshot(without_idle(store), before)
    run_round(collector, prompts())  # all pages are there again


def test_agents_end_at_different_times() -> None:
    store = make_store()
    collector = td.KVCollector(store, "producer")
    plan = collector.plan(prompts())
    run_prefill(collector, plan)
    run_step(collector.step({"a": [1], "b": [2, 3], "c": [4]}, prefill=()))
    plan.commit("b")
    plan.abort("a")  # the Master agent; its Masters stay with those who use them
    run_step(collector.step({"c": [5]}, prefill=()))
    plan.commit()
    assert store.agents == ["b", "c"]
    assert [store.length(agent) for agent in ("b", "c")] == [29 + 80 + 2, 42 + 2]
    assert store.scheduler.find(td.shared(A)) is not None
    assert store.scheduler.find(td.shared([4, 5])) is not None
    for agent, ids in (("b", [*YOURS, *B, *A, *B, 2, 3]), ("c", [*THEIRS, *A, *C, 4, 5])):
        for layer, (_, v) in enumerate(restored(store, agent)):
            assert torch.equal(v, project(torch.tensor(ids), layer)[2])
    with pytest.raises(ValueError, match="ended"):
        plan.commit("c")
    with pytest.raises(KeyError, match=r"agent: expected one of \[\], got 'a'"):
        collector.step({"a": [1]}, prefill=())
    for agent in ("b", "c"):
        store.release(agent)
    assert store.stats().own_rows == 0


def test_truncate_forgets_rejected_drafts() -> None:
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan({"a": [td.private(MINE)]})
    run_prefill(collector, plan)
    pages = store.stats().used_pages
    out = run_step(collector.step({"a": list(range(1, 20))}, prefill=()))
    plan.truncate("a", 13 + 2)
    assert plan.output("a") == [1, 2]
    again = run_step(collector.step({"a": [3]}, prefill=()))
    torch.testing.assert_close(again[0], out[2], rtol=1e-5, atol=1e-6)
    plan.truncate("a", 13)
    assert store.stats().used_pages == pages
    with pytest.raises(ValueError, match=r"length: expected 13\.\.13, got 12"):
        plan.truncate("a", 12)
    plan.commit()
    assert store.length("a") == 13


def test_decode_equals_prefill() -> None:
    collector = td.KVCollector(make_store(), selection=td.Everything())
    whole = collector.plan({a: [*p, td.private([5, 6, 7])] for a, p in prompts().items()})
    expected = run_prefill(collector, whole)
    whole.abort()
    plan = collector.plan(prompts())
    run_prefill(collector, plan, max_rows=33)
    run_step(collector.step({"c": [5], "a": [5, 6]}, prefill=()))
    run_step(collector.step({"b": [5, 6], "c": [6]}, prefill=()))
    out = run_step(collector.step({"a": [7], "c": [7], "b": [7]}, prefill=()))
    for agent, row in zip(("a", "c", "b"), out, strict=True):
        torch.testing.assert_close(row, expected[agent], rtol=1e-5, atol=1e-6)


def test_carried_rows_are_copied_before_they_are_extended() -> None:
    """The earlier Mirror shares its full pages with the plan and must not see its writes."""
    store = make_store()
    collector = td.KVCollector(store)
    run_round(collector, {"a": [td.private(tokens(30, 21))]})
    before = restored(store, "a")
    plan = collector.plan({"a": [td.private(np.concatenate([tokens(30, 21), tokens(31, 30)]))]})
    run_prefill(collector, plan)
    assert plan.rows_computed == 30
    for (k, v), (old_k, old_v) in zip(restored(store, "a"), before, strict=True):
        assert torch.equal(k, old_k)
        assert torch.equal(v, old_v)
    plan.commit()
    for (k, v), (old_k, old_v) in zip(restored(store, "a"), before, strict=True):
        assert torch.equal(k[:21], old_k)
        assert torch.equal(v[:21], old_v)


def test_key_deviation_keeps_its_number_of_rows_and_the_worst_ones() -> None:
    """Layer 1 keys here depend on the token alone, so only what is disturbed deviates."""
    store = make_store()
    selection = td.KeyDeviation(0.2, layer=1)
    collector = td.KVCollector(store, selection=selection)
    plan = collector.plan(
        {
            "a": [td.private(MINE), td.shared(A), td.private(C)],
            "b": [td.private(YOURS), td.shared(A), td.private(C)],
            "c": [td.private(THEIRS), td.shared(A), td.private(C)],
        }
    )
    worst = [3, 11, 12, 19]
    for step in prefill_steps(collector, plan):
        with step:
            ids, positions = step.token_ids, step.positions
            for layer in range(GEOMETRY.num_layers):
                q, k, v = project(ids, layer)
                if layer == 1:
                    disturbed = torch.tensor([agent in ("b", "c") for agent in step.agents])
                    for row in worst:
                        for start in (len(YOURS), len(THEIRS)):
                            hit = disturbed & (positions == start + row)
                            k = k + hit[:, None, None] * 0.5
                step.attend(layer, q, k, v)
                ids, positions = step.keep(ids, positions)
    plan.commit()
    for agent in ("b", "c"):
        (use,) = store.mirror(agent).uses
        assert use.overridden(8).tolist() == worst
    assert store.stats().own_rows == 13 + 29 + 5 + 3 * 17 + 2 * 4
    rows = 13 + 20 + 29 + 5 + 3 * 17
    assert plan.rows_computed == rows + 2 * 20  # both layers' projections ran on all rows


def test_engine_pool_with_interleaved_keys_and_values() -> None:
    layers = [torch.full((64, 8, 2, 1, 64), torch.nan) for _ in range(GEOMETRY.num_layers)]
    free = list(range(64))
    taken: list[int] = []

    def allocate(count: int) -> list[int]:
        if count > len(free):
            raise td.OutOfPagesError(f"{count} pages")
        pages = [free.pop() for _ in range(count)]
        taken.extend(pages)
        return pages

    def give_back(pages: list[int]) -> None:
        for page in pages:
            taken.remove(page)
            free.append(page)

    pool = td.PagePool(
        [layer[:, :, 0] for layer in layers],
        [layer[:, :, 1] for layer in layers],
        allocate,
        give_back,
    )
    store = td.DiffStore(GEOMETRY, ROPE, pool=pool)
    own = make_store()
    for one in (store, own):
        run_round(td.KVCollector(one), prompts())
    assert len(taken) == store.stats().used_pages == own.stats().used_pages
    for agent in prompts():
        for (k, v), (own_k, own_v) in zip(
            restored(store, agent), restored(own, agent), strict=True
        ):
            assert torch.equal(k, own_k)
            assert torch.equal(v, own_v)
        store.release(agent)
    with pytest.raises(td.OutOfPagesError):
        td.KVCollector(store).plan({"x": [td.private(tokens(1, 64 * 8 + 1))]})


def test_eviction_takes_the_longest_unused_master_and_never_one_in_use() -> None:
    store = td.DiffStore(GEOMETRY, ROPE, 16 * 8 * GEOMETRY.row_bytes, block_size=8)
    collector = td.KVCollector(store)
    old, new, used = (td.shared(tokens(seed, 32)) for seed in (1, 2, 3))
    for agent, segment in (("a", old), ("b", new), ("c", used)):
        run_round(collector, {agent: [segment]})
    store.release("a")
    store.release("b")
    assert store.stats().masters == 3
    run_round(collector, {"d": [td.private(tokens(9, 40))]})
    assert store.scheduler.find(old) is None
    assert store.scheduler.find(new) is not None
    with pytest.raises(td.OutOfPagesError, match="capacity"):
        collector.plan({"e": [td.private(tokens(9, 100))]})
    assert store.scheduler.find(used) is not None
    assert store.agents == ["c", "d"]
    run_round(collector, {"e": [td.private(tokens(9, 24))]})


def test_out_of_pages_while_decoding_changes_nothing() -> None:
    store = td.DiffStore(GEOMETRY, ROPE, 4 * 8 * GEOMETRY.row_bytes, block_size=8)
    collector = td.KVCollector(store)
    plan = collector.plan({"a": [td.private(tokens(1, 8))], "b": [td.private(tokens(2, 8))]})
    run_prefill(collector, plan)
    run_step(collector.step({"a": list(range(8))}, prefill=()))
    with pytest.raises(td.OutOfPagesError):
        collector.step({"b": [1], "a": [9]}, prefill=())
    assert (plan.length("a"), plan.length("b")) == (16, 8)
    assert not plan.ended
    run_step(collector.step({"b": [1]}, prefill=()))
    plan.commit()
    assert store.length("b") == 9


def test_empty_rounds() -> None:
    store = make_store()
    collector = td.KVCollector(store)
    plan = collector.plan({})
    assert list(prefill_steps(collector, plan)) == []
    plan.commit()
    plan = collector.plan({"a": [], "b": [td.shared([])]})
    assert run_prefill(collector, plan) == {}
    assert collector.step({}, prefill=()) is None
    run_step(collector.step({"a": [1, 2]}, prefill=()))
    plan.commit()
    assert [store.length(agent) for agent in ("a", "b")] == [2, 0]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda c: c.plan({"a": [[1, 2]]}), TypeError, r"prompts\['a'\]: expected segments"),
        (
            lambda c: c.plan({"a": [td.private(tokens(1, 4097))]}),
            ValueError,
            r"prompts\['a'\]: expected at most 4096 tokens .* got 4097",
        ),
        (lambda c: c.plan({"a": td.shared([1])}), TypeError, r"prompts\['a'\]: .* got Segment"),
        (lambda c: c.plan({7: []}), ValueError, r"prompts: expected agents' names \(str\), got 7"),
        (
            lambda c: c.audit(td.KVCollector(make_store()).plan({})),
            ValueError,
            "plan: expected one of this collector's store",
        ),
        (lambda c: c.step(max_rows=0), ValueError, "max_rows: expected at least 1, got 0"),
        (lambda c: c.step({"x": [1]}), KeyError, "agent: expected one of"),
        (lambda c: c.step(prefill=["x"]), KeyError, "agent: expected one of"),
        (
            lambda c: _with_plan(c, {"a": [td.private([1])]}, lambda: c.step({"a": [1]})),
            ValueError,
            r"decode: expected agents in decode, got 'a' \(prefill\)",
        ),
        (
            lambda c: _with_plan(c, {"a": []}, lambda: c.step({"a": []})),
            ValueError,
            r"decode\['a'\]: expected at least one token",
        ),
        (
            lambda c: _with_plan(c, {"a": []}, lambda: c.plan({"a": []})),
            ValueError,
            "prompts: expected agents of no live plan, got 'a' a second time",
        ),
        (lambda c: c.store.evict(-1), ValueError, "pages: expected at least 0, got -1"),
        (
            lambda c: _with_plan(c, {"a": []}, c.store.clear),
            ValueError,
            r"store: expected no agents of plans that have not ended, got \['a'\]",
        ),
        (
            lambda c: c.plan({"a": [td.private([1])]}).commit(),
            ValueError,
            "agents: expected a finished prefill",
        ),
        (lambda c: c.store.release("x"), KeyError, "agent: expected one of"),
        (lambda c: c.store.length("x"), KeyError, "agent: expected one of"),
        (lambda c: td.KVCollector(c.store, "bad"), ValueError, "source: expected one of"),
        (lambda c: td.KVCollector(c.store, "master", 4), ValueError, "selection: expected"),
        (lambda c: td.KeyDeviation(0.0), ValueError, "ratio: expected 0 < ratio <= 1, got 0.0"),
        (lambda c: td.LeadingTokens(-1), ValueError, "count: expected at least 0, got -1"),
        (lambda c: td.LeadingTokens(4.5), TypeError, r"count: expected an int, got 4\.5"),
        (lambda c: td.KeyDeviation(layer=1.0), TypeError, r"layer: expected an int, got 1\.0"),
    ],
)
def test_errors_name_the_argument(make: object, error: type[Exception], text: str) -> None:
    collector = td.KVCollector(make_store())
    with pytest.raises(error, match=text):
        make(collector)  # type: ignore[operator]


def test_prompts_and_tokens_may_be_iterators() -> None:
    stores = []
    for as_given in (list, iter):
        collector = td.KVCollector(make_store())
        plan = collector.plan({agent: as_given(one) for agent, one in prompts().items()})
        run_prefill(collector, plan)
        run_step(collector.step({"a": as_given([1, 2])}, prefill=()))
        plan.commit()
        stores.append(collector.store)
    assert same_snapshot(*map(snapshot, stores))
    assert stores[0].length("a") == len(MINE) + len(A) + len(B) + len(C) + 2


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([-1], ValueError, "token ids in 0 .. 2147483647, got -1"),
        ([2**40], ValueError, "token ids in 0 .. 2147483647, got 1099511627776"),
        ([1.7], TypeError, "integers, got float64"),
        ("57", ValueError, r"shape \[length\], got \[\]"),
        (["5"], TypeError, "integers, got <U1"),
    ],
)
def test_decode_takes_the_token_ids_that_segments_take(
    ids: object, error: type[Exception], text: str
) -> None:
    collector = td.KVCollector(make_store())
    plan = collector.plan({"a": [], "b": []})
    with pytest.raises(error, match=rf"decode\['b'\]: expected {text}"):
        collector.step({"a": [1], "b": ids}, prefill=())  # type: ignore[dict-item]
    run_step(collector.step({"a": np.array([1]), "b": torch.tensor([2, 3])}, prefill=()))
    assert (plan.output("a"), plan.output("b")) == ([1], [2, 3])


def test_a_plan_that_cannot_copy_what_it_carries_leases_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make_store()
    collector = td.KVCollector(store)
    run_round(collector, prompts())
    before = snapshot(store)
    longer = {agent: [*one, td.shared(tokens(7, 20))] for agent, one in prompts().items()}
    with monkeypatch.context() as patch:
        patch.setattr(store.pool, "write_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collector.plan(longer)
    assert same_snapshot(snapshot(store), before)
    run_round(collector, longer)


def test_decode_beyond_the_table_is_refused() -> None:
    rope = td.Rope.default(head_dim=64, theta=10000.0, max_position=16)
    store = td.DiffStore(GEOMETRY, rope, "1MiB", block_size=8)
    collector = td.KVCollector(store)
    plan = collector.plan({"a": [td.private(tokens(1, 15))]})
    run_prefill(collector, plan)
    with pytest.raises(ValueError, match="positions below 16, got 16"):
        collector.step({"a": [1, 2]}, prefill=())
    run_step(collector.step({"a": [1]}, prefill=()))
    with pytest.raises(ValueError, match="positions below 16, got 16"):
        collector.step({"a": [1]}, prefill=())


def test_steps_refuse_what_does_not_fit() -> None:
    collector = td.KVCollector(make_store())
    plan = collector.plan({"a": [td.private(tokens(1, 5))]})
    step = next(prefill_steps(collector, plan))
    with pytest.raises(ValueError, match="entered step"):
        step.attend(0, torch.zeros(5, 2, 64), torch.zeros(5, 1, 64), torch.zeros(5, 1, 64))
    step.cancel()
    with pytest.raises(ValueError, match="has not been entered"):
        step.cancel()
    plan.abort()
    q, k, v = torch.zeros(5, 2, 64), torch.zeros(5, 1, 64), torch.zeros(5, 1, 64)
    for bad, text in (
        ((q[:4], k, v), r"q: expected \[5, 2, 64\], got \[4, 2, 64\]"),
        ((q, q, v), r"k: expected \[5, 1, 64\], got \[5, 2, 64\]"),
        ((q, k, v.half()), "v: expected torch.float32 on cpu, got torch.float16 on cpu"),
    ):
        plan = collector.plan({"a": [td.private(tokens(1, 5))]})
        with pytest.raises(ValueError, match=text), next(prefill_steps(collector, plan)) as step:
            step.attend(0, *bad)
        assert plan.ended
    plan = collector.plan({"a": [td.private(tokens(1, 5))]})
    step = collector.step(max_rows=3)
    assert collector.step(max_rows=3) is None  # the agent's rows wait for those of the open step
    run_step(step)
    with pytest.raises(ValueError, match="has not been entered"):
        run_step(step)
    run_step(collector.step(max_rows=3))
    plan.commit()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layer": -1}, r"layer: expected 0 \.\. 1, got -1"),
        ({"layer": 2}, r"layer: expected 0 \.\. 1, got 2"),
        ({"window": -1}, r"window: expected an int in 0 \.\. 2147483647, got -1"),
        ({"window": 2**31}, r"window: expected an int in 0 \.\. 2147483647, got 2147483648"),
        ({"window": 4.0}, r"window: expected an int in 0 \.\. 2147483647, got 4.0"),
        ({"soft_cap": -1.0}, "soft_cap: expected a finite number of at least 0, got -1.0"),
        ({"soft_cap": float("inf")}, "soft_cap: expected a finite number of at least 0, got inf"),
        ({"softmax_scale": float("nan")}, "softmax_scale: expected a finite number, got nan"),
        ({"sinks": torch.zeros(3)}, r"sinks: expected \[2\], got \[3\]"),
        ({"sinks": torch.zeros(2).half()}, "sinks: expected torch.float32 on cpu, got torch.float"),
    ],
)
@pytest.mark.parametrize("selection", [None, td.KeyDeviation(0.3)], ids=str)
def test_a_call_that_was_refused_can_be_repeated(
    options: dict[str, object], text: str, selection: Selection | None
) -> None:
    stores = []
    for refused in (False, True):
        collector = td.KVCollector(make_store(), selection=selection)
        plan = collector.plan(prompts())
        for step in prefill_steps(collector, plan):
            with step:
                ids = step.token_ids
                for layer in range(GEOMETRY.num_layers):
                    q, k, v = project(ids, layer)
                    if refused:
                        before = plan.rows_computed, plan.pairs_computed
                        with pytest.raises(ValueError, match=text):
                            step.attend(**{"layer": layer, "q": q, "k": k + 1, "v": v, **options})
                        assert (plan.rows_computed, plan.pairs_computed) == before
                    step.attend(layer, q, k, v)
                    (ids,) = step.keep(ids)
        with pytest.raises(ValueError, match="entered step"):
            step.attend(2, q, k, v)
        plan.commit()
        stores.append((snapshot(collector.store), plan.rows_computed, plan.pairs_computed))
    assert same_snapshot(stores[0][0], stores[1][0])
    assert stores[0][1:] == stores[1][1:]
