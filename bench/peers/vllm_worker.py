"""Serves rounds with vLLM and prints the seconds of each. Run by `bench.peers.vllm_cpu` in vLLM's
own virtual environment; it uses nothing of this project."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    task = json.loads(sys.stdin.read())
    engine = LLM(
        model=task["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=task["prefix_caching"],
        max_model_len=task["max_tokens"],
        max_num_batched_tokens=8192,
        max_num_seqs=256,
    )
    sampling = SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True)
    engine.generate([{"prompt_token_ids": [1] * 64}], sampling, use_tqdm=False)  # warm-up
    seconds = []
    for prompts in task["rounds"]:
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        begin = time.perf_counter()
        engine.generate(requests, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
    print("seconds:", json.dumps(seconds))


main()
