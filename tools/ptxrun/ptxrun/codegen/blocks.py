"""Basic blocks of a kernel, which registers live between them, and their compiled functions."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import numpy as np

from .. import integers, matrix, rounding, small_floats
from ..dtypes import BY_NAME
from ..errors import PtxError
from ..program import Instruction, Kernel, Register
from .arithmetic import ArithmeticEmitter
from .bits import BitEmitter
from .classes import instruction_class, is_collective, is_control, spins
from .control import ControlEmitter
from .conversion import ConversionEmitter
from .emitter import register_dtype
from .memory import MemoryEmitter
from .warp import WarpEmitter


class BlockEmitter(
    ControlEmitter,
    ArithmeticEmitter,
    BitEmitter,
    ConversionEmitter,
    MemoryEmitter,
    WarpEmitter,
):
    """Writes the function of one block, instruction by instruction."""


@dataclass(slots=True, eq=False)
class Block:
    """Instructions that run one after another.

    `ending` says what comes then: `fall` (the next block), `branch` (`target`), `conditional`
    (`target` where `run` returns True, else the next), `table` (`table[what run returns]`),
    `barrier` (the next, once all are there), `exit` or `trap`. `collective` is the first
    instruction when it needs other lanes of the warp. `run(lanes, registers)` executes the block;
    it reads the registers numbered in `reads` and writes those in `writes` that live on.
    """

    index: int
    instructions: list[Instruction]
    ending: str = "fall"
    target: int | None = None
    table: Any = None
    collective: Instruction | None = None
    barrier_result: tuple[str, Register] | None = None
    spins: bool = False
    classes: Counter[str] = field(default_factory=Counter)
    successors: list[int] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    run: Callable[..., Any] | None = None

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]


@dataclass(slots=True, eq=False)
class CompiledKernel:
    """Executable blocks of a kernel; `live_in[b]` are the registers that block b and what follows
    it may read before writing them."""

    kernel: Kernel
    blocks: list[Block]
    instructions: list[Instruction]
    register_dtypes: list[str]
    live_in: list[set[int]]
    source: str


def compile_kernel(kernel: Kernel) -> CompiledKernel:
    """Generate and compile the functions of a kernel's blocks."""
    instructions, labels = _branch_around_guarded(kernel)
    blocks = _split(kernel, instructions, labels)
    environment = _environment()
    constants: dict[tuple[str, bytes], str] = {}
    emitters = []
    for block in blocks:
        emitter = BlockEmitter(kernel, environment, constants, block)
        for instruction in block.instructions:
            emitter.emit(instruction)
        emitters.append(emitter)
    live_in = _liveness(blocks, emitters)
    functions: list[str] = []
    for block, emitter in zip(blocks, emitters, strict=True):
        live_out = set().union(*(live_in[successor] for successor in block.successors))
        emitter.write_back(live_out)
        block.reads = sorted(emitter.uses)
        block.writes = sorted(emitter.defs & live_out)
        body = "".join(f" {line}\n" for line in emitter.lines)
        functions.append(f"def block{block.index}(lanes,R):\n{body} return {emitter.returned}\n")
        exec(_code(functions[-1], kernel.name), environment)
        block.run = environment[f"block{block.index}"]
    source = "\n".join(functions)
    dtypes = [register_dtype(register) for register in kernel.registers]
    return CompiledKernel(kernel, blocks, instructions, dtypes, live_in, source)


@functools.lru_cache(maxsize=1 << 14)
def _code(function: str, kernel: str) -> CodeType:
    """Compiled source of a block's function: a kernel and its mutants have most of them alike."""
    return compile(function, f"<ptx {kernel}>", "exec")


def _environment() -> dict[str, Any]:
    """Names that generated code uses."""
    environment = {"np": np, "where": np.where, "full": np.full}
    for module in (rounding, small_floats, integers, matrix):
        environment |= {name: value for name, value in vars(module).items() if name[0] != "_"}
    return environment | BY_NAME


def _branch_around_guarded(kernel: Kernel) -> tuple[list[Instruction], dict[str, int]]:
    """Guarded control and collective instructions become plain ones behind a branch."""
    instructions: list[Instruction] = []
    moved, after = {}, {}
    for position, instruction in enumerate(kernel.instructions):
        moved[position] = len(instructions)
        special = is_collective(instruction) or is_control(instruction)
        if instruction.predicate is None or not special or instruction.opcode == "bra":
            instructions.append(instruction)
            continue
        register, negated = instruction.predicate
        label = f"after.{position}"
        guard = replace(instruction, opcode="bra", modifiers=[], operands=[], target=label)
        guard.predicate = (register, not negated)
        instructions += [guard, replace(instruction, predicate=None)]
        after[label] = len(instructions)
    moved[len(kernel.instructions)] = len(instructions)
    for position, instruction in enumerate(instructions):
        instruction.position = position
    labels = {name: moved[position] for name, position in kernel.labels.items()}
    return instructions, labels | after


def _split(kernel: Kernel, instructions: list[Instruction], labels: dict[str, int]) -> list[Block]:
    if not instructions:
        raise PtxError(f"kernel {kernel.name} is empty")
    starts = {0, *labels.values()}
    for position, instruction in enumerate(instructions):
        collective = is_collective(instruction)
        if collective:
            starts.add(position)
        if is_control(instruction) or (collective and instruction.opcode in ("bar", "barrier")):
            starts.add(position + 1)
    bounds = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    # A label behind the last instruction stands for the end of the kernel.
    block_at = {start: index for index, start in enumerate(bounds)}
    blocks = []
    for index, start in enumerate(bounds[:-1]):
        block = Block(index, instructions[start : bounds[index + 1]])
        first, last = block.instructions[0], block.last
        block.collective = first if is_collective(first) else None
        block.spins = any(map(spins, block.instructions))
        block.classes = Counter(map(instruction_class, block.instructions))
        block.successors = [index + 1]
        if is_control(last):
            if last.opcode == "bra":
                block.ending = "branch" if last.predicate is None else "conditional"
                block.target = block_at[labels[last.target]]
                block.successors = [block.target]
                if block.ending == "conditional":
                    block.successors.append(index + 1)
            elif last.opcode == "brx":
                block.ending = "table"
                targets = [block_at[labels[name]] for name in kernel.tables[last.target]]
                block.table, block.successors = np.array(targets), targets
            elif last.opcode in ("bar", "barrier"):
                block.ending = "barrier"
            else:
                block.ending = "trap" if last.opcode == "trap" else "exit"
                block.successors = []
        blocks.append(block)
    return blocks


def _liveness(blocks: list[Block], emitters: list[BlockEmitter]) -> list[set[int]]:
    live_in: list[set[int]] = [set() for _ in range(len(blocks) + 1)]
    changed = True
    while changed:
        changed = False
        for block, emitter in zip(reversed(blocks), reversed(emitters), strict=True):
            live_out = set().union(*(live_in[successor] for successor in block.successors))
            live = emitter.uses | (live_out - emitter.defs)
            if live != live_in[block.index]:
                live_in[block.index] = live
                changed = True
    return live_in
