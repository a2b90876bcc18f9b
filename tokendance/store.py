"""`DiffStore`: one Master per shared segment, one Mirror per agent, over one pool of pages."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import torch

from tokendance.device.arrays import Array, as_tensor, as_tensors, is_array
from tokendance.device.codec import EXACT, Codec
from tokendance.device.executor import Executor
from tokendance.device.geometry import BLOCK_SIZES, KVGeometry
from tokendance.device.host_pages import host_page_bytes
from tokendance.device.pool import PagePool
from tokendance.device.quantization import Quantization
from tokendance.device.ranges import marked
from tokendance.device.rope import Rope
from tokendance.encoding import encode_round
from tokendance.files import tenant_directory, transfer
from tokendance.files.directory import Directory, Progress
from tokendance.files.durability import Durability
from tokendance.files.errors import DamagedError
from tokendance.files.identity import Identity
from tokendance.files.memory import Held
from tokendance.host.books import Books, PageAllocator
from tokendance.host.mirror import Mirror
from tokendance.host.plan import LivePlan, Plan
from tokendance.host.reading import Reading
from tokendance.host.record import RestoreRecord
from tokendance.host.scheduler import Scheduler
from tokendance.host.segments import Segment
from tokendance.host.tenant_segments import TenantSegments
from tokendance.host.uncopied import Uncopied
from tokendance.lock import ClosedError, StoreLock
from tokendance.sizes import parse_bytes
from tokendance.stats import StoreStats, count
from tokendance.tenants import LentPages
from tokendance.tiers import Tiers


class DiffStore(
    Uncopied,
    instead="write it with store.export_agents(path) and read it with DiffStore.open",
):
    """Keeps the KV of many agents as Masters and Mirrors.

    Args:
        geometry: of the model.
        rope: of all layers, or one (None: no RoPE) per layer.
        capacity: bytes of pages, an int or text such as ``"8GiB"``. Not with ``pool``.
        device: of the pages. Not with ``pool``.
        block_size: rows of a page: 8, 16 or 32. Not with ``pool``.
        pool: pages of the engine, instead of own ones. They may be quantized, see
            :class:`PagePool`.
        quantization: keeps own pages in e4m3 or int8. Not with ``pool``.
        model: what computes the keys and values, a name and revision or
            `tokendance.integrations.transformers.fingerprint_of`. What is on disk is read for the
            same one only.
        host_capacity: bytes of host memory, as ``capacity``: the tier below the device, to which
            rows are moved that are longest unused when pages are short, and those of suspended
            agents (`Plan.suspend`).
        zero_freed: pages that nobody uses any more are overwritten with zeros before they are given
            back to the pool, and before the call returns that gave them up. What is taken again
            within one call is not.
        spare: bytes of pages, as ``capacity``, that a thread keeps free by moving down ahead what
            is longest unused, so that nobody who wants pages waits for it.
        host_codec: how rows are kept in host memory, those of suspended agents too, Masters as own
            rows. Not of quantized pages.

    Raises:
        ValueError: for arguments that do not fit each other, naming the argument.

    A store belongs to one model: what is matched in it was computed by that model. LoRAs and images
    are kept apart by the segments' namespaces, and tenants by `tenant`.

    Any number of threads may use it at once, and what is made of it: collectors, plans, and each
    step by one thread. An agent that has not ended belongs to one thread at a time
    (docs/engine.md). The process that made a store is the only one that can use it.

    Attributes:
        lock: held by whoever reads or changes the books; never while anything is computed.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        rope: Rope | Sequence[Rope | None],
        capacity: int | str | None = None,
        device: torch.device | str = "cpu",
        block_size: int = 16,
        pool: PagePool | None = None,
        quantization: Quantization | None = None,
        model: str = "",
        host_capacity: int | str | None = None,
        zero_freed: bool = False,
        spare: int | str = 0,
        host_codec: Codec | None = None,
    ) -> None:
        if (capacity is None) == (pool is None):
            raise ValueError("capacity: expected either capacity or pool, got both or neither")
        if pool is not None and quantization is not None:
            raise ValueError("quantization: expected that of the pool, got one beside a pool")
        if host_codec is not None and host_capacity is None:
            raise ValueError("host_codec: expected one beside host_capacity, got one without")
        if zero_freed and pool is not None and pool.allocate is not None and pool.num_free is None:
            raise ValueError("zero_freed: expected a pool with num_free, got one without")
        if pool is None:
            assert capacity is not None
            if block_size not in BLOCK_SIZES:
                raise ValueError(f"block_size: expected one of {BLOCK_SIZES}, got {block_size}")
            dtype = geometry.dtype if quantization is None else quantization.dtype
            page_bytes = geometry.row_bytes * block_size * dtype.itemsize // geometry.dtype.itemsize
            pages = parse_bytes(capacity) // page_bytes
            if pages < 1:
                raise ValueError(
                    f"capacity: expected at least one page of {page_bytes} bytes, got {capacity}"
                )
            pool = PagePool.own(geometry, pages, block_size, device, quantization)
        page_bytes, codec = pool.page_bytes, host_codec or EXACT
        host_pages = 0
        if host_capacity is not None:
            host_pages = parse_bytes(host_capacity) // host_page_bytes(pool, codec)
        executor = Executor(geometry, rope, pool, host_pages, codec)
        allocator = PageAllocator(pool.num_pages, pool.allocate, pool.free, pool.num_free)
        lock = StoreLock(executor.copy, executor.clear)
        scheduler = Scheduler(executor.profile, allocator, guard=lock, clears=zero_freed)
        self._begin(model, executor, scheduler, lock, parse_bytes(spare, "spare") // page_bytes)

    def _begin(
        self,
        model: str,
        executor: Executor,
        scheduler: Scheduler,
        lock: StoreLock,
        spare: int = 0,
    ) -> None:
        self.geometry = executor.geometry
        self.model = model
        self.pool = executor.pool
        self.executor = executor
        self.max_position = executor.max_position
        self.lock = lock
        self.scheduler = scheduler
        self._restorable: dict[tuple[int, ...], _Restorable] = {}
        self._tenants: dict[str, Tenant] = {}
        self._durability: Durability | None = None
        self._codec = Codec()
        self._tiers = Tiers(scheduler, executor, spare)
        lock.before_leaving = [scheduler.order_clearing]
        if spare:
            lock.before_leaving.append(self._tiers.keep_spare)

    def __repr__(self) -> str:
        with self.lock:
            books = self.books
            return (
                f"DiffStore({len(books.mirrors)} agents, {len(books.masters)} Masters; pages: "
                f"{books.free_pages} free, {books.evictable_pages} evictable, "
                f"{books.used_pages - books.evictable_pages} held)"
            )

    @property
    def books(self) -> Books:
        """Who uses which page: of this package's modules, nothing in it is checked.

        Whoever reads more than one thing, or changes one, holds the `lock`.
        """
        self.scheduler.collect()
        return self.scheduler.books

    def live(self, plan: Plan) -> LivePlan:
        """What the scheduler keeps of a plan.

        Raises:
            ValueError: a plan of another store.
        """
        if plan._scheduler is not self.scheduler:
            raise ValueError("plan: expected one of this collector's store, got another's")
        return plan._live

    @property
    def block_size(self) -> int:
        """Rows of a page."""
        return self.pool.block_size

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def agents(self) -> list[str]:
        """The agents that have a Mirror, in whatever tier."""
        with self.lock:
            return [*self.books.mirrors, *self.resting]

    def length(self, agent: str) -> int:
        """Rows of the agent's KV. Raises ``KeyError`` for an unknown agent."""
        with self.lock:
            there = self._tiers.mirror_on_host(agent)
        return (there or self._mirror(agent)).length

    def mirror(self, agent: str) -> Mirror:
        """The agent's Mirror, not to be changed. Raises ``KeyError`` for an unknown agent."""
        return self._mirror(agent)

    @property
    def mirrors(self) -> Mapping[str, Mirror]:
        """All Mirrors in the pool, by agent; not to be changed."""
        with self.lock:
            return dict(self.books.mirrors)

    # Agents ---------------------------------------------------------------------------------------

    def release(self, agent: str) -> None:
        """Forgets an agent's KV. Masters that it used stay until they are evicted.

        Raises:
            KeyError: an unknown agent, or one released before.
        """
        with self.lock:
            forgotten = agent in self.damaged
            forgotten |= self._tiers.forget(agent)
            self.books.pinned.discard(agent)
            if agent in self.books.mirrors:
                self.books.drop(agent)
            elif not forgotten:
                self._unknown(agent)

    def _mirror(self, agent: str) -> Mirror:
        """An agent that rests is brought up: not to be called by who holds the lock."""
        while True:
            with self.lock:
                if agent in self.books.mirrors:
                    return self.books.mirrors[agent]
                self._check_known(agent)
            self.prefetch(agent)  # and another thread may put it to rest again

    def _check_known(self, agent: str) -> None:
        with self.lock:
            if agent not in self.books.mirrors and not self._tiers.is_below(agent):
                self._unknown(agent)

    def _unknown(self, agent: str) -> NoReturn:
        if agent in self.damaged:
            raise DamagedError(
                f"agent: expected one that is whole, got {agent!r}: {self.damaged[agent]}"
            )
        raise KeyError(f"agent: expected one of {sorted(self.agents)}, got {agent!r}")

    def evict(self, pages: int) -> int:
        """Drops Masters that nobody uses, the longest unused first: an engine wants its pages.

        Returns:
            Pages given back: fewer than asked for if no more Masters are idle, more if the last one
            had more.

        Raises:
            ValueError: a negative number.
        """
        if pages < 0:
            raise ValueError(f"pages: expected at least 0, got {pages}")
        with self.lock:
            return self.books.evict(pages)

    def fold(self) -> int:
        """Makes Masters that one agent alone uses own rows of it, where that takes fewer pages.

        What `restore` gives stays the same, bit for bit. Such a Master is found until it is
        evicted, as those are that nobody uses. In a quantized pool only those are folded that the
        agent uses where they were computed; agents of plans, and those that are not in the pool,
        stay as they are.

        Returns:
            Pages that have come free or can be evicted.
        """
        with marked(self.device, "tokendance fold"):
            return self._tiers.fold()

    def clear(self) -> None:
        """Forgets all agents and all Masters: the weights have changed, or another model comes.

        Raises:
            ValueError: a plan has agents that have not ended, or a step is open; nothing is
                forgotten.
        """
        with self.lock:
            self.scheduler.clear()
            self._restorable.clear()
            for agent in [*self.damaged, *self.resting]:
                self.release(agent)
            if self._durability is not None:
                self._durability.forget_masters()

    # Tenants --------------------------------------------------------------------------------------

    def tenant(
        self,
        name: str,
        key: bytes,
        quota: int | str,
        host_quota: int | str | None = None,
        disk_quota: int | str | None = None,
        *,
        agents: Iterable[str] | None = None,
        zero_freed: bool = False,
    ) -> Tenant:
        """A part of the store that shares nothing with the rest but the device.

        A tenant of a store that has a directory has one of its own there, which opens by the
        tenant's name and key: its agents are there again.

        Args:
            name: of the tenant: no other that is open has it.
            key: its secret, 16 to 64 bytes: digests of its segments are keyed by it.
            quota: bytes of pages, as ``capacity``. They are the tenant's own until it is closed;
                Masters that nobody uses are evicted for them.
            host_quota: bytes of host memory, likewise.
            disk_quota: bytes of rows that the tenant's files may have, as the ``disk_capacity`` of
                `open`, beside what the store itself may have there.
            agents: that are brought into the pool, as of `open`.
            zero_freed: as of a store; what `Tenant.close` gives back is zeros in any case.

        Raises:
            TypeError: a name that is no str, or a key that is no bytes.
            ValueError: a name that is taken, a key of another length or another than the tenant's,
                a quota of less than a page or of more than what nobody holds, a ``disk_quota`` or
                ``agents`` of a store without a directory, or a tenant instead of a store.
            OutOfPagesError: the quota has fewer pages than the agents need, or an engine's
                allocator, which does not say how many it has, has fewer.
            KeyError, StoreInUseError, OSError, DamagedError: as `open`, of the tenant's directory.
        """
        if isinstance(self, Tenant):
            raise ValueError(f"tenant: expected a store, got tenant {self.name!r} of one")
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {type(name).__name__}")
        segments = TenantSegments(name, key)
        page_bytes = self.pool.page_bytes
        pages = parse_bytes(quota, "quota") // page_bytes
        if pages < 1:
            raise ValueError(
                f"quota: expected at least one page of {page_bytes} bytes, got {quota}"
            )
        host, host_pages = self.executor.host, 0
        if host_quota is not None:
            size = page_bytes if host is None else host.page_bytes
            host_pages = parse_bytes(host_quota, "host_quota") // size

        def lend() -> LentPages:
            with self.lock:
                self.scheduler.collect()
                self._check_untaken(name)
                return LentPages(self.scheduler, name, pages, host_pages)

        with self.lock:
            self._check_untaken(name)
        with ExitStack() as undo:
            directory = None
            if self._durability is not None:
                where = self._durability.path
                directory = tenant_directory.open_tenant(where, name, key, self._identity)
                undo.callback(directory.close)
            elif disk_quota is not None or agents is not None:
                raise ValueError("disk_quota: expected a store of DiffStore.open, got another")
            lent = self.scheduler.with_room(lend)
            undo.callback(self._give_back, lent)
            lent.overwrite(self.executor)
            tenant = Tenant(self, name, segments, lent, zero_freed)
            undo.callback(tenant.clear)
            if directory is not None:
                most = None if disk_quota is None else parse_bytes(disk_quota, "disk_quota")
                tenant._keep_in(directory, most, agents, None)
            with self.lock:
                self._check_untaken(name)
                self._tenants[name] = tenant
            undo.pop_all()
        return tenant

    def _give_back(self, lent: LentPages) -> None:
        lent.overwrite(self.executor)
        with self.lock:
            lent.give_back()

    def _check_untaken(self, name: str) -> None:
        if name in self._tenants:
            raise ValueError(f"name: expected one that is not taken, got {name!r} again")

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """Those that are open, by name."""
        with self.lock:
            return dict(self._tenants)

    # Restore and encode ---------------------------------------------------------------------------

    def restore(
        self,
        agents: str | Sequence[str],
        layers: int | Sequence[int],
        k_cache: Array | Sequence[Array],
        v_cache: Array | Sequence[Array],
        slot_mapping: Array,
        plan: Plan | None = None,
    ) -> None:
        """Writes agents' KV, keys at the agents' own positions, into an engine's cache.

        Args:
            agents: one agent or N.
            layers: one layer or several; then an array of ``k_cache`` and ``v_cache`` for each.
            k_cache, v_cache: written: ``[rows, Hk, D]`` or ``[num_pages, block, Hk, D]``, of the
                pool's dtype; of a quantized pool in fp32, fp16 or bf16 what its elements stand for.
            slot_mapping: int64 ``[T]`` for one agent, ``[N, T]`` for N: the row that position p
                goes to, page * block + row of the page; -1 = leave out. Positions from T on are
                left out.
            plan: the agents' rows in this plan, whose prompts are computed, instead of the stored
                ones.

        Raises:
            KeyError: an unknown agent.
            ValueError: an unknown layer, lists of different lengths, a plan of another store, or an
                agent of the plan that has ended, is in an open step or is not computed yet.
            RuntimeError: wrong shapes, dtypes or devices, naming the argument.

        Source: the fused restore of TokenDance (arXiv 2604.03143).
        """
        names = [agents] if isinstance(agents, str) else list(agents)
        which = [int(layers)] if isinstance(layers, int | np.integer) else list(layers)
        keys = [k_cache] if is_array(k_cache) else list(k_cache)
        values = [v_cache] if is_array(v_cache) else list(v_cache)
        slots = as_tensor(slot_mapping)
        slots = slots if slots.dim() == 2 else slots[None]
        with ExitStack() as stack:
            stack.enter_context(marked(self.device, "tokendance restore"))
            found = None
            while found is None:
                if plan is None:
                    self._bring_up(names)
                with self.lock:
                    if plan is not None or not any(map(self._tiers.is_below, names)):
                        found = self._restorable_of(names, plan)
                        stack.enter_context(found.reading)  # others may let go of the rows
            self.executor.restore(found.record, which, keys, values, slots)

    def _restorable_of(self, names: list[str], plan: Plan | None) -> _Restorable:
        none = np.empty((len(names), 0), np.int64)  # slots are on the device
        live = None if plan is None else self.live(plan)
        self.scheduler.collect()
        mirrors = self.scheduler.restorable(names, live)
        key = tuple(id(mirror) for mirror in mirrors)
        if live is None and key in self._restorable:
            return self._restorable[key]
        record = self.scheduler.restore(names, none, live)
        found = _Restorable(mirrors, record, Reading(self.scheduler, mirrors))
        if live is None:
            # An engine restores layer by layer: the last few groups of agents are worth keeping.
            # The Mirrors are kept with them, so that an id stays that of the same Mirror.
            if len(self._restorable) >= 8:
                self._restorable.pop(next(iter(self._restorable)))
            self._restorable[key] = found
        return found

    def put_round(
        self,
        dense: Mapping[str, tuple[Sequence[Array], Sequence[Array]]],
        prompts: Mapping[str, Sequence[Segment]],
        atol: float = 0.0,
        rtol: float = 0.0,
    ) -> None:
        """Stores dense caches that an engine made: encodes them against Masters.

        Segments that are not stored yet become Masters, copied from the agent that covers most of
        them.

        Args:
            dense: per agent its keys and values, an array ``[tokens, Hk, D]`` per layer, keys
                rotated at the agent's own positions 0, 1, ...
            prompts: per agent the segments of its prompt.
            atol, rtol: a row is not stored again if its Master row, moved to its position, is
                within ``atol + rtol * |moved|`` of it in every dim of K and V of every layer. At 0
                and 0 it must have the same bits, so that `restore` gives back what was put, bit for
                bit. A quantized pool keeps what the caches are rounded to, and comparisons are of
                that. A moved key is rounded once more, and its first rounding is turned with it, so
                that it hardly ever has the agent's bits: an ``atol`` of an eighth of the largest
                keys (e4m3) or of two scales (int8) finds such rows the same.

        Raises:
            TypeError: something else than segments.
            ValueError: agents, layers or lengths do not fit each other; the store is as it was.
            OutOfPagesError: the store is as it was, but for evictions.
        """
        tensors = {agent: (as_tensors(k), as_tensors(v)) for agent, (k, v) in dense.items()}
        with marked(self.device, "tokendance put_round"):
            self.scheduler.with_room(lambda: encode_round(self, tensors, prompts, atol, rtol))

    # On disk --------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        geometry: KVGeometry,
        rope: Rope | Sequence[Rope | None],
        capacity: int | str | None = None,
        device: torch.device | str = "cpu",
        block_size: int | None = None,
        pool: PagePool | None = None,
        quantization: Quantization | None = None,
        model: str = "",
        host_capacity: int | str | None = None,
        disk_capacity: int | str | None = None,
        codec: Codec | None = None,
        spare: int | str = 0,
        host_codec: Codec | None = None,
        agents: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> DiffStore:
        """A store whose committed agents survive the process, in a directory of their own.

        Agents of the directory, and their Masters, are brought into the pool. Those that are
        damaged are left out: `damaged` says why, the others are as they were. What a killed process
        has left behind is removed.

        Args:
            path: of the directory; it is made where there is none. Agents, prompts' token ids and
                keys and values are in it as they are: keep it as safe as the conversations.
            geometry, rope, capacity, device, pool, model, host_capacity, spare, host_codec: as of a
                new store.
            block_size, quantization: as of a new store; None: those of the directory.
            disk_capacity: bytes of rows, as ``capacity``, that its files may have after a flush,
                valid or not; None: any number.
            codec: how rows are kept on disk, those of tenants too; None: as in the directory, or as
                they are in a new one. Not of quantized pages.
            agents: that are brought into the pool; None: all. The others rest on disk until they
                are needed, see `rest`.
            progress: is told how many bytes of how many have been read.

        Raises:
            KeyError: one of the agents is not there.
            StoreInUseError: another process, or another store, has it open.
            OSError: it cannot be read or written.
            DamagedError: the catalogue is not as it was written.
            ValueError: it is no store, or one of another model, geometry, dtype, block size,
                quantization or RoPE; or arguments that do not fit.
            OutOfPagesError: capacity or pool has fewer pages than the agents need.
        """
        directory = Directory.open(path, create=True)
        try:
            if directory.tenant is not None:
                raise ValueError(
                    f"path: expected the directory of a store, got {path} of tenant "
                    f"{directory.tenant!r}; it opens by DiffStore.tenant"
                )
            found = None if directory.is_new else directory.identity
            if found is not None and pool is None:
                block_size = block_size or found.block_size
                quantization = quantization or found.quantization
            size = 16 if block_size is None else block_size
            made = (geometry, rope, capacity, device, size, pool, quantization, model)
            store = cls(*made, host_capacity, spare=spare, host_codec=host_codec)
            store._codec = codec or Codec(*(found.codec if found else ()))
            if found is None:
                directory.begin(store._identity)
            else:
                found.check_same(store._identity, path)
                if found.codec != store._identity.codec:
                    raise ValueError(
                        f"codec: expected that of {path}, {Codec(*found.codec)}, got {codec}"
                    )
            most = None if disk_capacity is None else parse_bytes(disk_capacity, "disk_capacity")
            store._keep_in(directory, most, agents, progress)
        except BaseException:
            directory.close()
            raise
        return store

    @property
    def _identity(self) -> Identity:
        return Identity.of(self.model, self.geometry, self.pool, self._codec)

    def _keep_in(
        self,
        directory: Directory,
        capacity: int | None,
        agents: Iterable[str] | None,
        progress: Progress | None,
    ) -> None:
        directory.ropes.check_same(self.executor.ropes, self.max_position, directory.path)
        made = (self._tiers.device, self.executor.ropes, self.max_position, self.lock)
        limit = "disk_quota" if isinstance(self, Tenant) else "disk_capacity"
        kept = Durability(directory, *made, capacity, limit)
        kept.load(agents, progress)
        self._durability = kept
        self._close = weakref.finalize(self, kept.close)
        self._tiers.keep_on(kept)

    @property
    def damaged(self) -> Mapping[str, str]:
        """Agents that are on disk and could not be read, and why. They stay there until an agent of
        the name is committed or released."""
        if self._durability is None:
            return {}
        with self.lock:
            known = self.books.mirrors
            return {name: why for name, why in self._durability.damage.items() if name not in known}

    @property
    def resting(self) -> list[str]:
        """Agents that are in host memory or on disk, and not in the pool."""
        with self.lock:
            return [*self._tiers.on_host, *self._tiers.on_disk]

    def rest(self, agents: str | Iterable[str]) -> None:
        """Gives the pages of agents back, and leaves their rows on disk, after a `flush`, or in
        host memory, where there is no disk.

        They are brought up when they are planned, restored or exported, as far as there is room: a
        plan computes again what there are no pages for.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent is pinned, or the store has neither a directory nor host memory.
            OSError: as `flush`; nothing has changed.
            OutOfPagesError: host memory is full; some may have been moved.
        """
        names = [agents] if isinstance(agents, str) else list(agents)
        with self.lock:
            for name in names:
                self._check_known(name)
            pinned = sorted(self.books.pinned & set(names))
        if pinned:
            raise ValueError(f"agents: expected agents that are not pinned, got {pinned}")
        tiers = self._tiers
        if self._durability is None and tiers.host is not None:
            tiers.to_host(names)
            return
        self._check_on_disk()
        tiers.rest(names)

    def prefetch(self, agents: str | Iterable[str], *, wait: bool = True) -> Future[None]:
        """Brings agents that rest in host memory or on disk into the pool, ahead of whoever needs
        them; others that are longest unused make room.

        Args:
            wait: False: a thread of the store's does so, and this returns at once.

        Returns:
            What is done when they are there, and has or raises what went wrong.

        Raises:
            KeyError: an unknown agent.
            OutOfPagesError: there are too few pages; those that did not come up rest as before.
            DamagedError: rows of one are damaged; `damaged` has it from now on.
        """
        names = [agents] if isinstance(agents, str) else list(agents)
        if not wait:
            return self._tiers.later(lambda: self._bring_up(names))
        self._bring_up(names)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _bring_up(self, names: list[str]) -> None:
        self._tiers.bring_up(names)
        for name in names:
            self._check_known(name)

    def pin(self, agents: str | Iterable[str]) -> None:
        """Keeps agents in the pool from being moved down, until `unpin` or `release`.

        Raises:
            KeyError, OutOfPagesError, DamagedError: as `prefetch`; none is pinned.
        """
        names = [agents] if isinstance(agents, str) else list(agents)
        while True:
            self._bring_up(names)
            with self.lock:
                if not any(map(self._tiers.is_below, names)):  # moved by another thread since
                    self.books.pinned.update(names)
                    return

    def unpin(self, agents: str | Iterable[str]) -> None:
        """Ends a `pin`. Agents that are not pinned are left as they are."""
        with self.lock:
            self.books.pinned.difference_update([agents] if isinstance(agents, str) else agents)

    def flush(self) -> None:
        """Returns when all that is committed is on disk, and what was released is not any more.

        What is on disk already is not written again.

        Raises:
            ValueError: the store has no directory.
            OSError: it cannot be written. Memory and disk are as they were before; it may be tried
                again.
        """
        self._check_on_disk()
        self._tiers.flush()

    def _check_on_disk(self) -> None:
        _ = self._on_disk

    @property
    def _on_disk(self) -> Durability:
        if self._durability is None:
            raise ValueError("store: expected one of DiffStore.open, got one in memory alone")
        return self._durability

    def close(self, *, flush: bool = True) -> None:
        """Lets others open the directory; the store goes on in memory, with the agents in the pool,
        and so do its tenants.

        Args:
            flush: before; without it the directory stays as the last flush has left it.

        Raises:
            OSError: as `flush`; the store stays open.
        """
        for tenant in self.tenants.values():
            tenant._leave_disk(flush)
        self._leave_disk(flush)

    def _leave_disk(self, flush: bool) -> None:
        if self._durability is not None:
            if flush:
                self.flush()
            self._durability = None
            self._tiers.keep_on(None)
            self._close()

    def __enter__(self) -> DiffStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self, progress: Progress | None = None) -> dict[str, str]:
        """Reads all that is on disk again, and compares checksums.

        Returns:
            What is wrong, by agent; ``catalogue`` and ``group N`` stand for what is no agent's. An
            agent that was loaded before its rows were damaged can still be exported from memory.

        Raises:
            ValueError: the store has no directory.
        """
        return self._on_disk.verify(progress)

    def compact(self, progress: Progress | None = None) -> int:
        """Removes rows from the files that are not valid any more; `flush` does so when they are
        more than the others.

        Returns:
            Bytes that the files have become smaller.

        Raises:
            ValueError: the store has no directory.
            OSError: it cannot be written; it is as it was.
        """
        return self._on_disk.compact(progress)

    def export_agents(
        self, path: str | os.PathLike[str], agents: Iterable[str] | None = None
    ) -> None:
        """Writes agents and the Masters that they use to a new directory, as `open` reads it.

        Args:
            path: of the directory; there must be nothing, or an empty one.
            agents: their names; None: all, and Masters that no agent uses.

        Raises:
            KeyError: an unknown agent.
            OSError: there is something, or it cannot be written; nothing is left of it.
            OutOfPagesError: there are too few pages for agents that were at rest.
        """
        names = None if agents is None else list(agents)

        device = self._tiers.device

        def chosen() -> list[Held]:
            books = self.books
            if any(names is None or name in names for name in self.resting):
                raise _AtRestError
            if names is None:
                return [Held(device, books.mirrors, list(books.masters.values()))]
            for name in names:
                self._check_known(name)
            mirrors = {name: books.mirrors[name] for name in names}
            used = {one.serial: one for mirror in mirrors.values() for one in mirror.uses.masters}
            return [Held(device, mirrors, [one for one in used.values() if one.stored])]

        made = (self._identity, device, self.executor.ropes, self.max_position)
        while True:
            self._bring_up(self.agents if names is None else names)
            with suppress(_AtRestError):  # put to rest by another thread since
                transfer.export_agents(path, *made, self.lock, chosen)
                return

    def import_agents(
        self,
        path: str | os.PathLike[str],
        agents: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> list[str]:
        """Brings agents of another store's directory into this one; that stays as it is.

        Args:
            path: of the directory, which nobody has open for writing.
            agents: their names; None: all.
            progress: is told how many bytes of how many have been read.

        Returns:
            The agents' names.

        Raises:
            KeyError: an agent that is not there.
            ValueError: the directory is no store, or one of another model, geometry, dtype, block
                size, quantization or RoPE; or this store has an agent of the name.
            DamagedError: one of the agents is damaged.
            OSError: it cannot be read, or somebody else has it open.
            OutOfPagesError: there are too few pages. Nothing has changed then, as after the other
                errors, but for evictions.
        """
        made = (self._identity, self._tiers.device, self.executor.ropes, self.max_position)
        names = None if agents is None else list(agents)
        return self.scheduler.with_room(
            lambda: transfer.import_agents(
                path, *made, self.lock, lambda: self.agents, names, progress
            )
        )

    # Statistics -----------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """Counts rows, pages and bytes, those of each tenant apart."""
        with self.lock:
            self.scheduler.collect()
            mine = count(self.scheduler, self.executor, self._tiers)
            tenants = list(self._tenants.values())
        found: dict[str, StoreStats] = {}
        for one in tenants:
            with suppress(ClosedError):  # since then
                found[one.name] = one.stats()
        return replace(mine, tenants=found)


class _AtRestError(Exception):
    """An agent that is wanted in the pool is on disk alone."""


class Tenant(DiffStore, instead="use the one that DiffStore.tenant made"):
    """A part of a store that shares nothing with the rest but the device; see `DiffStore.tenant`.

    It is used as a store is: `KVCollector` takes it, and what is put, planned, found, counted,
    evicted and restored with it are its own rows. Its books, its lock and its pages are its own:
    what another tenant does changes no answer, no count and no eviction of this one. No page passes
    from one to another but by `close`, which overwrites it.

    Attributes:
        name: of the tenant.
        private, shared, split_round: make its segments, as the functions of these names do, with
            digests that are keyed by its key. Prompts of other segments are refused.
    """

    def __init__(
        self,
        store: DiffStore,
        name: str,
        segments: TenantSegments,
        lent: LentPages,
        zero_freed: bool,
    ) -> None:
        self._store = store
        self._lent = lent
        self.name = name
        self.private = segments.private
        self.shared = segments.shared
        self.split_round = segments.split_round
        lock = StoreLock(store.executor.copy, store.executor.clear, name)
        scheduler = lent.scheduler(store.executor, lock, segments, zero_freed)
        self._begin(store.model, store.executor, scheduler, lock)
        self._codec = store._codec

    def __repr__(self) -> str:
        try:
            return f"Tenant({self.name!r}, {super().__repr__()})"
        except ClosedError:
            return f"Tenant({self.name!r}, closed)"

    def close(self, *, flush: bool = True) -> None:
        """Forgets the tenant in memory; the store has its pages again, overwritten with zeros.

        Nothing can be done with it any more. What is on disk stays: `DiffStore.tenant` opens it.

        Args:
            flush: before, where there is a directory.

        Raises:
            ValueError: a plan has agents that have not ended, a step is open, or it is closed
                already: nothing is forgotten. Or another thread uses it meanwhile.
            OSError: as `flush`; the tenant stays open.
        """
        if flush and self._durability is not None:
            self.flush()
        self.scheduler.clear()  # and what it frees is overwritten, if that is wanted
        self._leave_disk(flush=False)
        with self.lock:
            self.clear()
            if self.books.free_pages != self.books.limit or self.books.has_uncleared:
                who = f"tenant {self.name!r}"
                raise ValueError(f"{who}: expected no thread that uses it, got one")
            self.lock.close(f"tenant {self.name!r}: expected one that is open, got a closed one")
        self._lent.overwrite(self.executor)
        with self._store.lock:
            self._lent.give_back()
            del self._store._tenants[self.name]


@dataclass(eq=False)
class _Restorable:
    """Agents that are restored together."""

    mirrors: list[Mirror]
    record: RestoreRecord
    reading: Reading
