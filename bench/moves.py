"""Rows between tiers against what the machine does: copies, plain files, and steps meanwhile.

    OMP_NUM_THREADS=1 python -m bench.moves [--mib 256] [--turns 15] [--path DIR]
                                            [--json build/moves.json]

Agents go to host memory and back, in turns with torch's copy of as many bytes; then to a directory
and back, in turns with a plain file that is written and synced, and read from the system's memory,
and with checksums of as many bytes.
Then a step decodes a row of each of eight agents, layer by layer, while another thread moves others
to host memory and back, in turns with the same alone.

One thread of torch. What memory bounds is rated by the best turn of the processor's time, which
other work on the machine does not count in; files by the median of the clock's; a step by the
medians of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tokendance as td
from tokendance.files.page_file import hasher

GEOMETRY = td.KVGeometry(
    num_layers=28, num_q_heads=28, num_kv_heads=4, head_dim=128, dtype=torch.bfloat16
)
ROWS = 512  # of an agent
MIB = 1 << 20
DECODED = 8
STEPS = 6  # of a turn


class Times:
    """Seconds of the clock and of the thread's processor, by what was done."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}

    def take(self, name: str, work: Callable[[], object]) -> None:
        wall, processor = time.perf_counter(), time.thread_time()
        work()
        self.processor.setdefault(name, []).append(time.thread_time() - processor)
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)

    def best(self, name: str) -> float:
        return min(self.processor[name])

    def median(self, name: str) -> float:
        return statistics.median(self.wall[name])


