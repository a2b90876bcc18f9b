"""Mutates the PTX of the CUDA kernels, one small change at a time: do the tests notice?

    python -m tools.mutate                          the representative kernels of every operator
    python -m tools.mutate --operator diff_restore  those of one
    python -m tools.mutate --all --kernel f16       all variants whose name has "f16" in it
    python -m tools.mutate --source has_angles      mutants of lines of the source with this in them
    python -m tools.mutate --sample 20 --seed 0     so many mutants, evenly from all operators
    python -m tools.mutate --verdicts build/mutants.jsonl    goes on where an earlier run ended

A mutant drops a barrier, a wait or a commit, flips a predicate, shifts an address, an immediate or
a bound by one, or swaps operands (tools/ptxrun, "Mutations"). It is killed when a case of
tests/kernel_cases.py fails: results that are not the reference's, an access out of bounds, a race,
a deadlock, or far more work than the original does. Cases that do not execute the instruction are
left out. What survives is printed with its instruction and the line of the source. A survivor that
tools/equivalent_mutants.py explains cannot be noticed by any test and counts apart; of the cases it
is run in the shortest few alone, enough to find an explanation that says too much. The exit status
is 1 when less than 95 % of the others are killed for some operator.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from tools import kernel_ptx
from tools.equivalent_mutants import explanation

import kernel_cases  # isort: skip
import ptx_backend  # isort: skip
from ptxrun import Module
from ptxrun.mutate import Mutation, Mutations, mutations

WANTED = 0.95
FEW = 3  # cases of a mutant that is explained


def step_limit(steps: int) -> int:
    """Steps after which a mutant has taken far more than the original does."""
    return 4 * steps + 100


@dataclass
class MeasuredCase:
    """A case with the steps that a mutant may take, the positions of the kernel's instructions that
    it executes, and how many mutants failed it so far."""

    case: kernel_cases.Case
    max_steps: int
    executed: frozenset[int]
    kills: int = 0

    @property
    def kills_per_step(self) -> float:
        return (self.kills + 1) / self.max_steps


@dataclass
class Kernel:
    """A kernel, the cases that launch it, and PTX with all that they launch."""

    operator: str
    name: str
    cases: list[MeasuredCase]
    ptx: str

    @property
    def short_name(self) -> str:
        return self.name.removeprefix(kernel_ptx.PREFIX)

    @functools.cached_property
    def mutations(self) -> Mutations:
        return mutations(self.ptx, self.name)

    @functools.cached_property
    def module(self) -> Module:
        return Module(self.ptx)

    @functools.cached_property
    def _positions(self) -> dict[int, list[int]]:
        """Of the instructions on a line of the PTX."""
        found: dict[int, list[int]] = {}
        for instruction in self.module.instructions(self.name):
            found.setdefault(instruction.line, []).append(instruction.position)
        return found

    def cases_of(self, mutation: Mutation, explained: bool) -> list[MeasuredCase]:
        """Cases that execute the mutated instruction: the shortest few, if that is explained."""
        positions = self._positions[mutation.line]
        found = [each for each in self.cases if not each.executed.isdisjoint(positions)]
        return sorted(found, key=lambda each: each.max_steps)[: FEW if explained else None]

    @functools.cached_property
    def digest(self) -> str:
        """Of the kernel's own instructions: other kernels and lines of the source may change, and
        where the source lies, which nvcc hashes into the names of inlined functions that stand
        behind the last kernel."""
        text = self.ptx[self.ptx.index(f".entry {self.name}(") :]
        text = text[: text.index("\n}")]
        text = re.sub(r"^\s*(\.loc|//).*|\s+$", "", text, flags=re.M)
        text = re.sub(r"\$L__BB\d+_", "$L__BB_", text)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    ``killed_by`` is the case that failed, "" if none did; ``explanation`` is why no test can notice
    it, "" if that is not known.
    """

    kernel: str
    index: int
    change: str
    source: str
    killed_by: str
    explanation: str = ""

    @property
    def killed(self) -> bool:
        return self.killed_by != ""


