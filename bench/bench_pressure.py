"""What memory that is full costs the host: planning, and decoding, over pools of idle Masters.

Each case is measured over a pool that is free and over one that idle Masters of a page each fill:
whatever is taken has to be evicted first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.bench_plan import make_prompts
from tokendance.host.mirror import Master
from tokendance.host.plan import Plan
from tokendance.host.planned_step import PlannedStep
from tokendance.host.record import DeviceProfile, WorkShape
from tokendance.host.scheduler import Scheduler

BLOCK, AGENTS = 16, 8


class Pool:
    """A scheduler over a pool of so many pages, full of idle Masters or free."""

    def __init__(self, pages: int, full: bool) -> None:
        work = WorkShape(max_tile_rows=16, read_bound_rows=4, target_items=8)
        profile = DeviceProfile(28, pages, BLOCK, 1, 65536, work)
        self.scheduler = Scheduler(profile)
        self._full = full
        self._number = 0

    def fill(self) -> None:
        """Whatever pages are free get Masters, those that were evicted others."""
        books = self.scheduler.books
        free = books.free_pages if self._full else 0
        pages = books.take_pages(free)
        masters = []
        for page in pages:
            self._number += 1
            digest = self._number.to_bytes(16, "little")
            one = Master(digest, BLOCK, 0, b"", True, computed=BLOCK, stored=True)
            one.pages = np.array([page], dtype=np.int32)
            masters.append(one)
        books.take_over(masters)


@pytest.mark.parametrize("full", [False, True], ids=["free", "full"])
@pytest.mark.parametrize("pages", [1_000, 10_000, 100_000])
def bench_plan_under_pressure(benchmark: Any, pages: int, full: bool) -> None:
    """A round of 8 agents with 64 segments that are new."""
    pool = Pool(pages, full)
    prompts = make_prompts(AGENTS, 4096)
    plans: list[Plan] = []

    def setup() -> None:
        while plans:
            plans.pop().abort()
        pool.fill()

    benchmark.pedantic(
        lambda: plans.append(pool.scheduler.plan(prompts)), setup=setup, rounds=15, warmup_rounds=2
    )
    books = pool.scheduler.books
    benchmark.extra_info["pages"] = books.used_pages - books.evictable_pages
    plans.pop().abort()


@pytest.mark.parametrize("full", [False, True], ids=["free", "full"])
@pytest.mark.parametrize("pages", [1_000, 10_000, 100_000])
def bench_decode_under_pressure(benchmark: Any, pages: int, full: bool) -> None:
    """A step that decodes a token of each agent; one of them needs a page."""
    pool = Pool(pages, full)
    plan = pool.scheduler.plan(make_prompts(AGENTS, 4096))
    while step := pool.scheduler.step(max_rows=1 << 20):
        step.finish()
    _decode(pool, {agent: [1] for agent in plan.agents[1:]})  # their output has a page already
    steps: list[PlannedStep] = []

    def setup() -> None:
        while steps:
            steps.pop().cancel()
        pool.fill()

    def decode() -> None:
        step = pool.scheduler.step({agent: [2] for agent in plan.agents})
        assert step is not None
        steps.append(step)

    benchmark.pedantic(decode, setup=setup, rounds=200, warmup_rounds=10)
    assert (pool.scheduler.books.evictions >= 200) == full
    steps.pop().cancel()
    plan.abort()


def _decode(pool: Pool, tokens: dict[str, list[int]]) -> None:
    step = pool.scheduler.step(tokens)
    assert step is not None
    step.finish()
