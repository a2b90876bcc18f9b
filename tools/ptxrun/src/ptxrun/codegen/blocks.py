"""Basic blocks of a kernel, which registers live between them, and their compiled functions."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
    instruction when it needs other lanes of the warp. `run(lanes, registers)` executes the block,
    `source` is its text; it reads the registers numbered in `reads`, sets those in `defs` and
    writes back those in `writes`, which live on.
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
    defs: set[int] = field(default_factory=set)
    writes: list[int] = field(default_factory=list)
    source: str = ""
    run: Callable[..., Any] | None = None

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]


@dataclass(slots=True, eq=False)
class CompiledKernel:
    """Executable blocks of a kernel; `live_in[b]` are the registers that block b and what follows
    it may read before writing them, `environment` the names that generated code uses."""

    kernel: Kernel
    blocks: list[Block]
    instructions: list[Instruction]
    register_dtypes: list[str]
    live_in: list[set[int]]
    environment: dict[str, Any]

    @property
    def source(self) -> str:
        return "\n".join(block.source for block in self.blocks)


def compile_kernel(kernel: Kernel) -> CompiledKernel:
    """Generate and compile the functions of a kernel's blocks."""
    instructions, labels = _branch_around_guarded(kernel)
    blocks = _split(kernel, instructions, labels)
    environment = _environment()
    emitters = [_emit(kernel, environment, block) for block in blocks]
    live_in = _liveness(blocks)
    for block, emitter in zip(blocks, emitters, strict=True):
        _finish(block, emitter, live_in)
    dtypes = [register_dtype(register) for register in kernel.registers]
    return CompiledKernel(kernel, blocks, instructions, dtypes, live_in, environment)


def with_instructions(code: CompiledKernel, changed: Sequence[Instruction]) -> CompiledKernel:
    """The kernel with these instructions at their positions; all other blocks are shared.

    They jump where those that stood there did, begin and end blocks where those did, or are
    `DROPPED`, and read and write the same registers; PtxError is raised when they do not.
    """
    instructions, blocks = list(code.instructions), list(code.blocks)
    for instruction in changed:
        instructions[instruction.position] = instruction
    for index, block in enumerate(blocks):
        first, last = block.instructions[0].position, block.last.position
        if not any(first <= instruction.position <= last for instruction in changed):
            continue
        new = replace(block, instructions=instructions[first : last + 1], barrier_result=None)
        _describe(new)
        if is_control(block.last) and not is_control(new.last):
            new.ending = "fall"
        emitter = _emit(code.kernel, code.environment, new)
        if new.defs != block.defs or not set(new.reads) <= set(block.reads):
            raise PtxError(f"{code.kernel.name}: other registers in {changed[0]}")
        _finish(new, emitter, code.live_in)
        blocks[index] = new
    return replace(code, instructions=instructions, blocks=blocks)


def _emit(kernel: Kernel, environment: dict[str, Any], block: Block) -> BlockEmitter:
    """Write a block's code, and note which registers it reads and sets."""
    emitter = BlockEmitter(kernel, environment, block)
    for instruction in block.instructions:
        emitter.emit(instruction)
    block.reads, block.defs = sorted(emitter.uses), emitter.defs
    return emitter


def _finish(block: Block, emitter: BlockEmitter, live_in: list[set[int]]) -> None:
    """Compile a block's function."""
    live_out = set().union(*(live_in[successor] for successor in block.successors))
    emitter.write_back(live_out)
    block.writes = sorted(emitter.defs & live_out)
    name = f"block{block.index}"
    body = "".join(f" {line}\n" for line in emitter.lines)
    block.source = f"def {name}(lanes,R):\n{body} return {emitter.returned}\n"
    functions: dict[str, Callable[..., Any]] = {}
    code = compile(block.source, f"<ptx {emitter.kernel.name}>", "exec")
    exec(code, emitter.environment, functions)
    block.run = functions[name]


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
        _describe(block)
        last = block.last
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


def _describe(block: Block) -> None:
    """Note what kinds of instructions a block consists of."""
    first = block.instructions[0]
    block.collective = first if is_collective(first) else None
    block.spins = any(map(spins, block.instructions))
    block.classes = Counter(map(instruction_class, block.instructions))


def _liveness(blocks: list[Block]) -> list[set[int]]:
    live_in: list[set[int]] = [set() for _ in range(len(blocks) + 1)]
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            live_out = set().union(*(live_in[successor] for successor in block.successors))
            live = live_out - block.defs | set(block.reads)
            if live != live_in[block.index]:
                live_in[block.index] = live
                changed = True
    return live_in
