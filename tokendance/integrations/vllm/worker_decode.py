"""Members' rows in vLLM's own forward pass: the worker's side of shared decode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tokendance.device.executor import Executor, Run
from tokendance.integrations.vllm.orders import Decoding


class MemberRows:
    """The rows of members in the batch that vLLM runs.

    vLLM's backend attends for the other rows. To it members look like requests that begin with the
    rows of this step, and none of their rows is kept; what it computes of them is replaced. At
    position 0 their queries and keys are left as they are, so that `Run.attend` rotates them.

    Args:
        executor: that runs the records.
        runner: vLLM's model runner, with its attention set up.
        fail: told of what goes wrong; what is computed of members in that pass is void.
    """

    def __init__(self, executor: Executor, runner: Any, fail: Callable[[Exception], None]) -> None:
        self._executor = executor
        self._runner = runner
        self._fail = fail
        self._requests: list[str] = []  # in the order of the record's rows
        self._run: Run | None = None
        self._rows: Tensor | None = None  # of the batch
        self.has_others = True
        for groups in runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    self._watch(builder)

    def _watch(self, builder: Any) -> None:
        build = builder.build

        def build_for_others(
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self._requests:
                common_attn_metadata = self._taken_out(common_attn_metadata)
            return build(common_prefix_len, common_attn_metadata, *args, **kwargs)

        builder.build = build_for_others

    @property
    def is_open(self) -> bool:
        """Whether members have rows in the pass that is running."""
        return bool(self._requests)

    def open(self, order: Decoding, is_lost: bool) -> None:
        """The next pass of vLLM has these rows; where their keys and values are lost, in vain."""
        self._requests, self._rows, self._run = order.requests, None, None
        if not is_lost:
            self._run = self._executor.open(order.record)

    def _taken_out(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """What the backend is told of the batch. Positions and slots are changed where they are."""
        device = common.seq_lens.device
        starts = common.query_start_loc_cpu.tolist()
        place_of = {request: i for i, request in enumerate(self._runner.input_batch.req_ids)}
        places = [place_of[request] for request in self._requests]
        rows = [row for i in places for row in range(starts[i], starts[i + 1])]
        self.has_others = len(rows) < starts[-1]
        self._rows = torch.tensor(rows, device=device)
        assert common.positions is not None
        common.positions[self._rows] = 0
        common.slot_mapping[self._rows] = -1
        counts = torch.tensor([starts[i + 1] - starts[i] for i in places])
        told = copy.copy(common)
        told.seq_lens = common.seq_lens.clone()
        told.seq_lens[torch.tensor(places, device=device)] = counts.to(told.seq_lens)
        if common.seq_lens_cpu_upper_bound is not None:
            told.seq_lens_cpu_upper_bound = common.seq_lens_cpu_upper_bound.clone()
            told.seq_lens_cpu_upper_bound[places] = counts.to(told.seq_lens_cpu_upper_bound)
            told.max_seq_len = int(told.seq_lens_cpu_upper_bound.max())
        return told

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, **scores: Any
    ) -> None:
        """Attention of members' rows, into theirs of ``output``."""
        rows = self._rows
        if self._run is None:
            return
        assert rows is not None
        try:
            found = self._run.attend(layer, query[rows], key[rows], value[rows], **scores)
        except Exception as error:
            self._run = None
            self._fail(error)
            return
        output[rows] = found.view(len(rows), *output.shape[1:])

    def close(self) -> None:
        """The pass has ended."""
        run, self._run = self._run, None
        self._requests = []
        if run is not None:
            try:
                run.check_finished()
            except ValueError as error:
                self._fail(error)


def unwatchable(runner: Any) -> list[str]:
    """Why members' rows cannot be taken out of a model runner's batches."""
    known = {one.name for one in fields(CommonAttentionMetadata)}
    needed = {"positions", "query_start_loc_cpu", "seq_lens_cpu_upper_bound", "slot_mapping"}
    found = {
        f"model runner: expected V1, got {type(runner).__name__}": (
            not isinstance(runner, GPUModelRunner)
        ),
        f"attention: expected metadata with {sorted(needed)}": not needed <= known,
    }
    return [reason for reason, is_so in found.items() if is_so]
