"""A model directory made in a moment: a random Llama of two layers and a byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_tiny_model(directory: Path, **changes: Any) -> Path:
    """A transformers model directory; every byte is a token, ChatML markers are special tokens.

    Args:
        directory: where to write it.
        changes: of the model's config.
    """
    import tokenizers
    import transformers
    from transformers.utils import logging

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    bytes_ = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
    )
    config = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **changes}))
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    logging.enable_progress_bar()
    tokenizer.save_pretrained(directory)
    return directory
