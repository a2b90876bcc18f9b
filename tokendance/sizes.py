"""Bytes that are given as text."""

from __future__ import annotations

import re

import numpy as np

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(size: int | str, name: str = "capacity") -> int:
    """Bytes of ``4096``, ``"512MiB"``, ``"8GiB"`` or ``"8GB"``; the units are binary.

    Raises:
        ValueError: for other text, naming the argument ``name``.
    """
    if isinstance(size, int | np.integer):
        return int(size)
    text = size if isinstance(size, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", text)
    if match is None:
        raise ValueError(f'{name}: expected bytes or text such as "8GiB", got {size!r}')
    return int(float(match[1]) * _UNITS[match[2]])
