"""Builds tests/cpp/launches.cpp under sanitizers and runs it on every instruction set there is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("address,undefined", "thread")


def run_launches(program: Path, environment: Mapping[str, str], what: str) -> None:
    """Runs it on every instruction set; exits where it fails."""
    for isa in ("portable", "avx2", "avx512"):
        run = subprocess.run(
            [str(program)],
            env={**environment, "TOKENDANCE_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        if run.returncode and "TOKENDANCE_CPU_ISA" in run.stderr:
            print(f"{what}: NOT RUN on {isa}: this machine lacks it")
            continue
        print(f"{what}: {run.stdout.strip()}")
        if run.returncode:
            sys.exit(run.stderr)


def main() -> int:
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    # A launch function must not leak; what the sanitizers report ends the program.
    environment["UBSAN_OPTIONS"] = "halt_on_error=1:print_stacktrace=1"
    for sanitizer in SANITIZERS:
        build = ROOT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DTOKENDANCE_CUDA=OFF"]
        configure += [f"-DTOKENDANCE_SANITIZE={sanitizer}", "-DTOKENDANCE_WERROR=ON"]
        subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
        make = ["cmake", "--build", str(build), "--target", "cpu_launches"]
        subprocess.run(make, check=True, env=environment, stdout=subprocess.DEVNULL)
        run_launches(build / "cpu_launches", environment, sanitizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
