"""Numbers for Prometheus. Names are llama-server's where they mean the same; labels are ids of keys, never texts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .single import Applied

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One gateway's.

    Attributes:
        registry: of all of them.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.prompt = Counter("llamacpp:prompt_tokens", "Prompt tokens of answered requests", registry=registry)
        self.predicted = Counter("llamacpp:tokens_predicted", "Tokens generated, hidden ones too", registry=registry)
        self.processing = Gauge("llamacpp:requests_processing", "Answers being generated", registry=registry)
        self.deferred = Gauge("llamacpp:requests_deferred", "Answers waiting for a slot", registry=registry)
        self.requests = Counter(
            "adlocal:requests", "Requests by route, status and key", ["route", "status", "key"], registry=registry
        )
        self.refusals = Counter("adlocal:refusals", "Requests refused, by type", ["type"], registry=registry)
        self.rows = Counter("adlocal:rows", "Rows that were sampled from", registry=registry)
        self.choices = Counter("adlocal:choices", "Of these, rows with a choice", registry=registry)
        self.evaluated = Counter("adlocal:evaluated", "Of these, those evaluated by the proxies", registry=registry)
        self.closed = Counter("adlocal:closed", "Rows whose protection could not be computed", registry=registry)
        self.kl = Counter("adlocal:kl_nats", "KL to the teacher, summed over rows", registry=registry)
        self.dose = Gauge("adlocal:dose_nats", "Dose, summed over tokens; may fall", registry=registry)
        self.strength = Histogram(
            "adlocal:strength", "Strength of answers, nats", buckets=(0, 0.5, 1, 2, 3, 5, 10, 20), registry=registry
        )
        self.queued = Histogram("adlocal:queue_seconds", "Waiting for a slot", buckets=_SECONDS, registry=registry)
        self.seconds = Histogram("adlocal:answer_seconds", "From slot to end", buckets=_SECONDS, registry=registry)
        self.starts = Counter("adlocal:engine_starts", "Starts of the engine", registry=registry)
        self.score = Scores()
        registry.register(self.score)

    def applied(self, found: Applied) -> None:
        """Counts an answer, whole or broken off."""
        self.prompt.inc(found.n_prompt)
        self.predicted.inc(found.n_tokens)
        counters = found.counters
        for metric, value in (
            (self.rows, counters.n_rows),
            (self.choices, counters.n_choices),
            (self.evaluated, counters.n_evaluated),
            (self.closed, counters.n_closed),
        ):
            metric.inc(value)
        self.kl.inc(max(0.0, counters.kl))
        self.dose.inc(counters.dose)
        self.strength.observe(found.settings.strength)
        self.queued.observe(found.queued)
        self.seconds.observe(found.seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus's format."""
        return generate_latest(self.registry)


class Scores(Collector):
    """The watch's scores by subject, as they stand when somebody asks.

    Attributes:
        found: by subject.
    """

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def collect(self) -> list[Metric]:
        """In Prometheus's terms."""
        family = GaugeMetricFamily("adlocal:watch_score", "Of the extraction watch, 0 to 1", labels=["subject"])
        for subject, score in self.found.items():
            family.add_metric([subject], score)
        return [family]
