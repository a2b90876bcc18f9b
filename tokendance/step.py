"""A step: the rows that an engine runs through the model at once."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from types import TracebackType

from torch import Tensor

from tokendance.device.arrays import Array
from tokendance.device.executor import Executor, Reduce, Run
from tokendance.device.ranges import begun, marked
from tokendance.host.planned_step import PlannedStep
from tokendance.host.record import StepRecord
from tokendance.host.uncopied import Uncopied


class Step(Uncopied, instead="ask the collector for the next step"):
    """Rows of one forward pass, and the attention over the rounds' KV; see `KVCollector.step`.

    Use it as a context manager; inside, call `attend` once per layer, in order, and `keep` after
    it. Leaving it by an exception aborts the plans that it was asked for. Leaving it before the
    last layer is an error. Until it ends, its agents can be in no other step, and cannot be
    committed, suspended or truncated. An agent that is aborted meanwhile keeps its pages until the
    step ends. A step that is never entered is given back by `cancel`, or when it is dropped.

    One thread at a time may use it; it need not be the one that made it.

    Attributes:
        agents: name of every row's agent; None for what is computed for no agent.
        logit_agents: the agents of ``logit_rows``.
    """

    def __init__(self, executor: Executor, planned: PlannedStep, reduce: Reduce | None) -> None:
        self._executor = executor
        self._planned = planned
        self._reduce = reduce
        self._run: Run | None = None
        self._end_range: Callable[[], None] | None = None
        self._is_over = False
        self.agents = planned.agents
        self.logit_agents = planned.logit_agents
        self._finalizer = weakref.finalize(self, cancel_dropped, planned)
        self._finalizer.atexit = False

    def __repr__(self) -> str:
        names = {agent for agent in self.agents if agent is not None}
        state = "ended" if self._is_over else "open" if self._run else "not entered"
        return f"Step({len(self.agents)} rows of {len(names)} agents, {state})"

    @property
    def record(self) -> StepRecord:
        """What the device half runs."""
        return self._planned.record

    def __enter__(self) -> Step:
        if self._run is not None or self._is_over:
            raise ValueError("step: expected a step that has not been entered, got one that has")
        try:
            self._run = self._executor.open(
                self.record,
                choose=self._planned.choose,
                reduce=self._reduce,
                round_of=self._planned.round_of,
            )
        except BaseException:
            self.cancel()
            raise
        self._end_range = begun(self._executor.device, f"tokendance step {self.record.number}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._run is not None
        self._end()
        if kind is not None:
            self._planned.fail()
            return
        try:
            self._run.check_finished()
        except ValueError as short:
            self._planned.fail()
            raise ValueError(f"{short}; the step's plans are aborted") from None
        self._planned.finish()

    def cancel(self) -> None:
        """Gives a step back that has not been run: everything is as before it was made.

        Raises:
            ValueError: it has been entered, or has ended.
        """
        if self._run is not None or self._is_over:
            raise ValueError("step: expected a step that has not been entered, got one that has")
        self._end()
        self._planned.cancel()

    def abandon(self) -> None:
        """Lets the scheduler's next call give back a step that was never entered."""
        if self._run is None and not self._is_over:
            self._end()
            self._planned.abandon()

    def _end(self) -> None:
        self._is_over = True
        if self._end_range is not None:
            self._end_range()
        self._finalizer.detach()

    @property
    def _open(self) -> Run:
        if self._run is None or self._is_over:
            raise ValueError("step: expected an entered step (`with step:`), got one that is not")
        return self._run

    @property
    def token_ids(self) -> Tensor:
        """int64 ``[R]`` on the store's device."""
        return self._open.token_ids

    @property
    def positions(self) -> Tensor:
        """int32 ``[R]`` absolute positions."""
        return self._open.positions

    @property
    def logit_rows(self) -> Tensor:
        """int64, rows whose logits the engine wants.

        Those are every decoded row, the last row of each prompt, and in an audit's step the rows
        that are compared. They count the rows that are there after the last layer.
        """
        if self._run is None:
            raise ValueError("step: expected an entered step (`with step:`), got one that is not")
        return self._run.logit_rows

    @property
    def num_rows(self) -> int:
        """R: rows that are in the step at present."""
        return self._open.num_rows

    @property
    def kept(self) -> Tensor | None:
        """int64: the rows that the last `attend` kept, until `keep` is called; None = all."""
        return self._open.kept

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        *,
        softmax_scale: float | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: Array | None = None,
    ) -> Tensor:
        """Rotates, stores and attends for one layer; see `tokendance.device.Run.attend`.

        Raises:
            ValueError: the step is not open, the layer is out of order, or a number or a tensor
                does not fit; then nothing has changed, and the call can be repeated.
        """
        run = self._open
        choosing = bool(self.record.choices)
        with marked(self._executor.device, "tokendance attend"):
            out = run.attend(
                layer,
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                window=window,
                soft_cap=soft_cap,
                sinks=sinks,
            )
        if choosing and not self.record.choices:
            self.agents = self._planned.agents
            self.logit_agents = self._planned.logit_agents
        return out

    def keep(self, *tensors: Array) -> tuple[Tensor, ...]:
        """The rows of ``tensors`` (first dim R) that are still in the step.

        Rows are dropped in one layer at the most; everywhere else the same rows come back, not
        copied.
        """
        return self._open.keep(*tensors)


def cancel_dropped(planned: PlannedStep) -> None:
    """Gives a step back that nobody can run any more."""
    if planned.is_open:
        warnings.warn(
            "step: expected a step to be run or cancelled, got one that was dropped",
            ResourceWarning,
            stacklevel=2,
        )
        planned.abandon()
