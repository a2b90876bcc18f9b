"""The other pictures of a run: memory against agents and rounds, time by part."""

from __future__ import annotations

from collections.abc import Sequence

from evals.society.report import RoundReport
from evals.society.svg import element, nice_ticks, picture, text

__all__ = ["memory_by_agents", "memory_by_round", "time_by_part"]

_WIDTH, _HEIGHT = 460.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 58.0, 26.0, 40.0
_MIB = float(1 << 20)


def memory_by_agents(points: Sequence[tuple[int, int, int]]) -> str:
    """Lines over ``(agents, dense bytes, stored bytes)``."""
    ticks = nice_ticks(max(dense for _, dense, _ in points) / _MIB)
    span = max(len(points) - 1, 1)
    content = [_value_axis(ticks, "MiB")]

    def x_of(index: int) -> float:
        return _LEFT + 12 + (_WIDTH - _LEFT - _RIGHT - 24) * index / span

    for index, (count, _, _) in enumerate(points):
        content.append(
            text(x_of(index), _HEIGHT - _BOTTOM + 16, str(count), "axis", text_anchor="middle")
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    content.append(text(middle, _HEIGHT - 6, "agents", "axis", text_anchor="middle"))
    for name, column in (("dense", 1), ("stored", 2)):
        values = [point[column] / _MIB for point in points]
        places = [(x_of(i), _height_of(value, ticks)) for i, value in enumerate(values)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        content.append(element("polyline", points=line, class_=f"line-{name}"))
        for (x, y), value, (count, _, _) in zip(places, values, points, strict=True):
            title = f"{count} agents, {name}: {value:.1f} MiB"
            content.append(element("circle", cx=x, cy=y, r=3.5, class_=f"dot-{name}", title=title))
        x, y = places[-1]
        content.append(text(x + 8, y - 2, name, "name"))
        content.append(text(x + 8, y + 12, f"{values[-1]:.1f}", "value"))
    label = (
        f"KV memory of {points[-1][0]} agents: {points[-1][1] / _MIB:.1f} MiB dense, "
        f"{points[-1][2] / _MIB:.1f} MiB stored."
    )
    return picture(_WIDTH, _HEIGHT, label, "".join(content))


def memory_by_round(reports: Sequence[RoundReport]) -> str:
    """Pairs of bars: dense and stored bytes of each round's prompts."""
    ticks = nice_ticks(max(report.kv_bytes_dense for report in reports) / _MIB)
    content = [_value_axis(ticks, "MiB")]
    step = (_WIDTH - _LEFT - 12) / len(reports)
    width = min(step * 0.34, 40.0)
    for index, report in enumerate(reports):
        center = _LEFT + (index + 0.5) * step
        content.append(
            text(center, _HEIGHT - _BOTTOM + 16, str(index + 1), "axis", text_anchor="middle")
        )
        for name, left, size in (
            ("dense", center - width - 1, report.kv_bytes_dense / _MIB),
            ("stored", center + 1, report.kv_bytes_stored / _MIB),
        ):
            top = _height_of(size, ticks)
            content.append(
                element(
                    "rect",
                    x=left,
                    y=top,
                    width=width,
                    height=_HEIGHT - _BOTTOM - top,
                    class_=f"dot-{name}",
                    title=f"round {index + 1}, {name}: {size:.1f} MiB",
                )
            )
            content.append(
                text(left + width / 2, top - 4, f"{size:.0f}", "value", text_anchor="middle")
            )
    middle = (_LEFT + _WIDTH) / 2
    content.append(text(middle, _HEIGHT - 6, "round", "axis", text_anchor="middle"))
    label = "KV memory of each round's prompts, dense and stored."
    return picture(_WIDTH, _HEIGHT, label, "".join(content))


def time_by_part(reports: Sequence[RoundReport]) -> str:
    """Per round a bar of plan, prefill and decode, and one of the full prefill if audited."""
    width, left, bar = 960.0, 130.0, 18.0
    audited = any(report.audit for report in reports)
    longest = max(
        max(
            report.plan_s + report.prefill_s + report.decode_s,
            report.audit.prefill_s if report.audit else 0.0,
        )
        for report in reports
    )
    ticks = nice_ticks(longest, 6)
    scale = (width - left - 70) / ticks[-1]
    step = bar * (2 if audited else 1) + 20
    height = step * len(reports) + 40
    content = []
    for tick in ticks:
        x = left + tick * scale
        content.append(element("line", x1=x, x2=x, y1=4, y2=height - 30, class_="grid"))
        content.append(text(x, height - 14, f"{tick:g} s", "axis", text_anchor="middle"))
    for index, report in enumerate(reports):
        top = 8 + index * step
        content.append(text(left - 8, top + 13, f"round {index + 1}", "name", text_anchor="end"))
        x = left
        for name, seconds in (
            ("plan", report.plan_s),
            ("prefill", report.prefill_s),
            ("decode", report.decode_s),
        ):
            content.append(_time_bar(x, top, seconds * scale, bar - 2, name, name, seconds))
            x += seconds * scale
        seconds = report.plan_s + report.prefill_s + report.decode_s
        content.append(text(x + 6, top + 13, f"{seconds:.1f} s", "value"))
        if report.audit:
            seconds, below = report.audit.prefill_s, top + bar
            content.append(text(left - 8, below + 13, "full prefill", "axis", text_anchor="end"))
            title = "full prefill"
            content.append(_time_bar(left, below, seconds * scale, bar - 2, "full", title, seconds))
            x = left + seconds * scale
            content.append(text(x + 6, below + 13, f"{seconds:.1f} s", "value"))
    return picture(width, height, "Seconds of each round by part.", "".join(content))


def _time_bar(
    x: float, y: float, width: float, height: float, name: str, title: str, seconds: float
) -> str:
    title = f"{title}: {seconds:.3f} s"
    return element("rect", x=x, y=y, width=width, height=height, class_=f"t-{name}", title=title)


def _height_of(value: float, ticks: Sequence[float]) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / ticks[-1]


def _value_axis(ticks: Sequence[float], unit: str) -> str:
    parts = [text(_LEFT - 6, 12, unit, "axis", text_anchor="end")]
    for tick in ticks:
        y = _height_of(tick, ticks)
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - 6, y1=y, y2=y, class_="grid"))
        parts.append(text(_LEFT - 6, y + 4, f"{tick:g}", "axis", text_anchor="end"))
    return "".join(parts)
