"""What sharing over time can save on recorded rounds, in pages.

    python -m bench.sharing [agentsociety generative_agents_25 ...] [--agents 25] [--rounds 10]
                            [--block-size 16] [--json build/sharing.json]

The host half plans what was recorded, computes nothing, and commits. Either a part of the agents
plays in each round and the others keep their Mirrors, or all play and then all but a few are
released. Counted are, means over all rounds but the first, or at the end:

- fold: pages that `DiffStore.fold` saves.
- re-master: a row that own rows replace in all Mirrors of its Master is read by nobody. The rows
  of another agent in its place would save that agent's own. Without changing a bit, only of an
  agent that stands where the Master was computed: its pages of own rows that this saves. Any other
  row is read by somebody, who would need an own row then.
- promote: own rows whose tokens, and all tokens before them, are those of an own row of another
  agent: no others can be the same bit for bit. Pages that are saved if runs of them that the same
  agents hold become Masters.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from evals.models import load_model
from evals.workloads import RecordedRound, find_workload, read_rounds, tokenize_round
from tokendance.host.folding import folding_of
from tokendance.host.mirror import Mirror, pages_for
from tokendance.host.plan import Policy
from tokendance.host.record import DeviceProfile, WorkShape
from tokendance.host.scheduler import Scheduler
from tokendance.host.segments import Segment
from tokendance.host.selection import LeadingTokens

WORKLOADS = ("agentsociety", "generative_agents_25", "generative_agents_3", "debate", "town_square")
SELECTION = LeadingTokens(4, unseen=96)
PARTS = (1.0, 0.5, 0.25)
"""Of the agents, who play in a round."""
STAY = (5, 1)
"""Agents that are left at the end."""
SAVINGS = ("fold", "remaster", "promote")
PAGES = 1 << 19

Encode = Callable[[str], list[int]]


class Town:
    """The agents of a recording, and the scheduler that plans their rounds."""

    def __init__(self, recorded: Sequence[RecordedRound], encode: Encode, block_size: int) -> None:
        self.encode = encode
        self.block_size = block_size
        self.texts = {
            block.block_id: block.text
            for one in recorded
            for agent in one.agents
            for block in agent.blocks
        }
        work = WorkShape(max_tile_rows=64, read_bound_rows=64, target_items=264)
        profile = DeviceProfile(30, PAGES, block_size, 1, 1 << 17, work)
        self.scheduler = Scheduler(profile)

    @property
    def mirrors(self) -> dict[str, Mirror]:
        return self.scheduler.books.mirrors

    def play(self, one: RecordedRound, names: Sequence[str]) -> None:
        """Some agents' prompts, and what was recorded that they answered, but for its last token,
        which is never fed."""
        prompts: dict[str, list[Segment]] = tokenize_round(one, self.encode)
        said = {
            agent.name: self.encode(self.texts.get(agent.output_id, ""))[:-1]
            for agent in one.agents
            if agent.name in names
        }
        said = {name: ids for name, ids in said.items() if ids}
        plan = self.scheduler.plan(
            {name: prompts[name] for name in names}, Policy(selection=SELECTION)
        )
        while (step := self.scheduler.step(max_rows=1 << 20)) is not None:
            step.finish()
        if said and (step := self.scheduler.step(said, prefill=())) is not None:
            step.finish()
        plan.commit()

    def counted(self) -> dict[str, int]:
        """Pages of the Mirrors and of the Masters that they use, and what could be saved."""
        mirrors = list(self.mirrors.values())
        masters = {one.serial: one for mirror in mirrors for one in mirror.uses.masters}
        pages = [len(one.own_pages) for one in mirrors]
        pages += [len(one.pages) for one in masters.values()]
        return {
            "pages": sum(pages),
            "fold": self._fold(mirrors),
            "remaster": self._remaster(mirrors),
            "promote": self._promote(mirrors),
        }

    def _fold(self, mirrors: Sequence[Mirror]) -> int:
        found = [folding_of(mirror, self.block_size) for mirror in mirrors]
        return sum(one.pages_saved for one in found if one is not None)

    def _remaster(self, mirrors: Sequence[Mirror]) -> int:
        read: dict[int, np.ndarray] = {}
        for mirror in mirrors:
            for use in mirror.uses:
                rows = read.setdefault(use.master.serial, np.zeros(use.master.length, bool))
                rows[np.setdiff1d(np.arange(use.length), use.overridden(self.block_size))] = True
        saved = 0
        for mirror in mirrors:
            rows_saved = 0
            for use in mirror.uses:
                if use.shift == 0:
                    rows, mine = read[use.master.serial], use.overridden(self.block_size)
                    rows_saved += int((~rows[mine]).sum())
                    rows[mine] = True  # by this agent from now on
            saved += self._pages_less(mirror, rows_saved)
        return saved

    def _promote(self, mirrors: Sequence[Mirror]) -> int:
        number: dict[tuple[int, int], int] = {}  # of a token behind others
        holders: dict[int, list[int]] = defaultdict(list)
        for i, mirror in enumerate(mirrors):
            ids = np.concatenate([one.token_ids for one in mirror.segments])
            at, rows = -1, []
            for token in ids[: mirror.length].tolist():
                at = number.setdefault((at, token), len(number))
                rows.append(at)
            for row in mirror.own_position.tolist():
                holders[rows[row]].append(i)
        runs = Counter(tuple(who) for who in holders.values() if len(who) > 1)
        less: Counter[int] = Counter()
        for who, rows_of in runs.items():
            less.update(dict.fromkeys(who, rows_of))
        saved = sum(self._pages_less(mirrors[i], rows_of) for i, rows_of in less.items())
        return max(saved - sum(pages_for(rows_of, self.block_size) for rows_of in runs.values()), 0)

    def _pages_less(self, mirror: Mirror, rows: int) -> int:
        own = len(mirror.own_position)
        return pages_for(own, self.block_size) - pages_for(own - rows, self.block_size)


def measured(
    recorded: Sequence[RecordedRound], encode: Encode, block_size: int
) -> list[dict[str, Any]]:
    """A row for each part of the agents that plays, and for each number that is left."""
    found: list[dict[str, Any]] = []
    for part in PARTS:
        town, drawn, counts = Town(recorded, encode, block_size), random.Random(0), []
        for number, one in enumerate(recorded):
            names = [agent.name for agent in one.agents]
            some = max(round(part * len(names)), 1)
            town.play(one, drawn.sample(names, some) if number else names)
            counts.append(town.counted())
        mean = {key: float(np.mean([one[key] for one in counts[1:]])) for key in counts[0]}
        found.append({"part": part, "left": None} | mean)
        if part == 1:
            everybody = town
    for left in STAY:
        if left >= len(everybody.mirrors):
            continue
        for name in list(everybody.mirrors)[:-left]:
            everybody.scheduler.books.drop(name)
        found.append({"part": 1.0, "left": left} | everybody.counted())
    return found


def text(report: Mapping[str, Any]) -> str:
    """Markdown of the JSON."""
    lines = [
        "| workload | agents | who plays | pages | fold | re-master | promote |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in report["found"]:
        for row in one["rows"]:
            who = f"{row['part']:.0%}" if row["left"] is None else f"{row['left']} left"
            cells = [f"{row[name] / row['pages']:.1%}" for name in SAVINGS]
            lines.append(
                f"| {one['workload']} | {one['agents']} | {who} | {row['pages']:.0f} | "
                f"{' | '.join(cells)} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sharing", description=__doc__.split("\n")[0]
    )
    parser.add_argument("workloads", nargs="*", default=WORKLOADS)
    parser.add_argument("--agents", type=int, default=25, help="of a round, at most")
    parser.add_argument("--rounds", type=int, default=10, help="of a workload, at most")
    parser.add_argument("--block-size", type=int, default=16, help="rows of a page: 8, 16 or 32")
    parser.add_argument("--json", type=Path, default=Path("build/sharing.json"))
    options = parser.parse_args(arguments)
    _, tokenizer = load_model("smollm2")
    encode = cache(partial(tokenizer.encode, add_special_tokens=False))
    found = []
    for name in options.workloads:
        recorded = read_rounds(find_workload(name), agents=options.agents)
        recorded = [one for one in recorded if one.session == recorded[0].session]
        recorded = recorded[: options.rounds]
        rows = measured(recorded, encode, options.block_size)
        agents = len(recorded[0].agents)
        found.append({"workload": name, "agents": agents, "rounds": len(recorded), "rows": rows})
        print(f"{name}: {len(recorded)} rounds", file=sys.stderr)
    report = {"bench": "sharing", "block_size": options.block_size, "found": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
