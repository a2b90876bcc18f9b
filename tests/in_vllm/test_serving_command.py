"""Real servers of `python -m evals serving`, with a tiny model: vLLM and the small engine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from evals.capacity.rounds import Shape
from evals.serving.figures import figures_of
from evals.serving.prompts import Trace
from evals.serving.rounds import Arrivals, serve
from evals.serving.servers import ENGINE, Setup, running

SHAPE = Shape(system=40, own=20, output=6, board=60, tail=3)
TEXT = np.random.default_rng(0).integers(3, 250, 2000).astype(np.int32)


@pytest.mark.slow
def test_servers_are_started_asked_and_stopped(tiny: Path, tmp_path: Path) -> None:
    from openai import OpenAI

    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    setup = Setup(tiny, 1024, 128, patience=5.0, vllm=(Path(sys.executable), environment))
    with running(["vllm", "tokendance", ENGINE], setup, tmp_path / "logs") as servers:
        found = {}
        for server in servers:
            society = Trace("tiny", 0, 4, SHAPE, TEXT)
            found[server.name] = serve(server, [society], Arrivals(rounds=2), watch_every=0.02)
        plain = found["vllm"]
        for name, served in found.items():
            assert [one.number for one in served.rounds] == [1, 2]
            figures = figures_of(served, plain)
            assert figures["failures"] == 0
            assert figures["prompt rows"] == 2 * 4 * (40 + 20 + 60 + 4 * 6 + 3)
            assert served.peak_bytes > 0
            if name == "vllm":
                assert served.rows_computed == figures["prompt rows"]
                assert served.between_bytes == 0
            else:
                assert 0 < served.rows_computed < 0.8 * figures["prompt rows"]
                assert served.between_bytes > 0  # agents' rows are kept
        engine = OpenAI(base_url=f"{servers[-1].url}/v1", api_key="none")
        assert [one.id for one in engine.models.list()] == ["model"]
        asked = {"model": "model", "prompt": TEXT[:30].tolist(), "max_tokens": 5, "temperature": 0}
        whole = engine.completions.create(**asked)
        parts = engine.completions.create(**asked, stream=True)
        assert "".join(one.choices[0].text for one in parts) == whole.choices[0].text
        plain_client = OpenAI(base_url=f"{servers[0].url}/v1", api_key="none")
        extra = {"return_token_ids": True}
        ids = [
            client.completions.create(**asked, extra_body=extra).choices[0].token_ids
            for client in (engine, plain_client)
        ]
        assert ids[0] == ids[1]
    assert all(server.process.poll() is not None for server in servers)
