"""Find nvcc and compile CUDA sources to PTX text."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def find_nvcc() -> str | None:
    """Path of nvcc from `NVCC`, else from PATH, else under `CUDA_HOME`; None when there is none."""
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if not found and os.environ.get("CUDA_HOME"):
        found = shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    return found


def compile_ptx(source: str | Path, arch: str = "80", options: Sequence[str] = ()) -> str:
    """PTX of a `.cu` file for `sm_<arch>`, optimised.

    Nothing is left on disk. Raises FileNotFoundError without nvcc and RuntimeError with nvcc's
    messages when it refuses the source.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc: not on PATH, and neither NVCC nor CUDA_HOME names one")
    with tempfile.TemporaryDirectory(prefix="ptxrun") as directory:
        output = Path(directory) / "out.ptx"
        command = [nvcc, "-ptx", f"-arch=sm_{arch}", "-O3", "-w", *options]
        command += [str(Path(source).resolve()), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=directory)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
        return output.read_text()
