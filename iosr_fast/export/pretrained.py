"""From a model's name to an opened engine and, for a CLIP, a text encoder, for `Classifier`."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from iosr_fast.backbones.image_models import ONNX, PHOTOGRAPHS
from iosr_fast.backbones.load import LoadedModel, load_model, shapes_of
from iosr_fast.backbones.models import DEMO_FOLDER, DEMO_NAME, LOCAL, check_model
from iosr_fast.backbones.prompts import check_texts
from iosr_fast.encoders.engine_folder import ENGINE_KIND, ONNX_RUNTIMES, check_engine, choose_runtime, runtimes_of
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.build import LAYOUT, write_engine
from iosr_fast.export.from_onnx import read_onnx, weight_files
from iosr_fast.export.precision import Exportable, engine_fingerprint, first_right
from iosr_fast.export.quantize.calibration import (
    QUANTISED,
    calibration_pictures,
    module_has_products,
    quantisation,
)
from iosr_fast.export.source import Source, source_of
from iosr_fast.sealed.files import cache_folder, in_cache
from iosr_fast.sealed.manifest import MANIFEST, SCHEMA
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.utils.progress import progress
from iosr_fast.utils.require import require_installed

if TYPE_CHECKING:
    from iosr_fast.backbones.adapter import Adapter
    from iosr_fast.encoders.encoder import Encoder

LOGIT_SCALE = 100.0  # of a model without texts, where nothing uses it
DEMO_ADAPTER = DEMO_FOLDER / "adapter.safetensors"
log = logging.getLogger(__name__)

_opening = threading.Lock()
_in_use: WeakValueDictionary[tuple[Any, ...], OpenedModel] = WeakValueDictionary()
_latest: OpenedModel | None = None


@dataclass(frozen=True)
class Sketch:
    """A model that is named and not loaded: what its engines can be, its adapter and, of a CLIP, its configuration."""

    of: Exportable
    load: Callable[[], Source]
    adapter: Adapter | None = None
    config: Mapping[str, Any] | None = None


def sketch(
    model: str, pretrained: str | Path | None, adapter: str | Path | None, random_from: int | None = None
) -> Sketch:
    """What names and files say of a model before its weights are loaded or downloaded; `adapter` as of choose_adapter,
    or `random_from`, the first block of one with random weights, to measure speed.

    Raises what check_model raises; for an adapter of another shape, or of a model that can't have one, ValueError.
    """
    if not model.endswith(ONNX):
        require_installed("torch", "cpu")
    config = check_model(model, pretrained)
    if model.endswith(ONNX):
        if adapter not in ("auto", None) or random_from is not None:
            raise IosrFastError(f"expected a CLIP for an adapter, got {model}, which gives the plain embedding only")
        read = read_onnx(model)
        return Sketch(read, lambda: read)
    from iosr_fast.backbones.adapter import random_adapter
    from iosr_fast.backbones.fuse import check_adaptable, unfusible_reason

    visual = shapes_of(model, config)
    if random_from is not None:
        check_adaptable(visual, model)
    chosen = None if random_from is not None else _read_adapter(visual, model, adapter)

    def load() -> Source:
        clip = load_model(model, pretrained)
        return source_of(clip, chosen if random_from is None else random_adapter(clip, random_from))

    fused = unfusible_reason(visual, model) is None
    return Sketch(Exportable(model, fused, module_has_products(visual)), load, chosen, config or None)


def _read_adapter(visual: Any, model: str, adapter: str | Path | None) -> Adapter | None:
    """`choose_adapter` for an image encoder that may be of shapes alone, but for the weights of its CLIP."""
    if adapter == "auto":
        adapter = DEMO_ADAPTER if model in ("demo", DEMO_NAME) else None
    if adapter is None:
        return None
    from iosr_fast.backbones.adapter import check_fits, load_adapter
    from iosr_fast.backbones.fuse import check_adaptable

    check_adaptable(visual, model)
    loaded = load_adapter(adapter)
    check_fits(loaded, visual, model)
    return loaded


def choose_adapter(clip: LoadedModel, adapter: str | Path | None) -> Adapter | None:
    """The adapter in a file for a loaded CLIP; for "auto" the shipped one if it is the demo, and otherwise None.

    Raises FileNotFoundError or ValueError for a file that is no adapter, or one of another CLIP, and for a model that
    can't have one.
    """
    loaded = _read_adapter(clip.model.visual, clip.name, adapter)
    if loaded is not None:
        from iosr_fast.backbones.adapter import check_belongs

        check_belongs(loaded, clip)
    return loaded


def open_pretrained(
    model: str,
    pretrained: str | Path | None,
    adapter: str | Path | None,
    runtime: str,
    precision: str | None,
    engine: str | Path | None,
    shown: bool = False,
    texts: tuple[Any, Any, Any] | None = None,
) -> OpenedModel:
    """Load the model and open its engine; without `engine` one is built, once, in the user's cache, in `precision` or
    (None) in the first of default_precisions whose embeddings are right.

    Names, files and the architecture are checked before the model is loaded or downloaded. `shown`: a progress bar.
    """
    named = sketch(model, pretrained, adapter)
    if engine is None:
        open_for = _building(named.of, runtime, precision, shown)
    else:
        open_for = _opening_saved(engine, runtime, None if adapter in ("auto", None) else named.adapter)
    if texts is not None and named.config and model not in ("demo", DEMO_NAME):
        check_texts(model, named.config, *texts)
    with progress(f"load {model}", None, shown=shown):
        source = named.load()
    encoder = open_for(source)
    assert encoder.source is not None
    engine, manifest = encoder.source.folder, encoder.source.manifest
    if source.loaded is None:
        return OpenedModel(encoder, engine, None, LOGIT_SCALE, reads_text=False)
    from iosr_fast.export.text import ClipText

    clip, chosen = source.loaded
    same = manifest["adapter_fingerprint"] == (None if chosen is None else chosen.fingerprint())
    text = None if clip.tokenizer is None else ClipText(clip)
    return OpenedModel(encoder, engine, text, clip.logit_scale, source.loaded if same else None, text is not None)


def _building(of: Exportable, runtime: str, precision: str | None, shown: bool) -> Callable[[Source], Encoder]:
    """What opens a source's engine in the cache, after all that can be refused without weights was refused."""
    precisions = of.default_precisions(runtime) if precision is None else (precision,)
    of.check(runtime, precisions[0])
    return lambda source: first_right(precisions, lambda name: _engine(source, runtime, name, shown))


