"""What operator tests run on: the CPU operators, the CUDA kernels' PTX executed, and CUDA.

Each backend has the methods ``rope_rotate_out``, ``rope_rotate_``, ``key_deviation_out``,
``diff_encode``, ``diff_restore``, ``collective_attention_out`` and ``merge_states_out`` with the
signatures of the operators of those names; tensors are on ``device`` and mutated in place. A test
that asks for ``backend`` runs on each of them, one that asks for ``fast_backend`` on those where
large cases are cheap. A test that is parametrized with a dtype runs where there are kernels of it.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

NAMES = ("cpu", "ptx", "cuda")
FAST = ("cpu", "cuda")
QUANTIZED = {
    "cpu": (torch.float8_e4m3fn, torch.int8),
    "ptx": (torch.float8_e4m3fn,),
    "cuda": (torch.float8_e4m3fn,),
}
"""The quantized dtypes that a backend's kernels take; tests of others are left out there."""
OPERATORS = (
    "rope_rotate",
    "key_deviation",
    "diff_encode",
    "diff_restore",
    "collective_attention",
    "merge_states",
)
METHODS = (
    "rope_rotate_out",
    "rope_rotate_",
    "key_deviation_out",
    "diff_encode",
    "diff_restore",
    "collective_attention_out",
    "merge_states_out",
)


def takes(name: str, values: dict[str, object]) -> bool:
    """Whether a backend has kernels of the dtypes among these parameters of a test.

    CUDA's attention over quantized pools computes in 16 bits: it takes no fp32 queries.
    """
    quantized = [value for value in values.values() if value in QUANTIZED["cpu"]]
    if quantized and values.get("query_dtype") == torch.float32 and name != "cpu":
        return False
    return all(dtype in QUANTIZED[name] for dtype in quantized)


class TorchBackend:
    """``torch.ops.tokendance`` on a device."""

    def __init__(self, name: str) -> None:
        import tokendance.device.operators  # noqa: F401  (loads the library)

        self.name = name
        self.device = torch.device(name)

    def __getattr__(self, method: str):
        if method not in METHODS:
            raise AttributeError(method)
        operator = getattr(torch.ops.tokendance, method)

        def call(*arguments, **options) -> None:
            # The reference beside it runs on one thread (see conftest.py), operators on two.
            threads = torch.get_num_threads()
            torch.set_num_threads(2)
            try:
                operator(*arguments, **options)
            finally:
                torch.set_num_threads(threads)

        return call


def missing(name: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if name == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        from tokendance.device import operators as ops

        return None if ops.registered("CUDA") else "the library was built without CUDA kernels"
    if name == "ptx":
        if importlib.util.find_spec("ptxrun") is None:
            return "ptxrun (tools/ptxrun) is not installed"
        from ptx_backend import PtxBackend

        return PtxBackend.missing()
    return None


@functools.cache
def backend(name: str):
    """The backend of a name; one for all tests, since loading PTX takes a while."""
    if name == "ptx":
        from ptx_backend import PtxBackend

        return PtxBackend()
    return TorchBackend(name)


def has_operator(name: str, operator: str) -> bool:
    """Whether a backend has a kernel of the operator."""
    if name == "ptx":
        return (Path(__file__).parents[1] / "csrc" / "cuda" / f"{operator}_plan.h").exists()
    from tokendance.device import operators as ops

    registered = ops.registered(name.upper())
    return operator in registered or f"{operator}_out" in registered