class Verdicts:
    """Verdicts of this run and of earlier ones, in a file of a JSON object a line.

    A killed mutant is not run again while its kernel's instructions are the same, and one that
    survived only in cases that it has not passed. Cases are known by name: begin another file when
    the data of one have changed.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._killed_by: dict[tuple[str, str, int], str] = {}
        self._passed: dict[tuple[str, str, int], set[str]] = {}
        for line in path.read_text().splitlines() if path and path.exists() else ():
            entry = json.loads(line)
            key = entry["kernel"], entry["ptx"], entry["mutant"]
            self._killed_by[key] = entry["killed_by"]
            self._passed[key] = set(entry["passed"])

    def killed_by(self, kernel: Kernel, index: int) -> str:
        return self._killed_by.get((kernel.name, kernel.digest, index), "")

    def passed(self, kernel: Kernel, index: int) -> set[str]:
        """Names of cases that a survivor has passed."""
        return self._passed.get((kernel.name, kernel.digest, index), set())

    def add(self, kernel: Kernel, verdict: Verdict) -> None:
        key = kernel.name, kernel.digest, verdict.index
        known = self._killed_by.get(key), self._passed.get(key, set())
        cases = kernel.cases_of(kernel.mutations[verdict.index], verdict.explanation != "")
        passed = set() if verdict.killed else known[1] | {each.case.name for each in cases}
        if self._path is None or (known[0] == verdict.killed_by and known[1] >= passed):
            return
        entry = {
            "kernel": kernel.name,
            "ptx": kernel.digest,
            "mutant": verdict.index,
            "change": verdict.change,
            "source": verdict.source,
            "killed_by": verdict.killed_by,
            "passed": sorted(passed),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def kernels_of(operator: str, variants: Iterable[kernel_cases.Variant]) -> list[Kernel]:
    """The kernels that cases of the operator launch. The unchanged kernels pass every case."""
    backend = ptx_backend.PtxBackend(stats=False)
    launched: dict[str, list[MeasuredCase]] = {}
    together: dict[str, set[str]] = {}
    for case in kernel_cases.cases_of(operator, variants):
        backend.reached.clear()
        case.run(backend)
        plan = backend.launched
        names = {launch.name.decode() for launch in plan.launches[: plan.num_launches]}
        limit = step_limit(max(stats.steps for stats in backend.stats))
        for name in names:
            executed = frozenset(backend.reached[name].instructions)
            launched.setdefault(name, []).append(MeasuredCase(case, limit, executed))
            together.setdefault(name, set()).update(names)
    ptx = ptx_backend.ptx_of(operator)
    return [
        Kernel(operator, name, launched[name], kernel_ptx.only_kernels(ptx, together[name]))
        for name in sorted(launched)
    ]


def killing_case(kernel: Kernel, mutation: Mutation, cases: Iterable[MeasuredCase]) -> str:
    """The name of one of these cases that fails with a mutant, "" if none does.

    First come those that are short and have killed many.
    """
    module = mutation.of(kernel.module, kernel.name)
    backend = ptx_backend.PtxBackend(modules={kernel.operator: module}, stats=False)
    for measured in sorted(cases, key=lambda each: -each.kills_per_step):
        backend.options["max_steps"] = measured.max_steps
        try:
            measured.case.run(backend)
        except Exception:  # whatever a mutant breaks, it was noticed
            measured.kills += 1
            return measured.case.name
    return ""


def judge(
    kernel: Kernel, index: int, lines: kernel_ptx.SourceLines, known: Verdicts | None = None
) -> Verdict:
    """Runs a mutant, unless its verdict is known."""
    known = known or Verdicts()
    mutation = kernel.mutations[index]
    source = lines(mutation.line)
    killed_by, reason = known.killed_by(kernel, index), ""
    if not killed_by:
        reason = explanation(kernel.short_name, mutation, source)
        passed = known.passed(kernel, index)
        cases = kernel.cases_of(mutation, reason != "")
        killed_by = killing_case(
            kernel, mutation, [each for each in cases if each.case.name not in passed]
        )
        reason = "" if killed_by else reason
    return Verdict(kernel.short_name, index, mutation.description, source, killed_by, reason)


def of_lines(kernel: Kernel, pattern: str) -> list[int]:
    """Indices of the mutants of lines of the source, as they are printed, that have the pattern."""
    lines = source_lines(kernel)
    return [
        index
        for index, mutation in enumerate(kernel.mutations)
        if re.search(pattern, lines(mutation.line))
    ]


def sampled(kernels: list[Kernel], count: int, seed: int) -> list[tuple[Kernel, list[int]]]:
    """Indices of mutants of kernels: `count` in all, as many of one operator as of another."""
    generator = random.Random(seed)
    operators = sorted({kernel.operator for kernel in kernels})
    chosen: dict[str, list[int]] = {kernel.name: [] for kernel in kernels}
    for turn, operator in enumerate(operators):
        share = count // len(operators) + (turn < count % len(operators))
        every = [
            (kernel.name, index)
            for kernel in kernels
            if kernel.operator == operator
            for index in range(len(kernel.mutations))
        ]
        for name, index in generator.sample(every, min(share, len(every))):
            chosen[name].append(index)
    return [(kernel, sorted(chosen[kernel.name])) for kernel in kernels if chosen[kernel.name]]


_here: tuple[Kernel, kernel_ptx.SourceLines, Verdicts]  # of a process that runs mutants


def _judge_one(index: int) -> Verdict:
    kernel, lines, known = _here
    return judge(kernel, index, lines, known)


def verdicts(
    kernel: Kernel, indices: Iterable[int], jobs: int = 1, known: Verdicts | None = None
) -> Iterator[Verdict]:
    """Runs the mutants of these indices, in order, and adds to the known verdicts."""
    global _here
    known = known or Verdicts()
    _here = kernel, source_lines(kernel), known
    if jobs == 1:
        for verdict in map(_judge_one, indices):
            known.add(kernel, verdict)
            yield verdict
        return
    with get_context("fork").Pool(jobs) as pool:  # forked: cases need not be made again
        for verdict in pool.imap(_judge_one, indices, chunksize=4):
            known.add(kernel, verdict)
            yield verdict


def source_lines(kernel: Kernel) -> kernel_ptx.SourceLines:
    """With the names of source files, which stand at the end of the operator's PTX."""
    lines = ptx_backend.ptx_of(kernel.operator).split("\n")
    return kernel_ptx.SourceLines("\n".join([kernel.ptx, *(x for x in lines if ".file" in x)]))


