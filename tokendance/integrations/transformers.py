"""Rounds on unmodified transformers models (Llama, Qwen, Gemma, gpt-oss and others).

The model's own forward runs on the rows of a step (see `model_forward`); everything else is the
library's public API.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokendance.collector import KVCollector
from tokendance.device.arrays import Array
from tokendance.device.geometry import KVGeometry
from tokendance.device.layer_ropes import layer_ropes
from tokendance.device.quantization import Quantization
from tokendance.device.rope import Rope
from tokendance.host.gate import AuditReport
from tokendance.host.plan import Plan
from tokendance.integrations.model_forward import logits_of
from tokendance.integrations.model_trial import try_model
from tokendance.step import Step
from tokendance.store import DiffStore

MODEL_TYPES = (
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
"""Model types that are compared with transformers' own forward by the tests."""
_SAMPLED_WEIGHTS = 256
_TEMPERATURES = (1e-5, 1e5)


def geometry_of(model: Any) -> KVGeometry:
    """The KV geometry of a transformers causal language model."""
    config = model.config
    head_dim = getattr(config, "head_dim", None)
    return KVGeometry(
        num_layers=config.num_hidden_layers,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        dtype=model.dtype,
    )


def rope_of(model: Any, max_position: int | None = None) -> Rope | list[Rope | None]:
    """The rotation tables of a transformers model; see `Rope.from_model`."""
    return Rope.from_model(model, max_position)


