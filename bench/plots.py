"""How figures grow with the agents, as pictures; needs matplotlib (the extra ``bench``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GAP = 0.07  # between the names of two lines, of the height of a panel
OURS = "tokendance"


def draw_against_agents(
    path: Path,
    title: str,
    agents: Sequence[int],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """Panels side by side, each with one line per system, named at its end.

    Args:
        path: of the PNG.
        panels: what is shown, with its unit, to the systems' values for each number of ``agents``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for axis, (what, systems) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, what, agents, systems)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_panel(
    axis: Any, what: str, agents: Sequence[int], systems: Mapping[str, Sequence[float]]
) -> None:
    top = 1.05 * max(max(values) for values in systems.values())
    axis.set(title=what, xlabel="agents", ylim=(0, top), xlim=(0, max(agents) * 1.03))
    # Labels of small numbers would run into each other where agents double.
    axis.set_xticks([n for n in agents if n >= max(agents) / 8])
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    others = iter(("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown"))
    colours = {name: "tab:red" if name == OURS else next(others) for name in systems}
    for name, values in systems.items():
        width = 2.5 if name == OURS else 1.5
        axis.plot(agents, values, "o-", color=colours[name], linewidth=width, markersize=5)
    below = -GAP
    for name in sorted(systems, key=lambda name: systems[name][-1]):
        below = max(systems[name][-1] / top, below + GAP)
        axis.annotate(
            name,
            (1.01, below),
            xycoords="axes fraction",
            verticalalignment="center",
            color=colours[name],
            fontweight="bold" if name == OURS else "normal",
        )
