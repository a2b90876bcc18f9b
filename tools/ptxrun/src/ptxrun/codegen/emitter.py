"""What every instruction's code is built of: temporaries, constants, operands and results.

Generated functions are `blockN(lanes, R)`: `lanes` is the set of threads that execute the block
(threads.Lanes) and `R` maps register numbers to arrays, one element a lane. Within a block a
register's value is a local variable, together with its views as other types.
"""

from typing import Any

import numpy as np

from ..dtypes import (
    BY_NAME,
    OF_PTX_TYPE,
    SIZE,
    UNSIGNED_DTYPE,
    UNSIGNED_OF_SIZE,
    unsigned,
)
from ..errors import PtxError, UnsupportedError
from ..program import (
    TYPE_BYTES,
    Address,
    Float,
    Instruction,
    Integer,
    Kernel,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    SymbolOffset,
    Variable,
    Vector,
)
from .classes import IGNORED

_AXES = ("x", "y", "z")
_SPECIAL_DTYPES = {
    **{
        f"{name}.{axis}": "u32"
        for name in (
            "tid",
            "ntid",
            "ctaid",
            "nctaid",
            "clusterid",
            "nclusterid",
            "cluster_ctaid",
            "cluster_nctaid",
        )
        for axis in _AXES
    },
    **{f"lanemask_{relation}": "u32" for relation in ("eq", "lt", "le", "gt", "ge")},
    **dict.fromkeys(
        (
            "laneid",
            "warpid",
            "nwarpid",
            "smid",
            "nsmid",
            "gridid",
            "clock",
            "clock_hi",
            "dynamic_smem_size",
            "total_smem_size",
            "cluster_ctarank",
            "cluster_nctarank",
            "is_explicit_cluster",
        ),
        "u32",
    ),
    **dict.fromkeys(("clock64", "globaltimer", "globaltimer_lo"), "u64"),
}


def register_dtype(register: Register) -> str:
    """Type under which a register is kept between blocks."""
    if register.type in ("pred", "f32", "f64"):
        return register.type
    return UNSIGNED_OF_SIZE[TYPE_BYTES[register.type]]


def vector_items(operand: Operand) -> list[Operand]:
    """Elements of `{a, b}`, or the one operand that is not in braces."""
    return operand.items if isinstance(operand, Vector) else [operand]


def destination_pair(operand: Operand) -> tuple[Operand, Operand]:
    """Both destinations of `a|b`; without a second one, results for it are dropped."""
    if isinstance(operand, Pair):
        return operand.first, operand.second
    return operand, Sink()


