"""The CUDA operators on this machine's GPU, one line per shape.

    python -m bench.gpu [--only attention] [--shapes usual|larger|all] [--samples 30]
                        [--json build/gpu.jsonl] [--end-to-end] [--rehearse]
    python -m bench.gpu --matching "8x128  G 4, 16 agents" --calls 4

A line has the median time of a call, with the least and the 90th percentile; bytes or FLOPs per
second; that rate's fraction of the best copy or matrix product of the same run; the host's time for
a call; the largest difference from the CPU operator on the same arguments, over the largest result;
and how many times as long others take to the same result (``bench/gpu_peers.py``). Where a call is
several kernels, those of attention and of its merge for example, a second line has each one's time.

Bytes are those of rows that have to be read and written, each once; indices, tables and the packed
round are not counted, nor are the queries of attention. Shifts differ from use to use. A call finds
nothing in L2, and the device waits before it until the host has enqueued it, so that launches are
not measured; what is left of them stands in the head: the time between two events with nothing and
with the smallest kernel in between. Beside it: the rates of copying, of reading alone and of
writing alone, the driver, and the clocks, before and after.

``--json`` appends a line per shape, written at once; ``--end-to-end`` adds a random Llama of a
billion parameters. ``--rehearse`` takes few rows on the CPU: it shows that all runs, no times.
``--calls`` makes so many calls of each shape and measures nothing, which is what a profiler wants.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu_shapes import LARGER, USUAL, Shape, Sizes, bf16, f16, f32, normal, smaller
from tokendance.device import operators as ops

WARM_UP = 5  # calls before the samples
AHEAD = 2_000_000  # cycles that the device waits for the host: about a millisecond
BUSY = 100_000_000  # cycles that it is busy while the host's own time is taken
HOST_CALLS = 50
COPIED = 1 << 30  # bytes
GEMM_SIZE = 8192
SETS = {"usual": USUAL, "larger": LARGER, "all": [*USUAL, *LARGER]}
FACTS = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
KERNEL = re.compile(r"\btokendance_(\w+)")  # of this library


@dataclass(frozen=True)
class Spread:
    """Seconds of a call."""

    median: float
    least: float
    p90: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        ordered = sorted(seconds)
        p90 = ordered[int(0.9 * (len(ordered) - 1))]
        return cls(statistics.median(ordered), ordered[0], p90)


class Clock:
    """Times of calls on a GPU."""

    def __init__(self, device: torch.device, samples: int) -> None:
        self._samples = samples
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        # Read, not written: lines that were written would have to leave L2 during the sample.
        self._flush = torch.zeros(max(4 * cache, 256 << 20) // 4, device=device)

    def __call__(self, call: Callable[[], object]) -> Spread:
        for _ in range(WARM_UP):
            call()
        seconds = []
        for _ in range(self._samples):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.sum()
            torch.cuda._sleep(AHEAD)
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return Spread.of(seconds)

    def host(self, call: Callable[[], object]) -> float:
        """Seconds of the host for one call, while the device is busy."""
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY)
        begin = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        return spent / HOST_CALLS

    def kernels(self, call: Callable[[], object]) -> dict[str, float]:
        """Seconds of each of this library's kernels that a call launches; empty where torch's
        profiler sees none."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            for _ in range(WARM_UP):
                self._flush.sum()
                call()
            torch.cuda.synchronize()
        return kernel_times(
            (event.key, event.self_device_time_total / WARM_UP) for event in traced.key_averages()
        )


def kernel_times(events: Any) -> dict[str, float]:
    """Seconds by kernel, of pairs of a profiler's names and microseconds."""
    found: dict[str, float] = {}
    for key, microseconds in events:
        if match := KERNEL.search(key):
            found[match[1]] = found.get(match[1], 0.0) + microseconds / 1e6
    return found


