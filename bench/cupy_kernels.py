"""The compiled kernels, driven from CuPy alone, as somebody would who works on a kernel.

    python -m bench.cupy_kernels [--kernel rope_rotate] [--arch 90]

Loads nvcc's PTX of ``csrc/cuda``, fills the structs of ``params.h``, asks the operator's plan what
to launch, and launches it with the structs by value: no torch operator and no binding is between.
One line per operator: its kernel, the median time of a launch, bytes per second of the rows that it
has to move, and the largest difference from the CPU operator's result. Without a GPU, or without
CuPy, the kernels are compiled, their signatures are checked against the structs, and the launches
are planned; the last line says that nothing was launched.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.mirrors import make_round
from tokendance.device import operators as ops
from tokendance.host.round import RoundExtents
from tools.kernel_ptx import cuda_params, ptx_backend

HEADS, HEAD_DIM = 8, 128
_PARAMS = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)")
_BYTES = re.compile(r"\.param\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]")


@dataclass(frozen=True)
class Call:
    """An operator's launch over arrays of NumPy or CuPy.

    Attributes:
        params: the struct, with the arrays' addresses.
        arrays: what the addresses point into; kept alive.
        out: written.
        expected: what ``out`` must be, from the CPU operator.
        tolerance: of the largest difference.
        bytes: of rows that the launch reads and writes.
        part: of the operator's sources that the launch needs.
    """

    params: ctypes.Structure
    arrays: list[Any]
    out: Any
    expected: Callable[[], Any]
    tolerance: float
    bytes: int
    part: str = "*"


# Arrays as the structs want them -----------------------------------------------------------------


def address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def row_layout(array: Any) -> Any:
    """Of ``[rows, heads, D]`` or ``[pages, block_size, heads, D]``."""
    strides = [stride // array.itemsize for stride in array.strides]
    if array.ndim == 4:
        pages, block_size = array.shape[:2]
        return cuda_params.RowLayout(pages * block_size, *strides[:3], block_size)
    return cuda_params.RowLayout(array.shape[0], strides[0], 0, strides[1], 1)


def tables(cos: Any, sin: Any) -> Any:
    return cuda_params.RopeTables(address(cos), address(sin), len(cos), 2 * cos.shape[1], False)


def angles(xp: Any, positions: int) -> tuple[Any, Any]:
    frequency = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = np.arange(positions)[:, None] * frequency
    return tuple(xp.asarray(table.astype(np.float32)) for table in (np.cos(angle), np.sin(angle)))


def by_value(struct: ctypes.Structure) -> Any:
    """A NumPy array of one element, which CuPy passes by value."""
    return np.frombuffer(bytes(struct), dtype=f"V{ctypes.sizeof(struct)}")


def on_host(array: Any) -> Any:
    return array if isinstance(array, np.ndarray) else array.get()


# Calls -------------------------------------------------------------------------------------------


def rope_rotate(xp: Any) -> Call:
    """Fresh keys to their positions."""
    rows = 1 << 15
    rng = np.random.default_rng(0)
    x = xp.asarray(rng.standard_normal((rows, HEADS, HEAD_DIM), dtype=np.float32).astype("f2"))
    to = xp.arange(rows, dtype=xp.int32) % 4096
    cos, sin = angles(xp, 4096)
    out = xp.zeros_like(x)
    params = cuda_params.RopeRotateParams(
        x=address(x),
        out=address(out),
        x_layout=row_layout(x),
        out_layout=row_layout(out),
        position_to=address(to),
        num_rows=rows,
        destinations=1,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        scale=1.0,
        rope=tables(cos, sin),
        dtype=1,
        out_dtype=1,
    )

    def expected() -> Any:
        return ops.rope_rotate(on_host(x), None, None, *map(on_host, (to, cos, sin)))

    return Call(params, [x, to, cos, sin, out], out, expected, 0.0, 2 * x.nbytes)


def merge_states(xp: Any) -> Call:
    """Partial results of split keys."""
    partials, rows, heads = 8, 1 << 10, 32
    rng = np.random.default_rng(1)
    shape = (partials, rows, heads, HEAD_DIM)
    part = xp.asarray(rng.standard_normal(shape, dtype=np.float32))
    part_lse = xp.asarray(rng.standard_normal(shape[:3], dtype=np.float32))
    out, lse = xp.zeros(shape[1:], dtype=xp.float32), xp.zeros(shape[1:3], dtype=xp.float32)
    params = cuda_params.MergeStatesParams(
        partial_out=address(part),
        partial_lse=address(part_lse),
        out=address(out),
        lse=address(lse),
        num_partials=partials,
        num_rows=rows,
        num_heads=heads,
        head_dim=HEAD_DIM,
        dtype=0,
    )

    def expected() -> Any:
        return ops.merge_states(on_host(part), on_host(part_lse))[0]

    moved = part.nbytes + part_lse.nbytes + out.nbytes + lse.nbytes
    return Call(params, [part, part_lse, out, lse], out, expected, 1e-5, moved)


def collective_attention(xp: Any) -> Call:
    """The last rows of 16 agents over shared Masters."""
    case = make_round(
        agents=16, shared=4096, private=256, num_kv_heads=HEADS, group=4, head_dim=HEAD_DIM
    )
    k_pool, v_pool, q = (
        xp.asarray(tensor.numpy().astype("f2"))
        for tensor in (case.k_pools[0], case.v_pools[0], case.q)
    )
    cos, sin = (xp.asarray(table.numpy()) for table in (case.rope.cos, case.rope.sin))
    buffer = xp.asarray(case.round.buffer.numpy())
    extents = case.round.extents
    out = xp.zeros_like(q)
    lse = xp.zeros(q.shape[:2], dtype=xp.float32)
    workspace = xp.zeros(extents.partials * q.shape[1] * (HEAD_DIM + 1), dtype=xp.float32)
    params = cuda_params.CollectiveAttentionParams(
        q=address(q),
        out=address(out),
        lse=address(lse),
        k_pool=address(k_pool),
        v_pool=address(v_pool),
        workspace=address(workspace),
        q_row_stride=q.strides[0] // q.itemsize,
        q_head_stride=q.strides[1] // q.itemsize,
        out_row_stride=out.strides[0] // out.itemsize,
        out_head_stride=out.strides[1] // out.itemsize,
        k_layout=row_layout(k_pool),
        v_layout=row_layout(v_pool),
        round=round_view(buffer, extents),
        num_q_heads=q.shape[1],
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        attention_factor=1.0,
        rope=tables(cos, sin),
        dtype=1,
        pool_dtype=1,
    )

    def expected() -> Any:
        arrays = [on_host(array) for array in (q, k_pool, v_pool, cos, sin)]
        return ops.collective_attention(*arrays, False, case.round, HEAD_DIM**-0.5)[0]

    arrays = [q, k_pool, v_pool, cos, sin, buffer, workspace, out, lse]
    moved = k_pool.nbytes + v_pool.nbytes
    return Call(params, arrays, out, expected, 2e-3, moved, f"d{HEAD_DIM}")


def round_view(buffer: Any, extents: RoundExtents) -> Any:
    view = cuda_params.RoundView(extents=cuda_params.Extents(*extents.as_list()))
    for name, (offset, _) in extents.offsets()[0].items():
        setattr(view, name, address(buffer) + 4 * offset)
    return view


CALLS = {
    "rope_rotate": rope_rotate,
    "merge_states": merge_states,
    "collective_attention": collective_attention,
}

# Kernels -----------------------------------------------------------------------------------------


def check_signatures(operator: str, arch: str, part: str = "*") -> list[str]:
    """The kernels of an operator; raises where one does not take the structs by value."""
    params = ptx_backend.OPERATORS[operator]
    kernels = []
    for name, text in _PARAMS.findall(ptx_backend.ptx_of(operator, arch, part)):
        sizes = [int(size) for size in _BYTES.findall(text)]
        wanted = [ctypes.sizeof(params), ctypes.sizeof(cuda_params.Tile)]
        if sizes != wanted:
            raise ValueError(f"{name}: expected parameters of {wanted} bytes, got {sizes}")
        kernels.append(name)
    return kernels


class Kernels:
    """An operator's kernels, loaded by CuPy."""

    def __init__(self, cupy: Any, operator: str, part: str = "*") -> None:
        arch = cupy.cuda.Device().compute_capability
        self._operator = operator
        self._kernels = {}
        for source in ptx_backend.sources_of(operator, part):
            path = ptx_backend.ptx_file(source, arch)
            module = cupy.RawModule(path=str(path))
            for name, _ in _PARAMS.findall(path.read_text()):
                self._kernels[name] = module.get_function(name)

    def launch(self, params: ctypes.Structure) -> None:
        """On CuPy's current stream."""
        plan = ptx_backend.plan(self._operator, params)
        for launch in plan.launches[: plan.num_launches]:
            kernel = self._kernels[launch.name.decode()]
            kernel.max_dynamic_shared_size_bytes = launch.shared_bytes
            kernel(
                tuple(launch.grid),
                tuple(launch.block),
                (by_value(params), by_value(launch.tile)),
                shared_mem=launch.shared_bytes,
            )


