"""Runs the tests of tokendance inside vLLM, in an environment of its own.

    python -m tools.test_vllm [--short] [--environment DIR] [ARGUMENTS OF PYTEST]

The environment (3.4 GB, some minutes) is that of `bench.peers.vllm_cpu`, made on first use and kept
beside those of `tools.environments`; ``--environment`` names another one that has vLLM. The package
is taken from this checkout, as it was built here. ``--short`` leaves slow tests out, and what has
not begun after four minutes, and draws 40 random rounds instead of 200. Where the environment
cannot be had, it says NOT RUN and why.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.peers.vllm_cpu import BUILD, python_of_vllm
from evals.models import model_path

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("-m", "not slow", "--budget", "240", "--rounds", "40")
# One that hangs is a failure, and says where.
HANGING = ("-o", "faulthandler_timeout=600", "-o", "faulthandler_exit_on_timeout=true")
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
}


def environment(given: Path | None = None) -> tuple[Path, dict[str, str]]:
    """An interpreter that has vLLM, and variables by which it finds this checkout.

    Raises:
        FileNotFoundError: the given environment has no interpreter.
        ImportError, RuntimeError, OSError, subprocess.SubprocessError: none can be made, or not the
            model that the tests serve.
    """
    if given is not None and not (given / "bin" / "python").exists():
        raise FileNotFoundError(f"environment: expected one with bin/python, got {given}")
    python = python_of_vllm() if given is None else given / "bin" / "python"
    model_path("smollm2")
    # The package's metadata, which names the plugin, without an installation.
    metadata = BUILD / "peers" / "metadata"
    metadata.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(metadata)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    paths = os.pathsep.join([str(ROOT), str(metadata)])
    return python, {**os.environ, **SETTINGS, "PYTHONPATH": paths}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.test_vllm", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--short", action="store_true", help="what fits in some minutes")
    parser.add_argument("--environment", type=Path, help="a virtual environment that has vLLM")
    options, rest = parser.parse_known_args(arguments)
    try:
        python, variables = environment(options.environment)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        if options.environment is not None:
            print(f"tools.test_vllm: {error}", file=sys.stderr)
            return 2
        print(f"tests inside vLLM: NOT RUN: {error}")
        return 0
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/in_vllm"]
    command += [*HANGING, *(SHORT if options.short else ()), *rest]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
