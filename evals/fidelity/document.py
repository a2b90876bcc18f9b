"""What a command of ``python -m evals.fidelity`` writes: figures, and what they were measured on.

Every table is made of such a document, at once or later (``render``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.fidelity import noise


@dataclass
class Document:
    """The JSON of one command.

    Attributes:
        command: which one.
        model: as it was named on the command line.
        origin: of the model's weights, for readers.
        settings: arguments that change what is measured; figures of others do not mix with these.
        result: the command's own.
        noise: what `noise` found on the same model; None where it was not measured.
    """

    command: str
    model: str
    origin: str
    settings: Mapping[str, Any]
    result: Any
    noise: noise.Json | None = None

    def write(self, path: Path) -> None:
        """In one step, so that whoever is stopped leaves the figures before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{path.name}.part")
        written.write_text(json.dumps(asdict(self), indent=1) + "\n")
        written.replace(path)


def read(path: Path) -> Document:
    """Raises ``ValueError`` where a file holds something else."""
    try:
        return Document(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: expected a file that evals.fidelity wrote, got {error}"
        ) from error


def read_known(path: Path, wanted: Document) -> Any:
    """What ``path`` has measured already of the same, to go on with; None where there is no file.

    Raises:
        ValueError: it was measured on another model or with other settings.
    """
    if not path.is_file():
        return None
    found = read(path)
    for name in ("command", "model", "origin", "settings"):
        if getattr(found, name) != getattr(wanted, name):
            raise ValueError(
                f"{path}: expected figures of {name} {getattr(wanted, name)!r}, "
                f"got those of {getattr(found, name)!r}; name another file"
            )
    return found.result


def text(document: Document, table: Callable[[Any], str]) -> str:
    """Markdown: what it was measured on, what differences mean nothing, and the table."""
    lines = [f"Model: {document.origin}."]
    if document.noise is not None and document.command != "noise":
        lines += ["", noise.sentence(document.noise)]
    return "\n".join([*lines, "", table(document.result)])
