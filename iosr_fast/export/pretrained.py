"""From a model's name to an opened engine and, for a CLIP, a text encoder, for `Classifier`."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from iosr_fast.backbones.image_models import ONNX, PHOTOGRAPHS, is_image_model
from iosr_fast.backbones.load import LoadedModel, load_model
from iosr_fast.backbones.models import (
    DEMO_FOLDER,
    DEMO_NAME,
    LOCAL,
    check_adaptable,
    check_model,
    is_fused,
    model_config,
)
from iosr_fast.backbones.prompts import check_texts
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.from_onnx import OnnxModel, read_onnx, weight_files
from iosr_fast.sealed.files import cache_folder, in_cache
from iosr_fast.sealed.manifest import MANIFEST, SCHEMA
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.utils.progress import progress
from iosr_fast.utils.require import require_installed

if TYPE_CHECKING:
    from iosr_fast.backbones.adapter import Adapter
    from iosr_fast.encoders.encoder import Encoder

DEMO_ADAPTER = DEMO_FOLDER / "adapter.safetensors"
log = logging.getLogger(__name__)

_opening = threading.Lock()
_in_use: WeakValueDictionary[tuple[Any, ...], OpenedModel] = WeakValueDictionary()
_latest: OpenedModel | None = None


def read_adapter(model: str, adapter: str | Path | None) -> Adapter | None:
    """The adapter in a file; for "auto" the shipped one if `model` is the demo, and otherwise None.

    Raises FileNotFoundError or ValueError for a file that is no adapter or whose shape does not fit `model`, and for a
    model that can't have one.
    `choose_adapter` also compares the CLIP's weights.
    """
    if adapter == "auto":
        adapter = DEMO_ADAPTER if model in ("demo", DEMO_NAME) else None
    if adapter is None:
        return None
    check_adaptable(model)
    from iosr_fast.backbones.adapter import load_adapter

    loaded = load_adapter(adapter)
    vision = model_config(model)["vision_cfg"]
    if "layers" in vision:  # timm's models are known by their weights only (check_belongs)
        expected, got = (loaded.config.width, loaded.config.blocks), (vision.get("width"), vision.get("layers"))
        if expected != got:
            raise IosrFastError(
                f"the adapter {adapter} was trained for another CLIP: expected {loaded.config.clip_name} with "
                f"{expected[1]} blocks of width {expected[0]}, got {model} with {got[1]} of width {got[0]}"
            )
    return loaded


def choose_adapter(clip: LoadedModel, adapter: str | Path | None) -> Adapter | None:
    """`read_adapter` for a loaded CLIP. Raises ValueError for an adapter that was trained with other weights."""
    from iosr_fast.backbones.adapter import check_belongs

    loaded = read_adapter(clip.name, adapter)
    if loaded is not None:
        check_belongs(loaded, clip)
    return loaded


def load(model: str, pretrained: str | Path | None, precision: str) -> LoadedModel | OnnxModel:
    """`load_model`, or the encoder in an ONNX file, which needs no torch; for an engine in this `precision`."""
    from iosr_fast.export.build import check_products

    loaded = read_onnx(model) if model.endswith(ONNX) else load_model(model, pretrained)
    check_products(loaded, precision)
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
    from iosr_fast.encoders.engine_folder import ENGINE_KIND, check_engine, choose_runtime, runtimes_of
    from iosr_fast.encoders.runtimes import open_engine
    from iosr_fast.export.precision import choose_builder, default_precisions, first_right

    if not model.endswith(ONNX):
        require_installed("torch", "cpu")
    check_model(model, pretrained, precision or "fp32")
    chosen = read_adapter(model, adapter)
    adapted_by = None if chosen is None else chosen.fingerprint()
    fused = is_fused(model)
    source = None if engine is None else open_verified(engine, ENGINE_KIND)
    if source is None:
        precisions = default_precisions(runtime, fused) if precision is None else (precision,)
        choose_builder(runtime, precisions[0], fused)
    else:
        check_engine(source)
        if adapter not in ("auto", None):
            _check_source(source.manifest, adapter=adapted_by)
        runtime = choose_runtime(runtime, runtimes_of(source.manifest))
    if texts is not None and model not in ("demo", DEMO_NAME) and not is_image_model(model):
        check_texts(model, *texts)
    with progress(f"load {model}", None, shown=shown):
        clip = load(model, pretrained, precision or "fp32")
    if source is not None:
        _check_source(source.manifest, CLIP=clip.fingerprint)
        source.check()
        encoder = open_engine(source, runtime)
    else:
        if chosen is not None and isinstance(clip, LoadedModel):
            from iosr_fast.backbones.adapter import check_belongs

            check_belongs(chosen, clip)
        encoder = first_right(
            precisions, lambda name: _engine(clip, chosen, choose_builder(runtime, name, fused), name, shown)
        )
    assert encoder.source is not None
    folder = encoder.source.folder
    if isinstance(clip, OnnxModel):
        return OpenedModel(encoder, folder, None, clip.logit_scale, reads_text=False)
    from iosr_fast.export.text import ClipText

    same = encoder.source.manifest["adapter_fingerprint"] == adapted_by
    text = None if clip.tokenizer is None else ClipText(clip)
    return OpenedModel(encoder, folder, text, clip.logit_scale, (clip, chosen) if same else None, text is not None)


def in_fp32(opened: OpenedModel, shown: bool = False) -> OpenedModel:
    """A model that was opened from its weights, on an engine in fp32 for the same runtime."""
    assert opened.loaded is not None
    encoder = _engine(*opened.loaded, opened.encoder.runtime, "fp32", shown)
    assert encoder.source is not None
    return replace(opened, encoder=encoder, engine=encoder.source.folder)


def _engine(
    clip: LoadedModel | OnnxModel, adapter: Adapter | None, runtime: str, precision: str, shown: bool
) -> Encoder:
    """The encoder of an engine in the user's cache, which is built where it is missing."""
    from iosr_fast.encoders.engine_folder import ONNX_RUNTIMES
    from iosr_fast.encoders.runtimes import open_engine
    from iosr_fast.export.build import LAYOUT, write_engine
    from iosr_fast.export.check import calibration_pictures
    from iosr_fast.export.precision import QUANTISED, engine_fingerprint, quantisation

    pictures = calibration_pictures(clip) if precision in QUANTISED else None
    quantised = quantisation(clip.image_size, runtime, precision, pictures)
    adapted_by = None if adapter is None else adapter.fingerprint()
    fingerprint = engine_fingerprint(clip.fingerprint, adapted_by, precision, quantised)
    # Versions with another schema or layout use another folder; the CPU runtimes of one graph share theirs.
    form = "onnx" if runtime in ONNX_RUNTIMES else runtime
    folder = in_cache("engines", f"{fingerprint[:16]}-{form}-v{SCHEMA}.{LAYOUT}")
    cached = _open_cached(folder, runtime)
    if cached is not None:
        return cached
    with progress("build the engine", None, shown=shown):
        write_engine(clip, adapter, folder, runtime, precision, pictures=pictures)
    return open_engine(folder, runtime, verify=False)


def with_loaded(opened: OpenedModel, pretrained: str | Path, adapter: str | Path | None) -> OpenedModel:
    """A saved classifier's model with the one in torch that its engine was exported from.

    `pretrained` and `adapter` as for Classifier; the model's own name ("demo", "timm/NAME") stands for weights that no
    `pretrained` names. Raises ValueError for another model or adapter than the engine's.
    """
    assert opened.encoder.source is not None
    manifest = opened.encoder.source.manifest
    clip = load_model(manifest["model"], None if str(pretrained) == manifest["model"] else pretrained)
    chosen = choose_adapter(clip, adapter)
    _check_source(manifest, CLIP=clip.fingerprint, adapter=None if chosen is None else chosen.fingerprint())
    return replace(opened, loaded=(clip, chosen))


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
    from iosr_fast.encoders.runtimes import open_engine

    if not engine.exists():
        return None
    try:
        return open_engine(engine, runtime)
    except (ValueError, FileNotFoundError) as error:
        log.warning("the engine in the cache is damaged and built again: %s", error)
        shutil.rmtree(engine, ignore_errors=True)
        return None
