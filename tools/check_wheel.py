"""Is the wheel in dist/ one to hand out?

    python -m tools.check_wheel                                 in the torch of this environment
    python -m tools.check_wheel --torch "torch==2.13.0"         in one that pip fetches

Its size, its contents and its version (that of CHANGELOG.md, where it has its date) are checked;
then it is installed into an environment that is thrown away, without compiler or CUDA toolkit on
the path, and runs ``tokendance info`` and an operator there.
"""

from __future__ import annotations

import argparse
import re
import shlex
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 20_000_000
PROGRAM = """
import torch
import tokendance as td
from tokendance import _planner
from tokendance.device import operators as ops
from tokendance.cli.info import report

x = torch.randn(3, 2, 64)
rope = td.Rope.default(head_dim=64, theta=10000.0, max_position=8)
positions = torch.arange(3, dtype=torch.int32)
moved = ops.rope_rotate(x, None, None, positions, rope.cos, rope.sin)
back = ops.rope_rotate(moved, None, positions, torch.zeros_like(positions), rope.cos, rope.sin)
torch.testing.assert_close(back, x)
facts = report()
installed, built = facts["versions"]["tokendance"], facts["build"]["version"]
assert installed == built, f"version: expected operators of {installed}, got those of {built}"
print("torch", torch.__version__, "CUDA", torch.version.cuda)
print("CUDA compiler", facts["build"]["CUDA compiler"])
print("operators on CPU", facts["build"]["operators on CPU"])
print("operators on CUDA", facts["build"]["operators on CUDA"])
"""


def check_contents(wheel: Path) -> None:
    size = wheel.stat().st_size
    names = zipfile.ZipFile(wheel).namelist()
    print(f"{wheel.name}: {size / 1e6:.1f} MB")
    if size >= MOST_BYTES:
        sys.exit(f"size: expected less than {MOST_BYTES} bytes, got {size}")
    modules = sorted(name for name in names if name.endswith(".so"))
    if len(modules) != 2 or modules[0] != "tokendance/_C.so":
        sys.exit(f"modules: expected _C.so and one _planner, got {modules}")
    for needed in ("tokendance/py.typed", "tokendance/_planner.pyi"):
        if needed not in names:
            sys.exit(f"contents: expected {needed}, got a wheel without")


def version_of_the_changelog() -> str:
    """Of its first release."""
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = text[text.find("\n## ") + 1 :].partition("\n")[0]
    found = re.fullmatch(r"## ([\d.]+) \(\d{4}-\d\d-\d\d\)", newest)
    if found is None:
        sys.exit(f"CHANGELOG.md: expected a heading with a version and its date, got {newest!r}")
    return found[1]


def check_version(wheel: Path) -> None:
    wanted, found = version_of_the_changelog(), wheel.name.split("-")[1]
    if found != wanted:
        sys.exit(f"version: expected {wanted}, as in CHANGELOG.md, got {found}")


def try_out(wheel: Path, torch: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet"]
        if torch:
            subprocess.run([*install, *shlex.split(torch), "numpy"], check=True)
        else:
            ask = [python, "-c", "import site; print(site.getsitepackages()[0])"]
            packages = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
            beside = Path(packages.strip()) / "beside.pth"
            beside.write_text("\n".join(site.getsitepackages()))
        subprocess.run([*install, "--no-deps", "--force-reinstall", str(wheel)], check=True)
        environment = {"PATH": str(Path(folder) / "bin"), "HOME": folder}
        subprocess.run([python, "-c", PROGRAM], check=True, cwd=folder, env=environment)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_wheel", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--torch", help="what pip installs into the environment, with its options")
    options = parser.parse_args(arguments)
    tag = f"{sys.implementation.name[0]}p{sys.version_info[0]}{sys.version_info[1]}"
    wheels = sorted((ROOT / "dist").glob(f"*-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        parser.error(f"dist/: expected a wheel for {tag}, got none; `make wheel` builds it")
    check_contents(wheels[-1])
    check_version(wheels[-1])
    try_out(wheels[-1], options.torch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
