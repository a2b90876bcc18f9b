"""What requests of vLLM's want of rounds."""

from __future__ import annotations

from typing import Any

from tokendance.integrations.vllm.options import PARAMETER, Joining, joining


class Wishes:
    """Reads them from requests' parameters and prompts.

    Args:
        separator: of the connector's options.
        model_config: vLLM's, by which a separator that is text is tokenized.
    """

    def __init__(self, separator: str | tuple[int, ...] | None, model_config: Any) -> None:
        self._separator = _separator_ids(separator, model_config)

    def of(self, request: Any) -> Joining | None:
        """What a request wants of rounds, or None if it wants nothing.

        Raises:
            ValueError, TypeError: something that is not understood, or cannot be, by name.
        """
        told = (request.kv_transfer_params or {}).get(PARAMETER)
        if told is None and self._separator is None:
            return None
        parameters = request.sampling_params
        reasons = {
            "pooling": parameters is None,
            "prompt_embeds": request.prompt_token_ids is None or request.prompt_embeds is not None,
            "a LoRA": request.lora_request is not None,
            "images": request.has_encoder_inputs,
            "prompt_logprobs": parameters is not None and parameters.prompt_logprobs is not None,
            "a streamed prompt": request.resumable,
        }
        wish = None
        if not any(reasons.values()):
            namespace = request.cache_salt or ""
            ids = request.prompt_token_ids
            wish = joining(ids, told, self._separator, namespace)
            reasons["a prompt of one token"] = wish is not None and len(ids) < 2
        given = [reason for reason, is_so in reasons.items() if is_so]
        if given and told:
            raise ValueError(f"request: expected one that a round can take, got {given[0]}")
        return None if given else wish


def _separator_ids(separator: str | tuple[int, ...] | None, model_config: Any) -> list[int] | None:
    if separator is None:
        return None
    if isinstance(separator, tuple):
        return list(separator)
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    return list(tokenizer.encode(separator, add_special_tokens=False))
