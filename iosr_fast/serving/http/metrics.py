"""Metrics for Prometheus. Each server has its own registry, so a process can have several servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from iosr_fast.head.predictions import ClassScore, Prediction
from iosr_fast.serving.limits import Limits

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_OTHERS = "", "all others"
_METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"})


class Metrics:
    """Counters and histograms named iosr_fast_*, and those of the process (memory, CPU time, files).

    Of `several` classifiers, a series of one has the label `classifier`, and what batches count the label `engine`, the
    name of the first classifier that has the engine. Clients can't create labels: routes are templates, codes and
    outcomes are few, and `drop_removed` removes the series of removed classes.
    """

    def __init__(self, several: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._several, self._gauges = several, dict[str, Any]()
        one, engine = (("classifier",), ("engine",)) if several else ((), ())
        options: dict[str, Any] = {"namespace": "iosr_fast", "registry": self._registry}
        counter: Any = partial(Counter, **options)
        histogram: Any = partial(Histogram, **{"buckets": _SECONDS, **options})
        self._options = options
        ProcessCollector(registry=self._registry)
        self.requests = histogram(
            "request_seconds", "Time from a request's headers to its answer", ("route", "method", "status", *one)
        )
        self.images = histogram("image_seconds", "Time from an image's acceptance to its label", ("outcome", *engine))
        self.batches = histogram("batch_images", "Images per batch", engine, buckets=_IMAGES)
        self.encode = histogram("encode_seconds", "Time to encode a batch", engine)
        self.score = histogram("score_seconds", "Time to score a batch", engine)
        self.errors = counter("errors", "Errors in answers, of requests and of their images", ("code", *one))
        self.refusals = counter("refusals", "Images refused before queueing", ("reason", *engine))
        self.predictions = counter("predictions", "Labels of images by class or node", ("class_id", "name", *one))
        self.unknown = counter("unknown", "Images without a label, because they belong to none of the classes", one)
        self.uploads = counter("uploads", "Uploads that need a look, with --collect", ("outcome", *one))

    def labels(self, name: str) -> tuple[str, ...]:
        """The label that the series of a classifier or an engine have beside those of their own."""
        return (name,) if self._several else ()

    def gauge(self, name: str, description: str, read: Callable[[], float], **labels: str) -> None:
        """A gauge that calls `read` at each scrape."""
        made = self._gauges.get(name) or Gauge(name, description, tuple(labels), **self._options)
        self._gauges[name] = made
        (made.labels(**labels) if labels else made).set_function(read)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class EngineMetrics:
    """The Observer of a BatchingClassifier, which calls it from several threads."""

    def __init__(self, metrics: Metrics, name: str = "") -> None:
        self.last_answer = time.monotonic()  # when an image was last classified
        self._metrics, self._labels = metrics, metrics.labels(name)
        self._batches, self._encode, self._score = (
            _child(family, self._labels) for family in (metrics.batches, metrics.encode, metrics.score)
        )

    def on_batch(self, size: int, encode_s: float, score_s: float) -> None:
        self._batches.observe(size)
        self._encode.observe(encode_s)
        self._score.observe(score_s)

    def on_done(self, latency_s: float, outcome: str, label: str | None) -> None:
        self._metrics.images.labels(outcome, *self._labels).observe(latency_s)
        if outcome == "ok":
            self.last_answer = time.monotonic()

    def on_refused(self, reason: str) -> None:
        self._metrics.refusals.labels(reason, *self._labels).inc()

    def watch(self, served: Any) -> None:
        """Read the state of a site.ServedEncoder at each scrape: queue, bodies."""
        site, batching, limit = served.site, served.batching, served.site.settings.max_queue
        gauge: Any = partial(self._metrics.gauge, **({} if site.alone else {"engine": served.name}))
        gauge("queue_images", "Images accepted and not yet answered", lambda: batching.pending)
        gauge("queue_limit_images", "Limit of iosr_fast_queue_images", lambda: limit)
        self._metrics.gauge("body_bytes", "Bytes of request bodies in memory", lambda: site.bodies.used)
        gauge("healthy", "1 while the engine works", lambda: float(batching.healthy))


class ClassifierMetrics:
    """What is counted of one classifier; with the name "" of several, of requests to none of them."""

    def __init__(self, metrics: Metrics, name: str = "") -> None:
        self._metrics, self._labels = metrics, metrics.labels(name)
        self._series: set[tuple[str, str]] = set()

    def watch(self, served: Any) -> None:
        """Read the state of a site.ServedClassifier at each scrape: version, classes, recent answers, checks."""
        from iosr_fast import __version__

        recent = served.recent
        gauge: Any = partial(self._metrics.gauge, **({} if served.site.alone else {"classifier": served.name}))
        gauge("model_version", "Version of the classes; each change increases it", lambda: served.classifier.version)
        gauge("classes", "Classes", lambda: len(served.head.uids))
        gauge("read_only", "1 while changes can't be logged", lambda: float(bool(served.classifier.log_failure)))
        gauge("accepted_share", "Accepted labels, of the last 400 that a promise judged", lambda: recent.accepted_share)
        gauge("median_probability", "Of the last 400 labels", lambda: recent.median_probability)
        gauge("strange_share", "Of the last 400 pictures, with --max-error", lambda: recent.strangers.share)
        gauge("strangers", "1 while pictures are stranger than the examples", lambda: float(recent.strangers.noted))
        if served.collector is not None and served.collector.checks is not None:
            checks = served.collector.checks
            gauge("checks", "Accepted labels that were checked", lambda: checks.result.checks)
            gauge("checks_wrong", "Wrong ones of iosr_fast_checks", lambda: checks.result.wrong)
            gauge("checks_e_value", "Evidence against the promise; refuted at 20", lambda: checks.result.e_value)
            gauge("promise_refuted", "1 if more labels are wrong than promised", lambda: float(checks.result.refuted))
            gauge("labels_beside", "Labels of pictures that are no random sample", lambda: checks.beside)
        facts = {"version": __version__, "method": served.classifier.method_}
        facts["encoder"] = served.classifier.encoder.fingerprint[:12]
        gauge("info", "Version, method, encoder", lambda: 1.0, **facts)

    def on_request(self, route: str, method: str, status: int, seconds: float, code: str | None) -> None:
        labels = route, method if method in _METHODS else "other", str(status)
        self._metrics.requests.labels(*labels, *self._labels).observe(seconds)
        if code is not None:
            self.on_error(code)

    def on_error(self, code: str) -> None:
        self._metrics.errors.labels(code, *self._labels).inc()

    def on_upload(self, outcome: str) -> None:
        self._metrics.uploads.labels(outcome, *self._labels).inc()

    def on_prediction(self, *labels: Prediction | ClassScore) -> None:
        """An image has these labels: one, or where pictures may have several any number; none is rejected."""
        if not labels:
            _child(self._metrics.unknown, self._labels).inc()
        for one in labels:
            key = (one.class_id or "", str(one.label))  # a node has no id
            if key not in self._series and len(self._series) >= Limits.series:
                key = _OTHERS
            self._series.add(key)
            self._metrics.predictions.labels(*key, *self._labels).inc()

    def drop_removed(self, name_of: Callable[[str], str | None], nodes: Collection[str] = ()) -> None:
        """Remove the series of classes that were removed or renamed, whose id has another name by `name_of`, and of
        nodes that are gone."""
        series = self._series - {_OTHERS}
        removed = {key for key in series if (name_of(key[0]) != key[1] if key[0] else key[1] not in nodes)}
        for key in removed:
            self._metrics.predictions.remove(*key, *self._labels)
        self._series -= removed


def _child(family: Any, labels: tuple[str, ...]) -> Any:
    """The series of a family with these labels; prometheus_client has no children without labels."""
    return family.labels(*labels) if labels else family
