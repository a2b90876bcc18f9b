"""A transformers model's own forward on the rows of a step.

Its rotary embeddings are made cos = 1 and sin = 0, so that its attention hands un-rotated queries
and keys to the attention function that this module registers under the name "tokendance". Hooks
drop rows between layers and keep, after the last one, those whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from tokendance.step import Step

_ATTENTION = "tokendance"


def logits_of(model: Any, step: Step) -> Tensor:
    """Runs a model's forward on a step's rows; logits ``[len(step.logit_rows), vocabulary]``."""
    layers = model.base_model.layers
    token_ids = step.token_ids[None]
    with ExitStack() as stack:
        stack.enter_context(attention_of(model.config, _ATTENTION))
        stack.enter_context(no_rotation(model))
        for layer in layers:
            hook = partial(_drop_rows, step, layer is layers[-1])
            stack.enter_context(layer.register_forward_hook(hook))
        logits: Tensor = model(
            input_ids=token_ids,
            # Embeddings of one position stand for those of any number of rows.
            position_ids=torch.zeros_like(token_ids[:, :1]),
            use_cache=False,
            tokendance_step=step,
        ).logits
    return logits[0]


@contextmanager
def no_rotation(model: Any) -> Iterator[None]:
    """Makes the model's rotary embeddings the identity, and only inside."""
    with ExitStack() as stack:
        for module in model.base_model.modules():
            if any(name.endswith("inv_freq") for name in module._buffers):
                stack.enter_context(module.register_forward_hook(_without_rotation))
        yield


def _without_rotation(module: Any, arguments: Any, output: Any) -> Any:
    """A rotary module's output, so that its rotation changes nothing."""
    if not isinstance(output, tuple) or len(output) != 2:
        raise ValueError(
            f"model: expected cosines and sines of {type(module).__name__}, "
            f"got {type(output).__name__}"
        )
    cos, sin = output
    return torch.ones_like(cos), torch.zeros_like(sin)


def _drop_rows(step: Step, is_last: bool, layer: Any, arguments: Any, output: Any) -> Any:
    """A layer's output, without the rows that its attention dropped; of the last the wanted."""
    hidden = output[0] if isinstance(output, tuple) else output
    (rows,) = step.keep(hidden[0])
    if is_last:
        rows = rows[step.logit_rows]
    return (rows[None], *output[1:]) if isinstance(output, tuple) else rows[None]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tokendance_step: Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: ``[1, heads, rows, head_dim]`` in, rows first out."""
    if tokendance_step is None:
        raise ValueError(
            "attention: expected a step among the keyword arguments that a model hands on to its "
            "attention; run it through TransformersEngine"
        )
    rows = query.shape[2]
    out = tokendance_step.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        softmax_scale=scaling,
        window=sliding_window or 0,
        soft_cap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    if tokendance_step.kept is not None:
        # The layer adds the attention to all rows; the dropped ones leave after it.
        out = out.new_zeros(rows, *out.shape[1:]).index_copy(0, tokendance_step.kept, out)
    return out[None], None


AttentionInterface.register(_ATTENTION, _attend)


@contextmanager
def attention_of(config: Any, name: str) -> Iterator[None]:
    """Lets the model's layers call another attention function, and only inside."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
