"""Mutants that no test can notice, and why.

``tools/mutate.py`` asks about mutants that survived. An entry matches by kernel, change and line of
the source, never by a number of a line or a register, so that it holds when the code around it
changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Equivalent:
    """Patterns that a mutant's kernel, change and source are searched for, and the reason."""

    reason: str
    kernel: str = ""
    change: str = ""
    source: str = ""


EQUIVALENT = (
    Equivalent(
        "guards a loop that runs once at least, or does nothing where it runs for nothing",
        change=r"setp\.lt\.s(32|64) .*, 1 -> .*, 0$",
    ),
    Equivalent(
        "zero has no sign: its magnitude and its angle are the same either way",
        change=r"setp\.lt\.s(32|64) .*, 0 -> (setp\.le|.*, 1$)",
        source=r"\babs\(|llabs\(|shift < 0",
    ),
    Equivalent(
        "a distance, which is squared or made positive",
        change=r"swap operands: sub\.f32",
        source=r"difference = |fabsf\(",
    ),
    Equivalent(
        "every lane or thread has the same value, and any of them may write it",
        change=r"flip predicate|setp\.(ne|eq)\.s32 .*, 0 -> (setp\.(eq|ne)|.*, 1$)",
        source=r"\((lane|vector) == 0|thread == 0\)",
    ),
    Equivalent(
        "tells whether this is lane 0, and after the sum over the warp any lane may write it",
        kernel="key_deviation",
        change=r"and\.b32 .*, -32 -> .*, -31|sub\.s32|and\.b64 .*, 2305843009213693948 -> ",
        source=r"int32_t lane = |int64_t token = ",
    ),
    Equivalent(
        "where expf and logf part their argument; the parts make up for one another",
        change=r"swap operands: fma|change (immediate|comparison): (add|and|setp)\b",
        source=r"= expf\(|\+= expf\(|logf\(",
    ),
    Equivalent(
        "one more round of a loop whose body finds that there is nothing left",
        change=r"setp\.lt\.s32 .* -> setp\.le",
        source=r"first < p\.num_agents|pass < shape\.passes",
    ),
    Equivalent(
        "wide kernels have halves of the rotary dims of whole vectors: nothing to round up",
        kernel="_wide$",
        change=r"add\.s32 .*, 3 -> .*, 2$",
    ),
    Equivalent(
        "keeps a bit that is 0: the number is even",
        change=r"and\.b32 .*, -8 -> .*, -7$",
        source=r"\(rotary_dim / 2 \+ 3\)",
    ),
    Equivalent(
        "threads left over would do what others do as well, with the same result",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source=r"first_row >= (shape\.rows_of_pass|rows_at_once)|head_of_block >= tile\.heads",
    ),
    Equivalent(
        "no bit of a row beyond the page is set",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source=r"row >= block_size \|\|",
    ),
    Equivalent(
        "saves work for rows that nobody needs, for agents without any and for shifts of nothing",
        change=r"setp\.eq\.s32 .*, 0 -> .*, -1$",
        source=r"needed == 0|needed >> row|rows_of_agent == 0|rows\[agent\] == 0"
        r"|shifts\[agent\] == 0|own_rows == 0|num_agents == 0",
    ),
    Equivalent(
        "without ranges the last bound is 0, which no value is below",
        change=r"setp\.eq\.s32 .*, 0 -> .*, -1$",
        source=r"count == 0",
    ),
    Equivalent(
        "the page after the last range holds no row of it",
        change=r"setp\.le\.s32 .* -> setp\.lt",
        source=r"value >= __ldg\(indptr \+ count\)",
    ),
    Equivalent(
        "a search among one range ends at once, and ends where it began",
        change=r"setp\.lt\.s32 .*, 2 -> .*, 1$",
        source=r"high - low > 1",
    ),
    Equivalent(
        "warps that go over the same rows or agents twice, or lanes over the same words",
        change=r"add\.s32 .*, (256 -> .*, 255|8 -> .*, 7|32 -> .*, 31)$",
        source=r"kEncodeThreads|for \(",
    ),
    Equivalent(
        "warps, lanes and threads begin below the number of rows, tasks or vectors",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source=r"(row = thread / kWarpSize|index = lane|vector = thread % columns);|tasks = p\.num",
    ),
    Equivalent(
        "narrow kernels have no copies under way: their commits and waits are for none",
        kernel="_narrow$",
        change=r"async (commit|wait)",
    ),
)


def explanation(kernel: str, mutation: Any, source: str) -> str:
    """Why no test can notice this mutant; "" if that is not known."""
    for entry in EQUIVALENT:
        if (
            re.search(entry.kernel, kernel)
            and re.search(entry.change, mutation.description)
            and re.search(entry.source, source)
        ):
            return entry.reason
    return ""
