"""`python -m bench.gpu` without a GPU: its shapes, its byte counts, its report."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_model, gpu_peers, gpu_shapes, mirrors
from tokendance.device import operators as ops
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


@pytest.mark.parametrize(
    ("make", "sizes"), gpu.SETS["all"], ids=lambda value: getattr(value, "__name__", "")
)
def test_shapes_are_calls_that_operators_take(make, sizes):
    shape = make(CPU, **gpu_shapes.smaller(sizes))
    for result in shape.results(shape.arguments):
        if result.is_floating_point() and make is not gpu_shapes.diff_encode:
            result.fill_(torch.nan)
    assert shape.difference() == 0
    assert not any(result.isnan().any() for result in shape.results(shape.arguments))
    assert (shape.bytes > 0) != (shape.flops > 0)
    if make in (gpu_shapes.attention_decode, gpu_shapes.attention_prefill):
        shape.peers["sdpa"]()()


def test_a_difference_from_the_cpu_is_found():
    shape = gpu_shapes.merge_states(CPU, dtype=torch.float32, rows=3, heads=1)
    assert shape.difference() == 0
    calls = []

    def wrong(*arguments):
        ops.merge_states_out(*arguments)
        if not calls:  # the first call is the device's
            arguments[3][1, 0, 5] += 0.5
        calls.append(arguments)

    largest = float(shape.arguments[3].abs().max())
    assert replace(shape, operator=wrong).difference() == pytest.approx(0.5 / largest, rel=1e-5)
    calls.clear()

    def not_a_number(*arguments):
        ops.merge_states_out(*arguments)
        arguments[3].fill_(torch.nan if not calls else 1.0)
        calls.append(arguments)

    assert replace(shape, operator=not_a_number).difference() == float("inf")


def test_shifts_differ_from_use_to_use():
    case = mirrors.make_round(agents=16, shared=4096, private=64, segments=8, shuffled=True)
    shifts = [
        int(delta) - master.origin
        for mirror in case.mirrors
        for delta, master in zip(mirror.uses.delta, mirror.uses.masters, strict=True)
    ]
    assert len(shifts) == 16 * 8
    assert len(set(shifts)) > 64
    assert {mirror.length for mirror in case.mirrors} == {4096 + 64}
    assert len({use.length for use in case.mirrors[0].uses}) > 4


def test_bytes_of_rows_that_move():
    bf16, f32 = torch.bfloat16, torch.float32
    # 10 rows of 2 heads of 64 at 2 bytes, read once and written 3 times.
    sizes = {"heads": 2, "head_dim": 64}
    rotate = gpu_shapes.rope_rotate(CPU, dtype=bf16, rows=10, destinations=3, **sizes)
    assert rotate.bytes == 10 * 256 * 4
    # 16 tokens of 3 agents and as many cached ones, of 1 head of 64 at 4 bytes.
    keys = gpu_shapes.key_deviation(CPU, dtype=f32, tokens=16, agents=3, heads=1, head_dim=64)
    assert keys.bytes == 64 * 256
    # 2 partials and a result of 5 rows of 3 heads, each 64 values of 2 bytes and an LSE of 4.
    merge = gpu_shapes.merge_states(CPU, dtype=bf16, rows=5, partials=2, heads=3, head_dim=64)
    assert merge.bytes == 3 * 5 * 3 * 132


def test_bytes_of_mirrors():
    """64 shared rows, of which all of 10 agents replace 4 times 4; they have 64 private rows each.
    A row of a layer has K and V of 8 heads of 128 at 2 bytes."""
    sizes = {"dtype": torch.bfloat16, "shared": 64, "layers": 3}
    layer = 2 * 8 * 128 * 2
    read, written = 48 + 10 * (64 + 16), 10 * (64 + 64)
    assert gpu_shapes.diff_restore(CPU, **sizes).bytes == (read + written) * 3 * layer
    read, written = 48 + 10 * (64 + 64), 10 * (64 + 16)
    assert gpu_shapes.diff_encode(CPU, **sizes).bytes == (read + written) * 3 * layer + 16 * layer


def test_restore_reads_the_rows_that_are_counted():
    dense = gpu_shapes.Dense.make(CPU, torch.float32, 64, 1)
    rows = [reference.mirror_rows(dense.case.round, agent).pool_row for agent in range(10)]
    assert len(torch.cat(rows).unique()) == 64 - dense.hidden + dense.own
    assert len(torch.cat(rows)) == dense.slots.numel()


def test_bytes_and_flops_of_attention():
    heads = (2, 3, 64)
    sizes = {"heads": heads, "agents": 3, "shared": 64, "private": 5, "dtype": torch.float16}
    # 64 shared rows and 5 of each agent: K and V of 2 heads of 64 at 2 bytes.
    assert gpu_shapes.attention_decode(CPU, **sizes).bytes == (64 + 15) * 512
    eight_bits = sizes | {"pool_dtype": torch.float8_e4m3fn}
    assert gpu_shapes.attention_decode(CPU, **eight_bits).bytes == (64 + 15) * 256
    # Row i of 69 sees i + 1 keys: 2415 for each of 3 agents and 6 heads, twice 64 multiply-adds.
    assert gpu_shapes.attention_prefill(CPU, **sizes).flops == 2415 * 3 * 6 * 256


def test_decode_reads_the_rows_that_are_counted():
    case = mirrors.make_round(
        agents=3, shared=2048, private=5, segments=8, shuffled=True, num_kv_heads=1, head_dim=64
    )
    rows = [reference.mirror_rows(case.round, agent).pool_row for agent in range(3)]
    assert len(torch.cat(rows).unique()) == 2048 + 3 * 5


# Peers -------------------------------------------------------------------------------------------


def small_round(**options):
    """Four Masters of 16 rows in pages 0 to 3; own pages of two agents with 20 rows each."""
    return mirrors.make_round(
        agents=2, shared=64, private=20, num_kv_heads=1, head_dim=64, **options
    )


def test_pages_for_the_cascade():
    queries, indptr, pages, last = gpu_peers.cascade_pages(small_round())
    assert [x.tolist() for x in queries] == [[0, 2], [0, 1, 2]]
    assert [x.tolist() for x in indptr] == [[0, 4], [0, 2, 4]]
    assert [x.tolist() for x in pages] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [x.tolist() for x in last] == [[16], [4, 4]]


def test_pages_without_sharing():
    indptr, pages, last = gpu_peers.paged_pages(small_round())
    assert indptr.tolist() == [0, 6, 12]
    assert pages.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7]
    assert last.tolist() == [4, 4]


class Wrapper:
    """Any of FlashInfer's: notes what it is given."""

    def __init__(self, *arguments, **options):
        self.made = options
        self._batch_prefill_wrappers = [types.SimpleNamespace(_backend="auto") for _ in range(2)]

    def plan(self, *arguments, **options):
        self.planned = arguments, options

    def run(self, *arguments):
        return self, arguments


