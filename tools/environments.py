"""The built library beside other torches and in other Pythons.

    python -m tools.environments                    Python 3.12 with torch 2.10.0, 3.13 with 2.11.0
    python -m tools.environments 3.11:2.12.0        a Python and a torch

For each pair an environment is made by pip, once: it is kept under ``environments`` in
``$TOKENDANCE_CACHE``, by default ``tokendance`` under ``$XDG_CACHE_HOME`` or ``~/.cache``. PyPI's
torches are CUDA builds of 4 to 5 GB; no GPU is needed. Then

- the operators of this tree's build, as they are, pass their CPU tests there. Only the planner
  is compiled for that Python;
- the function by which they ask for a CUDA stream is in that torch;
- what sees torch is compiled once more for that torch, and passes its own tests in this one.

An interpreter or a package that cannot be had makes a check NOT RUN, which is no failure.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.wheels import compile_planner

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ("3.12:2.10.0", "3.13:2.11.0")
PACKAGES = ("numpy>=2.0", "pytest", "pytest-xdist", "hypothesis", "ml_dtypes", "pybind11")
COPIED = ("tokendance", "tests", "tools", "csrc", "pyproject.toml")
OPERATORS = (
    "rope_rotate",
    "key_deviation",
    "diff_encode",
    "diff_restore",
    "collective_attention",
    "merge_states",
)
TESTS = (*OPERATORS, "schemas", "opcheck", "planner")
# Of what is compiled for a torch; kernels are not.
TESTS_OF_TORCH = ("schemas", "opcheck", "checks", "operator_arguments")
# What is loaded, and that a CUDA build has the function that csrc/ops/run.h looks up.
PROGRAM = """
import ctypes, os, platform, sys
import torch
from tokendance import _planner
from tokendance.device import operators as ops

expected = os.path.join(os.getcwd(), "tokendance")
for path in (str(ops.LIBRARY), _planner.__file__):
    if os.path.dirname(path) != expected:
        sys.exit(f"library: expected one in {expected}, got {path}")
if sorted(ops.registered("CPU")) != sorted(ops.OPERATORS):
    sys.exit(f"operators on CPU: expected {ops.OPERATORS}, got {ops.registered('CPU')}")
stream = "no CUDA"
if torch.version.cuda:
    cuda = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
    cuda.aoti_torch_get_current_cuda_stream
    stream = "the stream's function is there"
