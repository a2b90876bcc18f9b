"""What can be set, what a request may say, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tokendance.host.decide import Source
from tokendance.host.gate import Gate
from tokendance.host.plan import Policy
from tokendance.host.segments import Segment, private, shared, split_round
from tokendance.host.selection import DEFAULT, KeyDeviation, Selection, parse_selection

PARAMETER = "tokendance"
"""The key in a request's ``kv_transfer_params``."""


@dataclass(frozen=True)
class AuditOptions:
    """``gate`` of the options.

    Attributes:
        fraction: of the members that reuse rows inexactly, the chance of each to be audited.
        gate: what an audit may find; of its limits ``deviation`` alone, for logits stay in vLLM.
        seed: of the draws.
    """

    fraction: float
    gate: Gate
    seed: int = 0

    @classmethod
    def parse(cls, given: Any) -> AuditOptions:
        """Raises ``ValueError`` by name."""
        known = {"fraction", "deviation", "action", "seed"}
        if not isinstance(given, Mapping) or not set(given) <= known:
            raise ValueError(
                f"gate: expected an object of {sorted(known)} (the logits of other limits are "
                f"vLLM's), got {given!r}"
            )
        fraction, seed = given.get("fraction", 0.02), given.get("seed", 0)
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"gate.fraction: expected 0 < fraction <= 1, got {fraction!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"gate.seed: expected an int of at least 0, got {seed!r}")
        limits = {name: given[name] for name in ("deviation", "action") if name in given}
        try:
            return cls(fraction, Gate(**limits), seed)
        except (TypeError, ValueError) as error:
            raise ValueError(f"gate.{error}") from error


@dataclass(frozen=True)
class Options:
    """``kv_connector_extra_config`` of the connector.

    Attributes:
        capacity: bytes of the store's pages on each worker, as of `DiffStore`.
        block_size: rows of a page of the store: 8, 16 or 32.
        max_rows: prompt rows of one engine step at most; beside requests that vLLM runs, what they
            leave of ``max_num_batched_tokens``, but at least a sixteenth of ``max_rows``.
        patience: seconds without another member after which a round starts with those it has.
        selection: which reused rows are recomputed, as `parse_selection` reads it.
        source: where Masters come from: ``"master"``, ``"alone"`` or ``"producer"``.
        separator: text or token ids; a prompt that holds it is cut behind each, and joins the round
            that gathers at the time. Text is taken by the token ids that it has alone. None: only
            requests that say so join.
        gate: which members are audited, and what an audit may find. None: nobody is.
        shared_decode: members' rows stay in the store, where decode reads Masters once for all of
            them, and take no blocks of vLLM's cache.
    """

    capacity: int | str = "1GiB"
    block_size: int = 16
    max_rows: int = 1024
    patience: float = 0.2
    selection: Selection = DEFAULT
    source: Source = Source.MASTER
    separator: str | tuple[int, ...] | None = None
    gate: AuditOptions | None = None
    shared_decode: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """Raises ``ValueError`` for an unknown option, or one with a wrong value, by name."""
        known = [one.name for one in fields(cls)]
        odd = sorted(set(given) - set(known))
        if odd:
            raise ValueError(
                f"kv_connector_extra_config: expected options among {known}, got {odd}"
            )
        taken = dict(given)
        for name, kind in (("block_size", int), ("max_rows", int), ("patience", (int, float))):
            value = taken.get(name, 1)
            if not isinstance(value, kind) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
        if not isinstance(taken.get("shared_decode", False), bool):
            raise ValueError(
                f"shared_decode: expected true or false, got {taken['shared_decode']!r}"
            )
        if taken.get("max_rows") == 0:
            raise ValueError("max_rows: expected at least 1, got 0")
        if "selection" in taken:
            taken["selection"] = parse_selection(str(taken["selection"]))
        if isinstance(taken.get("selection"), KeyDeviation):
            raise ValueError(
                "selection: expected one that is known when a round is planned, got deviation; it "
                "drops rows in the middle of vLLM's forward pass"
            )
        if "source" in taken:
            sources = [one.value for one in Source]
            if taken["source"] not in sources:
                raise ValueError(f"source: expected one of {sources}, got {taken['source']!r}")
            taken["source"] = Source(taken["source"])
        if taken.get("gate") is not None:
            taken["gate"] = AuditOptions.parse(taken["gate"])
        separator = taken.get("separator")
        if isinstance(separator, list):
            taken["separator"] = tuple(separator)
        elif separator is not None and not isinstance(separator, str):
            raise ValueError(f"separator: expected text or token ids, got {separator!r}")
        if separator is not None and not len(separator):
            raise ValueError("separator: expected at least one token, got none")
        return cls(**taken)

    @property
    def policy(self) -> Policy:
        return Policy(self.selection, self.source)


@dataclass(frozen=True)
class Joining:
    """What a request says of its round.

    Attributes:
        segments: of its prompt.
        namespace: of the segments.
        round: its name; None: whoever comes at about the same time is in it.
        agent: whose prompt it is, by which its next prompt finds its rows.
        agents: how many the round has, if that is known.
        patience: of its round, instead of the option.
    """

    segments: list[Segment]
    namespace: str
    round: str | None
    agent: str
    agents: int | None = None
    patience: float | None = None


