"""What the arithmetic of `rope_rotate` allows, whatever memory does.

    python -m bench.loops [--cpu znver4] [--mca llvm-mca-16]

Takes the inner loops out of the built library (AVX-512), counts their instructions per cache line,
and asks llvm-mca (Debian's llvm-16 or newer; older ones do not know Zen 4) for the cycles of an
iteration if every operand were in the first-level cache. With the clock that a chain of additions
shows, that is the most bytes per second that the threads can move: where it lies near or below the
ceiling of copying, arithmetic binds and not memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import ceilings

LIBRARY = Path(__file__).resolve().parent.parent / "tokendance" / "_C.so"
FOOTPRINT = 8 << 20  # of the operators' benchmarks inside the cache
LINE_BYTES = 64
MOVED = 2  # lines read and written for each line of keys


@dataclass(frozen=True)
class Kernel:
    """A function of the library and what its loop moves.

    Attributes:
        symbol: regular expression of the demangled name, after ``tokendance::avx512::``.
        fused: multiplications fused with an addition that a line takes.
    """

    name: str
    symbol: str
    fused: int


KERNELS = [
    Kernel("rope_rotate fp32", r"rotate_rows<false, \(.*Writing\)2, float>", 1),
    Kernel("rope_rotate bf16", r"rotate_rows<false, \(.*Writing\)2, .*::BFloat16>", 2),
    Kernel("rope_rotate fp16", r"rotate_rows<false, \(.*Writing\)2, .*::Float16>", 2),
]


def disassemble(library: Path) -> dict[str, list[tuple[int, str]]]:
    """Instructions with their addresses, by the demangled name of the function."""
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    functions: dict[str, list[tuple[int, str]]] = {}
    body: list[tuple[int, str]] = []
    for line in text.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = functions.setdefault(head[1], [])
        elif found := re.match(r"\s*([0-9a-f]+):\s+(.*\S)", line):
            body.append((int(found[1], 16), found[2]))
    return functions


def inner_loops(body: Sequence[tuple[int, str]]) -> list[list[str]]:
    """Bodies of loops that hold no other loop, without the jump back."""
    index = {address: i for i, (address, _) in enumerate(body)}
    spans = []
    for i, (address, text) in enumerate(body):
        jump = re.match(r"j[a-z]+\s+([0-9a-f]+) ", text)
        if jump and int(jump[1], 16) in index and int(jump[1], 16) <= address:
            spans.append((index[int(jump[1], 16)], i))
    inner = [
        (a, b) for a, b in spans if not any(a <= c and d < b for c, d in spans if (a, b) != (c, d))
    ]
    return [[text for _, text in body[a:b]] for a, b in inner]


def rotation_loops(body: Sequence[tuple[int, str]]) -> list[list[str]]:
    """The loops that rotate keys: they multiply, and fuse multiplications with additions."""
    return [loop for loop in inner_loops(body) if count(loop, "vmulps") and count(loop, "vfm")]


def count(loop: Sequence[str], operation: str) -> int:
    return sum("zmm" in text and text.startswith(operation) for text in loop)


def cycles(loop: Sequence[str], mca: str, cpu: str) -> float:
    """Of an iteration, by llvm-mca."""
    source = "\n".join(re.sub(r"\s*[#<].*$", "", text) for text in loop if not text.startswith("j"))
    command = [mca, "-mtriple=x86_64", f"-mcpu={cpu}", "-iterations=1000", "-"]
    outcome = subprocess.run(command, input=source, capture_output=True, text=True)
    if outcome.returncode != 0:
        raise RuntimeError(outcome.stderr.strip())
    found = re.search(r"Total Cycles:\s+(\d+)", outcome.stdout)
    assert found is not None
    return int(found[1]) / 1000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loops", description=__doc__)
    parser.add_argument("--cpu", default="znver4", help="as llvm-mca calls it")
    parser.add_argument("--mca", default="llvm-mca-16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    copy, clock = ceilings.copy(FOOTPRINT), ceilings.clock()
    for _ in range(20):
        copy.sample()
        clock.sample()
    print(
        f"{clock.rate / 1e9:.2f} GHz, {options.threads} threads; copying {FOOTPRINT >> 20} MiB: "
        f"{copy.rate / 1e9:.0f} GB/s"
    )
    try:
        functions = disassemble(LIBRARY)
        for kernel in KERNELS:
            pattern = re.compile(rf"tokendance::avx512::.*{kernel.symbol}")
            body = next(body for name, body in functions.items() if pattern.search(name))
            fastest = (float("inf"), 0.0)  # cycles and instructions of a line
            for loop in rotation_loops(body):
                lines = count(loop, "vfm") / kernel.fused
                found = (cycles(loop, options.mca, options.cpu) / lines, len(loop) / lines)
                fastest = min(fastest, found)
            per_line, instructions = fastest
            rate = MOVED * LINE_BYTES / per_line * clock.rate * options.threads
            print(
                f"{kernel.name:<20} {instructions:4.1f} instructions and {per_line:5.2f} "
                f"cycles a line: at most {rate / 1e9:4.0f} GB/s, "
                f"{rate / copy.rate:.2f} of copying"
            )
    except (OSError, RuntimeError, StopIteration, subprocess.SubprocessError) as error:
        print(f"bench.loops: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
