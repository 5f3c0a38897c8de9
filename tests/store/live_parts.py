"""A small classifier that needs no CLIP: embeddings are a fixed projection of the pixels, texts of their letters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.backbones.prompts import Descriptions
from iosr_fast.classifier import OPENING, Classifier
from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.encoders.text_encoder import TextSource
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.methods import METHODS
from iosr_fast.methods.config import Config
from iosr_fast.sealed.manifest import write_manifest

SIZE, WIDTH = 8, 24


def unit(rows: np.ndarray) -> np.ndarray:
    made: np.ndarray = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return made


class PixelEncoder(Encoder):
    """An Encoder by two fixed random projections of the pixels."""

    image_size, width, fingerprint, runtime, adapted = SIZE, WIDTH, "f" * 64, "test", True

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.projections = rng.standard_normal((2, SIZE * SIZE * 3, WIDTH)).astype(np.float32)

    def encode(self, pixels: np.ndarray) -> Embeddings:
        flat = pixels.reshape(len(pixels), -1).astype(np.float32) / 255 - 0.5
        return Embeddings(*(unit(np.stack([row @ projection for row in flat])) for projection in self.projections))


def text_embedding(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return unit(np.random.default_rng(seed).standard_normal(WIDTH))


class LetterText:
    """A TextSource: a text's embedding is drawn from the text."""

    def embed_classes(
        self, names: Sequence[str], templates: Sequence[str] | None = None, descriptions: Descriptions | None = None
    ) -> np.ndarray:
        prompts = ["{}"] if templates is None else templates[:1]
        texts = [[*(p.replace("{}", name) for p in prompts), *(descriptions or {}).get(name, ())] for name in names]
        return unit(np.stack([np.mean([text_embedding(text) for text in own], axis=0) for own in texts]))

    def write(self, folder: Path) -> dict[str, Any] | None:
        return None