class Emitter:
    """State of one block's code.

    `uses` are registers read before the block writes them, `defs` those it writes. `guard` is the
    expression of the current instruction's predicate, None when it has none. `per_lane` tells
    whether the current result depends on an array; a constant one is broadcast to all lanes.
    """

    def __init__(
        self,
        kernel: Kernel,
        environment: dict[str, Any],
        block: Any,
    ):
        self.kernel, self.block, self.environment = kernel, block, environment
        self.lines: list[str] = []
        self.returned = "None"
        self.uses: set[int] = set()
        self.defs: set[int] = set()
        self.guard: str | None = None
        self.per_lane = False
        self.current: Instruction | None = None
        self._values: dict[int, dict[str, str]] = {}  # register -> type -> local variable
        self._unsaved: set[int] = set()
        self._temporaries = 0

    def emit(self, instruction: Instruction) -> None:
        """Append the code of one instruction."""
        self.current, self.guard = instruction, None
        if instruction.predicate is not None and instruction.opcode != "bra":
            register, negated = instruction.predicate
            predicate = self.use(register, "pred")
            self.guard = self.temporary(f"~{predicate}") if negated else predicate
        self.per_lane = False
        method = getattr(self, f"emit_{instruction.opcode}", None)
        if method is None:
            if instruction.opcode in IGNORED:
                return
            raise UnsupportedError(f"unsupported instruction: {instruction}")
        try:
            method(instruction.modifiers, instruction.operands)
        except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise UnsupportedError(f"unsupported form: {instruction} [{reason}]") from e

    def unsupported(self) -> None:
        """Refuse the current instruction's form."""
        raise UnsupportedError(f"unsupported form: {self.current}")

    def allow(self, modifiers: list[str], allowed: set[str]) -> None:
        """Refuse modifiers that are not allowed."""
        for modifier in modifiers:
            if modifier not in allowed:
                raise UnsupportedError(f"unsupported modifier .{modifier}: {self.current}")

    # ---- expressions ----
    def temporary(self, expression: str) -> str:
        """Local variable that holds an expression."""
        self._temporaries += 1
        name = f"v{self._temporaries}"
        self.lines.append(f"{name}={expression}")
        return name

    def constant(self, value: Any, dtype: str) -> str:
        """Name of a numpy scalar of the given value."""
        return self._constant(BY_NAME[dtype](value), dtype)

    def constant_bits(self, bits: int, dtype: str) -> str:
        """Name of a numpy scalar of the given bits."""
        carrier = UNSIGNED_DTYPE[SIZE[dtype]]
        return self._constant(np.array([bits], carrier).view(BY_NAME[dtype])[0], dtype)

    def _constant(self, scalar: Any, dtype: str) -> str:
        name = f"K_{dtype}_{scalar.tobytes().hex()}"
        self.environment[name] = scalar
        return name

    def immediate(self, operand: Integer | Float, dtype: str) -> str:
        """A literal as `dtype`; an integer for a float type gives its bits, and so the reverse."""
        if isinstance(operand, Float):
            if dtype in ("f16", "f32", "f64"):
                carrier = UNSIGNED_DTYPE[SIZE[operand.type]]
                value = np.array([operand.bits], carrier).view(BY_NAME[operand.type])[0]
                return self.constant(value, dtype)
            if SIZE[dtype] not in (4, 8):
                raise UnsupportedError(f"float immediate as {dtype}: {self.current}")
            return self.constant_bits(operand.bits, dtype)
        if dtype == "pred":
            return self.constant(operand.value != 0, "pred")
        return self.constant_bits(operand.value & ((1 << 8 * SIZE[dtype]) - 1), dtype)

    def use(self, operand: Operand, dtype: str) -> str:
        """An operand as an expression of type `dtype`."""
        if isinstance(operand, Integer | Float):
            return self.immediate(operand, dtype)
        if isinstance(operand, Variable | SymbolOffset):
            return self.constant(self.symbol_address(operand), dtype)
        self.per_lane = True
        if isinstance(operand, Not):
            return f"(~{self.use(operand.predicate, 'pred')})"
        if isinstance(operand, Special):
            return self._use_special(operand.name, dtype)
        if not isinstance(operand, Register):
            raise UnsupportedError(f"operand {operand} in {self.current}")
        return self._use_register(operand, dtype)

    def _use_special(self, name: str, dtype: str) -> str:
        own = _SPECIAL_DTYPES.get(name)
        if own is None:
            raise UnsupportedError(f"special register %{name}: {self.current}")
        value = self.temporary(f"lanes.special({name.removesuffix('_lo')!r})")
        return value if dtype == own else self.temporary(f"{value}.astype({dtype})")

    def _use_register(self, register: Register, dtype: str) -> str:
        own = register_dtype(register)
        if register.index not in self._values:
            self.uses.add(register.index)
            self._values[register.index] = {own: self.temporary(f"R[{register.index}]")}
        values = self._values[register.index]
        if dtype in values:
            return values[dtype]
        if "pred" in (dtype, own):
            raise PtxError(f"predicate/value mix in {self.current}")
        if SIZE[dtype] > SIZE[own]:
            raise UnsupportedError(
                f"operand {register.name} (.{register.type}) is narrower than {dtype}:"
                f" {self.current}"
            )
        if SIZE[dtype] == SIZE[own]:
            values[dtype] = self.temporary(f"{self._full_width(register)}.view({dtype})")
        else:
            if dtype[0] == "f":
                raise UnsupportedError(f"register width mismatch: {self.current}")
            low = unsigned(dtype)
            if low not in values:
                whole = self._use_register(register, UNSIGNED_OF_SIZE[SIZE[own]])
                values[low] = self.temporary(f"{whole}.astype({low})")
            if low != dtype:
                values[dtype] = self.temporary(f"{values[low]}.view({dtype})")
        return values[dtype]

    def _full_width(self, register: Register) -> str:
        size = SIZE[register_dtype(register)]
        values = self._values[register.index]
        return next(value for name, value in values.items() if SIZE.get(name) == size)

    def use_array(self, operand: Operand, dtype: str) -> str:
        """An operand as an array, also when it is a constant."""
        value = self.use(operand, dtype)
        if isinstance(operand, Register | Special):
            return value
        return self.temporary(f"full(lanes.count,{value})")

    def use_float(self, operand: Operand, ptx_type: str) -> str:
        """A scalar float operand to compare or compute with; bf16 becomes f32."""
        if ptx_type == "bf16":
            return self.temporary(f"bf16_to_f32({self.use(operand, 'u16')})")
        return self.use(operand, OF_PTX_TYPE[ptx_type])

    # ---- results ----
    def define(self, operand: Operand, expression: str, dtype: str) -> None:
        """Set a destination to an expression of type `dtype`, where the guard holds."""
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise UnsupportedError(f"destination {operand} in {self.current}")
        own = register_dtype(operand)
        if not self.per_lane:
            expression = f"full(lanes.count,{expression})"
        if own == "pred" and dtype != "pred":
            raise PtxError(f"predicate destination mismatch: {self.current}")
        if dtype != "pred" and SIZE[dtype] < SIZE[own]:
            wide = ("i" if dtype[0] == "i" else "u") + str(8 * SIZE[own])
            if dtype[0] == "f":
                expression = f"({expression}).view({UNSIGNED_OF_SIZE[SIZE[dtype]]})"
            expression, dtype = f"({expression}).astype({wide})", wide
        elif dtype != "pred" and SIZE[dtype] > SIZE[own]:
            raise UnsupportedError(f"result wider than destination: {self.current}")
        if self.guard is not None:
            expression = f"where({self.guard},{expression},{self.use(operand, dtype)})"
        self._values[operand.index] = {dtype: self.temporary(expression)}
        self.defs.add(operand.index)
        self._unsaved.add(operand.index)

    def define_at_barrier(self, operand: Register) -> None:
        """A destination that the scheduler sets when the block's barrier is complete."""
        self.defs.add(operand.index)
        self._unsaved.discard(operand.index)
        self._values.pop(operand.index, None)

    def write_back(self, live_out: set[int]) -> None:
        """Append the stores of results that later blocks may read."""
        stores = []
        for index in sorted(self._unsaved & live_out):
            register = self.kernel.registers[index]
            own, values = register_dtype(register), self._values[index]
            value = values[own] if own in values else f"{self._full_width(register)}.view({own})"
            stores.append(f"R[{index}]={value}")
        self.lines += stores

    # ---- addresses ----
    def symbol_address(self, operand: Variable | SymbolOffset) -> int:
        """Address of a variable in its space."""
        offset = 0
        if isinstance(operand, SymbolOffset):
            operand, offset = operand.variable, operand.offset
        if operand.address is None:
            raise PtxError(f"variable {operand.name} has no storage (extern?): {self.current}")
        base = self.kernel.param_base if operand.space == "kernel_param" else 0
        return base + operand.address + offset

    def address(self, operand: Operand) -> str:
        """A memory operand as an i64 array."""
        if not isinstance(operand, Address):
            raise UnsupportedError(f"address operand {operand} in {self.current}")
        base, offset = operand.base, operand.offset
        if isinstance(base, Integer | Variable | SymbolOffset):
            start = base.value if isinstance(base, Integer) else self.symbol_address(base)
            return self.temporary(f"full(lanes.count,{self.constant(start + offset, 'i64')})")
        if not isinstance(base, Register):
            raise UnsupportedError(f"address operand in {self.current}")
        if SIZE[register_dtype(base)] == 8:
            start = self.use(base, "i64")
            return self.temporary(f"{start}+{self.constant(offset, 'i64')}") if offset else start
        start = self.use(base, "u32")
        values, key = self._values[base.index], f"address+{offset}"
        if key not in values:  # 32-bit addresses wrap modulo 2^32
            if offset:
                start = f"({start}+{self.constant(offset & 0xFFFFFFFF, 'u32')})"
            values[key] = self.temporary(f"{start}.astype(i64)")
        return values[key]
