"""From sampled tokens to what somebody says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evals.society.options import Options
from tokendance.host.plan import Plan
from tokendance.integrations.transformers import TransformersEngine, sample_token

__all__ = ["Speech", "clean_message", "is_over", "stop_tokens"]

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_SILENCE = "..."


def stop_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a message: all special ones of a transformers tokenizer."""
    return frozenset(int(token) for token in tokenizer.all_special_ids)


def is_over(text: str) -> bool:
    """Whether a message so far goes beyond its end: its first line, or a marker of the template."""
    return "\n" in text.lstrip() or "<|" in text


def clean_message(text: str, complete: bool) -> str:
    """What is handed to the others of a decoded message.

    Args:
        text: decoded.
        complete: whether it ended by itself; otherwise it is cut after its last whole sentence, if
            it has one.

    Returns:
        One line of printable characters, never empty: who says nothing says ``...``.
    """
    text = text.partition("<|")[0].strip()
    complete = complete or "\n" in text
    text = " ".join(text.partition("\n")[0].split())
    text = "".join(character for character in text if character.isprintable())
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if not complete and ends:
        text = text[: ends[-1]]
    return text or _SILENCE


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


class Speech:
    """The decoding of one round: all people at once, until each has finished.

    Attributes:
        messages: what was said, in the order of finishing.
        logits: per person the logits that its tokens were sampled from.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        plan: Plan,
        tokenizer: Any,
        options: Options,
    ) -> None:
        self.messages: dict[str, str] = {}
        self.logits: dict[str, list[Tensor]] = {name: [] for name in plan.agents}
        self._engine = engine
        self._plan = plan
        self._tokenizer = tokenizer
        self._stop = stop_tokens(tokenizer)
        self._options = options

    def run(
        self,
        labels: Mapping[str, Sequence[int]],
        number: int,
        on_message: Callable[[str, str], None] | None,
        keep_logits: bool,
    ) -> None:
        """Everybody begins with its label, which is fed, and goes on with sampled tokens.

        Args:
            labels: tokens by name, at least one.
            number: of the round.
            on_message: see `Society.hold_round`.
            keep_logits: fill `logits`.
        """
        # A generator each: what somebody says does not depend on when others finish.
        generators = {
            name: torch.Generator().manual_seed(_seed(f"{self._options.seed}/{number}/{name}"))
            for name in labels
        }
        sampled: dict[str, list[int]] = {name: [] for name in labels}
        rows = self._engine.decode(self._plan, labels)
        while rows:
            fed: dict[str, list[int]] = {}
            for name, logits in rows.items():
                if keep_logits:
                    self.logits[name].append(logits[-1])
                token = sample_token(
                    logits[-1], self._options.temperature, self._options.top_p, generators[name]
                )
                over = token in self._stop
                if not over:
                    sampled[name].append(token)
                    over = is_over(self._tokenizer.decode(sampled[name]))
                if over or len(sampled[name]) == self._options.new_tokens:
                    text = clean_message(self._tokenizer.decode(sampled[name]), over)
                    self.messages[name] = text
                    if on_message is not None:
                        on_message(name, text)
                else:
                    fed[name] = [token]
            rows = self._engine.decode(self._plan, fed) if fed else {}