class RehearsalClock:
    """The wall's, of one call on the CPU."""

    def __call__(self, call: Callable[[], object]) -> Spread:
        return Spread.of([self.host(call)])

    def host(self, call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def kernels(self, call: Callable[[], object]) -> dict[str, float]:
        return {}


def rates_of(clock: Any, device: torch.device, rehearse: bool) -> dict[str, float]:
    """Bytes per second of copying (read plus written), reading and writing; FLOP per second of
    torch's matrix product by dtype, of fp32 without TF32, which kernels do not use."""
    size, side = (1 << 16, 64) if rehearse else (COPIED, GEMM_SIZE)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    rates = {
        "copy": 2 * size / clock(lambda: target.copy_(source)).median,
        "read": size / clock(lambda: source.sum()).median,
        "write": size / clock(lambda: target.fill_(1.5)).median,
    }
    for dtype in (bf16, f16, f32):
        a, b = (normal(side, side, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(a)
        spent = clock(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)).median
        rates[str(dtype)] = 2 * side**3 / spent
    return rates


def facts() -> dict[str, str]:
    """The driver, clocks, temperature and power of the first device, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(FACTS)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    values = [value.strip() for value in answer.stdout.split(",")]
    return dict(zip(FACTS, values, strict=True)) if len(values) == len(FACTS) else {}


@dataclass(frozen=True)
class Row:
    """What was measured of a shape.

    Attributes:
        seconds: of a call.
        rate: bytes or FLOPs per second; ``of``, the best that it is a fraction of.
        host: seconds of the host for a call.
        kernels: seconds of each kernel of a call.
        difference: see `Shape.difference`.
        peers: seconds of others, or why there are none.
    """

    name: str
    seconds: Spread
    rate: float
    of: str
    fraction: float
    host: float
    kernels: Mapping[str, float]
    difference: float | None
    peers: Mapping[str, float | str]

    def lines(self) -> str:
        spread, bandwidth = self.seconds, self.of == "copy"
        shown, unit = (self.rate / 1e9, "GB/s") if bandwidth else (self.rate / 1e12, "TFLOP/s")
        apart = "" if self.difference is None else f"  off {self.difference:.1e}"
        line = (
            f"{self.name:<76} {spread.median * 1e6:9.1f} us "
            f"({spread.least * 1e6:.1f} to {spread.p90 * 1e6:.1f}) {shown:8.1f} {unit:7} "
            f"{self.fraction:5.2f} of {self.of}  host {self.host * 1e6:.1f} us{apart}"
        )
        for name, time_ in self.peers.items():
            if not isinstance(time_, str):
                line += f"  {name} {time_ / spread.median:.2f}x"
        if len(self.kernels) > 1:
            times = (f"{name} {seconds * 1e6:.1f} us" for name, seconds in self.kernels.items())
            line += f"\n    {', '.join(times)}"
        return line


def measure(shape: Shape, clock: Any, rates: Mapping[str, float]) -> Row:
    spread = clock(shape.call)
    work, of = (shape.bytes, "copy") if shape.bytes else (shape.flops, "gemm")
    rate = work / spread.median
    host, difference = clock.host(shape.call), shape.difference()
    try:
        kernels = clock.kernels(shape.call)
    except RuntimeError:  # a machine that lets nobody trace
        kernels = {}
    peers: dict[str, float | str] = {}
    for name, make in shape.peers.items():
        try:
            peers[name] = clock(make()).median
        except Exception as error:  # not installed, or no kernel for the shape
            peers[name] = str(error).strip().split("\n")[-1][:200] or type(error).__name__
    fraction = rate / rates["copy" if shape.bytes else str(shape.dtype)]
    return Row(shape.name, spread, rate, of, fraction, host, kernels, difference, peers)


def missing() -> str | None:
    """Why nothing can be measured, or None."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None if ops.registered("CUDA") else "the library was built without CUDA kernels"


def head_of(
    clock: Any, device: torch.device, rates: Mapping[str, float], given: Mapping[str, str]
) -> dict[str, Any]:
    one = torch.ones(1, device=device)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU (rehearsal)",
        "torch": torch.__version__,
        **given,
        "nothing_us": clock(lambda: None).median * 1e6,
        "smallest_kernel_us": clock(lambda: one.add_(1)).median * 1e6,
        **{f"{name}_GB/s": rates[name] / 1e9 for name in ("copy", "read", "write")},
        **{f"{str(d)[6:]}_TFLOP/s": rates[str(d)] / 1e12 for d in (bf16, f16, f32)},
    }


def call_only(device: torch.device, chosen: Sizes, matching: str, calls: int) -> int:
    """The calls that a profiler is to see."""
    for make, sizes in chosen:
        shape = make(device, **sizes)
        if matching in shape.name:
            for _ in range(calls):
                shape.call()
            print(f"{calls} calls of {shape.name}", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--only", default="", help="part of an operator's name")
    parser.add_argument("--matching", default="", help="part of a shape's name in the report")
    parser.add_argument("--calls", type=int, default=0, help="only call, so many times")
    parser.add_argument("--shapes", choices=SETS, default="usual")
    parser.add_argument("--samples", type=int, default=30, help="timed calls per shape")
    parser.add_argument("--json", type=Path, help="a file that a line per shape is appended to")
    parser.add_argument("--end-to-end", action="store_true", help="a model of 1 B parameters, too")
    parser.add_argument("--rehearse", action="store_true", help="few rows, on the CPU")
    options = parser.parse_args(arguments)
    if (reason := missing()) and not options.rehearse:
        print(f"python -m bench.gpu: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda:0")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = RehearsalClock() if options.rehearse else Clock(device, options.samples)

    def write(row: Mapping[str, Any]) -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")

    chosen = [
        (make, smaller(sizes) if options.rehearse else sizes)
        for make, sizes in SETS[options.shapes]
        if options.only in make.__name__
    ]
    if options.calls:
        return call_only(device, chosen, options.matching, options.calls)
    rates = rates_of(clock, device, options.rehearse)
    head = head_of(clock, device, rates, facts())
    write(head)
    shown = (f"{value:.2f}" if isinstance(value, float) else value for value in head.values())
    print(", ".join(map(" ".join, zip(head, shown, strict=True))), flush=True)
    failed, lacking = False, {}
    for make, sizes in chosen:
        try:
            shape = make(device, **sizes)
            if options.matching not in shape.name:
                continue
            row = measure(shape, clock, rates)
            write(asdict(row))
            print(row.lines(), flush=True)
            lacking |= {name: why for name, why in row.peers.items() if isinstance(why, str)}
            del shape
        except Exception as error:  # the other shapes are measured all the same
            failed = True
            write({"name": make.__name__, "sizes": str(sizes), "error": str(error)})
            print(f"{make.__name__} {sizes}: {error}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if options.end_to_end:
        from bench import gpu_model  # transformers takes seconds to load

        result = gpu_model.measure(device, options.rehearse)
        write(result)
        print(gpu_model.lines(result), flush=True)
    for name, why in lacking.items():
        print(f"not measured, {name}: {why}")
    after = facts()
    write({"after": after})
    if after:
        print("after: " + ", ".join(f"{name} {value}" for name, value in after.items()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
