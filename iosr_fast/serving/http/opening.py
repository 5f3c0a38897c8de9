"""From saved folders to what answers: classifiers are opened, together where they can share an encoder, and started."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from iosr_fast.encoders.engine_folder import ENGINE_KIND
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.verdict import Abstention
from iosr_fast.sealed.files import open_regular
from iosr_fast.sealed.manifest import MANIFEST
from iosr_fast.serving.collector import Collector
from iosr_fast.serving.http.app import make_batching
from iosr_fast.serving.http.logs import CLASSIFIER
from iosr_fast.serving.http.metrics import Metrics
from iosr_fast.serving.http.service import Front, Service
from iosr_fast.serving.http.settings import NAME, Settings
from iosr_fast.store.bundle import Bundle, kind_of, load
from iosr_fast.utils.machine import split_cores, usable_threads

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier


def named_folders(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The folders to serve by their names; of one classifier the name is "". A folder that is none, with classifiers
    in it, stands for these. Raises IosrFastError for names that no path can have, or of two."""
    folders = [folder for path in map(Path, paths) for folder in _inside(path) or [path]]
    if len(paths) == 1 and folders == [Path(paths[0])]:
        return {"": folders[0]}
    folders = [Path(os.path.abspath(folder)) for folder in folders]  # "." has a name, too
    names = [folder.name for folder in folders]
    for name, count in Counter(names).items():
        if count > 1 or not NAME.fullmatch(name):
            got = f"{name!r} of {count} folders" if count > 1 else repr(name)
            expected = "folders with different names of letters, digits, '.', '_' and '-', which name the classifiers"
            raise IosrFastError(f"expected {expected}, got {got}; rename it")
    return dict(zip(names, folders, strict=True))


def _inside(path: Path) -> list[Path]:
    """The classifiers in a folder; none where the folder is one. What a writer has not finished is hidden."""
    if (path / MANIFEST).exists():
        return []
    found = sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))
    return [one for one in found if not one.name.startswith(".") and kind_of(one) != ENGINE_KIND]


class Opening:
    """Opens the classifiers in `folders` and starts what answers for them.

    An error is why one of several is `refused`, in words for clients, without the place of its files; that of a single
    one, with the name "", is raised.
    """

    def __init__(self, folders: Mapping[str, Path], settings: Settings) -> None:
        self.folders, self.settings, self.refused = folders, settings, dict[str, str]()
        self._own: dict[str, Settings] = {}  # by the names of the classifiers
        if "" not in folders:
            settings.check_several()

    @contextmanager
    def _alone(self, names: Collection[str]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if "" in names:
                raise
            why = str(error)
            for place in filter(None, [self.settings.log, self.settings.collect, *map(self.folders.get, names)]):
                why = why.replace(f"{place.parent}{os.sep}", "")
            self.refused.update(dict.fromkeys(names, why))

    def open(self, cores: int | None = None) -> list[dict[str, Classifier]]:
        """Classifiers on so many cores; None: all. Those in one mapping share an encoder, which is opened once.

        On a CPU the encoder has about as many runs as threads. Each run has batches of its own, so a core that a
        decoder or a request takes delays one run. One run on all cores would wait at every layer for the core that is
        taken. One thread a run would be slow for a lone image, so there are two or more on four cores.
        """
        from iosr_fast.classifier import open_together

        cores = cores or usable_threads()
        root = math.ceil(math.sqrt(cores))
        runs, threads = split_cores(cores, root, min(2 * root - 1, cores // 2 if cores > 3 else cores))
        groups: dict[object, dict[str, Bundle]] = {}
        for name, folder in self.folders.items():
            with self._alone([name]):
                saved = load(folder, True, threads, self.settings.expected_digest)
                self._own[name] = self.settings.of(name, saved.estimator is not None)
                groups.setdefault(saved.shares, {})[name] = saved
        opened = []
        for group in groups.values():
            with self._alone(group):
                runtime = self._own[next(iter(group))].runtime
                classifiers = open_together([*group.values()], runtime, threads, runs)
                opened.append(dict(zip(group, classifiers, strict=True)))
        return opened

    def start(self, groups: Sequence[Mapping[str, Classifier]], closing: ExitStack) -> Service | Front:
        """What answers for opened classifiers, until `closing`. Raises IosrFastError if all are refused."""
        front = None if "" in self.folders else Front(self.settings, Metrics(), self.refused)
        services: list[Service] = []
        for group in groups:
            with self._alone(group):
                services += self._start(group, front, closing)
        if not services:
            raise IosrFastError("; ".join(f"{name} can't be served: {why}" for name, why in self.refused.items()))
        return front or services[0]

    def _start(self, group: Mapping[str, Classifier], front: Front | None, closing: ExitStack) -> list[Service]:
        """The services of classifiers that share an encoder."""
        metrics = {name: Metrics() for name in group}
        collectors: dict[str, Collector | None] = {}
        for name, classifier in group.items():
            CLASSIFIER.set(name)
            with self._alone([name]):
                collectors[name] = self._prepare(name, classifier, metrics[name], closing)
        CLASSIFIER.set("")
        ready = {name: group[name] for name in collectors}
        if not ready:
            return []
        collect = {name: one.offer for name, one in collectors.items() if one is not None}
        batching = make_batching(ready, self.settings, observer=metrics[next(iter(ready))], collect=collect)
        closing.callback(batching.close, self.settings.grace_s)
        services = [Service(batching, self._own[name], metrics[name], collectors[name], name, front) for name in ready]
        for service in services:
            closing.callback(service.close, 0.0)  # a change that still runs had `grace_s` seconds, as its request had
        return services

    def _prepare(self, name: str, classifier: Classifier, metrics: Metrics, closing: ExitStack) -> Collector | None:
        """Check the promise, make logged changes again, and open what collects."""
        own = self._own[name]
        head = classifier.snapshot()
        Abstention(max_error=own.max_error).check(head)
        if own.log is not None:
            classifier.open_log(own.log)
        if own.collect is None or own.max_error is None:
            return None
        with open(self.folders[name] / MANIFEST, "rb", opener=open_regular) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        options = own.collect_limit, own.max_error, metrics.on_upload, own.check_share, digest, head.is_multi_label
        collector = Collector(own.collect, *options)
        closing.callback(collector.close)
        return collector


def open_served(folder: str | Path, settings: Settings, cores: int | None = None) -> Classifier:
    """What is served of a folder, on so many cores; None: all. Raises IosrFastError for what can't be."""
    return Opening({"": Path(folder)}, settings).open(cores)[0][""]
