"""A fitted classifier as a folder: everything that `Classifier.load` needs, and nothing that could run code.

    manifest.json         schema, class names and ids, method and parameters, plan constants, preprocessing,
                          fingerprints of CLIP and adapter, SHA-256 of every file
    support.safetensors   embeddings of the support images and of the class names
    plan.safetensors      what the plan has beyond them: narrow keys, values, a linear term, a reducer
    pictures.safetensors  thumbnails of the support images, where they are kept
    engine/               the encoder (tools/build_engine.py)
    text/                 the text encoder, where the CLIP's can be exported

It is written beside its place and renamed: a crash at any byte leaves the old folder or the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoder import Embeddings
from iosr_fast.files import new_folder, read_manifest, write_manifest
from iosr_fast.live.examples import Examples
from iosr_fast.live.plan_files import plan_from_files, plan_to_files, reducer_from
from iosr_fast.live.recipe import Recipe
from iosr_fast.live.state import State
from iosr_fast.live.support_images import SupportViews
from iosr_fast.methods import check_parameters
from iosr_fast.text_source import SavedText, TextSource

KIND = "classifier"
SUPPORT, PLAN, PICTURES = "support.safetensors", "plan.safetensors", "pictures.safetensors"
ENGINE, TEXT = "engine", "text"


@dataclass(frozen=True)
class Bundle:
    """What a classifier is made of, apart from the encoder that runs; `engine` is the folder that is opened from."""

    state: State
    views: SupportViews
    engine: Path
    encoder_fingerprint: str
    text: TextSource | None


def save_bundle(bundle: Bundle, folder: str | Path) -> dict[str, Any]:
    """Write `folder` whole or not at all, engine included; returns the manifest."""
    from safetensors.numpy import save_file

    state, recipe = bundle.state, bundle.state.recipe
    engine = read_manifest(bundle.engine, "engine", verify=False)
    constants, plan_arrays = plan_to_files(state.whole_plan, state.support, recipe)
    with new_folder(folder) as temporary:
        save_file(_contiguous(_support_arrays(state)), temporary / SUPPORT)
        if plan_arrays:
            save_file(_contiguous(plan_arrays), temporary / PLAN)
        if any(state.examples.pictures):
            save_file(_packed(state.examples.pictures), temporary / PICTURES)
        _copy_engine(bundle.engine, engine, temporary / ENGINE)
        facts = {
            "class_names": list(state.class_names),
            "class_numbers": list(state.uids),
            "version": state.version,
            "next": [state.next_class, state.next_example],
            "method": recipe.method,
            "parameters": recipe.parameters,
            "reducer": recipe.reducer_name,
            "factor": recipe.factor,
            "key_precision": recipe.key_precision,
            "tau": state.tau,
            "plan": constants,
            "views": asdict(bundle.views),
            "preprocessing": {key: engine[key] for key in ("image_size", "interpolation", "mean", "std")},
            "clip_fingerprint": engine["clip_fingerprint"],
            "adapter_fingerprint": engine["adapter_fingerprint"],
            "encoder_fingerprint": bundle.encoder_fingerprint,
            "text": _write_text(bundle.text, temporary / TEXT),
        }
        return write_manifest(temporary, KIND, facts)


def load_bundle(folder: str | Path, verify: bool = True, threads: int | None = None) -> Bundle:
    """Read what `save_bundle` wrote. Raises FileNotFoundError or ValueError, naming the file and what is wrong.

    `threads` of the text encoder. `files.stable_read` reads again where the folder is replaced meanwhile.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    manifest = read_manifest(folder, KIND, verify)
    try:
        arrays = load_file(folder / SUPPORT)
        derived = load_file(folder / PLAN) if PLAN in manifest["files"] else {}
        pictures = load_file(folder / PICTURES) if PICTURES in manifest["files"] else None
        recipe = Recipe(
            manifest["method"],
            check_parameters(manifest["method"], **manifest["parameters"]),
            manifest["reducer"],
            reducer_from(derived, "reducer"),
            float(manifest["factor"]),
            manifest["key_precision"],
        )
        examples = _examples(arrays, pictures)
        plan = plan_from_files(
            manifest["plan"],
            derived,
            examples.as_support(manifest["class_numbers"], arrays["text"], manifest["tau"]),
            recipe,
        )
        state = State.first(
            manifest["class_names"],
            arrays["text"],
            float(manifest["tau"]),
            examples,
            recipe,
            plan,
            manifest["class_numbers"],
            tuple(manifest["next"]),
            manifest["version"],
        )
        views = dict(manifest["views"])
        views["templates"] = None if views["templates"] is None else tuple(views["templates"])
        text = manifest["text"]
        return Bundle(
            state,
            SupportViews(**views),
            folder / ENGINE,
            manifest["encoder_fingerprint"],
            None if text is None else SavedText(folder / TEXT, text, threads),
        )
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a complete classifier ({error}); save it again") from error


def _support_arrays(state: State) -> dict[str, np.ndarray]:
    examples = state.examples
    arrays = {"text": state.text, "owners": examples.owners, "ids": examples.ids, "plain": examples.embeddings.plain}
    if examples.embeddings.adapted is not None:
        arrays["adapted"] = examples.embeddings.adapted
    if examples.queries is not None:
        arrays["query_plain"] = examples.queries.plain
        if examples.queries.adapted is not None:
            arrays["query_adapted"] = examples.queries.adapted
    return arrays


def _examples(arrays: Mapping[str, np.ndarray], pictures: Mapping[str, np.ndarray] | None) -> Examples:
    queries = Embeddings(arrays["query_plain"], arrays.get("query_adapted")) if "query_plain" in arrays else None
    ids = arrays["ids"]
    shown = (None,) * len(ids) if pictures is None else _unpacked(pictures)
    return Examples(Embeddings(arrays["plain"], arrays.get("adapted")), arrays["owners"], ids, shown, queries)


def _packed(pictures: tuple[bytes | None, ...]) -> dict[str, np.ndarray]:
    """Pictures of any length in two arrays; an empty one stands for none."""
    lengths = [0 if picture is None else len(picture) for picture in pictures]
    data = np.frombuffer(b"".join(picture or b"" for picture in pictures), np.uint8)
    return {"data": data, "ends": np.cumsum(lengths, dtype=np.int64)}


def _unpacked(arrays: Mapping[str, np.ndarray]) -> tuple[bytes | None, ...]:
    data, ends = arrays["data"].tobytes(), arrays["ends"].tolist()
    return tuple(data[start:end] or None for start, end in zip([0, *ends], ends, strict=False))


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _copy_engine(source: Path, manifest: Mapping[str, Any], target: Path) -> None:
    """The files that the engine's manifest names, and no others."""
    for name in ("manifest.json", *manifest["files"]):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _write_text(text: TextSource | None, folder: Path) -> dict[str, Any] | None:
    if text is None:
        return None
    folder.mkdir()
    facts = text.write(folder)
    if facts is None:
        shutil.rmtree(folder)
    return facts
