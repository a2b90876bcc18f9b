"""Mechanical mutations of one kernel's PTX, to learn whether its tests would notice a mistake.

Each mutant differs from the original by one small change of the kind that a slip in the source
would make: a barrier or a wait that is not there, a bound or an offset off by one, operands in the
wrong order. A test suite is worth believing as far as it notices such mutants.

Changes that no test can notice are left out where they are known by their form: waiting for one
cp.async group more than needed, and an address moved off the alignment of its access, which the
interpreter refuses whatever the test.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .errors import PtxError
from .lexer import parse_literal, split_commas
from .module import Module
from .program import TYPE_BYTES, Integer


class Mutation(NamedTuple):
    """One mutant: what was changed, on which line of the PTX (1 is the first), and the new PTX.

    `old` and `new` are the statement before and after, `new` is "" where it was dropped.
    """

    description: str
    line: int
    ptx: str
    old: str = ""
    new: str = ""

    def of(self, module: Module, entry_name: str) -> Module:
        """The module of the unchanged PTX with this change."""
        return module.with_statement(entry_name, self.line, self.old, self.new)


class Killed(NamedTuple):
    """A mutant that the check noticed, and how: the exception's text or `check returned False`."""

    mutation: Mutation
    reason: str


class MutationReport(NamedTuple):
    """Outcome of `run_mutants`: mutants the check noticed and mutants that got past it."""

    killed: list[Killed]
    survived: list[Mutation]


class _Edit(NamedTuple):
    kind: str
    start: int
    end: int
    old: str
    new: str


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_TOKEN = re.compile(r"\s+|[{}]|[\w$%]+\s*:(?!:)|\.(?:loc|file)\b[^\n]*|@@[^\n]*|[^;]*;")
_STATEMENT = re.compile(
    r"(?P<guard>@!?\s*[\w$%]+\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<rest>.*)", re.S
)
_ADDRESS = re.compile(r"\[\s*([^\s\]+]+)\s*(?:\+\s*(-?\d+)\s*)?\]")

_NEIGHBOUR = {}
for _pair in ("lt le", "gt ge", "eq ne", "lo ls", "hi hs", "ltu leu", "gtu geu", "equ neu"):
    _one, _other = _pair.split()
    _NEIGHBOUR |= {_one: _other, _other: _one}

_IMMEDIATE_OPS = {"add", "sub", "and", "xor", "shl", "setp"}
_MEMORY_OPS = {"ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix"}


class Mutations(Sequence[Mutation]):
    """Mutants of a kernel; the PTX of each is made when it is asked for."""

    def __init__(self, text: str, edits: list[_Edit]):
        self._text = text
        self._edits = edits

    def __len__(self) -> int:
        return len(self._edits)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Mutations(self._text, self._edits[index])
        return _apply(self._text, self._edits[index])


def mutations(ptx_text: str, entry_name: str) -> Mutations:
    """Every mutant of the kernel, one change each, in the order of the PTX.

    `entry_name` is the kernel's name or a part of it that names no other kernel, as for
    `Module.launch`. Functions that the kernel calls are left alone. Lines keep their numbers.
    Raises PtxError when the kernel is not in the text.
    """
    return Mutations(ptx_text, list(_edits(ptx_text, entry_name)))


def sample(ptx_text: str, entry_name: str, count: int, seed: int) -> list[Mutation]:
    """`count` mutants (or all, when there are fewer), the same ones for the same seed.

    The kinds of change take turns, so that a kernel's few barriers and waits are not lost among
    its many addresses and immediates.
    """
    generator = random.Random(seed)
    edits = list(_edits(ptx_text, entry_name))
    by_kind: dict[str, list[int]] = {}
    for index, edit in enumerate(edits):
        by_kind.setdefault(edit.kind, []).append(index)
    turns = []
    for _, indices in sorted(by_kind.items()):
        generator.shuffle(indices)
        turns += list(enumerate(indices))
    turns.sort(key=lambda turn_and_index: turn_and_index[0])
    return [_apply(ptx_text, edits[index]) for index in sorted(i for _, i in turns[:count])]


def run_mutants(
    ptx_text: str,
    entry_name: str,
    check: Callable[[Module], bool],
    *,
    count: int | None = None,
    seed: int = 0,
    on_result: Callable[[Mutation, bool], None] | None = None,
) -> MutationReport:
    """Run `check` on mutants of the kernel and report which it noticed.

    `check(module)` executes the kernel and returns True when every result is right; it notices a
    mutant by returning False or by raising (PtxError, RaceError, AssertionError, ...). It launches
    with `max_steps` a small multiple of what the original needs, or a mutant that loops for ever
    takes minutes to be noticed. `count` mutants are sampled with `seed`; None runs all of them.
    `on_result(mutation, killed)` is called after each. Raises ValueError when the check does not
    pass on the unchanged PTX, for then its verdicts mean nothing.
    """
    module = Module(ptx_text)
    if not check(module):
        raise ValueError("check: expected True on the unchanged PTX, got False")
    if count is None:
        chosen = mutations(ptx_text, entry_name)
    else:
        chosen = sample(ptx_text, entry_name, count, seed)
    report = MutationReport([], [])
    for mutation in chosen:
        reason = None
        try:
            if not check(mutation.of(module, entry_name)):
                reason = "check returned False"
        except Exception as error:  # whatever a mutant breaks, it was noticed
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            report.survived.append(mutation)
        else:
            report.killed.append(Killed(mutation, reason))
        if on_result is not None:
            on_result(mutation, reason is not None)
    return report


