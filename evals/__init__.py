"""What measures the library: not part of it, and in no wheel.

`baselines` are the systems it is compared with, `replay` runs recorded rounds through all of them,
`workloads` reads the recordings, `models` loads models (from `model_sources`, by
`gguf_conversion`), `society` is the demo's town of agents, `fidelity` makes the tables of
docs/fidelity.md, `vllm` serves recorded rounds inside vLLM, `cli` has the commands of
``python -m evals``.

May import everything of `tokendance`; nothing of `tokendance` imports it.
"""
