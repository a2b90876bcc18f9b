"""One KV cache for many LLM agents: collective reuse, block-sparse diffs, fused RoPE attention."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tokendance")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
