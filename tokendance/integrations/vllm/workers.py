"""How a worker's connector finds the model.

vLLM hands a connector its caches, not its model. Every worker of this process is remembered when it
is made, so that the connector can ask the one of its own configuration. What cannot be done beside
the connector is refused then already: before the model is loaded, and before vLLM looks for a cache
that it may not find.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakSet

from tokendance.integrations.vllm.options import refusals, refuse

_workers: WeakSet[Any] = WeakSet()


def watch(connector: str) -> None:
    """Remembers the workers that are made from now on.

    Those that are to have the connector of this name raise ``ValueError`` for what `refusals`
    finds.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    made = WorkerBase.__init__
    if getattr(made, "is_watched", False):
        return

    @functools.wraps(made)
    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        transfer = self.vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == connector:
            refuse(refusals(self.vllm_config))
        _workers.add(self)

    remember.is_watched = True  # type: ignore[attr-defined]
    WorkerBase.__init__ = remember


def runner_of(vllm_config: Any) -> Any:
    """The model runner of this process's worker, which has the model and the batch.

    Raises:
        RuntimeError: the worker was made before this package was registered with vLLM.
    """
    for worker in _workers:
        if worker.vllm_config is vllm_config:
            return worker.model_runner
    raise RuntimeError(
        "vllm.general_plugins: expected the plugin 'tokendance' to be loaded before the worker is "
        "made, got a worker without it; install tokendance into vLLM's environment, and name the "
        "plugin in VLLM_PLUGINS if that is set"
    )
