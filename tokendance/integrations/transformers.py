"""Rounds on unmodified transformers models (Llama, Mistral, Qwen2 and Qwen3 architectures).

The model's own layers run on the rows of a step. They are given rotary embeddings of cos = 1 and
sin = 0, so that their attention hands un-rotated queries and keys to the attention function that
this module registers under the name "tokendance"; everything else is the library's public API.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from tokendance.collector import KVCollector
from tokendance.device.arrays import Array
from tokendance.device.geometry import KVGeometry
from tokendance.device.layer_ropes import layer_ropes
from tokendance.device.quantization import Quantization
from tokendance.device.rope import Rope
from tokendance.host.gate import AuditReport
from tokendance.host.plan import Plan
from tokendance.step import Step
from tokendance.store import DiffStore

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION = "tokendance"
_SAMPLED_WEIGHTS = 256
_COMPARED_POSITIONS = 1024
# Frequencies that were rounded to fp32, or not, turn the last of these positions by up to 6e-5 rad.
_ROPE_TOLERANCE = 1e-3


def geometry_of(model: Any) -> KVGeometry:
    """The KV geometry of a transformers causal language model."""
    config = model.config
    head_dim = getattr(config, "head_dim", None)
    return KVGeometry(
        num_layers=config.num_hidden_layers,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        dtype=model.dtype,
    )


def rope_of(model: Any, max_position: int | None = None) -> Rope | list[Rope | None]:
    """The rotation tables of a transformers model; see `Rope.from_config`."""
    return Rope.from_config(model.config, max_position)


def fingerprint_of(model: Any) -> str:
    """What tells a model's weights from others', for `DiffStore`: 32 hexadecimal digits.

    Of the name, shape, dtype and up to 256 elements of every parameter: another model, a fine-tuned
    one or one cast to another dtype has another fingerprint, and large models are not read through.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        weights = parameter.detach().flatten()
        some = weights[:: max(1, weights.numel() // _SAMPLED_WEIGHTS)][:_SAMPLED_WEIGHTS]
        hasher.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        hasher.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def quantization_of(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float8_e4m3fn,
    margin: float | None = None,
) -> Quantization:
    """Scales for a model's keys and values, from what it makes of some prompts.

    Args:
        token_ids: the prompts; a few hundred tokens of the kind that is to be served will do.
        dtype, margin: see `Quantization.from_samples`.
    """
    layers: list[list[list[Tensor]]] = [[[], []] for _ in range(model.config.num_hidden_layers)]
    for ids in token_ids:
        prompt = torch.tensor([list(ids)], device=model.device)
        with torch.inference_mode():
            cache = model.model(prompt, use_cache=True).past_key_values
        for parts, layer in zip(layers, cache.layers, strict=True):
            for kept, rows in zip(parts, (layer.keys, layer.values), strict=True):
                kept.append(rows[0].transpose(0, 1))
    keys, values = ([torch.cat(parts[which]) for parts in layers] for which in (0, 1))
    return Quantization.from_samples(keys, values, dtype, margin).to(model.device)


def sample_token(
    logits: Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """Draws a token.

    Args:
        logits: ``[vocabulary]``.
        temperature: 0 takes the likeliest token.
        top_p: draw among the likeliest tokens of this total probability.
        generator: on the CPU.
    """
    if temperature <= 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    outside = ordered.cumsum(0) - ordered >= top_p
    ordered = ordered.masked_fill(outside, 0)
    choice = torch.multinomial(ordered / ordered.sum(), 1, generator=generator)
    return int(ids[choice])


class TransformersEngine:
    """Runs the rounds of a collector on a model.

    Steps have 8,192 rows at most, unless ``max_rows`` says otherwise; on a CPU 1,024, which are
    enough for its matrix products: the activations of more are so large that its allocator gives
    them back to the system after each operator, and every page of the next is a page fault.

    Args:
        model: an ``AutoModelForCausalLM`` of one of ``MODEL_TYPES``, in eval mode.
        collector: over a store of the model's geometry, rotation tables and device; its pool may
            be quantized (`quantization_of`).

    Raises:
        ValueError: another architecture, or a store that does not fit the model.
    """

    def __init__(self, model: Any, collector: KVCollector) -> None:
        if model.config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"model: expected one of the architectures {MODEL_TYPES}, "
                f"got {model.config.model_type!r}"
            )
        if geometry_of(model) != collector.store.geometry:
            raise ValueError(
                f"collector: expected a store of {geometry_of(model)}, "
                f"got {collector.store.geometry}"
            )
        if model.device != collector.store.device:
            raise ValueError(
                f"collector: expected a store on {model.device}, got {collector.store.device}"
            )
        _check_rope(model, collector.store)
        self.model = model
        self.collector = collector

    def prefill(self, plan: Plan, max_rows: int | None = None) -> dict[str, Tensor]:
        """Computes the plan's prompts.

        Args:
            max_rows: rows of a step at most; None: as many as suit the device.

        Returns:
            Per agent the logits ``[vocabulary]`` of its last row; agents without tokens have none.
        """
        logits: dict[str, Tensor] = {}
        rows = self._rows_of_a_step(max_rows)
        while step := self.collector.step(prefill=plan.prefilling, max_rows=rows):
            logits.update(self.run(step))
        return logits

    def run(self, step: Step) -> dict[str, Tensor]:
        """Runs a step.

        Returns:
            Per agent with rows whose logits are wanted, ``[vocabulary]`` of the last of them.
        """
        with step:
            rows = self._forward(step)
        return dict(zip(step.logit_agents, rows, strict=True))

    def decode(
        self, plan: Plan, token_ids: Mapping[str, Sequence[int] | Iterator[int]]
    ) -> dict[str, Tensor]:
        """Feeds tokens to agents; without any nothing is run.

        Returns:
            Per agent the logits ``[tokens, vocabulary]`` that follow each of its tokens.
        """
        given = {a: list(ids) if isinstance(ids, Iterator) else ids for a, ids in token_ids.items()}
        step = self.collector.step(given, prefill=()) if given else None
        if step is None:
            return {}
        with step:
            rows = self._forward(step)
        result, at = {}, 0
        for agent, ids in given.items():
            result[agent] = rows[at : at + len(ids)]
            at += len(ids)
        return result

    def generate(
        self,
        plan: Plan,
        logits: Mapping[str, Tensor],
        max_new_tokens: int,
        *,
        stop: Collection[int] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, list[int]]:
        """Decodes all agents together until each has stopped.

        Args:
            logits: of the agents' last rows, as `prefill` returns them.
            max_new_tokens: per agent.
            stop: token ids that end an agent; they are returned, not fed.
            temperature: 0 takes the likeliest token, otherwise tokens are sampled.
            top_p: sample among the likeliest tokens of this total probability.
            generator: of the sampling, on the CPU.

        Returns:
            Per agent its tokens. The last one has not been fed, so it has no row.
        """
        output: dict[str, list[int]] = {agent: [] for agent in logits}
        rows = dict(logits) if max_new_tokens > 0 else {}
        while rows:
            for agent, row in rows.items():
                output[agent].append(sample_token(row, temperature, top_p, generator))
            fed = {
                agent: output[agent][-1:]
                for agent in rows
                if len(output[agent]) < max_new_tokens and output[agent][-1] not in stop
            }
            rows = {agent: row[-1] for agent, row in self.decode(plan, fed).items()} if fed else {}
        return output

    def audit(
        self,
        plan: Plan,
        logits: Mapping[str, Array] | None = None,
        agents: str | Sequence[str] | None = None,
        fraction: float = 1.0,
        seed: int = 0,
        tokens: int = 16,
        rows: float = 1.0,
        max_rows: int | None = None,
    ) -> AuditReport:
        """Compares a sample of the plan's agents with full recompute; see `KVCollector.audit`.

        Args:
            plan: prefilled, and not committed yet.
            logits: see `Audit.report`: what `prefill` returned, or those rows with `decode`'s
                below them.
            agents, fraction, seed, tokens, rows: see `KVCollector.audit`.
            max_rows: as for `prefill`.
        """
        audit = self.collector.audit(plan, agents, fraction, seed, tokens, rows)
        for step in audit.steps(self._rows_of_a_step(max_rows)):
            with step:
                found = self._forward(step)
            audit.add(found)
        return audit.report(logits)

    def _rows_of_a_step(self, max_rows: int | None) -> int:
        if max_rows is not None:
            return max_rows
        return 1024 if self.model.device.type == "cpu" else 8192

    @torch.inference_mode()
    def _forward(self, step: Step) -> Tensor:
        """Logits ``[len(step.logit_rows), vocabulary]`` of one step."""
        body = self.model.model
        hidden = body.embed_tokens(step.token_ids)[None]
        ones = hidden.new_ones(1, 1, self.collector.store.geometry.head_dim)
        with _attention_of(self.model.config):
            for layer in body.layers:
                hidden = layer(
                    hidden,
                    attention_mask=None,
                    position_embeddings=(ones, torch.zeros_like(ones)),
                    tokendance_step=step,
                )
                (rows,) = step.keep(hidden[0])
                hidden = rows[None]
        wanted = hidden[0][step.logit_rows]
        logits: Tensor = self.model.lm_head(body.norm(wanted))
        return logits


def _check_rope(model: Any, store: DiffStore) -> None:
    """Compares a store's rotation tables with the model's, if its kind of rotation is known."""
    try:
        rope = rope_of(model, min(store.max_position, _COMPARED_POSITIONS))
    except ValueError:
        return
    expected, rows = layer_ropes(store.geometry, rope, store.device)
    same: set[tuple[int, int]] = set()
    for layer, one in enumerate(expected):
        other = store.executor.ropes[layer]
        if (id(one), id(other)) in same:
            continue
        if (
            one.cos.shape[1] != other.cos.shape[1]
            or (one.cos.shape[1] and one.interleaved != other.interleaved)
            or abs(one.attention_factor - other.attention_factor) > _ROPE_TOLERANCE
            or not _close(one.cos[:rows], other.cos[:rows])
            or not _close(one.sin[:rows], other.sin[:rows])
        ):
            raise ValueError(
                f"collector: expected a store of the model's rotation tables (rope_of(model)), "
                f"got others in layer {layer}"
            )
        same.add((id(one), id(other)))


def _close(a: Tensor, b: Tensor) -> bool:
    b = b[: len(a)]
    return a.shape == b.shape and bool(((a - b).abs() <= _ROPE_TOLERANCE).all())


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tokendance_step: Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: ``[1, heads, rows, head_dim]`` in, rows first out."""
    if tokendance_step is None:
        raise ValueError("attention: expected a step; run the model through TransformersEngine")
    rows = query.shape[2]
    out = tokendance_step.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scaling,
        window=sliding_window or 0,
    )
    if tokendance_step.kept is not None:
        # The layer adds the attention to all rows; the dropped ones leave after it.
        out = out.new_zeros(rows, *out.shape[1:]).index_copy(0, tokendance_step.kept, out)
    return out[None], None


AttentionInterface.register(_ATTENTION, _attend)


@contextmanager
def _attention_of(config: Any) -> Iterator[None]:
    """Lets the model's layers call `_attend`, and only inside."""
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