def pictures(rng: np.random.Generator, classes: int, shots: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (classes * shots, 8, 8, 3), one motif a class under noise, and labels."""
    motifs = np.random.default_rng(11).integers(0, 256, (classes, 1, SIZE, SIZE, 3))
    noise = rng.integers(-60, 61, (classes, shots, SIZE, SIZE, 3))
    labels = np.repeat(np.arange(classes), shots)
    return np.clip(motifs + noise, 0, 255).astype(np.uint8).reshape(-1, SIZE, SIZE, 3), labels


def pairs_of_pictures(names: list[str], seed: int = 4) -> tuple[np.ndarray, list[set[str]], list[set[str]]]:
    """60 pictures (60, 8, 8, 3) that show motifs of two of the five classes each, their names, and names of which 7 to
    11 have a wrong one more and 30 to 34 lack one."""
    rng = np.random.default_rng(seed)
    motifs = pictures(rng, 5, 60)[0].reshape(5, 60, SIZE, SIZE, 3)
    pairs = [rng.choice(5, 2, replace=False) for _ in range(60)]
    images = np.stack([motifs[pair, i].mean(0).astype(np.uint8) for i, pair in enumerate(pairs)])
    right = [{names[c] for c in pair} for pair in pairs]
    wrong = {i: {min(set(names) - right[i])} for i in range(7, 12)}
    lacking = {i: {min(right[i])} for i in range(30, 35)}
    return images, right, [(own | wrong.get(i, set())) - lacking.get(i, set()) for i, own in enumerate(right)]


# What the manifest of PixelEncoder's engine says.
ENGINE_FACTS: dict[str, Any] = {
    "model": "pixels",
    "image_size": SIZE,
    "width": WIDTH,
    "mean": [0.5, 0.5, 0.5],
    "std": [1.0, 1.0, 1.0],
    "interpolation": "bicubic",
    "logit_scale": 20.0,
    "clip_fingerprint": "c" * 64,
    "adapter": "random",
    "adapter_fingerprint": "a" * 64,
    "first_adapted_block": 0,
    "bottleneck": 1,
    "runtime": "onnxruntime",
    "precision": "fp32",
    "max_batch": 8,
    "fingerprint": PixelEncoder.fingerprint,
    "export_version": 1,
    "opset": 20,
    "dual_encoder": {},
    "versions": {},
    "device": "any",
    "plans": {},
    "check": {},
    "build_seconds": 0.0,
}


def engine_folder(folder: Path, **facts: Any) -> Path:
    """What a bundle needs of an engine to be saved, with these facts among its own; nothing opens it."""
    folder.mkdir(parents=True)
    (folder / "encoder.onnx").write_bytes(b"no graph")
    write_manifest(folder, "engine", ENGINE_FACTS | facts)
    return folder


def pixel_clip(engine: Path = Path("none"), text: TextSource | None = None) -> OpenedModel:
    return OpenedModel(PixelEncoder(), engine, text or LetterText(), 20.0)


def unfitted(engine: Path = Path("none"), **parameters: Any) -> Classifier:
    return Classifier._with_clip(pixel_clip(engine), **parameters)


def refit(classifier: Classifier, *data: Any, **options: Any) -> Classifier:
    """Fit again with default parameters but for those given; `options` may have the data, too."""
    named = ("images", "labels", "class_names", "descriptions")
    data_of = {name: options.pop(name) for name in named if name in options}
    defaults = {name: value for name, value in Classifier().get_params().items() if name not in OPENING}
    return classifier.set_params(**{**defaults, **options}).fit(*data, **data_of)


def small_classifier(
    engine: Path = Path("none"), classes: int = 5, shots: int = 3, seed: int = 0, **parameters: Any
) -> Classifier:
    """Fitted on motifs; every parameter of Classifier may be given."""
    images, labels = pictures(np.random.default_rng(seed), classes, shots)
    names = [f"motif {i}" for i in range(classes)]
    options = {"method": "tip-adapter++", "alpha": 40.0, "beta": 5.0} | parameters
    return unfitted(engine, **options).fit(images, [names[c] for c in labels], class_names=names)


def with_tree(classifier: Classifier, paths: Sequence[tuple[str, ...]]) -> Classifier:
    """The classifier, its classes below the nodes of these paths."""
    fit = classifier._fit
    assert fit is not None and isinstance(fit.head, Head)
    classifier._store.fit = replace(fit, head=replace(fit.head, paths=tuple(paths) if any(paths) else None))
    return classifier


TEXT_FACTS: dict[str, Any] = {
    "context_length": 16,
    "width": WIDTH,
    "precision": "fp32",
    "sot": 1,
    "eot": 2,
    "pad": 0,
    "templates": ["{}"],
    "clip_fingerprint": "c" * 64,
    "tokens_checked": 1,
    "max_abs_error": 0.0,
    "min_cosine": 1.0,
}


class WrittenText(LetterText):
    """A text encoder that can be saved."""

    def write(self, folder: Path) -> dict[str, Any]:
        (folder / "text.onnx").write_bytes(b"no graph")
        (folder / "tokenizer.json").write_bytes(b"{}")
        return dict(TEXT_FACTS)


def saved_classifier(folder: Path) -> Path:
    """A bundle in `folder`, of an engine beside it, with a reducer, pictures, paths and a text encoder."""
    made = small_classifier(engine_folder(folder / "engine"), reducer="centre")
    head = made.snapshot()
    head = replace(head, examples=replace(head.examples, paths=("/a.png", None) * 7 + ("/b.png",)))
    made._fit = replace(made._fit, clip=replace(made._fit.clip, text=WrittenText()), head=head)
    made.save(folder / "bundle")
    return folder / "bundle"


def random_examples(
    rng: np.random.Generator, class_ids: Sequence[int] | np.ndarray, first: int, queries: bool = False
) -> Examples:
    """Support images of random embeddings, with ids from `first` on; class_ids must not fall."""
    n = len(class_ids)
    rows = [Embeddings(unit(rng.standard_normal((n, WIDTH))), unit(rng.standard_normal((n, WIDTH)))) for _ in "ab"]
    ids = np.arange(first, first + n)
    shown = tuple(f"picture {i}".encode() for i in ids)
    return Examples(rows[0], np.asarray(class_ids, np.int64), ids, shown, rows[1] if queries else None)


def random_head(
    rng: np.random.Generator,
    classes: int,
    shots: int,
    method: str = "tip-adapter++",
    parameters: dict[str, float] | None = None,
    reducer: str = "none",
    key_precision: Any = "fp32",
) -> Head:
    """A head as after a fit, of random embeddings."""
    examples = random_examples(rng, np.repeat(np.arange(classes), shots), 0)
    text = unit(rng.standard_normal((classes, WIDTH)))
    chosen = {**METHODS[method].parameters, **(parameters or {})}
    config = Config(method=method, parameters=chosen, reducer=reducer, factor=0.7, key_precision=key_precision)
    fitted = config.fit_reducer(examples.as_support(range(classes), text, 20.0))
    return Head.first([f"class {i}" for i in range(classes)], text, 20.0, examples, config, fitted)


def random_queries(rng: np.random.Generator, n: int) -> Embeddings:
    return Embeddings(unit(rng.standard_normal((n, WIDTH))), unit(rng.standard_normal((n, WIDTH))))
