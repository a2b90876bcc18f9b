"""Decode steps in fixed buffers against eager ones, bit for bit: the same buffers serve all of
them, whoever comes, grows or ends. On CUDA the layers are captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
import torch
from driving import GEOMETRY, ROPE, prefill_steps, tokens
from torch import Tensor

import tokendance as td
from tokendance.device import operators as ops
from tokendance.host.record import VERSION, StepRecord
from tokendance.host.step_rows import extents_of

OPERATOR = "collective_attention"
ROWS = 6
HEARD, SAID = tokens(1, 20), tokens(2, 12)


class Layers:
    """Stands for a model: keys and values that depend on token and layer, attention, a residual."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tables = [
            torch.randn(1000, 256, generator=generator).to(device)
            for _ in range(GEOMETRY.num_layers)
        ]

    def run(self, attend: Callable[..., Tensor], token_ids: Tensor) -> Tensor:
        total = torch.zeros(len(token_ids), 2, 64, device=token_ids.device)
        for layer, table in enumerate(self.tables):
            q, k, v = table[token_ids].split([128, 64, 64], dim=1)
            out = attend(layer, q.view(-1, 2, 64) + total, k.view(-1, 1, 64), v.view(-1, 1, 64))
            total = total + out
        return total


class Engine:
    """A collector, eager or with a decoder."""

    def __init__(self, device: torch.device, max_agents: int | None) -> None:
        store = td.DiffStore(GEOMETRY, ROPE, "2MiB", device, block_size=8)
        self.collector = td.KVCollector(store, "producer")
        self.layers = Layers(device)
        self.decoder = None
        if max_agents is not None:
            self.decoder = self.collector.decoder(max_agents, ROWS, max_pages=40, max_masters=12)

    def prefill(self, plan: td.Plan) -> None:
        for step in prefill_steps(self.collector, plan):
            with step:
                self.layers.run(step.attend, step.token_ids)

    def decode(self, ids: Mapping[str, list[int]]) -> Tensor:
        if self.decoder is None:
            with self.collector.step(ids, prefill=()) as step:  # type: ignore[union-attr]
                return self.layers.run(step.attend, step.token_ids)
        decoder = self.decoder
        with decoder.prepare(ids) as step:
            out = decoder.replay(lambda: self.layers.run(decoder.attend, decoder.token_ids))
            out = out[: step.num_rows].clone()
        assert step.agents == [agent for agent, fed in ids.items() for _ in fed]
        return out


def play(engine: Engine) -> Iterator[Tensor | list[str]]:
    """Arrivals, drafts, rejected ones, ends, and a round that reuses what was said."""
    collector = engine.collector
    heard, said = td.shared(HEARD), td.shared(SAID)
    plan = collector.plan(
        {
            "a": [td.private(tokens(3, 5)), heard, said],
            "b": [td.private(tokens(4, 9)), said, heard],
        }
    )
    engine.prefill(plan)
    yield engine.decode({"a": [1], "b": [2]})
    yield engine.decode({"b": [3, 4, 5]})
    plan.truncate("b", plan.length("b") - 2)
    late = collector.plan({"c": [td.private(tokens(5, 3)), heard, td.private([6])]})
    engine.prefill(late)
    yield engine.decode({"c": [7], "a": [8], "b": [9]})
    plan.commit("a")
    yield engine.decode({"c": list(range(10, 10 + ROWS - 1)), "b": [10]})
    plan.add({"d": [td.shared([1, 8]), heard, heard]})  # one Master twice
    engine.prefill(plan)
    yield engine.decode({"d": [11], "b": [12]})
    plan.commit()
    late.abort()
    later = collector.plan({"a": [td.private(tokens(3, 5)), heard, said, td.shared([1, 8, 2])]})
    engine.prefill(later)
    for token in range(20, 24):
        yield engine.decode({"a": [token]})
    later.commit()
    yield collector.store.agents
    for agent in collector.store.agents:
        rows = collector.store.length(agent)
        out = torch.full((2, rows, 1, 64), torch.nan, device=collector.store.device)
        collector.store.restore(agent, 1, out[0], out[1], torch.arange(rows, device=out.device))
        yield out


class _Operators:
    """Operators of the package, run by a backend."""

    def __init__(self, backend: object, others: object) -> None:
        self._backend, self._others = backend, others

    def __getattr__(self, name: str) -> object:
        runs_here = ("rope_rotate_out", "collective_attention_out", "diff_restore")
        return getattr(self._backend if name in runs_here else self._others, name)


