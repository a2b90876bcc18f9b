"""``tokendance info``: versions, build options, devices and CPU features, for a bug report."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform

SUMMARY = "Print versions, build options, devices and CPU features: what a bug report needs."

_DEPENDENCIES = ("torch", "numpy", "transformers")
_CPU_FLAGS = (
    "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_fp16 amx_bf16 "
    "asimd sve bf16"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(arguments: argparse.Namespace) -> int:
    del arguments
    for section, entries in report().items():
        print(f"[{section}]")
        for name, value in entries.items():
            print(f"{name}: {value}")
        print()
    return 0


def report() -> dict[str, dict[str, str]]:
    """``{section: {name: value}}``. Reads only; needs neither a GPU nor nvcc."""
    return {
        "versions": _versions(),
        "build": _build_options(),
        "cpu": _cpu(),
        "devices": _devices(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name[:11] == "TOKENDANCE_"
        },
    }


def _versions() -> dict[str, str]:
    found = {"tokendance": _version("tokendance"), "python": platform.python_version()}
    found.update({name: _version(name) for name in _DEPENDENCIES})
    found["platform"] = platform.platform()
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build_options() -> dict[str, str]:
    from tokendance.device import operators as ops

    library = ctypes.CDLL(str(ops.LIBRARY))
    library.tokendance_build_options.restype = ctypes.c_char_p
    lines: str = library.tokendance_build_options().decode()
    options = dict(line.split(": ", 1) for line in lines.splitlines())
    for device in ("CPU", "CUDA"):
        options[f"operators on {device}"] = ", ".join(ops.registered(device)) or "none"
    return options


def _cpu() -> dict[str, str]:
    import torch

    from tokendance.device import operators as ops

    library = ctypes.CDLL(str(ops.LIBRARY))
    library.tokendance_cpu_isa.restype = ctypes.c_char_p
    found = {
        "machine": platform.machine(),
        "instruction set in use": library.tokendance_cpu_isa().decode(),
        "threads": str(torch.get_num_threads()),
        "CPUs": str(os.cpu_count()),
    }
    found.update(_cpuinfo())
    return found


def _cpuinfo() -> dict[str, str]:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return {}
    entries = {key.strip(): value.strip() for key, _, value in lines}
    flags = set((entries.get("flags") or entries.get("Features") or "").split())
    return {
        "model": entries.get("model name", "unknown"),
        "features": " ".join(flag for flag in _CPU_FLAGS.split() if flag in flags),
    }


def _devices() -> dict[str, str]:
    import torch

    found = {"CUDA of torch": torch.version.cuda or "none"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.1f} GiB"
        )
    return found
