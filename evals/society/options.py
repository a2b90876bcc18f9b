"""How a society runs."""

from __future__ import annotations

from dataclasses import dataclass

from tokendance.host.gate import Gate
from tokendance.host.selection import DEFAULT, Selection
from tokendance.integrations.transformers import check_sampling

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """How a society runs.

    Attributes:
        new_tokens: sampled per person and round, at most.
        temperature, top_p: see `sample_token`.
        seed: of the sampling.
        source, selection, gate: see `KVCollector`. With a gate every round is audited before it is
            committed, by the keys and values of a sample of all prompts' rows.
        audited_rows: the chance of each row to be in that sample.
        block_size, capacity: of the store.
    """

    new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.9
    seed: int = 0
    source: str = "master"
    selection: Selection = DEFAULT
    gate: Gate | None = None
    audited_rows: float = 0.1
    block_size: int = 8
    capacity: int | str = "8GiB"

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ValueError(f"new_tokens: expected at least 1, got {self.new_tokens}")
        check_sampling(self.temperature, self.top_p)
        if not 0 < self.audited_rows <= 1:
            raise ValueError(
                f"audited_rows: expected 0 < audited_rows <= 1, got {self.audited_rows}"
            )
