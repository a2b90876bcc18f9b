"""What a calibration found on a model, kept for the processes that serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokendance.host.selection import Selection, parse_selection

FORMAT = 1


@dataclass(frozen=True)
class StoredCalibration:
    """The file that ``tokendance calibrate MODEL --json FILE`` writes.

    It belongs to one model in one dtype. What holds there need not hold on another::

        found = td.StoredCalibration.read("calibration.json")
        selection = found.selection_for(fingerprint_of(model))
        collector = td.KVCollector(store, selection=selection)

    Attributes:
        model: as it was named, for readers.
        fingerprint: of that model, see `tokendance.integrations.transformers.fingerprint_of`.
        limit: nats that siblings were to stay within, on average.
        chosen: name of the selection with the fewest rows among those that do, None where none
            does.
        prompt_rows: tokens of all prompts.
        noise: KL in nats of full recompute against itself, in other ``"chunks"`` and in another
            ``"batch"``.
        selections: by name, as `parse_selection` reads it: ``"rows"`` computed, ``"kl"`` in nats of
            each sibling, their ``"mean"``, its ``"upper"`` end (95 %), and ``"top1"``, the share of
            equal likeliest tokens.
    """

    model: str
    fingerprint: str
    limit: float
    chosen: str | None
    prompt_rows: int
    noise: Mapping[str, float]
    selections: Mapping[str, Mapping[str, Any]]

    def selection_for(self, fingerprint: str) -> Selection:
        """The chosen selection, for a collector over a store of the same model.

        Args:
            fingerprint: of the model that is to be served.

        Raises:
            ValueError: the calibration is another model's, or none of its selections was near
                enough.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"fingerprint: expected {self.fingerprint} ({self.model}), which was calibrated, "
                f"got {fingerprint}; calibrate this model, in the dtype that it is served in"
            )
        if self.chosen is None:
            raise ValueError(
                f"chosen: expected a selection within {self.limit:g} nats, got none of "
                f"{', '.join(self.selections)}; calibrate with more rows, or a greater limit"
            )
        return parse_selection(self.chosen)

    def write(self, path: Path | str) -> None:
        """Writes the file in one step."""
        path = Path(path)
        written = path.with_name(f"{path.name}.part")
        found = {"format": FORMAT, **asdict(self)}
        written.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        written.replace(path)

    @classmethod
    def read(cls, path: Path | str) -> StoredCalibration:
        """Reads what `write` has written.

        Raises:
            ValueError: another file, or that of another format.
            OSError: the file cannot be read.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if (number := found.pop("format")) != FORMAT:
                raise ValueError(f"format {number!r} instead of {FORMAT}")
            made = cls(**found)
            for name in made.selections:
                parse_selection(name)
            if made.chosen is not None and made.chosen not in made.selections:
                raise ValueError(f"{made.chosen!r} chosen of {', '.join(made.selections)}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected a file that tokendance calibrate wrote, got {error!r}"
            ) from error
        return made