def test_flashinfer_is_asked_for_what_it_has(monkeypatch):
    names = ("MultiLevelCascadeAttention", "BatchDecodeWithPagedKVCache")
    names += ("BatchPrefillWithRaggedKVCache",)
    fake = types.SimpleNamespace(**{f"{name}Wrapper": Wrapper for name in names})
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(gpu_peers, "WORKSPACE", 8)
    case = small_round(dtype=torch.bfloat16, group=2)
    peers = gpu_peers.of_decode(case)
    assert set(peers) == {"sdpa", "paged", "cascade fa2", "cascade fa3"}
    wrapper, given = peers["cascade fa3"]()()
    assert [level._backend for level in wrapper._batch_prefill_wrappers] == ["fa3", "fa3"]
    assert wrapper.planned[0][4:] == (2, 1, 64, 16)
    assert given == (case.q, (case.k_pools[0], case.v_pools[0]))
    wrapper, _ = peers["paged"]()()
    assert wrapper.planned[0][3:] == (2, 1, 64, 16)
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    assert wrapper.planned[1] == dtypes
    whole = small_round(dtype=torch.bfloat16, rows=84)
    wrapper, (q, k, v) = gpu_peers.of_prefill(whole)["ragged fa3"]()()
    assert wrapper.made == {"backend": "fa3"}
    assert [end.tolist() for end in wrapper.planned[0][:2]] == [[0, 84, 168]] * 2
    assert (q.shape, k.shape, v.shape) == ((168, 1, 64),) * 3


# Measuring ---------------------------------------------------------------------------------------


def test_spreads():
    spread = gpu.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert (spread.median, spread.least, spread.p90) == (6.0, 1.0, 10.0)


