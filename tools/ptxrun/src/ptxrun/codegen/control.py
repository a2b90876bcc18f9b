"""Branches, barriers, moves and comparisons."""

from ..dtypes import OF_PTX_TYPE, SIZE, UNSIGNED_OF_SIZE, unsigned
from ..program import TYPE_BYTES, Float, Sink, Vector
from ..storage import LOCAL_WINDOW, SHARED_WINDOW, WINDOW_SHIFT
from .emitter import Emitter, destination_pair

_COMPARISON = {
    **dict.fromkeys(("eq", "equ"), "=="),
    **dict.fromkeys(("ne", "neu"), "!="),
    **dict.fromkeys(("lt", "lo", "ltu"), "<"),
    **dict.fromkeys(("le", "ls", "leu"), "<="),
    **dict.fromkeys(("gt", "hi", "gtu"), ">"),
    **dict.fromkeys(("ge", "hs", "geu"), ">="),
}
_UNSIGNED_COMPARISONS = ("lo", "ls", "hi", "hs")
_TRUE_IF_UNORDERED = ("equ", "ltu", "leu", "gtu", "geu")
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_UNPACK = {"f16x2": "unpack_f16x2", "bf16x2": "unpack_bf16x2"}
_ONE = {"f32": 0x3F800000, "f16": 0x3C00, "f16x2": 0x3C00, "bf16": 0x3F80, "bf16x2": 0x3F80}


def _is_float(ptx_type: str) -> bool:
    return ptx_type[0] == "f" or ptx_type.startswith("bf")


