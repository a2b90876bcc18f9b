"""What the cases of tests/kernel_cases.py never reach in the PTX of the CUDA kernels.

    python -m tools.coverage                    the representative kernels of every operator
    python -m tools.coverage --operator diff_encode --all

One line per kernel: its instructions, how many of them no case executes, the ways of its
conditional jumps (two each), and how many no case takes. Below stands each with the line of the
source, but for those that ``UNREACHABLE`` explains. The exit status is 1 when there are others.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tools import kernel_ptx

import kernel_cases  # isort: skip
import ptx_backend  # isort: skip


@dataclass(frozen=True)
class Unreachable:
    """Patterns that a text, a line of the source and a kernel are searched for, and the reason."""

    reason: str
    text: str = ""
    source: str = ""
    kernel: str = ""


UNREACHABLE = (
    Unreachable(
        "a loop that runs once at least: plans launch nothing where there is nothing to do",
        text=r"setp\.lt\.s(32|64) %\w+, %\w+, 1;.*always goes on",
        source=r"for \(|if \(item < items\)",
    ),
    Unreachable(
        "a loop that every thread enters: it begins at a warp, a lane or a thread of which there"
        " are not more than rows, tasks or vectors",
        text=r"setp\.ge\.s32 .*always goes on",
        source=r"int32_t (row = thread / kWarp|index = lane|vector = thread % columns|item = 2)",
    ),
    Unreachable(
        "what does not fit into one low tile meets tall ones, where a kernel has them",
        text=r"^bar\.sync 0|setp\.eq\.s32 %\w+, %\w+, 0;.*always jumps"
        r"|setp\.lt\.s32 .*always goes on",
        source=r"if \(first > 0\) __syncthreads|first < queries_of",
        kernel=r"collective_attention_b?f16_d(64|128)$",
    ),
    Unreachable(
        "rows that go to their own places have one destination",
        text=r"setp\.eq\.s64 %\w+, %\w+, 0;.*always goes on",
        source=r"p\.row_out \? __ldg",
    ),
    Unreachable(
        "a search among no agents: without agents nothing is launched",
        text=r"setp\.eq\.s32 %\w+, %\w+, 0;.*always goes on",
        source=r"if \(count == 0",
    ),
    Unreachable(
        "the first of a thread's rows, which finds its angles: there are none before",
        text=r"and\.pred %\w+, %\w+, %\w+;.*always goes on",
        source=r"if \(turns_row && share\.rotates",
    ),
    Unreachable(
        "more partials than a thread asks for at once, and results that are not aligned: the cases"
        " of merge_states reach these lines of the function that both share",
        source=r"^(merge|vector_io|ptx)\.cuh",
        kernel="collective_attention_merge",
    ),
    Unreachable(
        "logf of less than a normal number, of infinity or NaN: the sum is 1 at least and finite",
        text=r"0f7F800000|fma\.rn\.f32|setp\.lt\.u32 %\w+, %\w+, 2139095040;.*always jumps",
        source=r"logf\(sum\)",
    ),
)


@dataclass(frozen=True)
class Missing:
    """An instruction that no case executes, or a way of a jump that none takes."""

    what: str
    source: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Of one kernel."""

    kernel: str
    instructions: int
    never_executed: list[Missing]
    ways: int
    never_taken: list[Missing]

    @property
    def unexplained(self) -> list[Missing]:
        return [missing for missing in self.never_executed + self.never_taken if not missing.reason]

    def line(self) -> str:
        numbers = (
            self.instructions,
            len(self.never_executed),
            self.ways,
            len(self.never_taken),
            len(self.unexplained),
        )
        return f"{self.kernel:46}" + "".join(f" {number:12}" for number in numbers)


def header() -> str:
    columns = ("instructions", "not executed", "ways", "not taken", "unexplained")
    return f"{'kernel':46}" + "".join(f" {column:>12}" for column in columns)


def explanation(text: str, source: str, kernel: str = "") -> str:
    """Why nothing can get there; "" if that is not known."""
    for entry in UNREACHABLE:
        if (
            re.search(entry.text, text)
            and re.search(entry.source, source)
            and re.search(entry.kernel, kernel)
        ):
            return entry.reason
    return ""


def coverage(operator: str, variants: Iterable[kernel_cases.Variant]) -> list[Coverage]:
    """Of the kernels that the operator's cases launch."""
    backend = ptx_backend.PtxBackend(stats=False)
    for case in kernel_cases.cases_of(operator, variants):
        case.run(backend)
    lines = kernel_ptx.SourceLines(ptx_backend.ptx_of(operator))
    found = []
    for name, reached in sorted(backend.reached.items()):
        instructions = backend.module(operator).instructions(name)

        def missing(what: str, line: int, kernel: str = name) -> Missing:
            return Missing(what, lines(line), explanation(what, lines(line), kernel))

        conditions = _conditions(instructions)
        jumps = [each for each in instructions if each.opcode == "bra" and each.predicate]
        found.append(
            Coverage(
                name.removeprefix(kernel_ptx.PREFIX),
                len(instructions),
                [
                    missing(each.text, each.line)
                    for each in instructions
                    if each.position not in reached.instructions
                ],
                2 * len(jumps),
                [
                    missing(
                        f"{conditions[each.position]}; {each.text}:"
                        f" always {'goes on' if jumped else 'jumps'}",
                        each.line,
                    )
                    for each in jumps
                    for jumped in (True, False)
                    if each.position in reached.instructions
                    and (each.position, jumped) not in reached.branches
                ],
            )
        )
    return found


def _conditions(instructions: list[Any]) -> dict[int, str]:
    """By position of a conditional jump, the instruction that wrote its predicate last."""
    written: dict[str, str] = {}
    conditions = {}
    for each in instructions:
        if each.opcode == "bra" and each.predicate:
            conditions[each.position] = written.get(each.predicate[0].name, "")
        elif each.operands:
            for name in re.findall(r"%p\d+", each.text.split(",")[0]):
                written[name] = each.text
    return conditions


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.coverage", description=__doc__.split("\n")[0]
    )
    names = kernel_ptx.operators()
    parser.add_argument("--operator", nargs="+", default=names, choices=names)
    parser.add_argument("--all", action="store_true", help="all variants, not representative ones")
    options = parser.parse_args(arguments)
    if reason := ptx_backend.PtxBackend.missing():
        parser.error(reason)
    torch.set_num_threads(1)
    variants = kernel_cases.ALL if options.all else kernel_cases.REPRESENTATIVE
    print(header())
    found = []
    for operator in options.operator:
        for kernel in coverage(operator, variants):
            print(kernel.line(), flush=True)
            found.append(kernel)
    for kernel in found:
        for missing in kernel.unexplained:
            print(f"\n{kernel.kernel}: {missing.what}\n    {missing.source}")
    reasons = sorted(
        {m.reason for k in found for m in k.never_executed + k.never_taken if m.reason}
    )
    print(*(f"\nNever reached: {reason}" for reason in reasons), sep="")
    return 1 if any(kernel.unexplained for kernel in found) else 0


if __name__ == "__main__":
    sys.exit(main())
