"""Builds the compiled modules with CMake and Ninja; everything else is in pyproject.toml.

Environment:
    TOKENDANCE_CUDA         0 = leave the CUDA kernels out even if nvcc is found
    TOKENDANCE_CUDA_ARCHS   architectures, default "80;90"; a release has "80;86;89;90;100;120"
    TOKENDANCE_WERROR       1 = a warning of a compiler ends the build, as in the Makefile
    MAX_JOBS                compilers that run at once, default the number of CPUs
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process holds the folder, which is made, as ``flock FOLDER`` does."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)  # not inherited by what is started meanwhile
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class BuildWithCMake(build_ext):
    """Compiles under ``build/``, which stays, so that a second build compiles what changed.

    Of two builds in one folder the second waits.
    """

    def run(self) -> None:
        target = (ROOT if self.inplace else Path(self.build_lib)) / "tokendance"
        target.mkdir(parents=True, exist_ok=True)
        with locked(self._build_dir):
            for module in self._compile():
                # Replaced, not overwritten: a process that has the old one loaded keeps it.
                temporary = target / f".{module.name}.new"
                shutil.copy2(module, temporary)
                temporary.replace(target / module.name)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "tokendance" / path.name) for path in self._modules()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {
            output: str(ROOT / "tokendance" / Path(output).name) for output in self.get_outputs()
        }

    @property
    def _build_dir(self) -> Path:
        return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"

    def _modules(self) -> list[Path]:
        return sorted((self._build_dir / "modules").glob("*.so"))

    def _compile(self) -> list[Path]:
        cuda = "OFF" if os.environ.get("TOKENDANCE_CUDA") == "0" else "ON"
        werror = "ON" if os.environ.get("TOKENDANCE_WERROR") == "1" else "OFF"
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(self._build_dir),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTOKENDANCE_VERSION={self.distribution.get_version()}",
            f"-DTOKENDANCE_CUDA={cuda}",
            f"-DTOKENDANCE_WERROR={werror}",
            f"-DTOKENDANCE_CUDA_ARCHS={os.environ.get('TOKENDANCE_CUDA_ARCHS', '80;90')}",
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # cmake and ninja may be installed beside this interpreter and not be on the path.
        scripts = str(Path(sys.executable).parent)
        environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(
            ["cmake", "--build", str(self._build_dir), "-j", jobs], check=True, env=environment
        )
        return self._modules()


setup(
    # Without sources: setuptools only learns that the distribution is not pure Python.
    ext_modules=[Extension("tokendance._C", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
)
