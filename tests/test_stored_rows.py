"""Recorded rounds: what is stored is distinct shared rows, private rows and overridden rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from driving import ROPE, make_store, run_prefill

import tokendance as td
from evals.workloads import find_workload, read_rounds, tokenize_round


def rounds(name: str, tokenizer: Any, count: int, **options: Any) -> Iterator[dict[str, Any]]:
    try:
        path = find_workload(name)
    except FileNotFoundError:
        pytest.skip(f"NOT RUN: the recorded workload {name} is not here (TOKENDANCE_WORKLOADS)")
    encode = partial(tokenizer.encode, add_special_tokens=False)
    for recorded in read_rounds(path, **options)[:count]:
        yield tokenize_round(recorded, encode, max_tokens=ROPE.max_position)


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "count", "options"),
    [("debate", 12, {"chat": True}), ("debate", 12, {}), ("agentsociety", 3, {"agents": 12})],
)
def test_bytes_are_at_most_8_percent_above_the_rows(
    name: str, count: int, options: dict[str, Any], smollm2: Any
) -> None:
    """Each Master and each agent's own rows begin on a fresh page: that is all the padding."""
    _, tokenizer = smollm2
    padding: dict[int, list[int]] = {}
    for block_size in (8, 16, 32):
        stored = least = 0
        for prompts in rounds(name, tokenizer, count, **options):
            store = make_store("512MiB", block_size)
            collector = td.KVCollector(store)
            plan = collector.plan(prompts)
            run_prefill(collector, plan)
            plan.commit()
            stats = store.stats()
            spans = [span for agent in prompts for span in plan.spans(agent)]
            own = sum(s.end - s.begin for s in spans if s.kind.value in ("own", "repaired"))
            made = sum(s.end - s.begin for s in spans if s.kind.value == "master")
            assert (stats.own_rows, stats.master_rows) == (own, made)
            assert plan.rows_computed == own + made
            stored += stats.stored_bytes
            least += stats.row_bytes
        padding[block_size] = [stored, least]
    shares = {size: round(stored / least, 4) for size, (stored, least) in padding.items()}
    print(f"\n{name} {options}: stored bytes / row bytes by block_size: {shares}")
    assert padding[8][0] <= 1.08 * padding[8][1]
