"""Mutates the PTX of the CUDA kernels, one small change at a time: do the tests notice?

    python -m tools.mutate                          the representative kernels of every operator
    python -m tools.mutate --operator diff_restore  those of one
    python -m tools.mutate --all --kernel f16       all variants whose name has "f16" in it
    python -m tools.mutate --sample 20 --seed 0     so many mutants, evenly from all operators

A mutant drops a barrier, a wait or a commit, flips a predicate, shifts an address, an immediate or
a bound by one, or swaps operands (tools/ptxrun, "Mutations"). It is killed when a case of
tests/kernel_cases.py fails: results that are not the reference's, an access out of bounds, a race,
a deadlock, or far more work than the original does. What survives is printed with its instruction
and the line of the source. A survivor that tools/equivalent_mutants.py explains cannot be noticed
by any test and counts apart. The exit status is 1 when less than 95 % of the others are killed for
some operator.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from tools import kernel_ptx
from tools.equivalent_mutants import explanation

import kernel_cases  # isort: skip
import ptx_backend  # isort: skip
from ptxrun.mutate import Mutation, Mutations, mutations  # isort: skip

WANTED = 0.95


def step_limit(steps: int) -> int:
    """Steps after which a mutant has taken far more than the original does."""
    return 4 * steps + 100


@dataclass
class Kernel:
    """A kernel, the cases that launch it, and PTX with all that they launch.

    Cases come with the steps that a launch may take, fastest first.
    """

    operator: str
    name: str
    cases: list[tuple[kernel_cases.Case, int]]
    ptx: str

    @property
    def short_name(self) -> str:
        return self.name.removeprefix(kernel_ptx.PREFIX)

    @functools.cached_property
    def mutations(self) -> Mutations:
        return mutations(self.ptx, self.name)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant. ``explanation``: why no test can notice it, "" if none is known."""

    kernel: str
    change: str
    source: str
    killed: bool
    explanation: str = ""


def kernels_of(operator: str, variants: Iterable[kernel_cases.Variant]) -> list[Kernel]:
    """The kernels that cases of the operator launch. The unchanged kernels pass every case."""
    backend = ptx_backend.PtxBackend()
    launched: dict[str, list[tuple[float, int, kernel_cases.Case, int]]] = {}
    together: dict[str, set[str]] = {}
    for index, case in enumerate(kernel_cases.cases_of(operator, variants)):
        case.run(backend)
        started = time.perf_counter()
        case.run(backend)
        seconds = time.perf_counter() - started
        plan = backend.launched
        names = {launch.name.decode() for launch in plan.launches[: plan.num_launches]}
        limit = step_limit(max(stats.steps for stats in backend.stats))
        for name in names:
            launched.setdefault(name, []).append((seconds, index, case, limit))
            together.setdefault(name, set()).update(names)
    ptx = ptx_backend.ptx_of(operator)
    return [
        Kernel(
            operator,
            name,
            [entry[2:] for entry in sorted(launched[name], key=lambda entry: entry[:2])],
            kernel_ptx.only_kernels(ptx, together[name]),
        )
        for name in sorted(launched)
    ]


def is_killed(kernel: Kernel, ptx: str) -> bool:
    """Whether some case fails with this PTX."""
    backend = ptx_backend.PtxBackend(ptx={kernel.operator: ptx}, stats=False)
    try:
        for case, max_steps in kernel.cases:
            backend.options["max_steps"] = max_steps
            case.run(backend)
    except Exception:  # whatever a mutant breaks, it was noticed
        return True
    return False


def judge(kernel: Kernel, mutation: Mutation, lines: kernel_ptx.SourceLines) -> Verdict:
    """Runs a mutant."""
    killed = is_killed(kernel, mutation.ptx)
    source = lines(mutation.line)
    reason = "" if killed else explanation(kernel.short_name, mutation, source)
    return Verdict(kernel.short_name, mutation.description, source, killed, reason)


def sampled(kernels: list[Kernel], count: int, seed: int) -> list[tuple[Kernel, list[int]]]:
    """Indices of mutants of each kernel: `count` in all, as many of one operator as of another."""
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
    return [(kernel, sorted(chosen[kernel.name])) for kernel in kernels]


_here: tuple[Kernel, kernel_ptx.SourceLines]  # of a process that runs mutants


def _judge_one(index: int) -> Verdict:
    kernel, lines = _here
    return judge(kernel, kernel.mutations[index], lines)


def verdicts(kernel: Kernel, indices: Iterable[int], jobs: int = 1) -> Iterator[Verdict]:
    """Runs the mutants of these indices, in order."""
    global _here
    _here = kernel, kernel_ptx.SourceLines(kernel.ptx + _files(kernel.operator))
    if jobs == 1:
        yield from map(_judge_one, indices)
        return
    with get_context("fork").Pool(jobs) as pool:  # forked: cases need not be made again
        yield from pool.imap(_judge_one, indices, chunksize=4)


def _files(operator: str) -> str:
    """The names of source files, which stand at the end of the PTX."""
    lines = ptx_backend.ptx_of(operator).split("\n")
    return "\n" + "\n".join(line for line in lines if ".file" in line)


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
    parser.add_argument("--sample", type=int, help="so many mutants instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
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
        chosen = [(kernel, list(range(len(kernel.mutations)))) for kernel in kernels]
    else:
        chosen = sampled(kernels, options.sample, options.seed)

    of_operator: dict[str, Counter[str]] = {operator: Counter() for operator in options.operator}
    lines: list[str] = []
    for kernel, indices in chosen:
        counts: Counter[str] = Counter()
        for verdict in verdicts(kernel, indices, options.jobs):
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