def test_a_decoder_gives_what_eager_steps_give(
    backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_ops", _Operators(backend, ops._ops))
    device = backend.device  # type: ignore[attr-defined]
    eager, fixed = Engine(device, None), Engine(device, 4)
    buffers = [fixed.decoder.token_ids.data_ptr(), fixed.decoder._run._workspace.data_ptr()]
    for expected, found in zip(play(eager), play(fixed), strict=True):
        if isinstance(expected, list):
            assert found == expected
        else:
            assert torch.equal(found, expected)
    assert buffers == [
        fixed.decoder.token_ids.data_ptr(),
        fixed.decoder._run._workspace.data_ptr(),
    ]


@pytest.fixture
def planned() -> tuple[td.KVCollector, td.Plan]:
    engine = Engine(torch.device("cpu"), None)
    plan = engine.collector.plan({a: [td.private(tokens(i, 9))] for i, a in enumerate("abc")})
    engine.prefill(plan)
    return engine.collector, plan


def test_a_decoder_says_beforehand_when_it_must_grow(
    planned: tuple[td.KVCollector, td.Plan],
) -> None:
    collector, plan = planned
    small = collector.decoder(max_agents=2, max_rows=4, max_pages=8, max_masters=3)
    before = collector.store.stats()
    for ids, needed in (
        ({"a": [1], "b": [2], "c": [3]}, "at least 3 agents, got 2"),
        ({"a": [1, 2, 3], "b": [1, 2]}, "at least 5 rows, got 4"),
    ):
        assert not small.fits(ids)
        with pytest.raises(ValueError, match=f"capacity: expected {needed}"):
            small.prepare(ids)
        assert collector.store.stats() == before
    assert small.fits({"a": [1], "b": [2, 3]})
    tiny = collector.decoder(max_agents=2, max_rows=32, max_pages=2)
    assert not tiny.fits({"a": list(range(17))})
    with pytest.raises(ValueError, match=r"capacity: expected at least 3 (use_pages|master_pages)"):
        tiny.prepare({"a": list(range(17))})
    narrow = collector.decoder(max_agents=2, max_rows=2, max_pages=8, max_masters=1)
    with pytest.raises(ValueError, match="capacity: expected at least 2 masters, got 1"):
        narrow.prepare({"a": [1], "b": [1]})
    with pytest.raises(ValueError, match="decode: expected at least one agent, got none"):
        small.prepare({})
    plan.abort()


def test_the_extents_that_are_foreseen_are_those_of_the_step(
    planned: tuple[td.KVCollector, td.Plan],
) -> None:
    collector, plan = planned
    scheduler = collector.store.scheduler
    plan.add({"d": [td.shared(HEARD), td.shared(HEARD)], "e": [td.private([5]), td.shared(HEARD)]})
    for step in prefill_steps(collector, plan):
        with step:
            Layers(torch.device("cpu")).run(step.attend, step.token_ids)
    for ids in ({"a": [1]}, {"a": [1] * 9, "d": [2], "e": [3, 4]}, {"d": [1] * 20, "b": [1]}):
        foreseen = extents_of(scheduler._rows.fed(ids))
        step = collector.step(ids, prefill=())
        assert step is not None
        extents = step.record.rounds[0].extents
        assert {name: getattr(extents, name) for name in foreseen} == foreseen
        with step:
            Layers(torch.device("cpu")).run(step.attend, step.token_ids)
    plan.commit()


def test_a_prepared_step_is_cancelled_failed_and_never_run_twice(
    planned: tuple[td.KVCollector, td.Plan],
) -> None:
    collector, plan = planned
    decoder = collector.decoder(max_agents=3, max_rows=4, max_pages=16)
    before = collector.store.stats()
    step = decoder.prepare({"a": [1, 2]})
    step.cancel()
    assert collector.store.stats() == before
    with pytest.raises(ValueError, match="expected one that is open"), step:
        pass
    step = decoder.prepare({"a": [1]})
    with pytest.warns(ResourceWarning, match="expected a step to be run or cancelled"):
        del step
    assert collector.store.stats() == before
    with pytest.raises(LookupError), decoder.prepare({"a": [1]}):
        raise LookupError
    assert plan.ended
    assert collector.store.stats().used_pages == 0


def test_a_fixed_run_refuses_records_that_it_was_not_made_for(
    planned: tuple[td.KVCollector, td.Plan],
) -> None:
    collector, plan = planned
    decoder = collector.decoder(max_agents=3, max_rows=4, max_pages=16)
    step = collector.step({"a": [1]}, prefill=())
    assert step is not None
    record: StepRecord = step.record
    with pytest.raises(ValueError, match="record: expected 4 rows, got 1"):
        decoder._run.load(record)
    with pytest.raises(ValueError, match="record: expected RoundExtents"):
        decoder._run.load(record.padded(4))
    record.version = 0
    with pytest.raises(ValueError, match=f"record: expected version {VERSION}, got 0"):
        decoder._run.load(record)
    step.cancel()
    q, k = torch.zeros(4, 2, 64), torch.zeros(4, 1, 64)
    for layer, window, text in (
        (2, 0, r"layer: expected 0 \.\. 1, got 2"),
        (0, 5, r"window: expected one of \[0\], got 5"),
    ):
        with pytest.raises(ValueError, match=text):
            decoder.attend(layer, q, k, k, window=window)
    with pytest.raises(ValueError, match=r"q: expected \[4, 2, 64\], got \[3, 2, 64\]"):
        decoder.attend(0, q[:3], k, k)
    for name in ("max_agents", "max_rows", "max_pages", "max_masters"):
        sizes = {"max_agents": 1, "max_rows": 1, "max_pages": 1, "max_masters": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            collector.decoder(**sizes)
    plan.abort()


def test_windows_have_buffers_of_their_own() -> None:
    results = []
    for fixed in (False, True):
        engine = Engine(torch.device("cpu"), None)
        collector = engine.collector
        plan = collector.plan({"a": [td.private(tokens(1, 30))]})
        for step in prefill_steps(collector, plan):
            with step:
                engine.layers.run(step.attend, step.token_ids)
        windows = (0, 7)
        if fixed:
            decoder = collector.decoder(2, 2, 16, windows=windows)
            prepared = decoder.prepare({"a": np.array([1, 2])})
            attend, ids = decoder.attend, decoder.token_ids
        else:
            prepared = collector.step({"a": [1, 2]}, prefill=())  # type: ignore[assignment]

        def attended(layer: int, *qkv: Tensor) -> Tensor:
            return attend(layer, *qkv, window=windows[layer])  # noqa: B023

        with prepared as step:
            if not fixed:
                attend, ids = step.attend, step.token_ids  # type: ignore[attr-defined]
            results.append(engine.layers.run(attended, ids))
        plan.commit()
    assert torch.equal(*results)
