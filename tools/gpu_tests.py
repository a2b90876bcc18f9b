"""What needs a GPU: its tests, in several processes at once, then compute-sanitizer over a few.

    python -m tools.gpu_tests               tests, then the sanitizer
    python -m tools.gpu_tests tests         or one of both
    python -m tools.gpu_tests sanitize
    python -m tools.gpu_tests triage --logs DIR     of the tests whose output is there

Nothing is installed or built. A process has the cases of one file, or a part of them, so that an
access that kills it leaves the others' results. The sanitizer runs the compact cases, which reach
every instruction, without the pooling of memory, so that bounds are those of tensors: memcheck
(every access in bounds), racecheck (no races in shared memory), synccheck (all threads at every
barrier), initcheck (nothing is read that nobody wrote). Without compute-sanitizer on the path the
second half fails, unless ``--without-sanitizer`` is given. A triage repeats the first failure of
each process alone, with memcheck and one launch after the other.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Processes for the files of tests, those that take longest first.
FILES = {
    "test_collective_attention": 4,
    "test_diff_encode": 3,
    "test_diff_restore": 2,
    "test_rope_rotate": 2,
    "test_gpu": 2,
    "test_gpu_calls": 2,
    "test_decoder": 1,
    "test_far_pages": 1,
    "test_key_deviation": 1,
    "test_merge_states": 1,
    "test_arrays": 1,
    "test_checks": 1,
}
WHAT = ("all", "tests", "sanitize", "triage")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SUBJECTS = {"attention": "collective_attention", "rest": "not collective_attention"}
# A rehearsal takes one of so many cases of these files.
REHEARSED, REHEARSED_FILES = 60, ("test_rope_rotate", "test_gpu_calls", "test_checks")
TRIAGED = 4
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "2",
    # A machine with a GPU may have no .venv.
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(ROOT / "tools" / "ptxrun" / "src"), os.environ.get("PYTHONPATH")])
    ),
}
# Two sanitizers that start at once may choose the same port.
_START = threading.Lock()


@dataclass(frozen=True)
class Job:
    """A command and the file that gets its output."""

    name: str
    command: list[str]
    environment: dict[str, str]
    pause: float = 0.0  # seconds until the next job starts


@dataclass(frozen=True)
class Outcome:
    name: str
    passed: bool
    text: str  # the last line of pytest's report, or why there is none


def pytest(rehearse: bool, this: int, parts: int, *arguments: str) -> list[str]:
    """Cases on the GPU; in a rehearsal a few of those on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    if rehearse:
        command += ["--backend", "cpu", "-m", "not gpu", "--part", f"{this}/{parts * REHEARSED}"]
    else:
        command += ["--backend", "cuda", "-m", "gpu", "--part", f"{this}/{parts}"]
    return [*command, "--maxfail", "30", *arguments]


def test_jobs(rehearse: bool) -> list[Job]:
    jobs = []
    for name, parts in FILES.items():
        if rehearse and name not in REHEARSED_FILES:
            continue
        for this in range(1 if rehearse else parts):
            label = name if parts == 1 else f"{name}_{this}"
            jobs.append(Job(label, pytest(rehearse, this, parts, f"tests/{name}.py"), {}))
    return jobs


def sanitizer_jobs(rehearse: bool) -> list[Job]:
    jobs = []
    for tool in TOOLS:
        options = ["--tool", tool, "--target-processes", "all"]
        if tool == "memcheck":
            options += ["--report-api-errors", "no"]
        if tool == "initcheck":
            # All kernels: what others write would be unknown otherwise. `verdict` tells them apart.
            options += ["--print-limit", "1000"]
        else:
            options += ["--error-exitcode", "1", "--kernel-name", "kernel_substring=tokendance"]
        for subject, chosen in SUBJECTS.items():
            if rehearse and subject == "attention":
                continue
            cases = "Rotate" if rehearse else f"compact_cases and {chosen}"
            tests = pytest(rehearse, 0, 1, "tests/test_gpu.py", "-k", cases)
            command = ["compute-sanitizer", *options, *tests]
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            jobs.append(Job(f"{tool}_{subject}", command, environment, pause=0 if rehearse else 1))
    return jobs


