"""Speed of the interpreter on its own test kernels: `python tools/ptxrun/benchmark.py`."""

from pathlib import Path

import ml_dtypes
import numpy as np
from ptxrun import Module
from ptxrun.nvcc import compile_ptx

HERE = Path(__file__).resolve().parent


def launches():
    """(title, module, kernel, grid, block, arguments) of every measured launch."""
    kernels, gemm = (
        Module(compile_ptx(HERE / "tests" / "cu" / f"{n}.cu")) for n in ("kernels", "gemm")
    )
    random = np.random.default_rng(0)

    def normal(*shape, dtype=np.float32):
        return random.standard_normal(shape).astype(dtype)

    a, b = normal(512, 512, dtype=ml_dtypes.bfloat16), normal(512, 512, dtype=ml_dtypes.bfloat16)
    product = [a, b, np.zeros((512, 512), np.float32), 512, 512, 512]
    rows = normal(256, 1024)
    rope = [normal(512, 256, dtype=ml_dtypes.bfloat16), np.ones((512, 128, 2), np.float32)]
    rope += [np.zeros((512, 256), ml_dtypes.bfloat16), 512, 32]
    floats = [normal(16384), normal(16384), np.zeros((33, 16384), np.float32)]
    floats += [np.zeros((12, 16384), np.int32), np.zeros((8, 16384)), 16384]
    starts = random.integers(1, 5000, 8192).astype(np.int32)
    return [
        ("gemm 512^3 bf16", gemm, "gemmI13__nv_bfloat16", (8, 8), 128, product),
        ("gemm, one block, K = 512", gemm, "gemmI13__nv_bfloat16", (1, 1), 128, product),
        (
            "softmax 256 x 1024",
            kernels,
            "softmax",
            256,
            256,
            [rows, np.zeros_like(rows), 1024, 1.0],
        ),
        ("rope 512 x 256", kernels, "rope", 64, 256, rope),
        ("float functions, 16384", kernels, "floats", 128, 128, floats),
        ("collatz 8192, divergent", kernels, "collatz", 64, 128, [starts, starts * 0, 8192, 1]),
    ]


def main():
    runs = launches()
    for options in ({"stats": False}, {"stats": True}, {"race": True}):
        print(", ".join(f"{name}={value}" for name, value in options.items()))
        for title, module, kernel, grid, block, args in runs:
            stats = min(
                (module.launch(kernel, grid, block, args, **options) for _ in range(2)),
                key=lambda launch: launch.seconds,
            )
            rate = stats.warp_instructions / stats.seconds / 1e6
            print(
                f"  {title:26s} {stats.warp_instructions:9d} warp instructions"
                f" {stats.seconds:8.3f} s {rate:8.2f} million/s"
            )


if __name__ == "__main__":
    main()
