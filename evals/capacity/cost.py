"""How long a forward pass takes: bytes over bandwidth or FLOPs over rate, whichever is more.

Every share of a datasheet's figure below is an assumption, no measurement: no GPU was used. Where
ours and the baselines' kernels differ, ours are assumed to be the slower ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from evals.capacity.machines import Machine, ModelShape


@dataclass(frozen=True)
class Shares:
    """What of the datasheets' figures is assumed to be reached.

    Attributes:
        stream: of the bandwidth, by weights and by copies of rows. Copies of large arrays reach
            0.85 to 0.93 on such devices.
        gemm: of the dense rate, by the linear layers of a few thousand rows.
        dense_read, dense_compute: of bandwidth and rate, by a mature attention kernel over paged
            dense caches.
        shared_read, shared_compute: the same of `collective_attention`. Its prefill is bound by
            shared memory at half of what an H100's tensor cores could do (docs/kernels.md,
            Rooflines), and it rotates queries besides.
        step_seconds: host and launches of one forward pass that nothing hides.
        hop_seconds: latency of one reduction over the ranks of a tensor-parallel model.
    """

    stream: float = 0.85
    gemm: float = 0.65
    dense_read: float = 0.8
    dense_compute: float = 0.5
    shared_read: float = 0.6
    shared_compute: float = 0.25
    step_seconds: float = 1e-3
    hop_seconds: float = 10e-6


ASSUMED = Shares()


@dataclass
class Work:
    """What one forward pass has to do.

    Attributes:
        row_layers: rows that pass through the linear layers, summed over layers.
        logit_rows: rows of logits.
        pairs: query rows times keys that they see, summed over layers.
        kv_rows: stored rows that attention reads, summed over layers; a row that several tiles read
            counts several times.
        moved_rows: rows that are copied besides, read and written, in all layers.
        is_collective: whether `collective_attention` does it.
    """

    row_layers: float = 0.0
    logit_rows: int = 0
    pairs: int = 0
    kv_rows: float = 0.0
    moved_rows: float = 0.0
    is_collective: bool = False


class CostModel:
    """Seconds of forward passes of one model on one kind of machine."""

    def __init__(self, machine: Machine, model: ModelShape, shares: Shares = ASSUMED) -> None:
        self.machine = machine
        self.model = model
        self.shares = shares

    def seconds(self, work: Work) -> float:
        """Of one forward pass: linear layers, then attention, then copies; none overlaps."""
        if not work.row_layers:
            return 0.0
        return (
            self.shares.step_seconds
            + self.linear_seconds(work)
            + self.attention_seconds(work)
            + self.copy_seconds(work)
        )

    def linear_seconds(self, work: Work) -> float:
        """Of the products with the weights, and of the two sums over ranks in each layer."""
        model, machine, shares, ranks = self.model, self.machine, self.shares, self.model.ranks
        flops = model.flops.row * work.row_layers + model.flops.head * work.logit_rows
        read = model.element * model.weights / (machine.bandwidth * shares.stream)
        seconds = max(read, flops / (machine.flops * shares.gemm)) / ranks
        if ranks > 1:
            # A ring sends 2 (ranks - 1) / ranks of a row, twice a layer.
            sent = 2 * work.row_layers * model.element * model.hidden * 2 * (ranks - 1) / ranks
            seconds += sent / machine.link + 2 * model.num_layers * shares.hop_seconds
        return seconds

    def attention_seconds(self, work: Work) -> float:
        """Of reading stored rows, or of the products with them."""
        model, machine, shares = self.model, self.machine, self.shares
        read, compute = shares.dense_read, shares.dense_compute
        if work.is_collective:
            read, compute = shares.shared_read, shares.shared_compute
        rows = work.kv_rows * model.row_bytes / model.num_layers
        return (
            max(
                rows / (machine.bandwidth * read),
                model.flops.attention(work.pairs) / (machine.flops * compute),
            )
            / model.ranks
        )

    def copy_seconds(self, work: Work) -> float:
        """Of rows that are read and written once."""
        moved = 2 * work.moved_rows * self.model.row_bytes
        return moved / (self.machine.bandwidth * self.shares.stream) / self.model.ranks