def _opening_saved(engine: str | Path, runtime: str, adapter: Adapter | None) -> Callable[[Source], Encoder]:
    """The same for an engine that was built from the source, and from the `adapter` if one is named."""
    saved = open_verified(engine, ENGINE_KIND)
    check_engine(saved)
    if adapter is not None:
        _check_source(saved.manifest, adapter=adapter.fingerprint())
    runtime = choose_runtime(runtime, runtimes_of(saved.manifest))

    def open_it(source: Source) -> Encoder:
        _check_source(saved.manifest, CLIP=source.fingerprint)
        saved.check()
        return open_engine(saved, runtime)

    return open_it


def in_fp32(opened: OpenedModel, shown: bool = False) -> OpenedModel:
    """A model that was opened from its weights, on an engine in fp32 for the same runtime."""
    assert opened.loaded is not None
    encoder = _engine(source_of(*opened.loaded), opened.encoder.runtime, "fp32", shown)
    assert encoder.source is not None
    return replace(opened, encoder=encoder, engine=encoder.source.folder)


def _engine(source: Source, runtime: str, precision: str, shown: bool) -> Encoder:
    """The encoder of an engine in the user's cache, which is built where it is missing."""
    runtime = source.check(runtime, precision)
    pictures = calibration_pictures(source.name, source.geometry) if precision in QUANTISED else None
    quantised, facts = quantisation(source.geometry.size, runtime, precision, pictures), source.facts()
    fingerprint = engine_fingerprint(source.fingerprint, facts["adapter_fingerprint"], precision, quantised)
    # Versions with another schema or layout use another folder; the CPU runtimes of one graph share theirs.
    form = "onnx" if runtime in ONNX_RUNTIMES else runtime
    folder = in_cache("engines", f"{fingerprint[:16]}-{form}-v{SCHEMA}.{LAYOUT}")
    cached = _open_cached(folder, runtime)
    if cached is not None:
        return cached
    with progress("build the engine", None, shown=shown):
        write_engine(source, folder, runtime, precision, pictures=pictures)
    return open_engine(folder, runtime, verify=False)