def filled(store: td.DiffStore, size: int) -> list[str]:
    """Agents of so many bytes together."""
    names = [f"agent {number}" for number in range(size // (ROWS * GEOMETRY.row_bytes))]
    shape = (ROWS, GEOMETRY.num_kv_heads, GEOMETRY.head_dim)
    for number, name in enumerate(names):
        rows = torch.randn(shape, dtype=torch.float32).to(GEOMETRY.dtype)
        cache = [rows] * GEOMETRY.num_layers
        ids = range(number * ROWS, (number + 1) * ROWS)
        store.put_round({name: (cache, cache)}, {name: [td.private(ids)]})
    return names


def rope() -> td.Rope:
    return td.Rope.default(head_dim=GEOMETRY.head_dim, theta=10000.0, max_position=4096)


def host(size: int, turns: int) -> dict[str, Any]:
    """To host memory and back."""
    room = size + 64 * MIB
    store = td.DiffStore(GEOMETRY, rope(), room, host_capacity=room)
    names = filled(store, size)
    moved = len(names) * ROWS * GEOMETRY.row_bytes
    source, target = (torch.ones(moved, dtype=torch.uint8) for _ in range(2))
    times = Times()
    for turn in range(turns + 1):  # the first touches the pages of host memory
        times = Times() if turn == 1 else times
        times.take("copy", lambda: target.copy_(source))
        times.take("down", lambda: store.rest(names))
        times.take("up", lambda: store.prefetch(names))
    found = {name: moved / MIB / times.best(name) for name in ("copy", "down", "up")}
    return {"bytes": moved, "mib_s": found}


def disk(size: int, turns: int, path: Path) -> dict[str, Any]:
    """To a directory and back."""
    store = td.DiffStore.open(path / "store", GEOMETRY, rope(), size + 64 * MIB)
    plain, data = path / "plain", memoryview(os.urandom(MIB))
    moved = size // (ROWS * GEOMETRY.row_bytes) * ROWS * GEOMETRY.row_bytes
    times = Times()

    def write() -> None:
        with plain.open("wb", buffering=0) as file:
            for _ in range(moved // MIB):
                file.write(data)
            os.fsync(file.fileno())

    def read() -> None:
        buffer = bytearray(MIB)
        with plain.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    for _ in range(turns):
        names = filled(store, size)  # committed anew: on disk is what they were
        times.take("checksum", lambda: [hasher().update(data) for _ in range(moved // MIB)])
        times.take("write", write)
        times.take("down", lambda names=names: store.rest(names))
        times.take("read", read)
        times.take("up", lambda names=names: store.prefetch(names))
        store.compact()
    store.close(flush=False)
    found = {name: moved / MIB / times.median(name) for name in times.wall}
    return {"bytes": moved, "mib_s": found}


def steps(size: int, turns: int) -> dict[str, Any]:
    """Decode steps, alone and while others move."""
    room = 2 * size + 256 * MIB
    store = td.DiffStore(GEOMETRY, rope(), room, host_capacity=room)
    names = filled(store, size)
    collector = td.KVCollector(store)
    heard = td.shared(range(100_000, 101_024))
    who = [f"speaker {i}" for i in range(DECODED)]
    prompts = {name: [td.private(range(8 + i)), heard] for i, name in enumerate(who)}
    plan = collector.plan(prompts)
    q, kv = GEOMETRY.num_q_heads, GEOMETRY.num_kv_heads

    def run(step: td.Step) -> None:
        with step:
            rows = len(step.positions)
            query, key = (
                torch.ones(rows, heads, GEOMETRY.head_dim, dtype=GEOMETRY.dtype)
                for heads in (q, kv)
            )
            for layer in range(GEOMETRY.num_layers):
                step.attend(layer, query, key, key)

    while (step := collector.step()) is not None:
        run(step)

    def turn() -> None:
        for _ in range(STEPS):
            step = collector.step({name: [1] for name in who}, prefill=())
            assert step is not None
            run(step)

    times, moving, ends = Times(), threading.Event(), threading.Event()
    moves = 0

    def move() -> None:
        nonlocal moves
        while not ends.is_set():
            if moving.wait(0.01):
                store.rest(names)
                store.prefetch(names)
                moves += 2

    turn()
    thread = threading.Thread(target=move)
    thread.start()
    for _ in range(turns):
        times.take("alone", turn)
        moving.set()
        times.take("meanwhile", turn)
        moving.clear()
    ends.set()
    thread.join()
    plan.abort()
    return {
        "moves": moves,
        "clock_s": {name: times.median(name) / STEPS for name in times.wall},
        "processor_s": {
            name: statistics.median(found) / STEPS for name, found in times.processor.items()
        },
    }


def text(report: Mapping[str, Any]) -> str:
    """Markdown of the JSON."""
    host, disk, step = report["host"], report["disk"], report["step"]
    lines = [
        "| what | MiB/s | of | MiB/s | ratio | wanted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for what, found, name, against in (
        ("to host memory", host, "down", "copy"),
        ("from host memory", host, "up", "copy"),
        ("to disk", disk, "down", "write"),
        ("from disk", disk, "up", "read"),
    ):
        rate, ceiling = (found["mib_s"][one] for one in (name, against))
        lines.append(
            f"| {what} | {rate:.0f} | {against} | {ceiling:.0f} | {rate / ceiling:.2f} | 0.8 |"
        )
    clock, processor = (
        step[one]["meanwhile"] / step[one]["alone"] for one in ("clock_s", "processor_s")
    )
    lines += ["", f"Checksums of as many bytes alone: {disk['mib_s']['checksum']:.0f} MiB/s.", ""]
    lines += [f"A step while agents move: {clock:.2f}x by the clock, {processor:.2f}x of the "]
    lines[-1] += f"processor's time ({step['moves']} moves); wanted: 1.1x."
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.moves", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--mib", type=int, default=256, help="that are moved")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--path", type=Path, help="a directory on the medium")
    parser.add_argument("--json", type=Path, default=Path("build/moves.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size, turns = options.mib * MIB, options.turns
    report: dict[str, Any] = {"bench": "moves", "mib": options.mib, "turns": turns}
    report["host"] = host(size, turns)
    with tempfile.TemporaryDirectory(dir=options.path) as scratch:
        report["disk"] = disk(size, turns, Path(scratch))
    report["step"] = steps(size, turns)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
