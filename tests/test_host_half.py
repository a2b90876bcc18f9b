"""The host half by itself, and with workers in other processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import tokens
from symbolic_device import SymbolicDevice, check_books, profile
from torch import Tensor

import tokendance as td
from tokendance.device.executor import Executor
from tokendance.device.pool import PagePool
from tokendance.host.mirror import slots_of
from tokendance.host.plan import Policy
from tokendance.host.planned_step import PlannedStep
from tokendance.host.record import VERSION, StepRecord
from tokendance.host.scheduler import Scheduler

TESTS = Path(__file__).resolve().parent
A, B, C = tokens(1, 40), tokens(2, 24), tokens(3, 33)
END = td.private(tokens(13, 9))


def prompts() -> dict[str, list[td.Segment]]:
    a, b, c = td.shared(A), td.shared(B), td.shared(C)
    return {
        "a": [td.private(tokens(10, 13)), a, b, c, END],
        "b": [td.private(tokens(11, 29)), b, a, c, END],
        "c": [td.private(tokens(12, 5)), c, b, a, END],
    }


# Without torch ------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys

sys.modules["torch"] = None  # import torch raises ImportError
import numpy as np

from tokendance.host.plan import Policy
from tokendance.host.segments import private, shared
from tokendance.host.selection import Everything, KeyDeviation, LeadingTokens, Nothing
from tokendance.host.record import DeviceProfile, WorkShape
from tokendance.host.scheduler import Scheduler

profile = DeviceProfile(2, 200, 8, 64, 4096, WorkShape(32, 8, 4), host_pages=20)
for selection in (LeadingTokens(4), KeyDeviation(0.3), Everything(), Nothing()):
    scheduler = Scheduler(profile)
    segments = [shared(np.arange(n)) for n in (40, 24)]
    prompts = {
        name: [private(np.arange(i, 2 * i + 13)), *segments, private([i])]
        for i, name in enumerate("abc")
    }
    policy = Policy(selection)
    assert scheduler.pages_needed(prompts, policy) > 0
    plan = scheduler.plan(prompts, policy)
    plan.add({"d": [private([4]), segments[0], private([5])]})
    while step := scheduler.step(max_rows=50):
        assert step.record.rounds[0].buffer.dtype == np.int32
        if step.record.choices:
            step.choose([np.arange(one.count, dtype=np.int32) for one in step.record.choices])
        step.finish()
    scheduler.step({"a": [1], "b": [2, 3]}).finish()
    plan.suspend("a", to="host")
    plan.suspend("b")
    plan.resume(["a", "b"])
    while step := scheduler.step():
        if step.record.choices:
            step.choose([np.arange(one.count, dtype=np.int32) for one in step.record.choices])
        step.finish()
    scheduler.step({"c": [1]}).fail()
    assert plan.ended
    plan = scheduler.plan(prompts, policy)
    while step := scheduler.step():
        if step.record.choices:
            step.choose([np.arange(one.count, dtype=np.int32) for one in step.record.choices])
        step.finish()
    plan.commit(["a", "b"])
    plan.abort()
    scheduler.clear()
    assert scheduler.books.used_pages == 0
assert not [name for name in sys.modules if name.startswith(("torch.", "tokendance.device"))]
print("ran")
"""


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", **environment},
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_host_half_plans_steps_and_ends_without_torch() -> None:
    assert run_python(WITHOUT_TORCH).strip() == "ran"


# Records ------------------------------------------------------------------------------------------


def records(scheduler: Scheduler, finish: Callable[[PlannedStep], object]) -> Iterator[StepRecord]:
    """Those of rounds that come late, mix steps, are suspended, go on in a second round."""
    for policy in (Policy(td.LeadingTokens(4, unseen=96)), Policy(td.KeyDeviation(0.3))):
        given = prompts()
        plan = scheduler.plan({"a": given["a"], "b": given["b"]}, policy)

        def steps(decode: Mapping[str, list[int]] | None = None) -> Iterator[StepRecord]:
            while step := scheduler.step(decode, max_rows=70):
                yield step.record
                if step.record.choices:
                    yield step.choose(
                        [np.arange(one.count, dtype=np.int32) for one in step.record.choices]
                    )
                finish(step)
                decode = None

        yield from steps()
        plan.add({"c": given["c"]})
        yield from steps({"a": [4], "b": [5, 6]})
        plan.suspend("a", to="host")
        plan.suspend("b")
        plan.resume(["a", "b"])
        yield from steps({"c": [9]})
        plan.commit()
        longer = {agent: [*given[agent], td.shared(A[:20]), END] for agent in given}
        with scheduler.plan(longer, policy):
            yield from steps()


