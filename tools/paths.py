"""What a thread executes on its way through the kernels: the instructions of their PTX, counted.

    python -m tools.paths

`python -m tools.sass` prints it below its own table, and compares with tools/path_table.txt or
writes that. Per kernel, of a thread of the first block:

- ``before``: instructions before the first copy of keys, values or partials (``cp.async``, or a
  load of a vector of them); ``loads``: how many of them are loads of global memory that wait for
  one another, the longest chain. A load waits for those that its address is made of, and for those
  that a jump before it is decided by.
- ``trips``: how often the thread waits for global memory in all, if instructions are issued in this
  order and each waits for its operands alone; ``bytes``: of vectors, that it reads meanwhile.
- ``KB under way``: bytes per trip, times the threads of the blocks that an H100's or H200's
  multiprocessor holds (tools/sass_table.txt): by Little's law what is on its way on average. With a
  latency of 700 ns (assumed) an H200's share of 36 bytes/ns holds 25 KB under way.

Then what differs between two calls of a kernel, one of which has a tile of 64 keys more, the same
keys in two Masters instead of one, or more partials. Last, what is expected of an H200 for shapes
of `python -m bench.gpu`, to be contradicted by one; see :func:`expected`.

PTX is not what the assembler makes of it; but it is the same for every architecture of a kind, and
it is executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tools import kernel_ptx

import ptx_backend  # isort: skip
from ptxrun import program

from bench import traffic
from tokendance import testing
from tokendance.device.rounds import RoundTensors
from tokendance.host.round import RoundExtents

TABLE = Path(__file__).with_name("path_table.txt")
SASS_TABLE = Path(__file__).with_name("sass_table.txt")
OCCUPANCY_ARCH = "90"

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
WITHOUT_RESULT = {"st", "red", "bra", "brx", "bar", "barrier", "ret", "exit", "cp", "trap", "fence"}


@dataclass(frozen=True)
class Way:
    """What a thread of a kernel executed; see the module's text."""

    before: int
    loads: int
    trips: int
    nbytes: int


def _registers(operand: program.Operand) -> Iterator[program.Register]:
    """Registers that an operand consists of."""
    if isinstance(operand, program.Register):
        yield operand
    elif isinstance(operand, program.Vector):
        for item in operand.items:
            yield from _registers(item)
    elif isinstance(operand, program.Address):
        yield from _registers(operand.base)
    elif isinstance(operand, program.Not):
        yield from _registers(operand.predicate)
    elif isinstance(operand, program.Pair):
        yield from _registers(operand.first)
        yield from _registers(operand.second)


def _written_and_read(
    instruction: program.Instruction,
) -> tuple[list[program.Register], list[program.Register]]:
    operands = list(instruction.operands)
    written: list[program.Register] = []
    if instruction.opcode not in WITHOUT_RESULT and operands:
        written = list(_registers(operands.pop(0)))
    read = [register for operand in operands for register in _registers(operand)]
    if instruction.predicate is not None:
        read.append(instruction.predicate[0])
    return written, read


def _copied_bytes(instruction: program.Instruction) -> int:
    """Bytes of an asynchronous copy; 0 of anything else."""
    if instruction.opcode != "cp" or len(instruction.operands) < 2:
        return 0
    size = instruction.operands[2]
    assert isinstance(size, program.Integer)
    return size.value


def _loaded_bytes(instruction: program.Instruction, floats: bool) -> int:
    """Bytes of a load of a vector of rows; 0 of anything else. Vectors of floats are angles, but
    in what merges."""
    modifiers = instruction.modifiers
    items = [name for name in modifiers if name in ("v2", "v4")]
    if instruction.opcode != "ld" or "global" not in modifiers or not items:
        return 0
    if "f32" in modifiers and not floats:
        return 0
    return int(items[0][1]) * program.TYPE_BYTES[modifiers[-1]]


class _Waiting:
    """How many trips to global memory a thread has waited for.

    A result is there once so many trips have been waited for; a copy, when its group has been.
    """

    def __init__(self) -> None:
        self.now = 0
        self._ready: dict[program.Register, int] = {}
        self._groups: list[int] = []
        self._open = 0

    def step(
        self,
        instruction: program.Instruction,
        written: list[program.Register],
        read: list[program.Register],
    ) -> None:
        self._wait(max((self._ready.get(register, 0) for register in read), default=0))
        loads = instruction.opcode == "ld" and "global" in instruction.modifiers
        for register in written:
            self._ready[register] = self.now + loads
        if instruction.opcode != "cp":
            return
        if len(instruction.operands) > 1:
            self._open = self.now + 1
        elif "commit_group" in instruction.modifiers:
            self._groups.append(self._open)
            self._open = 0
        else:
            [left] = instruction.operands or [program.Integer(0)]
            assert isinstance(left, program.Integer)
            while len(self._groups) > left.value:
                self._wait(self._groups.pop(0))

    def _wait(self, until: int) -> None:
        self.now = max(self.now, until)


