"""What nvcc's assembler makes of the kernels: registers, spills, shared memory, occupancy, SASS.

    python -m tools.sass                     table for all architectures of a release
    python -m tools.sass --arch 80 90        for these
    python -m tools.sass --arch 80 90 --check
                                             and compares with tools/sass_table.txt
    python -m tools.sass --arch 80 90 --write
                                             writes that table anew

Whatever the compiler's version, a kernel must not spill or use local memory, must fit on every
architecture, and a wide one must access memory 16 bytes at a time (but for e4m3 that is moved).
Registers and instruction counts are compared with the table only where nvcc is of the version that
made it. Below stands what a thread executes (tools/paths.py), which has a table of its own.
nvdisasm comes from PyPI (nvidia-cuda-nvdisasm) or from a CUDA installation.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ptxrun.nvcc import find_nvcc

from tools import paths
from tools.kernel_ptx import ptx_backend

TABLE = Path(__file__).with_name("sass_table.txt")
RELEASE_ARCHS = ("80", "86", "89", "90", "100", "120")


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks on a multiprocessor share; the programming guide's compute capabilities."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 * 1024),
    "86": Multiprocessor(48, 16, 100 * 1024),
    "89": Multiprocessor(48, 24, 100 * 1024),
    "90": Multiprocessor(64, 32, 228 * 1024),
    "100": Multiprocessor(64, 32, 228 * 1024),
    "120": Multiprocessor(48, 24, 100 * 1024),
}
MAX_SHARED_BYTES = 99 * 1024
RESERVED_SHARED_BYTES = 1024  # of every block, for the system

# Columns of instruction counts. LDG.128 does not count LDGSTS, copies from global to shared memory.
INSTRUCTIONS = {
    "HMMA": r"HMMA\b",
    "LDSM": r"LDSM\b",
    "LDGSTS": r"LDGSTS\b",
    "LDG.128": r"LDG\.\S*\b128\b",
    "STG.128": r"STG\.\S*\b128\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
}
# The first of these is how a wide kernel begins to read rows; the column "before" counts the
# instructions that the listing has before it, or is 0 where there is none.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*)", re.M)
_FIRST_COPY = re.compile(r"LDGSTS\b|LDG\.\S*\b128\b|LDG\.E\.64 ")


@dataclass(frozen=True)
class Kernel:
    """One line of the table. ``shared``: bytes of a block, static and the most a plan asks for."""

    name: str
    arch: str
    threads: int
    registers: int
    spills: int
    shared: int
    blocks: int
    warps: int
    counts: tuple[int, ...]
    before: int

    def line(self) -> str:
        limits = MULTIPROCESSORS[self.arch]
        numbers = (self.threads, self.registers, self.spills, self.shared, self.blocks)
        text = f"{self.name:48} {self.arch:>4}" + "".join(f" {n:7}" for n in numbers)
        text += f" {f'{self.warps}/{limits.warps}':>7}"
        return text + "".join(f" {n:7}" for n in (*self.counts, self.before))


def header() -> str:
    columns = ("threads", "regs", "spills", "shared", "blocks", "warps", *INSTRUCTIONS, "before")
    return f"{'kernel':48} {'arch':>4}" + "".join(f" {column:>7}" for column in columns)


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared: int) -> int:
    """How many blocks of a kernel run on a multiprocessor together; 0 if one does not fit."""
    limits = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    # Registers are handed out to a warp in units of 256, shared memory in units of 128 bytes.
    of_warp = -(-registers * 32 // 256) * 256
    of_block = -(-(shared + RESERVED_SHARED_BYTES) // 128) * 128
    return min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // of_warp // warps,
        limits.shared_bytes // of_block,
    )


# What the plans ask for ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    threads: int
    shared_bytes: int


def demands() -> dict[str, Demand]:
    """Most threads and dynamic shared memory that plans ask for, per kernel.

    Over dtypes, alignments, head dims, rotary dims and page sizes, of a round of 10 agents that
    fills the machine.
    """
    found: dict[str, Demand] = {}
    for operator, params in _representative_params():
        plan = ptx_backend.plan(operator, params)
        for launch in plan.launches[: plan.num_launches]:
            name = launch.name.decode()
            before = found.get(name, Demand(0, 0))
            found[name] = Demand(
                max(before.threads, launch.block[0] * launch.block[1] * launch.block[2]),
                max(before.shared_bytes, launch.shared_bytes),
            )
    return found


def _representative_params():
    backend = ptx_backend
    plain, e4m3 = (0, 1, 2), 3
    same = [(dtype, dtype) for dtype in (*plain, e4m3)]
    # Of what is read and what is written, or of queries and pools.
    dtypes = same + [(e4m3, dtype) for dtype in plain] + [(dtype, e4m3) for dtype in plain]
    choices = itertools.product(
        dtypes, (False, True), (64, 80, 96, 128, 256), (8, 16, 32), (True, False)
    )
    for (dtype, other), interleaved, head_dim, block_size, wide in choices:
        address = (1 << 20) + (0 if wide else 4)
        heads, layers = 4, 4
        rows = backend.RowLayout(
            1 << 20, block_size * heads * head_dim, heads * head_dim, head_dim, block_size
        )
        rope = backend.RopeTables(1 << 20, 1 << 20, 1 << 15, head_dim, interleaved)
        pointers = backend.LayerPointers()
        pointers.k[:layers] = pointers.v[:layers] = [address] * layers
        sizes = {"num_heads": heads, "head_dim": head_dim, "dtype": dtype}
        view = backend.RoundView(
            extents=backend.Extents(
                rows=640,
                agents=10,
                masters=8,
                master_pages=1024,
                own_pages=640,
                work=64,
                partials=640,
                block_size=block_size,
            )
        )
        mirrors = {
            **sizes,
            "pool": pointers,
            "pool_k_layout": rows,
            "pool_v_layout": rows,
            "num_layers": layers,
            "max_length": 1 << 14,
            "round": view,
            "rope": rope,
        }
        yield (
            "rope_rotate",
            backend.RopeRotateParams(
                x=address,
                out=address,
                x_layout=rows,
                out_layout=rows,
                num_rows=1 << 14,
                destinations=1,
                rope=rope,
                out_dtype=other,
                **sizes,
            ),
        )
        if dtype in (e4m3, other):
            yield (
                "diff_restore",
                backend.DiffRestoreParams(
                    out=pointers,
                    out_k_layout=rows,
                    out_v_layout=rows,
                    out_dtype=other,
                    **mirrors,
                ),
            )
        if dtype == other:
            encode = backend.DiffEncodeParams(in_k_layout=rows, in_v_layout=rows, **mirrors)
            setattr(encode, "in", pointers)
            yield "diff_encode", encode
        if dtype == e4m3:
            continue
        if dtype == other or dtype != 0:
            yield (
                "collective_attention",
                backend.CollectiveAttentionParams(
                    q=address,
                    out=address,
                    k_pool=address,
                    v_pool=address,
                    q_row_stride=4 * heads * head_dim,
                    q_head_stride=head_dim,
                    out_row_stride=4 * heads * head_dim,
                    out_head_stride=head_dim,
                    k_layout=rows,
                    v_layout=rows,
                    round=view,
                    num_q_heads=4 * heads,
                    num_kv_heads=heads,
                    head_dim=head_dim,
                    rope=rope,
                    dtype=dtype,
                    pool_dtype=other,
                ),
            )
        if other == e4m3:
            continue
        yield (
            "key_deviation",
            backend.KeyDeviationParams(
                fresh=address,
                cached=address,
                fresh_layout=rows,
                cached_layout=rows,
                num_tokens=1 << 14,
                num_agents=10,
                rope=rope,
                **sizes,
            ),
        )
        yield (
            "merge_states",
            backend.MergeStatesParams(
                partial_out=address, out=address, num_partials=4, num_rows=64, **sizes
            ),
        )


# What the compiler made ---------------------------------------------------------------------------


def find_nvdisasm() -> str | None:
    """nvdisasm on PATH, or out of the wheel nvidia-cuda-nvdisasm."""
    found = shutil.which("nvdisasm")
    package = None if found else find_spec("nvidia")
    for directory in (package.submodule_search_locations or []) if package else []:
        for candidate in Path(directory).glob("cu*/bin/nvdisasm"):
            return str(candidate)
    return found


def nvcc_version() -> str:
    output = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"V(\d+\.\d+\.\d+)", output.stdout).group(1)


def parse_resources(messages: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes spilled (stores and loads) and static shared bytes, from ``ptxas -v``."""
    resources = {}
    for entry in messages.split("Compiling entry function '")[1:]:
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        resources[entry.split("'")[0]] = (
            int(re.search(r"Used (\d+) registers", entry).group(1)),
            int(spilled.group(1)) + int(spilled.group(2)),
            int(shared.group(1)) if shared else 0,
        )
    return resources


