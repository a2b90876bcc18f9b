"""Pictures of kept measurements, as SVG that is readable in light and in dark.

`tools.measurements` writes them beside the JSON that they are drawn from. The same JSON gives the
same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evals.fidelity import front

NAMES = {
    "vllm": "vLLM",
    "vllm_prefix": "prefix caching",
    "tokendance_shared": "tokendance",
    "engine": "small engine",
    front.REFERENCE: "CacheBlend",
}
COLOURS = ("#e8590c", "#3b82c4", "#2f9e6e", "#9c5fb5", "#868e96")
STYLE = """<style>
.paper { fill: #fff } text { fill: #212529 } .grid { stroke: #dee2e6 } .quiet { fill: #6c757d }
@media (prefers-color-scheme: dark) {
.paper { fill: #212529 } text { fill: #dee2e6 } .grid { stroke: #495057 } .quiet { fill: #adb5bd }
}</style>"""
WIDTH, PANEL_HEIGHT, LINE = 760, 240, 15

Lines = Mapping[str, Sequence[tuple[float, float]]]


def rounds_by_agents(made: Mapping[str, Any]) -> str:
    """Seconds of a round and bytes held against the number of agents, a line per server."""
    rows = made["rows"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    panels = {
        title: {
            system: [(row["agents"], row[column]) for row in rows if row["system"] == system]
            for system in systems
        }
        for title, column in (("seconds of a round", "round p50, s"), ("KV held, MB", "KV, MB"))
    }
    width = WIDTH // len(panels)
    drawn = [
        _panel(title, lines, left=number * width, width=width)
        for number, (title, lines) in enumerate(panels.items())
    ]
    return _svg(PANEL_HEIGHT + 70, drawn)


def siblings_by_reuse(made: Mapping[str, Any]) -> str:
    """How far siblings are from full recompute by each way of reuse, and the rows that it costs."""
    drawn, top = [], 16
    for workload, points in front.read(made["result"]).items():
        found = {way: front.figures_of(points, way) for way in points}
        most = max(one["kl"] for one in found.values())
        drawn.append(_text(20, top + 10, f"{workload}: KL to full recompute, nats", bold=True))
        for way, one in sorted(found.items(), key=lambda pair: pair[1]["kl"]):
            top += 30
            length = 330 * one["kl"] / most
            colour = COLOURS[1] if way == front.REFERENCE else COLOURS[0]
            said = f"{one['kl']:.3f}, {one['computed']:.0%} of the rows computed"
            drawn += [
                _text(180, top + 14, NAMES.get(way, way), anchor="end"),
                f'<rect x="190" y="{top}" width="{length:.1f}" height="20" fill="{colour}"/>',
                _text(196 + length, top + 14, said, quiet=True),
            ]
        top += 46
    return _svg(top, drawn)


def _panel(title: str, lines: Lines, left: int, width: int) -> str:
    most_x = max(x for line in lines.values() for x, _ in line)
    most_y = max(y for line in lines.values() for _, y in line)
    step = _step(most_y / 5)
    ticks = math.ceil(most_y / step)
    begin, end, bottom, height = left + 52, left + width - 112, PANEL_HEIGHT + 30, PANEL_HEIGHT - 20

    def place(x: float, y: float) -> tuple[float, float]:
        return begin + (end - begin) * x / most_x, bottom - height * y / (ticks * step)

    drawn = [_text(begin, 28, title, bold=True)]
    for tick in range(ticks + 1):
        _, y = place(0, tick * step)
        drawn.append(f'<line class="grid" x1="{begin}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}"/>')
        drawn.append(_text(begin - 6, y + 4, f"{tick * step:g}", anchor="end", quiet=True))
    for x in sorted({x for line in lines.values() for x, _ in line}):
        drawn.append(_text(place(x, 0)[0], bottom + 18, f"{x:g}", anchor="middle", quiet=True))
    drawn.append(_text((begin + end) / 2, bottom + 34, "agents", anchor="middle", quiet=True))
    above = bottom + LINE  # names of lines that end close together do not overlap
    for name in sorted(lines, key=lambda name: lines[name][-1][1]):
        colour = COLOURS[list(lines).index(name)]
        points = [place(*point) for point in lines[name]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        above = min(points[-1][1], above - LINE)
        drawn.append(
            f'<rect x="{end + 8}" y="{above - 4:.1f}" width="8" height="8" fill="{colour}"/>'
        )
        drawn.append(_text(end + 20, above + 4, NAMES.get(name, name)))
    return "\n".join(drawn)


def _step(least: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 1.0
    while power > least:
        power /= 10
    while power * 10 <= least:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _text(
    x: float, y: float, text: str, anchor: str = "start", bold: bool = False, quiet: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    kind = ' class="quiet"' if quiet else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}{kind}>{text}</text>'


def _svg(height: int, drawn: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
    font = 'font-family="system-ui, sans-serif" font-size="12"'
    paper = f'<rect class="paper" width="{WIDTH}" height="{height}"/>'
    return "\n".join([f"{head} {font}>", STYLE, paper, *drawn, "</svg>", ""])
