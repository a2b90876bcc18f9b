"""Machines by their datasheets, and models by their published configurations."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from evals.baselines.flops import ModelFlops

_GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """An accelerator, or several that hold a model together.

    Attributes:
        name: as on the command line.
        memory: bytes.
        bandwidth: bytes a second.
        flops: dense FLOPs a second of 16-bit tensor cores.
        link: bytes a second that one of several can send to the others.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    link: float


MACHINES = {
    machine.name: machine
    for machine in (
        # NVIDIA's datasheets: A100 80GB SXM, H100 SXM, H200 SXM, and B200 as in the HGX B200.
        Machine("a100", 80 * 10**9, 2039e9, 312e12, 300e9),
        Machine("h100", 80 * 10**9, 3350e9, 989e12, 450e9),
        Machine("h200", 141 * 10**9, 4800e9, 989e12, 450e9),
        Machine("b200", 180 * 10**9, 8000e9, 2250e12, 900e9),
    )
}


@dataclass(frozen=True)
class ModelShape:
    """What a decoder with grouped queries and a gated MLP costs.

    Attributes:
        name: as on the command line.
        num_layers, num_q_heads, num_kv_heads, head_dim: of attention.
        hidden: width of a row between layers.
        flops: of a row's parts.
        weights: elements that a forward pass reads: all but the embedding table.
        embedding: elements of the embedding table, which takes memory too where it is not tied.
        ranks: devices that hold it together (tensor parallelism).
        element: bytes of a weight, and of an element of keys and values.
    """

    name: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    flops: ModelFlops
    weights: int
    embedding: int
    ranks: int = 1
    element: int = 2

    @property
    def row_bytes(self) -> int:
        """Keys and values of one token in all layers, on all ranks together."""
        return 2 * self.element * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def memory_bytes(self) -> int:
        """Of the weights, on all ranks together."""
        return self.element * (self.weights + self.embedding)


def _shape(
    name: str,
    layers: int,
    hidden: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocabulary: int,
    ranks: int = 1,
    element: int = 2,
) -> ModelShape:
    config = SimpleNamespace(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
    )
    flops = ModelFlops.from_config(config)
    # A multiplication by a weight is two FLOPs of a row.
    weights = (flops.row * layers + flops.head) // 2
    table = hidden * vocabulary
    return ModelShape(
        name, layers, query_heads, kv_heads, head_dim, hidden, flops, weights, table, ranks, element
    )


MODELS = {
    shape.name: shape
    for shape in (
        # The config.json of each model's repository.
        _shape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064),
        _shape("qwen2.5-14b", 48, 5120, 40, 8, 128, 13824, 152064),
        _shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        _shape("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936, ranks=2),
        _shape("smollm2", 30, 576, 9, 3, 64, 1536, 49152, element=4),
    )
}
"""The first two are the paper's, the last one is served for real, on a CPU in fp32."""


def kv_bytes(machine: Machine, model: ModelShape, share: float = 0.9) -> int:
    """Bytes that are left for keys and values beside the weights, on all ranks together.

    Args:
        share: of the memory that may be used; vLLM's default.

    Raises:
        ValueError: the weights do not fit.
    """
    left = int(machine.memory * model.ranks * share) - model.memory_bytes - 2 * _GIB * model.ranks
    if left <= 0:
        raise ValueError(
            f"machine: expected room for {model.memory_bytes / 1e9:.0f} GB of weights, got "
            f"{model.ranks} x {machine.memory / 1e9:.0f} GB ({machine.name})"
        )
    return left
