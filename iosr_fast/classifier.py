"""Classifier: class names and a handful of pictures in, labels out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iosr_fast.auto import tune_auto
from iosr_fast.bundle import Bundle, load_bundle, save_bundle
from iosr_fast.cache import SupportSet, encode_support, make_support_set
from iosr_fast.encoder import Embeddings, Encoder
from iosr_fast.labels import check_labels, leave_out_bad, some
from iosr_fast.methods import METHODS, check_parameters
from iosr_fast.precision import PRECISIONS, Precision
from iosr_fast.preprocess import BadImageError, as_image_list, list_folder, to_pixels
from iosr_fast.reducers import check_reducer
from iosr_fast.scoring import ScoringPlan, score
from iosr_fast.tune import Tuned, tune

TextEmbedder = Callable[[Sequence[str], "Sequence[str] | None"], np.ndarray]
_CHUNK = 256


class Classifier:
    """A few-shot image classifier in scikit-learn's manner: fit, predict, predict_proba, score, classes_.

    Make one with `from_pretrained` (then `fit` or `fit_folder`) or `load` (ready to predict). Images are paths, PIL
    images or uint8 arrays (H, W, 3), one or a sequence of them, or one uint8 array (B, H, W, 3).

    After fitting: `classes_` (C,) the class names; `plan_`, what the kernels execute; `support_`, the encoded support
    set; `method_`, `reducer_` and `parameters_`; `tuned_`, how they were chosen, or None where they were given or
    loaded; `key_precision_`; `skipped_`, the unreadable images that `skip_bad` left out.
    """

    classes_: np.ndarray
    plan_: ScoringPlan
    support_: SupportSet
    method_: str
    reducer_: str
    tuned_: Tuned | None
    parameters_: dict[str, float]
    key_precision_: Precision

    def __init__(
        self,
        encoder: Encoder,
        engine: Path,
        embed_text: TextEmbedder | None = None,
        tau: float = 100.0,
    ) -> None:
        self.encoder = encoder
        self.engine = Path(engine)
        self.skipped_: list[str] = []
        self._embed_text = embed_text
        self._tau = tau

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
        return cls(opened.encoder, opened.engine, opened.embed_text, opened.tau)

    def fit(
        self,
        images: Any = None,
        labels: Sequence[Any] | np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        method: str = "auto",
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        ridge: float | None = None,
        reducer: str | None = None,
        tune: Literal["loo", "loo-single", "none"] | None = None,
        views: int = 10,
        mirror: bool = True,
        seed: int = 0,
        skip_bad: bool = False,
        key_precision: Precision = "fp32",
    ) -> Classifier:
        """Encode the support images and class names and compile a method; nothing is trained.

        `method` is one of `iosr_fast.methods.METHODS` ("++" compares adapted embeddings), or "auto", which chooses it,
        its `reducer` ("none", "centre", "pca" or "pca:64") and all parameters by leave-one-out on the support set
        (auto.tune_auto). A named method's parameters are those given (alpha, beta, gamma, ridge, as far as it has
        them) over its defaults; where none is given they are chosen by leave-one-out as well. `tune` says so expressly:
        "loo", "loo-single" (tune.tune) or "none".

        `labels` are class names, or integers into `class_names` (which is then required). `templates` are prompts with
        `{}` for the name. `views` random views of each image (mirrored half of the time with `mirror`: switch it off
        where left and right matter) are averaged into its key; `views=1` takes the image as it is. For "zero-shot"
        images may be left out. `skip_bad` leaves unreadable images out (`skipped_`) instead of refusing them.
        `key_precision` stores the keys in "fp16", "bf16" or "int8" for scoring: less memory, and faster where there are
        many keys.

        Raises ValueError, before anything is encoded, for fewer than two classes, duplicate class names, labels
        without a name, classes without an image, unreadable images or an unknown method, parameter, reducer or
        precision, and for parameters given where they are to be chosen.
        """
        if key_precision not in PRECISIONS:
            raise ValueError(f"expected a key_precision of {', '.join(PRECISIONS)}, got {key_precision!r}")
        parameters = _check_choice(method, reducer, tune, alpha=alpha, beta=beta, gamma=gamma, ridge=ridge)
        if views < 1:
            raise ValueError(f"expected views of at least 1, got {views}")
        if self._embed_text is None:
            raise ValueError(
                "this classifier was loaded and has no text encoder; from_pretrained makes one that can be fit"
            )
        given = [] if images is None else as_image_list(images)
        names, ids = check_labels(given, labels, class_names)
        given, ids, self.skipped_ = leave_out_bad(given, ids, skip_bad)
        if method == "auto" or METHODS[method].needs_support:
            empty = [names[c] for c in np.flatnonzero(np.bincount(ids, minlength=len(names)) == 0)]
            if empty:
                raise ValueError(f"{method} needs at least one image of each class, got none of {some(empty)}")
        if method != "auto" and METHODS[method].needs_adapter and not self.encoder.adapted:
            raise ValueError(f"{method} needs an encoder with an adapter; this one has none: use {method[:-2]!r}")
        searched = method == "auto" or tune in ("loo", "loo-single") or (tune is None and not parameters)
        text = self._embed_text(names, templates)
        rng = np.random.default_rng(seed)
        queries = None
        if len(given):
            embeddings = encode_support(self.encoder, given, views, mirror, rng)
            if searched and views > 1:  # what is asked later is one view, so that is what leave-one-out has to ask
                queries = encode_support(self.encoder, given, 1, mirror, rng)
        else:
            nothing = np.zeros((0, self.encoder.width), np.float32)
            embeddings = Embeddings(nothing, nothing)
        support = make_support_set(embeddings, ids, text, self._tau, queries=queries)
        if searched and len(given):
            self._set(names, _search(method, support, reducer, tune), support, key_precision)
        else:
            chosen = Tuned(
                method, reducer or "none", {**METHODS[method].parameters, **parameters}, float("nan"), 0, "none"
            )
            self._set(names, chosen, support, key_precision)
        return self

    def tune(
        self,
        images: Any = None,
        labels: Sequence[Any] | np.ndarray | None = None,
        method: str | None = None,
        reducer: str | None = None,
    ) -> Tuned:
        """Choose the parameters again: on labelled validation images, or without any by leave-one-out.

        `method` defaults to the one that was fitted; "auto" chooses among all. `labels` as for `score`. Returns what
        was chosen and why (also `tuned_`). Raises ValueError as `fit` and `score` do, before anything is encoded.
        """
        self._fitted()
        method = self.method_ if method is None else method
        _check_choice(method, reducer, None)
        if (images is None) != (labels is None):
            raise ValueError("expected validation images and their labels together, got one without the other")
        queries, ids = None, None
        if images is not None:
            given = as_image_list(images)
            _, ids = check_labels(given, labels, self.classes_.tolist())
            queries = encode_support(self.encoder, given, 1, False, np.random.default_rng(0))
        reducer = self.reducer_ if reducer is None and method == self.method_ else reducer
        tuned = _search(method, self.support_, reducer, None, queries, ids)
        self._set(self.classes_.tolist(), tuned, self.support_, self.key_precision_)
        return tuned

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
        _, ids = check_labels(given, labels, self.classes_.tolist())
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
            self.reducer_,
            self._factor,
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
        given = Tuned(
            bundle.method, bundle.reducer, dict(bundle.parameters), float("nan"), 0, "none", factor=bundle.factor
        )
        classifier._set(bundle.class_names, given, bundle.support, bundle.key_precision)
        return classifier

    def _set(self, names: list[str], chosen: Tuned, support: SupportSet, key_precision: Precision) -> None:
        plan = chosen.compile(support)
        self.plan_ = plan if plan.keys is None else plan.with_key_precision(key_precision)
        self.key_precision_ = key_precision
        self.classes_ = np.array(names)
        self.support_, self.method_, self.reducer_ = support, chosen.method, chosen.reducer
        self.parameters_, self._factor = dict(chosen.parameters), chosen.factor
        self.tuned_ = None if chosen.protocol == "none" else chosen

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


def _check_choice(method: str, reducer: str | None, tuning: str | None, **parameters: float | None) -> dict[str, float]:
    """The parameters that are given. Raises ValueError where they, method, reducer and tuning don't go together."""
    if reducer is not None:
        check_reducer(reducer)
    if tuning not in (None, "loo", "loo-single", "none"):
        raise ValueError(f"expected tune to be 'loo', 'loo-single' or 'none', got {tuning!r}")
    if method != "auto":
        given = check_parameters(method, **parameters)
        if given and tuning in ("loo", "loo-single"):
            raise ValueError(f"expected parameters or tune={tuning!r}, got both; leave {', '.join(given)} out")
        return given
    named = [name for name, value in {**parameters, "reducer": reducer}.items() if value is not None]
    if named or tuning not in (None, "loo"):
        told = ", ".join(named) or f"tune={tuning!r}"
        raise ValueError(f"method 'auto' chooses by leave-one-out: leave {told} out, or name a method")
    return {}


def _search(
    method: str,
    support: SupportSet,
    reducer: str | None,
    tuning: str | None,
    queries: Embeddings | None = None,
    ids: np.ndarray | None = None,
) -> Tuned:
    if method == "auto":
        return tune_auto(support, queries, ids)
    protocol: Literal["loo", "loo-single"] = "loo-single" if tuning == "loo-single" else "loo"
    return tune(method, support, queries, ids, protocol, reducer or "none")
