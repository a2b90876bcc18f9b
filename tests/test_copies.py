"""Copies: of a segment it is the same, of what holds pages there are none."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from driving import make_store, prefill_steps, run_round, tokens

import tokendance as td
from tokendance.host.books import PageAllocator

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda x: copy.deepcopy([x])[0],
    **{
        f"pickle {protocol}": lambda x, protocol=protocol: pickle.loads(pickle.dumps(x, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.fixture(scope="module")
def things() -> dict[str, Any]:
    store = make_store()
    collector = td.KVCollector(store)
    shared = td.shared(tokens(1, 20))
    prompts = {"a": [shared], "b": [td.private([1]), shared]}
    run_round(collector, prompts)
    plan = collector.plan(prompts)
    step = next(prefill_steps(collector, plan))
    audit = collector.audit(plan)
    return {
        "DiffStore": store,
        "KVCollector": collector,
        "Plan": plan,
        "Step": step,
        "Audit": audit,
        "PagePool": store.pool,
        "Executor": store.executor,
        "Scheduler": store.scheduler,
        "Books": store.scheduler.books,
        "PageAllocator": PageAllocator(8),
        "Decoder": collector.decoder(2, 2, 8),
    }


WAYS = {
    "DiffStore": "write it with store.export_agents",
    "KVCollector": "make another KVCollector over a store that DiffStore.open has read",
    "Plan": "make another by KVCollector.plan",
    "Step": "ask the collector for the next step",
    "Audit": "make another by KVCollector.audit",
    "PagePool": "make another PagePool",
    "Executor": "make another over a pool of its own",
    "Scheduler": "make another with the same profile",
    "Books": "make another over an allocator of its own",
    "PageAllocator": "make another for pages of its own",
    "Decoder": "ask the collector for another",
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", WAYS)
def test_what_holds_pages_is_not_copied(things: dict[str, Any], name: str, how: str) -> None:
    expected = rf"^{name}: expected to stay one object, .* got a request to copy .*; {WAYS[name]}"
    with pytest.raises(TypeError, match=expected):
        COPIES[how](things[name])


@pytest.mark.parametrize("how", COPIES)
def test_what_holds_none_is_copied(things: dict[str, Any], how: str) -> None:
    assert COPIES[how](things["DiffStore"].stats()) == things["DiffStore"].stats()
    assert COPIES[how](things["DiffStore"].geometry) == things["DiffStore"].geometry


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [td.private, td.shared])
def test_copied_segments_are_equal_and_stay_read_only(make: Any, how: str) -> None:
    segment = make(tokens(3, 9), namespace="tenant")
    copied = COPIES[how](segment)
    assert copied == segment
    assert (copied.stem, copied.space) == (segment.stem, segment.space)
    assert np.array_equal(copied.token_ids, segment.token_ids)
    with pytest.raises(ValueError, match="read-only"):
        copied.token_ids[0] = 1


def test_segments_of_buffers_that_may_be_written_are_copies() -> None:
    segment = td.shared(tokens(3, 9))
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(segment, 5, buffer_callback=buffers.append)
    memory = [bytearray(buffer.raw()) for buffer in buffers]
    copied = pickle.loads(data, buffers=memory)
    for block in memory:
        block[:] = bytes(len(block))
    assert np.array_equal(copied.token_ids, segment.token_ids)