def pickled_records(seed: int = 0) -> bytes:
    """What another process makes, after other Masters, agents and hashes."""
    for i in range(seed):
        other = Scheduler(profile(200))
        other.plan({str(i): [td.shared(tokens(i, 20))]}).abort()
    device = SymbolicDevice(profile(200, host_pages=60), copies_at_once=False)
    found = list(records(device.scheduler, PlannedStep.finish))
    return b"".join(pickle.dumps(record, protocol=5) for record in found)


def test_the_same_calls_give_the_same_bytes_in_every_process() -> None:
    code = "import sys, test_host_half as t; sys.stdout.write(t.pickled_records({}).hex())"
    first = run_python(code.format(0), PYTHONHASHSEED="1")
    second = run_python(code.format(7), PYTHONHASHSEED="2")
    assert len(first) > 20000
    assert first == second
    assert first == pickled_records(3).hex()


def test_records_say_everything_in_plain_arrays() -> None:
    device = SymbolicDevice(profile(200, host_pages=60), copies_at_once=False)
    kinds: set[str] = set()
    for record in records(device.scheduler, PlannedStep.finish):
        again = pickle.loads(pickle.dumps(record))
        assert again.version == VERSION
        for name, value in vars(record).items():
            for mine, other in zip(plain(value), plain(getattr(again, name)), strict=True):
                if isinstance(mine, np.ndarray):
                    assert mine.dtype == other.dtype
                    np.testing.assert_array_equal(mine, other)
                else:
                    assert mine == other
        kinds |= {"choices"} if record.choices else set()
        kinds |= {"kept"} if record.kept is not None else set()
        for copies in record.copies:
            kinds |= {name for name, pairs in vars(copies).items() if len(pairs)}
    assert kinds == {"choices", "kept", "to_host", "to_device", "rows"}


def plain(value: Any) -> Iterator[Any]:
    """The arrays and numbers that a field of a record is made of; nothing else may be in it."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from (key, *plain(one))
    elif isinstance(value, list):
        for one in value:
            yield from plain(one)
    elif type(value).__module__ in ("tokendance.host.record", "tokendance.host.round"):
        for one in vars(value).values():
            yield from plain(one)
    else:
        assert value is None or isinstance(value, int | np.ndarray), type(value)
        yield value


def test_an_executor_refuses_records_of_another_version_and_choices_that_nobody_takes() -> None:
    executor = make_executor(slice(0, 2))
    scheduler = Scheduler(executor.profile)
    with scheduler.plan({"a": [td.private([1, 2])]}):
        record = scheduler.step().record
        record.version = VERSION + 1
        with pytest.raises(ValueError, match=f"expected version {VERSION}, got {VERSION + 1}"):
            executor.open(record)
        record.version = VERSION
        with executor.open(record) as run:
            rows = projected(run.token_ids, run.positions, 0, slice(0, 2))
            with pytest.raises(ValueError, match=r"window: expected .* record's, \[0\], got 3"):
                run.attend(0, *rows, window=3)
            for layer in range(LAYERS):
                run.attend(layer, *rows)
        scheduler._open[record.number].cancel()
    with scheduler.plan(prompts(), Policy(td.KeyDeviation(0.3))):
        step = scheduler.step()
        with pytest.raises(ValueError, match="choose: expected a function"):
            executor.open(step.record)
        step.cancel()


# Workers ------------------------------------------------------------------------------------------

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 64  # KV heads of the model; query heads of each


def make_executor(heads: slice) -> Executor:
    """The device half for some of the KV heads."""
    count = heads.stop - heads.start
    geometry = td.KVGeometry(LAYERS, GROUP * count, count, DIM, torch.float32)
    rope = td.Rope.default(head_dim=DIM, theta=10000.0, max_position=4096)
    return Executor(geometry, rope, PagePool.own(geometry, 200, 8, "cpu"), host_pages=60)


def projected(
    token_ids: Tensor, positions: Tensor, layer: int, heads: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of some KV heads. Behind layer 0 they depend on the position too, so that keys
    deviate, in each head otherwise."""
    generator = torch.Generator().manual_seed(layer)
    table = torch.randn(1000, HEADS, GROUP + 2, DIM, generator=generator)[:, heads]
    found = table[token_ids % 1000] + 0.3 * min(layer, 1) * table[positions.long()]
    return found[:, :, :GROUP].flatten(1, 2), found[:, :, GROUP], found[:, :, GROUP + 1]


