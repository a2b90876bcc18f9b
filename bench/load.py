"""A store that many agents live on for long: does anything grow that should not?

    python -m bench.load
    python -m bench.load --agents 10000 --rounds 100 --many 100000

1. Rounds: in each, every agent plays once, in companies of 64 that hear three new segments.
   Printed: the median time of later rounds as a multiple of the first ten's, how much the process
   has grown since those, and the bytes of the books' pages over those that the process has taken.
2. Many: `plan` and `commit` of 64 agents beside as many others, as a multiple of the same in an
   empty store: minima of turns. The host half alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import tokendance as td
from tokendance.host.plan import Plan
from tokendance.host.record import DeviceProfile, WorkShape
from tokendance.host.scheduler import Scheduler

GEOMETRY = td.KVGeometry(
    num_layers=2, num_q_heads=2, num_kv_heads=2, head_dim=64, dtype=torch.float32
)
BLOCK, COMPANY, OWN, HEARD = 16, 64, 64, 48
FIRST = 10
"""Rounds that the others are held against."""
MIB = 1 << 20


def resident() -> int:
    """Bytes of the process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def companies(agents: int) -> Iterator[list[str]]:
    names = [f"agent {i}" for i in range(agents)]
    for begin in range(0, agents, COMPANY):
        yield names[begin : begin + COMPANY]


def prompts_of(names: list[str], seed: int) -> dict[str, list[td.Segment]]:
    """Rows of each agent's own, and three segments that all of them hear."""
    rng = np.random.default_rng(seed)
    heard = [td.shared(rng.integers(0, 50_000, HEARD)) for _ in range(3)]
    return {name: [td.private(rng.integers(0, 50_000, OWN)), *heard] for name in names}


# Rounds -------------------------------------------------------------------------------------------


def play(collector: td.KVCollector, prompts: dict[str, list[td.Segment]]) -> None:
    """A round whose keys and values are those of nobody: the store does not mind."""
    plan = collector.plan(prompts)
    while (step := collector.step(max_rows=1 << 14)) is not None:
        with step:
            rows = torch.zeros(len(step.positions), 2, 64)
            for layer in range(GEOMETRY.num_layers):
                step.attend(layer, rows, rows, rows)
    plan.commit()


def rounds(agents: int, count: int) -> None:
    rope = td.Rope.default(head_dim=64, theta=10000.0, max_position=1024)
    page = BLOCK * GEOMETRY.row_bytes
    # Rows of all agents' own, twice those of a company, and Masters of three rounds: full early.
    masters = -(-agents // COMPANY) * 3 * (HEARD // BLOCK)
    needed = (agents + COMPANY) * (OWN // BLOCK + 1) + 3 * masters
    # What torch and others take once is not the store's.
    play(td.KVCollector(td.DiffStore(GEOMETRY, rope, 4096 * page)), prompts_of(["first"], 0))
    collector = td.KVCollector(td.DiffStore(GEOMETRY, rope, needed * page, block_size=BLOCK))
    gc.collect()
    begin, times, sizes = resident(), [], []
    for number in range(count):
        start = time.perf_counter()
        for i, names in enumerate(companies(agents)):
            play(collector, prompts_of(names, number * agents + i))
        times.append(time.perf_counter() - start)
        gc.collect()
        sizes.append(resident())
        print(f"\rround {number + 1} of {count}: {times[-1]:.1f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    early, late = statistics.median(times[:FIRST]), statistics.median(times[FIRST:] or times)
    warm = sizes[min(FIRST, count) - 1]
    stats = collector.store.stats()
    print(f"{agents} agents, {count} rounds, {COMPANY} in a company")
    print(f"round: {late / early:.2f}x of the first {FIRST}'s ({early:.1f} s)")
    print(f"process: {(sizes[-1] - warm) / MIB:+.1f} MiB since then, of {sizes[-1] / MIB:.0f}")
    books, taken = stats.used_pages * page, sizes[-1] - begin
    # Memory that the process had before and gave to nobody may be enough.
    share = f"{books / taken:.3f} of what they have taken" if taken > 0 else "nothing was taken"
    print(f"books: {books / MIB:.0f} MiB, {share}")


# Many agents --------------------------------------------------------------------------------------


def scheduler(pages: int) -> Scheduler:
    work = WorkShape(max_tile_rows=16, read_bound_rows=4, target_items=8)
    return Scheduler(DeviceProfile(28, pages, BLOCK, 1, 4096, work))


def compute(of: Scheduler, plan: Plan) -> None:
    while (step := of.step_of(plan, 1 << 20)) is not None:
        step.finish()


def turn(of: Scheduler, seed: int) -> float:
    """Seconds of a round's plan and commit; its agents are gone afterwards."""
    prompts = prompts_of([f"visitor {i}" for i in range(COMPANY)], seed)
    gc.collect()
    start = time.perf_counter()
    plan = of.plan(prompts)
    planned = time.perf_counter()
    compute(of, plan)
    computed = time.perf_counter()
    plan.commit()
    end = time.perf_counter()
    for name in prompts:
        of.books.drop(name)
    of.books.evict(of.books.num_pages)
    return planned - start + end - computed


def many(agents: int, turns: int) -> None:
    full, empty = (scheduler(3 * agents * (OWN // BLOCK + 1) + 100_000) for _ in range(2))
    for i, names in enumerate(companies(agents)):
        plan = full.plan(prompts_of(names, i))
        compute(full, plan)
        plan.commit()
    times: dict[str, list[float]] = {"full": [], "empty": []}
    for number in range(turns + 2):
        for name, one in (("full", full), ("empty", empty)):
            seconds = turn(one, 10**9 + number)
            if number >= 2:
                times[name].append(seconds)
    full_time, empty_time = (min(times[name]) for name in ("full", "empty"))
    print(
        f"plan and commit of {COMPANY} agents beside {agents}: {1e3 * full_time:.2f} ms, "
        f"{full_time / empty_time:.2f}x of an empty store"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=100, help="0: none")
    parser.add_argument("--many", type=int, default=100_000, help="0: not measured")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args(arguments)
    if options.rounds:
        rounds(options.agents, options.rounds)
    if options.many:
        many(options.many, options.turns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
