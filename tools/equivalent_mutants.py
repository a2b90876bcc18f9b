"""Mutants that no test can notice, and why.

``tools/mutate.py`` asks about mutants that survived. An entry matches by kernel, change and line of
the source, never by a number of a line or a register, so that it holds when the code around it
changes. What the mutated instruction works on is looked up in the PTX: ``operands`` are the
instructions that define its registers.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from ptxrun.lexer import parse_literal
from ptxrun.program import Integer

from tools import kernel_ptx


@dataclass(frozen=True)
class Equivalent:
    """Patterns that a mutant's kernel, change, source and operands are searched for, and why;
    ``above``: one that the statement before is searched for."""

    reason: str
    change: str
    source: str
    kernel: str = ""
    operands: str = ""
    above: str = ""
    only_compared_with_0: bool = False  # the result; other uses do not read what a mask changes


IS_0 = r"setp\.(ne|eq)\.s32 %\w+, %\w+, 0"
OTHER_THAN_0 = (
    r"(setp\.ne\.s32 (\S+ \S+), 0 -> (setp\.eq\.s32\s+\2, 0|setp\.ne\.s32\s+\2, 1)"
    r"|setp\.eq\.s32 (\S+ \S+), 0 -> (setp\.ne\.s32\s+\4, 0|setp\.eq\.s32\s+\4, 1))$"
)
ONE_WRITES = r"if \((lane|vector|dim) == 0[ )]|&& thread == 0\)|if \(lane % 4 == 0\) "
NUM_AGENTS = r"ld\.param\.(u32 %\w+|v2\.u32 \{%\w+, ?%\w+\}), \[%\w+\+8\]"  # of key_deviation
# Whether a pointer of rope_rotate is another than null, where none is 1 or -1.
OTHER_POINTER = r"setp\.(eq|ne)\.s64 (\S+ \S+), 0 -> setp\.\1\.s64 \2, -?1$"
POINTER = r"^ld\.param\.u64 %\w+, \[%\w+\+-"
POSITION_TO = rf"{POINTER}20\]"

EQUIVALENT = (
    # Lookups
    Equivalent(
        "an entry of the Master that is looked for has been returned before",
        change=r"setp\.lt\.s32 .* -> setp\.le\.s32",
        source=r"if \(entry\.x < master\)",
    ),
    Equivalent(
        "no agent has an entry of Master -1, so that the search finds none, either",
        kernel="diff_restore",
        change=r"setp\.lt\.s32 \S+ \S+, 0 -> setp\.lt\.s32 \S+ \S+, -1$",
        source=r"source\.master < 0",
    ),
    Equivalent(
        "without rotary dims a query that turns stands as it stood",
        kernel="collective_attention",
        change=r"setp\.(eq|ne)\.s32 (\S+ \S+), 0 -> setp\.\1\.s32\s+\2, (-1|1)$",
        source=r"p\.rope\.rotary_dim == 0 \? 0 : shift",
    ),
    # Loops and bounds
    Equivalent(
        "the loop runs once at least: with nothing to do plans launch nothing, and blocks leave",
        change=r"setp\.lt\.s(32|64) \S+ \S+, 1 -> setp\.lt\.s\1 \S+ \S+, 0$",
        source=r"for \(int32_t (layer = 0; layer < p\.num_layers|j = 0; j < p\.destinations"
        r"|agent = 0; agent < source\.num_agents|pass = 0; pass < shape\.passes)"
        r"|if \(item < items\) load|uint32_t live = page_exists",
    ),
    Equivalent(
        "one more round, whose rows are beyond the page",
        change=r"setp\.lt\.s32 \S+ \S+ %\w+ -> setp\.le",
        source=r"pass < shape\.passes",
    ),
    Equivalent(
        "threads left over would do what others do as well, with the same result",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source=r"first_row >= (shape\.rows_of_pass|rows_at_once)|head_of_block >= tile\.heads",
    ),
    Equivalent(
        "there are not more warps than rows, nor more columns than vectors: none begins at the end",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source=r"int32_t (row = thread / kWarpSize; row < block_size|vector = thread % columns;)",
    ),
    Equivalent(
        "threads or warps that do again what their neighbours do, with the same result",
        kernel="diff_encode_compare",
        change=r"add\.s32 .*, (256 -> .*, 255|8 -> .*, 7|32 -> .*, 31)$",
        source=r"\+= kEncodeThreads|index < tasks; index \+= kWarpSize",
    ),
    Equivalent(
        "lanes that compute the angle of a pair again",
        change=r"add\.s32 .*, 32 -> .*, 31$",
        source=r"for \(int32_t pair = lane; pair < half; pair \+= 32\)",
    ),
    Equivalent(
        "no bit of a row beyond the page is set",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source=r"row >= block_size \|\|",
    ),
    Equivalent(
        "the page after the last range holds no row of it",
        change=r"setp\.le\.s32 .* -> setp\.lt",
        source=r"value >= __ldg\(indptr \+ count\)",
    ),
    Equivalent(
        "without ranges the last bound is 0, which no value is below",
        change=r"setp\.eq\.s32 .*, 0 -> .*, -1$",
        source=r"value >= __ldg\(indptr \+ count\)",
    ),
    Equivalent(
        "a search among one range ends at once, and ends where it began",
        change=r"setp\.lt\.s32 .*, 2 -> .*, 1$",
        source=r"high - low > 1",
    ),
    Equivalent(
        "an agent without own rows has no page that a chunk could name",
        kernel="collective_attention",
        change=r"setp\.eq\.s32 .*, 0 -> .*, -1$",
        source=r"count == 0 \|\| __ldg\(positions \+ count - 1\) <= position",
    ),
    Equivalent(
        "a search that begins with one candidate more, the number of rows, and never asks about it",
        kernel="collective_attention",
        change=r"add\.s32 .*, -1 -> .*, 0$",
        source=r"int32_t low = 0, high = count - 1;",
    ),
    Equivalent(
        "the key of an agent that is not there, whose number is 0, is asked for and not compared:"
        " the loop ends, or begins with keys that are not there",
        kernel="key_deviation",
        change=r"setp\.(gt\.s32 (\S+ \S+), 0 -> (setp\.ge\.s32\s+\2, 0|setp\.gt\.s32 \2, -1)"
        r"|lt\.s32 (\S+ \S+), 1 -> setp\.lt\.s32 \4, 0)$",
        source="",
        operands=NUM_AGENTS,
    ),
    Equivalent(
        "the key of the agent after the last is asked for and not compared: the loop ends, or does"
        " one more round of keys that are not there",
        kernel="key_deviation",
        change=r"setp\.(gt\.s32 .* -> setp\.ge|lt\.s32 .* -> setp\.le)",
        source=r"agent < p\.num_agents|first < p\.num_agents",
        operands=rf"({NUM_AGENTS}\n)?add\.s32 %\w+, %\w+, 2(\n{NUM_AGENTS})?$",
    ),
    Equivalent(
        "the key of the agent after the last is asked for and not compared: the loop ends",
        kernel="key_deviation",
        change=r"add\.s32 (\S+), (?!\1)\S+, 2 -> .*, 1$",
        source=r"agent < p\.num_agents|following = first \+ kAgentsAhead",
    ),
    # Moves without positions or numbers of rows
    Equivalent(
        "without positions all are 0, and so is the shift, which every table has",
        kernel="rope_rotate",
        change=OTHER_POINTER,
        source=r"has_angles = !p\.position_to",
        operands=POSITION_TO,
    ),
    Equivalent(
        "without numbers of rows there is one destination; those of others are not asked for",
        kernel="rope_rotate",
        change=OTHER_POINTER,
        source=r"return \{p\.row_out \?",
        operands=rf"{POINTER}36\]",
        above=r"^@%\w+ bra",  # whether there is another destination
    ),
    Equivalent(
        "without positions nothing turns: fp32 is not converted, and in the interpreter fp16 comes"
        " back from fp32 with all its bits",
        kernel="rope_rotate_(f32|f16)_(half|interleaved)",
        change=OTHER_POINTER,
        source=r"head \* p\.out_layout\.head_stride",
        operands=POSITION_TO,
    ),
    Equivalent(
        "rows without positions have been copied",
        kernel="rope_rotate_(f32|f16|bf16)_(half|interleaved)",
        change=OTHER_POINTER,
        source=r"task\.rotates = ",
        operands=POSITION_TO,
    ),
    Equivalent(
        "tasks that do not rotate have been copied",
        kernel="rope_rotate_(f32|f16|bf16)_(half|interleaved)",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source=r"task\.rotates = ",
        operands=r"^mov\.u32 %\w+, %tid\.x",
    ),
    Equivalent(
        "the last destination is written again, with the same result",
        kernel="rope_rotate",
        change=r"setp\.lt\.s32 .* -> setp\.le",
        source=r"j \+ 1 < p\.destinations",
    ),
    # Agents in a tile
    Equivalent(
        "agent 0 is always the first that is under way, and not among those that follow",
        kernel="diff_encode_compare",
        change=r"setp\.(lt\.s32 (\S+ \S+), 0 -> (setp\.le\.s32|setp\.lt\.s32 \2, 1$)"
        r"|gt\.s32 (\S+ \S+), -1 -> setp\.gt\.s32 \4, 0$)",
        source=r"if \(i > 0 && in\.agent < 0\) break|while \(ahead\[0\]\.agent >= 0\)",
    ),
    Equivalent(
        "an agent is compared twice, with the same result",
        kernel="diff_encode_compare",
        change=r"add\.s32 .*, -1 -> .*, 0$",
        source=r"rest &= rest - 1|vector\.words\[0\] = |words = \*reinterpret_cast|^$",
        operands=r"^(ld\.shared\.u32 |and\.b32 |mov\.u32 %\w+, 0$)",
    ),
    Equivalent(
        "bit 0 is of the first agent, which has been asked for: the lowest bit that is set goes",
        kernel="diff_encode_compare",
        change=r"add\.s32 .*, -1 -> .*, -2$",
        source=r"rest &= rest - 1",
        operands=r"^(and\.b32 |mov\.u32 %\w+, 0$)",
    ),
    # Merging
    Equivalent(
        "the number of the partial after the last is not looked at",
        kernel="merge_states",
        change=r"setp\.lt\.s32 .* -> setp\.le",
        source=r"if \(i < m\.end\) number\[j\] = ",
    ),
    Equivalent(
        "elements have 2 bytes at least: no address is odd",
        kernel="merge",
        change=r"and\.b64 .*, 15 -> .*, 14$",
        source=r"reinterpret_cast<uintptr_t>\(out\) % kBytes == 0",
    ),
    Equivalent(
        "elements are stored one by one where all could be at once, with the same result",
        kernel="merge",
        change=r"setp\.(eq|ne)\.s64 (\S+ \S+), 0 -> setp\.\1\.s64 \2, -?1$",
        source=r"reinterpret_cast<uintptr_t>\(out\) % kBytes == 0",
    ),
    # What only saves work
    Equivalent(
        "saves work for rows that nobody needs, for agents without any and for shifts of nothing",
        change=r"setp\.eq\.s32 .*, 0 -> .*, -1$",
        source=r"needed == 0\)|needed >> row|rows_of_agent == 0\)"
        r"|shifts\[agent\] == 0|source\.num_agents == 0",
    ),
    Equivalent(
        "a barrier more, before the first tile",
        kernel="collective_attention",
        change=r"setp\.eq\.s32 .*, 0 -> .*, -?1$",
        source=r"if \(first > 0\) __syncthreads\(\)",
    ),
    Equivalent(
        "barriers of the block lie between the last use of the queries and their turn, and before"
        " the next use",
        kernel="collective_attention",
        change=r"drop barrier: bar\.warp\.sync",
        source=r"__syncwarp\(\);  // all lanes (are done with what stood there|see the queries)",
    ),
    Equivalent(
        "barriers of the block lie between the last use of the queries and outputs in their place",
        kernel="collective_attention",
        change=r"drop barrier: bar\.warp\.sync",
        source=r"__syncwarp\(\);  // all lanes are done with the queries",
    ),
    Equivalent(
        "a row of the tile before is done again, with the same result",
        kernel="collective_attention",
        change=r"add\.s32 .*, (64 -> .*, 63|32 -> .*, 31|128 -> .*, 127)$",
        source=r"for \(int32_t first = 0;; first \+= Block::kShape\.rows\)",
    ),
    Equivalent(
        "what an item of partials writes as its output, the merge writes over",
        kernel="collective_attention",
        change=r"setp\.gt\.s32 .*, -1 -> .*, 0$",
        source=r"if \(partial_begin < 0\) write_output",
    ),
    Equivalent(
        "the four lanes of a row have the same LSE, and two of them write it",
        kernel="collective_attention",
        change=r"and\.b32 .*, 3 -> .*, 2$",
        source="",
        operands=r"^and\.b32 %\w+, %\w+, 31$",
        only_compared_with_0=True,
    ),
    Equivalent(
        "a tile that begins where the warp sees nothing yet changes neither sums nor maximum",
        kernel="collective_attention",
        change=r"add\.s32 .*, (63 -> .*, 64|31 -> .*, 32|15 -> .*, 16)$",
        source=r"sight\.low <= min\(tile\.last, tile\.first \+ Block::kKeys - 1\)",
    ),
    Equivalent(
        "one key more is read, whose scores are hidden; of values the test is another instruction",
        kernel="collective_attention",
        change=r"setp\.lt\.s32 .* -> setp\.le",
        source=r"tile_row \+ j < count",
    ),
    Equivalent(
        "a head has 64 dims at least: of pairs of single elements every lane has one",
        kernel="diff_encode_compare_.*_narrow$",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source=r"tasks = p\.num_heads \* tasks_of_head",
    ),
    Equivalent(
        "a use begins where those before it have ended: none of them covers what comes after a use"
        " of no rows",
        kernel="diff_encode_compact",
        change=r"setp\.eq\.s32 .*, 0 -> .*, -1$",
        source=r"use_length \+ use\) == 0\) --use",
    ),
    Equivalent(
        "a block of no own rows has nothing to store",
        kernel="diff_encode_compact",
        change=r"setp\.eq\.s32 .*, 0 -> .*, -1$",
        source=r"own_rows == 0 && !is_last",
    ),
    Equivalent(
        "one word more, of which no row is before the end",
        kernel="diff_encode_compact",
        change=r"setp\.(le\.s32 .* -> setp\.lt|gt\.s32 .* -> setp\.ge)",
        source=r"word \* block_size < last",
    ),
    Equivalent(
        "copies again what blocks of other layers copy",
        kernel="diff_encode_compact",
        change=r"shl\.b32 .*, 1 -> .*, 0$",
        source=r"first_layer = .*blockIdx\.z\) \* tile\.layers",
    ),
    Equivalent(
        "no block is without layers: wide kernels ask before the loop alone, of a bound of its own",
        kernel="diff_encode_compact_.*_wide$",
        change=r"shl\.b32 .*, 1 -> .*, 2$",
        source=r"end_layer = min\(",
        operands=r"^min\.s32",
    ),
    Equivalent(
        "no block is without layers",
        kernel="diff_encode_compact",
        change=r"setp\.ge\.s32 .* -> setp\.gt",
        source="",
        operands=r"^shl\.b32 %\w+, %\w+, 1\nshl\.b32 %\w+, %\w+, 1$",
    ),
    Equivalent(
        "keys and values in the other order",
        kernel="diff_encode_compact",
        change=r"setp\.eq\.s32 (\S+ \S+), 0 -> (setp\.ne\.s32\s+\1, 0|setp\.eq\.s32 \1, 1)$",
        source=r"is_key = item % 2 == 0",
        operands=r"^and\.b32 %\w+, %\w+, 1$",
    ),
    Equivalent(
        "there are 256 threads",
        kernel="diff_encode_compact",
        change=r"setp\.gt\.s32 .*, 255 -> .*, 256$",
        source=r"i < warp\) rank",
    ),
    # Signs and bits
    Equivalent(
        "zero has no sign: its magnitude and its angle are the same either way",
        change=r"setp\.lt\.s(32|64) .*, 0 -> (setp\.le|.*, 1$)",
        source=r"\babs\(|llabs\(|shift < 0 \? -s(hift|in_row)",
    ),
    Equivalent(
        "the one shift that then counts as no overflow is 1431655765, which no tables have",
        kernel="key_deviation|rope_rotate",
        change=r"setp\.(gt\.s32 (\S+ \S+), -1 -> (setp\.ge\.s32\s+\2, -1|setp\.gt\.s32 \2, -2)"
        r"|lt\.s32 (\S+ \S+), 0 -> setp\.lt\.s32 \4, -1)$",
        source="",
        operands=r"^and\.b32 %\w+, %\w+, %\w+$",
    ),
    Equivalent(
        "a distance, which is squared or made positive",
        change=r"swap operands: sub\.f32",
        source=r"_difference = fresh|fabsf\(in_values\[i\] - moved_values\[i\]\)",
    ),
    Equivalent(
        "every lane or thread has the same value, and any other than the first may write it",
        change=OTHER_THAN_0,
        source=ONE_WRITES,
    ),
    Equivalent(
        "every lane has the mask of the page, and any other than the first may write it",
        kernel="diff_encode_compare",
        change=OTHER_THAN_0,
        source=r"const int32_t use = uses\[agent\]",  # what is loaded after lane == 0 is asked
        operands=r"^(sub|and)\.[sb]32 ",
    ),
    Equivalent(
        "every lane of a row has its LSE, and any other than the first may write it",
        kernel="collective_attention",
        change=OTHER_THAN_0,
        source=r"reinterpret_cast<float[24]\*>\(to \+ Products::dim\(n, lane\)\)"  # stands before
        r"|to\[Products::dim\(n, lane\) \+ 1\]",
        operands=r"^and\.b32\s+%\w+, %\w+, 3\b",  # lane % 4
    ),
    Equivalent(
        "every lane or thread has the same value, and all but the first may write it",
        change=r"flip predicate",
        operands=IS_0,
        source=ONE_WRITES,
    ),
    Equivalent(
        "the upper lanes have the sights of the lower ones",
        kernel="collective_attention",
        change=r"flip predicate|setp\.gt\.u32 .*, 15 -> .*, 16$",
        source=r"if \(here\.lane < Block::kWarpRows\) Block::sights\(.*\)\[here\.lane\] = sight",
    ),
    Equivalent(
        "asks whether this is lane 0, and after the sum over the warp any lane may write it",
        kernel="key_deviation",
        change=r"and\.b32 .*, -32 -> .*, -31$|sub\.s32",
        source=r"int32_t lane = ",
        only_compared_with_0=True,
    ),
    Equivalent(
        "lane 0 alone writes, whose number of the thread has zeros there",
        kernel="key_deviation",
        change=r"and\.b64 .*, 2305843009213693948 -> .*, 2305843009213693949$",
        source=r"token = .* / kWarpSize",
    ),
    Equivalent(
        "pages have 8, 16 or 32 rows",
        kernel="collective_attention",
        change=r"setp\.gt\.s64 .*, (8 -> .*, 9|16 -> .*, 17)$",
        source=r"page_shift\(3 \+",
    ),
    Equivalent(
        "a shift by 32 or more leaves no bit either way, and pages begin at multiples of 8 keys",
        kernel="collective_attention",
        change=r"setp\.gt\.s32 .*, 31 -> .*, 32$",
        source=r"from > 31 \? 0 : kAllLanes <<",
    ),
    Equivalent(
        "a shift by 32 leaves no bit either way",
        kernel="collective_attention",
        change=r"setp\.lt\.s32 .*, 0 -> .*, -1$",
        source=r"to < 0 \? 0 : kAllLanes >>",
    ),
    Equivalent(
        "a page begins at a multiple of 8 keys of the word: at 32 a shift leaves no bit either way",
        kernel="collective_attention",
        change=r"setp\.lt\.s32 .*, 32 -> (setp\.le|.*, 3[13]$)",
        source=r"int32_t key = base \+ at;|at < 32 \? kAllLanes",
    ),
    Equivalent(
        "keys where a word or a page begins are multiples of 8: lower bits are 0",
        kernel="collective_attention",
        change=r"add\.s32 .*, -1 -> .*, -2$|and\.b32 .*, (30 -> .*, (29|31)|28 -> .*, (27|29))$",
        source=r"static_cast<uint32_t>\(mask\) >> \(key & \(size - 1\)\) << \(at & 31\)",
    ),
    Equivalent(
        "wide kernels have halves of the rotary dims of whole vectors: nothing to round up",
        kernel="_wide$",
        change=r"add\.s32 .*, 3 -> .*, 2$",
        source=r"\(rotary_dim / 2 \+ 3\) / 4 \* 4|vectors = p\.head_dim / V|^$",
        operands=r"shr\.s32 %\w+, %\w+, 1$",
    ),
    # expf and logf
    Equivalent(
        "where expf parts its argument; the whole part is added again, whatever it is",
        change=r"swap operands: fma\.rn\.f32",
        operands=r"mov\.f32 %\w+, 0f3BBB989D",  # log2(e) / 252
        source=r"expf\(",
    ),
    Equivalent(
        "where logf parts mantissa and exponent, a unit in the last place more or less",
        change=r"add\.s32 .*, -1059760811 -> |and\.b32 .*, -8388608 -> .*, -8388607$",
        source=r"logf\(",
    ),
    Equivalent(
        "logf of less than a normal number, of infinity or NaN: the sum is 1 at least and finite",
        change=r"setp\.lt\.f32 .*, 0f00800000 -> setp\.le|setp\.lt\.u32 .*, 2139095040 -> ",
        source=r"logf\(",
    ),
    # Quantized rows
    Equivalent(
        "the last bit of a number halfway between two of e4m3 is 0; that of others goes into the"
        " base and is taken off again",
        change=r"and\.b32 .*, 2139095040 -> .*, 2139095041$",
        source=r"uint32_t power = .* & 0x7f800000;",
    ),
    Equivalent(
        "there is a layer at least",
        kernel="diff_encode_compare",
        change=r"setp\.lt\.s32 (\S+ \S+), 1 -> setp\.lt\.s32 \1, 0$",
        source=r"v_in = k_in \+ tile\.agents \* block_size",
        operands=r"ld\.param\.v2\.u32 \{%\w+, ?%\w+\}, \[%rd1\+192\]",  # num_layers, num_heads
    ),
)


def explanation(kernel: str, mutation: Any, source: str) -> str:
    """Why no test can notice this mutant; "" if that is not known."""
    code = _Code(mutation.ptx, mutation.line)
    masks = _masks(mutation)
    changed = masks[1] if masks else -1
    if _masks_no_bit_that_counts(masks, code):
        return "the bits that a mask has more or less are 0 in what it masks, or nothing reads them"
    if _adds_no_bit_that_counts(mutation, code):
        return "nothing reads the bits that are added to zeros"
    if code.is_unused():
        return "nothing reads what the instruction computes"
    for entry in EQUIVALENT:
        if (
            re.search(entry.kernel, kernel)
            and re.search(entry.change, mutation.description)
            and re.search(entry.source, source)
            and (not entry.operands or re.search(entry.operands, code.operands()))
            and (not entry.above or re.search(entry.above, code.above()))
            and (not entry.only_compared_with_0 or code.is_only_compared_with_0(changed))
        ):
            return entry.reason
    return ""


class _Code:
    """What stands around an instruction of a kernel's PTX: `line` counts from 1."""

    def __init__(self, ptx: str, line: int) -> None:
        self._lines, self._here = kernel_ptx.lines_around(ptx, line)
        self.statement = _statement(self._lines[self._here])

    @functools.cached_property
    def _statements(self) -> list[str]:
        return [_statement(line) for line in self._lines]

    @functools.cached_property
    def _definitions(self) -> dict[str, list[str]]:
        """The instructions that write a register, and no other."""
        found: dict[str, list[str]] = {}
        for statement in self._statements:
            found.setdefault(_result(statement), []).append(statement)
        return found

    def operands(self) -> str:
        """The instructions above that define what this one reads, one a line."""
        read = re.findall(r"%\w+", self.statement)
        if not self.statement.startswith("@"):
            read = read[1:]
        found = []
        for register in read:
            above = [each for each in self._statements[: self._here] if register in _results(each)]
            found += above[-1:]
        return "\n".join(found)

    def above(self) -> str:
        """The statement before; lines of the source and comments are none."""
        before = reversed(self._statements[: self._here])
        return next((each for each in before if each and not each.startswith((".loc", "//"))), "")

    def is_unused(self) -> bool:
        result = _result(self.statement)
        if not result:
            return False
        named = re.compile(rf"{re.escape(result)}\b")
        return not any(named.search(line) for i, line in enumerate(self._lines) if i != self._here)

    def is_only_compared_with_0(self, changed: int = -1) -> bool:
        """Whether its result is, or a difference that it is a part of; other uses may read bits
        that are not among ``changed``."""

        def compared(statement: str) -> bool:
            result = re.escape(_result(statement))
            return all(
                re.fullmatch(rf"setp\.(ne|eq)\.s32 %\w+, {result}, 0", use)
                or (re.fullmatch(rf"sub\.s32 %\w+, %\w+, {result}", use) and compared(use))
                or changed & ~self._unread_by(use, result) == 0
                for use in self._uses(statement)
            )

        return compared(self.statement)

    def _uses(self, statement: str) -> list[str]:
        """The other instructions that name what an instruction writes."""
        result = re.compile(rf"{re.escape(_result(statement))}\b")
        return [each for each in self._statements if each != statement and result.search(each)]

    def zeros(self, operand: str, known: dict[str, int] | None = None) -> int:
        """Bits that are 0 in an operand whatever the kernel is given, the lowest first."""
        literal = parse_literal(operand)
        if isinstance(literal, Integer):
            return ~literal.value
        known = known or {}
        if operand in known or len(known) > DEEPEST:
            return known.get(operand, 0)
        definitions = self._definitions.get(operand, [])
        found = -1 if definitions else 0
        while True:  # in a loop a register may depend on itself: what holds if it holds before
            before = found
            for definition in definitions:
                found &= self._zeros_of(definition, {**known, operand: before})
            if found == before:
                return found

    def unread(self, statement: str, depth: int = 0) -> int:
        """Bits of an instruction's result that nothing depends on, the lowest first."""
        if depth >= DEEPEST:
            return 0
        found, result = -1, re.escape(_result(statement))
        for use in self._uses(statement):
            found &= self._unread_by(use, result, depth)
        return found

    def _unread_by(self, use: str, result: str, depth: int = 0) -> int:
        """Bits of a register, as a pattern, that nothing depends on by way of this use."""
        match = re.fullmatch(rf"(\w+)\.[bsu](?:32|64) %\w+, ((?:.*, )?){result}(?:, (\S+))?", use)
        if match is None:
            return 0
        name, other = match[1], match[2].removesuffix(", ") or match[3] or ""
        literal = parse_literal(other)
        if name == "shr" and isinstance(literal, Integer) and ".s" not in use.split()[0]:
            return self.unread(use, depth + 1) << literal.value | (1 << literal.value) - 1
        if name == "and" and isinstance(literal, Integer):
            return ~literal.value | self.unread(use, depth + 1)
        if name == "add" and isinstance(literal, Integer):  # no carry comes from 0
            return _lowest(self.unread(use, depth + 1)) & _lowest(~literal.value)
        return self.unread(use, depth + 1) if name in ("mov", "or", "xor") else 0

    def _zeros_of(self, definition: str, known: dict[str, int]) -> int:
        opcode, _, rest = definition.partition(" ")
        name = opcode.split(".")[0]
        inputs = [text.strip() for text in rest.split(",")][1:]
        if name not in ("mov", "and", "or", "xor", "add", "shl", "mul"):
            return 0
        zeros = [self.zeros(text, known) for text in inputs]
        if name == "mov":
            return zeros[0]
        if name == "and":
            return zeros[0] | zeros[1]
        if name in ("or", "xor"):
            return zeros[0] & zeros[1]
        if name == "add":
            return _lowest(zeros[0] & zeros[1])
        amount = parse_literal(inputs[1])
        if not isinstance(amount, Integer):
            return 0
        if name == "shl":
            return zeros[0] << amount.value | (1 << amount.value) - 1
        return _lowest(~amount.value)


