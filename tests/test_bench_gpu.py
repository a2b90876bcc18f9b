"""`python -m bench.gpu` without a GPU: its shapes, its byte counts, its report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import gpu, mirrors
from tokendance.testing import reference

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "bench.gpu"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == "python -m bench.gpu: torch finds no CUDA device\n"


def shrunk(sizes):
    """The same with few rows; pages stay full."""
    rows = {name: sizes[name] // 64 for name in ("rows", "tokens", "shared") if name in sizes}
    return sizes | rows


@pytest.mark.parametrize(
    ("make", "sizes"), gpu.SHAPES, ids=lambda value: getattr(value, "__name__", "")
)
def test_shapes_are_calls_that_operators_take(make, sizes):
    shape = make(CPU, **shrunk(sizes))
    shape.call()
    for peer in shape.peers.values():
        peer()
    assert (shape.bytes > 0) != (shape.flops > 0)


def test_bytes_of_rows_that_move():
    bf16, f32 = torch.bfloat16, torch.float32
    # 10 rows of 2 heads of 64 at 2 bytes, read once and written 3 times.
    rotate = gpu.rope_rotate(CPU, dtype=bf16, rows=10, destinations=3, heads=2, head_dim=64)
    assert rotate.bytes == 10 * 256 * 4
    # 16 tokens of 3 agents and as many cached ones, of 1 head of 64 at 4 bytes.
    keys = gpu.key_deviation(CPU, dtype=f32, tokens=16, agents=3, heads=1, head_dim=64)
    assert keys.bytes == 64 * 256
    # 2 partials and a result of 5 rows of 3 heads, each 64 values of 2 bytes and an LSE of 4.
    merge = gpu.merge_states(CPU, dtype=bf16, rows=5, partials=2, heads=3, head_dim=64)
    assert merge.bytes == 3 * 5 * 3 * 132


def test_bytes_of_mirrors():
    """64 shared rows, of which all of 10 agents replace 4 times 4; they have 64 private rows each.
    A row of a layer has K and V of 8 heads of 128 at 2 bytes."""
    sizes = {"dtype": torch.bfloat16, "shared": 64, "layers": 3}
    layer = 2 * 8 * 128 * 2
    read, written = 48 + 10 * (64 + 16), 10 * (64 + 64)
    assert gpu.diff_restore(CPU, **sizes).bytes == (read + written) * 3 * layer
    read, written = 48 + 10 * (64 + 64), 10 * (64 + 16)
    assert gpu.diff_encode(CPU, **sizes).bytes == (read + written) * 3 * layer + 16 * layer


def test_restore_reads_the_rows_that_are_counted():
    dense = gpu._Dense.make(CPU, torch.float32, 64, 1)
    rows = [reference.mirror_rows(dense.case.round, agent).pool_row for agent in range(10)]
    assert len(torch.cat(rows).unique()) == 64 - dense.hidden + dense.own
    assert len(torch.cat(rows)) == dense.slots.numel()


def test_bytes_and_flops_of_attention():
    heads = (2, 3, 64)
    sizes = {"heads": heads, "agents": 3, "shared": 64, "private": 5, "dtype": torch.float16}
    # 64 shared rows and 5 of each agent: K and V of 2 heads of 64 at 2 bytes.
    assert gpu.attention_decode(CPU, **sizes).bytes == (64 + 15) * 512
    eight_bits = sizes | {"pool_dtype": torch.float8_e4m3fn}
    assert gpu.attention_decode(CPU, **eight_bits).bytes == (64 + 15) * 256
    # Row i of 69 sees i + 1 keys: 2415 for each of 3 agents and 6 heads, twice 64 multiply-adds.
    assert gpu.attention_prefill(CPU, **sizes).flops == 2415 * 3 * 6 * 256


def test_decode_reads_the_rows_that_are_counted():
    case = mirrors.make_round(agents=3, shared=64, private=5, num_kv_heads=1, head_dim=64)
    rows = [reference.mirror_rows(case.round, agent).pool_row for agent in range(3)]
    assert len(torch.cat(rows).unique()) == 64 + 3 * 5


def test_pages_for_the_cascade():
    """Four Masters of 16 rows in pages 0 to 3; own pages of two agents with 20 rows each."""
    case = mirrors.make_round(agents=2, shared=64, private=20, num_kv_heads=1, head_dim=64)
    queries, indptr, pages, last = gpu.cascade_pages(case)
    assert [x.tolist() for x in queries] == [[0, 2], [0, 1, 2]]
    assert [x.tolist() for x in indptr] == [[0, 4], [0, 2, 4]]
    assert [x.tolist() for x in pages] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [x.tolist() for x in last] == [[16], [4, 4]]


def test_the_report():
    rates = {"copy": 2e12, torch.bfloat16: 4e14}
    moving = gpu.Shape("moving", torch.bfloat16, print, bytes=10**9)
    line = gpu.line(moving, 1e-3, rates, {"sdpa": 2.5e-3, "cascade": 5e-4})
    expected = "moving 1000.0 us 1000.0 GB/s 0.50 of copy sdpa 2.50x cascade 0.50x"
    assert line.split() == expected.split()
    computing = gpu.Shape("computing", torch.bfloat16, print, flops=10**12)
    line = gpu.line(computing, 1e-2, rates, {})
    assert line.split()[1:] == ["10000.0", "us", "100.0", "TFLOP/s", "0.25", "of", "gemm"]
