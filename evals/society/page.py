"""One self-contained page about a run: pictures, conversation, tables, and how to get it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from evals.society import charts
from evals.society.figures import Figures, figures_of, table, total
from evals.society.meeting import Meeting
from evals.society.prompt_map import ROW_KINDS, kinds_of, prompt_map
from evals.society.report import RoundReport
from evals.society.style import STYLE

__all__ = ["page"]

_MIB = float(1 << 20)


def page(
    reports: Sequence[RoundReport],
    memory: Sequence[tuple[int, int, int]],
    meeting: Meeting,
    command: str,
    model: str,
    facts: Mapping[str, Mapping[str, str]],
) -> str:
    """The page as HTML; it needs no other resource.

    Args:
        reports: the rounds, at least one.
        memory: see `Society.memory_by_agents`.
        meeting: that was held.
        command: that gives the run again.
        model: its name.
        facts: about versions and machine: sections of names and values.
    """
    rounds = [figures_of(report) for report in reports]
    people = len(meeting.people)
    body = [
        f"<h1>{people} agents, {len(reports)} rounds, one KV cache</h1>",
        f"<p>{people} townspeople, each with a private persona and memory, talk in rounds. "
        "In every round each of them reads what everybody said in the last one, in an order of its "
        "own: the prompts hold the same messages, at other positions. What one agent has "
        "computed of a message is moved to its place in the other prompts, and only a few rows "
        "are computed again. Every number on this page was measured in the run that made it: "
        f"<code>{escape(model)}</code>, on a CPU.</p>",
        f'<p class="soft">{escape(meeting.topic)}</p>',
        _tiles(rounds[-1], total(rounds)),
        _maps(reports),
        _memory(reports, memory),
        _time(reports),
        _conversation(reports, meeting),
        _tables(rounds),
        _again(command, facts),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tokendance: {people} agents, {len(reports)} rounds</title>"
        f"<style>{STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _tiles(last: Figures, everything: Figures) -> str:
    def value(figures: Figures, key: str) -> float:
        return figures[key] or 0.0

    rows, prompt = value(everything, "rows"), value(everything, "prompt_tokens")
    stored, dense = value(last, "kv_bytes_stored"), value(last, "kv_bytes_dense")
    prefill = value(everything, "plan_s") + value(everything, "prefill_s")
    full = everything["full_prefill_s"]
    tiles = [
        (f"{100 * rows / prompt:.0f} %", f"of the rows computed: {rows:,.0f} of {prompt:,.0f}"),
        (
            f"{dense / stored:.1f}×",
            f"less KV memory in the last round: {stored / _MIB:.1f} MiB for "
            f"{dense / _MIB:.1f} MiB dense",
        ),
        (
            f"{prefill:.1f} s",
            "for planning and prefill of all rounds"
            + (f"; full prefill took {full:.1f} s" if full is not None else ""),
        ),
        (f"{value(everything, 'decode_tokens_per_s'):.1f}", "tokens a second, all agents together"),
    ]
    if everything["top1"] is not None:
        tiles.append(
            (
                f"{100 * everything['top1']:.1f} %",
                "of likeliest tokens as in full recompute; mean KL "
                f"{value(everything, 'kl'):.1e} nats",
            )
        )
    cells = [f'<div class="card tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _maps(reports: Sequence[RoundReport]) -> str:
    longest = max(bar.length for report in reports for bar in report.prompts)
    parts = [
        "<h2>Where the rows of every prompt come from</h2>",
        "<p>One bar is one agent's prompt, from its first row to its last. Warm colours were "
        "computed in that round, cold ones were not. A band joins the same message in "
        "neighbouring bars. Hover over a row for what stands there.</p>",
        _legend([(f"o-{kind.value}", ROW_KINDS[kind]) for kind in kinds_of(reports)]),
    ]
    for report in reports:
        share = 100 * report.rows / report.prompt_tokens
        parts.append(
            f"<h3>Round {report.round + 1}: {report.rows:,.0f} of {report.prompt_tokens:,} rows "
            f"computed ({share:.0f} %)</h3>" + _figure(prompt_map(report, longest))
        )
    return "\n".join(parts)


def _memory(reports: Sequence[RoundReport], memory: Sequence[tuple[int, int, int]]) -> str:
    return (
        "<h2>KV memory</h2><p>Dense is one whole cache per agent. Stored is one Master of each "
        "message, and per agent the rows that differ.</p>"
        + _legend([("dot-dense", "dense"), ("dot-stored", "stored")])
        + '<div class="pair">'
        + _figure(
            charts.memory_by_agents(memory),
            "Pages that the last round's prompts take if only the first n agents had met: planned "
            "in an empty store for each n.",
        )
        + _figure(
            charts.memory_by_round(reports),
            "Pages that each round's prompts took in the run, after the prefill.",
        )
        + "</div>"
    )


def _time(reports: Sequence[RoundReport]) -> str:
    entries = [("t-plan", "plan"), ("t-prefill", "prefill"), ("t-decode", "decode")]
    note = "Wall time of each round."
    if any(report.audit for report in reports):
        entries.append(("t-full", "full prefill of the same prompts, one after the other"))
        note += " The full prefill is transformers' own forward, run afterwards for comparison."
    return (
        f"<h2>Time by part</h2><p>{note}</p>"
        + _legend(entries)
        + _figure(charts.time_by_part(reports))
    )


def _conversation(reports: Sequence[RoundReport], meeting: Meeting) -> str:
    roles = {person.name: person.role for person in meeting.people}
    parts = ["<h2>What was said</h2>"]
    for report in reports:
        parts.append(f"<h3>Round {report.round + 1}</h3>")
        parts += [
            f'<p class="said"><b>{escape(name)}</b><small>{escape(roles[name])}</small>'
            f"{escape(report.messages[name])}</p>"
            for name in roles
        ]
    personas = [
        f'<p class="said"><b>{escape(person.name)}</b>{escape(person.biography)}</p>'
        for person in meeting.people
    ]
    parts.append(f"<details><summary>The personas</summary>{''.join(personas)}</details>")
    return "\n".join(parts)


def _tables(rounds: Sequence[Figures]) -> str:
    head, rows = table(rounds)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return (
        "<h2>The numbers</h2>"
        f'<div class="card scroll"><table><tr>{titles}</tr>{lines}</table></div>'
        '<p class="soft">Rows are row-layers divided by layers. Repaired rows are rows of shared '
        "messages computed again. Held is all that the store held at the end of the round, old "
        "and decoded messages included. KL is KL(full recompute || this run) in nats over the "
        "tokens that were sampled; siblings leave out the agents that computed Masters.</p>"
    )


def _again(command: str, facts: Mapping[str, Mapping[str, str]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for entries in facts.values()
        for name, value in entries.items()
    )
    return (
        f"<h2>The run</h2><pre class='card'>{escape(command)}</pre>"
        f"<details><summary>Versions and machine</summary>"
        f'<div class="scroll"><table class="facts">{rows}</table></div></details>'
    )


def _figure(svg: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="card"><div class="scroll">{svg}</div>{below}</figure>'


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{name}"></i>{escape(label)}</li>' for name, label in entries)
    return f'<ul class="legend">{items}</ul>'
