"""A GGUF file as a transformers model directory in fp32, made tensor by tensor.

transformers reads GGUF files itself, but holds all tensors twice while it does. Here one shard is
in memory at a time. Names and layouts of tensors are transformers' own mapping, so that the result
is what transformers would have loaded.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["convert", "no_progress_bars"]

_SHARD_BYTES = 1 << 30


def convert(gguf: Path, directory: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes the GGUF file's model and tokenizer as a transformers model directory.

    Args:
        gguf: the file.
        directory: to be made.
        shard_bytes: a file of weights ends before the tensor that would exceed them.

    Raises:
        ValueError: a weight of the model is missing in the file.
    """
    transformers: Any = importlib.import_module("transformers")
    directory.mkdir()
    with no_progress_bars():
        config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        _write_weights(gguf, model, directory, shard_bytes)
        transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name
        ).save_pretrained(directory)


def _write_weights(gguf: Path, model: Any, directory: Path, shard_bytes: int) -> None:
    """Of a model on the meta device; what is tied to another weight is not written."""
    safetensors: Any = importlib.import_module("safetensors.torch")
    missing = set(model.state_dict()) - set(model.all_tied_weights_keys)
    shards: list[list[str]] = []
    total = held = 0
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        shards.append(list(shard))
        safetensors.save_file(shard, directory / f"{len(shards)}.safetensors", {"format": "pt"})
        shard.clear()

    for name, tensor in _tensors(gguf, model):
        if name not in missing:
            continue
        missing.remove(name)
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            write()
            held = 0
        shard[name] = tensor
        held, total = held + size, total + size
    if missing:
        raise ValueError(f"{gguf.name}: expected all weights of the model, got no {min(missing)}")
    write()
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for number, file in enumerate(names, start=1):
        (directory / f"{number}.safetensors").rename(directory / file)
    files = {name: file for file, held in zip(names, shards, strict=True) for name in held}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _tensors(gguf: Path, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the model and weight in fp32 of the file's tensors, one at a time."""
    files: Any = importlib.import_module("gguf")
    mapping: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    reader = files.GGUFReader(gguf)
    architecture = reader.fields["general.architecture"].contents()
    processor_class = mapping.TENSOR_PROCESSORS.get(architecture, mapping.TensorProcessor)
    processor = processor_class(config=model.config.to_dict())
    names = mapping.get_gguf_hf_weights_map(model, processor)
    for tensor in reader.tensors:
        weights = files.dequantize(tensor.data, tensor.tensor_type)
        made = processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters={}
        )
        if made.name in names:
            yield names[made.name], torch.tensor(made.weights, dtype=torch.float32, device="cpu")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Of transformers, and only inside."""
    settings: Any = importlib.import_module("transformers.utils.logging")
    enabled = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            settings.enable_progress_bar()
