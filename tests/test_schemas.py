"""The operators' schemas are a public contract: schemas.txt has those that are registered."""

from __future__ import annotations

from pathlib import Path

import torch

from tokendance.device import operators as ops

RECORDED = Path(__file__).with_name("schemas.txt")


def test_a_changed_schema_is_recorded():
    """CONTRIBUTING.md says which changes are allowed when; CHANGELOG.md has to name each."""
    found = [str(getattr(torch.ops.tokendance, name).default._schema) for name in ops.OPERATORS]
    assert RECORDED.read_text().splitlines() == found, "see CONTRIBUTING.md on versions"