def run_record(
    executor: Executor, heads: slice, record: StepRecord, choose: Any, reduce: Any
) -> Tensor:
    """The last layer's output ``[rows, query heads, D]``."""
    with executor.open(record, choose=choose, reduce=reduce) as run:
        ids, positions = run.token_ids, run.positions
        out = torch.empty(0)
        for layer in range(LAYERS):
            out = run.attend(layer, *projected(ids, positions, layer, heads))
            ids, positions = run.keep(ids, positions)
    return out


def work(pipe: Connection, heads: slice) -> None:
    """A worker process: it knows records and its heads, and nothing else. One life follows another,
    each with an executor of its own."""
    torch.set_num_threads(1)
    while (reduces := pipe.recv()) is not None:
        live(pipe, heads, reduces)


def live(pipe: Connection, heads: slice, reduces: bool) -> None:
    executor = make_executor(heads)

    def reduce(deviation: Tensor) -> Tensor:
        pipe.send(("reduce", deviation.numpy()))
        return torch.from_numpy(pipe.recv())

    def choose(chosen: list[Any]) -> StepRecord:
        pipe.send(("chosen", chosen))
        record: StepRecord = pipe.recv()
        return record

    while (record := pipe.recv()) is not None:
        out = run_record(executor, heads, record, choose, reduce if reduces else None)
        pipe.send(("out", out.numpy()))
    keys = [pool.numpy() for pool in executor.pool.k_pools + executor.pool.v_pools]
    pipe.send(("pools", keys))


