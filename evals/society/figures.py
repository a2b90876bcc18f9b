"""The numbers of a society's rounds: as JSON, and as one table for terminal and page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from evals.society.report import RoundReport

__all__ = ["Figures", "figures_of", "table", "total"]

Figures: TypeAlias = dict[str, float | None]
"""Numbers by name: those of `RoundReport` and `Comparison`; ``full_prefill_s`` is the audit's."""


def figures_of(report: RoundReport) -> Figures:
    """The numbers of one round."""
    audit = report.audit
    return {
        "agents": report.agents,
        "prompt_tokens": report.prompt_tokens,
        "distinct_tokens": report.distinct_tokens,
        "rows": report.rows,
        "rows_overridden": report.rows_overridden,
        "plan_s": report.plan_s,
        "prefill_s": report.prefill_s,
        "full_prefill_s": audit.prefill_s if audit else None,
        "decode_s": report.decode_s,
        "decode_tokens": report.decode_tokens,
        "decode_tokens_per_s": report.decode_tokens_per_s,
        "kv_bytes_dense": report.kv_bytes_dense,
        "kv_bytes_stored": report.kv_bytes_stored,
        "kv_bytes_held": report.kv_bytes_held,
        "kl": audit.kl if audit else None,
        "kl_siblings": audit.kl_siblings if audit else None,
        "top1": audit.top1 if audit else None,
    }


def total(rounds: Sequence[Figures]) -> Figures:
    """All rounds together.

    Sums; divergences averaged over the rounds that have them; ``agents`` and ``kv_bytes_held`` are
    those of the largest round; tokens per second are all tokens over all seconds.
    """
    result: Figures = {}
    for key in rounds[0]:
        values = [value for one in rounds if (value := one[key]) is not None]
        if not values:
            result[key] = None
        elif key in ("agents", "kv_bytes_held"):
            result[key] = max(values)
        elif key in ("kl", "kl_siblings", "top1"):
            result[key] = sum(values) / len(values)
        else:
            result[key] = sum(values)
    seconds = result["decode_s"] or 0.0
    result["decode_tokens_per_s"] = (result["decode_tokens"] or 0.0) / seconds if seconds else 0.0
    return result


def table(rounds: Sequence[Figures]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: one row per round, and one for all. Audited columns only where there are any.

    Returns:
        The titles, and rows of as many texts.
    """
    everything = total(rounds)
    columns = [
        (title, form) for title, key, form in _COLUMNS if key is None or everything[key] is not None
    ]
    names = [f"{number}" for number in range(1, len(rounds) + 1)]
    rows = [
        [name, *[form(one) for _, form in columns]]
        for name, one in zip([*names, "all"], [*rounds, everything], strict=True)
    ]
    return ["round", *[title for title, _ in columns]], rows


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[Mapping[str, float | None]], str]:
    def show(figures: Mapping[str, float | None]) -> str:
        value = figures[key]
        return "-" if value is None else format(value / scale, form)

    return show


def _share(figures: Mapping[str, float | None]) -> str:
    return f"{100 * (figures['rows'] or 0) / (figures['prompt_tokens'] or 1):.0f} %"


_MIB = float(1 << 20)
# Title, the number that must have been measured (None: always is), and how it is shown.
_COLUMNS: list[tuple[str, str | None, Callable[[Mapping[str, float | None]], str]]] = [
    ("prompt rows", None, _number("prompt_tokens", ",.0f")),
    ("computed", None, _number("rows", ",.0f")),
    ("share", None, _share),
    ("repaired", None, _number("rows_overridden", ",.0f")),
    ("plan s", None, _number("plan_s", ".3f")),
    ("prefill s", None, _number("prefill_s", ".2f")),
    ("full prefill s", "full_prefill_s", _number("full_prefill_s", ".2f")),
    ("decode tok/s", None, _number("decode_tokens_per_s", ".1f")),
    ("dense MiB", None, _number("kv_bytes_dense", ",.1f", _MIB)),
    ("stored MiB", None, _number("kv_bytes_stored", ",.1f", _MIB)),
    ("held MiB", None, _number("kv_bytes_held", ",.1f", _MIB)),
    ("KL", "kl", _number("kl", ".1e")),
    ("KL siblings", "kl_siblings", _number("kl_siblings", ".1e")),
    ("top-1", "top1", _number("top1", ".3f")),
]
