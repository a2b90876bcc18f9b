"""What parsing produces: variables, operands, instructions, functions and kernels."""

from dataclasses import dataclass, field
from typing import Any

TYPE_BYTES = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "e4m3": 1,
    "e5m2": 1,
    "pred": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "e4m3x2": 2,
    "e5m2x2": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}


@dataclass(slots=True, eq=False)
class Register:
    """A virtual register; `index` numbers the kernel's registers."""

    index: int
    name: str
    type: str


@dataclass(slots=True, eq=False)
class Variable:
    """A variable of a module, a function or a parameter list.

    `address` is set when storage is given: for `global` and `const` the device address, for
    `shared` and `local` the offset in the block's or the thread's storage, for `kernel_param` the
    offset in the parameter buffer.
    """

    name: str
    space: str
    type: str
    element_bytes: int
    align: int
    size: int
    init: str | None = None
    extern: bool = False
    address: int | None = None


@dataclass(frozen=True, slots=True)
class Integer:
    """Integer literal."""

    value: int


@dataclass(frozen=True, slots=True)
class Float:
    """Floating-point literal as the bits of an `f32` or `f64`."""

    type: str
    bits: int


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`"""

    items: list["Operand"]


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`"""

    base: "Operand"
    offset: int


@dataclass(frozen=True, slots=True)
class SymbolOffset:
    """`variable + offset` as a value."""

    variable: Variable
    offset: int


@dataclass(frozen=True, slots=True)
class Not:
    """`!predicate`"""

    predicate: "Operand"


@dataclass(frozen=True, slots=True)
class Pair:
    """`first|second`, two destinations."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True, slots=True)
class Special:
    """A special register, without its `%`."""

    name: str


@dataclass(frozen=True, slots=True)
class Sink:
    """`_`, a result nobody wants."""


Operand = (
    Register
    | Variable
    | Integer
    | Float
    | Vector
    | Address
    | SymbolOffset
    | Not
    | Pair
    | Special
    | Sink
)


DROPPED = "nothing"  # opcode of what stands where a mutant has dropped an instruction


@dataclass(slots=True, eq=False)
class Instruction:
    """One instruction of a flattened kernel.

    `predicate` is (register, whether it is negated), `target` the label or branch table that it
    jumps to, `position` its index in the kernel.
    """

    opcode: str
    modifiers: list[str]
    operands: list[Operand]
    line: int
    text: str
    function: str
    predicate: tuple[Register, bool] | None = None
    target: str | None = None
    position: int = -1

    def __str__(self) -> str:
        return f"{self.text} (PTX line {self.line}, {self.function})"


@dataclass(slots=True, eq=False)
class Function:
    """An `.entry` or `.func` as written; `body` is a list of raw items, None when only declared."""

    name: str
    entry: bool
    params: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    directives: dict[str, list[int]] = field(default_factory=dict)
    body: list[tuple[Any, ...]] | None = None


@dataclass(slots=True, eq=False)
class Kernel:
    """An entry with its calls inlined: registers are numbered and labels are positions.

    `shared_static` bytes of shared memory are laid out first; every extern array starts at
    `shared_dynamic_offset`.
    """

    name: str
    directives: dict[str, list[int]]
    params: list[Variable] = field(default_factory=list)
    param_bytes: int = 0
    registers: list[Register] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    shared_variables: dict[str, Variable] = field(default_factory=dict)
    shared_static: int = 0
    shared_dynamic_offset: int = 0
    local_bytes: int = 0
    param_base: int = 0
    param_buffer: Any = None
    carry: Register | None = None

    def carry_register(self) -> Register:
        """The register that stands for the condition code of `add.cc` and its kin."""
        if self.carry is None:
            self.carry = Register(len(self.registers), "%CC", "pred")
            self.registers.append(self.carry)
        return self.carry