def test_kernels_are_told_apart():
    events = [
        ("tokendance_collective_attention_bf16_d128", 120.0),
        ("tokendance_collective_attention_merge_bf16_d128", 10.0),
        ("void at::native::reduce_kernel<512, 1>", 50.0),
    ]
    assert gpu.kernel_times(events) == {
        "collective_attention_bf16_d128": 120e-6,
        "collective_attention_merge_bf16_d128": 10e-6,
    }


def test_peers_that_cannot_be_had_say_why():
    def absent():
        raise ImportError("No module named 'flashinfer'")

    shape = gpu_shapes.merge_states(CPU, dtype=torch.bfloat16, rows=3)
    shape = replace(shape, peers={"one": lambda: lambda: None, "other": absent})
    row = gpu.measure(shape, gpu.RehearsalClock(), {"copy": 1e9})
    assert row.peers["one"] > 0
    assert row.peers["other"] == "No module named 'flashinfer'"
    assert row.fraction == pytest.approx(shape.bytes / row.seconds.median / 1e9)


def test_the_report():
    spread = gpu.Spread(1e-3, 9e-4, 1.2e-3)
    row = gpu.Row("moving", spread, 1e12, "copy", 0.5, 5e-6, {}, 0.0, {"sdpa": 2.5e-3, "no": "?"})
    expected = (
        "moving 1000.0 us (900.0 to 1200.0) 1000.0 GB/s 0.50 of copy host 5.0 us off 0.0e+00 "
        "sdpa 2.50x"
    )
    assert row.lines().split() == expected.split()
    kernels = {"attention": 9e-4, "merge": 1e-4}
    row = gpu.Row("computing", spread, 1e14, "gemm", 0.25, 5e-6, kernels, None, {})
    first, second = row.lines().split("\n")
    expected = "1000.0 us (900.0 to 1200.0) 100.0 TFLOP/s 0.25 of gemm host 5.0 us"
    assert first.split()[1:] == expected.split()
    assert second.strip() == "attention 900.0 us, merge 100.0 us"


def test_a_rehearsal_writes_a_line_of_json_for_each_shape(tmp_path, capsys, monkeypatch):
    file = tmp_path / "new" / "gpu.jsonl"
    monkeypatch.setenv("PATH", "")  # without nvidia-smi
    command = ["--rehearse", "--only", "key_deviation", "--json", str(file)]
    assert gpu.main(command) == 0
    head, *rows, after = [json.loads(line) for line in file.read_text().splitlines()]
    assert head["torch"] == torch.__version__
    assert head["read_GB/s"] > 0
    assert head["nothing_us"] < 1e3
    assert [row["name"].split()[0] for row in rows] == ["key_deviation"] * 2
    assert all(row["difference"] == 0 for row in rows)
    assert after == {"after": {}}
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_shape_that_fails_does_not_end_the_others(tmp_path, capsys, monkeypatch):
    def broken(device, **sizes):
        raise RuntimeError("CUDA error 2: out of memory")

    small = (gpu_shapes.merge_states, {"dtype": torch.float32, "rows": 2})
    monkeypatch.setitem(gpu.SETS, "usual", [(broken, {"rows": 1}), small])
    file = tmp_path / "gpu.jsonl"
    assert gpu.main(["--rehearse", "--json", str(file)]) == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[1]["error"] == "CUDA error 2: out of memory"
    assert rows[2]["name"].startswith("merge_states")
    assert "broken {'rows': 1}: CUDA error 2" in capsys.readouterr().out


def test_a_profiler_gets_calls_alone(capsys):
    matching = ["--only", "attention_decode", "--matching", "8x64", "--calls", "3", "--rehearse"]
    assert gpu.main(matching) == 0
    assert capsys.readouterr().out == ""
    matching[3] = "8x128  G 8"
    assert gpu.main(matching) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("3 calls of attention, decode    bfloat16 8x128  G 8")


def test_facts_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 3201 MHz, 40, 300.00 W'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.facts()["driver_version"] == "580.1"
    assert gpu.facts()["clocks.sm"] == "1980 MHz"
    script.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert gpu.facts() == {}


def test_a_model_end_to_end():
    result = gpu_model.measure(CPU, rehearse=True)
    assert result["rows"] == 3 * 256
    assert result["rows_computed"] < result["rows"]
    assert result["stored_bytes"] < result["dense_bytes"]
    for name in ("plan", "prefill", "decode", "dense_prefill", "dense_decode"):
        assert result[f"{name}_s"] > 0
    assert "3 agents of 256 tokens" in gpu_model.lines(result)
