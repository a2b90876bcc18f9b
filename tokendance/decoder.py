"""Decode steps in fixed buffers: what an engine captures in a CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor

from tokendance.device.arrays import Array, as_tensors
from tokendance.device.fixed_run import FixedRun
from tokendance.device.ranges import marked
from tokendance.host.planned_step import PlannedStep
from tokendance.host.record import step_capacity
from tokendance.host.segments import TokenIds
from tokendance.host.uncopied import Uncopied
from tokendance.step import cancel_dropped
from tokendance.store import DiffStore


class Decoder(Uncopied, instead="ask the collector for another"):
    """Decode steps of up to ``max_rows`` rows, all in the same tensors; see `KVCollector.decoder`.

    `prepare` plans a step and fills the buffers. `attend` is what is captured, with the model's
    other layers around it; it reads the buffers, whatever was prepared last. One thread at a time
    may use it; other threads may use the store meanwhile.

    Attributes:
        token_ids: int64 ``[max_rows]``, 0 behind the step's rows.
        positions: int32 ``[max_rows]``, likewise.
        logit_rows: int64 ``[max_rows]``, all rows: a model that takes a `Step` can take a decoder.
    """

    def __init__(
        self,
        store: DiffStore,
        max_agents: int,
        max_rows: int,
        max_pages: int,
        max_masters: int | None = None,
        max_uses: int | None = None,
        windows: Sequence[int] = (0,),
    ) -> None:
        masters = max_agents + 64 if max_masters is None else max_masters
        uses = max_agents * min(masters, 32) if max_uses is None else max_uses
        sizes = {
            "max_agents": max_agents,
            "max_rows": max_rows,
            "max_pages": max_pages,
            "max_masters": masters,
            "max_uses": uses,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self._scheduler = store.scheduler
        with store.lock:
            known = self._scheduler.windows
            known += [one for one in windows if one not in known]
        capacity = step_capacity(
            agents=max_agents,
            rows=max_rows,
            pages=max_pages,
            masters=masters,
            uses=uses,
            masks=max_agents * max_pages,
            profile=self._scheduler.profile,
        )
        self._run = FixedRun(store.executor, capacity, windows)
        self.token_ids = self._run.token_ids
        self.positions = self._run.positions
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = self.token_ids  # of the graph
        self.logit_rows = torch.arange(max_rows, dtype=torch.int64, device=store.device)

    @property
    def max_rows(self) -> int:
        """Rows of the buffers."""
        return self._run.capacity.rows

    def fits(self, decode: Mapping[str, TokenIds]) -> bool:
        """Whether a step fits in the buffers; if not, a larger decoder is needed.

        Raises:
            KeyError, TypeError, ValueError: as `KVCollector.step`.
        """
        return not self._scheduler.exceeded(decode, self._run.capacity)

    def prepare(self, decode: Mapping[str, TokenIds | Iterator[int]]) -> DecodeStep:
        """Plans a step and fills the buffers, by one copy that nobody waits for.

        Args:
            decode: per agent the tokens to feed; the agents' rows stand in this order.

        Raises:
            KeyError, TypeError, OutOfPagesError: as `KVCollector.step`; nothing has changed.
            ValueError: likewise; or there is nothing to decode, or more than the decoder was made
                for, naming what.
        """
        with marked(self.token_ids.device, "tokendance plan a step"):
            planned = self._scheduler.decode_step(decode, self._run.capacity)
        if planned is None:
            raise ValueError("decode: expected at least one agent, got none")
        try:
            self._run.load(planned.record)
        except BaseException:
            planned.cancel()
            raise
        return DecodeStep(planned)

    def replay(self, layers: Callable[[], Tensor]) -> Tensor:
        """What ``layers()`` returns for the rows that were prepared last.

        On a GPU the first call runs and captures it, and later ones replay that; elsewhere it is
        run each time.

        Args:
            layers: the same in every call. It reads this decoder's tensors, and on a GPU does
                nothing that a graph cannot hold.

        Returns:
            On a GPU the same tensor each time: the next call overwrites it.
        """
        if self.token_ids.device.type != "cuda":
            return layers()
        if self._graph is None:
            # What is allocated, or set up, at the first call is not to be captured.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                layers()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = layers()
        self._graph.replay()
        return self._result

    def keep(self, *tensors: Array) -> tuple[Tensor, ...]:
        """The tensors: no row is ever dropped; see `Step.keep`."""
        return tuple(as_tensors(tensors))

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
        """Attention of one layer over the buffers; see `tokendance.device.FixedRun.attend`."""
        with marked(self.token_ids.device, "tokendance attend"):
            return self._run.attend(
                layer,
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                window=window,
                soft_cap=soft_cap,
                sinks=sinks,
            )


class DecodeStep(Uncopied, instead="ask the decoder for another"):
    """A prepared step: run the model, or replay its graph, inside ``with``.

    Leaving it by an exception aborts the plans that it was asked for.

    Attributes:
        agents: name of the agent of each row; rows behind them are padding.
        logit_agents: the same, as a `Step` has them.
    """

    def __init__(self, planned: PlannedStep) -> None:
        self._planned = planned
        self.agents = self.logit_agents = planned.logit_agents
        self._finalizer = weakref.finalize(self, cancel_dropped, planned)
        self._finalizer.atexit = False

    def __enter__(self) -> DecodeStep:
        if not self._planned.is_open:
            raise ValueError("step: expected one that is open, got one that has ended")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._planned.finish()
        else:
            self._planned.fail()

    @property
    def num_rows(self) -> int:
        """Rows that are no padding."""
        return len(self.agents)

    def cancel(self) -> None:
        """Gives a step back that has not been run: everything is as before it was prepared."""
        self._planned.cancel()
