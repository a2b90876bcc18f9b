"""Codes of the lower tiers: what they lose, and how large a whole round is in them.

The first recorded round of a workload, by full prefill (what is lost is the codes' alone) and by
reuse. Between the prompts and the continuation all rows are coded and decoded in place, as if every
agent had been below and come up. The bytes are of the last recorded round of a workload with all
its agents, planned and not run, for caches in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.fidelity.replays import Round, compare, make_engine, read_workload, recompute
from evals.workloads import find_workload, read_rounds, tokenize_round
from tokendance.collector import KVCollector
from tokendance.device.codec import Codec, page_codecs
from tokendance.device.geometry import KVGeometry
from tokendance.device.pool import PagePool
from tokendance.device.rope import Rope
from tokendance.host.mirror import rows_of_pages
from tokendance.host.plan import Plan
from tokendance.host.selection import parse_selection
from tokendance.store import DiffStore

BLOCK_SIZE = 32
CODECS = {
    "as they are": Codec(),
    "e4m3": Codec("e4m3", "e4m3"),
    "int8": Codec("int8", "int8"),
    "int4": Codec("int4", "int4"),
    "keys int8, values int4": Codec("int8", "int4"),
    "own rows int4, Masters int8": Codec("int4", "int4", "int8", "int8"),
}
MODELS = {
    "SmolLM2-135M": KVGeometry(30, 9, 3, 64, torch.bfloat16),
    "Qwen2.5-14B": KVGeometry(48, 40, 8, 128, torch.bfloat16),
}
"""Whose caches' bytes are counted."""


def run(
    model: Any,
    tokenizer: Any,
    known: Mapping[str, Any],
    workloads: Sequence[str],
    selection: str,
    agents: int | None,
    counted: str,
    save: Callable[[Any], None],
    new_tokens: int = 12,
) -> dict[str, Any]:
    """Per workload, selection and codec KL and top-1 against full recompute, of the continuation of
    the first ``agents`` of the round; and per model and codec the bytes of a round of ``counted``.

    Workloads that are ``known`` are not measured again; the others are saved one by one.
    """
    result: dict[str, Any] = {
        "kl": dict(known.get("kl", {})),
        "bytes": bytes_of_round(tokenizer, counted, selection),
    }
    for workload in (name for name in workloads if name not in result["kl"]):
        (one,) = rounds = read_workload(workload, tokenizer)[:1]
        one.prompts = dict(list(one.prompts.items())[:agents])
        recompute(model, rounds, new_tokens)
        selections: dict[str, dict[str, Any]] = {}
        for chosen in ("everything", selection):
            engine = make_engine(model, "master", chosen, block_size=BLOCK_SIZE)
            found = selections[chosen] = {}
            for name, figures in _measured(engine, one):
                found[name] = figures
                print(workload, chosen, name, figures, flush=True)
        result["kl"][workload] = selections
        save(result)
    return result


def _measured(engine: Any, one: Round) -> Iterator[tuple[str, dict[str, float]]]:
    store = engine.collector.store
    plan = engine.collector.plan(one.prompts)
    engine.prefill(plan)
    pages = PlannedPages.of(store, plan)
    before = [store.pool.part(part)[pages.page] for part in range(2 * store.pool.num_layers)]
    # The prompts' last rows were computed before anything was coded.
    wanted = {agent: logits[1:] for agent, logits in one.logits.items()}
    masters = [agent for agent in plan.master_agents if agent in one.prompts]
    for name, codec in CODECS.items():
        for part, rows in enumerate(before):
            store.pool.part(part)[pages.page] = rows
        pages.code(store.pool, codec)
        kl, top1 = compare(wanted, engine.decode(plan, one.fed))
        for agent, ids in one.fed.items():
            plan.truncate(agent, plan.length(agent) - len(ids))
        siblings = [found for agent, found in kl.items() if agent not in masters]
        yield (
            name,
            {
                "kl": sum(kl.values()) / len(kl),
                "worst_kl": max(kl.values()),
                "siblings_kl": sum(siblings) / len(siblings),
                "top1": sum(top1.values()) / len(top1),
            },
        )
    plan.abort()


