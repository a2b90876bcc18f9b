"""What a store holds, for Prometheus: ``pip install tokendance[metrics]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokendance.stats import StoreStats
from tokendance.store import DiffStore

_PAGES = ("free", "evictable", "held")
_ROWS = ("dense", "master", "own")
_BYTES = ("dense", "row", "stored")


class StoreMetrics(Collector):
    """Counts stores when it is asked: ``REGISTRY.register(StoreMetrics({"main": store}))``.

    Every sample has the label ``store``, and ``tenant``, empty for what is no tenant's.

    - ``tokendance_agents``, ``tokendance_masters``: Mirrors, and Masters.
    - ``tokendance_pages``: by ``state``, free, evictable or held.
    - ``tokendance_rows``: by ``kind``, dense, master or own.
    - ``tokendance_bytes``: by ``kind``, dense, row or stored.
    - ``tokendance_evictions_total``: Masters dropped to make room.
    - ``tokendance_folded_total``: Masters that have become own rows of their one user.
    - ``tokendance_tier_agents``, ``tokendance_tier_bytes``: by ``tier``, device, host or disk, the
      Mirrors there and the bytes in use.
    - ``tokendance_tier_demotions_total``: by ``tier``, what has left it for a lower one.

    Each is documented under `StoreStats` and `TierStats`.

    Args:
        stores: by the label ``store``; of a store its tenants are counted, too.
    """

    def __init__(self, stores: Mapping[str, DiffStore]) -> None:
        self._stores = dict(stores)

    def describe(self) -> list[Metric]:
        """The metrics, without samples: nothing is counted for it."""
        return list(self._families().values())

    def collect(self) -> Iterator[Metric]:
        families = self._families()
        for name, store in self._stores.items():
            stats = store.stats()
            for tenant, one in {"": stats, **stats.tenants}.items():
                self._add(families, {"store": name, "tenant": tenant}, one)
        yield from families.values()

    def _families(self) -> dict[str, Metric]:
        labels = ["store", "tenant"]
        return {
            "agents": GaugeMetricFamily("tokendance_agents", "Mirrors.", labels=labels),
            "masters": GaugeMetricFamily("tokendance_masters", "Masters.", labels=labels),
            "pages": GaugeMetricFamily(
                "tokendance_pages", "Pages of the pool.", labels=[*labels, "state"]
            ),
            "rows": GaugeMetricFamily("tokendance_rows", "Rows.", labels=[*labels, "kind"]),
            "bytes": GaugeMetricFamily(
                "tokendance_bytes", "Bytes of keys and values.", labels=[*labels, "kind"]
            ),
            "evictions": CounterMetricFamily(
                "tokendance_evictions", "Masters dropped to make room.", labels=labels
            ),
            "folded": CounterMetricFamily(
                "tokendance_folded",
                "Masters that have become own rows of their one user.",
                labels=labels,
            ),
            "tier_agents": GaugeMetricFamily(
                "tokendance_tier_agents", "Mirrors in a tier.", labels=[*labels, "tier"]
            ),
            "tier_bytes": GaugeMetricFamily(
                "tokendance_tier_bytes", "Bytes in use in a tier.", labels=[*labels, "tier"]
            ),
            "tier_demotions": CounterMetricFamily(
                "tokendance_tier_demotions",
                "Mirrors and Masters that have left a tier for a lower one.",
                labels=[*labels, "tier"],
            ),
        }

    def _add(self, families: dict[str, Metric], of: dict[str, str], stats: StoreStats) -> None:
        for name in ("agents", "masters"):
            families[name].add_sample(f"tokendance_{name}", of, getattr(stats, name))
        families["evictions"].add_sample("tokendance_evictions_total", of, stats.evictions)
        families["folded"].add_sample("tokendance_folded_total", of, stats.folded)
        for family, label, kinds in (
            ("pages", "state", _PAGES),
            ("rows", "kind", _ROWS),
            ("bytes", "kind", _BYTES),
        ):
            for kind in kinds:
                value = getattr(stats, f"{kind}_{family}")
                families[family].add_sample(f"tokendance_{family}", {**of, label: kind}, value)
        for name, tier in stats.tiers.items():
            mine = {**of, "tier": name}
            families["tier_agents"].add_sample("tokendance_tier_agents", mine, tier.agents)
            families["tier_bytes"].add_sample("tokendance_tier_bytes", mine, tier.used_bytes)
            families["tier_demotions"].add_sample(
                "tokendance_tier_demotions_total", mine, tier.demoted
            )