def fingerprint_of(model: Any) -> str:
    """What tells a model's weights from others', for `DiffStore`: 32 hexadecimal digits.

    It is a digest of the name, shape, dtype and up to 256 elements of every parameter and buffer.
    Another model, a fine-tuned one, one that is cast to another dtype or quantized (GPTQ, AWQ) has
    another fingerprint. Large models are not read through. PEFT's adapters count if they are in
    use, merged or not, and so does their scale. Adapters that are loaded but not in use change
    nothing.

    Args:
        model: of transformers, wrapped by PEFT or not.

    Raises:
        ValueError: weights that are not loaded.
    """
    hasher = hashlib.blake2b(digest_size=16)
    idle: set[str] = set()
    for name, module in model.named_modules():
        for line in _adapters_in_use(name, module, idle):
            hasher.update(line.encode())
    for name, weights in (*model.named_parameters(), *model.named_buffers()):
        parts = name.split(".")
        # Rotary frequencies have a fingerprint of their own, and some change with the prompt.
        if name.endswith("inv_freq") or any(
            ".".join(parts[:n]) in idle for n in range(1, len(parts) + 1)
        ):
            continue
        if weights.is_meta:
            raise ValueError(f"model: expected loaded weights, got {name} on the meta device")
        hasher.update(f"{name}{tuple(weights.shape)}{weights.dtype}".encode())
        weights = weights.detach().flatten()
        some = weights[:: max(1, weights.numel() // _SAMPLED_WEIGHTS)][:_SAMPLED_WEIGHTS]
        hasher.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _adapters_in_use(name: str, module: Any, idle: set[str]) -> Iterator[str]:
    """Which adapters a layer of PEFT applies, and with which numbers; the others' weights are idle.

    Args:
        idle: gets the names of the modules that hold adapters that are not in use.
    """
    kinds = getattr(module, "adapter_layer_names", None)
    if not isinstance(kinds, tuple):
        return
    used = set(module.merged_adapters)
    if not used and not module.disable_adapters:
        used = set(module.active_adapters)
    yield f"{name} uses {sorted(used)}, merged {list(module.merged_adapters)}"
    for kind in (*kinds, *getattr(module, "other_param_names", ())):
        held = getattr(module, kind, None)
        if isinstance(held, torch.nn.ModuleDict | torch.nn.ParameterDict):
            idle.update(f"{name}.{kind}.{adapter}" for adapter in held if adapter not in used)
        elif isinstance(held, Mapping):
            yield f"{kind} {[(key, held[key]) for key in sorted(used & set(held))]}"


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
            cache = model.base_model(prompt, use_cache=True).past_key_values
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
        logits: ``[vocabulary]``, of which one at least is finite and the others may be -inf.
        temperature: 0 takes the likeliest token; otherwise in 1e-5 .. 1e5.
        top_p: draw among the likeliest tokens of this total probability; above 0, at most 1.
        generator: on the CPU.

    Raises:
        ValueError: an argument that is out of range, NaN, or of another shape.
    """
    check_sampling(temperature, top_p)
    return _sample("logits", logits, temperature, top_p, generator)


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises ``ValueError`` for numbers that `sample_token` does not take."""
    least, most = _TEMPERATURES
    if temperature != 0 and not least <= temperature <= most:
        raise ValueError(
            f"temperature: expected 0, or a number in {least:g} .. {most:g}, got {temperature}"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected 0 < top_p <= 1, got {top_p}")


def _sample(
    name: str,
    logits: Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> int:
    if logits.dim() != 1 or not logits.numel():
        raise ValueError(f"{name}: expected [vocabulary], got {list(logits.shape)}")
    largest = float(logits.max())  # NaN if any is
    # A quotient that leaves the range of fp32 makes NaN of all of them.
    if not abs(largest) <= torch.finfo(torch.float32).max * min(temperature or 1.0, 1.0):
        raise ValueError(
            f"{name}: expected numbers or -inf, and one number at least, got a largest of {largest}"
        )
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    ordered, ids = probabilities.sort(descending=True)
    outside = ordered.cumsum(0) - ordered >= top_p
    outside[0] = False  # where top_p is 0 in fp32
    ordered = ordered.masked_fill(outside, 0)
    choice = torch.multinomial(ordered / ordered.sum(), 1, generator=generator)
    return int(ids[choice])


class TransformersEngine:
    """Runs the rounds of a collector on a model.

    Steps have 8,192 rows at most, unless ``max_rows`` says otherwise; on a CPU 1,024, which are
    enough for its matrix products: the activations of more are so large that its allocator gives
    them back to the system after each operator, and every page of the next is a page fault.

    Args:
        model: an ``AutoModelForCausalLM``, not wrapped, in eval mode. A model of a type that is not
            in ``MODEL_TYPES`` is tried, here and now: a short forward is compared with its own.
        collector: over a store of the model's geometry, rotation tables and device; its pool may
            be quantized (`quantization_of`).

    Raises:
        ValueError: a model that does not fit, with the reason, or a store that does not fit it.
    """

    def __init__(self, model: Any, collector: KVCollector) -> None:
        _check_model(model)
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
        if model.config.model_type not in MODEL_TYPES:
            try_model(model, collector.store.geometry, collector.store.max_position)
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
            temperature, top_p: see `sample_token`.
            generator: of the sampling, on the CPU.

        Raises:
            ValueError: as `sample_token`; of what was given, before anything is fed.

        Returns:
            Per agent its tokens. The last one has not been fed, so it has no row.
        """
        check_sampling(temperature, top_p)
        output: dict[str, list[int]] = {agent: [] for agent in logits}
        rows = dict(logits) if max_new_tokens > 0 else {}
        while rows:
            for agent, row in rows.items():
                token = _sample(f"logits[{agent!r}]", row, temperature, top_p, generator)
                output[agent].append(token)
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
        return logits_of(self.model, step)


def _check_model(model: Any) -> None:
    """Refuses what is no causal language model of transformers as such."""
    wanted = "a transformers model with a language-model head (AutoModelForCausalLM)"
    got = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inner = {"get_base_model": "get_base_model()", "_orig_mod": "_orig_mod", "module": "module"}
        ways = [f"; give it model.{way}" for name, way in inner.items() if hasattr(model, name)]
        raise ValueError(f"model: expected {wanted}, got {got}{ways[0] if ways else ''}")
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ValueError(f"model: expected {wanted} for text alone, got {got}")
    head: Any = model.get_output_embeddings
    if head() is None:
        raise ValueError(f"model: expected {wanted}, got {got}, which has no such head")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"model: expected keys and values per head, got {got}'s latent ones (MLA)")
    if model.training:
        raise ValueError("model: expected eval mode (model.eval()), got one in training mode")
    layers = getattr(model.base_model, "layers", None)
    if layers is None or len(layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"model: expected {model.config.num_hidden_layers} layers in {got}.base_model.layers, "
            f"got {'none' if layers is None else len(layers)}"
        )
    for name, module in model.base_model.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise ValueError(f"model: expected causal attention, got another in {name}")


def _check_rope(model: Any, store: DiffStore) -> None:
    """Compares a store's rotation tables with the model's, bit for bit."""
    found = store.executor.ropes
    rows = store.max_position if any(one.cos.shape[1] for one in found) else 1
    expected, _ = layer_ropes(store.geometry, rope_of(model, rows), store.device)
    same: set[tuple[int, int]] = set()
    for layer, (one, other) in enumerate(zip(expected, found, strict=True)):
        if (id(one), id(other)) in same:
            continue
        if (
            (one.cos.shape[1] and one.interleaved != other.interleaved)
            or one.attention_factor != other.attention_factor
            or not torch.equal(one.cos, other.cos[: len(one.cos)])
            or not torch.equal(one.sin, other.sin[: len(one.sin)])
        ):
            raise ValueError(
                f"collector: expected a store of the model's rotation tables (rope_of(model)), "
                f"got others in layer {layer}"
            )
        same.add((id(one), id(other)))