def way(
    instructions: Sequence[program.Instruction], positions: Sequence[int], floats: bool = False
) -> Way:
    """Figures of a thread's way: the kernel's instructions, and those that it executed, in order.

    Where there are asynchronous copies, vectors that are loaded are not rows; else they are, those
    of fp32 if ``floats``.
    """
    copies = any(_copied_bytes(instructions[position]) for position in set(positions))
    depth: dict[program.Register, int] = {}  # loads in a row that a register is the result of
    decided = 0  # the same of what jumps were decided by, and of what came through a barrier
    shared = 0  # and of what is in shared memory
    before = loads = nbytes = 0
    waiting = _Waiting()
    for count, position in enumerate(positions):
        instruction = instructions[position]
        opcode, modifiers = instruction.opcode, instruction.modifiers
        written, read = _written_and_read(instruction)
        here = max([decided, *(depth.get(register, 0) for register in read)])
        found = _copied_bytes(instruction) if copies else _loaded_bytes(instruction, floats)
        if found:
            if not nbytes:
                before, loads = count, here
            nbytes += found
        waiting.step(instruction, written, read)
        if opcode == "bra":
            decided = here
        elif opcode in ("bar", "barrier"):
            decided = max(decided, shared)
        elif opcode in ("st", "atom", "red") and "shared" in modifiers:
            shared = max(shared, here)
        result = here
        if opcode == "ld" and "global" in modifiers:
            result += 1
        elif opcode == "ld" and "shared" in modifiers:
            result = max(here, shared)
        for register in written:
            depth[register] = result
    return Way(before, loads, waiting.now, nbytes)


# Calls --------------------------------------------------------------------------------------------


def _calls(ptx: ptx_backend.PtxBackend) -> Iterator[None]:
    """Calls of the operators, of heads of 128."""
    for dtype in (BF16, E4M3):
        yield traffic.rope_rotate(ptx, dtype, 8, 128, False, 1) and None
    yield traffic.key_deviation(ptx, BF16, 8, 128, False) and None
    for dtype in (BF16, E4M3):
        yield traffic.diff_encode(ptx, dtype, 8, 128, False) and None
        yield traffic.diff_restore(ptx, dtype, 8, 128, False) and None
    yield _merge_states(ptx, 16)
    _attend(ptx, BF16, (128,))
    yield None
    _attend(ptx, E4M3, (128,))
    yield None
    yield merge_partials(ptx, [16, 16])


def _merge_states(ptx: ptx_backend.PtxBackend, partials: int, rows: int = 2) -> None:
    heads, head_dim = 8, 128
    out = torch.empty(rows, heads, head_dim, dtype=BF16)
    partial = torch.randn(partials, rows, heads, head_dim).to(BF16)
    lse = torch.randn(partials, rows, heads)
    ptx.merge_states_out(partial, lse, None, out, torch.empty(rows, heads))


