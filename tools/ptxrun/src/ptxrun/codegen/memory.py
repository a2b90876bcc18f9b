"""Loads, stores, atomics and asynchronous copies."""

from ..dtypes import OF_PTX_TYPE, SIZE
from ..program import Register, Sink, SymbolOffset, Variable
from .emitter import Emitter, vector_items

_SPACES = ("global", "shared", "local", "const", "param")
_VECTORS = ("v2", "v4", "v8")
_ATOMICS = ("add", "min", "max", "and", "or", "xor", "cas", "exch", "inc", "dec")
_SMALL_FLOATS = ("f16", "bf16", "f16x2", "bf16x2")


class MemoryEmitter(Emitter):
    def space(self, modifiers):
        """State space of a memory instruction; constants are kept in global memory."""
        for modifier in modifiers:
            name, _, scope = modifier.partition("::")
            if name in _SPACES:
                if scope == "cluster":
                    self.unsupported()
                return "global" if name == "const" else name
        return "generic"

    def _form(self, modifiers):
        """Space, number of elements and their numpy type."""
        vector = next((int(m[1:]) for m in modifiers if m in _VECTORS), 1)
        return self.space(modifiers), vector, OF_PTX_TYPE[modifiers[-1]]

    def emit_ld(self, modifiers, operands):
        space, vector, dtype = self._form(modifiers)
        size = SIZE[dtype]
        raw = f"u{8 * size}"
        dtype = "u16" if dtype == "f16" else dtype
        destinations = vector_items(operands[0])
        if len(destinations) != vector:
            self.unsupported()
        if space == "param":
            base, offset = operands[1].base, operands[1].offset
            if isinstance(base, SymbolOffset):
                base, offset = base.variable, base.offset + offset
            if isinstance(base, Variable) and base.space == "kernel_param":
                self.per_lane = True
                for i, destination in enumerate(destinations):
                    at = base.address + offset + i * size
                    self.define(destination, f"lanes.param({at},{dtype!r})", dtype)
                return
            space = "local" if isinstance(base, Variable) else "global"
        address = self.address(operands[1])
        self.per_lane = True
        loaded = self.temporary(
            f"lanes.load({self.current.position},{space!r},{address},{size},{vector},{self.guard})"
        )
        for i, destination in enumerate(destinations):
            value = f"{loaded}[{i}]" + (f".view({dtype})" if dtype != raw else "")
            self.define(destination, value, dtype)

    emit_ldu = emit_ld

    def emit_st(self, modifiers, operands):
        space, vector, dtype = self._form(modifiers)
        sources = vector_items(operands[1])
        if len(sources) != vector:
            self.unsupported()
        if space == "param":
            space = "local"
        address = self.address(operands[0])
        values = ",".join(self.use_array(source, f"u{8 * SIZE[dtype]}") for source in sources)
        self.lines.append(
            f"lanes.store({self.current.position},{space!r},{address},({values},),{SIZE[dtype]},"
            f"{self.guard})"
        )

    # ---- atomics ----
    def emit_atom(self, modifiers, operands):
        self._atomic(modifiers, operands[0], operands[1:])

    def emit_red(self, modifiers, operands):
        if "async" in modifiers:
            self.unsupported()
        self._atomic(modifiers, Sink(), operands)

    def _atomic(self, modifiers, destination, operands):
        operation = next(m for m in modifiers if m in _ATOMICS)
        ptx_type = modifiers[-1]
        if any(m in _VECTORS for m in modifiers):
            self.unsupported()
        dtype = OF_PTX_TYPE[ptx_type]
        kind = ptx_type if ptx_type in _SMALL_FLOATS else dtype
        dtype = "u16" if dtype == "f16" else dtype
        address = self.address(operands[0])
        b = self.use_array(operands[1], dtype)
        c = self.use_array(operands[2], dtype) if operation == "cas" else None
        wanted = not isinstance(destination, Sink)
        self.per_lane = True
        old = self.temporary(
            f"lanes.atomic({self.current.position},{self.space(modifiers)!r},{operation!r},"
            f"{kind!r},{address},{b},{c},{self.guard},{wanted})"
        )
        self.define(destination, old, dtype)

    # ---- asynchronous copies ----
    def emit_cp(self, modifiers, operands):
        if modifiers[0] != "async" or "bulk" in modifiers or "mbarrier" in modifiers:
            self.unsupported()
        if "commit_group" in modifiers:
            self.lines.append(f"lanes.commit_group({self.guard})")
        elif "wait_group" in modifiers:
            self.lines.append(f"lanes.wait_group({operands[0].value},{self.guard})")
        elif "wait_all" in modifiers:
            self.lines.append(f"lanes.wait_all({self.guard})")
        else:
            self._copy(modifiers, operands)

    def _copy(self, modifiers, operands):
        to, of = self.address(operands[0]), self.address(operands[1])
        size, rest = operands[2].value, operands[3:]
        if "L2::cache_hint" in modifiers:
            rest = rest[:-1]
        source_size = None
        if rest:
            [limit] = rest
            if isinstance(limit, Register) and limit.type == "pred":  # ignore-src
                nothing, all_of_it = self.constant(0, "u32"), self.constant(size, "u32")
                ignore = self.use(limit, "pred")
                source_size = self.temporary(f"where({ignore},{nothing},{all_of_it})")
            else:
                source_size = self.use_array(limit, "u32")
        self.lines.append(
            f"lanes.copy_async({self.current.position},{to},{of},{size},{source_size},{self.guard})"
        )

    def emit_createpolicy(self, modifiers, operands):
        self.define(operands[0], self.constant(0, "u64"), "u64")
