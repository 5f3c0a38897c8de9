"""From a CLIP's name to an opened engine and a text encoder: what `Classifier.from_pretrained` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.encoder import Encoder
from iosr_fast.files import read_manifest
from iosr_fast.offline.clip import DEMO_FOLDER, LoadedClip, load_clip

if TYPE_CHECKING:
    from iosr_fast.offline.adapter import Adapter

DEMO_ADAPTER = DEMO_FOLDER / "adapter.safetensors"


@dataclass(frozen=True)
class Opened:
    encoder: Encoder
    engine: Path
    embed_text: Callable[[Sequence[str], Sequence[str] | None], np.ndarray]
    tau: float


def cache_folder() -> Path:
    """Where engines are kept: IOSR_FAST_CACHE, else iosr_fast in XDG_CACHE_HOME, else ~/.cache/iosr_fast."""
    chosen = os.environ.get("IOSR_FAST_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iosr_fast"


def choose_adapter(clip: LoadedClip, adapter: str | Path | None) -> Adapter | None:
    """A file's adapter, None, or for "auto" the shipped one if `clip` is the demo's and none otherwise."""
    from iosr_fast.offline.adapter import check_belongs, load_adapter

    if adapter == "auto":
        adapter = DEMO_ADAPTER if clip.name == "demo" else None
    if adapter is None:
        return None
    loaded = load_adapter(adapter)
    check_belongs(loaded, clip)
    return loaded


def open_pretrained(
    model: str,
    pretrained: str | Path | None,
    adapter: str | Path | None,
    runtime: str,
    precision: str,
    engine: str | Path | None,
) -> Opened:
    """Load the CLIP, open its engine (building it once if none is given) and hold its text encoder."""
    from iosr_fast.offline.export import engine_fingerprint, write_engine
    from iosr_fast.offline.text import embed_classes
    from iosr_fast.runtimes import choose_runtime, open_engine

    clip = load_clip(model, pretrained)
    if engine is not None:
        folder = Path(engine)
        made_for = read_manifest(folder, "engine", verify=False)
        if made_for["clip_fingerprint"] != clip.fingerprint:
            raise ValueError(
                f"the engine in {folder} was built for another CLIP: expected {clip.name} with fingerprint "
                f"{clip.fingerprint[:12]}, got {made_for['model']} with {made_for['clip_fingerprint'][:12]}"
            )
        encoder = open_engine(folder, runtime)
    else:
        chosen = choose_adapter(clip, adapter)
        runtime = choose_runtime(runtime)
        fingerprint = engine_fingerprint(clip, chosen, precision)
        folder = cache_folder() / "engines" / f"{fingerprint[:16]}-{runtime}"
        if not (folder / "manifest.json").is_file():
            write_engine(clip, chosen, folder, runtime, precision)
        encoder = open_engine(folder, runtime)
    return Opened(encoder, folder, partial(embed_classes, clip), clip.logit_scale)
