"""The front: how near to full recompute every way of reuse stays, and for how many rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.fidelity.replays import (
    NEUTRAL,
    OUTPUTS_AND_ALONE,
    PIC,
    SHORT_AND_ALONE,
    WORKLOADS,
    Figures,
    measure,
    read_workload,
    recompute,
)

REFERENCE = f"{PIC}:0.15"
WAYS = (
    REFERENCE,
    "master/leading:4:96:24",
    *(f"master/leading:{count}" for count in (8, 16, 4, 32, 12, 2, 24, 1)),
    "alone/deviation:0.15",
    "master/deviation:0.15",
    "producer/leading:8",
    "master/nothing",
    "alone/leading:8",
    f"{NEUTRAL}/leading:8",
    f"{OUTPUTS_AND_ALONE}/leading:8",
    f"{SHORT_AND_ALONE}/leading:8",
    "producer/leading:16",
    "master/deviation:0.05",
    "alone/nothing",
    "producer/nothing",
    "master/deviation:0.3",
    "alone/leading:32",
    f"{PIC}:0.3",
    f"{PIC}:0.05",
)
Table = dict[str, dict[str, list[Figures]]]
"""Per workload and way of reuse one `Figures` per round."""


def run(
    model: Any,
    tokenizer: Any,
    path: Path,
    workloads: Sequence[str],
    ways: Sequence[str],
    new_tokens: int,
) -> Table:
    """Measures what ``path`` does not hold yet, way by way, and writes it after every point."""
    table = read(path)
    rounds: dict[str, Any] = {}
    for way in ways:
        for workload in workloads:
            if way in table.setdefault(workload, {}):
                continue
            if workload not in rounds:
                before, *measured = read_workload(workload, tokenizer, before=1)
                recompute(model, measured, new_tokens)
                rounds[workload] = measured, [before]
            table[workload][way] = measure(model, way, *rounds[workload])
            path.parent.mkdir(parents=True, exist_ok=True)
            text = {w: {k: [asdict(f) for f in v] for k, v in p.items()} for w, p in table.items()}
            path.write_text(json.dumps(text, indent=1) + "\n")
            print(f"{workload} {way}: {_line(table[workload], way)}", flush=True)
    return table


def read(path: Path) -> Table:
    """What has been measured so far."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return {
        workload: {way: [Figures(**one) for one in rounds] for way, rounds in points.items()}
        for workload, points in found.items()
    }


def siblings_kl(figures: Sequence[Figures], siblings_of: Sequence[Figures]) -> float:
    """Mean over the agents that are no Master agents in ``siblings_of``, over all rounds."""
    values = [
        kl
        for one, other in zip(figures, siblings_of, strict=True)
        for agent, kl in one.kl.items()
        if agent not in other.master_agents
    ]
    return sum(values) / len(values)


def figures_of(points: dict[str, list[Figures]], way: str) -> dict[str, float]:
    """One line of the table.

    Shares of the prompts' rows, siblings' KL, its ratio to that of `REFERENCE` on the same
    siblings, their top-1, and the worst round's rows over those of `REFERENCE`.
    """
    mine, pic = points[way], points[REFERENCE]
    rows = sum(one.prompt_rows for one in mine)
    kl = siblings_kl(mine, mine)
    top1 = [
        value for one in mine for agent, value in one.top1.items() if agent not in one.master_agents
    ]
    return {
        "computed": sum(one.rows for one in mine) / rows,
        "overridden": sum(one.overridden for one in mine) / rows,
        "kl": kl,
        "ratio": kl / siblings_kl(pic, mine),
        "top1": sum(top1) / len(top1),
        "rows_over_pic": max(a.rows / b.rows for a, b in zip(mine, pic, strict=True)),
    }


def _line(points: dict[str, list[Figures]], way: str) -> str:
    if REFERENCE not in points:
        return "measured"
    return ", ".join(f"{name} {value:.4g}" for name, value in figures_of(points, way).items())


def text(table: Table) -> str:
    """Markdown: one table per workload, fewest rows first, then the ratios of all workloads.

    ``worst rows``: of the worst round, over those of `REFERENCE`.
    """
    lines: list[str] = []
    head = "| reuse | rows computed | overridden | siblings' KL | of pic's | top-1 | worst rows |"
    for workload, points in table.items():
        lines += [f"**{workload}**", "", head, "| --- |" + " --- |" * 6]
        found = {way: figures_of(points, way) for way in points}
        for way, one in sorted(found.items(), key=lambda item: item[1]["computed"]):
            lines.append(
                f"| {way} | {one['computed']:.1%} | {one['overridden']:.1%} | {one['kl']:.5f} "
                f"| {one['ratio']:.3f} | {one['top1']:.3f} | {one['rows_over_pic']:.2f} |"
            )
        lines.append("")
    everywhere = [way for way in WAYS if all(way in points for points in table.values())]
    lines.append("| reuse | " + " | ".join(table) + " | worst | rows of pic's |")
    lines.append("| --- |" + " --- |" * (len(table) + 2))
    for way in everywhere:
        all_ = [figures_of(points, way) for points in table.values()]
        rows = sum(sum(one.rows for one in points[way]) for points in table.values())
        pic = sum(sum(one.rows for one in points[REFERENCE]) for points in table.values())
        ratios = " | ".join(f"{one['ratio']:.4f}" for one in all_)
        worst = max(one["ratio"] for one in all_)
        lines.append(f"| {way} | {ratios} | {worst:.4f} | {rows / pic:.2f} |")
    return "\n".join(lines)


def draw(workload: str, points: dict[str, list[Figures]], path: Path) -> None:
    """Siblings' KL against rows computed, one line per source and kind of selection."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[tuple[float, float, str]]] = {}
    for way in points:
        one = figures_of(points, way)
        name, _, budget = way.partition(":")
        if name.endswith("/nothing"):
            name, budget = name.replace("nothing", "leading"), "0"
        if ":" in budget and "leading" in name:
            name = name.replace("leading", "leading by unseen")
        series.setdefault(name, []).append((one["computed"], one["kl"], budget))
    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for name, line in series.items():
        line.sort()
        x, y, budgets = zip(*line, strict=True)
        axis.plot([100 * value for value in x], y, "o-", label=name, markersize=4, linewidth=1)
        for at, kl, budget in zip(x, y, budgets, strict=True):
            axis.annotate(budget, (100 * at, kl), textcoords="offset points", xytext=(3, 3), size=7)
    pic = figures_of(points, REFERENCE)
    axis.axhline(pic["kl"] / 10, linestyle=":", color="grey", linewidth=1)
    axis.set(
        title=f"{workload}: siblings against full recompute",
        xlabel="prompt rows computed, %",
        ylabel="KL, nats",
        yscale="log",
    )
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


__all__ = ["WAYS", "WORKLOADS", "draw", "run", "text"]
