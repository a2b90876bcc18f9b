"""Which lines of the C++ that runs without a GPU the tests reach.

Builds the library with counters into ``build/coverage``, runs tests/cpp/launches.cpp on every
instruction set there is and the tests of the operators and of the planner on the CPU, and reports
what they reached. The exit status is 1 when it is less than ``TARGET`` percent.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from run import run_launches

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "coverage"
TARGET = 90
TESTS = (
    "arrays",
    "checks",
    "collective_attention",
    "diff_encode",
    "diff_restore",
    "far_pages",
    "key_deviation",
    "merge_states",
    "operator_arguments",
    "planner",
    "rope_rotate",
    "stored_rows",
)


def build(environment: dict[str, str]) -> None:
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DTOKENDANCE_CUDA=OFF"]
    configure += ["-DTOKENDANCE_COVERAGE=ON", "-DTOKENDANCE_WERROR=ON"]
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    make = ["cmake", "--build", str(BUILD), "-j", jobs]
    subprocess.run(make, check=True, env=environment, stdout=subprocess.DEVNULL)


def package() -> Path:
    """A folder in which ``tokendance`` is the project's Python and the modules that count."""
    folder = BUILD / "package"
    inside = folder / "tokendance"
    inside.mkdir(parents=True, exist_ok=True)
    for link in inside.iterdir():
        link.unlink()
    sources = [path for path in (ROOT / "tokendance").iterdir() if path.suffix != ".so"]
    for path in (*sources, *(BUILD / "modules").glob("*.so")):
        (inside / path.name).symlink_to(path)
    return folder


def main() -> int:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    build(environment)
    for counters in BUILD.rglob("*.gcda"):
        counters.unlink()
    run_launches(BUILD / "cpu_launches", environment, "coverage")
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "--backend", "cpu", "-p", "no:cacheprovider"]
    counted = package()
    # What counts comes first on Python's path, before the project's own `tokendance`.
    command += ["-c", str(ROOT / "pyproject.toml"), "-o", f"pythonpath={counted} {ROOT}"]
    subprocess.run(
        [*command, *tests],
        check=True,
        cwd=counted,
        env={**environment, "PYTHONPATH": ""},
    )
    report = [sys.executable, "-m", "gcovr", "--root", str(ROOT), "--object-directory", str(BUILD)]
    report += ["--filter", "csrc/", "--exclude", "csrc/cuda/", "--sort", "uncovered-percent"]
    # A line counts once, however many templates and instruction sets it is compiled for.
    report += ["--merge-mode-functions", "separate", "--merge-lines"]
    report += ["--fail-under-line", str(TARGET), str(BUILD)]
    # Counts that threads have spoiled: lost and negative ones count as lines that never ran.
    for spoiled in ("negative_hits", "suspicious_hits"):
        report += ["--gcov-ignore-parse-errors", f"{spoiled}.warn_once_per_file"]
    return subprocess.run(report, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
