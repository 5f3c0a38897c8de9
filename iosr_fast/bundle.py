"""A fitted classifier as a folder: manifest.json, support.safetensors and the engine it encodes with. Never pickle."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.cache import SupportSet
from iosr_fast.encoder import Embeddings
from iosr_fast.files import new_folder, read_manifest, write_manifest
from iosr_fast.precision import Precision

KIND = "classifier"
SUPPORT = "support.safetensors"
ENGINE = "engine"


@dataclass(frozen=True)
class Bundle:
    """What a classifier is made of, apart from the encoder that runs; `engine` is the folder that is opened from."""

    class_names: list[str]
    method: str
    parameters: dict[str, float]
    support: SupportSet
    encoder_fingerprint: str
    engine: Path
    key_precision: Precision = "fp32"
    reducer: str = "none"
    factor: float = 1.0  # that the logits are multiplied by


def save_bundle(bundle: Bundle, folder: str | Path) -> dict[str, Any]:
    """Write `folder` whole or not at all, engine included; returns the manifest."""
    from safetensors.numpy import save_file

    support = bundle.support
    assert support.text is not None  # a classifier has class names
    arrays = {"plain": support.embeddings.plain, "class_offsets": support.class_offsets, "text": support.text}
    if support.embeddings.adapted is not None:
        arrays["adapted"] = support.embeddings.adapted
    if support.queries is not None:
        arrays["query_plain"] = support.queries.plain
        if support.queries.adapted is not None:
            arrays["query_adapted"] = support.queries.adapted
    with new_folder(folder) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary / SUPPORT)
        shutil.copytree(bundle.engine, temporary / ENGINE)
        facts = {
            "class_names": bundle.class_names,
            "method": bundle.method,
            "parameters": bundle.parameters,
            "key_precision": bundle.key_precision,
            "reducer": bundle.reducer,
            "factor": bundle.factor,
            "tau": support.tau,
            "encoder_fingerprint": bundle.encoder_fingerprint,
        }
        return write_manifest(temporary, KIND, facts)


def load_bundle(folder: str | Path, verify: bool = True) -> Bundle:
    """Read what `save_bundle` wrote. Raises FileNotFoundError or ValueError, naming the file and what is wrong."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    manifest = read_manifest(folder, KIND, verify)
    try:
        arrays = load_file(folder / SUPPORT)
        embeddings = Embeddings(arrays["plain"], arrays.get("adapted"))
        queries = Embeddings(arrays["query_plain"], arrays.get("query_adapted")) if "query_plain" in arrays else None
        return Bundle(
            class_names=list(manifest["class_names"]),
            method=manifest["method"],
            parameters=dict(manifest["parameters"]),
            support=SupportSet(embeddings, arrays["class_offsets"], arrays["text"], float(manifest["tau"]), queries),
            encoder_fingerprint=manifest["encoder_fingerprint"],
            engine=folder / ENGINE,
            # Not written before there was a choice.
            key_precision=manifest.get("key_precision", "fp32"),
            reducer=manifest.get("reducer", "none"),
            factor=float(manifest.get("factor", 1.0)),
        )
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a complete classifier ({error}); save it again") from error