versions = f"Python {platform.python_version()}, torch {torch.__version__}"
print(f"{versions}: loaded; {stream}", flush=True)
"""


class NotRunError(RuntimeError):
    """Something that a check needs is not to be had."""


@dataclass(frozen=True)
class Environment:
    """A Python's and a torch's versions."""

    python: str
    torch: str

    @classmethod
    def parse(cls, text: str) -> Environment:
        python, colon, torch = text.partition(":")
        if not (python and colon and torch):
            raise argparse.ArgumentTypeError(f"expected PYTHON:TORCH as 3.12:2.10.0, got {text!r}")
        return cls(python, torch)

    def __str__(self) -> str:
        return f"Python {self.python}, torch {self.torch}"


def cache() -> Path:
    own, base = os.environ.get("TOKENDANCE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(base or "~/.cache") / "tokendance").expanduser() / "environments"


def interpreter(version: str) -> str:
    """One that can make environments: on the path, or among those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    found = [shutil.which(f"python{version}")]
    found += map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}")))
    for candidate in filter(None, found):
        ask = [candidate, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(ask, check=False, capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return candidate
    raise NotRunError(f"there is no python{version} that can make environments")


def python_of(environment: Environment) -> Path:
    """The interpreter of an environment, which is made unless it is kept from before."""
    wanted = [f"torch=={environment.torch}", *PACKAGES]
    name = f"python{environment.python}-torch{environment.torch}"
    return kept(name, lambda: interpreter(environment.python), wanted)


def kept(
    name: str, base: Callable[[], str], wanted: Sequence[str], unused: Sequence[str] = ()
) -> Path:
    """The interpreter of the environment of a name, made unless it has been kept.

    Args:
        name: of its folder.
        base: gives the interpreter that makes it.
        wanted: pip's requirements; an environment that was made of others is made anew.
        unused: packages that these bring and that are taken out again.

    Raises:
        NotRunError: it cannot be had.
    """
    folder = cache() / name
    python, ready = folder / "bin" / "python", folder / "ready"
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ready.exists() and ready.read_text().split("\n") == list(wanted) and python.exists():
            return python
        maker = base()
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([maker, "-m", "venv", folder], check=True)
        # Not kept by pip as well: the environment is the cache.
        commands = [["install", "--no-cache-dir", *wanted]]
        if unused:
            commands.append(["uninstall", "--yes", *unused])
        for command in commands:
            pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *command]
            answer = subprocess.run(pip, check=False, capture_output=True, text=True)
            if answer.returncode != 0:
                shutil.rmtree(folder)
                raise NotRunError(f"pip: {last_line(answer.stderr)}")
        ready.write_text("\n".join(wanted))
    return python


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no message"])[-1]


@contextmanager
def tree_with(library: Path, planner: Path) -> Iterator[Path]:
    """A copy of the sources and tests with these modules and no others."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        without = shutil.ignore_patterns("*.so", "__pycache__")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=without)
            else:
                shutil.copy2(ROOT / name, folder / name)
        shutil.copy2(library, folder / "tokendance" / "_C.so")
        shutil.copy2(planner, folder / "tokendance" / planner.name)
        yield folder


def try_out(python: str | Path, tree: Path, tests: Sequence[str]) -> None:
    """Loads the modules and runs tests of theirs."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(os.cpu_count())]
    pytest += ["--backend", "cpu", *(f"tests/test_{name}.py" for name in tests)]
    for arguments in (["-c", PROGRAM], pytest):
        subprocess.run([python, *arguments], check=True, cwd=tree, env=environment)


def this_build() -> tuple[Path, Path]:
    """The operators and the planner that this environment has built."""
    modules = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "modules"
    planners = sorted(modules.glob("_planner*.so"))
    if not (modules / "_C.so").exists() or len(planners) != 1:
        sys.exit(f"{modules}: expected _C.so and one _planner, got none; `make build` makes them")
    return modules / "_C.so", planners[0]


def linked_against(python: Path) -> Path:
    """The operators of this tree's build, compiled and linked against another torch."""
    ask = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    answer = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    build = this_build()[0].parent.parent
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    configure = ["cmake", "-B", build, f"-DTOKENDANCE_OTHER_TORCH={answer.stdout.strip()}"]
    for command in (configure, ["cmake", "--build", build, "--target", "_C_other"]):
        alone = ["flock", build, *command]  # as setup.py does
        subprocess.run(alone, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return build / "other" / "_C.so"


def check(environment: Environment) -> None:
    python = python_of(environment)
    library, planner = this_build()
    print(f"This build in {environment}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        theirs = compile_planner(python, Path(scratch))
        with tree_with(library, theirs) as tree:
            try_out(python, tree, TESTS)
    print(f"A build against torch {environment.torch} in this environment", flush=True)
    with tree_with(linked_against(python), planner) as tree:
        try_out(sys.executable, tree, TESTS_OF_TORCH)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.environments", description=__doc__.split("\n")[0]
    )
    parser.add_argument("environment", nargs="*", type=Environment.parse, help="PYTHON:TORCH")
    options = parser.parse_args(arguments)
    outcomes = {}
    for environment in options.environment or map(Environment.parse, DEFAULT):
        try:
            check(environment)
            outcomes[environment] = "passed"
        except NotRunError as error:
            outcomes[environment] = f"NOT RUN: {error}"
        except subprocess.CalledProcessError as error:
            outcomes[environment] = f"failed: {error.cmd[0]} ended with {error.returncode}"
    for environment, outcome in outcomes.items():
        print(f"{environment}: {outcome}")
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
