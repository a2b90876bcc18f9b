"""Engines that call the library: `transformers` runs a model's forward, `vllm` is a KV connector.

`calibration` compares such a forward with `full_recompute`, on `calibration_rounds`.

May import: the front, `tokendance.host` and `tokendance.device`; nothing of the library imports it.
"""