def joining(
    token_ids: Sequence[int],
    told: Any,
    separator: Sequence[int] | None,
    namespace: str,
) -> Joining | None:
    """What a request wants, or None if it wants nothing.

    Args:
        token_ids: its prompt.
        told: its ``kv_transfer_params["tokendance"]``, or None; False leaves it to vLLM.
        separator: of the connector's options.
        namespace: prompts of another one never match.

    Raises:
        ValueError: something that is not understood, by name.
    """
    if told is False:
        return None
    if told is not None and not isinstance(told, Mapping):
        raise ValueError(f"{PARAMETER}: expected an object, got {told!r}")
    given = dict(told or {})
    spans = given.pop("shared", None)
    if spans is not None:
        segments = _cut(token_ids, spans, namespace)
    elif separator is not None:
        segments = split_round(token_ids, separator, namespace=namespace)
        if len(segments) < 2 and told is None:
            return None
    elif told is None:
        return None
    else:
        raise ValueError(f"{PARAMETER}.shared: expected spans of the prompt, got none")
    first = segments[0].digest.hex() if segments else ""
    name, agent = given.pop("round", None), given.pop("agent", first)
    agents, patience = given.pop("agents", None), given.pop("patience", None)
    if given:
        raise ValueError(
            f"{PARAMETER}: expected round, agent, agents, patience and shared, got {sorted(given)}"
        )
    for key, value in (("round", name or "-"), ("agent", agent)):
        if not isinstance(value, str) or not value:
            raise ValueError(f"{PARAMETER}.{key}: expected a name, got {value!r}")
    if agents is not None and (not isinstance(agents, int) or agents < 1):
        raise ValueError(f"{PARAMETER}.agents: expected an int of at least 1, got {agents!r}")
    if patience is not None and (not isinstance(patience, int | float) or patience < 0):
        raise ValueError(f"{PARAMETER}.patience: expected seconds, got {patience!r}")
    return Joining(segments, namespace, name, f"{namespace}/{agent}", agents, patience)


def _cut(token_ids: Sequence[int], spans: Any, namespace: str) -> list[Segment]:
    wanted = f"{PARAMETER}.shared: expected ascending [begin, end] within the prompt"
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        raise ValueError(f"{wanted}, got {spans!r}")
    segments, at = [], 0
    for span in spans:
        if not isinstance(span, Sequence) or [type(one) for one in span] != [int, int]:
            raise ValueError(f"{wanted}, got {span!r}")
        begin, end = span
        if not at <= begin <= end <= len(token_ids):
            raise ValueError(f"{wanted} of {len(token_ids)} tokens, got {span!r}")
        segments.append(private(token_ids[at:begin], namespace=namespace))
        segments.append(shared(token_ids[begin:end], namespace=namespace))
        at = end
    segments.append(private(token_ids[at:], namespace=namespace))
    return [one for one in segments if one.length]


def refuse(reasons: Sequence[str]) -> None:
    """Raises ``ValueError`` where there are any."""
    if reasons:
        raise ValueError("TokenDanceConnector: " + "; ".join(reasons))


def refusals(vllm_config: Any) -> list[str]:
    """What vLLM is asked to do that the connector cannot do beside it, with the reasons."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    quantized = cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch."))
    found = {
        "kv_role: expected kv_both: rows are taken and given": transfer.kv_role != "kv_both",
        "kv_load_failure_policy: expected fail with asynchronous scheduling: vLLM would compute "
        "tokens that it does not have yet (--no-async-scheduling)": (
            transfer.kv_load_failure_policy == "recompute"
            and vllm_config.scheduler_config.async_scheduling
        ),
        "pipeline_parallel_size: expected 1: a round runs over all layers": (
            parallel.pipeline_parallel_size > 1
        ),
        "data_parallel_size: expected 1: each engine would run rounds of its own": (
            parallel.data_parallel_size > 1
        ),
        "decode_context_parallel_size: expected 1: a worker holds rows of all positions": (
            parallel.decode_context_parallel_size > 1
        ),
        "enable_lora: expected no LoRA: rounds run over the base model": (
            vllm_config.lora_config is not None
        ),
        "speculative_config: expected none: drafts have a cache of their own": (
            vllm_config.speculative_config is not None
        ),
        f"kv_cache_dtype: expected the model's dtype, got {cache.cache_dtype}": quantized,
        "model: expected one for text: embeddings of images are not in a round's token ids": (
            model.is_multimodal_model
        ),
        "model: expected no MLA: its cache holds no keys and values": model.use_mla,
        "model: expected a decoder: an encoder's rows are not in its cache": (
            model.is_encoder_decoder
        ),
        "model: expected attention in every layer: a state is not made of rows": (
            model.is_hybrid or model.is_attention_free
        ),
        "enable_sleep_mode: expected none: it takes the memory of the store's tables away": (
            model.enable_sleep_mode
        ),
        "fuse_attn_quant: expected none: what a round's attention gives is not quantized "
        "(-cc.pass_config.fuse_attn_quant=false)": (
            vllm_config.compilation_config.pass_config.fuse_attn_quant
        ),
        "runner: expected generate": model.runner_type != "generate",
    }
    return [reason for reason, is_so in found.items() if is_so]