def _apply(text: str, edit: _Edit) -> Mutation:
    lines = "\n" * text.count("\n", edit.start, edit.end)
    ptx = text[: edit.start] + edit.new + lines + text[edit.end :]
    change = f"{edit.kind}: {edit.old}"
    if edit.new:
        change += f" -> {edit.new}"
    line = text.count("\n", 0, edit.start) + 1
    return Mutation(change, line, ptx, edit.old, " ".join(edit.new.split()))


def _edits(text: str, entry_name: str) -> Iterator[_Edit]:
    """Edits of the kernel's statements; positions count characters of `text`."""
    # Comments become blanks of the same length, so that positions stay those of the original.
    code = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    position = code.index("{", _entry_position(code, entry_name))
    depth = 0
    while True:
        token = _TOKEN.match(code, position)
        if token is None:
            raise PtxError(f"{entry_name}: the kernel's body does not end")
        position = token.end()
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return
        if token.group().endswith(";"):
            statement = token.group()[:-1].rstrip()
            old = " ".join(statement.split())
            for kind, new in _variants(statement):
                # A dropped statement leaves its semicolon: an empty statement is legal PTX.
                yield _Edit(kind, token.start(), token.start() + len(statement), old, new)


def _entry_position(code: str, entry_name: str) -> int:
    entries = {match.group(1): match.end() for match in re.finditer(r"\.entry\s+([\w$]+)", code)}
    if entry_name in entries:
        return entries[entry_name]
    names = [name for name in entries if entry_name in name]
    if len(names) != 1:
        raise PtxError(f"entry_name: expected one of {sorted(entries)}, got {entry_name!r}")
    return entries[names[0]]


def _variants(statement: str) -> Iterator[tuple[str, str]]:
    """(kind of change, new statement) of one PTX statement; an empty one drops it."""
    match = _STATEMENT.fullmatch(statement)
    if match is None:  # a directive
        return
    guard, opcode = match["guard"] or "", match["opcode"]
    operands = split_commas(match["rest"])
    name, *modifiers = opcode.split(".")

    def rebuilt(position: int, operand: str) -> str:
        new = [*operands[:position], operand, *operands[position + 1 :]]
        return f"{guard}{opcode} {', '.join(new)}"

    def swapped(first: int, second: int) -> str:
        new = list(operands)
        new[first], new[second] = new[second], new[first]
        return f"{guard}{opcode} {', '.join(new)}"

    if guard:
        flipped = guard.replace("!", "") if "!" in guard else guard.replace("@", "@!")
        yield "flip predicate", flipped + statement[len(guard) :]
    if name in ("bar", "barrier") and "red" not in modifiers:
        yield "drop barrier", ""
    elif name == "cp" and "commit_group" in modifiers:
        yield "drop async commit", ""
    elif name == "cp" and ("wait_group" in modifiers or "wait_all" in modifiers):
        yield "drop async wait", ""
        if operands:
            yield "loosen async wait", rebuilt(0, str(int(operands[0], 0) + 1))
    elif name == "setp" and modifiers[0] in _NEIGHBOUR:
        rest = statement[len(guard) + len(f"setp.{modifiers[0]}") :]
        yield "change comparison", f"{guard}setp.{_NEIGHBOUR[modifiers[0]]}{rest}"
    if name in _MEMORY_OPS and "param" not in modifiers:
        steps = (4, 16) if _access_bytes(name, modifiers, operands) <= 4 else (16,)
        for position, operand in enumerate(operands):
            address = _ADDRESS.fullmatch(operand)
            for step in (sign * size for size in steps for sign in (1, -1)) if address else ():
                offset = int(address[2] or 0) + step
                yield "shift address", rebuilt(position, f"[{address[1]}+{offset}]")
    if name in _IMMEDIATE_OPS:
        for position, operand in enumerate(operands[1:], 1):
            literal = parse_literal(operand)
            if isinstance(literal, Integer):
                for new in (literal.value - 1, literal.value + 1):
                    if new >= 0 or name != "shl":
                        yield "change immediate", rebuilt(position, str(new))
    if name == "sub" and operands[1] != operands[2]:
        yield "swap operands", swapped(1, 2)
    elif (name == "fma" or (name == "mad" and "lo" in modifiers)) and operands[2] != operands[3]:
        yield "swap operands", swapped(2, 3)
    elif name == "mma":
        for position in (1, 2):
            registers = split_commas(operands[position].strip("{}"))
            for first in range(min(2, len(registers) - 1)):
                new = list(registers)
                new[first : first + 2] = reversed(new[first : first + 2])
                if new != registers:
                    yield "swap mma registers", rebuilt(position, "{" + ", ".join(new) + "}")


def _access_bytes(name: str, modifiers: list[str], operands: list[str]) -> int:
    """Bytes that one lane's access must be aligned to."""
    if name == "cp":
        size = parse_literal(operands[2]) if len(operands) > 2 else None
        return size.value if isinstance(size, Integer) else 16
    if name in ("ldmatrix", "stmatrix"):
        return 16
    vector = next(
        (int(modifier[1:]) for modifier in modifiers if modifier in ("v2", "v4", "v8")), 1
    )
    return vector * TYPE_BYTES.get(modifiers[-1], 4)
