"""PTX text -> kernels that can be launched."""

import copy
import math
import struct
import time

import numpy as np

from .chunk import Chunk
from .codegen import compile_kernel, with_instructions
from .dtypes import i64, u8
from .errors import PtxError, RaceError, UnsupportedError
from .flatten import flatten, with_text
from .lexer import parse_literal, split_initialiser
from .parse import ParsedModule
from .program import TYPE_BYTES, Float, Instruction
from .races import MAX_RACES
from .scheduler import Scheduler
from .stats import Stats
from .storage import Arena

MAX_STATIC_SHARED = 48 * 1024


class Module:
    """A PTX module with its variables and the arrays given to its kernels."""

    def __init__(self, text: str):
        self.text = text
        self._parsed = ParsedModule(text)
        self._arena = Arena()
        self._symbols: dict[str, np.ndarray] = {}
        self._compiled = {}
        self._allocate_variables()
        for variable in self._parsed.variables.values():
            if variable.init and variable.name in self._symbols:
                self._initialise(variable)

    # ---- variables and arrays ----
    def symbol(self, name: str) -> np.ndarray:
        """Writable bytes (u8 array) of a `__device__` or `__constant__` variable."""
        return self._symbols[name]

    def ptr(self, array: np.ndarray) -> int:
        """Device address of a C-contiguous array, for pointers inside by-value structs.

        The array is registered, and kept alive, until `reset`.
        """
        return self._arena.address(array)

    def reset(self) -> None:
        """Forget all arrays; their device addresses are invalid from now on."""
        self._arena.reset()

    def _allocate_variables(self):
        for variable in self._parsed.variables.values():
            declared_only = variable.extern and variable.size == 0
            in_global = variable.space in ("global", "const")
            if in_global and variable.address is None and not declared_only:
                raw = np.zeros(max(variable.size, 1), u8)
                name = f"{variable.space} variable {variable.name}"
                buffer = self._arena.add(raw, name, variable.space == "global")
                variable.address = buffer.base
                self._symbols[variable.name] = raw[: variable.size]

    def _initialise(self, variable):
        size, raw = variable.element_bytes, self._symbols[variable.name]
        elements = [text for text in split_initialiser(variable.init) if text]
        for i, text in enumerate(elements):
            bits = self._initial_bits(text, variable) & ((1 << 8 * size) - 1)
            raw[i * size : (i + 1) * size] = np.frombuffer(bits.to_bytes(size, "little"), u8)

    def _initial_bits(self, text, variable):
        literal = parse_literal(text)
        if isinstance(literal, Float):
            if literal.type == "f64" and variable.element_bytes == 4:
                [value] = struct.unpack("<d", struct.pack("<Q", literal.bits))
                return struct.unpack("<I", struct.pack("<f", value))[0]
            return literal.bits
        if literal is not None:
            return literal.value
        name = text[len("generic(") : -1] if text.startswith("generic(") else text
        name, _, offset = name.partition("+")
        target = self._parsed.variables.get(name.strip())
        if target is None or target.address is None:
            raise UnsupportedError(f"initialiser {text} of {variable.name}")
        return target.address + int(offset or 0)

    # ---- kernels ----
    def kernels(self) -> list[str]:
        """Mangled names of the kernels."""
        return [name for name, function in self._parsed.functions.items() if function.entry]

    def find(self, name: str) -> str:
        """The one kernel whose mangled name is or contains `name`."""
        names = self.kernels()
        if name in names:
            return name
        matches = [candidate for candidate in names if name in candidate]
        if len(matches) != 1:
            problem = f"ambiguous: {matches}" if matches else f"not found in {names}"
            raise PtxError(f"kernel {name!r}: {problem}")
        return matches[0]

    def instructions(self, name: str) -> list[Instruction]:
        """What a kernel consists of, with what it calls; `Stats.executed` refers to `position`."""
        return self.compiled(self.find(name)).instructions

    def compiled(self, name: str):
        """The compiled kernel of a mangled name; `source` is the generated Python."""
        if name not in self._compiled:
            kernel = flatten(self._parsed, name)
            self._allocate_variables()  # a function's static variables are found only now
            kernel.param_buffer = np.zeros(max(kernel.param_bytes, 16) + 16, u8)
            buffer = self._arena.add(kernel.param_buffer, f"parameters of {name}", False)
            kernel.param_base = buffer.base
            self._compiled[name] = compile_kernel(kernel)
        return self._compiled[name]

    def with_statement(self, name: str, line: int, old: str, new: str) -> "Module":
        """This module with another statement in one of its kernels, "" for none.

        It stands on `line` of the PTX, and names what the old one does. Everything else is shared,
        arrays and variables too, so that only the code around the statement is compiled.
        """
        name = self.find(name)
        code = self.compiled(name)
        found = [
            each
            for each in code.instructions
            if each.line == line and each.text == old and each.function == name
        ]
        if not found or any(each.opcode == found[0].opcode for each in found[1:]):
            raise PtxError(f"{name}: not one {old!r} on PTX line {line}")
        changed = with_text(self._parsed, found, new)
        module = copy.copy(self)
        module._compiled = {**self._compiled, name: with_instructions(code, changed)}
        return module

    def _pack(self, kernel, args):
        """Arguments -> bytes of the parameter buffer."""
        if len(args) != len(kernel.params):
            wanted = [(p.name, p.type, p.size) for p in kernel.params]
            raise PtxError(
                f"{kernel.name}: {len(args)} arguments given, kernel has {len(wanted)}: {wanted}"
            )
        packed = np.zeros(kernel.param_bytes + 16, u8)
        for parameter, argument in zip(kernel.params, args, strict=True):
            raw = self._pack_one(kernel, parameter, argument)
            if len(raw) != parameter.size:
                raise PtxError(
                    f"{kernel.name}: parameter {parameter.name} has {parameter.size} bytes,"
                    f" {len(raw)} given"
                )
            start = parameter.address
            packed[start : start + parameter.size] = np.frombuffer(raw, u8)
        return packed

    def _pack_one(self, kernel, parameter, argument):
        size, ptx_type = parameter.size, parameter.type
        title = f"{kernel.name}: parameter {parameter.name}"
        if isinstance(argument, np.void) or (
            isinstance(argument, np.ndarray) and not argument.ndim
        ):
            return argument.tobytes()
        if isinstance(argument, bytes | bytearray | memoryview):
            return bytes(argument)
        if argument is None:
            return bytes(size)
        if isinstance(argument, np.ndarray):
            if size != 8:
                raise PtxError(f"{title}: array passed for {size} bytes")
            return struct.pack("<Q", self.ptr(argument))
        if size != TYPE_BYTES[ptx_type]:
            raise PtxError(f"{title} is a {size}-byte struct; pass bytes")
        is_float = isinstance(argument, float | np.floating)
        if ptx_type in ("f32", "f64") or (is_float and ptx_type in ("b32", "b64")):
            return struct.pack("<f" if size == 4 else "<d", float(argument))
        if is_float:
            raise PtxError(f"{title}: float passed for an integer (.{ptx_type})")
        return (int(argument) & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def launch(
        self,
        name: str,
        grid,
        block,
        args=(),
        shared_bytes: int = 0,
        race: bool | str = False,
        stats: bool = True,
        max_lanes: int = 8192,
        max_steps: int = 20_000_000,
        smem_limit: int = 227 * 1024,
        last_block_first: bool = False,
        follow: int | None = None,
    ) -> Stats:
        """Run a kernel to its end.

        `grid` and `block` are ints or tuples of up to three. Arguments: a C-contiguous numpy array
        is a pointer (written in place); an int or float is packed as the declared PTX type; bytes
        or a 0-d numpy value is a by-value struct; None is zero. `shared_bytes` is dynamic shared
        memory; with the static part it must not exceed `smem_limit` bytes.

        `race`: True raises RaceError on races of warps in shared memory, "report" lists them in
        the result, "warp" also looks at lanes of one warp that no `__syncwarp` orders. `stats`
        False leaves traffic uncounted, which is faster. `max_lanes` threads run together (whole
        blocks, at least one). `max_steps` blocks of code are executed before the kernel is taken
        to loop for ever. Blocks run in ascending order, `last_block_first` in descending order:
        results that differ depend on an order that a GPU does not promise. `follow` is the number
        of a thread of block 0, whose way through the kernel becomes `Stats.path`.

        Raises PtxError, with kernel, PTX line, instruction, thread and address, for accesses out
        of bounds or misaligned, deadlocks, divergent barriers and traps, and UnsupportedError for
        instructions that are not known.
        """
        name = self.find(name)
        code = self.compiled(name)
        kernel = code.kernel
        grid, block = _extents(grid), _extents(block)
        shared = kernel.shared_static
        if shared_bytes:
            shared = kernel.shared_dynamic_offset + shared_bytes
        _check_launch(kernel, grid, block, shared, smem_limit)
        params = self._pack(kernel, args)
        kernel.param_buffer[: params.size] = params
        result = Stats()
        warps = np.zeros(len(code.blocks), i64)
        threads = np.zeros(len(code.blocks), i64)
        together = max(1, max_lanes // math.prod(block))
        blocks = range(math.prod(grid))[:: -1 if last_block_first else 1]
        started = time.perf_counter()
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), together):
                here = blocks[first : first + together]
                chunk = Chunk(self._arena, code, grid, block, here, params, shared, result)
                chunk.count_traffic = stats
                if race:
                    chunk.watch_races(lanes=race == "warp")
                scheduler = Scheduler(chunk, max_steps)
                if follow is not None and 0 in here:
                    scheduler.followed = here.index(0) * math.prod(block) + follow
                scheduler.run()
                for index in scheduler.path:
                    result.path += [each.position for each in code.blocks[index].instructions]
                warps += scheduler.warp_executions
                threads += scheduler.thread_executions
                result.steps = max(result.steps, scheduler.steps)
                if race:
                    _describe_races(chunk, result)
        result.seconds = time.perf_counter() - started
        _count_instructions(code, warps, threads, result)
        if result.races and race != "report":
            raise RaceError(f"{name}: shared-memory race(s):\n" + "\n".join(result.races))
        return result


