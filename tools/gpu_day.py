"""The day with a GPU: all that waits for one, in two calls of about five minutes each.

    python -m tools.gpu_day 1 --out DIR     tests, what failed once more, bench.gpu, the sanitizer
    python -m tools.gpu_day 2 --out DIR     larger shapes, peers and a whole model, Nsight Compute,
                                            bench.gpu again, the kernels from CuPy

Made for a machine that is borrowed for a quarter of an hour, has no network, and has whatever torch
it has. Each stage has a limit of its own and all together have ``--limit`` seconds; after each one
DIR/summary<part>.txt and DIR/logs<part>.tgz are written anew, so that a day that is cut short keeps
the rest. The status is 0 if every stage passed, those aside that only look around.

``--carried`` is a folder of what was made elsewhere; whatever it lacks is done without:

    _C.so, _planner*.so     a build for that machine's Python; without one that loads there, the
                            library is built
    wheels/*.whl            FlashInfer, and what else that machine lacks
    aot/                    FlashInfer's compiled kernels

``--rehearse`` goes through all of it on the CPU, with few cases and shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
LEAST = 8  # seconds that a stage is begun with
PROBE = """
import platform, sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
print("glibc", platform.libc_ver()[1], "kernel", platform.release())
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), torch.cuda.mem_get_info())
"""
LOAD = """
import sys
from tokendance import _planner
from tokendance.device import operators as ops
found, wanted = sorted(ops.registered(sys.argv[1])), sorted(ops.OPERATORS)
if found != wanted:
    sys.exit(f"operators on {sys.argv[1]}: expected {wanted}, got {found}")
from tokendance.cli import main
main(["info"])
"""
ARCHITECTURE = """
import torch
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
print(10 * major + minor)
"""
# Operator of bench.gpu, part of its shape's name, and the kernel that is looked at.
PROFILED = {
    "decode": ("attention_decode", "8x128  G 4, 16 agents", "collective_attention_bf16_d128"),
    "prefill": ("attention_prefill", "8x128  G 4", "collective_attention_bf16_d128"),
    "restore": ("diff_restore", "bfloat16", "diff_restore_bf16_half_wide"),
}
DETAILS = ("Duration", "Throughput", "Registers Per", "Achieved Occ", "L2 Hit", "Theoretical Occ")


@dataclass
class Day:
    """Runs stages one after the other, and writes down how they went."""

    part: int
    out: Path
    limit: float
    begin: float = field(default_factory=time.monotonic)
    outcomes: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.logs = self.out / f"logs{self.part}"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begin)

    def stage(
        self,
        name: str,
        seconds: float,
        *commands: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        shown: int = 4,
        needed: bool = True,
    ) -> bool:
        """Runs commands until one fails or the time is over; whether all passed.

        Args:
            shown: lines from the end of the output that the summary has.
            needed: a failure is one of the day's.
        """
        if self.left < LEAST:
            self.note(name, -1, 0.0, ["no time left"], needed)
            return False
        begin, code = time.monotonic(), 0
        end = begin + min(seconds, self.left)
        log = self.logs / f"{name}.log"
        with log.open("w") as file:
            for command in commands:
                code = run(command, file, max(1.0, end - time.monotonic()), environment or {})
                if code != 0:
                    break
        text = log.read_text(errors="replace").splitlines()
        self.note(name, code, time.monotonic() - begin, text[max(0, len(text) - shown) :], needed)
        return code == 0

    def note(self, name: str, code: int, spent: float, text: Sequence[str], needed: bool) -> None:
        if needed:
            self.outcomes[name] = code
        at = time.monotonic() - self.begin
        line = f"{name:16} status {code:4d} {spent:5.0f} s   at {at:4.0f} s"
        print(line, flush=True)
        self.lines += [line, *(f"    {one[:240]}" for one in text)]
        (self.out / f"summary{self.part}.txt").write_text("\n".join(self.lines) + "\n")
        with tarfile.open(self.out / f"logs{self.part}.tgz", "w:gz") as archive:
            archive.add(self.logs, arcname=self.logs.name)


def run(
    command: Sequence[str | Path], file: object, seconds: float, environment: Mapping[str, str]
) -> int:
    """The exit status; 124 where the time was over, 127 where there is no such program."""
    ptxrun = str(ROOT / "tools" / "ptxrun" / "src")
    paths = [environment.get("PYTHONPATH"), str(ROOT), ptxrun, os.environ.get("PYTHONPATH")]
    merged = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_MODULE_LOADING": "LAZY",
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=merged, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        print(error, file=file, flush=True)
        return 127
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:  # what it started, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Stages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What both parts need to know."""

    carried: Path
    rehearse: bool
    site: Path  # where carried wheels are installed

    def module(self, name: str, *arguments: str | Path) -> list[str | Path]:
        """A command of this repository."""
        rehearsed = ["--rehearse"] if self.rehearse else []
        return [PYTHON, "-m", name, *arguments, *rehearsed]

    def rehearsed(self, *arguments: str) -> tuple[str, ...]:
        return arguments if self.rehearse else ()