def parse_sass(listing: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Counts of ``INSTRUCTIONS`` per kernel, and the instructions before the first copy, from
    ``nvdisasm -c``."""
    found = {}
    for section in listing.split("\n.text.")[1:]:
        name, code = section.split(":", 1)
        counts = tuple(len(re.findall(p, code)) for p in INSTRUCTIONS.values())
        instructions = _INSTRUCTION.findall(code)
        copies = (i for i, text in enumerate(instructions) if _FIRST_COPY.search(text))
        found[name] = counts, next(copies, 0)
    return found


def compile_kernels(source: Path, arch: str, wanted: dict[str, Demand]) -> list[Kernel]:
    """Compiles a source of csrc/cuda for an architecture; one entry per kernel in it."""
    with tempfile.TemporaryDirectory(prefix="sass") as directory:
        cubin = Path(directory) / "kernels.cubin"
        command = [find_nvcc(), "-cubin", f"-arch=sm_{arch}", "-O3", "-Xptxas=-v"]
        command += [*ptx_backend.INCLUDES, str(source), "-o", str(cubin)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{compiled.stdout}{compiled.stderr}")
        command = [find_nvdisasm(), "-c", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    listed = parse_sass(listing)
    kernels = []
    for name, (registers, spills, static) in parse_resources(compiled.stderr).items():
        if name not in wanted:
            raise RuntimeError(f"{name}: no plan launches this kernel")
        threads, shared = wanted[name].threads, static + wanted[name].shared_bytes
        blocks = blocks_per_multiprocessor(arch, threads, registers, shared)
        warps = blocks * -(-threads // 32)
        kernels.append(
            Kernel(
                name.removeprefix("tokendance_"),
                arch,
                threads,
                registers,
                spills,
                shared,
                blocks,
                warps,
                *listed[name],
            )
        )
    return kernels


def complaints(kernel: Kernel) -> list[str]:
    """What must not be, whatever the compiler's version."""
    counts = dict(zip(INSTRUCTIONS, kernel.counts, strict=True))
    found = []
    if kernel.spills or counts["LDL"] or counts["STL"]:
        found.append("uses local memory")
    if kernel.shared > MAX_SHARED_BYTES:
        found.append(f"needs {kernel.shared} bytes of shared memory, of {MAX_SHARED_BYTES}")
    if kernel.blocks == 0:
        found.append("does not fit on a multiprocessor")
    # Rows of e4m3 are moved by vectors of as many elements as another type has in 16 bytes.
    moves_less = not kernel.name.startswith("collective_attention") and "e4m3" in kernel.name
    reads_wide = (
        counts["LDG.128"] or counts["LDGSTS"] or (moves_less and "_to_e4m3" not in kernel.name)
    )
    merges = "merge" in kernel.name
    is_wide = kernel.name.endswith("_wide") or (
        kernel.name.startswith("collective_attention") and not merges
    )
    if (is_wide or merges) and not reads_wide:
        found.append("has no loads of 16 bytes")
    writes_rows = not kernel.name.startswith(("key_deviation", "diff_encode_compare"))
    writes_wide = counts["STG.128"] or (moves_less and "e4m3_to_" not in kernel.name)
    if is_wide and writes_rows and not writes_wide:
        found.append("has no stores of 16 bytes")
    is_attention = kernel.name.startswith(("collective_attention_f16", "collective_attention_bf16"))
    if is_attention and not (counts["HMMA"] and counts["LDSM"]):
        found.append("does not use tensor cores")
    return [f"{kernel.name} on sm_{kernel.arch} {complaint}" for complaint in found]


def kernels_of(archs: list[str], jobs: int) -> list[Kernel]:
    """All kernels of csrc/cuda for these architectures, in the order of names."""
    wanted = demands()
    sources = sorted(ptx_backend.CUDA_SOURCES.glob("*.cu"))
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(
            lambda pair: compile_kernels(*pair, wanted), itertools.product(sources, archs)
        )
        kernels = [kernel for of_source in found for kernel in of_source]
    return sorted(kernels, key=lambda kernel: (kernel.name, archs.index(kernel.arch)))


def differences(table: str, lines: list[str]) -> list[str]:
    """Lines of a table that are not the compiler's, or of another compiler: none."""
    version, *expected = table.splitlines()
    if version != f"nvcc {nvcc_version()}":
        return []
    return [f"- {line}" for line in expected if line not in lines] + [
        f"+ {line}" for line in lines if line not in expected
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sass", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", nargs="+", default=list(RELEASE_ARCHS), choices=RELEASE_ARCHS)
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at once")
    parser.add_argument("--check", action="store_true", help=f"compare with {TABLE.name}")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args(arguments)
    if find_nvcc() is None or find_nvdisasm() is None:
        parser.error("needs nvcc and nvdisasm (pip install nvidia-cuda-nvdisasm)")
    kernels = kernels_of(options.arch, options.jobs)
    lines = [kernel.line() for kernel in kernels]
    print(header(), *lines, sep="\n")
    wrong = [complaint for kernel in kernels for complaint in complaints(kernel)]
    if options.check:
        wrong += differences(TABLE.read_text(), [header(), *lines])
    if options.write:
        TABLE.write_text("\n".join([f"nvcc {nvcc_version()}", header(), *lines]) + "\n")
    executed = paths.lines()  # which looks blocks up in the table that has just been written
    print("", *executed, sep="\n")
    if options.check:
        wrong += differences(paths.TABLE.read_text(), executed)
    if options.write:
        paths.write(executed, nvcc_version())
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
