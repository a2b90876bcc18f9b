"""Just enough SVG: elements, number formats, and axes that end at round numbers."""

from __future__ import annotations

from html import escape
from typing import Any

__all__ = ["element", "nice_ticks", "picture", "text"]


def element(tag: str, content: str = "", title: str = "", **attributes: Any) -> str:
    """An element; ``title`` is its tooltip. ``class_`` and ``text_anchor`` lose and gain a dash."""
    parts = [
        f' {name.strip("_").replace("_", "-")}="{escape(_short(value))}"'
        for name, value in attributes.items()
    ]
    inner = (f"<title>{escape(title)}</title>" if title else "") + content
    return f"<{tag}{''.join(parts)}>{inner}</{tag}>" if inner else f"<{tag}{''.join(parts)}/>"


def text(x: float, y: float, content: str, class_: str = "", **attributes: Any) -> str:
    """Escaped text with its baseline at ``y``."""
    return element("text", escape(content), x=x, y=y, class_=class_, **attributes)


def picture(width: float, height: float, label: str, content: str) -> str:
    """A whole picture; ``label`` says to a screen reader what it shows."""
    return element(
        "svg",
        content,
        viewBox=f"0 0 {_short(width)} {_short(height)}",
        role="img",
        aria_label=label,
        style=f"min-width:{_short(min(width, 640))}px",
    )


def nice_ticks(largest: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers from 0, the last one at or above ``largest``."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / count
    power = 1.0
    while power > rough:
        power /= 10
    while power * 10 <= rough:
        power *= 10
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    ticks = [0.0]
    while ticks[-1] < largest * (1 - 1e-9):
        ticks.append(step * len(ticks))
    return ticks


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
