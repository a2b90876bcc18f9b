"""Whether a model of a type that nobody has tested can be run on steps: it is tried."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from tokendance.collector import KVCollector
from tokendance.device.geometry import KVGeometry
from tokendance.device.rope import Rope
from tokendance.host.segments import private
from tokendance.host.selection import Everything
from tokendance.integrations.model_forward import attention_of, logits_of, no_rotation
from tokendance.step import Step
from tokendance.store import DiffStore

_NO_ATTENTION = "tokendance_none"
# A model of a type that is not listed is tried on so many tokens.
_TRIED_TOKENS = 61
# What rounding explains: norm of the difference of a layer's attention over the attention's norm.
_TRIED_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Beyond it, of the same tokens further on: models round angles of large positions themselves.
_TRIED_SHIFT = 2e-2


def try_model(model: Any, geometry: KVGeometry, max_position: int) -> None:
    """Refuses a model unless its attention is reproduced.

    All else is the model's own forward, which must do with each row the same, whatever stands
    beside it. Attention is tried layer by layer on what the model's own forward hands it, so that
    no rounding of an earlier layer adds up.

    Args:
        geometry: of the model.
        max_position: windows, masks and scores are tried up to there.

    Raises:
        ValueError: what differs, or what failed.
    """
    try:
        prompt = _tried_tokens(model)
        modules = _try_rows_and_masks(model, prompt, max_position)
        own = _trace(model, modules, prompt)
        rope = Rope.from_model(model, _TRIED_TOKENS)
        capacity = 2 * _TRIED_TOKENS * geometry.row_bytes
        store = DiffStore(geometry, rope, capacity, model.device, block_size=8)
        collector = KVCollector(store, selection=Everything())
        with collector.plan({"": [private(prompt)]}) as plan:
            step = collector.step(prefill=plan.prefilling, max_rows=len(prompt))
            assert step is not None
            with step:
                ours = _trace(model, modules, prompt, own[0], step)
        tolerance = _TRIED_TOLERANCE.get(model.dtype, _TRIED_TOLERANCE[torch.bfloat16])
        _compare_traces("its own forward", ours, own, tolerance)
        if max_position > _TRIED_TOKENS:
            moved = _trace(model, modules, prompt, own[0], first=max_position - _TRIED_TOKENS)
            _compare_traces("itself at its first positions", moved, own, tolerance + _TRIED_SHIFT)
    except Exception as error:
        raise ValueError(
            f"model: expected an architecture whose attention is reproduced, "
            f"got {model.config.model_type!r}: {error}"
        ) from error


def _try_rows_and_masks(model: Any, prompt: Tensor, max_position: int) -> list[Any]:
    """Each layer's attention. Without it and without rotation rows must not see each other, and
    its masks must be those of the windows that it is handed."""
    seen: list[tuple[Any, Any, int]] = []

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        seen.append((module, attention_mask, sliding_window or 0))
        return query.transpose(1, 2), None

    AttentionInterface.register(_NO_ATTENTION, attend)
    logits = []
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(attention_of(model.config, _NO_ATTENTION))
        stack.enter_context(no_rotation(model))
        for ids in (prompt, prompt.flip(0)):
            seen.clear()
            logits.append(model(input_ids=ids[None], use_cache=False).logits[0])
    tolerance = _TRIED_TOLERANCE.get(model.dtype, _TRIED_TOLERANCE[torch.bfloat16])
    _compare(
        "logits without attention",
        "those of another order",
        logits[0],
        logits[1].flip(0),
        tolerance,
    )
    if len(seen) != model.config.num_hidden_layers:
        raise ValueError(
            f"expected attention in {model.config.num_hidden_layers} layers, got {len(seen)}"
        )
    for layer, (_, mask, window) in enumerate(seen):
        some = torch.linspace(0, max_position - 1, 50, dtype=torch.float64, device="cpu").long()
        edges = torch.cat([some + offset for offset in (-1, 0, 1)])
        keys = torch.cat([edges, edges - window]).clamp(0, max_position - 1)[None]
        rows = some[:, None]
        wanted = (keys <= rows) & ((rows - keys < window) if window else True)
        visible = wanted if mask is None and not window else mask
        if callable(mask):
            none = torch.zeros((), dtype=torch.int64, device="cpu")
            visible = mask(none, none, rows, keys)
        if not isinstance(visible, Tensor) or not torch.equal(visible.expand_as(wanted), wanted):
            raise ValueError(
                f"expected a causal mask of the window that attention is handed ({window}; 0: "
                f"none), got another in layer {layer}"
            )
    return [module for module, _, _ in seen]


def _mask_of_rows(*_: Any, mask_function: Any, **__: Any) -> Any:
    """A mask function of transformers: what decides, in place of a tensor of decisions."""
    return mask_function


def _trace(
    model: Any,
    modules: Sequence[Any],
    prompt: Tensor,
    inputs: Sequence[Tensor] | None = None,
    step: Step | None = None,
    first: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """What layers are handed in a forward, and what their attention makes of it.

    Args:
        modules: the layers' attention.
        inputs: handed to the layers instead.
        step: run the engine's forward, else the model's own.
        first: position of the prompt's first token in the model's own.
    """
    handed: list[Tensor] = []
    made: list[Tensor] = []

    def before(layer: Any, arguments: Any) -> Any:
        handed.append(arguments[0])
        return None if inputs is None else (inputs[len(handed) - 1], *arguments[1:])

    with ExitStack() as stack:
        for layer, module in zip(model.base_model.layers, modules, strict=True):
            stack.enter_context(layer.register_forward_pre_hook(before))
            hook = module.register_forward_hook(lambda _, __, output: made.append(output[0]))
            stack.enter_context(hook)
        stack.enter_context(torch.inference_mode())
        if step is not None:
            logits_of(model, step)
        else:
            positions = torch.arange(len(prompt), dtype=torch.int64, device=prompt.device) + first
            model(input_ids=prompt[None], position_ids=positions[None], use_cache=False)
    return handed, made


def _compare_traces(
    what: str,
    found: tuple[list[Tensor], list[Tensor]],
    expected: tuple[list[Tensor], list[Tensor]],
    tolerance: float,
) -> None:
    _compare("the first layer's input", what, found[0][0], expected[0][0], tolerance)
    for layer, (one, other) in enumerate(zip(found[1], expected[1], strict=True)):
        _compare(f"the attention of layer {layer}", what, one, other, tolerance)


def _compare(name: str, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    difference = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not difference <= tolerance:
        raise ValueError(
            f"expected {name} within {tolerance:g} of {what}, got a difference of "
            f"{difference:.2g} (norm over norm)"
        )


def _tried_tokens(model: Any) -> Tensor:
    ids = torch.arange(_TRIED_TOKENS, dtype=torch.int64, device=model.device)
    vocabulary = int(model.config.vocab_size)
    return (ids * 7919 + 13) % vocabulary


AttentionMaskInterface.register(_NO_ATTENTION, _mask_of_rows)
