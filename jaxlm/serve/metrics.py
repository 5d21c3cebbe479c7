"""What Prometheus reads: requests, tokens, the queue, times."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_GAUGES = {
    "running": "Texts that are being written",
    "waiting": "Texts that wait for a slot",
    "slots": "Texts that can be written at a time",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts", "reused_tokens": "Of those: found computed", "new_tokens": "Tokens written",
    "requests": "Texts taken on",
}  # fmt: skip


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, stats: Callable[[], Any] | None = None):
        """`stats` tells those of the engine, read when they are asked for."""
        self._registry = CollectorRegistry()
        self.requests = Counter("jaxlm_http_requests", "Answers by route and status", ["route", "status"], registry=self._registry)
        self.seconds = Histogram(
            "jaxlm_http_request_seconds", "Seconds from a request to the end of its answer", ["route"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "jaxlm_time_to_first_token_seconds", "Seconds from a request to a text's first token", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.next_token = Histogram(
            "jaxlm_time_per_token_seconds", "Seconds between two tokens of a text", buckets=_TOKEN, registry=self._registry
        )
        self.rows = Counter("jaxlm_rows", "Texts embedded or classified", ["route"], registry=self._registry)
        if stats is not None:
            self._registry.register(_Engine(stats))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine:
    """The engine's own figures."""

    def __init__(self, stats: Callable[[], Any]):
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        stats = self._stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"jaxlm_engine_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"jaxlm_engine_{name}", text, value=getattr(stats, name))

    def describe(self) -> list[Any]:
        return []
