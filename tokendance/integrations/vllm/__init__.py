"""Rounds of agents inside vLLM, by a KV connector (docs/vllm.md).

    vllm serve MODEL \\
      --kv-transfer-config '{"kv_connector": "TokenDanceConnector", "kv_role": "kv_both"}'

vLLM schedules, samples, streams and stops. `scheduler_side` holds the library's host half: it
gathers requests to `rounds`, by what they want (`wishes`), and makes records. `worker_side` holds
the device half: it runs the records over vLLM's own model and moves rows to and from vLLM's
`cache`. `orders` is what passes between the two, `audits` the gate, `options` what can be set and
what is refused, `connector` the class that vLLM makes, `workers` how the connector of a worker
finds its model. Where decode is shared (`sharing` says where it cannot be), `scheduler_decode` and
`worker_decode` are the two sides of it, and `null_blocks` vLLM's books of blocks.

May import: `tokendance.host`, and on the worker's side `tokendance.device`. This module imports
neither torch nor vLLM, since vLLM asks for it in every process.
"""

from __future__ import annotations

CONNECTOR = "TokenDanceConnector"


def register() -> None:
    """Makes the connector known to vLLM by its name: the entry point of ``vllm.general_plugins``.

    vLLM calls it in every process, also more than once.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from tokendance.integrations.vllm import workers

    if CONNECTOR not in KVConnectorFactory._registry:
        module = "tokendance.integrations.vllm.connector"
        KVConnectorFactory.register_connector(CONNECTOR, module, CONNECTOR)
    workers.watch(CONNECTOR)
