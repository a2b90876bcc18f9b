"""What CUDA graphs in pieces need: seen on the CPU, where vLLM compiles in such pieces if it is
asked to, and captures none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import configured, serving
from small_rounds import SHARED, a_round, alone, answers, join, until_decoding

from tokendance.device.executor import Run


def test_with_shared_decode_vllm_is_asked_for_graphs_in_pieces(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import CUDAGraphMode, KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform

    modes: list[CUDAGraphMode] = []
    update = CpuPlatform.check_and_update_config

    def updated(cls: type, vllm_config: Any) -> None:
        modes.append(vllm_config.compilation_config.cudagraph_mode)
        update(vllm_config)

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(updated))
    monkeypatch.setattr(CpuPlatform, "support_static_graph_mode", classmethod(lambda _: True))
    for shared in (False, True):
        EngineArgs(
            model=str(tiny),
            compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"},
            kv_transfer_config=KVTransferConfig(
                kv_connector="TokenDanceConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"shared_decode": shared},
            ),
        ).create_engine_config()
    assert modes == [CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.PIECEWISE]


def in_pieces(vllm_config: Any) -> None:
    """As on a GPU, but for what makes code of the pieces."""
    from vllm.config import CompilationMode

    compiled = vllm_config.compilation_config
    compiled.mode, compiled.backend, compiled.compile_sizes = (
        CompilationMode.VLLM_COMPILE,
        "eager",
        [],
    )


def test_a_compiled_model_has_attention_and_its_cache_between_the_pieces(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    prompts = a_round(44)
    with configured(in_pieces), serving(SHARED, model=str(tiny), enforce_eager=False) as engine:
        compiled = engine.engine.vllm_config.compilation_config
        assert compiled.is_attention_compiled_piecewise()
        assert compiled.splitting_ops_contain_kv_cache_update()
        expected = alone(engine, "pieces", prompts)
        runner = engine.worker._members._runner
        modes, places = set(), set()
        attend, taken_out = Run.attend, type(engine.worker._members)._taken_out

        def watched(run: Run, *args: Any, **more: Any) -> Any:
            context = get_forward_context()
            modes.add(context.cudagraph_runtime_mode)
            return attend(run, *args, **more)

        def told(members: Any, common: Any) -> Any:
            found = taken_out(members, common)
            # A graph reads where the buffers were when it was captured: they are changed in place.
            rows = members._rows
            assert (runner.positions[rows] == 0).all()
            assert (found.slot_mapping[rows] == -1).all()
            table = runner.input_batch.block_table[0].slot_mapping.gpu
            places.add((found.positions.data_ptr(), found.slot_mapping.data_ptr()))
            assert places == {(runner.positions.data_ptr(), table.data_ptr())}
            return found

        monkeypatch.setattr(Run, "attend", watched)
        monkeypatch.setattr(type(engine.worker._members), "_taken_out", told)
        join(engine, "pieces", prompts, agents=4)
        until_decoding(engine, 4)
        engine.run()
        assert answers(engine, "pieces", prompts) == expected
        assert places
        # The rounds' own passes, whose rows are of no captured size, and on a CPU vLLM's too.
        assert modes == {CUDAGraphMode.NONE}
