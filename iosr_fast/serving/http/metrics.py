"""Metrics for Prometheus. Each application has its own registry, so a process can have several applications."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import Metric

from iosr_fast.head.predictions import ClassScore, Prediction
from iosr_fast.serving.fairness import Shares

_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MAX_CLASSES = 10_000  # with their own series; more would slow down every scrape
_OTHERS = "", "all others"
_OF_ENGINE = re.compile("iosr_fast_(image_seconds|batch|encode|score|refusals|queue|healthy)")
_OF_SERVER = re.compile("process_|iosr_fast_body")
_METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"})


class Metrics:
    """Counters and histograms named iosr_fast_*, and those of the process (memory, CPU time, files).

    Clients can't create labels: routes are templates, codes and outcomes are few, and `drop_removed` removes the series
    of removed classes. This is also the Observer of a BatchingClassifier, which calls it from several threads.
    """

    def __init__(self) -> None:
        self.last_answer = time.monotonic()  # when an image was last classified
        self._registry = CollectorRegistry()
        self._options: dict[str, Any] = {"namespace": "iosr_fast", "registry": self._registry}
        ProcessCollector(registry=self._registry)
        counter: Any = partial(Counter, **self._options)
        histogram: Any = partial(Histogram, **{"buckets": _SECONDS, **self._options})
        self._requests = histogram(
            "request_seconds", "Time from a request's headers to its answer", ("route", "method", "status")
        )
        self._images = histogram("image_seconds", "Time from an image's acceptance to its label", ("outcome",))
        self._batches = histogram("batch_images", "Images per batch", buckets=_IMAGES)
        self._encode = histogram("encode_seconds", "Time to encode a batch")
        self._score = histogram("score_seconds", "Time to score a batch")
        self._errors = counter("errors", "Errors in answers, of requests and of their images", ("code",))
        self._refusals = counter("refusals", "Images refused before queueing", ("reason",))
        self._predictions = counter("predictions", "Labels of images by class or node", ("class_id", "name"))
        self._unknown = counter("unknown", "Images without a label, because they belong to none of the classes")
        self._uploads = counter("uploads", "Uploads that need a look, with --collect", ("outcome",))
        self._series: set[tuple[str, str]] = set()

    def watch(self, service: Any) -> None:
        """Read the state of a service.Service at each scrape: queue, bodies, version, classes."""
        from iosr_fast import __version__

        def gauge(name: str, description: str, read: Any) -> None:
            Gauge(name, description, **self._options).set_function(read)

        gauge("queue_images", "Images accepted and not yet answered", lambda: service.batching.pending)
        gauge("queue_limit_images", "Limit of iosr_fast_queue_images", lambda: service.settings.max_queue)
        self.watch_bodies(service.bodies)
        gauge("healthy", "1 while the engine works", lambda: float(service.batching.healthy))
        gauge("model_version", "Version of the classes; each change increases it", lambda: service.classifier.version)
        gauge("classes", "Classes", lambda: len(service.classifier.snapshot().uids))
        gauge("read_only", "1 while changes can't be logged", lambda: float(bool(service.note)))
        recent = service.recent
        gauge("accepted_share", "Accepted labels, of the last 400 that a promise judged", lambda: recent.accepted_share)
        gauge("median_probability", "Of the last 400 labels", lambda: recent.median_probability)
        gauge("strange_share", "Of the last 400 pictures, with --max-error", lambda: recent.strangers.share)
        gauge("strangers", "1 while pictures are stranger than the examples", lambda: float(recent.strangers.noted))
        if service.collector is not None and service.collector.checks is not None:
            checks = service.collector.checks
            gauge("checks", "Accepted labels that were checked", lambda: checks.result.checks)
            gauge("checks_wrong", "Wrong ones of iosr_fast_checks", lambda: checks.result.wrong)
            gauge("checks_e_value", "Evidence against the promise; refuted at 20", lambda: checks.result.e_value)
            gauge("promise_refuted", "1 if more labels are wrong than promised", lambda: float(checks.result.refuted))
            gauge("labels_beside", "Labels of pictures that are no random sample", lambda: checks.beside)
        labels = {"version": __version__, "method": service.classifier.method_}
        labels["encoder"] = service.classifier.encoder.fingerprint[:12]
        Gauge("info", "Version, method, encoder", tuple(labels), **self._options).labels(**labels).set(1)

    def watch_bodies(self, bodies: Shares) -> None:
        made = Gauge("body_bytes", "Bytes of request bodies in memory", **self._options)
        made.set_function(lambda: bodies.used)

    # --- called by BatchingClassifier ---

    def on_batch(self, size: int, encode_s: float, score_s: float) -> None:
        self._batches.observe(size)
        self._encode.observe(encode_s)
        self._score.observe(score_s)

    def on_done(self, latency_s: float, outcome: str, label: str | None) -> None:
        self._images.labels(outcome).observe(latency_s)
        if outcome == "ok":
            self.last_answer = time.monotonic()

    def on_refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def on_upload(self, outcome: str) -> None:
        self._uploads.labels(outcome).inc()

    # --- called by the server ---

    def on_request(self, route: str, method: str, status: int, seconds: float, code: str | None) -> None:
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).observe(seconds)
        if code is not None:
            self.on_error(code)

    def on_error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def on_prediction(self, *labels: Prediction | ClassScore) -> None:
        """An image has these labels: one, or where pictures may have several any number; none is rejected."""
        if not labels:
            self._unknown.inc()
        for one in labels:
            key = (one.class_id or "", str(one.label))  # a node has no id
            if key not in self._series and len(self._series) >= _MAX_CLASSES:
                key = _OTHERS
            self._series.add(key)
            self._predictions.labels(*key).inc()

    def drop_removed(self, name_of: Callable[[str], str | None], nodes: Collection[str] = ()) -> None:
        """Remove the series of classes that were removed or renamed, whose id has another name by `name_of`, and of
        nodes that are gone."""
        series = self._series - {_OTHERS}
        removed = {key for key in series if (name_of(key[0]) != key[1] if key[0] else key[1] not in nodes)}
        for key in removed:
            self._predictions.remove(*key)
        self._series -= removed

    def text(self, classifiers: Mapping[str, Metrics] | None = None, engines: Collection[str] = ("",)) -> bytes:
        """All metrics in Prometheus's text format, with those of several classifiers, whose series have the label
        `classifier`. What an engine counts is in the metrics of one of them, of `engines`, and has the label `engine`.
        """
        families: dict[str, Metric] = {}
        for name, one in {"": self, **(classifiers or {})}.items():
            for family in one._registry.collect():
                of_engine = _OF_ENGINE.match(family.name)
                if name not in engines if of_engine else name and _OF_SERVER.match(family.name):
                    continue
                label = {("engine" if of_engine else "classifier"): name} if name else {}
                whole = Metric(family.name, family.documentation, family.type)
                samples = [sample._replace(labels=sample.labels | label) for sample in family.samples]
                families.setdefault(family.name, whole).samples.extend(samples)
        return generate_latest(SimpleNamespace(collect=families.values))