def merge_partials(ptx: ptx_backend.PtxBackend, counts: Sequence[int]) -> None:
    """A launch of attention without work items, whose rows have so many partials."""
    heads, head_dim, rows = 8, 128, len(counts)
    filled = RoundExtents(rows=rows, partials=sum(counts))
    arrays = {
        "row_partial_indptr": np.cumsum([0, *counts]).astype(np.int32),
        "row_partials": torch.randperm(filled.partials).int().numpy(),
    }
    round = RoundTensors.from_arrays(arrays, filled)
    q = torch.zeros(rows, heads, head_dim, dtype=BF16)
    pool = torch.zeros(1, filled.block_size, 1, head_dim, dtype=BF16)
    tables = torch.zeros(1, head_dim // 2), torch.zeros(1, head_dim // 2)
    workspace = torch.randn(filled.partials * heads * (head_dim + 1))
    ptx.collective_attention_out(
        q, pool, pool, *tables, False, round.buffer, filled.as_list(), 1.0, 0, 0.0, None, 1.0,
        workspace, torch.empty_like(q), torch.empty(rows, heads),
    )  # fmt: skip


def _attend(
    ptx: ptx_backend.PtxBackend, dtype: torch.dtype, masters: tuple[int, ...], heads: int = 4
) -> None:
    """A row of each of 16 agents, which see all rows of all Masters and have none of their own."""
    case = testing.random_round(
        5, agents=16, masters=masters, private_length=0, rows=1, whole_uses=True, masks="none",
        num_kv_heads=1, num_q_heads=heads, head_dim=128, dtype=dtype, query_dtype=BF16,
        work="planned", rows_per_item=16, slack=False,
    )  # fmt: skip
    attend(ptx, replace(case, k_scale=None, v_scale=None))


def attend(ptx: ptx_backend.PtxBackend, case: testing.RandomRound) -> None:
    """Attention of a round."""
    rows, heads, head_dim = case.q.shape
    workspace = torch.empty(case.round.extents.partials * heads * (head_dim + 1))
    ptx.collective_attention_out(
        case.q, case.k_pool[0], case.v_pool[0], case.cos, case.sin, False, case.round.buffer,
        case.extents, case.scale, 0, 0.0, None, 1.0, workspace, torch.empty_like(case.q),
        torch.empty(rows, heads),
    )  # fmt: skip


# Tables -------------------------------------------------------------------------------------------


def way_of(ptx: ptx_backend.PtxBackend, launch: int) -> Way:
    """Of a kernel that the last call launched."""
    assert ptx.launched is not None
    assert ptx._module is not None
    name = ptx.launched.launches[launch].name.decode()
    instructions = ptx._module.instructions(name)
    return way(instructions, ptx.stats[launch].path, floats="merge" in name)


def _launched(ptx: ptx_backend.PtxBackend) -> Iterator[tuple[str, int]]:
    """Names and threads of the kernels that the last call launched."""
    assert ptx.launched is not None
    for launch in ptx.launched.launches[: ptx.launched.num_launches]:
        yield launch.name.decode(), launch.block[0] * launch.block[1] * launch.block[2]


@dataclass(frozen=True)
class Line:
    """Of a kernel: its way, and the KB that blocks of a multiprocessor have under way together."""

    way: Way
    kilobytes: float


def _sass(kernel: str) -> dict[str, str]:
    """The line of tools/sass_table.txt, by column."""
    _, header, *lines = SASS_TABLE.read_text().splitlines()
    columns = header.split()
    rows = (dict(zip(columns, line.split(), strict=True)) for line in lines)
    return next(row for row in rows if row["kernel"] == kernel and row["arch"] == OCCUPANCY_ARCH)


def _line(ptx: ptx_backend.PtxBackend, launch: int) -> tuple[str, Line]:
    """The kernel's name, and its line."""
    name, threads = list(_launched(ptx))[launch]
    name = name.removeprefix(kernel_ptx.PREFIX)
    found = way_of(ptx, launch)
    resident = threads * int(_sass(name)["blocks"])
    return name, Line(found, found.nbytes / max(found.trips, 1) * resident / 1024)


def ways() -> dict[str, Line]:
    """By kernel."""
    ptx = ptx_backend.PtxBackend(race=False, stats=False, follow=0)
    return dict(_line(ptx, i) for _ in _calls(ptx) for i in range(len(ptx.stats)))


def steps() -> dict[str, float]:
    """Instructions by step of attention, and of what merges."""
    ptx = ptx_backend.PtxBackend(race=False, stats=False, follow=0)
    found: dict[str, float] = {}
    for dtype in (BF16, E4M3):
        lengths = []
        for masters in ((128,), (192,), (64, 64)):
            _attend(ptx, dtype, masters)
            [(name, _), *_] = _launched(ptx)
            lengths.append(len(ptx.stats[0].path))
        kernel = name.removeprefix(kernel_ptx.PREFIX)
        for step, more in zip(("tile of 64 keys", "source"), lengths[1:], strict=True):
            found[f"{kernel}: {step}, a thread"] = more - lengths[0]
    for heads, tiles in ((4, "low"), (32, "tall")):
        _attend(ptx, BF16, (128,), heads)
        [(name, _), *_] = _launched(ptx)
        executed = ptx.stats[0].by_class
        kernel = name.removeprefix(kernel_ptx.PREFIX)
        of_mma = 100 * executed["ldmatrix"] / executed["mma"]
        found[f"{kernel}: ldmatrix of 100 mma, {tiles} tiles"] = of_mma
    for merge in (
        lambda partials: _merge_states(ptx, partials, rows=1),
        lambda partials: merge_partials(ptx, [partials]),
    ):
        totals = []
        for partials in (32, 64):
            merge(partials)
            totals.append(ptx.stats[0].warp_instructions)
        [(name, _)] = _launched(ptx)
        kernel = name.removeprefix(kernel_ptx.PREFIX)
        each = (totals[1] - totals[0]) / 32 / 8
        found[f"{kernel}: partial of a row and head, all warps"] = each
    return found


# An H200, and what is assumed of it.
MULTIPROCESSORS = 132
BYTES_PER_US = 4.8e6
SHARED_BYTES_PER_US = 30.9e6
FLOP_PER_US = 989e6
CLOCKS_PER_US = 1830
SCHEDULERS = 4  # of a multiprocessor, an instruction a clock each
LAUNCH = 2.0  # us, of a graph
DEPENDENT_LAUNCH = 1.0  # of one that begins while the one before it ends
MEMORY_TRIP, L2_TRIP = 0.7, 0.3


def expected(ways: dict[str, Line], steps: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Floor and expected time in us, by shape, in bf16.

    Kernels that move rows take a launch, and what is longer: their bytes at the rate of memory, or
    what they read at the rate that the bytes under way allow, with a latency of 700 ns. Decode
    takes a launch, the chain of loads before the first copy, the rotation of the queries by eight
    warps of a multiprocessor, its bytes, and the trips of the merge. Prefill takes the time of the
    tensor cores or of ldmatrix in shared memory, what is longer.
    """
    found = {}
    for shape, launches, moved, read, kernel in (
        ("rope_rotate, 262144 rows of 8x128 to 1", 1, 1073.7, 536.9, "rope_rotate_bf16_half_wide"),
        ("key_deviation, 8 agents, 32768 tokens of 8x128", 1, 604.0, 604.0,
         "key_deviation_bf16_half_wide"),
        ("diff_encode, 10 agents of 4160 rows, 8 layers of 8x128", 2, 1523.1, 1523.1,
         "diff_encode_compare_bf16_half_wide"),
        ("diff_restore, the same", 1, 1523.1, 155.2, "diff_restore_bf16_half_wide"),
    ):  # fmt: skip
        floor = 1e6 * moved / BYTES_PER_US
        rate = MULTIPROCESSORS * 1024 * ways[kernel].kilobytes / MEMORY_TRIP
        found[shape] = floor, launches * LAUNCH + max(floor, 1e6 * read / rate)

    floor = 1e6 * 33.6 / BYTES_PER_US
    attention, merge = "collective_attention_bf16_d128", "collective_attention_merge_bf16"
    rotation = 8 * steps[f"{attention}: source, a thread"] / SCHEDULERS / CLOCKS_PER_US
    waiting = L2_TRIP * (ways[attention].way.loads + ways[merge].way.trips)
    decode = LAUNCH + waiting + rotation + floor + DEPENDENT_LAUNCH
    found["attention, decode: 8x128, G 4, 16 agents, 4096 shared, 256 own"] = floor, decode

    flop = 567.2e9
    # An ldmatrix of four matrices reads 512 bytes, an mma is 4096 FLOP.
    per_flop = 5.12 * steps[f"{attention}: ldmatrix of 100 mma, tall tiles"] / 4096
    prefill = LAUNCH + max(flop / FLOP_PER_US, per_flop * flop / SHARED_BYTES_PER_US)
    found["attention, prefill: 8x128, G 4, 4 agents of 4160 rows"] = flop / FLOP_PER_US, prefill
    return found


def lines() -> list[str]:
    """All tables."""
    of_kernels, of_steps = ways(), steps()
    text = [
        f"{'kernel':48} {'before':>7} {'loads':>7} {'trips':>7} {'bytes':>7} {'KB under way':>13}"
    ]
    for name, line in of_kernels.items():
        of = line.way
        numbers = (of.before, of.loads, of.trips, of.nbytes)
        text.append(f"{name:48}" + "".join(f" {n:7}" for n in numbers) + f" {line.kilobytes:13.1f}")
    text += ["", f"{'step':80} {'instructions':>12}"]
    text += [f"{name:80} {number:12.1f}" for name, number in of_steps.items()]
    text += ["", f"{'shape':64} {'floor us':>9} {'expected us':>12}"]
    for shape, (floor, time) in expected(of_kernels, of_steps).items():
        text.append(f"{shape:64} {floor:9.1f} {time:12.1f}")
    return text


def write(found: Sequence[str], nvcc_version: str) -> None:
    """Writes the table anew."""
    TABLE.write_text("\n".join([f"nvcc {nvcc_version}", *found]) + "\n")


if __name__ == "__main__":
    print(*lines(), sep="\n")
