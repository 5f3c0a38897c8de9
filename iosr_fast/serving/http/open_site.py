"""From saved folders to a Site: classifiers are opened, together where they can share an encoder, and started."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.engine_folder import ENGINE_KIND, check_engine
from iosr_fast.encoders.rows import Rows
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.verdict import Abstention
from iosr_fast.sealed.files import open_regular
from iosr_fast.sealed.manifest import MANIFEST
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.batching.classifiers import EncoderAlone
from iosr_fast.serving.collector import Collector
from iosr_fast.serving.http.logs import CLASSIFIER
from iosr_fast.serving.http.metrics import ClassifierMetrics, EngineMetrics
from iosr_fast.serving.http.settings import NAME, Settings
from iosr_fast.serving.http.site import ServedClassifier, ServedEncoder, Site
from iosr_fast.store.bundle import Bundle, kind_of, load
from iosr_fast.utils.machine import split_cores, usable_threads

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

_CPU_BATCH = 8


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


@contextmanager
def open_site(folders: Mapping[str, Path], settings: Settings, cores: int | None = None) -> Iterator[Site]:
    """A Site of the classifiers in `folders`, by name, or of one engine, on so many cores (None: all), until the block
    ends.

    Raises the error of a single classifier that can't be opened (its name is ""), and IosrFastError where none of
    several can; others are `refused`.
    """
    if "" not in folders:
        settings.check_several()
    site = Site(settings, folders)
    with ExitStack() as closing:
        if site.alone and kind_of(folders[""]) == ENGINE_KIND:
            _start_encoder(site, closing, cores)
        else:
            for group in open_classifiers(site, cores):
                with site.refusing(*group):
                    _start(site, group, closing)
        if not site.served:
            raise IosrFastError("; ".join(f"{name} can't be served: {why}" for name, why in site.refused.items()))
        yield site


def open_classifiers(site: Site, cores: int | None = None) -> list[dict[str, Classifier]]:
    """The classifiers of a site, on so many cores; None: all. Those in one mapping share an encoder, which is opened
    once.
    """
    from iosr_fast.classifier import open_together

    runs, threads = _runs(cores)
    groups: dict[object, dict[str, Bundle]] = {}
    for name, folder in site.folders.items():
        with site.refusing(name):
            saved = load(folder, True, threads, site.settings.expected_digest)
            site.settings.of(name, saved.estimator is not None)  # raises for what it can't have
            groups.setdefault(saved.shares, {})[name] = saved
    opened = []
    for group in groups.values():
        with site.refusing(*group):
            first, saved = next(iter(group.items()))
            runtime = site.settings.of(first, saved.estimator is not None).runtime
            classifiers = open_together([*group.values()], runtime, threads, runs)
            opened.append(dict(zip(group, classifiers, strict=True)))
    return opened


def _runs(cores: int | None) -> tuple[int, int]:
    """Runs of an encoder at a time, and threads of each.

    On a CPU there are about as many runs as threads. Each run has batches of its own, so a core that a decoder or a
    request takes delays one run. One run on all cores would wait at every layer for the core that is taken. One thread
    a run would be slow for a lone image, so there are two or more on four cores.
    """
    cores = cores or usable_threads()
    root = math.ceil(math.sqrt(cores))
    return split_cores(cores, root, min(2 * root - 1, cores // 2 if cores > 3 else cores))


def _start_encoder(site: Site, closing: ExitStack, cores: int | None) -> None:
    """Serve the only folder, an engine, which embeds."""
    from iosr_fast.encoders.runtimes import open_engine

    settings = site.settings
    if [settings.log, settings.collect, settings.max_error] != [None] * 3:
        raise IosrFastError("an engine has no classes: leave out --log, --collect and --max-error")
    folder = open_verified(site.folders[""], ENGINE_KIND, True, settings.expected_digest)
    check_engine(folder)
    runs, threads = _runs(cores)
    encoder = open_engine(folder, settings.runtime, True, threads, runs)
    observer = EngineMetrics(site.metrics)
    batching = make_batching(EncoderAlone(encoder), encoder, settings, observer=observer)
    closing.callback(batching.close, settings.grace_s)
    site.served[""] = ServedEncoder(site, "", settings, batching, observer, site.server_metrics)


def _start(site: Site, group: Mapping[str, Classifier], closing: ExitStack) -> None:
    """Add classifiers that share an encoder to a site: check promises, make logged changes again, open collectors."""
    ready = dict[str, tuple[Settings, ClassifierMetrics, Collector | None]]()
    for name, classifier in group.items():
        CLASSIFIER.set(name)
        settings = site.settings.of(name, isinstance(classifier.encoder, Rows))
        metrics = ClassifierMetrics(site.metrics, name)
        with site.refusing(name):
            Abstention(max_error=settings.max_error).check(classifier.snapshot())
            if settings.log is not None:
                classifier.open_log(settings.log)
            collector = _open_collector(site.folders[name], classifier, settings, metrics)
            if collector is not None:
                closing.callback(collector.close)
            ready[name] = settings, metrics, collector
    CLASSIFIER.set("")
    if not ready:
        return
    engine_metrics = EngineMetrics(site.metrics, next(iter(ready)))
    collect = {name: collector.offer for name, (_, _, collector) in ready.items() if collector is not None}
    classifiers = {name: group[name] for name in ready}
    encoder = next(iter(classifiers.values())).encoder
    batching = make_batching(classifiers, encoder, site.settings, observer=engine_metrics, collect=collect)
    closing.callback(batching.close, site.settings.grace_s)
    for name, (settings, metrics, collector) in ready.items():
        parts = site, name, settings, batching, engine_metrics, metrics
        site.served[name] = served = ServedClassifier(*parts, collector=collector)
        closing.callback(served.close, 0.0)  # a change that still runs had `grace_s` seconds, as its request had


def _open_collector(
    folder: Path, classifier: Classifier, settings: Settings, metrics: ClassifierMetrics
) -> Collector | None:
    if settings.collect is None or settings.max_error is None:
        return None
    with open(folder / MANIFEST, "rb", opener=open_regular) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    options = settings.collect_limit, settings.max_error, metrics.on_upload, settings.check_share, digest
    return Collector(settings.collect, *options, classifier.snapshot().is_multi_label)


def make_batching(classifiers: Any, encoder: Encoder, settings: Settings, **options: Any) -> BatchingClassifier:
    """A BatchingClassifier with these limits, whose decoders run in processes; `options` go to its constructor."""
    from PIL import Image

    own: dict[str, Any] = {"isolated": True, "decode_threads": settings.decode_threads}
    own["max_batch"] = batch_for(encoder, settings)
    if isinstance(encoder, Rows):  # nothing to decode, and little that a large batch delays
        own = {"decode_threads": 1, "max_batch": settings.max_batch or settings.max_images}
    # Pillow refuses images of twice this: a second check, of the size that a decoder reads inside a file.
    Image.MAX_IMAGE_PIXELS = max(1, settings.max_pixels // 2)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    limits = {"max_queue": settings.max_queue, "limits": settings.decode_limits, "max_error": settings.max_error}
    return BatchingClassifier(classifiers, **{**limits, **own, **options})


def batch_for(encoder: Encoder, settings: Settings) -> int:
    """`max_batch`, or the default of the engine. Only engines on a GPU have sizes of batches that they prepare."""
    return settings.max_batch or (encoder.max_batch if encoder.buckets else _CPU_BATCH)
