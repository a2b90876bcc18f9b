"""Fixtures that several test modules share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in fp32 and its tokenizer; downloaded on the first use."""
    pytest.importorskip("transformers")
    from tokendance.models import load_model

    try:
        return load_model("smollm2")
    except RuntimeError as error:
        pytest.skip(f"SmolLM2 is not cached and could not be downloaded: {error}")