def _extents(value):
    values = (value,) if np.isscalar(value) else tuple(value)
    return tuple(int(extent) for extent in (*values, 1, 1)[:3])


def _check_launch(kernel, grid, block, shared, smem_limit):
    name, size = kernel.name, math.prod(block)
    if not 1 <= size <= 1024 or min(grid) < 1:
        raise PtxError(f"{name}: invalid launch configuration grid {grid} block {block}")
    maximum = kernel.directives.get("maxntid")
    if maximum and size > math.prod(maximum):
        raise PtxError(f"{name}: block of {size} threads exceeds .maxntid {maximum}")
    required = kernel.directives.get("reqntid")
    if required and _extents(required) != block:
        raise PtxError(f"{name}: block {block} differs from .reqntid {required}")
    if kernel.shared_static > MAX_STATIC_SHARED:
        raise PtxError(f"{name}: {kernel.shared_static} bytes of static shared memory")
    if shared > smem_limit:
        raise PtxError(f"{name}: {shared} bytes of shared memory exceed {smem_limit}")


def _count_instructions(code, warps, threads, stats):
    for block, warp_count, thread_count in zip(code.blocks, warps, threads, strict=True):
        if warp_count:
            stats.warp_instructions += int(warp_count) * len(block.instructions)
            stats.thread_instructions += int(thread_count) * len(block.instructions)
            stats.executed.update(each.position for each in block.instructions)
            for kind, count in block.classes.items():
                stats.by_class[kind] = stats.by_class.get(kind, 0) + count * int(warp_count)


def _describe_races(chunk, stats):
    for race in chunk.race.found.values():
        if len(stats.races) == MAX_RACES:
            return
        here = chunk.code.instructions[race.position]
        there = chunk.code.instructions[race.other_position]
        stats.races.append(
            f'{race.kind} by warp {race.warp} at PTX line {here.line} "{here.text}" conflicts with'
            f" {race.other_kind} by warp {race.other_warp} at line {there.line}"
            f' "{there.text}"; block {chunk.blocks[race.block]}, shared byte {race.byte}'
            f" ({race.byte_count} bytes in that step)"
        )
