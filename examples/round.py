"""Four agents, two rounds on SmolLM2-135M-Instruct, one KV cache.

python examples/round.py
"""

import torch

import tokendance as td
from evals.models import load_model
from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of

PERSONAS = {
    "Ada": "a mathematician who checks every number twice",
    "Ben": "a baker who is up before everybody else",
    "Cleo": "a gardener who worries about the drought",
    "Dan": "a ferryman who knows all the gossip of the town",
}
TOPIC = "The town council wants to move the market to the harbour. Say what you think of it."

model, tokenizer = load_model("smollm2")
geometry = geometry_of(model)
store = td.DiffStore(geometry, rope_of(model), capacity="512MiB", block_size=8)
engine = TransformersEngine(model, td.KVCollector(store, source="producer"))
sampling = {"temperature": 0.7, "top_p": 0.9, "generator": torch.Generator().manual_seed(0)}


def ids(text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


said: dict[str, td.Segment] = {}
for number in (1, 2):
    prompts = {}
    for name, persona in PERSONAS.items():
        # Everybody hears everybody, the own words last: the same blocks at other positions.
        heard = [said[other] for other in PERSONAS if other in said and other != name]
        heard += [said[name]] if name in said else []
        start = f"<|im_start|>system\nYou are {name}, {persona}.<|im_end|>\n<|im_start|>user\n"
        end = f"\n{TOPIC}<|im_end|>\n<|im_start|>assistant\nI, {name}, say:"
        prompts[name] = [td.private(ids(start)), *heard, td.private(ids(end))]
    plan = engine.collector.plan(prompts)
    logits = engine.prefill(plan)
    output = engine.generate(plan, logits, 40, stop=[tokenizer.eos_token_id], **sampling)
    plan.commit()
    said = {name: td.shared(tokens) for name, tokens in output.items()}

    print(f"\nround {number}")
    for name, tokens in output.items():
        print(f"  {name}: {tokenizer.decode(tokens, skip_special_tokens=True).strip()}")
    stats = store.stats()
    print(f"  rows computed {plan.rows_computed:.0f} of {plan.rows}")
    print(f"  bytes stored {stats.stored_bytes:,} of {stats.dense_bytes:,}")
