"""Classifier: class names and a handful of pictures in, labels out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.bundle import Bundle, load_bundle, save_bundle
from iosr_fast.cache import SupportSet, encode_support, make_support_set
from iosr_fast.encoder import Embeddings, Encoder
from iosr_fast.methods import METHODS, check_parameters, compile_method
from iosr_fast.precision import PRECISIONS, Precision
from iosr_fast.preprocess import BadImageError, as_image_list, find_bad, list_folder, to_pixels
from iosr_fast.scoring import ScoringPlan, score

logger = logging.getLogger(__name__)

TextEmbedder = Callable[[Sequence[str], "Sequence[str] | None"], np.ndarray]
_CHUNK = 256


class Classifier:
    """A few-shot image classifier in scikit-learn's manner: fit, predict, predict_proba, score, classes_.

    Make one with `from_pretrained` (then `fit` or `fit_folder`) or `load` (ready to predict). Images are paths, PIL
    images or uint8 arrays (H, W, 3), one or a sequence of them, or one uint8 array (B, H, W, 3).

    After fitting: `classes_` (C,) the class names; `plan_`, what the kernels execute; `support_`, the encoded support
    set; `method_`; `parameters_`; `key_precision_`; `skipped_`, the unreadable images that `skip_bad` left out.
    """

    classes_: np.ndarray
    plan_: ScoringPlan
    support_: SupportSet
    method_: str
    parameters_: dict[str, float]
    key_precision_: Precision

    def __init__(
        self,
        encoder: Encoder,
        engine: Path,
        embed_text: TextEmbedder | None = None,
        tau: float = 100.0,
        recommended: dict[str, float] | None = None,
    ) -> None:
        self.encoder = encoder
        self.engine = Path(engine)
        self.skipped_: list[str] = []
        self._embed_text = embed_text
        self._tau = tau
        self._recommended = recommended or {}

    @classmethod
    def from_pretrained(
        cls,
        model: str = "demo",
        pretrained: str | Path | None = None,
        adapter: str | Path | None = "auto",
        runtime: str = "auto",
        precision: str = "fp32",
        engine: str | Path | None = None,
    ) -> Classifier:
        """An unfitted classifier on a CLIP: `model` and `pretrained` as in `iosr_fast.offline.clip.load_clip`.

        `adapter` is a file of tools/train_adapter.py, None for none; "auto" takes the shipped one for the demo's CLIP.
        The engine is built once and kept in the user's cache folder; `engine` names a folder of tools/build_engine.py
        instead. Needs the `train` extra (torch, open_clip) for the text encoder; a saved classifier does not.
        """
        from iosr_fast.offline.pretrained import open_pretrained

        opened = open_pretrained(model, pretrained, adapter, runtime, precision, engine)
        return cls(opened.encoder, opened.engine, opened.embed_text, opened.tau, opened.recommended)

    def fit(
        self,
        images: Any = None,
        labels: Sequence[Any] | np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        method: str = "tip-adapter++",
        alpha: float | None = None,
        beta: float | None = None,
        views: int = 10,
        mirror: bool = True,
        seed: int = 0,
        skip_bad: bool = False,
        key_precision: Precision = "fp32",
    ) -> Classifier:
        """Encode the support images and class names and compile `method`; nothing is trained.

        alpha and beta default to what is recommended for the CLIP (the demo's, chosen on its validation concepts) or
        else to the method's own. `labels` are class names, or integers into `class_names` (which is then required).
        `templates` are prompts with `{}` for the name. `views` random views of each image (mirrored half of the time
        with `mirror`: switch it off where left and right matter) are averaged into its key; `views=1` takes the image
        as it is. For "zero-shot" images may be left out. `skip_bad` leaves unreadable images out (`skipped_`) instead
        of refusing them. `key_precision` stores the keys in "fp16", "bf16" or "int8" for scoring: less memory, and
        faster where there are many keys.

        Raises ValueError, before anything is encoded, for fewer than two classes, duplicate class names, labels
        without a name, classes without an image, unreadable images or an unknown method, parameter or precision.
        """
        if key_precision not in PRECISIONS:
            raise ValueError(f"expected a key_precision of {', '.join(PRECISIONS)}, got {key_precision!r}")
        parameters = check_parameters(method, alpha=alpha, beta=beta)
        recommended = {key: value for key, value in self._recommended.items() if key in METHODS[method].parameters}
        if views < 1:
            raise ValueError(f"expected views of at least 1, got {views}")
        if self._embed_text is None:
            raise ValueError(
                "this classifier was loaded and has no text encoder; from_pretrained makes one that can be fit"
            )
        given = [] if images is None else as_image_list(images)
        names, ids = _check_labels(given, labels, class_names)
        given, ids, self.skipped_ = _leave_out_bad(given, ids, skip_bad)
        if METHODS[method].needs_support:
            empty = [names[c] for c in np.flatnonzero(np.bincount(ids, minlength=len(names)) == 0)]
            if empty:
                raise ValueError(f"{method} needs at least one image of each class, got none of {_some(empty)}")
        text = self._embed_text(names, templates)
        if len(given):
            embeddings = encode_support(self.encoder, given, views, mirror, np.random.default_rng(seed))
        else:
            nothing = np.zeros((0, self.encoder.width), np.float32)
            embeddings = Embeddings(nothing, nothing)
        support = make_support_set(embeddings, ids, text, self._tau)
        self._set(names, method, {**recommended, **parameters}, support, key_precision)
        return self

    def fit_folder(self, folder: str | Path, **options: Any) -> Classifier:
        """`fit` on a folder with one sub-folder of images a class, named as the class (underscores read as spaces)."""
        paths, names, classes = list_folder(folder)
        spoken = {name: name.replace("_", " ") for name in classes}
        return self.fit(paths, [spoken[n] for n in names], class_names=[spoken[n] for n in classes], **options)

    def decision_function(self, images: Any, impl: str = "auto") -> np.ndarray:
        """Logits (B, C) float32, of any number of images, encoded in chunks."""
        plan = self._fitted()
        parts = [score(plan, self.encoder.encode(pixels), impl) for pixels in self._chunks(images)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes_)), np.float32)

    def predict(self, images: Any) -> np.ndarray:
        """Class names (B,). Raises BadImageError for an image that can't be read."""
        best = self.decision_function(images).argmax(1)
        names: np.ndarray = self.classes_[best]
        return names

    def predict_proba(self, images: Any) -> np.ndarray:
        """softmax of the logits, (B, C) float32."""
        logits = self.decision_function(images)
        powers = np.exp(logits - logits.max(1, keepdims=True)) if len(logits) else logits
        probabilities: np.ndarray = powers / powers.sum(1, keepdims=True)
        return probabilities

    def score(self, images: Any, labels: Sequence[Any] | np.ndarray) -> float:
        """The share of images whose predicted class is their label (names, or integers into `classes_`)."""
        given = as_image_list(images)
        self._fitted()
        _, ids = _check_labels(given, labels, self.classes_.tolist())
        if not len(ids):
            raise ValueError("expected at least one image to score, got none")
        return float((self.decision_function(given).argmax(1) == ids).mean())

    def save(self, folder: str | Path) -> None:
        """Write everything `load` needs, engine included, to `folder`: whole or not at all."""
        self._fitted()
        bundle = Bundle(
            self.classes_.tolist(),
            self.method_,
            self.parameters_,
            self.support_,
            self.encoder.fingerprint,
            self.engine,
            self.key_precision_,
        )
        save_bundle(bundle, folder)

    @classmethod
    def load(cls, folder: str | Path, runtime: str = "auto", verify: bool = True) -> Classifier:
        """A fitted classifier from `save`. Checks every file's hash (unless `verify` is False); needs no torch."""
        from iosr_fast.runtimes import open_engine

        bundle = load_bundle(folder, verify)
        encoder = open_engine(bundle.engine, runtime=runtime, verify=False)
        if encoder.fingerprint != bundle.encoder_fingerprint:
            raise ValueError(
                f"the engine in {bundle.engine} is of another export: the support set was encoded with "
                f"{bundle.encoder_fingerprint[:12]}, the engine is {encoder.fingerprint[:12]}; fit and save again"
            )
        classifier = cls(encoder, bundle.engine, tau=bundle.support.tau)
        classifier._set(
            bundle.class_names, bundle.method, dict(bundle.parameters), bundle.support, bundle.key_precision
        )
        return classifier

    def _set(
        self, names: list[str], method: str, parameters: dict[str, float], support: SupportSet, key_precision: Precision
    ) -> None:
        plan = compile_method(method, support, **parameters)
        self.plan_ = plan if plan.keys is None else plan.with_key_precision(key_precision)
        self.key_precision_ = key_precision
        self.classes_ = np.array(names)
        self.support_, self.method_ = support, method
        self.parameters_ = {**METHODS[method].parameters, **parameters}

    def _fitted(self) -> ScoringPlan:
        if not hasattr(self, "plan_"):
            raise ValueError("this classifier is not fitted yet: call fit or fit_folder first")
        return self.plan_

    def _chunks(self, images: Any) -> Iterator[np.ndarray]:
        # A batch array stays one: pixels of the right size then reach the encoder without being touched.
        batched = isinstance(images, np.ndarray) and images.ndim == 4
        listed = images if batched else as_image_list(images)
        for start in range(0, len(listed), _CHUNK):
            try:
                yield to_pixels(listed[start : start + _CHUNK], self.encoder.image_size)
            except BadImageError as error:
                raise error.moved(start) from error.__cause__


def _some(values: Sequence[str]) -> str:
    shown = ", ".join(repr(value) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown} and {len(values) - 5} more"


def _check_labels(
    images: Sequence[Any], labels: Any, class_names: Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    """The class names and each image's class id."""
    given = np.asarray([] if labels is None else labels)
    if given.shape != (len(images),):
        raise ValueError(f"expected one label for each of {len(images)} images, got labels of shape {given.shape}")
    if len(given) and given.dtype.kind not in "iuUS":
        raise ValueError(f"expected labels to be class names or integers, got {given.dtype}")
    numbered = given.dtype.kind in "iu"
    if class_names is None:
        if not len(given):
            raise ValueError("expected labelled images or class_names, got neither: without them there are no classes")
        if numbered:
            raise ValueError("integer labels have no names: pass class_names, the name of each class in order")
        class_names = sorted(set(given.tolist()))
    names = [str(name) for name in class_names]
    if len(names) < 2:
        raise ValueError(f"expected at least two classes to tell apart, got {len(names)}: {names}")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"expected class names to differ, got {_some(twice)} more than once")
    if not len(given):
        return names, np.zeros(0, np.int64)
    if numbered:
        outside = sorted({str(i) for i in given.tolist() if not 0 <= i < len(names)})
        if outside:
            raise ValueError(f"expected labels in 0..{len(names) - 1}, one for each class name, got {_some(outside)}")
        return names, given.astype(np.int64)
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({name for name in given.tolist() if name not in index})
    if unknown:
        raise ValueError(f"the labels {_some(unknown)} are not among the {len(names)} class names")
    return names, np.array([index[name] for name in given.tolist()])


def _leave_out_bad(
    images: Sequence[Any], ids: np.ndarray, skip_bad: bool
) -> tuple[Sequence[Any], np.ndarray, list[str]]:
    """Decode everything once before any work starts; unreadable images are left out or refused, all of them by name."""
    bad = find_bad(images)
    if not bad:
        return images, ids, []
    if not skip_bad:
        if len(bad) == 1:
            raise next(iter(bad.values()))
        shown = "; ".join(str(error) for error in list(bad.values())[:5])
        raise ValueError(f"{len(bad)} of {len(images)} images can't be read (skip_bad leaves them out): {shown}")
    for error in bad.values():
        logger.warning("left out: %s", error)
    kept = [i for i in range(len(images)) if i not in bad]
    return [images[i] for i in kept], ids[kept], [error.where for error in bad.values()]
