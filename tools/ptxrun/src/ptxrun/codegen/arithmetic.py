"""Integer and floating-point arithmetic."""

from collections.abc import Callable

from ..dtypes import OF_PTX_TYPE, TWICE_AS_WIDE, unsigned
from ..program import Operand
from .emitter import Emitter

_PACKED = {
    "f16x2": ("unpack_f16x2", "pack_f16x2"),
    "bf16x2": ("unpack_bf16x2", "pack_bf16x2"),
}
_PROPERTY = {
    "finite": "np.isfinite({0})",
    "infinite": "np.isinf({0})",
    "number": "~np.isnan({0})",
    "notanumber": "np.isnan({0})",
    "normal": "(np.isfinite({0})&(np.abs({0})>={1}))",
    "subnormal": "((np.abs({0})<{1})&({0}!=0))",
}


def _is_float(modifiers):
    return modifiers[-1][0] == "f" or modifiers[-1].startswith("bf")


def _rounding(modifiers):
    return next((m for m in modifiers if m in ("rn", "rz", "rm", "rp")), "rn")


def _without(modifiers, *unwanted):
    return [m for m in modifiers if m not in unwanted]


class ArithmeticEmitter(Emitter):
    def _float_operation(
        self,
        modifiers: list[str],
        operands: list[Operand],
        expression: Callable[[str, list[str]], str],
    ) -> None:
        """Define operand 0 as `expression(type, arguments)` in any float type.

        The type is f32, f64, f16 or bf16; a packed one is computed on twice the lanes, and bf16
        on f32 values that are rounded afterwards.
        """
        ptx_type, flush = modifiers[-1], "ftz" in modifiers
        destination, *sources = operands
        if ptx_type in _PACKED:
            unpack, pack = _PACKED[ptx_type]
            arguments = [
                self.temporary(f"{unpack}({self.use_array(source, 'u32')})") for source in sources
            ]
            result = expression(ptx_type.removesuffix("x2"), arguments)
            if "sat" in modifiers:
                result = f"saturate({result})"
            self.per_lane = True
            self.define(destination, f"{pack}({result})", "u32")
        elif ptx_type == "bf16":
            arguments = [self.use_float(source, "bf16") for source in sources]
            self.define(destination, f"to_bf16({expression('bf16', arguments)})", "u16")
        elif ptx_type in ("f16", "f32", "f64"):
            arguments = [self.use(source, ptx_type) for source in sources]
            if flush and ptx_type == "f32":
                arguments = [self.temporary(f"flush_subnormals({a})") for a in arguments]
            result = expression(ptx_type, arguments)
            if flush:
                result = f"flush_subnormals({result})"
            if "sat" in modifiers:
                result = f"saturate({result})"
            self.define(destination, result, ptx_type)
        else:
            self.unsupported()

    # ---- add, sub, mul ----
    def _add_or_subtract(self, modifiers, operands, sign):
        if _is_float(modifiers):
            self._float_add_or_subtract(modifiers, operands, sign)
            return
        destination, a, b = operands
        if modifiers[-1] in ("u16x2", "s16x2"):
            a, b = (f"{self.use_array(x, 'u32')}.view(u16)" for x in (a, b))
            self.define(destination, f"({a}{sign}{b}).view(u32)", "u32")
            return
        self.allow(modifiers, {"sat", "cc", modifiers[-1]})
        dtype = OF_PTX_TYPE[modifiers[-1]]
        if "cc" in modifiers:
            dtype = unsigned(dtype)
        a, b = self.use(a, dtype), self.use(b, dtype)
        if "sat" in modifiers:
            self.define(destination, f"saturate_int({a}.astype(i64){sign}{b},i32)", "i32")
        elif "cc" in modifiers:
            result = self.temporary(f"{a}{sign}{b}")
            carry = self.temporary(f"{result}<{a}" if sign == "+" else f"{a}<{b}")
            self.define(destination, result, dtype)
            self.define(self.kernel.carry_register(), carry, "pred")
        else:
            self.define(destination, f"{a}{sign}{b}", dtype)

    def _float_add_or_subtract(self, modifiers, operands, sign):
        mode = _rounding(modifiers)

        def expression(ptx_type, arguments):
            a, b = arguments
            if mode == "rn":
                return f"{a}{sign}{b}"
            if ptx_type != "f32":
                self.unsupported()
            return f"add_f32({a},{b if sign == '+' else f'(-{b})'},{mode!r})"

        self._float_operation(modifiers, operands, expression)

    def emit_add(self, modifiers, operands):
        self._add_or_subtract(modifiers, operands, "+")

    def emit_sub(self, modifiers, operands):
        self._add_or_subtract(modifiers, operands, "-")

    def _add_carry(self, modifiers, destination, a, b, dtype):
        """a + b + carry, and the new carry with `.cc`."""
        carry = self.use(self.kernel.carry_register(), "pred")
        partial = self.temporary(f"{a}+{b}")
        result = self.temporary(f"{partial}+{carry}.astype({dtype})")
        overflow = f"({partial}<{a})|({result}<{partial})"
        self._define_with_carry(modifiers, destination, result, overflow, dtype)

    def _define_with_carry(self, modifiers, destination, result, overflow, dtype):
        carry = self.temporary(overflow) if "cc" in modifiers else None
        self.define(destination, result, dtype)
        if carry is not None:
            self.define(self.kernel.carry_register(), carry, "pred")

    def emit_addc(self, modifiers, operands):
        dtype = unsigned(OF_PTX_TYPE[modifiers[-1]])
        a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
        self._add_carry(modifiers, operands[0], a, b, dtype)

    def emit_subc(self, modifiers, operands):
        dtype = unsigned(OF_PTX_TYPE[modifiers[-1]])
        a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
        borrow = self.use(self.kernel.carry_register(), "pred")
        partial = self.temporary(f"{a}-{b}")
        result = self.temporary(f"{partial}-{borrow}.astype({dtype})")
        underflow = f"({a}<{b})|({partial}<{result})"
        self._define_with_carry(modifiers, operands[0], result, underflow, dtype)

    def emit_mul(self, modifiers, operands):
        if not _is_float(modifiers):
            self.define(operands[0], *self._product(modifiers, operands))
            return
        mode = _rounding(modifiers)

        def expression(ptx_type, arguments):
            a, b = arguments
            if mode == "rn":
                return f"{a}*{b}"
            if ptx_type != "f32":
                self.unsupported()
            return f"mul_f32({a},{b},{mode!r})"

        self._float_operation(modifiers, operands, expression)

    def _product(self, modifiers, operands):
        """Expression and type of the integer product of operands 1 and 2."""
        dtype = OF_PTX_TYPE[modifiers[-1]]
        a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
        if "wide" in modifiers:
            wide = TWICE_AS_WIDE[dtype]
            return f"{a}.astype({wide})*{b}.astype({wide})", wide
        if "hi" in modifiers:
            return f"mul_hi({a},{b})", dtype
        return f"{a}*{b}", dtype

    def _product24(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
        if dtype == "i32":
            a, b = (f"((({x}<<8)>>8).astype(i64))" for x in (a, b))
        else:
            a, b = (f"(({x}&0xffffff).astype(u64))" for x in (a, b))
        product = f"(({a}*{b})>>16)" if "hi" in modifiers else f"({a}*{b})"
        return f"{product}.astype({dtype})", dtype

    def emit_mul24(self, modifiers, operands):
        self.define(operands[0], *self._product24(modifiers, operands))

    def emit_mad24(self, modifiers, operands):
        product, dtype = self._product24(modifiers, operands)
        self.define(operands[0], f"{product}+{self.use(operands[3], dtype)}", dtype)

    def emit_mad(self, modifiers, operands):
        if _is_float(modifiers):
            self.emit_fma(modifiers, operands)
            return
        product, dtype = self._product(modifiers, operands)
        if "sat" in modifiers:
            self.unsupported()
        if "cc" in modifiers:
            dtype = unsigned(dtype)
            product = self.temporary(f"({product}).astype({dtype})")
            result = self.temporary(f"{product}+{self.use(operands[3], dtype)}")
            overflow = f"{result}<{product}"
            self._define_with_carry(modifiers, operands[0], result, overflow, dtype)
        else:
            self.define(operands[0], f"{product}+{self.use(operands[3], dtype)}", dtype)

    def emit_madc(self, modifiers, operands):
        product, dtype = self._product(modifiers, operands)
        dtype = unsigned(dtype)
        product = self.temporary(f"({product}).astype({dtype})")
        addend = self.use(operands[3], dtype)
        self._add_carry(modifiers, operands[0], product, addend, dtype)

    def emit_fma(self, modifiers, operands):
        if "oob" in modifiers:
            self.unsupported()
        mode, clamp = _rounding(modifiers), "relu" in modifiers

        def expression(ptx_type, arguments):
            a, b, c = arguments
            if ptx_type == "f32":
                result = f"fma_f32({a},{b},{c},{mode!r})"
            elif ptx_type == "f64":
                if mode != "rn":
                    self.unsupported()
                result = f"fma_f64({a},{b},{c})"
            elif ptx_type == "f16":
                result = f"fma_exact({a},{b},{c}).astype(f16)"
            else:
                result = f"fma_exact({a},{b},{c})"
            return f"relu({result})" if clamp else result

        self._float_operation(_without(modifiers, "relu"), operands, expression)

    # ---- division ----
    def emit_div(self, modifiers, operands):
        mode = _rounding(modifiers)
        if not _is_float(modifiers):
            dtype = OF_PTX_TYPE[modifiers[-1]]
            a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
            self.define(operands[0], f"idiv({a},{b})", dtype)
            return

        def expression(ptx_type, arguments):
            a, b = arguments
            if ptx_type == "f32" and mode != "rn":
                return f"div_f32({a},{b},{mode!r})"
            return f"{a}/{b}"

        self._float_operation(modifiers, operands, expression)

    def emit_rem(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
        self.define(operands[0], f"irem({a},{b})", dtype)

    # ---- signs, minimum, maximum ----
    def emit_sad(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        a, b, c = (self.use(operand, dtype) for operand in operands[1:4])
        self.define(operands[0], f"{c}+where({a}<{b},{b}-{a},{a}-{b})", dtype)

    def _sign_operation(self, modifiers, operands, expression, bit_operator, mask):
        """`abs` or `neg`: an expression, or for 16-bit floats a mask on their bits."""
        ptx_type = modifiers[-1]
        if ptx_type[0] == "s":
            dtype = OF_PTX_TYPE[ptx_type]
            value = self.use_array(operands[1], dtype)
            self.define(operands[0], expression.format(value), dtype)
        elif "16" in ptx_type:
            dtype, bits = ("u32", mask * 0x10001) if ptx_type.endswith("x2") else ("u16", mask)
            value = f"{self.use(operands[1], dtype)}{bit_operator}{self.constant(bits, dtype)}"
            self.define(operands[0], value, dtype)
        else:
            self._float_operation(modifiers, operands, lambda _, a: expression.format(a[0]))

    def emit_abs(self, modifiers, operands):
        self._sign_operation(modifiers, operands, "np.abs({})", "&", 0x7FFF)

    def emit_neg(self, modifiers, operands):
        self._sign_operation(modifiers, operands, "-{}", "^", 0x8000)

    def emit_copysign(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
        self.define(operands[0], f"np.copysign({b},{a})", dtype)

    def emit_testp(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        value, tiny = self.use(operands[1], dtype), f"np.finfo({dtype}).tiny"
        self.define(operands[0], _PROPERTY[modifiers[0]].format(value, tiny), "pred")

    def _min_or_max(self, modifiers, operands, which):
        ptx_type = modifiers[-1]
        if not _is_float(modifiers):
            if ptx_type.endswith("x2"):
                dtype = "i16" if ptx_type[0] == "s" else "u16"
                a, b = (f"{self.use_array(x, 'u32')}.view({dtype})" for x in operands[1:3])
            else:
                dtype = OF_PTX_TYPE[ptx_type]
                a, b = (self.use(x, dtype) for x in operands[1:3])
            result = f"np.{which}imum({a},{b})"
            if "relu" in modifiers:
                result = f"np.maximum({result},{dtype}(0))"
            if ptx_type.endswith("x2"):
                result, dtype = f"{result}.view(u32)", "u32"
            self.define(operands[0], result, dtype)
            return
        options = f"{which!r},{'NaN' in modifiers},{'xorsign' in modifiers}"

        def expression(ptx_type, arguments):
            result, *rest = arguments
            for argument in rest:
                result = f"float_min_max({result},{argument},{options})"
            return result

        self._float_operation(_without(modifiers, "NaN", "xorsign", "abs"), operands, expression)

    def emit_min(self, modifiers, operands):
        self._min_or_max(modifiers, operands, "min")

    def emit_max(self, modifiers, operands):
        self._min_or_max(modifiers, operands, "max")

    # ---- functions ----
    def _function(self, modifiers, operands, of_f32, of_f64=None):
        """A function of one float, given as format strings; f16 goes through f32."""
        if modifiers[-1] == "f64" and of_f64 is None:
            self.unsupported()

        def expression(ptx_type, arguments):
            if ptx_type == "f64":
                return of_f64.format(*arguments)
            if ptx_type == "f16":
                return "(" + of_f32.format(f"{arguments[0]}.astype(f32)") + ").astype(f16)"
            return of_f32.format(*arguments)

        self._float_operation(_without(modifiers, "approx", "full"), operands, expression)

    def emit_rcp(self, modifiers, operands):
        of_f32 = f"div_f32(f32(1),{{0}},{_rounding(modifiers)!r})"
        self._function(modifiers, operands, of_f32, "1.0/{0}")

    def emit_sqrt(self, modifiers, operands):
        of_f32 = f"sqrt_f32({{0}},{_rounding(modifiers)!r})"
        self._function(modifiers, operands, of_f32, "np.sqrt({0})")

    def emit_rsqrt(self, modifiers, operands):
        self._function(modifiers, operands, "rsqrt({0})", "1.0/np.sqrt({0})")

    def emit_ex2(self, modifiers, operands):
        self._function(modifiers, operands, "exp2({0})")

    def emit_lg2(self, modifiers, operands):
        self._function(modifiers, operands, "log2({0})")

    def emit_sin(self, modifiers, operands):
        self._function(modifiers, operands, "sin({0})")

    def emit_cos(self, modifiers, operands):
        self._function(modifiers, operands, "cos({0})")

    def emit_tanh(self, modifiers, operands):
        self._function(modifiers, operands, "tanh({0})")