def triage_jobs(rehearse: bool, logs: Path) -> list[Job]:
    """The first failures of up to ``TRIAGED`` processes."""
    jobs = []
    for log in sorted(logs.glob("test_*.log")):
        text = log.read_text(errors="replace")
        failure = re.search(r"^(?:FAILED|ERROR) (tests/\S+)", text, flags=re.MULTILINE)
        if failure is None or len(jobs) == TRIAGED:
            continue
        sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no"]
        sanitizer += ["--target-processes", "all", "--print-limit", "5"]
        sanitizer += ["--kernel-name", "kernel_substring=tokendance"]
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        tests += ["--backend", "cpu" if rehearse else "cuda", failure[1]]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
        pause = 0 if rehearse else 1
        jobs.append(Job(f"triage_{log.stem}", [*sanitizer, *tests], environment, pause))
    return jobs


def triage(jobs: Sequence[Job], at_once: int, logs: Path, limit: float) -> bool:
    """Runs them and prints what the sanitizer and pytest say of each."""
    passed = run_all(jobs, at_once, logs, limit)
    telling = re.compile(r"^=+ |Error|^E  |FAILED")
    for job in jobs:
        lines = (logs / f"{job.name}.log").read_text(errors="replace").splitlines()
        found = [line for line in lines if telling.search(line)]
        print("\n".join([job.name, *found[:15]]))
    return passed


def verdict(job: Job, code: int, output: str) -> Outcome:
    """Whether a job passed: by its exit status, that tests ran, and initcheck's report."""
    lines = [
        line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped)", line)
    ]
    text = lines[-1].strip("= ") if lines else f"no test ended, status {code}"
    ours = re.findall(r"^=+ +at .*tokendance.*$", output, flags=re.MULTILINE)
    if job.name.startswith("initcheck") and ours:
        return Outcome(job.name, False, f"{text}; {len(ours)} reads of what nobody wrote")
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    return Outcome(job.name, code == 0 and bool(lines), "; ".join([text, *summary[-1:]]))


def run(job: Job, logs: Path, limit: float) -> Outcome:
    log = logs / f"{job.name}.log"
    with log.open("w") as file:
        with _START:
            process = subprocess.Popen(
                job.command,
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, **job.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            time.sleep(job.pause)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return Outcome(job.name, False, f"still running after {limit:.0f} s, killed")
    return verdict(job, code, log.read_text(errors="replace"))


def run_all(jobs: Sequence[Job], at_once: int, logs: Path, limit: float) -> bool:
    """Runs the jobs and prints a line of each; whether all passed."""
    logs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        outcomes = list(pool.map(lambda job: run(job, logs, limit), jobs))
    for outcome in outcomes:
        print(f"{outcome.name:28} {'passed' if outcome.passed else 'FAILED'}  {outcome.text}")
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    if failed:
        print(f"failed: {', '.join(failed)}; their output is in {logs}")
    sys.stdout.flush()
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_tests", description=__doc__.split("\n")[0]
    )
    parser.add_argument("what", nargs="?", choices=WHAT, default="all")
    parser.add_argument("--without-sanitizer", action="store_true", help="the tests alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a process")
    parser.add_argument("--logs", type=Path, help="where the processes' output is kept")
    parser.add_argument("--rehearse", action="store_true", help="a few cases, on the CPU")
    options = parser.parse_args(arguments)
    sanitized = options.what != "tests" and not options.without_sanitizer
    if sanitized and shutil.which("compute-sanitizer") is None:
        parser.error(
            "compute-sanitizer: expected it on PATH, got none; it comes with the CUDA toolkit "
            "(--without-sanitizer goes without)"
        )
    logs = options.logs or Path(tempfile.mkdtemp(prefix="tokendance-gpu-"))
    passed = True
    if options.what == "triage":
        jobs = triage_jobs(options.rehearse, logs)
        return 0 if triage(jobs, options.jobs, logs, options.limit) else 1
    if options.what != "sanitize":
        passed = run_all(test_jobs(options.rehearse), options.jobs, logs, options.limit)
    if sanitized:
        jobs = sanitizer_jobs(options.rehearse)
        passed = run_all(jobs, options.jobs, logs, options.limit) and passed
    elif options.what != "tests":
        print("compute-sanitizer: NOT RUN")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