def with_loaded(opened: OpenedModel, pretrained: str | Path, adapter: str | Path | None) -> OpenedModel:
    """A saved classifier's model with the one in torch that its engine was exported from.

    `pretrained` and `adapter` as for Classifier; the model's own name ("demo", "timm/NAME") stands for weights that no
    `pretrained` names. Raises ValueError for another model or adapter than the engine's.
    """
    assert opened.encoder.source is not None
    manifest = opened.encoder.source.manifest
    model = manifest["model"]
    source = sketch(model, None if str(pretrained) == model else pretrained, adapter).load()
    _check_source(manifest, CLIP=source.fingerprint, adapter=source.facts()["adapter_fingerprint"])
    return replace(opened, loaded=source.loaded)


def _check_source(manifest: dict[str, Any], **fingerprints: str | None) -> None:
    """Raise ValueError for another CLIP or adapter than those that an engine was built from."""
    for name, got in fingerprints.items():
        if (expected := manifest[f"{name.lower()}_fingerprint"]) != got:
            raise IosrFastError(
                f"expected the {name} that the engine was built from, {(expected or 'none')[:12]}, got "
                f"{(got or 'none')[:12]}; name its weights by pretrained and its adapter's file by adapter"
            )


def open_shared(
    model: str | Path | None,
    pretrained: str | Path | None,
    adapter: str | Path | None,
    runtime: str,
    precision: str | None,
    engine: str | Path | None,
    shown: bool = False,
    texts: tuple[Any, Any, Any] | None = None,
) -> OpenedModel:
    """`open_pretrained`, shared in this process by all who name the same files: each fold of a cross-validation finds
    the CLIP open.

    A CLIP stays in memory while a classifier holds it; of the others only the one opened last does, until another is
    opened. A file that changed since is opened again. Without a `model` it is "photographs", with a line that a CLIP is
    better. The precision "auto" opens the engine in fp32, from which the others are made. `texts`: as of check_texts.
    """
    global _latest
    if model is None:
        _recommend_a_clip()
    model, precision = str(model or PHOTOGRAPHS), "fp32" if precision == "auto" else precision
    named = (model, pretrained, adapter, runtime, precision, engine)
    key = (str(cache_folder()), *map(_identity, named))
    with _opening:
        clip = _in_use.get(key)
        if clip is None:
            _latest = None  # frees its memory, unless it is in use
            clip = _in_use[key] = open_pretrained(*named, shown, texts)
        _latest = clip
        return clip


def _identity(value: Any) -> tuple[Any, ...]:
    """What tells a parameter from another, and a file or an engine's folder from what was there before."""
    name = (type(value).__name__ if value is None else "", str(value))
    if not isinstance(value, str | os.PathLike):
        return name
    path = Path(str(value).removeprefix(LOCAL))
    try:
        files = [path / MANIFEST if (path / MANIFEST).is_file() else path]
        if path.suffix == ONNX:
            files += [path.with_suffix(".json"), *weight_files(path, _version(path))]
    except (OSError, ValueError):
        return name  # a missing or damaged file, which open_pretrained reports
    return *name, *map(_version, files)


def _version(file: Path) -> tuple[int, ...]:
    """What changes whenever a file does, its times being set back, too; () for the name of a model or a tag."""
    try:
        facts = file.stat()
    except (OSError, ValueError):
        return ()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


@functools.cache
def _recommend_a_clip() -> None:
    """Once a process."""
    log.warning(
        "no model was named, so this is 'photographs', a small network trained on ImageNet: a CLIP, like 'ViT-B-32' "
        "with the pretrained weights 'laion2b_s34b_b79k', is better and reads class names; naming 'photographs' "
        "silences this"
    )


def _open_cached(engine: Path, runtime: str) -> Encoder | None:
    """The encoder of an engine in the cache; None without one. A damaged one is removed with a warning."""
    if not engine.exists():
        return None
    try:
        return open_engine(engine, runtime)
    except (ValueError, FileNotFoundError) as error:
        log.warning("the engine in the cache is damaged and built again: %s", error)
        shutil.rmtree(engine, ignore_errors=True)
        return None