DEEPEST = 12


def _statement(line: str) -> str:
    """A line without its semicolon and spare blanks."""
    return " ".join(line.split()).rstrip(";")


def _lowest(bits: int) -> int:
    """The bits below the lowest that is not set."""
    return (bits ^ bits + 1) >> 1 if bits != -1 else -1


def _results(statement: str) -> list[str]:
    """The registers that an instruction writes."""
    written = re.match(r"(?:@!?%\w+ )?(?!st\.|bra|red\.)[a-z][\w.]* (%\w+|\{[^}]*\}),", statement)
    return re.findall(r"%\w+", written[1]) if written else []


def _result(statement: str) -> str:
    """The register that an instruction writes, "" if it writes none or several."""
    results = _results(statement)
    return results[0] if len(results) == 1 else ""


def _masks(mutation: Any) -> tuple[str, int] | None:
    """What a changed mask masks, and the bits by which it differs."""
    found = re.search(r"and\.b(?:32|64) \S+ (\S+), (-?\d+) -> .*, (-?\d+)$", mutation.description)
    return (found[1], int(found[2]) ^ int(found[3])) if found else None


def _masks_no_bit_that_counts(masks: tuple[str, int] | None, code: _Code) -> bool:
    if masks is None:
        return False
    masked, changed = masks
    if changed & ~code.zeros(masked) == 0:
        return True
    return changed & ~code.unread(code.statement) == 0


def _adds_no_bit_that_counts(mutation: Any, code: _Code) -> bool:
    numbers = re.search(r"add\.s32 \S+ (\S+), (\d+) -> .*, (\d+)$", mutation.description)
    if numbers is None:
        return False
    changed = int(numbers[2]) ^ int(numbers[3])
    if changed & ~_lowest(code.zeros(numbers[1])) != 0:
        return False  # other bits change by a carry
    return changed & ~code.unread(code.statement) == 0
