"""The front: how near to full recompute every way of reuse stays, and for how many rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    Session,
    measure,
    read_sessions,
    recompute,
)
from evals.fidelity.samples import ratio_of_means, spread

REFERENCE = f"{PIC}:0.15"
WAYS = (
    REFERENCE,
    "master/leading:4:96:24",
    *(f"master/leading:{count}" for count in (12, 8, 16, 4, 32, 2, 24, 1)),
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
Json = dict[str, dict[str, list[dict[str, Any]]]]


def run(
    model: Any,
    tokenizer: Any,
    known: Json,
    workloads: Sequence[str],
    ways: Sequence[str],
    new_tokens: int,
    rounds: int | None = None,
    agents: int | None = None,
    session: str | None = None,
    save: Callable[[Json], None] = lambda _: None,
) -> Json:
    """Measures what ``known`` does not hold yet, session by session, in every way.

    Args:
        rounds, agents, session: see `read_sessions`.
        save: is handed everything that is known after every point.
    """
    table = read(known)
    for workload in workloads:
        points = table.setdefault(workload, {})
        for one in read_sessions(workload, tokenizer, rounds, agents, 1, session):
            wanted = {each.number for each in one.rounds}
            left = [way for way in ways if not wanted <= _numbers(points.get(way, ()), one)]
            if left:
                recompute(model, one.rounds, new_tokens)
            for way in left:
                others = [each for each in points.get(way, []) if each.session != one.name]
                points[way] = [*others, *measure(model, way, one.rounds, one.before)]
                save(write(table))
                print(f"{workload} {one.name} {way}: {_line(points, way)}", flush=True)
    return write(table)


def _numbers(figures: Iterable[Figures], session: Session) -> set[int]:
    return {one.number for one in figures if one.session == session.name}


def read(known: Json) -> Table:
    """What has been measured so far."""
    return {
        workload: {way: [Figures(**one) for one in rounds] for way, rounds in points.items()}
        for workload, points in known.items()
    }


def write(table: Table) -> Json:
    """For JSON."""
    return {
        workload: {way: [asdict(one) for one in rounds] for way, rounds in points.items()}
        for workload, points in table.items()
    }


def siblings(
    mine: Sequence[Figures], reference: Sequence[Figures]
) -> list[tuple[list[float], list[float]]]:
    """Per round KL of the agents that are no Master agents in ``mine``, in both; no empty ones."""
    found = []
    for one, other in zip(mine, reference, strict=True):
        agents = [agent for agent in one.kl if agent not in one.master_agents]
        if agents:
            found.append(([one.kl[agent] for agent in agents], [other.kl[a] for a in agents]))
    return found


def siblings_kl(figures: Sequence[Figures]) -> float:
    """Mean over the agents that are no Master agents, over all rounds."""
    return spread([kl for one, _ in siblings(figures, figures) for kl in one]).mean


def figures_of(points: Mapping[str, list[Figures]], way: str) -> dict[str, float]:
    """One line of the table.

    Shares of the prompts' rows; siblings' KL, mean, median and 90th percentile; the ratio of its
    mean to that of `REFERENCE` on the same siblings, and both ends of its interval; their top-1;
    the worst round's rows over those of `REFERENCE`. Rounds that only one of the two has count in
    neither.
    """
    mine, pic = _in_both(points, way)
    rows = sum(one.prompt_rows for one in mine)
    pairs = siblings(mine, pic)
    kl = spread([value for own, _ in pairs for value in own])
    ratio = ratio_of_means(pairs)
    top1 = [
        value for one in mine for agent, value in one.top1.items() if agent not in one.master_agents
    ]
    return {
        "rounds": len(mine),
        "siblings": kl.count,
        "computed": sum(one.rows for one in mine) / rows,
        "overridden": sum(one.overridden for one in mine) / rows,
        "kl": kl.mean,
        "median": kl.median,
        "p90": kl.p90,
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "top1": sum(top1) / len(top1),
        "rows_over_pic": max(a.rows / b.rows for a, b in zip(mine, pic, strict=True)),
        "rows": sum(one.rows for one in mine),
        "rows_of_pic": sum(one.rows for one in pic),
    }


def _in_both(points: Mapping[str, list[Figures]], way: str) -> tuple[list[Figures], list[Figures]]:
    """The rounds that ``way`` and `REFERENCE` have, in the same order."""
    mine, pic = (
        {(one.session, one.number): one for one in points.get(name, ())}
        for name in (way, REFERENCE)
    )
    rounds = sorted(mine.keys() & pic.keys())
    return [mine[one] for one in rounds], [pic[one] for one in rounds]


def _line(points: Mapping[str, list[Figures]], way: str) -> str:
    if not _in_both(points, way)[0]:
        return "measured"
    return ", ".join(f"{name} {value:.4g}" for name, value in figures_of(points, way).items())


def text(known: Json) -> str:
    """Markdown: one table per workload, fewest rows first, then the ratios of all workloads.

    ``worst rows``: of the worst round, over those of `REFERENCE`.
    """
    table = {
        workload: {way: figures_of(points, way) for way in points if _in_both(points, way)[0]}
        for workload, points in read(known).items()
    }
    table = {workload: found for workload, found in table.items() if found}
    lines: list[str] = []
    head = (
        "| reuse | rows computed | overridden | siblings' KL | median | 90 % "
        "| of pic's (95 %) | top-1 | worst rows |"
    )
    for workload, found in table.items():
        rounds, agents = (
            _range(one[key] for one in found.values()) for key in ("rounds", "siblings")
        )
        lines += [
            f"**{workload}**: {rounds} rounds, {agents} siblings",
            "",
            head,
            "| --- |" + " --- |" * 8,
        ]
        for way, one in sorted(found.items(), key=lambda item: item[1]["computed"]):
            lines.append(
                f"| {way} | {one['computed']:.1%} | {one['overridden']:.1%} | {one['kl']:.5f} "
                f"| {one['median']:.5f} | {one['p90']:.5f} "
                f"| {one['ratio']:.3f} ({one['ratio_low']:.3f} to {one['ratio_high']:.3f}) "
                f"| {one['top1']:.3f} | {one['rows_over_pic']:.2f} |"
            )
        lines.append("")
    lines += ["Upper ends of the intervals of siblings' KL over pic's:", ""]
    lines.append("| reuse | " + " | ".join(table) + " | worst | rows of pic's |")
    lines.append("| --- |" + " --- |" * (len(table) + 2))
    everywhere = [way for way in WAYS if table and all(way in found for found in table.values())]
    for way in everywhere:
        all_ = [found[way] for found in table.values()]
        rows = sum(one["rows"] for one in all_) / sum(one["rows_of_pic"] for one in all_)
        ratios = " | ".join(f"{one['ratio_high']:.4f}" for one in all_)
        worst = max(one["ratio_high"] for one in all_)
        lines.append(f"| {way} | {ratios} | {worst:.4f} | {rows:.2f} |")
    return "\n".join(lines)


def _range(counts: Iterable[float]) -> str:
    found = sorted(set(counts))
    ends = dict.fromkeys(f"{one:.0f}" for one in (found[0], found[-1]))
    return " to ".join(ends)


def draw(workload: str, points: Mapping[str, list[Figures]], path: Path) -> None:
    """Siblings' KL against rows computed, one line per source and kind of selection."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[tuple[float, float, str]]] = {}
    for way in points:
        if not _in_both(points, way)[0]:
            continue
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
    pic = siblings_kl(points[REFERENCE])
    axis.axhline(pic / 10, linestyle=":", color="grey", linewidth=1)
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
