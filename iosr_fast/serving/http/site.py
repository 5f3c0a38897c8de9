"""What a server serves: classifiers by their names, one or many, and what they share."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from iosr_fast.encoders.rows import Rows
from iosr_fast.serving.fairness import Shares
from iosr_fast.serving.http import schemas
from iosr_fast.serving.http.errors import ApiError, busy
from iosr_fast.serving.http.logs import log
from iosr_fast.serving.http.metrics import ClassifierMetrics, EngineMetrics, Metrics
from iosr_fast.serving.http.recent import Recent
from iosr_fast.serving.http.row_uploads import RowUploads
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.http.uploads import Uploads
from iosr_fast.serving.limits import Limits
from iosr_fast.utils.text import did_you_mean

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.head.head import Head
    from iosr_fast.serving.batching import BatchingClassifier
    from iosr_fast.serving.collector import Collector

Answer = TypeVar("Answer")


class Site:
    """State of one server: its settings, metrics, classifiers (`served`, by name) and the request bodies in memory.

    A single classifier has the name "" in logs and metrics; a path may also name it by its folder. `refused` says why
    others of several are not served. /readyz fails while `loading` or `draining`. For one event loop.
    """

    def __init__(self, settings: Settings, folders: Mapping[str, Path]) -> None:
        self.settings, self.folders = settings, folders
        self.alone = "" in folders
        self.only = folders[""].absolute().name if self.alone else ""
        self.metrics = Metrics(several=not self.alone)
        self.server_metrics = ClassifierMetrics(self.metrics)  # of requests that concern no classifier of several
        self.bodies = Shares(Limits.bodies * settings.max_body_bytes)
        self.loading = self.draining = False
        self.served: dict[str, ServedEncoder] = {}  # classifiers, or one encoder alone
        self.refused: dict[str, str] = {}

    def find(self, name: str) -> ServedEncoder:
        """The classifier of this name; "" is the only one. Raises ApiError."""
        if self.alone and name in ("", self.only):
            return self.served[""]
        if name in self.refused:
            raise ApiError(503, "not_served", f"the classifier {name!r} can't be served: {self.refused[name]}")
        if name in self.served:
            return self.served[name]
        close = did_you_mean(name[:80], [self.only] if self.alone else [*self.served, *self.refused])
        message = f"no classifier is named {name[:80]!r}; {close}/v1/classifiers lists all classifiers"
        raise ApiError(404, "no_classifier", message)

    @contextmanager
    def refusing(self, *names: str) -> Iterator[None]:
        """An error in the block is why these classifiers are `refused`, in words for clients, without the place of
        files; that of a single one is raised."""
        try:
            yield
        except Exception as error:
            if self.alone:
                raise
            why = str(error)
            for place in filter(None, [self.settings.log, self.settings.collect, *map(self.folders.get, names)]):
                why = why.replace(f"{place.parent}{os.sep}", "")
            self.refused.update(dict.fromkeys(names, why))

    @property
    def engines(self) -> list[ServedEncoder]:
        """Of each BatchingClassifier the first one that it serves, whose name its metrics have."""
        return [one for one in self.served.values() if one.is_first]

    @property
    def classifiers(self) -> list[ServedClassifier]:
        """Those that have a classifier."""
        return [one for one in self.served.values() if isinstance(one, ServedClassifier)]

    @property
    def described(self) -> ServedEncoder:
        """The one that OpenAPI describes: the first that takes images, if any does."""
        return max(self.served.values(), key=lambda one: one.takes_changes)

    @property
    def note(self) -> str:
        """What is wrong, for a server that is ready."""
        if self.alone:
            return self.served[""].note
        wrong = self.refused | {name: one.failure or one.note for name, one in self.served.items()}
        return "; ".join(f"{name}: {why}" for name, why in wrong.items() if why)

    def listed(self) -> list[schemas.Listed]:
        """All classifiers, by name."""
        listed = [schemas.Listed(name, error) for name, error in self.refused.items()]
        for one in self.classifiers:
            head, source = one.head, one.classifier.encoder.source
            model = None if source is None else source.manifest["model"]
            facts = len(head.uids), head.version, model, head.config.method
            listed.append(schemas.Listed(one.name or self.only, one.failure or None, *facts))
        return sorted(listed, key=lambda one: one.name)


class ServedEncoder:
    """An encoder of a `site`, which embeds; `batching` is closed by the caller."""

    takes_changes = False

    def __init__(
        self,
        site: Site,
        name: str,
        settings: Settings,
        batching: BatchingClassifier,
        engine_metrics: EngineMetrics,
        metrics: ClassifierMetrics,
    ) -> None:
        self.site, self.name, self.settings, self.metrics = site, name, settings, metrics
        self.batching, self.engine_metrics = batching, engine_metrics
        self.uploads = Uploads(settings, batching.encoder.geometry)
        if self.is_first:
            engine_metrics.watch(self)

    @property
    def is_first(self) -> bool:
        """Whether its name is that of its engine, in metrics."""
        return self.name == next(iter(self.batching.classifiers), "")

    @property
    def model(self) -> str:
        """The name of the encoder's model."""
        source = self.batching.encoder.source
        return self.site.only if source is None else str(source.manifest["model"])

    @property
    def models(self) -> set[str]:
        """What clients may call the model."""
        return {self.model, self.name or self.site.only}

    @property
    def sentence(self) -> str:
        """The text that / answers where there is no page; "" where there is one."""
        return "POST images as data URLs to /v1/embeddings; /openapi.json describes it."

    @property
    def facts(self) -> dict[str, Any]:
        """What the log says of it when it is loaded."""
        return {"model": self.model}

    @property
    def doubts(self) -> Sequence[str]:
        """What speaks against its promises."""
        return ()

    @property
    def note(self) -> str:
        """What is wrong with an encoder that answers: decoders are not confined."""
        return self.batching.decoders_warning

    @property
    def failure(self) -> str:
        """Why no image can be answered; "" if it can."""
        error = self.batching.failures.get(self.name) if self.batching.healthy else self.batching.last_error
        return "" if error is None else str(error) or repr(error)


