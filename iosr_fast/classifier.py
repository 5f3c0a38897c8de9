"""Classifier: class names and a few images in, labels out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.fit import Fit, check_fit, fit
from iosr_fast.head.labelled_images import labelled_images, unknown_folder
from iosr_fast.head.labels import label_sets, read_label_sets
from iosr_fast.head.multi_label import decision, probabilities
from iosr_fast.head.predictions import Prediction, predict, predict_jointly
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.methods.tuning.tune import TUNE_SECONDS
from iosr_fast.methods.unknown import KEEP, check_unknown
from iosr_fast.pipeline.many_images import ManyImages
from iosr_fast.scoring.precision import Precision
from iosr_fast.store.optimizing import Optimizing
from iosr_fast.store.saving import Saving
from iosr_fast.utils.estimator import Estimator
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.ranking import mean_average_precision

log = logging.getLogger(__name__)

# The parameters that choose what is opened; the others are those of a fit.
OPENING = ("model", "pretrained", "adapter", "runtime", "precision", "engine")


class Classifier(Optimizing, ManyImages, Saving, Estimator):
    """A few-shot image classifier on a CLIP, and an estimator of scikit-learn. Nothing is trained.

    Images are paths, encoded bytes, PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W) or (H, W, 3): one, a
    sequence, a pandas Series or an array of them (iosr_fast.images.pixels has the rules by which they become RGB).

    Parameters
    ----------
    model : str, default=None
        A model of open_clip, like "ViT-B-32", or "demo", a toy CLIP for trying out. None is "demo", with a warning.
    pretrained : str or Path, default=None
        A tag of open_clip ("laion2b_s34b_b79k", downloaded once), a weights file, or "none" for random weights.
    adapter : str, Path or None, default="auto"
        A file of `iosr-fast train-adapter`; None for no adapter; "auto" is the shipped one, which only the demo has.
    runtime : str, default="auto"
        "onnxruntime", "openvino", "torch", "tensorrt" or "tensorrt_rtx".
    precision : {"auto", "fp32", "fp16", "bf16", "int8", "fp8"}, default="fp32"
        Precision of the image encoder. "auto" fits in fp32, then changes to the fastest engine that keeps the accuracy
        (`optimize`). It costs seconds and a second encoding, which cross-validation would pay for each fold.
    engine : str or Path, default=None
        A folder of `iosr-fast build-engine`. None builds an engine once and keeps it in the user's cache folder.
    method : str, default="auto"
        A name of `iosr_fast.methods.METHODS`; "++" compares adapted embeddings. "auto" is the stack, with weights
        by leave-one-out on the support images, unless a single method is right more often on them by more than noise.
    reducer : str, default=None
        "none", "centre", "pca" or "pca:64", applied before images are compared. None is "none". "auto" and "stack"
        take none.
    tune : str, default=None
        "loo" searches the method's parameters, "none" takes its defaults. None: "loo" unless a parameter is given.
    tune_seconds : float, default=20
        Budget of the search of "auto" and "stack" on one core, in seconds; counted in operations, so that the same
        images give the same choice everywhere.
    alpha, beta, gamma, ridge : float, default=None
        Parameters of the method, as far as it has them. None: searched, or the method's default.
    views : int, default=1
        1: the key of a support image is the embedding of the image as it is. More: the mean of that many random views.
    mirror : bool, default=True
        Whether half of the views are mirrored. Use False where left and right matter.
    templates : sequence of str, default=None
        Prompts with {} for the class name. None: those of the CLIP.
    class_names : sequence of str, default=None
        The names that integer labels index, where `fit` is given none: scikit-learn's `cross_val_predict` with
        method="predict_proba" turns names into integers, sorted(set(labels)), before it fits.
    seed : int, default=0
        Seed of the views. A view depends on the pixels of its image and the seed, not on the order of images.
    key_precision : {"fp32", "fp16", "bf16", "int8"}, default="fp32"
        How the keys are stored for scoring.
    thumbnails : int, default=96
        Longer side in pixels of the stored picture of a support image. 0 stores none.
    exif_orientation : bool, default=True
        Whether support images and queries are turned upright by their EXIF data.
    skip_bad : bool, default=False
        Whether `fit` leaves unreadable support images out (`skipped_`) instead of refusing them.
    progress : bool, default=False
        Whether to show bars on stderr if that is a terminal.

    Attributes
    ----------
    classes_ : array of shape (C,)
        Class names, in the order of `class_names` or sorted; integers if the labels were integers.
    plan_ : ScoringPlan
        What is executed.
    support_ : SupportSet
        The embeddings of the support images and class names.
    method_, reducer_, key_precision_, parameters_
        The choices made or given.
    tuned_ : Tuned or None
        The search that chose the parameters; None if nothing was searched.
    multi_label_ : MultiLabels or None
        After a fit with several labels a picture, `labels` (N, C) bool of the support images and `thresholds` (C,).
    skipped_ : list of str
        The unreadable images that `skip_bad` left out.
    engine_choice_ : EngineChoice or None
        The engines that were tried, what was measured of each, and why it was not chosen.
    encoder, engine_
        The image encoder and its folder.

    Notes
    -----
    The constructor stores its parameters; `fit` checks them and opens the CLIP, which needs the extra `cpu` or `gpu`.
    Classifiers of one process share a CLIP; beside those in use, only the one opened last stays in memory. A saved
    classifier needs no torch. After `set_params`, a fitted classifier predicts as before until the next `fit`. Any
    number of threads may classify while others change classes and examples. `tune` is also a method; the parameter is
    read by `get_params()["tune"]`.

    Sources: CLIP (Radford et al., ICML 2021); the adapter (Kravets & Namboodiri, BMVC 2024); `iosr_fast.methods` names
    the paper of each method.

    Examples
    --------
    >>> from iosr_fast import Classifier
    >>> from iosr_fast.clip.demo.pictures import load_pictures
    >>> pictures = load_pictures("held-out", min_styles=5)
    >>> images, labels = pictures.images[:18], [pictures.names[c] for c in pictures.concepts[:18]]
    >>> classifier = Classifier("demo", method="tip-adapter++", alpha=100, beta=20).fit(images, labels)
    >>> classifier
    Classifier(model='demo', method='tip-adapter++', alpha=100, beta=20)
    >>> classifier.predict(images[:1]).tolist() == labels[:1]
    True
    >>> [best] = classifier.explain(images[0])  # what texts and what images contribute to the logit
    >>> best.label == labels[0] and abs(best.logit - best.zero_shot - best.cache) < 1e-3
    True

    A saved classifier, another class, and a folder:

    >>> import pathlib, tempfile, PIL.Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> classifier.save(folder / "classifier")
    >>> loaded = Classifier.load(folder / "classifier")
    >>> loaded.score(images, labels) == classifier.score(images, labels)
    True
    >>> loaded.add_class("night", [images[0] // 9]).class_id
    '~3'
    >>> PIL.Image.fromarray(images[0] // 9).save(folder / "a.png")
    >>> loaded.predict_folder(folder).labels.tolist()
    ['night']
    """

    _stored_as: ClassVar[dict[str, str]] = {"tune": "_tune"}
    _shared: ClassVar[tuple[str, ...]] = ("_fit", "_own")

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | Path | None = None,
        adapter: str | Path | None = "auto",
        *,
        runtime: str = "auto",
        precision: str = "fp32",
        engine: str | Path | None = None,
        method: str = "auto",
        reducer: str | None = None,
        tune: Literal["loo", "none"] | None = None,
        tune_seconds: float = TUNE_SECONDS,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        ridge: float | None = None,
        views: int = 1,
        mirror: bool = True,
        templates: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        key_precision: Precision = "fp32",
        thumbnails: int = 96,
        exif_orientation: bool = True,
        skip_bad: bool = False,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.pretrained, self.adapter = model, pretrained, adapter
        self.runtime, self.precision, self.engine = runtime, precision, engine
        self.method, self.reducer, self._tune, self.tune_seconds = method, reducer, tune, tune_seconds
        self.alpha, self.beta, self.gamma, self.ridge = alpha, beta, gamma, ridge
        self.views, self.mirror, self.templates, self.seed = views, mirror, templates, seed
        self.class_names = class_names
        self.key_precision, self.thumbnails, self.exif_orientation = key_precision, thumbnails, exif_orientation
        self.skip_bad, self.progress = skip_bad, progress
        self._own: tuple[dict[str, Any], OpenedClip] | None = None

    def fit(
        self,
        images: Any = None,
        labels: Sequence[Any] | np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        *,
        unknown_images: Any = None,
    ) -> Self:
        """Encode the support images and class names, and compile the method.

        `labels` are class names, or integers into `class_names`, which are then required, here or as a parameter,
        because CLIP reads names: `classes_`, `predict` and `score` then speak in integers, too. A class keeps its
        integer whatever classes are added or removed, and a new one gets the next; `explain` and `predict_folder` give
        names. For "zero-shot" images may be left out. Copies of a picture within a class are warned of.

        Where pictures may have several labels each, `labels` are sets (or lists, or tuples) of class names, of which
        some may be empty, or an indicator (N, C) of 0 and 1 with `class_names`. Each class is then judged by itself
        (methods.multi_label.fit_multi_label); `predict` answers in the form of `labels`, and classes and examples stay
        as they are until the next fit.

        `unknown_images` are pictures of none of the classes, if you have any, like those that will come: they sharpen
        `unknown_score`, which needs none, and change no label. Their embeddings are kept with the classifier.

        Raises IosrFastError, before a CLIP is opened, for a parameter out of range, parameters given where they are to
        be chosen, fewer than two classes, class names that are none or look alike, missing labels or labels without a
        name, and classes without an image; before anything is encoded, for a CLIP, engine, adapter or runtime that
        don't fit; for unreadable images, and for one picture (its pixels, whatever the file) under two labels.
        OSError for missing files and failed downloads, ImportError for a missing package. The classifier is then as it
        was.
        """
        names = self.class_names if class_names is None else class_names
        inputs = check_fit(self.get_params(), images, labels, names, unknown_images)
        fitted = fit(self._open(), inputs)
        if self.precision == "auto" and fitted.head.multi_label is not None:
            log.warning("precision='auto' compares single labels: with several labels a picture it stays fp32")
        elif self.precision == "auto":
            fitted = self._with_best_engine(fitted, inputs)
        self._replace(fitted)
        return self

    def fit_folder(
        self,
        folder: str | Path,
        *more: str | Path,
        unknown_images: str | Path | None = None,
    ) -> Self:
        """`fit` on a folder with one sub-folder of images a class, named as the class (underscores read as spaces), or
        on a CSV file of path and label, or on several of both (labelled_images). With the column `labels` in place of
        `label` pictures may have several, joined by ";", or none. All images in the folder
        `unknown_images` and below belong to none of the classes."""
        unknown = None if unknown_images is None else unknown_folder(unknown_images)
        return self.fit(*labelled_images(folder, *more), unknown_images=unknown)

    @property
    def encoder(self) -> Encoder:
        """The image encoder of queries, without adapted embeddings where the fitted method compares none.

        Before a fit, the encoder of the parameters, which is opened now.
        """
        return self._open().encoder if self._fit is None else self._fit.encoder

    @property
    def engine_(self) -> Path:
        """The folder that `encoder` was opened from."""
        return self._fitted().clip.engine

    def _open(self) -> OpenedClip:
        """The CLIP that the parameters name. A loaded classifier has its own, until `set_params` names another."""
        named = {name: getattr(self, name) for name in OPENING}
        if self._own is not None and self._own[0] == named:
            return self._own[1]
        from iosr_fast.export.pretrained import open_shared

        return open_shared(**named, shown=bool(self.progress))

    @classmethod
    def _with_clip(cls, clip: OpenedClip, **parameters: Any) -> Self:
        """A classifier on an opened CLIP, whatever `parameters` name."""
        classifier = cls(**parameters)
        classifier._own = {name: getattr(classifier, name) for name in OPENING}, clip
        return classifier

    def decision_function(self, images: Any, impl: str = "auto") -> np.ndarray:
        """Logits (B, C) float32; of two classes (B,), the second one's logit minus the first one's. With several labels
        a picture always (B, C), each class by itself."""
        fit = self._fitted()
        return decision(self._logits(fit, images, impl), fit.head.multi_label is not None)

    def predict(
        self,
        images: Any,
        unknown: Literal["reject"] | None = None,
        unknown_label: str | None = None,
        keep: float = KEEP,
    ) -> np.ndarray:
        """The labels (B,) out of `classes_`. Raises BadImageError for an image that can't be read.

        unknown="reject" gives None, or `unknown_label`, for pictures that belong to none of the classes, as far as
        `unknown_score` tells: a share `keep` of the pictures that do belong to one keeps its label. Raises
        IosrFastError where there are too few support images for that promise: 0.95 takes 19 that can be left out.

        With several labels a picture: a frozenset of labels for each, (B,) of dtype object, or an indicator (B, C) of
        int64 if the labels of `fit` were one. A label is in where its probability reaches the threshold of its class.
        """
        share = check_unknown(unknown, keep, unknown_label)
        fit = self._fitted()
        if fit.head.multi_label is not None:
            if share is not None:
                fit.head.one_label("predict(unknown='reject')", "a picture of none of the classes gets no label")
            members = fit.head.multi_label.members(self._logits(fit, images))
            return members.astype(np.int64) if fit.integer_labels else label_sets(fit.labels(), members)
        if share is not None:
            return self._labels_or_rejected(fit, images, share, unknown_label)
        return fit.labels(self._logits(fit, images).argmax(1))

    def predict_proba(self, images: Any) -> np.ndarray:
        """softmax of the logits, (B, C) float32, columns in the order of `classes_`. With several labels a picture the
        probability of each class by itself, 1 / (1 + exp(-logit)): the sum of a row is any number up to C."""
        fit = self._fitted()
        return probabilities(self._logits(fit, images), fit.head.multi_label is not None)

    def predict_jointly(self, images: Any) -> JointPrediction:
        """Probabilities (B, C) of images that are classified together: means and covariance of the classes are
        estimated on support images and these images (methods.joint.predict_jointly), which gains most with few shots
        and many images. The result's `labels` are out of `classes_`.

        Support images are left out and hidden among these images: if fewer of them are right than alone, or if none
        can be left out, `predict_proba`'s probabilities are returned and the result's `refused` says why.

        Raises BadImageError for an image that can't be read.
        """
        fit = self._fitted()
        fit.head.one_label("predict_jointly")
        parts = [fit.encoder.encode(pixels) for pixels in self._chunks(fit, images)]
        queries = Embeddings.concatenate(parts) if parts else fit.head.examples.embeddings[:0]
        return replace(predict_jointly(fit.head, queries), classes=fit.labels())

    def explain(
        self,
        images: Any,
        top: int = 5,
        nearest: int = 0,
        unknown: Literal["reject"] | None = None,
        keep: float = KEEP,
    ) -> list[Prediction]:
        """A Prediction for each image: label and probability, the `top` classes with what texts, examples and their
        adapted embeddings contribute to each, and the `nearest` support images. All of one version of the classifier.

        unknown="reject" and `keep` are those of `predict`: `unknown` of a Prediction then has the score, and `label`
        is None if the picture belongs to none of the classes.
        """
        share = check_unknown(unknown, keep)
        top, nearest = check_integer("top", top, 1), check_integer("nearest", nearest, 0)
        fit = self._fitted()
        fit.head.one_label("explain", "predict_proba gives the probability of each class")
        if share is not None:
            fit.head.unknown.threshold(share)  # too few support images: before anything is encoded
        rows = (fit.encoder.encode_on_device(pixels) for pixels in self._chunks(fit, images))
        return [prediction for chunk in rows for prediction in predict(fit.head, chunk, top, nearest, share)]

    def score(self, images: Any, labels: Sequence[Any] | np.ndarray) -> float:
        """The share of images whose predicted class is their label: a class name; or an integer as at the fit, into
        `classes_` if the fit had names.

        With several labels a picture the mean average precision over the classes that a picture has
        (utils.ranking.mean_average_precision), with labels as for `fit`."""
        fit, listed = self._fitted(), as_image_list(images)
        if fit.head.multi_label is not None:
            _, known = read_label_sets(labels, len(listed), fit.head.class_names)
            return mean_average_precision(known, self._logits(fit, listed))
        ids = fit.class_ids(listed, labels)
        if not len(ids):
            raise IosrFastError("expected at least one image to score, got none")
        return float((self._logits(fit, listed).argmax(1) == ids).mean())

    def _logits(self, fit: Fit, images: Any, impl: str = "auto") -> np.ndarray:
        parts = [fit.head.score(fit.encoder.encode_on_device(pixels), impl) for pixels in self._chunks(fit, images)]
        return np.concatenate(parts) if parts else np.zeros((0, len(fit.head.uids)), np.float32)
