"""Classifier: class names and a few images in, labels out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.text_encoder import TextSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.preprocess import as_image_list
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.tune import check_choice
from iosr_fast.pipeline.folder import FolderPredictions, predict_folder
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import Precision
from iosr_fast.scoring.validation import check_number
from iosr_fast.state.bundle import Bundle, load_bundle, save_bundle
from iosr_fast.state.fit import fit
from iosr_fast.state.labels import class_ids, labelled_images
from iosr_fast.state.predictions import Prediction, predict, softmax
from iosr_fast.state.support_images import check_support
from iosr_fast.state.updates import LiveUpdates
from iosr_fast.utils.verified_folder import VerifiedFolder

log = logging.getLogger(__name__)


class Classifier(LiveUpdates):
    """A few-shot image classifier in scikit-learn's manner: fit, predict, predict_proba, score, classes_.

    Make one with `from_pretrained` (then `fit` or `fit_folder`) or `load` (ready to predict). Images are paths, encoded
    bytes, PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W) or (H, W, 3), one or a sequence of them, or one
    array or tensor of a batch; `iosr_fast.images.pixels` has the rules by which they become RGB.

    After fitting: `classes_` (C,) the class names; `plan_`, what the kernels execute; `support_`, the encoded support
    set; `method_`, `reducer_` and `parameters_`; `tuned_`, the search that chose them, None if they were given or
    loaded; `key_precision_`; `skipped_`, the unreadable images that `skip_bad` left out.

    Any number of threads may classify while others change classes and examples (state.updates.LiveUpdates).
    """

    def __init__(
        self,
        encoder: Encoder,
        engine: Path,
        text: TextSource | None = None,
        tau: float = 100.0,
    ) -> None:
        super().__init__(encoder, text)
        self.engine = Path(engine)
        self.skipped_: list[str] = []
        self._tau = check_number("tau, the CLIP's logit scale,", tau, *RANGES["tau"])

    @property
    def classes_(self) -> np.ndarray:
        return np.array(self.snapshot().class_names)

    @property
    def plan_(self) -> ScoringPlan:
        return self.snapshot().whole_plan

    @property
    def support_(self) -> SupportSet:
        return self.snapshot().support

    @property
    def method_(self) -> str:
        return self.snapshot().config.method

    @property
    def reducer_(self) -> str:
        return self.snapshot().config.reducer_name

    @property
    def parameters_(self) -> dict[str, float]:
        return dict(self.snapshot().config.parameters)

    @property
    def key_precision_(self) -> Precision:
        return self.snapshot().config.key_precision

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        pretrained: str | Path | None = None,
        adapter: str | Path | None = "auto",
        runtime: str = "auto",
        precision: str = "fp32",
        engine: str | Path | None = None,
        progress: bool = False,
    ) -> Classifier:
        """An unfitted classifier on a CLIP: `model` and `pretrained` as in `iosr_fast.clip.load.load_clip`.

        Without a `model` it is "demo", a toy for trying out, and a warning says that it is near chance on photographs.
        `adapter` is a file of tools/train_adapter.py, None for none; "auto" takes the shipped one for the demo's CLIP.
        The engine is built once and kept in the user's cache folder; `engine` names a folder of tools/build_engine.py
        instead. `progress` shows a bar on stderr where that is a terminal. Needs the `cpu` extra (torch, open_clip)
        for the text encoder; a saved classifier does not.

        Adapter, engine, runtime, precision and the architecture are checked before a CLIP is downloaded or made.
        Raises ValueError for those that don't fit, OSError for files that are missing and weights that can't be
        downloaded, ImportError for a missing package.
        """
        from iosr_fast.export.pretrained import open_pretrained

        if model is None:
            _warn_of_the_demo()
        opened = open_pretrained(model or "demo", pretrained, adapter, runtime, precision, engine, progress)
        return cls(opened.encoder, opened.engine, opened.text, opened.tau)

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
        tune: Literal["loo", "none"] | None = None,
        views: int = 10,
        mirror: bool = True,
        seed: int = 0,
        skip_bad: bool = False,
        key_precision: Precision = "fp32",
        thumbnails: int = 96,
        exif_orientation: bool = True,
        progress: bool = False,
    ) -> Classifier:
        """Encode the support images and class names and compile a method; nothing is trained.

        `method` is one of `iosr_fast.methods.METHODS` ("++" compares adapted embeddings), or "auto", which chooses it,
        its `reducer` ("none", "centre", "pca" or "pca:64") and all parameters by leave-one-out on the support set
        (tune.tune_auto). A named method's parameters are those given (alpha, beta, gamma, ridge, as far as it has
        them) over its defaults; where none is given they are chosen by leave-one-out as well. `tune` says so expressly:
        "loo" (tune.tune) or "none".

        `labels` are class names, or integers into `class_names` (which is then required). `templates` are prompts with
        `{}` for the name. `views` random views of each image (mirrored half of the time with `mirror`: switch it off
        where left and right matter) are averaged into its key; `views=1` takes the image as it is. For "zero-shot"
        images may be left out. `skip_bad` leaves unreadable images out (`skipped_`) instead of refusing them.
        `key_precision` stores the keys in "fp16", "bf16" or "int8" for scoring: less memory, and faster where there are
        many keys. `thumbnails` is the longer side in pixels of the picture that is kept of each support image, to show
        what a prediction rests on; 0 keeps none. `exif_orientation` turns images upright by EXIF, at this fit and for
        all images that the classifier is given later, loaded from a bundle too; False takes them as they are stored.
        `progress` shows bars on stderr where that is a terminal.

        Raises ValueError, before anything is encoded, for fewer than two classes, class names that are none or look
        alike, missing labels or labels without a name, classes without an image, an unknown method, parameter, reducer
        or precision, and for parameters given where they are to be chosen; for unreadable images, and for one picture
        under two labels (copies of its pixels, whatever the file), after all images are decoded. The classifier is then
        as it was. Copies of a picture within a class are warned of.

        A view is drawn from a hash of the image's pixels and `seed`: the fit does not depend on the order of the
        images, and an image has the same key whether it comes by `fit` or by `add_examples`.
        """
        settings = check_support(views, mirror, templates, key_precision, seed, thumbnails, exif_orientation)
        parameters = check_choice(method, reducer, tune, alpha=alpha, beta=beta, gamma=gamma, ridge=ridge)
        if self._text is None:
            raise IosrFastError(
                "this classifier was loaded and has no text encoder; from_pretrained makes one that can be fit"
            )
        fitted = fit(
            self.encoder,
            self._text,
            self._tau,
            images,
            labels,
            class_names,
            method=method,
            reducer=reducer,
            tune=tune,
            parameters=parameters,
            views=settings,
            key_precision=key_precision,
            skip_bad=skip_bad,
            progress=progress,
        )
        self._replace(fitted.state, fitted.views, fitted.tuned)
        self.skipped_ = fitted.skipped
        return self

    def fit_folder(self, folder: str | Path, **options: Any) -> Classifier:
        """`fit` on a folder with one sub-folder of images a class, named as the class (underscores read as spaces)."""
        paths, labels, names = labelled_images(folder)
        return self.fit(paths, labels, class_names=names, **options)

    def decision_function(self, images: Any, impl: str = "auto") -> np.ndarray:
        """Logits (B, C) float32, of any number of images, encoded in chunks."""
        state = self.snapshot()
        parts = [state.score(self.encoder.encode(pixels), impl) for pixels in self._chunks(images)]
        return np.concatenate(parts) if parts else np.zeros((0, len(state.uids)), np.float32)

    def predict(self, images: Any) -> np.ndarray:
        """Class names (B,). Raises BadImageError for an image that can't be read."""
        return np.array([prediction.label for prediction in self.explain(images, top=1)], dtype=str)

    def predict_proba(self, images: Any) -> np.ndarray:
        """softmax of the logits, (B, C) float32."""
        return softmax(self.decision_function(images))

    def predict_folder(
        self,
        folder: str | Path,
        batch: int | None = None,
        skip_bad: bool = False,
        threads: int | None = None,
        decoder: str = "auto",
    ) -> FolderPredictions:
        """Classify all images in a folder and below, in the order of their paths: paths, labels, probabilities, errors.

        Pictures are decoded while others are encoded, few at a time, so that any number fits; what the folder holds
        beside them is counted in a warning (images.listing). A JPEG 6 times larger than the encoder's pictures is
        decoded at a fraction of its size, which changes its pixels by about 1 level or less on average, and a label
        that was as good as tied; the `decoder` "cpu-exact" gives the pixels of `predict` (images.decoders has all).
        `batch` images are encoded at a time (None: 16 on a CPU, 64 on a GPU); `threads` are the cores to use on a CPU
        (None: all). All is of one state of the classifier.

        Raises FileNotFoundError without the folder, BadImageError for the first unreadable image unless `skip_bad`,
        ValueError for an unknown decoder or numbers below 1, RuntimeError for a decoder that can't run here.
        """
        return predict_folder(
            self.snapshot(),
            self.encoder,
            self.engine,
            folder,
            exif_orientation=self.exif_orientation,
            batch=batch,
            skip_bad=skip_bad,
            threads=threads,
            decoder=decoder,
        )

    def explain(self, images: Any, top: int = 5, nearest: int = 0) -> list[Prediction]:
        """A Prediction for each image: label and probability, the `top` classes with what texts say of each and what
        the examples add, and the `nearest` support images. All of one state of the classifier."""
        state = self.snapshot()
        chunks = (predict(state, self.encoder.encode(pixels), top, nearest) for pixels in self._chunks(images))
        return [prediction for chunk in chunks for prediction in chunk]

    def score(self, images: Any, labels: Sequence[Any] | np.ndarray) -> float:
        """The share of images whose predicted class is their label (names, or integers into `classes_`)."""
        listed = as_image_list(images)
        ids = class_ids(listed, labels, self.snapshot().class_names)
        if not len(ids):
            raise IosrFastError("expected at least one image to score, got none")
        return float((self.decision_function(listed).argmax(1) == ids).mean())

    def save(self, folder: str | Path) -> None:
        """Write everything `load` needs, engine and text encoder included, to `folder`: whole or not at all.

        A crash at any moment leaves what was there before, or this. A CLIP whose text encoder can't be exported is
        saved without it: classes can then be added with `text=` only. Files are compared with the engine's manifest
        while they are copied: ValueError for one that was changed, with nothing written.
        """
        source = self.encoder.source
        bundle = Bundle(self.snapshot(), self._views, self.engine, self.encoder.fingerprint, self._text, source)
        save_bundle(bundle, folder)

    @classmethod
    def load(
        cls,
        folder: str | Path | VerifiedFolder,
        runtime: str = "auto",
        verify: bool = True,
        threads: int | None = None,
        expected_digest: str | None = None,
    ) -> Classifier:
        """A fitted classifier from `save`, whatever writers do to the folder meanwhile; needs no torch.

        Checks every field, every array and every file's hash (hashes not where `verify` is False). `expected_digest`,
        the "sha256:..." that `iosr-fast info FOLDER` prints, pins the content: nothing of another one is read.
        `threads` of the encoders on a CPU; None: one a core. Raises FileNotFoundError or ValueError naming what is
        missing, damaged or foreign, and what open_engine raises.
        """
        from iosr_fast.encoders.runtimes import open_engine

        bundle = load_bundle(folder, verify, threads, expected_digest)
        encoder = open_engine(bundle.files or bundle.engine, runtime=runtime, verify=False, threads=threads)
        classifier = cls(encoder, bundle.engine, bundle.text, bundle.state.tau)
        classifier._replace(bundle.state, bundle.views)
        return classifier


@functools.cache
def _warn_of_the_demo() -> None:
    """Once a process."""
    log.warning(
        "no model was named, so this is the demo's CLIP: a toy that was trained on emoji of 64x64 pixels and is near "
        "chance on photographs. For photographs take a real one, like from_pretrained('ViT-B-32', "
        "'laion2b_s34b_b79k') or from_pretrained('ViT-B-16', 'openai'); from_pretrained('demo') silences this"
    )