class ServedClassifier(ServedEncoder):
    """A classifier of a site: what answers for it, collects for it and changes it.

    The caller closes `collector`, too; `close` closes the log of the classifier.
    """

    def __init__(self, *parts: Any, collector: Collector | None = None) -> None:
        super().__init__(*parts)
        self.collector, self.recent = collector, Recent(self.classifier)
        encoder = self.classifier.encoder
        self.takes_changes = not isinstance(encoder, Rows)
        if isinstance(encoder, Rows):
            self.uploads = RowUploads(self.settings, encoder)
        # A single thread, so that no other change comes between the checks of a change and the change itself.
        self._changes = ThreadPoolExecutor(1, "iosr-fast-changes")
        self.unfinished: set[Future[Any]] = set()  # the running change, and those that wait
        self._asking = asyncio.Lock()  # of `serve_unknown`
        self.metrics.watch(self)

    @property
    def classifier(self) -> Classifier:
        """What answers, and what changes act on."""
        return self.batching.classifiers[self.name]

    @property
    def head(self) -> Head:
        """The newest one."""
        return self.classifier.snapshot()

    @property
    def note(self) -> str:
        """What is wrong with a classifier that answers: it takes no changes until its log can be written, or decoders
        are not confined."""
        if failure := self.classifier.log_failure:
            return f"read-only: the last change could not be logged ({failure}); the next one tries again"
        return super().note

    @property
    def sentence(self) -> str:
        return self.uploads.sentence

    @property
    def facts(self) -> dict[str, Any]:
        one = self.classifier
        return {"classes": len(one.classes_), "model_version": one.version, "method": one.method_}

    @property
    def doubts(self) -> Sequence[str]:
        return self.head.doubts

    async def serve_unknown(self) -> None:
        """Compute what `keep` rests on, for whoever asks for it first; from then on changes do."""
        async with self._asking:
            if self.head.computed("unknown") is None:
                await self.change(lambda classifier: classifier.snapshot().with_unknown())

    async def change(self, act: Callable[[Classifier], Answer]) -> Answer:
        """Run `act` in the thread of changes, one at a time; 503 if too many changes wait."""
        if (waiting := len(self.unfinished)) >= Limits.changes:
            raise busy("busy", f"{waiting} changes are waiting already; try again", 5)
        change = self._changes.submit(self._act, act)
        self.unfinished.add(change)
        change.add_done_callback(self.unfinished.discard)
        return await asyncio.wrap_future(change)

    def _act(self, act: Callable[[Classifier], Answer]) -> Answer:
        answer = act(self.classifier)
        head = self.head
        self.metrics.drop_removed(head.name_of, head.node_names[len(head.uids) :])
        return answer

    def close(self, timeout: float | None = None) -> bool:
        """Drop the waiting changes, wait for the running one, at most `timeout` seconds (None: no limit), and close the
        log. Returns whether it has ended; if not, the log stays open. The process may end then: a change is logged
        whole or not at all."""
        self._changes.shutdown(wait=False, cancel_futures=True)
        ended = not wait(self.unfinished, timeout).not_done
        if ended:
            self.classifier.close_log()
        else:
            log("change_abandoned", level=logging.WARNING, classifier=self.name)
        return ended