def ready(day: Day, plan: Plan) -> bool:
    """The library loads, as it is, as it was carried, or as it is built here."""
    commands = [["nvidia-smi"], ["nvcc", "--version"], [PYTHON, "-c", PROBE]]
    for command, name in zip(commands, ("device", "nvcc", "probe"), strict=True):
        day.stage(name, 60, command, shown=2, needed=False)
    for module in plan.carried.glob("*.so"):
        shutil.copy2(module, ROOT / "tokendance" / module.name)
    load = [PYTHON, "-c", LOAD, "CPU" if plan.rehearse else "CUDA"]
    if day.stage("load", 60, load, needed=False):
        return True
    asked = subprocess.run(
        [PYTHON, "-c", ARCHITECTURE], check=False, capture_output=True, text=True
    )
    environment = {"TOKENDANCE_CUDA_ARCHS": asked.stdout.strip() or "90", "TOKENDANCE_WERROR": "0"}
    build = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]
    return day.stage("build", 240, build, environment=environment) and day.stage("load2", 60, load)


def first_part(day: Day, plan: Plan) -> None:
    logs = day.logs / "tests"
    tests = plan.module("tools.gpu_tests", "tests", "--limit", "120", "--logs", logs)
    if not day.stage("tests", 130, tests, shown=25):
        again = plan.module("tools.gpu_tests", "triage", "--limit", "80", "--logs", logs)
        day.stage("triage", 90, again, shown=60, needed=False)
    measured = ["--samples", "15", "--json", day.out / "bench.jsonl"]
    bench = plan.module("bench.gpu", *measured, *plan.rehearsed("--only", "key_deviation"))
    day.stage("bench", 140, bench, environment={"FLASHINFER_DISABLE_JIT": "1"}, shown=60)
    logs = day.logs / "sanitizer"
    sanitize = plan.module("tools.gpu_tests", "sanitize", "--limit", "170", "--logs", logs)
    day.stage("sanitize", 180, sanitize, shown=10)


def second_part(day: Day, plan: Plan) -> None:
    # FlashInfer would compile what was not carried, for ten minutes of a core.
    beside = {"FLASHINFER_DISABLE_JIT": "1", "PYTHONPATH": str(plan.site)}
    wheels = sorted(plan.carried.glob("wheels/*.whl"))
    if wheels:
        install = [PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        options = ["--no-compile", "--no-cache-dir", "--upgrade", "--target", plan.site]
        day.stage("wheels", 60, [*install, *options, *wheels])
        if (plan.carried / "aot").is_dir():
            kernels = plan.site / "flashinfer" / "data" / "aot"
            shutil.copytree(plan.carried / "aot", kernels, dirs_exist_ok=True)
    measured = ["--samples", "15", "--json", day.out / "larger.jsonl", "--end-to-end"]
    measured += ["--shapes", "larger", *plan.rehearsed("--only", "attention_decode")]
    larger = plan.module("bench.gpu", *measured)
    day.stage("larger", 170, larger, environment=beside, shown=45)
    for name, (operator, matching, kernel) in PROFILED.items():
        profile(day, plan, name, operator, "" if plan.rehearse else matching, kernel)
    measured = ["--samples", "15", "--json", day.out / "again.jsonl"]
    again = plan.module("bench.gpu", *measured, *plan.rehearsed("--only", "merge_states"))
    day.stage("again", 110, again, environment=beside, shown=60)
    kernels = plan.rehearsed("--kernel", "merge_states")
    day.stage("cupy", 60, [PYTHON, "-m", "bench.cupy_kernels", *kernels], shown=8)


def profile(day: Day, plan: Plan, name: str, operator: str, matching: str, kernel: str) -> None:
    """A launch under Nsight Compute, the fourth, and its details as text."""
    report = day.logs / f"ncu_{name}"
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "--import-source", "yes"]
    ncu += ["--kernel-name", f"regex:{kernel}", "--launch-skip", "3", "--launch-count", "1"]
    bench = ["--only", operator, "--matching", matching, "--calls", "4"]
    day.stage(
        f"ncu_{name}", 80, [*ncu, "-f", "-o", report, *plan.module("bench.gpu", *bench)], shown=2
    )
    written = report.with_suffix(".ncu-rep")
    if written.exists():
        details = ["ncu", "--import", written, "--page", "details"]
        day.stage(f"details_{name}", 30, details, shown=0)
        lines = (day.logs / f"details_{name}.log").read_text(errors="replace").splitlines()
        day.lines += [f"    {line.strip()}" for line in lines if any(x in line for x in DETAILS)]


PARTS: dict[int, Callable[[Day, Plan], None]] = {1: first_part, 2: second_part}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_day", description=__doc__.split("\n")[0]
    )
    parser.add_argument("part", type=int, choices=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-day")
    parser.add_argument("--carried", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--limit", type=float, default=420, help="seconds of all stages together")
    parser.add_argument("--rehearse", action="store_true", help="few cases, on the CPU")
    options = parser.parse_args(arguments)
    day = Day(options.part, options.out.resolve(), options.limit)
    with tempfile.TemporaryDirectory() as site:
        plan = Plan(options.carried.resolve(), options.rehearse, Path(site))
        if ready(day, plan):
            PARTS[options.part](day, plan)
    print((day.out / f"summary{day.part}.txt").read_text(), end="")
    return int(any(day.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
