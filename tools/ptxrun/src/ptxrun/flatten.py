"""Function bodies -> one flat kernel: calls inlined, names resolved to registers and storage."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .errors import PtxError, UnsupportedError
from .lexer import parse_literal, split_commas
from .parse import ParsedModule
from .program import (
    DROPPED,
    TYPE_BYTES,
    Address,
    Function,
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
from .storage import align_up

_GUARD = re.compile(r"@(!?)\s*([\w$%]+)\s+")
_OPCODE = re.compile(r"([\w.:]+)\s*(.*)$", re.S)
_MODIFIER_DOT = re.compile(r"(?<!:)\.(?!:)")
_BASE_AND_OFFSET = re.compile(r"^(.*?[\w$%])\s*([+-])\s*(-?\s*(?:0[xX])?[0-9a-fA-F]+)$")
_SYMBOL_AND_OFFSET = re.compile(r"^([\w$%]+)\s*([+-])\s*(\d+)$")
_RUNTIME_TRAPS = ("__assertfail", "__assert_fail", "malloc", "free")


def flatten(module: ParsedModule, name: str) -> Kernel:
    """The kernel of an entry; recursion and indirect calls are refused."""
    return _Flattener(module, module.functions[name]).kernel


def with_text(
    module: ParsedModule, statement: Sequence[Instruction], text: str
) -> list[Instruction]:
    """A statement's instructions with another text, which names nothing else: "" drops them.

    They jump where they did. A branch around a guarded instruction gets the guard of the new text.
    """
    names: dict[str, Any] = {}
    for instruction in statement:
        names |= _names(instruction)
    return [_with_text(_Reader(module), each, text, names) for each in statement]


def _with_text(
    reader: "_Reader", instruction: Instruction, text: str, names: dict[str, Any]
) -> Instruction:
    if not text:
        dropped = replace(instruction, opcode=DROPPED, text=text)
        dropped.modifiers, dropped.operands, dropped.predicate, dropped.target = [], [], None, None
        return dropped
    new, rest = reader.head(text, instruction.line, instruction.function, [names])
    new.position, new.target = instruction.position, instruction.target
    if instruction.opcode == "bra" and new.opcode != "bra":
        assert new.predicate is not None
        register, negated = new.predicate
        return replace(instruction, text=text, predicate=(register, not negated))
    if instruction.predicate is None:
        new.predicate = None
    new.operands = instruction.operands
    if new.target is None:
        new.operands = reader.operands(rest, [names], instruction.line)
    return new


def _names(instruction: Instruction) -> dict[str, Any]:
    """Registers and variables that an instruction names."""
    found: dict[str, Any] = {}
    pending: list[Any] = [*instruction.operands, *(instruction.predicate or ())]
    for operand in pending:
        if isinstance(operand, Register | Variable):
            found[operand.name] = operand
        elif isinstance(operand, Vector):
            pending += operand.items
        elif isinstance(operand, Address | Not | Pair | SymbolOffset):
            pending += (getattr(operand, name) for name in operand.__slots__)
    return found


class _Labels:
    """Labels of one inlined body: a name means the label of the innermost enclosing block."""

    def __init__(self, function: Function, serial: int):
        self._function, self._serial = function, serial
        self._paths: dict[str, list[tuple[int, ...]]] = {}
        self.rewind()
        for item in function.body or ():
            if item[0] == "label":
                self._paths.setdefault(item[1], []).append(tuple(self._path))
            else:
                self.visit(item[0])
        self.rewind()

    def rewind(self) -> None:
        self._path, self._blocks = [0], 0

    def visit(self, kind: str) -> None:
        if kind == "{":
            self._blocks += 1
            self._path.append(self._blocks)
        elif kind == "}":
            self._path.pop()

    def resolve(self, name: str) -> str:
        visible = [
            path for path in self._paths.get(name, ()) if tuple(self._path[: len(path)]) == path
        ]
        if not visible:
            raise PtxError(f"{self._function.name}: label {name} not found")
        block = ".".join(map(str, max(visible, key=len)))
        return f"{self._serial}.{block}.{name}"


class _Reader:
    """Reads instructions; scopes map names to what they stand for."""

    def __init__(self, module: ParsedModule):
        self.module = module

    def lookup(self, name: str, scopes: Sequence[dict[str, Any]]) -> Register | Variable | None:
        """What a name stands for."""
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        return self.module.variables.get(name)

    def head(
        self, text: str, line: int, function: str, scopes: Sequence[dict[str, Any]]
    ) -> tuple[Instruction, str]:
        """An instruction without its operands, and the text of those."""
        rest, predicate = text, None
        if guard := _GUARD.match(rest):
            register = self.lookup(guard.group(2), scopes)
            if not isinstance(register, Register):
                raise PtxError(f"PTX line {line}: bad predicate in {text}")
            predicate = (register, guard.group(1) == "!")
            rest = rest[guard.end() :]
        match = _OPCODE.match(rest)
        if not match:
            raise PtxError(f"PTX line {line}: cannot parse {text}")
        opcode, *modifiers = _MODIFIER_DOT.split(match.group(1))
        instruction = Instruction(opcode, modifiers, [], line, text, function, predicate)
        return instruction, match.group(2).strip()

    def operands(self, text: str, scopes: Sequence[dict[str, Any]], line: int) -> list[Operand]:
        """What an instruction that jumps nowhere works on."""
        return [self.operand(part, scopes, line) for part in split_commas(text)]

    def operand(self, text: str, scopes: Sequence[dict[str, Any]], line: int) -> Operand:
        """One operand."""
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            items = split_commas(text[1 : text.rindex("}")])
            return Vector([self.operand(item, scopes, line) for item in items])
        if text.startswith("["):
            return self._address(text, scopes, line)
        if text.startswith("!"):
            return Not(self.operand(text[1:], scopes, line))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first, scopes, line), self.operand(second, scopes, line))
        literal = parse_literal(text)
        if literal is not None:
            return literal
        entry = self.lookup(text, scopes)
        if entry is not None:
            return entry
        if text.startswith("%"):
            return Special(text[1:])
        if text == "WARP_SZ":
            return Integer(32)
        if match := _SYMBOL_AND_OFFSET.match(text):
            entry = self.lookup(match.group(1), scopes)
            if isinstance(entry, Variable):
                return SymbolOffset(entry, int(match.group(2) + match.group(3)))
        if re.match(r"^(.+)\.([xyzwrgba])$", text):
            raise UnsupportedError(f"PTX line {line}: vector element operand {text}")
        if text in self.module.functions:
            raise UnsupportedError(
                f"PTX line {line}: address of function {text} (indirect calls are not supported)"
            )
        raise PtxError(f"PTX line {line}: unknown operand {text!r}")

    def _address(self, text: str, scopes: Sequence[dict[str, Any]], line: int) -> Address:
        base, offset = text[1 : text.rindex("]")].strip(), 0
        if "," in base:
            raise UnsupportedError(f"PTX line {line}: tensor/vector address operand {text}")
        match = _BASE_AND_OFFSET.match(base)
        if match and parse_literal(base) is None:
            literal = parse_literal(match.group(3))
            if isinstance(literal, Integer):
                offset = literal.value if match.group(2) == "+" else -literal.value
                base = match.group(1).strip()
        return Address(self.operand(base, scopes, line), offset)


class _Flattener(_Reader):
    def __init__(self, module: ParsedModule, entry: Function):
        super().__init__(module)
        self.kernel = Kernel(entry.name, entry.directives)
        self.serial = 0
        scope: dict[str, Any] = {}
        for parameter in entry.params:
            parameter.address = align_up(self.kernel.param_bytes, parameter.align)
            self.kernel.param_bytes = parameter.address + parameter.size
            self.kernel.params.append(parameter)
            scope[parameter.name] = parameter
        self._inline(entry, scope, (entry.name,), None)
        self._lay_out_shared()
        for position, instruction in enumerate(self.kernel.instructions):
            instruction.position = position

    def _lay_out_shared(self) -> None:
        kernel, end, dynamic = self.kernel, 0, []
        for variable in kernel.shared_variables.values():
            if variable.extern:
                dynamic.append(variable)
            else:
                variable.address = align_up(end, variable.align)
                end = variable.address + variable.size
        kernel.shared_static = end
        alignment = max([16, *(variable.align for variable in dynamic)])
        kernel.shared_dynamic_offset = align_up(end, alignment)
        for variable in dynamic:
            variable.address = kernel.shared_dynamic_offset

    def _next_serial(self) -> int:
        self.serial += 1
        return self.serial

    # ---- bodies ----
    def _inline(
        self,
        function: Function,
        scope: dict[str, Any],
        stack: tuple[str, ...],
        return_label: str | None,
    ) -> None:
        """Append a body; in an inlined one `ret` jumps to `return_label`.

        A scope maps names to Variables, Registers, or the type (str) of a register that no
        instruction has named yet: PTX declares many registers that it never touches.
        """
        scopes = [dict(scope)]
        labels = _Labels(function, self._next_serial())
        last_label = ""
        for kind, *rest in function.body or ():
            labels.visit(kind)
            if kind == "{":
                scopes.append({})
            elif kind == "}":
                scopes.pop()
            elif kind == "label":
                last_label = labels.resolve(rest[0])
                self.kernel.labels[last_label] = len(self.kernel.instructions)
            elif kind == "table":
                self.kernel.tables[last_label] = [labels.resolve(name) for name in rest[0]]
            elif kind == "registers":
                scopes[-1].update(dict.fromkeys(rest[1], rest[0]))
            elif kind == "variable":
                scopes[-1][rest[0].name] = self._declare(rest[0], function)
            else:
                self._instruction(function, *rest, scopes, stack, labels, return_label)

    def _declare(self, variable: Variable, function: Function) -> Variable:
        kernel = self.kernel
        if variable.space == "shared":
            key = f"{function.name}::{variable.name}"
            return kernel.shared_variables.setdefault(key, variable)
        if variable.space in ("global", "const"):
            return self.module.variables.setdefault(variable.name, variable)
        # Every inlined copy of a body has storage of its own in the thread's local frame.
        address = align_up(kernel.local_bytes, variable.align)
        kernel.local_bytes = address + max(variable.size, 1)
        return Variable(
            variable.name,
            "local",
            variable.type,
            variable.element_bytes,
            variable.align,
            variable.size,
            address=address,
        )

    def lookup(self, name: str, scopes: Sequence[dict[str, Any]]) -> Register | Variable | None:
        for scope in reversed(scopes):
            entry = scope.get(name)
            if isinstance(entry, str):
                if entry not in TYPE_BYTES or entry == "b128":
                    raise UnsupportedError(f"register type .{entry}")
                entry = scope[name] = Register(len(self.kernel.registers), name, entry)
                self.kernel.registers.append(entry)
            if entry is not None:
                return entry
        variable = self.module.variables.get(name)
        if variable is not None and variable.space == "shared":
            self.kernel.shared_variables.setdefault(name, variable)
        return variable

    # ---- instructions ----
    def _instruction(
        self,
        function: Function,
        text: str,
        line: int,
        scopes: list[dict[str, Any]],
        stack: tuple[str, ...],
        labels: _Labels,
        return_label: str | None,
    ) -> None:
        instruction, rest = self.head(text, line, function.name, scopes)
        opcode = instruction.opcode
        if opcode == "call":
            self._call(function, instruction, rest, scopes, stack)
            return
        if opcode == "bra":
            instruction.target = labels.resolve(rest)
        elif opcode == "brx":
            index, table = split_commas(rest)
            instruction.operands = [self.operand(index, scopes, line)]
            instruction.target = labels.resolve(table)
        elif opcode == "ret" and return_label is not None:
            instruction.opcode, instruction.modifiers = "bra", ["ret"]
            instruction.target = return_label
        else:
            instruction.operands = self.operands(rest, scopes, line)
        self.kernel.instructions.append(instruction)

    def _call(
        self,
        function: Function,
        instruction: Instruction,
        rest: str,
        scopes: list[dict[str, Any]],
        stack: tuple[str, ...],
    ) -> None:
        kernel, line = self.kernel, instruction.line
        parts = split_commas(rest)
        results = split_commas(parts.pop(0)[1:-1]) if parts[0].startswith("(") else []
        name = parts[0]
        has_arguments = len(parts) > 1 and parts[1].startswith("(")
        arguments = split_commas(parts[1][1:-1]) if has_arguments else []
        if name == "vprintf":
            return
        if name in _RUNTIME_TRAPS:
            instruction.opcode, instruction.modifiers = "trap", ["call", name]
            kernel.instructions.append(instruction)
            return
        callee = self.module.functions.get(name)
        if callee is None:
            raise UnsupportedError(f"PTX line {line}: indirect or unknown call: {instruction.text}")
        if callee.body is None:
            raise UnsupportedError(f"PTX line {line}: call to external function {name}")
        if name in stack:
            raise UnsupportedError(f"PTX line {line}: recursive call to {name}")
        scope = {}
        formal = callee.results + callee.params
        for parameter, argument in zip(formal, results + arguments, strict=True):
            entry = self.lookup(argument, scopes)
            if not isinstance(entry, Variable):
                raise UnsupportedError(
                    f"PTX line {line}: call argument {argument} is not a .param variable"
                )
            scope[parameter.name] = entry
        end = f"end.{self._next_serial()}"
        if instruction.predicate:
            register, negated = instruction.predicate
            kernel.instructions.append(
                Instruction(
                    "bra",
                    [],
                    [],
                    line,
                    instruction.text,
                    function.name,
                    (register, not negated),
                    end,
                )
            )
        self._inline(callee, scope, (*stack, name), end)
        kernel.labels[end] = len(kernel.instructions)
