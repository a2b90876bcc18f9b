"""A store's directory against what its medium does: flush, open and verify.

    python -m bench.disk
    python -m bench.disk --path /mnt/ssd --mib 1024

Plain files of as many bytes are written and synced, and read, in turns with it, so that a figure is
a fraction of what the medium did in the same minute. Reading is from the system's memory, as right
after a flush: what it is held against is a plain read of the same files. The checksum's rate on one
core is a third ceiling; the others' are for comparison. Codes are rated by the rows that go in or
come out, on one core too, against a copy of these rows between pages: the fastest of the turns.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import tokendance as td
from tokendance.device.codec import CODES, PageCodec

GEOMETRY = td.KVGeometry(
    num_layers=28, num_q_heads=28, num_kv_heads=4, head_dim=128, dtype=torch.bfloat16
)
ROWS = 512  # of an agent, half of them shared with nobody
MIB = 1 << 20
CODED = 16 * MIB
"""Bytes of rows that codes are rated by."""
BLOCK = 16


@dataclass
class Times:
    """Seconds of each turn, by what was done."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def take(self, name: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)

    def rate(self, name: str, size: int) -> float:
        """MiB a second of the median turn."""
        return size / MIB / statistics.median(self.seconds[name])

    def best(self, name: str, size: int) -> float:
        """MiB a second of the fastest turn."""
        return size / MIB / min(self.seconds[name])


def write_plain(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    buffer = bytearray(4 * MIB)
    for one in sorted(path.glob("*.safetensors")):
        with one.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def fill(store: td.DiffStore, size: int) -> None:
    """Agents whose rows are so many bytes together."""
    shape = (ROWS, GEOMETRY.num_kv_heads, GEOMETRY.head_dim)
    for number in range(size // (ROWS * GEOMETRY.row_bytes)):
        rows = torch.randn(shape, dtype=torch.float32).to(GEOMETRY.dtype)
        cache = [rows] * GEOMETRY.num_layers
        tokens = range(number * ROWS, number * ROWS + ROWS // 2)
        prompt = [td.private(range(ROWS // 2)), td.shared(tokens)]
        store.put_round({f"agent{number}": (cache, cache)}, {f"agent{number}": prompt})


def measure(path: Path, size: int, turns: int) -> tuple[Times, int]:
    times = Times()
    rope = td.Rope.default(head_dim=GEOMETRY.head_dim, theta=10000.0, max_position=4096)
    capacity = size + 64 * MIB
    memory = td.DiffStore(GEOMETRY, rope, capacity)
    fill(memory, size)
    written = memory.stats().row_bytes
    data = memoryview(os.urandom(written))
    for turn in range(turns):
        times.take("write", lambda: write_plain(path / "plain", data))
        (path / "plain").unlink()
        target = path / f"store{turn}"
        times.take("flush", lambda target=target: memory.export_agents(target))
        times.take("read", lambda target=target: read_plain(target))
        opened: list[td.DiffStore] = []
        times.take(
            "open",
            lambda target=target, opened=opened: opened.append(
                td.DiffStore.open(target, GEOMETRY, rope, capacity)
            ),
        )
        times.take("verify", opened[0].verify)
        opened[0].close()
        shutil.rmtree(target)
    part = data[: 64 * MIB]
    for _ in range(turns):
        times.take("blake2b", lambda: hashlib.blake2b(part, digest_size=16).digest())
        times.take("sha256", lambda: hashlib.sha256(part).digest())
        times.take("crc32", lambda: zlib.crc32(part))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rate_codes(times, turns)
    torch.set_num_threads(threads)
    return times, written


def rate_codes(times: Times, turns: int) -> None:
    """Of as many pages of keys and of values as have 16 MiB."""
    shape = (BLOCK, GEOMETRY.num_kv_heads, GEOMETRY.head_dim)
    count = CODED // (torch.Size(shape).numel() * GEOMETRY.dtype.itemsize)
    pool = torch.randn(count, *shape, dtype=torch.float32).to(GEOMETRY.dtype)
    back = torch.empty_like(pool)
    page = torch.randperm(count)
    rows = torch.full((count,), BLOCK, dtype=torch.int32)
    for _ in range(turns):
        for code in CODES:
            for side in ("keys", "values"):
                codec = PageCodec(code, BLOCK, shape[1:], pool.dtype, per_channel=side == "keys")
                coded = torch.empty(count, codec.page_bytes, dtype=torch.uint8)
                for name, work in (
                    ("encode", partial(codec.encode, pool, page, rows, coded)),
                    ("decode", partial(codec.decode, coded, None, rows, back, page)),
                ):
                    work()
                    times.take(f"{code} {side} {name}", work)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.disk", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--path", type=Path, help="a directory on the medium")
    parser.add_argument("--mib", type=int, default=256, help="of rows")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.path) as scratch:
        times, size = measure(Path(scratch), options.mib * MIB, options.turns)
    for name in ("write", "flush", "read", "open", "verify"):
        against = {"flush": "write", "open": "read", "verify": "read"}.get(name)
        rate = times.rate(name, size)
        share = f"  {rate / times.rate(against, size):.2f} of {against}" if against else ""
        print(f"{name:8} {rate:8.0f} MiB/s{share}")
    for name in ("blake2b", "sha256", "crc32"):
        print(f"{name:8} {times.rate(name, min(64 * MIB, size)):8.0f} MiB/s, one core")
    for name in times.seconds:
        code, side, way = name.split() if name.count(" ") == 2 else ("", "", "")
        if code:
            rate = times.best(name, CODED)
            share = rate / times.best(f"exact {side} {way}", CODED)
            print(f"{name:18} {rate:8.0f} MiB/s  {share:.2f} of a copy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