def planned(operator: str, params: ctypes.Structure) -> str:
    plan = ptx_backend.plan(operator, params)
    return "; ".join(
        f"{launch.name.decode()} {tuple(launch.grid)} x {tuple(launch.block)}, "
        f"{launch.shared_bytes} bytes of shared memory"
        for launch in plan.launches[: plan.num_launches]
    )


def device() -> tuple[Any, str]:
    """CuPy, or why nothing can be launched."""
    try:
        import cupy
    except ImportError:
        return None, "CuPy is not installed: pip install tokendance[cupy]"
    return (cupy, "") if cupy.cuda.is_available() else (None, "CuPy finds no CUDA device")


def measure(cupy: Any, operator: str) -> None:
    from cupyx.profiler import benchmark

    call = CALLS[operator](cupy)
    kernels = Kernels(cupy, operator, call.part)
    kernels.launch(call.params)
    found, expected = (array.astype("f4") for array in (on_host(call.out), call.expected().numpy()))
    difference = float(np.abs(found - expected).max())
    if not difference <= call.tolerance:
        sys.exit(f"{operator}: expected a difference of {call.tolerance} at most, got {difference}")
    times = benchmark(kernels.launch, (call.params,), n_repeat=50, n_warmup=5).gpu_times
    seconds = float(np.median(times))
    print(
        f"{planned(operator, call.params)}\n    {seconds * 1e6:.1f} us  "
        f"{call.bytes / seconds / 1e9:.0f} GB/s  difference {difference:.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cupy_kernels", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kernel", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--arch", default="80", help="compiled for without a GPU")
    options = parser.parse_args(arguments)
    if reason := ptx_backend.PtxBackend.missing():
        parser.error(reason)
    cupy, reason = device()
    for operator in options.kernel:
        if cupy is not None:
            measure(cupy, operator)
            continue
        call = CALLS[operator](np)
        kernels = check_signatures(operator, options.arch, call.part)
        print(f"{operator}: {len(kernels)} kernels take their structs by value")
        print(f"    {planned(operator, call.params)}")
    if cupy is None:
        print(f"Nothing was launched: {reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
