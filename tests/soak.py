"""Threads on a store, and a store as a state machine, for as long as one likes.

    python tests/soak.py                          16 threads for ten minutes, and 100,000 rules
    python tests/soak.py --threads 16 --seconds 60 --steps 0
    python tests/soak.py --seconds 0 --steps 100000 --seed 7

Everything that is drawn follows from the seed, but for the order in which threads run.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter

import memory_machine
import stress
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

RULES = 100
"""Of one run of the machine."""
ACTS = 2000
"""Of one run of the threads, after which every page is accounted for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the threads")
    parser.add_argument("--steps", type=int, default=100_000, help="rules of the state machine")
    parser.add_argument("--seed", type=int, default=None, help="default: another each time")
    asked = parser.parse_args()
    first = secrets.randbelow(1 << 32) if asked.seed is None else asked.seed
    print(f"seed {first}", flush=True)
    threads(asked.threads, asked.seconds, first)
    machine(asked.steps, first)


def threads(count: int, seconds: float, first: int) -> None:
    if seconds <= 0:
        return
    sys.setswitchinterval(1e-5)
    counts: Counter[str] = Counter()
    end, run = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        store = stress.make_store(zero_freed=bool(run % 2), spare=8)
        counts += stress.run(count, ACTS, first + run, store)
        run += 1
    print(f"{count} threads, {run} runs of {ACTS} acts: {told(counts)}", flush=True)


def machine(steps: int, first: int) -> None:
    if not steps:
        return
    limits = settings(
        max_examples=-(-steps // RULES),
        stateful_step_count=RULES,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking takes longer than to find out from the case
        suppress_health_check=list(HealthCheck),
    )
    memory_machine.COUNTS.clear()
    run_state_machine_as_test(seed(first)(memory_machine.MemoryMachine), settings=limits)
    print(f"machine, {limits.max_examples} runs: {told(memory_machine.COUNTS)}", flush=True)


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


if __name__ == "__main__":
    main()