@pytest.fixture(scope="module")
def pipes() -> Iterator[list[Connection]]:
    """To two processes, each with one of the two KV heads."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(HEADS)]
    processes = [
        context.Process(target=work, args=(theirs, slice(head, head + 1)))
        for head, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    yield [mine for mine, _ in pairs]
    for process, (mine, _) in zip(processes, pairs, strict=True):
        mine.send(None)
        process.join(30)
        if process.is_alive():  # in the middle of a life that a test has not ended
            process.kill()


class Workers:
    """A life of the two processes; this process is their scheduler's.

    Attributes:
        chosen: for each choice, what each worker chose.
    """

    def __init__(self, pipes: list[Connection], reduces: bool = True) -> None:
        self.chosen: list[list[Any]] = []
        self.pipes = pipes
        self.send(reduces)

    def run(self, step: PlannedStep) -> Tensor:
        self.send(step.record)
        while True:
            kinds, values = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
            assert len(set(kinds)) == 1
            if kinds[0] == "reduce":
                self.send(values[0] + values[1])
            elif kinds[0] == "chosen":
                self.chosen.append(list(values))
                self.send(step.choose(values[0]))
            else:
                return torch.from_numpy(np.concatenate(values, axis=1))

    def send(self, value: object) -> None:
        for pipe in self.pipes:
            pipe.send(value)

    def pools(self) -> list[np.ndarray]:
        """Ends the life."""
        self.send(None)
        both = [pipe.recv()[1] for pipe in self.pipes]
        return [np.concatenate(pools, axis=2) for pools in zip(*both, strict=True)]


class OneProcess:
    """The same without any."""

    def __init__(self) -> None:
        self.executor = make_executor(slice(0, HEADS))
        self.chosen: list[list[Any]] = []

    def run(self, step: PlannedStep) -> Tensor:
        def choose(chosen: list[Any]) -> StepRecord:
            self.chosen.append(chosen)
            return step.choose(chosen)

        return run_record(self.executor, slice(0, HEADS), step.record, choose, None)

    def pools(self) -> list[np.ndarray]:
        return [pool.numpy() for pool in self.executor.pool.k_pools + self.executor.pool.v_pools]


def drive(scheduler: Scheduler, workers: Workers | OneProcess, policy: Policy) -> list[Tensor]:
    """Outputs of every step of a life with late agents, mixed steps, preemption, a second round."""
    found: list[Tensor] = []

    def steps(decode: Mapping[str, list[int]] | None = None) -> None:
        while step := scheduler.step(decode, max_rows=60):
            found.append(workers.run(step))
            step.finish()
            check_books(scheduler)
            decode = None

    given = prompts()
    plan = scheduler.plan({"a": given["a"], "b": given["b"]}, policy)
    steps()
    late = scheduler.plan({"c": given["c"]}, policy)
    steps({"a": [4], "b": [5, 6]})
    plan.suspend("a", to="host")
    plan.suspend("b")
    steps({"c": [9]})
    plan.resume(["b", "a"])
    steps()
    steps({"a": [1], "b": [2], "c": [3]})
    plan.commit()
    late.commit()
    longer = {agent: [*given[agent], td.shared(A[:20]), END] for agent in given}
    plan = scheduler.plan(longer, policy)
    steps()
    plan.commit()
    return found


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("selection", [td.LeadingTokens(4, unseen=96), td.KeyDeviation(0.3)])
def test_a_scheduler_and_two_workers_are_one_process_bit_for_bit(
    selection: Any, pipes: list[Connection]
) -> None:
    policy = Policy(selection)
    one = OneProcess()
    scheduler = Scheduler(one.executor.profile)
    expected = drive(scheduler, one, policy)
    profile_of_one_rank = make_executor(slice(0, 1)).profile
    workers = Workers(pipes)
    split = Scheduler(profile_of_one_rank)
    found = drive(split, workers, policy)
    pools = workers.pools()
    assert len(found) == len(expected) > 8
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    used = scheduler.books._page_users > 0
    np.testing.assert_array_equal(used, split.books._page_users > 0)
    for agent, mirror in scheduler.books.mirrors.items():
        assert split.books.mirrors[agent].own_position.tolist() == mirror.own_position.tolist()
    rows = stored_rows(scheduler)
    for mine, other in zip(pools, one.pools(), strict=True):
        assert mine.shape == other.shape
        np.testing.assert_array_equal(
            mine.reshape(-1, HEADS, DIM)[rows], other.reshape(-1, HEADS, DIM)[rows]
        )
    # Every rank was told the same sum, and chose what one process chooses.
    assert len(workers.chosen) == len(one.chosen)
    assert bool(one.chosen) == isinstance(selection, td.KeyDeviation)
    for both, alone in zip(workers.chosen, one.chosen, strict=True):
        for rank in both:
            assert [rows.tolist() for rows in rank] == [rows.tolist() for rows in alone]


def stored_rows(scheduler: Scheduler) -> np.ndarray:
    """Pool rows that Mirrors' KV lies in."""
    block = scheduler.profile.block_size
    parts = []
    for mirror in scheduler.books.mirrors.values():
        parts.append(slots_of(mirror.own_pages, len(mirror.own_position), block))
        parts += [slots_of(use.master.pages, use.length, block) for use in mirror.uses]
    return np.unique(np.concatenate(parts))


@pytest.mark.usefixtures("one_thread")
def test_without_a_reduce_ranks_choose_each_by_its_own_heads(pipes: list[Connection]) -> None:
    """Why `reduce` is there: what the first rank chose is not what the second would keep."""
    workers = Workers(pipes, reduces=False)
    scheduler = Scheduler(make_executor(slice(0, 1)).profile)
    plan = scheduler.plan(prompts(), Policy(td.KeyDeviation(0.3)))
    while step := scheduler.step():
        workers.run(step)
        step.finish()
    plan.abort()
    workers.pools()
    ((first, second),) = workers.chosen
    assert [len(rows) for rows in first] == [len(rows) for rows in second]
    assert any(a.tolist() != b.tolist() for a, b in zip(first, second, strict=True))
