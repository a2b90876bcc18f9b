"""Any order of what can be done to a store with a directory, against a dictionary of dense rows."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faulty_disk
import torch
from driving import GEOMETRY, run_round, tokens
from faulty_disk import FaultyDisk
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_books import check_store
from stored_rounds import contents, open_store, put, same_contents
from torch import Tensor

import tokendance as td
from tokendance import Codec
from tokendance.files import compaction

AGENTS = st.sampled_from(["ada", "ben", "eve", "dan"])
STEPS = int(os.environ.get("MACHINE_STEPS", "25"))
EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "15"))
OFF = {"e4m3": 1 / 16, "int8": 1 / 254, "int4": 1 / 14}
"""How far off a coded element is at most, of the largest one."""
PAGE = 8 * GEOMETRY.row_bytes
LARGE = 128


class StoreMachine(RuleBasedStateMachine):
    """``rows`` is what the agents hold, ``flushed`` what they held at the last flush.

    In a small pool agents move down when pages are short, by a flush that nobody has asked for.
    """

    @initialize(
        seed=st.integers(0, 1 << 30),
        pages=st.sampled_from([LARGE, 30]),
        host=st.sampled_from([0, 12]),
        disk=st.sampled_from([None, 48]),
        code=st.sampled_from(["exact", "exact", *OFF]),
    )
    def begin(self, seed: int, pages: int, host: int, disk: int | None, code: str) -> None:
        torch.manual_seed(seed)
        self.code = code
        codec = Codec(code, code)
        self.codecs = {"codec": codec, "host_codec": codec if host else None}
        self.capacity = {
            "capacity": pages * PAGE,
            "host_capacity": host * PAGE,
            "disk_capacity": None if disk is None else disk * PAGE,
        }
        self.is_large = pages == LARGE
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.scratch = tempfile.TemporaryDirectory(dir=memory)
        self.path = Path(self.scratch.name) / "store"
        self.disk = FaultyDisk()
        self.rows: dict[str, Tensor] = {}
        self.flushed: dict[str, Tensor] = {}
        self.open()

    def open(self, agents: set[str] | None = None) -> None:
        if agents is None and not self.is_large:
            agents = set()  # not all of them fit
        self.store = open_store(self.path, agents=agents, **self.codecs, **self.capacity)
        self.store._on_disk._directory._disk = self.disk
        self.store._on_disk._directory._catalogue._disk = self.disk

    def check(self, found: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """Bit for bit, or off by what coding once costs, however often they have moved; a rotation
        adds up the errors of a pair."""
        if self.code == "exact":
            assert same_contents(found, rows)
            return
        assert found.keys() == rows.keys()
        for agent, want in rows.items():
            off = (found[agent] - want).abs().max()
            assert off <= 1.5 * OFF[self.code] * want.abs().max()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            if not self.flush_if_it_fits():
                self.store.close(flush=False)
            self.store.close()
            self.check(contents(open_store(self.path, "1MiB")), self.flushed)
            self.scratch.cleanup()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """What makes room flushes what is there before anything is committed; where the disk is
        full, nothing is done at all."""
        catalogue = self.store._on_disk._directory._catalogue
        before, generation = dict(self.rows), catalogue.generation
        try:
            yield
        except td.OutOfPagesError:
            assert not self.is_large
            assert set(self.store.agents) == before.keys()
        finally:
            if catalogue.generation != generation:
                self.flushed = before

    def flush_if_it_fits(self) -> bool:
        try:
            self.store.flush()
        except OSError as error:
            assert self.capacity["disk_capacity"] is not None
            assert "disk_capacity: expected at most" in str(error)  # noqa: PT017
            return False
        self.flushed = dict(self.rows)
        return True

    @rule(agent=AGENTS, count=st.integers(5, 60))
    def put(self, agent: str, count: int) -> None:
        with self.moving():
            self.rows |= put(self.store, {agent: count})

    @rule(agents=st.sets(AGENTS, min_size=1), news=st.lists(st.integers(0, 5), max_size=3))
    def play(self, agents: set[str], news: list[int]) -> None:
        """A round in which what is stored is reused."""
        heard = [td.shared(tokens(seed, 12 + 5 * seed)) for seed in news]
        mine = {agent: td.private(tokens(100 + i, 3 + i)) for i, agent in enumerate(sorted(agents))}
        collector = td.KVCollector(self.store)
        with self.moving():
            run_round(collector, {agent: [*heard, own] for agent, own in mine.items()})
            self.rows |= contents(self.store, agents)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        agent = data.draw(st.sampled_from(sorted(self.rows)))
        self.store.release(agent)
        del self.rows[agent]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), pages=st.integers(0, 128))
    def rest(self, data: st.DataObject, pages: int) -> None:
        """And some of the Masters that they have used are evicted."""
        agents = data.draw(st.sets(st.sampled_from(sorted(self.rows)), min_size=1))
        if not self.flush_if_it_fits():
            return
        self.store.rest(agents)
        assert set(self.store._tiers.on_disk) >= agents
        self.store.evict(pages)

    @rule(agents=st.sets(AGENTS, max_size=2))
    def prefetch(self, agents: set[str]) -> None:
        agents &= self.rows.keys()
        with self.moving():
            self.store.prefetch(agents)
            assert not agents & set(self.store.resting)
            self.check(contents(self.store, agents), {a: self.rows[a] for a in agents})

    @rule(agent=AGENTS)
    def reopen_with_few(self, agent: str) -> None:
        if not self.flush_if_it_fits():
            return
        self.store.close()
        self.open({agent} & self.rows.keys())

    @rule(pages=st.integers(1, 12))
    def evict(self, pages: int) -> None:
        self.store.evict(pages)

    @rule()
    def fold(self) -> None:
        self.store.fold()

    @rule(tidy=st.booleans())
    def flush(self, tidy: bool) -> None:
        compaction.SLACK = -(1 << 40) if tidy else 64 << 20
        self.flush_if_it_fits()

    @rule(after=st.integers(0, 30))
    def flush_on_a_disk_that_fails(self, after: int) -> None:
        """Whether anything has failed or not, it can be repeated."""
        self.disk.at = len(self.disk.done) + after
        self.disk.fault = faulty_disk.NO_SPACE
        try:
            self.store.flush()
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
        self.disk.at = None
        self.flush_if_it_fits()

    @precondition(lambda self: self.is_large)
    @rule()
    def reopen(self) -> None:
        if not self.flush_if_it_fits():
            return
        self.store.prefetch(self.store.resting)
        before = self.store.stats()
        self.store.close()
        self.open()
        after = self.store.stats()
        assert (after.masters, after.own_rows, after.master_rows) == (
            *(before.masters, before.own_rows, before.master_rows),
        )

    @rule()
    def crash(self) -> None:
        """What was not flushed is gone."""
        self.store.close(flush=False)
        self.open()
        self.rows = dict(self.flushed)

    @rule()
    def compact(self) -> None:
        self.store.compact()
        kept = self.store._on_disk._directory
        assert kept.file_bytes == kept.live_bytes

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """An agent passes through an export, and is released meanwhile."""
        agent = data.draw(st.sampled_from(sorted(self.rows)))
        exported = self.path.with_name("exported")
        with self.moving():
            self.store.export_agents(exported, [agent])
        if exported.exists():
            self.store.release(agent)
            rows = self.rows.pop(agent)
            with self.moving():
                assert self.store.import_agents(exported) == [agent]
                self.rows[agent] = rows
            shutil.rmtree(exported)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "store"):
            return
        assert set(self.store.agents) == self.rows.keys()
        here = {agent: self.rows[agent] for agent in self.store.mirrors}
        self.check(contents(self.store, here), here)
        check_store(self.store)
        tiers = self.store.stats().tiers
        for name, limit in self.capacity.items():
            tier = tiers.get(name.removesuffix("_capacity").replace("capacity", "device"))
            assert tier is None or limit is None or tier.used_bytes <= limit
        assert sum(tier.agents for tier in tiers.values()) == len(self.rows)

    @invariant()
    def files_are_as_they_say(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.verify() == {}
        kept = self.store._on_disk._directory
        known = self.store._on_disk
        groups = {one.group for one in known._mirrors.values()} | set(known._masters.values())
        assert groups - {None} == kept.groups.keys()
        assert {group.file for group in kept.groups.values()} == kept.files.keys()
        names = {one.name for one in self.path.glob("*.safetensors")}
        assert names >= {f"{number:08d}.safetensors" for number in kept.files}


StoreMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None
)
TestStoreMachine = StoreMachine.TestCase
