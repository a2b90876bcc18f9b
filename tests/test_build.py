"""What was built: it loads anywhere, tells how it was built, and gives one result on every CPU."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("avx512", "avx2", "portable")


def run(*command, **environment):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def available_isas():
    """The instruction sets that this machine and build have, by what an unknown name raises."""
    code = (
        "from tokendance.cli.info import report; print(report()['cpu']['instruction set in use'])"
    )
    message = run("-c", code, TOKENDANCE_CPU_ISA="none").stdout
    offered = message.partition("expected one of ")[2].partition(", got")[0]
    return tuple(offered.split(", "))


def test_info_prints_what_a_bug_report_needs():
    result = run("-m", "tokendance", "info")
    assert result.returncode == 0, result.stderr
    for section in ("[versions]", "[build]", "[cpu]", "[devices]", "[environment]"):
        assert section in result.stdout
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert lines["python"] == platform.python_version()
    assert "portable" in lines["CPU instruction sets"]
    assert lines["instruction set in use"] in ISAS
    assert "rope_rotate_out" in lines["operators on CPU"]


def test_the_command_line_refuses_what_it_does_not_know():
    result = run("-m", "tokendance", "nonsense")
    assert result.returncode == 2
    assert "info" in result.stderr


def test_import_needs_neither_gpu_nor_compiler_nor_network():
    code = (
        "import socket, subprocess\n"
        "def refuse(*arguments, **options): raise AssertionError('not while importing')\n"
        "socket.socket.connect = subprocess.Popen.__init__ = refuse\n"
        "import tokendance.device.operators, torch\n"
        "print(len(tokendance.device.operators.registered('CPU')), torch.cuda.is_initialized())\n"
    )
    result = run("-c", code, CUDA_VISIBLE_DEVICES="", PATH="")
    assert result.returncode == 0, result.stderr
    count, initialized = result.stdout.split()
    assert int(count) >= 7
    assert initialized == "False"


def test_an_unknown_instruction_set_is_refused_by_the_operator():
    code = (
        "import torch, tokendance.device.operators as ops\n"
        "x, table = torch.zeros(1, 1, 64), torch.zeros(1, 32)\n"
        "ops.rope_rotate(x, None, None, None, table, table)\n"
    )
    result = run("-c", code, TOKENDANCE_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "TOKENDANCE_CPU_ISA: expected one of" in result.stderr
    assert "got sse9" in result.stderr


# Digests of what the operators write, over dtypes, head dims and styles. The keys are random bits,
# so that NaN of every payload, infinities and subnormals are among them.
DIGESTS = """
import hashlib, json, sys
import torch
from tokendance import testing
from tokendance.device import operators as ops

def digest(*tensors):
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(testing.whole_storage(tensor.contiguous()).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()

def values(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = 32 if dtype == torch.float32 else 16
    integer = torch.int32 if bits == 32 else torch.int16
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    return torch.randint(low, high + 1, shape, generator=generator).to(integer).view(dtype)

result = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for head_dim, rotary_dim in ((64, 64), (80, 80), (96, 96), (256, 256), (128, 20)):
        for interleaved in (False, True):
            seed = head_dim + rotary_dim + interleaved
            name = f"{dtype} {head_dim} {rotary_dim} {interleaved}"
            positions = 512
            generator = torch.Generator().manual_seed(seed)
            angle = torch.rand(positions, rotary_dim // 2, generator=generator) * 6
            cos, sin = angle.cos(), angle.sin()
            x = values((40, 3, head_dim), dtype, seed)
            to = torch.randint(0, positions, (40, 2), generator=generator).int()
            out = torch.zeros(80, 3, head_dim, dtype=dtype)
            rows = torch.randperm(80, generator=generator).view(40, 2)
            for scale in (1.0, 1.25):
                ops.rope_rotate_out(x, None, rows, None, to, cos, sin, interleaved, scale, out)
                result[f"rotate {name} {scale}"] = digest(out)
            fresh = torch.randn(40, 3, head_dim, generator=generator).to(dtype)
            cached = torch.randn(40, 3, head_dim, generator=generator).to(dtype)
            deviation = ops.key_deviation(
                fresh, torch.randint(-1, 40, (3, 21), generator=generator), None, cached,
                torch.arange(21), to[:21, 0].contiguous(), cos, sin, interleaved, 1.25)
            result[f"deviation {name}"] = digest(deviation)
            case = testing.random_round(
                seed, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved,
                dtype=dtype, room_for_all=True, num_layers=2, masks="random")
            dense = testing.dense_cache(case, seed)
            for pool in case.k_pool + case.v_pool:
                pool.copy_(values(pool.shape, dtype, seed))
            ops.diff_restore(case.k_pool, case.v_pool, case.cos, case.sin, interleaved, case.round,
                             dense.slot_mapping, dense.k, dense.v)
            result[f"restore {name}"] = digest(*dense.k, *dense.v)
            for tolerance in (0.0, 0.5):
                dense.k[0].view(-1)[::7919] = 1.5
                ops.diff_encode(dense.k, dense.v, dense.slot_mapping, case.length, case.k_pool,
                                case.v_pool, case.cos, case.sin, interleaved, case.round,
                                tolerance, tolerance)
                result[f"encode {name} {tolerance}"] = digest(
                    case.round.buffer, *case.k_pool, *case.v_pool)
json.dump(result, sys.stdout)
"""


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    isas = available_isas()
    assert "portable" in isas
    if platform.machine() != "x86_64":
        assert isas == ("portable",)
        return
    digests = {}
    for threads, isa in enumerate(isas, start=1):
        code = f"import torch; torch.set_num_threads({threads})\n" + DIGESTS
        result = run("-c", code, TOKENDANCE_CPU_ISA=isa)
        assert result.returncode == 0, result.stderr
        digests[isa] = json.loads(result.stdout)
    expected = digests.pop("portable")
    assert len(expected) == 3 * 5 * 2 * 6
    for isa, found in digests.items():
        different = [name for name in expected if found[name] != expected[name]]
        assert not different, f"{isa}: {different}"


CMAKE = """#!{python}
import time
from pathlib import Path

events = Path("events")
with events.open("a") as file:
    file.write("begin\\n")
time.sleep(0.1)
with events.open("a") as file:
    file.write("end\\n")
"""


def test_of_two_builds_in_one_folder_the_second_waits(tmp_path):
    """With a compiler that only says when it runs: CMake is called twice per build."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)  # beside which cmake is looked for
    (tools / "cmake").write_text(CMAKE.format(python=sys.executable))
    (tools / "cmake").chmod(0o755)
    packages = str(Path(setuptools.__file__).parent.parent)
    builds = [
        subprocess.Popen(
            [tools / "python", "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": packages},
        )
        for _ in range(3)
    ]
    assert [build.wait() for build in builds] == [0, 0, 0]
    assert (tmp_path / "events").read_text().split() == ["begin", "end"] * 6


def test_the_binary_asks_for_no_cuda_library():
    from tokendance.device import operators as ops

    command = ["readelf", "--dynamic", "--wide", ops.LIBRARY]
    needed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "libtorch_cpu.so" in needed
    for word in ("libtorch_cuda", "libcudart.so", "libc10_cuda"):
        assert word not in needed
