"""Logic, shifts and bit fields."""

from ..dtypes import OF_PTX_TYPE, SIZE
from ..program import Integer, Register
from .emitter import Emitter


class BitEmitter(Emitter):
    def _logic(self, modifiers, operands, operator):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
        self.define(operands[0], f"{a}{operator}{b}", dtype)

    def emit_and(self, modifiers, operands):
        self._logic(modifiers, operands, "&")

    def emit_or(self, modifiers, operands):
        self._logic(modifiers, operands, "|")

    def emit_xor(self, modifiers, operands):
        self._logic(modifiers, operands, "^")

    def emit_not(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        self.define(operands[0], f"~{self.use(operands[1], dtype)}", dtype)

    def emit_cnot(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        self.define(operands[0], f"({self.use(operands[1], dtype)}==0).astype({dtype})", dtype)

    def emit_lop3(self, modifiers, operands):
        if modifiers[0] != "b32":
            self.unsupported()
        a, b, c = (self.use(operand, "u32") for operand in operands[1:4])
        self.define(operands[0], f"lop3({a},{b},{c},{operands[4].value})", "u32")

    # ---- shifts ----
    def _shift(self, modifiers, operands, function, operator):
        destination, value, count = operands
        dtype = OF_PTX_TYPE[modifiers[-1]]
        value = self.use(value, dtype)
        if not isinstance(count, Integer):
            self.define(destination, f"{function}({value},{self.use(count, 'u32')})", dtype)
            return
        width, amount = 8 * SIZE[dtype], count.value & 0xFFFFFFFF
        if dtype[0] == "i" and operator == ">>":
            amount = min(amount, width - 1)
        if amount < width:
            result = f"{value}{operator}{self.constant(amount, dtype)}"
        else:
            result = f"{value}&{self.constant(0, dtype)}"
        self.define(destination, result, dtype)

    def emit_shl(self, modifiers, operands):
        self._shift(modifiers, operands, "shl", "<<")

    def emit_shr(self, modifiers, operands):
        self._shift(modifiers, operands, "shr", ">>")

    def emit_shf(self, modifiers, operands):
        a, b, c = (self.use(operand, "u32") for operand in operands[1:4])
        options = f"{modifiers[0] == 'r'},{modifiers[1] == 'clamp'}"
        self.define(operands[0], f"shf({a},{b},{c},{options})", "u32")

    # ---- fields and counts ----
    def emit_bfe(self, modifiers, operands):
        destination, value, position, length = operands
        dtype = OF_PTX_TYPE[modifiers[-1]]
        a = self.use(value, dtype)
        if isinstance(position, Integer) and isinstance(length, Integer) and dtype[0] == "u":
            start, count = position.value, length.value
            if count > 0 and start + count <= 8 * SIZE[dtype]:
                mask = self.constant((1 << count) - 1, dtype)
                self.define(destination, f"({a}>>{self.constant(start, dtype)})&{mask}", dtype)
                return
        start, count = self.use(position, "u32"), self.use(length, "u32")
        self.define(destination, f"bfe({a},{start},{count})", dtype)

    def emit_bfi(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        a, b = self.use(operands[1], dtype), self.use(operands[2], dtype)
        start, count = self.use(operands[3], "u32"), self.use(operands[4], "u32")
        self.define(operands[0], f"bfi({a},{b},{start},{count})", dtype)

    def emit_bfind(self, modifiers, operands):
        value = self.use(operands[1], OF_PTX_TYPE[modifiers[-1]])
        self.define(operands[0], f"bfind({value},{'shiftamt' in modifiers})", "u32")

    def emit_clz(self, modifiers, operands):
        value = self.use(operands[1], OF_PTX_TYPE[modifiers[-1]])
        self.define(operands[0], f"clz({value})", "u32")

    def emit_popc(self, modifiers, operands):
        value = self.use(operands[1], OF_PTX_TYPE[modifiers[-1]])
        self.define(operands[0], f"popc({value})", "u32")

    def emit_brev(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        self.define(operands[0], f"brev({self.use_array(operands[1], dtype)})", dtype)

    def emit_szext(self, modifiers, operands):
        a, length = self.use(operands[1], "u32"), self.use(operands[2], "u32")
        options = f"{modifiers[0] == 'wrap'},{modifiers[-1] == 's32'}"
        self.define(operands[0], f"szext({a},{length},{options})", "u32")

    def emit_bmsk(self, modifiers, operands):
        position, length = self.use(operands[1], "u32"), self.use(operands[2], "u32")
        clamp = modifiers[0] == "clamp"
        self.define(operands[0], f"bmsk({position},{length},{clamp})", "u32")

    # ---- bytes ----
    def emit_prmt(self, modifiers, operands):
        destination, a, b, selector = operands
        mode = modifiers[1] if len(modifiers) > 1 else None
        known = isinstance(selector, Integer) and not selector.value & 0x8888
        x, y = self.use(a, "u32"), self.use(b, "u32")
        if mode is None and known and isinstance(a, Register) and isinstance(b, Register):
            result = f"prmt_const({x},{y},{selector.value & 0xFFFF})"
        else:
            result = f"prmt({x},{y},{self.use(selector, 'u32')},{mode!r})"
        self.define(destination, result, "u32")

    def emit_dp4a(self, modifiers, operands):
        a, b, c = (self.use(operand, "u32") for operand in operands[1:4])
        options = f"{modifiers[0] == 's32'},{modifiers[1] == 's32'}"
        self.define(operands[0], f"dp4a({a},{b},{c},{options})", "u32")

    def emit_dp2a(self, modifiers, operands):
        a, b, c = (self.use(operand, "u32") for operand in operands[1:4])
        options = f"{modifiers[1] == 's32'},{modifiers[2] == 's32'},{modifiers[0] == 'hi'}"
        self.define(operands[0], f"dp2a({a},{b},{c},{options})", "u32")
