"""What this machine can do at best, sampled in the same run as what is compared with it.

A ceiling is sampled again and again between the calls of an operator, so that both meet the same
noise of the machine; its rate is the best sample's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("ceilings.cpp")
BUILD = Path(__file__).resolve().parent.parent / "build"
GEMM_SIZE = 1536


@functools.cache
def _library() -> ctypes.CDLL:
    """``ceilings.cpp``, compiled for this very machine on the first use."""
    # Threads of torch's own OpenMP: those of a second one would fight with them for the cores.
    openmp = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*")]
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    library = BUILD / f"ceilings-{version}.so"
    if not library.exists():
        BUILD.mkdir(exist_ok=True)
        command = ["g++", *options, str(SOURCE), *openmp, "-o", str(library)]
        subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for copy in (loaded.copy_memcpy, loaded.copy_past_caches):
        copy.argtypes, copy.restype = [pointer, pointer, size, ctypes.c_int], None
    loaded.fill_past_caches.argtypes = [pointer, size, ctypes.c_int]
    loaded.fill_past_caches.restype = None
    loaded.read_all.argtypes = [pointer, size, ctypes.c_int]
    loaded.read_all.restype = ctypes.c_uint64
    loaded.add_one_by_one.argtypes, loaded.add_one_by_one.restype = [size], ctypes.c_uint64
    return loaded


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Ceiling:
    """The best of several ways to do ``work`` units of something.

    Attributes:
        unit: of the rate: ``"B/s"``, ``"FLOP/s"`` or ``"cycles/s"``.
    """

    def __init__(self, unit: str, work: float, ways: list[Callable[[], object]]) -> None:
        self.unit = unit
        self._work = work
        self._ways = ways
        self._best = float("inf")

    def sample(self) -> float:
        """The rate of this sample."""
        took = min(seconds(way) for way in self._ways)
        self._best = min(self._best, took)
        return self._work / took

    @property
    def rate(self) -> float:
        """Units per second, of the best sample."""
        return self._work / self._best


def copy(footprint: int) -> Ceiling:
    """Bytes read plus bytes written by the best copy of half a ``footprint`` (bytes).

    Of memcpy, torch's copy and a loop of non-temporal stores.
    """
    size = max(footprint // 2 // 1024, 1) * 1024
    source, target = _pages(size), _pages(size)
    library, threads = _library(), torch.get_num_threads()
    arguments = (target.data_ptr(), source.data_ptr(), size, threads)
    return Ceiling(
        "B/s",
        2 * size,
        [
            lambda: library.copy_memcpy(*arguments),
            lambda: library.copy_past_caches(*arguments),
            lambda: target.copy_(source),
        ],
    )


def fill(footprint: int) -> Ceiling:
    """Bytes written per second to an array of ``footprint`` bytes, by whichever way is fastest."""
    size = max(footprint // 1024, 1) * 1024
    target = _pages(size)
    library, threads = _library(), torch.get_num_threads()
    return Ceiling(
        "B/s",
        size,
        [
            lambda: library.fill_past_caches(target.data_ptr(), size, threads),
            lambda: target.fill_(1),
        ],
    )


def read(footprint: int) -> Ceiling:
    """Bytes read per second from an array of ``footprint`` bytes."""
    size = max(footprint // 1024, 1) * 1024
    source = _pages(size)
    library, threads = _library(), torch.get_num_threads()
    return Ceiling(
        "B/s",
        size,
        [
            lambda: library.read_all(source.data_ptr(), size, threads),
            lambda: source.view(torch.int64).sum(),
        ],
    )


def gemm() -> Ceiling:
    """FLOP per second of torch's fp32 matrix product."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE) for _ in range(2))
    out = torch.empty(GEMM_SIZE, GEMM_SIZE)
    return Ceiling("FLOP/s", 2.0 * GEMM_SIZE**3, [lambda: torch.mm(a, b, out=out)])


def clock() -> Ceiling:
    """Cycles per second of one core, from additions that wait for each other (x86-64)."""
    count = 1 << 26
    return Ceiling("cycles/s", count, [lambda: _library().add_one_by_one(count)])


def _pages(size: int) -> torch.Tensor:
    """Memory that has been written, so that the kernel has mapped it; aligned to 64 bytes."""
    return torch.zeros(size, dtype=torch.uint8)