def summary(name: str, counts: Counter[str]) -> str:
    judged = counts["killed"] + counts["survived"]
    share = f"{counts['killed'] / judged:.1%}" if judged else "-"
    numbers = (sum(counts.values()), counts["killed"], counts["survived"], counts["equivalent"])
    return f"{name:46}" + "".join(f" {number:10}" for number in numbers) + f" {share:>8}"


def header() -> str:
    columns = ("mutants", "killed", "survived", "equivalent")
    return f"{'kernel':46}" + "".join(f" {column:>10}" for column in columns) + f" {'killed':>8}"


def outcome(verdict: Verdict) -> str:
    if verdict.killed:
        return "killed"
    return "equivalent" if verdict.explanation else "survived"


def described(verdict: Verdict) -> str:
    """A survivor."""
    reason = f"equivalent: {verdict.explanation}" if verdict.explanation else "SURVIVED"
    return f"{verdict.kernel}: {verdict.change}\n    {verdict.source}\n    {reason}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutate", description=__doc__.split("\n")[0]
    )
    names = kernel_ptx.operators()
    parser.add_argument("--operator", nargs="+", default=names, choices=names)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--all", action="store_true", help="all variants, not representative ones")
    parser.add_argument("--source", default="", help="pattern of the lines of the source")
    parser.add_argument("--sample", type=int, help="so many mutants instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--verdicts", type=Path, help="file of verdicts: what it has is not run again, others join"
    )
    options = parser.parse_args(arguments)
    if reason := ptx_backend.PtxBackend.missing():
        parser.error(reason)
    torch.set_num_threads(1)
    variants = kernel_cases.ALL if options.all else kernel_cases.REPRESENTATIVE
    kernels = [
        kernel
        for operator in options.operator
        for kernel in kernels_of(operator, variants)
        if options.kernel in kernel.name
    ]
    if options.sample is None:
        chosen = [(kernel, of_lines(kernel, options.source)) for kernel in kernels]
    else:
        chosen = sampled(kernels, options.sample, options.seed)

    of_operator: dict[str, Counter[str]] = {operator: Counter() for operator in options.operator}
    lines: list[str] = []
    known = Verdicts(options.verdicts)
    for kernel, indices in chosen:
        counts: Counter[str] = Counter()
        for verdict in verdicts(kernel, indices, options.jobs, known):
            counts[outcome(verdict)] += 1
            if not verdict.killed:
                print(described(verdict), flush=True)
        of_operator[kernel.operator] += counts
        lines.append(summary(kernel.short_name, counts))
    print(header(), *lines, "", sep="\n")
    for operator, counts in of_operator.items():
        print(summary(operator, counts))
    judged = [(c["killed"], c["killed"] + c["survived"]) for c in of_operator.values()]
    return 1 if any(killed < WANTED * total for killed, total in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