@dataclass
class PlannedPages:
    """Pages that hold the prompts of a plan.

    Attributes:
        page: all of them, int64; own rows' first.
        rows: how many each has.
        own: how many pages are of own rows.
        own_lengths, master_lengths: rows of each agent, and of each Master.
    """

    page: Tensor
    rows: Tensor
    own: int
    own_lengths: list[int]
    master_lengths: list[int]

    @classmethod
    def of(cls, store: DiffStore, plan: Plan) -> PlannedPages:
        states = store.live(plan).states
        masters = {one.serial: one for state in states for one in state.uses.masters}
        own = [(state.own_pages, len(state.own_position)) for state in states]
        every = [*own, *((one.pages, one.length) for one in masters.values())]
        pages = np.concatenate([one for one, _ in every]).astype(np.int64)
        rows = np.concatenate([rows_of_pages(len(a), n, store.block_size) for a, n in every])
        return cls(
            torch.from_numpy(pages),
            torch.from_numpy(rows),
            sum(len(one) for one, _ in own),
            [length for _, length in own],
            [one.length for one in masters.values()],
        )

    def code(self, pool: PagePool, codec: Codec) -> None:
        """Codes and decodes them in place."""
        kinds = (codec.of_own_rows, slice(0, self.own)), (codec.of_masters, slice(self.own, None))
        for codes, some in kinds:
            page, rows = self.page[some], self.rows[some]
            both = page_codecs(codes, pool.block_size, pool.k_pools[0].shape[2:], pool.dtype)
            for part in range(2 * pool.num_layers):
                one = both[part % 2]
                coded = torch.empty(len(page), one.page_bytes, dtype=torch.uint8)
                one.encode(pool.part(part), page, rows, coded)
                one.decode(coded, None, rows, pool.part(part), page)


def bytes_of_round(tokenizer: Any, workload: str, selection: str) -> dict[str, Any]:
    """Bytes of a workload's last recorded round, of all agents, below the device and dense."""
    recorded = read_rounds(find_workload(workload))[-1]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    prompts = tokenize_round(recorded, encode)
    dense = sum(segment.length for prompt in prompts.values() for segment in prompt)
    longest = max(sum(segment.length for segment in prompt) for prompt in prompts.values())
    small = KVGeometry(1, 1, 1, 64, torch.bfloat16)  # what is planned does not depend on it
    rope = Rope.default(head_dim=64, theta=10000.0, max_position=longest)
    store = DiffStore(small, rope, 2 * dense * small.row_bytes, block_size=BLOCK_SIZE)
    plan = KVCollector(store, selection=parse_selection(selection)).plan(prompts)
    pages = PlannedPages.of(store, plan)
    result: dict[str, Any] = {
        "workload": workload,
        "agents": len(prompts),
        "round": recorded.round,
        "dense_rows": dense,
        "own_rows": sum(pages.own_lengths),
        "master_rows": sum(pages.master_lengths),
        "models": {},
    }
    for name, geometry in MODELS.items():
        found = result["models"][name] = {}
        for code, codec in CODECS.items():
            own = _bytes(geometry, codec.of_own_rows, pages.own_lengths)
            masters = _bytes(geometry, codec.of_masters, pages.master_lengths)
            found[code] = {
                "bytes": own + masters,
                "smaller": dense * geometry.row_bytes / (own + masters),
                "one_more": dense * geometry.row_bytes / own,
            }
    plan.abort()
    return result


def _bytes(geometry: KVGeometry, codes: tuple[str, str], lengths: Sequence[int]) -> int:
    shape = geometry.num_kv_heads, geometry.head_dim
    both = page_codecs(codes, BLOCK_SIZE, shape, geometry.dtype)
    return geometry.num_layers * sum(one.size(length) for one in both for length in lengths)


def text(result: Mapping[str, Any]) -> str:
    """Markdown: a table of the losses, and one of the bytes."""
    lines = [
        "| workload | selection | rows below | KL | worst agent's | siblings' KL | top-1 |",
        "| --- |" + " --- |" * 6,
    ]
    lines += [
        f"| {workload} | {selection} | {name} | {one['kl']:.5f} | {one['worst_kl']:.5f} "
        f"| {one['siblings_kl']:.5f} | {one['top1']:.3f} |"
        for workload, selections in result["kl"].items()
        for selection, codecs in selections.items()
        for name, one in codecs.items()
    ]
    found = result["bytes"]
    lines += [
        "",
        f"Round {found['round']} of {found['workload']}, {found['agents']} agents: "
        f"{found['dense_rows']} rows, of which {found['own_rows']} are own rows, beside "
        f"{found['master_rows']} of Masters.",
        "",
        "| caches of | rows below | MiB | smaller than dense | an agent's own rows |",
        "| --- |" + " --- |" * 4,
    ]
    lines += [
        f"| {model} | {name} | {one['bytes'] / 2**20:.1f} | {one['smaller']:.1f}x "
        f"| {one['one_more']:.1f}x |"
        for model, codecs in found["models"].items()
        for name, one in codecs.items()
    ]
    return "\n".join(lines)
