"""Kills processes that commit and flush, and looks at what they have left: ``make crash``.

    python tests/kill_stores.py --kills 1000

Each process opens the directory that the one before it has left, looks whether it holds a state
that was there, and goes on from it, until it is killed at a random instant. A state is known by its
number: what the agents hold after so many steps follows from it. A process says which step it
begins to flush and which it has flushed; what the next one may find is the last that was flushed
or, where one had begun, that one.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from driving import GEOMETRY
from stored_rounds import contents, open_store

import tokendance as td
from tokendance.files import compaction

AGENTS = 7


@dataclass
class Report:
    """What was found.

    Attributes:
        opening, between, before, after: kills while a directory was opened, between two flushes,
            and in a flush that had not happened, or had.
        flushed: steps.
        losses: what was found that must not be.
    """

    kills: int = 0
    opening: int = 0
    between: int = 0
    before: int = 0
    after: int = 0
    flushed: int = 0
    losses: list[str] = field(default_factory=list)


def held_after(step: int) -> dict[str, int]:
    """By agent, the step that put its rows; one agent of seven is released now and then."""
    held: dict[str, int] = {}
    for number in range(1, step + 1):
        agent = f"agent{number * 5 % AGENTS}"
        held.pop(agent, None)
        if number % 4:
            held[agent] = number
    return held


def rows_of(step: int) -> np.ndarray:
    """Keys, then values, ``[2, L, rows, 1, 64]``, that a step puts."""
    draw = np.random.default_rng(step)
    shape = (2, GEOMETRY.num_layers, 6 + step % 50, 1, 64)
    return draw.standard_normal(shape, dtype=np.float32)


def do(store: td.DiffStore, step: int) -> None:
    agent = f"agent{step * 5 % AGENTS}"
    if agent in store.agents:
        store.release(agent)
    if step % 3 == 0:
        store.evict(1000)
    if step % 4:
        rows = rows_of(step)
        news = td.shared(range(1000 * (step % 3), 1000 * (step % 3) + rows.shape[2] - 3))
        cache = tuple([torch.from_numpy(one) for one in part] for part in rows)
        store.put_round({agent: cache}, {agent: [td.private(range(3)), news]})


def found_in(store: td.DiffStore, steps: list[int]) -> int | None:
    """Which of these states a store holds."""
    held = contents(store)
    for step in steps:
        want = held_after(step)
        if held.keys() == want.keys() and all(
            np.array_equal(held[agent].numpy(), rows_of(number)) for agent, number in want.items()
        ):
            return step
    return None


def live(path: Path, steps: list[int], told: int) -> None:
    """What a process does until it is killed; it says so in lines of a letter and a number."""
    compaction.SLACK = -(1 << 40)  # files are written anew as soon as one row is not valid
    store = open_store(path, "1MiB", agents=() if steps[0] % 2 else None)
    step = found_in(store, steps)
    wrong = {**store.damaged, **store.verify()}
    if step is None or wrong:
        held = {agent: len(one[0, 0]) for agent, one in contents(store).items()}
        os.write(told, f"x expected a state of {steps}, got {held} {wrong}\n".encode())
        return
    os.write(told, f"o {step}\n".encode())
    while True:
        step += 1
        do(store, step)
        os.write(told, f"b {step}\n".encode())
        store.flush()
        os.write(told, f"d {step}\n".encode())
        if step % 3 == 0:
            store.rest(store.agents[: step % 5])


def kill_many(
    path: Path, kills: int, seed: int, longest: float = 0.4, show: bool = False
) -> Report:
    """Kills so many processes, at most ``longest`` seconds after the start of each, or after it has
    opened the directory."""
    torch.set_num_threads(1)
    draw, report, steps, begun = random.Random(seed), Report(), [0], False
    while report.kills < kills and not report.losses:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reads)
            try:
                live(path, steps, writes)
            except BaseException:
                os.write(writes, f"x {traceback.format_exc()!r}\n".encode())
            finally:
                os._exit(0)
        os.close(writes)
        if report.kills % 4:  # the others may still be opening the directory
            select.select([reads], [], [], 60)
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reads) as pipe:
            lines = [line.split(" ", 1) for line in pipe.read().splitlines()]
        report.kills += 1
        steps, begun = count(report, lines, steps, begun)
        if show and report.kills % 50 == 0:
            print(report, flush=True)
    return report


def count(
    report: Report, lines: list[list[str]], steps: list[int], begun: bool
) -> tuple[list[int], bool]:
    """What one process has said; returns the states that may be found, and whether it was killed in
    a flush."""
    if not lines:
        report.opening += 1
        return steps, begun
    for kind, text in lines:
        if kind == "x":
            report.losses.append(text)
            return steps, begun
        number = int(text)
        if kind == "o":
            if begun:
                report.before += number == steps[0]
                report.after += number == steps[-1]
            steps, begun = [number], False
        elif kind == "b":
            steps, begun = [steps[-1], number], True
        else:
            steps, begun = [number], False
            report.flushed += 1
    report.between += not begun
    return steps, begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--longest", type=float, default=0.4, help="seconds until a process is killed"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "store"
        report = kill_many(path, options.kills, options.seed, options.longest, show=True)
    print(
        f"kills {report.kills} (seed {options.seed}): {report.opening} while opening, "
        f"{report.between} between flushes, {report.before + report.after} in a flush that were "
        f"looked at: {report.before} found before it, {report.after} after it; "
        f"{report.flushed} states flushed; losses {len(report.losses)}"
    )
    for loss in report.losses:
        print(loss)
    return 1 if report.losses else 0


if __name__ == "__main__":
    sys.exit(main())
