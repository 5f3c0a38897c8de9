"""What a saved classifier or an engine folder is, and the digest that pins it."""

from __future__ import annotations

import json
from pathlib import Path

from iosr_fast.encoders.runtimes.engine import ENGINE_KIND, EngineManifest, check_engine
from iosr_fast.state.bundle import KIND, load_bundle
from iosr_fast.utils.manifest import LARGEST_MANIFEST, MANIFEST
from iosr_fast.utils.verified_folder import VerifiedFolder, open_verified


def describe(folder: str | Path) -> str:
    """Lines to read of a bundle or an engine folder, the last with its digest. Every file is verified first.

    Raises FileNotFoundError and ValueError as `Classifier.load` does.
    """
    held = open_verified(folder, _kind(Path(folder)))
    size = sum(file.size for file in held.files.values())
    lines = [f"{folder}: {held.kind}, {len(held.files) + 1} files, {size / 1e6:,.1f} MB"]
    lines += _engine_lines(held) if held.kind == ENGINE_KIND else _classifier_lines(held)
    return "\n".join([*lines, f"digest {held.digest}"])


def _kind(folder: Path) -> str:
    """What the folder says it is; `hold` says what is wrong with it."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            return ENGINE_KIND if json.loads(file.read(LARGEST_MANIFEST))["kind"] == ENGINE_KIND else KIND
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return KIND


def _classifier_lines(held: VerifiedFolder) -> list[str]:
    bundle = load_bundle(held)
    state, config = bundle.state, bundle.state.config
    examples = state.examples
    parameters = ", ".join(f"{name} {value:.6g}" for name, value in sorted(config.parameters.items()))
    engine = bundle.files
    assert engine is not None
    return [
        f"classes {len(state.uids):,}, images {len(examples):,}, "
        f"thumbnails {sum(picture is not None for picture in examples.pictures):,}, version {state.version}",
        f"method {config.method}, reducer {config.reducer_name}{', ' if parameters else ''}{parameters}, "
        f"keys in {config.key_precision}",
        *_facts(check_engine(engine)),
        f"text encoder {'none' if bundle.text is None else 'included'}",
    ]


def _engine_lines(held: VerifiedFolder) -> list[str]:
    facts = check_engine(held)
    held.check()
    return _facts(facts)


def _facts(engine: EngineManifest) -> list[str]:
    plans = f", plans {', '.join(sorted(engine.plans))}" if engine.plans else ""
    adapter = "none" if engine.adapter is None else f"{engine.adapter} {(engine.adapter_fingerprint or '')[:12]}"
    return [
        f"engine {engine.model}, {engine.image_size} pixels, {engine.width} channels, {engine.precision}, built for "
        f"{engine.runtime}{plans}",
        f"CLIP {engine.clip_fingerprint[:12]}, adapter {adapter}, engine {engine.fingerprint[:12]}",
    ]
