"""What `make test` leaves to `make test-all`: part by part, and how long each took.

    python -m tools.checks                      all parts
    python -m tools.checks ptx_movement models  these
    python -m tools.checks --minutes 25         as many as fit into so many minutes
    python -m tools.checks --list               which there are, and how long they take

`make test-all CHECKS="..."` does the same with what is built anew.
With ``--minutes`` parts that the change touches come first: those whose paths have a file that
differs from where this branch left main. Where there is no main, or nothing differs from it, they
come in the order of this file. What is expected to take longer than what is left of the time is
left out, and said to be. That is half as long again as the part took on two quiet cores, with all
that can be downloaded there. The exit status is 1 when a part failed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptxrun.nvcc import find_nvcc

ROOT = Path(__file__).resolve().parent.parent
PYTHON = shlex.quote(sys.executable)
PYTEST = f"{PYTHON} -m pytest -q -n 2 --dist worksteal"
CUDA = ("csrc/cuda/", "csrc/include/", "tests/ptx_backend.py", "tests/cuda_params.py")
CPU = ("csrc/cpu/", "csrc/include/", "csrc/planner/")
CASES = tuple(f"tests/{name}_cases.py" for name in ("kernel", "mirror", "row"))
MOVEMENT = ("rope_rotate", "key_deviation", "diff_encode", "diff_restore", "merge_states")
MAINS = ("origin/main", "main")


@dataclass(frozen=True)
class Part:
    """A command that checks something.

    Attributes:
        name: on the command line.
        command: of a shell, in the root of the repository.
        minutes: half as long again as it took on two cores.
        paths: files that it checks, or folders, with a slash at their end.
        needs_nvcc: is not run where there is none.
    """

    name: str
    command: str
    minutes: float
    paths: tuple[str, ...]
    needs_nvcc: bool = False

    def touched(self, files: Iterable[str]) -> bool:
        """Whether one of the files is among what it checks."""
        return any(
            file.startswith(path) if path.endswith("/") else file == path
            for file in files
            for path in self.paths
        )


def ptx_tests(*operators: str) -> str:
    return " ".join(f"tests/test_{name}.py" for name in operators)


# What finds most in the least time comes first.
PARTS = (
    Part("sanitizers", "make sanitize", 2, (*CPU, "csrc/cuda/", "tests/cpp/")),
    Part(
        "sass",
        'make sass SASS_ARGS="--arch 80 90 --check"',
        1,
        ("csrc/cuda/", "csrc/include/", "tools/sass.py", "tools/sass_table.txt", "tools/paths.py"),
        needs_nvcc=True,
    ),
    Part(
        "models",
        f'{PYTEST} -m "rest and model"',
        5.5,
        ("tokendance/", "evals/", "csrc/cpu/", "csrc/planner/"),
    ),
    Part(
        "ptx_attention",
        f'{PYTEST} -m "rest and ptx" {ptx_tests("collective_attention", "cuda_attention")}',
        1.5,
        (*CUDA, "tests/test_collective_attention.py", "tests/test_cuda_attention.py"),
        needs_nvcc=True,
    ),
    Part(
        "ptx_movement",
        f'{PYTEST} -m "rest and ptx" {ptx_tests(*MOVEMENT)}',
        0.5,
        (*CUDA, *(f"tests/test_{name}.py" for name in MOVEMENT)),
        needs_nvcc=True,
    ),
    Part(
        "ptx_launches",
        f'{PYTEST} -m "rest and ptx" '
        + ptx_tests("cuda_launches", "cuda_traffic", "cuda_rotation"),
        0.3,
        (*CUDA, "bench/traffic.py", *CASES, "tests/test_cuda_launches.py"),
        needs_nvcc=True,
    ),
    Part(
        "ptxrun", f"{PYTEST} -m slow tools/ptxrun/tests", 0.3, ("tools/ptxrun/",), needs_nvcc=True
    ),
    Part("coverage_ptx", "make coverage-ptx", 2, CUDA, needs_nvcc=True),
    Part(
        "slow_tests",
        f'{PYTEST} -m "rest and not ptx and not model" tests',
        2.7,
        ("tokendance/", "evals/", "bench/", "csrc/", "tools/", "tests/"),
    ),
    Part(
        "vllm_short",
        "make test-vllm VLLM_ARGS=--short",
        6,
        ("tokendance/", "csrc/cpu/", "csrc/planner/", "tests/in_vllm/", "tools/test_vllm.py"),
    ),
    Part(
        "environments",
        "make environments",
        3,
        ("csrc/ops/", "csrc/planner/", "CMakeLists.txt", "setup.py", "tools/environments.py"),
    ),
    Part("crash", "make crash", 9.5, ("tokendance/files/", "tokendance/store.py")),
    Part("coverage_cpp", "make coverage-cpp", 2, (*CPU, "tests/cpp/")),
    Part("coverage_python", "make coverage-python", 5, ("tokendance/",)),
    Part("soak", "make soak", 15, ("tokendance/",)),
    Part(
        "wheel", "make wheel", 15, ("setup.py", "CMakeLists.txt", "MANIFEST.in", "tools/wheels.py")
    ),
    Part("sass_release", "make sass", 3, ("csrc/cuda/", "csrc/include/"), needs_nvcc=True),
    Part("vllm", "make test-vllm", 40, ("tokendance/integrations/vllm/", "tests/in_vllm/")),
    Part("fuzz", "make fuzz", 60, ("tokendance/files/",)),
    Part("mutants", "make mutate", 600, ("csrc/cuda/", *CASES), needs_nvcc=True),
)


def changed_files() -> list[str]:
    """Files that differ from where this branch left main, and those not committed; none where
    that cannot be told."""
    for main in MAINS:
        base = git("merge-base", "HEAD", main)
        if base:
            return git("diff", "--name-only", base[0])
    return []


def git(*arguments: str) -> list[str]:
    """Lines of its output; none where it fails."""
    try:
        finished = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return []
    return finished.stdout.splitlines() if finished.returncode == 0 else []


def in_order(parts: Iterable[Part], files: Sequence[str]) -> list[Part]:
    """What the files touch first."""
    return sorted(parts, key=lambda part: not part.touched(files))


def run(parts: Iterable[Part], minutes: float | None) -> int:
    """Runs them, as far as the time goes, and says what became of each."""
    begin, lines, failed = time.monotonic(), [], False
    for part in parts:
        spent = (time.monotonic() - begin) / 60
        if part.needs_nvcc and find_nvcc() is None:
            lines.append(f"{part.name:16} NOT RUN: there is no nvcc")
            continue
        if minutes is not None and spent + part.minutes > minutes:
            lines.append(
                f"{part.name:16} left out: takes {part.minutes:g} min, "
                f"{max(minutes - spent, 0):.1f} were left"
            )
            continue
        print(f"\n-- {part.name}: {part.command}", flush=True)
        status = subprocess.run(part.command, shell=True, cwd=ROOT).returncode
        took = (time.monotonic() - begin) / 60 - spent
        lines.append(f"{part.name:16} {'FAILED' if status else 'passed'} in {took:.1f} min")
        failed = failed or status != 0
    print("\n" + "\n".join(lines))
    return int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.checks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("part", nargs="*", help="those that run; default: all")
    parser.add_argument("--minutes", type=float, help="leave out what does not fit")
    parser.add_argument("--list", action="store_true", help="say which parts there are")
    options = parser.parse_args(arguments)
    known = {part.name: part for part in PARTS}
    if unknown := set(options.part) - set(known):
        parser.error(f"part: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    parts = [known[name] for name in options.part] or list(PARTS)
    if options.list:
        print("\n".join(f"{one.name:16} {one.minutes:4g} min  {one.command}" for one in parts))
        return 0
    return run(parts if options.minutes is None else in_order(parts, changed_files()),
               options.minutes)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
