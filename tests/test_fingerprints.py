"""`fingerprint_of`: whatever changes keys and values changes it, and what does not, does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_architectures import tiny_model

transformers = pytest.importorskip("transformers")
from tokendance.integrations.transformers import fingerprint_of  # noqa: E402


class LoraLinear(torch.nn.Module):
    """A layer as PEFT puts it in the place of a linear one, with the names of its LoraLayer."""

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict()
        self.lora_B = torch.nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.active_adapters: list[str] = []

    def add(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        out, rows = self.base_layer.weight.shape
        self.lora_A[name] = torch.nn.Linear(rows, 4, bias=False)
        self.lora_B[name] = torch.nn.Linear(4, out, bias=False)
        self.r[name], self.lora_alpha[name], self.scaling[name] = 4, 8, 2.0

    def merge(self, name: str) -> None:
        weights = self.lora_B[name].weight @ self.lora_A[name].weight
        with torch.no_grad():
            self.base_layer.weight += weights * self.scaling[name]
        self.merged_adapters.append(name)


def adapted(model: Any, *names: str) -> list[LoraLinear]:
    """Gives every layer's value projection adapters, as PEFT does, in the model itself."""
    layers = []
    for index, layer in enumerate(model.model.layers):
        lora = LoraLinear(layer.self_attn.v_proj)
        for seed, name in enumerate(names):
            lora.add(name, 10 * index + seed)
        layer.self_attn.v_proj = lora
        layers.append(lora)
    return layers


def set_all(layers: list[LoraLinear], **fields: Any) -> None:
    for layer in layers:
        for name, value in fields.items():
            setattr(layer, name, value)


def test_the_adapter_in_use_counts_merged_or_not() -> None:
    model = tiny_model("llama")
    layers = adapted(model, "one", "two")
    found = {}
    for name in ("one", "two"):
        set_all(layers, active_adapters=[name])
        found[name] = fingerprint_of(model)
    set_all(layers, active_adapters=["one", "two"])
    found["both"] = fingerprint_of(model)
    set_all(layers, disable_adapters=True)
    found["none"] = fingerprint_of(model)
    set_all(layers, disable_adapters=False, active_adapters=["one"])
    for layer in layers:
        layer.scaling["one"] = 1.0
    found["scaled"] = fingerprint_of(model)
    for name in ("one", "two"):
        merged = copy.deepcopy(model)
        for layer in merged.model.layers:
            layer.self_attn.v_proj.merge(name)
        found[f"merged {name}"] = fingerprint_of(merged)
    assert len(set(found.values())) == len(found)


def test_adapters_that_are_not_in_use_do_not_count() -> None:
    model = tiny_model("llama")
    layers = adapted(model, "one")
    set_all(layers, active_adapters=["one"])
    before = fingerprint_of(model)
    for layer in layers:
        layer.add("two", 7)
    assert fingerprint_of(model) == before
    with torch.no_grad():
        layers[0].lora_B["two"].weight += 1
    assert fingerprint_of(model) == before
    with torch.no_grad():
        layers[0].lora_B["one"].weight += 1
    assert fingerprint_of(model) != before


def test_adapters_of_peft() -> None:
    """The real ones, where PEFT is installed: `pip install --no-deps peft` is enough."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny_model("llama"), config, "one").eval()
    wrapped.add_adapter("two", config)
    wrapped.set_adapter("one")
    one = fingerprint_of(wrapped)
    inner = fingerprint_of(wrapped.get_base_model())
    wrapped.set_adapter("two")
    assert fingerprint_of(wrapped) != one
    assert fingerprint_of(wrapped.get_base_model()) != inner
    wrapped.set_adapter("one")
    assert fingerprint_of(wrapped) == one
    wrapped.add_adapter("three", config)
    assert fingerprint_of(wrapped) == one
    with wrapped.disable_adapter():
        assert fingerprint_of(wrapped) != one
    wrapped.merge_adapter(["two"])
    two = fingerprint_of(wrapped)
    wrapped.unmerge_adapter()
    wrapped.merge_adapter(["one"])
    assert len({one, two, fingerprint_of(wrapped)}) == 3
    plain = fingerprint_of(tiny_model("llama"))
    assert fingerprint_of(wrapped.merge_and_unload()) != plain


class QuantizedLinear(torch.nn.Module):
    """Weights as GPTQ and AWQ keep them: in buffers."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.arange(rows * columns // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(columns, dtype=torch.float16))


@pytest.mark.parametrize("buffer", ["qweight", "scales"])
def test_quantized_weights_in_buffers_count(buffer: str) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = QuantizedLinear(128, 160)
    before = fingerprint_of(model)
    assert fingerprint_of(copy.deepcopy(model)) == before
    getattr(model.model.layers[1].mlp.up_proj, buffer)[0] += 1
    assert fingerprint_of(model) != before


def test_what_prompts_leave_behind_does_not_count() -> None:
    model = tiny_model("phi3-longrope")
    before = fingerprint_of(model)
    with torch.inference_mode():
        model(torch.arange(600)[None] % 331)  # the rotary module holds other frequencies now
    assert fingerprint_of(model) == before


def test_weights_that_are_not_loaded_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny_model("llama").config)
    with pytest.raises(ValueError, match=r"model: expected loaded weights, got model\.embed"):
        fingerprint_of(model)
