"""Builds tests/cpp/launches.cpp under sanitizers and runs it.

Under AddressSanitizer and UBSan on every instruction set that this machine has: which bytes are
touched differs between them. Which thread does what does not, so ThreadSanitizer sees the portable
kernels only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("portable", "avx2", "avx512")
SANITIZERS = {"address,undefined": ISAS, "thread": ISAS[:1]}


def run_launches(
    program: Path, environment: Mapping[str, str], what: str, isas: Sequence[str] = ISAS
) -> None:
    """Runs it on these instruction sets; exits where it fails."""
    for isa in isas:
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
    for sanitizer, isas in SANITIZERS.items():
        build = ROOT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DTOKENDANCE_CUDA=OFF"]
        configure += [f"-DTOKENDANCE_SANITIZE={sanitizer}", "-DTOKENDANCE_WERROR=ON"]
        configure += [f"-DTOKENDANCE_PORTABLE={'OFF' if len(isas) > 1 else 'ON'}"]
        subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
        make = ["cmake", "--build", str(build), "--target", "cpu_launches"]
        subprocess.run(make, check=True, env=environment, stdout=subprocess.DEVNULL)
        run_launches(build / "cpu_launches", environment, sanitizer, isas)
    return 0


if __name__ == "__main__":
    sys.exit(main())
