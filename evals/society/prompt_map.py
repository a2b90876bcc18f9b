"""The picture of a round: every prompt as a bar, every row coloured by where it came from."""

from __future__ import annotations

from collections.abc import Sequence

from evals.society.report import Block, PromptMap, RoundReport
from evals.society.svg import element, nice_ticks, picture, text
from tokendance.host.decide import RowKind, Span

__all__ = ["ROW_KINDS", "prompt_map"]

ROW_KINDS = {
    RowKind.OWN: "computed: the agent's own rows",
    RowKind.MASTER: "computed once, kept as a Master for everybody",
    RowKind.REPAIRED: "reused block, but these rows computed again",
    RowKind.REUSED: "reused from a Master, moved to its place here",
    RowKind.EXACT: "reused from a Master of the very same context",
    RowKind.EARLIER: "the agent's own rows of an earlier round",
}
"""What each kind means, computed ones first."""

WIDTH = 960.0
_LEFT, _RIGHT, _TOP = 64.0, 16.0, 22.0
_BAR, _GAP = 22.0, 30.0


def prompt_map(report: RoundReport, longest: int) -> str:
    """One round.

    Args:
        report: the round.
        longest: rows at the right edge, the same for all rounds of a page.
    """
    scale = (WIDTH - _LEFT - _RIGHT) / longest
    bars = report.prompts
    height = _TOP + len(bars) * (_BAR + _GAP) - _GAP + 34
    content = [_axis(longest, scale, height)]
    tops = [_TOP + index * (_BAR + _GAP) for index in range(len(bars))]
    for index in range(len(bars) - 1):
        content += _ribbons(bars[index], bars[index + 1], tops[index], scale)
    for bar, top in zip(bars, tops, strict=True):
        content += _bar(bar, top, scale, bar.agent in report.master_agents)
    label = (
        f"Round {report.round + 1}: the rows of {len(bars)} prompts by where they came from; "
        f"{report.rows:.0f} of {report.prompt_tokens} were computed."
    )
    return picture(WIDTH, height, label, "".join(content))


def _axis(longest: int, scale: float, height: float) -> str:
    parts = []
    for tick in nice_ticks(longest, 6):
        if tick <= longest:
            x = _LEFT + tick * scale
            parts.append(element("line", x1=x, x2=x, y1=_TOP - 6, y2=height - 26, class_="grid"))
            parts.append(text(x, height - 10, f"{tick:,.0f}", "axis", text_anchor="middle"))
    parts.append(text(WIDTH - _RIGHT, 12, "row of the prompt →", "axis", text_anchor="end"))
    return "".join(parts)


def _bar(bar: PromptMap, top: float, scale: float, is_master: bool) -> list[str]:
    middle = top + _BAR / 2 + 4
    parts = [text(_LEFT - 8, middle, bar.agent, "name", text_anchor="end")]
    if is_master:
        parts.append(text(_LEFT - 8, middle + 11, "Master", "axis", text_anchor="end"))
    for span in bar.spans:
        parts.append(
            element(
                "rect",
                x=_LEFT + span.begin * scale,
                y=top,
                width=(span.end - span.begin) * scale,
                height=_BAR,
                class_=f"o-{span.kind.value}",
                title=_describe(bar, span),
            )
        )
    for block in bar.blocks:
        x, width = _LEFT + block.begin * scale, (block.end - block.begin) * scale
        if block.begin:
            parts.append(element("line", x1=x, x2=x, y1=top, y2=top + _BAR, class_="cut"))
        label = _label(block)
        if label and width > 6.2 * len(label) + 4:
            where = {"text_anchor": "middle", "pointer_events": "none"}
            parts.append(text(x + width / 2, middle, label, "inside", **where))
    return parts


def _ribbons(upper: PromptMap, lower: PromptMap, top: float, scale: float) -> list[str]:
    """Bands that join the places of one shared block in two bars below each other."""
    places = {block.block_id: block for block in lower.blocks if _is_everybodys(block)}
    parts = []
    y1, y2 = top + _BAR, top + _BAR + _GAP
    bend = (y1 + y2) / 2
    for block in upper.blocks:
        other = places.get(block.block_id) if _is_everybodys(block) else None
        if other is None:
            continue
        a, b = _LEFT + block.begin * scale, _LEFT + block.end * scale
        c, d = _LEFT + other.begin * scale, _LEFT + other.end * scale
        path = (
            f"M{a:.1f} {y1:.1f}C{a:.1f} {bend:.1f} {c:.1f} {bend:.1f} {c:.1f} {y2:.1f}"
            f"H{d:.1f}C{d:.1f} {bend:.1f} {b:.1f} {bend:.1f} {b:.1f} {y1:.1f}Z"
        )
        parts.append(
            element(
                "path",
                d=path,
                class_="ribbon",
                title=f"{_label(block)}: row {block.begin} for {upper.agent}, "
                f"row {other.begin} for {lower.agent}",
            )
        )
    return parts


def _is_everybodys(block: Block) -> bool:
    return block.kind == "shared" and block.block_id is not None


def _label(block: Block) -> str:
    """The author of a message, or what else stands there."""
    if block.block_id is None:
        return "task" if block.kind == "task" else ""
    return block.block_id.partition(".")[2] if block.kind == "shared" else "persona"


def _describe(bar: PromptMap, span: Span) -> str:
    inside = [one for one in bar.blocks if one.begin < span.end and span.begin < one.end]
    lines = [
        f"{bar.agent}, rows {span.begin} to {span.end - 1} ({span.end - span.begin}): "
        f"{ROW_KINDS[span.kind]}"
    ]
    lines += [_line(block, span) for block in inside[:6]]
    return "\n".join(lines)


def _line(block: Block, span: Span) -> str:
    moved = ""
    if block.shift and span.kind in (RowKind.REUSED, RowKind.REPAIRED):
        moved = f" (Master moved by {block.shift:+d})"
    return f"{block.block_id or block.kind}{moved}: {_shortened(block.text)}"


def _shortened(content: str, length: int = 90) -> str:
    flat = " ".join(content.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"


def kinds_of(reports: Sequence[RoundReport]) -> list[RowKind]:
    """The kinds that occur, in the order of `ROW_KINDS`."""
    found = {span.kind for report in reports for bar in report.prompts for span in bar.spans}
    return [kind for kind in ROW_KINDS if kind in found]