class ControlEmitter(Emitter):
    # ---- control ----
    def emit_bra(self, modifiers, operands):
        if self.current.predicate is not None:
            register, negated = self.current.predicate
            predicate = self.use(register, "pred")
            self.returned = f"~{predicate}" if negated else predicate

    def emit_brx(self, modifiers, operands):
        self.returned = self.use(operands[0], "u32")

    def emit_ret(self, modifiers, operands):
        """The block's ending says it all."""

    emit_exit = emit_trap = emit_ret

    def emit_bar(self, modifiers, operands):
        if "warp" in modifiers:
            self.use(operands[0], "u32")
            self.lines.append("lanes.warp_barrier()")
            return
        kind, *reduction = [m for m in modifiers if m not in ("cta", "aligned")]
        if kind not in ("sync", "red", "arrive"):
            self.unsupported()
        operands, predicate = list(operands), "None"
        if kind == "red":
            destination = operands.pop(0)
            predicate = self.use(operands.pop(), "pred")
            self.block.barrier_result = (reduction[0], destination)
            self.define_at_barrier(destination)
        barrier = self.use(operands[0], "u32")
        threads = self.use(operands[1], "u32") if len(operands) > 1 else "None"
        self.returned = f"({kind!r},{barrier},{threads},{predicate})"

    emit_barrier = emit_bar

    # ---- moves ----
    def emit_mov(self, modifiers, operands):
        self.allow(modifiers, set(TYPE_BYTES))
        ptx_type = modifiers[-1]
        destination, source = operands
        if isinstance(destination, Vector) or isinstance(source, Vector):
            self._move_vector(TYPE_BYTES[ptx_type], destination, source)
            return
        dtype = OF_PTX_TYPE[ptx_type]
        if isinstance(source, Float) and ptx_type in ("b16", "b32", "b64"):
            dtype = UNSIGNED_OF_SIZE[TYPE_BYTES[ptx_type]]
        self.define(destination, self.use(source, dtype), dtype)

    def _move_vector(self, size, destination, source):
        whole = UNSIGNED_OF_SIZE[size]
        if isinstance(destination, Vector):
            bits = 8 * size // len(destination.items)
            value = self.temporary(self.use(source, whole))
            for i, item in enumerate(destination.items):
                if not isinstance(item, Sink):
                    part = f"({value}>>{self.constant(bits * i, whole)})" if i else value
                    self.define(item, f"{part}.astype(u{bits})", f"u{bits}")
            return
        bits = 8 * size // len(source.items)
        parts = [f"{self.use(item, f'u{bits}')}.astype({whole})" for item in source.items]
        shifted = [
            f"({part}<<{self.constant(bits * i, whole)})" if i else part
            for i, part in enumerate(parts)
        ]
        self.define(destination, "|".join(shifted), whole)

    def emit_cvta(self, modifiers, operands):
        space = next(m for m in modifiers if m in ("global", "shared", "local", "const", "param"))
        dtype = OF_PTX_TYPE[modifiers[-1]]
        value = self.use(operands[1], dtype)
        if space in ("shared", "local"):
            window = SHARED_WINDOW if space == "shared" else LOCAL_WINDOW
            value += f"{'-' if 'to' in modifiers else '+'}{self.constant(window, dtype)}"
        self.define(operands[0], value, dtype)

    def emit_isspacep(self, modifiers, operands):
        window = {"global": 0, "local": LOCAL_WINDOW, "shared": SHARED_WINDOW}[modifiers[0]]
        top = f"({self.use(operands[1], 'u64')}>>{self.constant(WINDOW_SHIFT, 'u64')})"
        self.define(operands[0], f"{top}=={self.constant(window >> WINDOW_SHIFT, 'u64')}", "pred")

    def emit_selp(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        destination, a, b, predicate = operands
        a, b, predicate = self.use(a, dtype), self.use(b, dtype), self.use(predicate, "pred")
        self.define(destination, f"where({predicate},{a},{b})", dtype)

    def emit_slct(self, modifiers, operands):
        dtype, compared = OF_PTX_TYPE[modifiers[-2]], OF_PTX_TYPE[modifiers[-1]]
        destination, a, b, c = operands
        a, b, c = self.use(a, dtype), self.use(b, dtype), self.use(c, compared)
        self.define(destination, f"where({c}>=0,{a},{b})", dtype)

    # ---- comparisons ----
    def _compare(self, comparison, a, b, of_floats):
        if not of_floats:
            return f"({a}{_COMPARISON[comparison]}{b})"
        unordered = f"(np.isnan({a})|np.isnan({b}))"
        if comparison in ("num", "nan"):
            return unordered if comparison == "nan" else f"~{unordered}"
        ordered = f"({a}{_COMPARISON[comparison]}{b})"
        if comparison in _TRUE_IF_UNORDERED:
            return f"({ordered}|{unordered})"
        # Python's != holds for NaN, which is what neu means and ne does not.
        return f"({ordered}&~{unordered})" if comparison == "ne" else ordered

    def _compare_operands(self, comparison, ptx_type, a, b):
        """Comparison of two operands; for packed types an array of twice the lanes."""
        if ptx_type in _UNPACK:
            unpack = _UNPACK[ptx_type]
            a = self.temporary(f"{unpack}({self.use_array(a, 'u32')})")
            b = self.temporary(f"{unpack}({self.use_array(b, 'u32')})")
        elif _is_float(ptx_type):
            a, b = self.use_float(a, ptx_type), self.use_float(b, ptx_type)
        else:
            dtype = OF_PTX_TYPE[ptx_type]
            if comparison in _UNSIGNED_COMPARISONS:
                dtype = unsigned(dtype)
            a, b = self.use(a, dtype), self.use(b, dtype)
        return self._compare(comparison, a, b, _is_float(ptx_type))

    def emit_setp(self, modifiers, operands):
        comparison, *rest = [m for m in modifiers if m != "ftz"]
        first, second = destination_pair(operands[0])
        result = self.temporary(self._compare_operands(comparison, rest[-1], *operands[1:3]))
        if rest[-1] in _UNPACK:
            results = [f"{result}[0::2]", f"{result}[1::2]"]
        else:
            results = [result, f"(~{result})"]
        if rest[0] in _LOGIC:
            combined = self.use(operands[3], "pred")
            results = [f"{value}{_LOGIC[rest[0]]}{combined}" for value in results]
        if not isinstance(second, Sink):  # either destination may be the other's operand
            results = [self.temporary(value) for value in results]
        self.define(first, results[0], "pred")
        self.define(second, results[1], "pred")

    def emit_set(self, modifiers, operands):
        comparison, *rest = [m for m in modifiers if m != "ftz"]
        to, compared = rest[-2:]
        result = self._compare_operands(comparison, compared, *operands[1:3])
        combines = rest[0] in _LOGIC
        if compared in _UNPACK:
            if combines:
                self.unsupported()
            one, zero = self.constant(_ONE.get(to, 0xFFFF), "u16"), self.constant(0, "u16")
            self.define(operands[0], f"where({result},{one},{zero}).view(u32)", "u32")
            return
        if combines:
            result = f"({result}{_LOGIC[rest[0]]}{self.use(operands[3], 'pred')})"
        if to in _ONE:
            dtype, one = UNSIGNED_OF_SIZE[TYPE_BYTES[to]], _ONE[to]
        else:
            dtype = OF_PTX_TYPE[to]
            one = (1 << 8 * SIZE[dtype]) - 1
        true, false = self.constant_bits(one, dtype), self.constant(0, dtype)
        self.define(operands[0], f"where({result},{true},{false})", dtype)
