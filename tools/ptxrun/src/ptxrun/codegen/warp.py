"""Instructions that lanes of a warp execute together."""

import re

from ..dtypes import OF_PTX_TYPE
from ..matrix import ELEMENT_BYTES
from ..program import Integer
from .emitter import Emitter, destination_pair, vector_items

_ACCUMULATOR = {"f32": "f32", "f16": "u32", "s32": "i32"}


class WarpEmitter(Emitter):
    def emit_shfl(self, modifiers, operands):
        if modifiers[0] != "sync":
            self.unsupported()
        first, second = destination_pair(operands[0])
        _, value, by, clamp, mask = operands
        key = None  # lanes that the same shuffle would read again
        if isinstance(by, Integer) and isinstance(clamp, Integer):
            key = (modifiers[1], by.value, clamp.value)
        value = self.use_array(value, "u32")
        by, clamp = self.use(by, "u32"), self.use(clamp, "u32")
        self.use(mask, "u32")
        self.per_lane = True
        result = self.temporary(f"lanes.shuffle({modifiers[1]!r},{value},{by},{clamp},{key!r})")
        self.define(first, f"{result}[0]", "u32")
        self.define(second, f"{result}[1]", "pred")

    def emit_vote(self, modifiers, operands):
        if modifiers[0] != "sync":
            self.unsupported()
        predicate = self.use(operands[1], "pred")
        if isinstance(operands[1], Integer):
            predicate = f"full(lanes.count,{predicate})"
        mask = self.use(operands[2], "u32")
        self.per_lane = True
        ballot = self.temporary(f"lanes.ballot({predicate})&{mask}")
        if modifiers[1] == "ballot":
            self.define(operands[0], ballot, "u32")
            return
        everyone = f"({ballot}==(lanes.present()&{mask}))"
        result = {
            "any": f"{ballot}!=0",
            "all": everyone,
            "uni": f"({ballot}==0)|{everyone}",
        }[modifiers[1]]
        self.define(operands[0], result, "pred")

    def emit_activemask(self, modifiers, operands):
        self.per_lane = True
        self.define(operands[0], f"lanes.present({self.guard})", "u32")

    def emit_match(self, modifiers, operands):
        first, second = destination_pair(operands[0])
        value = self.use_array(operands[1], OF_PTX_TYPE[modifiers[-1]])
        mask = self.use(operands[2], "u32")
        self.per_lane = True
        same = self.temporary(f"lanes.match({value},{mask})")
        if "any" in modifiers:
            self.define(first, same, "u32")
            return
        everyone = self.temporary(f"{same}==(lanes.present()&{mask})")
        self.define(first, f"where({everyone},{same},{self.constant(0, 'u32')})", "u32")
        self.define(second, everyone, "pred")

    def emit_redux(self, modifiers, operands):
        dtype = OF_PTX_TYPE[modifiers[-1]]
        value, mask = self.use_array(operands[1], dtype), self.use(operands[2], "u32")
        self.per_lane = True
        options = f"{'abs' in modifiers},{'NaN' in modifiers}"
        self.define(operands[0], f"lanes.reduce({modifiers[1]!r},{value},{mask},{options})", dtype)

    def emit_elect(self, modifiers, operands):
        first, second = destination_pair(operands[0])
        mask = self.use(operands[1], "u32")
        self.per_lane = True
        leader = self.temporary(f"lanes.elect({mask})")
        self.define(first, f"{leader}[0]", "u32")
        self.define(second, f"{leader}[1]", "pred")

    # ---- matrices ----
    def _matrices(self, modifiers):
        """How many 8x8 matrices of 16-bit elements an instruction moves."""
        if "m8n8" not in modifiers or modifiers[-1] != "b16":
            self.unsupported()
        return int(next(m for m in modifiers if m in ("x1", "x2", "x4"))[1])

    def emit_ldmatrix(self, modifiers, operands):
        number, space = self._matrices(modifiers), self.space(modifiers)
        address = self.address(operands[1])
        self.per_lane = True
        loaded = self.temporary(
            f"lanes.ldmatrix({self.current.position},{space!r},{address},{number},"
            f"{'trans' in modifiers})"
        )
        for i, destination in enumerate(vector_items(operands[0])):
            self.define(destination, f"{loaded}[{i}]", "u32")

    def emit_stmatrix(self, modifiers, operands):
        self._matrices(modifiers)
        address = self.address(operands[0])
        values = ",".join(self.use_array(x, "u32") for x in vector_items(operands[1]))
        self.lines.append(
            f"lanes.stmatrix({self.current.position},{self.space(modifiers)!r},{address},"
            f"({values},),{'trans' in modifiers})"
        )

    def emit_movmatrix(self, modifiers, operands):
        value = self.use_array(operands[1], "u32")
        self.per_lane = True
        self.define(operands[0], f"lanes.movmatrix({self.current.position},{value})", "u32")

    def emit_mma(self, modifiers, operands):
        if modifiers[0] != "sync" or "sp" in modifiers or "satfinite" in modifiers:
            self.unsupported()
        shape = next(match for m in modifiers if (match := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", m)))
        m, n, k = map(int, shape.groups())
        d_type, a_type, b_type, c_type = modifiers[-4:]
        if (m, n) != (16, 8) or "col" not in modifiers:
            self.unsupported()
        d, a, b, c = (vector_items(operand) for operand in operands)
        element = ELEMENT_BYTES[a_type]
        if len(a) * 128 != m * k * element or len(b) * 128 != n * k * ELEMENT_BYTES[b_type]:
            self.unsupported()
        a_registers = ",".join(self.use_array(x, "u32") for x in a)
        b_registers = ",".join(self.use_array(x, "u32") for x in b)
        c_registers = ",".join(self.use_array(x, _ACCUMULATOR[c_type]) for x in c)
        self.per_lane = True
        result = self.temporary(
            f"mma(lanes.full_warps({self.current.position}),{m},{n},{k},{d_type!r},{a_type!r},"
            f"{b_type!r},{c_type!r},[{a_registers}],[{b_registers}],[{c_registers}])"
        )
        for i, destination in enumerate(d):
            self.define(destination, f"{result}[{i}]", _ACCUMULATOR[d_type])
