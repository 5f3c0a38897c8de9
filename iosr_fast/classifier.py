"""Classifier: class names and a handful of pictures in, labels out."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iosr_fast.clip.prompts import check_templates
from iosr_fast.encoders.encoder import Embeddings, Encoder
from iosr_fast.encoders.text_encoder import TextSource
from iosr_fast.images.listing import list_folder
from iosr_fast.images.preprocess import BadImageError, as_array, as_image_list, to_pixels
from iosr_fast.methods import METHODS
from iosr_fast.methods.support_set import SupportSet, encode_support
from iosr_fast.methods.tuning.tune import Tuned, check_choice
from iosr_fast.methods.tuning.tune import tune as search
from iosr_fast.pipeline.folder import FolderPredictions, predict_folder
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS, Precision
from iosr_fast.scoring.validation import check_number
from iosr_fast.state.bundle import Bundle, load_bundle, save_bundle
from iosr_fast.state.changes import Change, ChangeResult
from iosr_fast.state.examples import Examples
from iosr_fast.state.labels import check_labels, class_ids, leave_out_bad
from iosr_fast.state.log_writer import AuditLog
from iosr_fast.state.method_config import MethodConfig, fit_config
from iosr_fast.state.predictions import Prediction, predict, softmax
from iosr_fast.state.state import State
from iosr_fast.state.support_images import SupportViews
from iosr_fast.state.updates import LiveUpdates
from iosr_fast.utils.progress import progress as bar
from iosr_fast.utils.text import abbreviate
from iosr_fast.utils.verified_folder import VerifiedFolder

_CHUNK = 256
log = logging.getLogger(__name__)


class Classifier(LiveUpdates):
    """A few-shot image classifier in scikit-learn's manner: fit, predict, predict_proba, score, classes_.

    Make one with `from_pretrained` (then `fit` or `fit_folder`) or `load` (ready to predict). Images are paths, encoded
    bytes, PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W) or (H, W, 3), one or a sequence of them, or one
    array or tensor of a batch; `iosr_fast.images.pixels` has the rules by which they become RGB.

    After fitting: `classes_` (C,) the class names; `plan_`, what the kernels execute; `support_`, the encoded support
    set; `method_`, `reducer_` and `parameters_`; `tuned_`, how they were chosen, or None where they were given or
    loaded; `key_precision_`; `skipped_`, the unreadable images that `skip_bad` left out.

    Any number of threads may classify while others change classes and examples (live.updates.LiveUpdates).
    """

    def __init__(
        self,
        encoder: Encoder,
        engine: Path,
        text: TextSource | None = None,
        tau: float = 100.0,
    ) -> None:
        self.encoder = encoder
        self.engine = Path(engine)
        self.skipped_: list[str] = []
        self.tuned_: Tuned | None = None
        self._text = text
        self._tau = check_number("tau, the CLIP's logit scale,", tau, *RANGES["tau"])
        self._views = SupportViews()
        self._log: AuditLog | None = None
        self._changing = threading.Lock()

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
    def exif_orientation(self) -> bool:
        """Whether images are turned upright by EXIF, as they were at the fit."""
        return self._views.exif_orientation

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
        instead. `progress` shows a bar on stderr where that is a terminal. Needs the `train` extra (torch, open_clip)
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
        alike, missing labels or labels without a name, one picture under two labels (copies of its pixels, whatever
        the file), classes without an image, unreadable images or an unknown method, parameter, reducer or precision,
        and for parameters given where they are to be chosen. Copies of a picture within a class are warned of.
        """
        settings = check_support(views, mirror, templates, key_precision, seed, thumbnails, exif_orientation)
        parameters = check_choice(method, reducer, tune, alpha=alpha, beta=beta, gamma=gamma, ridge=ridge)
        if self._text is None:
            raise ValueError(
                "this classifier was loaded and has no text encoder; from_pretrained makes one that can be fit"
            )
        given = [] if images is None else as_image_list(images)
        names, ids = check_labels(given, labels, class_names)
        with bar("decode", len(given), shown=progress) as step:
            given, ids, self.skipped_ = leave_out_bad(given, ids, skip_bad, names, step)
        if method == "auto" or METHODS[method].needs_support:
            empty = [names[c] for c in np.flatnonzero(np.bincount(ids, minlength=len(names)) == 0)]
            if empty:
                raise ValueError(f"{method} needs at least one image of each class, got none of {abbreviate(empty)}")
        if method != "auto" and METHODS[method].needs_adapter and not self.encoder.adapted:
            raise ValueError(f"{method} needs an encoder with an adapter; this one has none: use {method[:-2]!r}")
        searched = method == "auto" or tune == "loo" or (tune is None and not parameters)
        text = self._text.embed_classes(names, settings.templates)
        rng = np.random.default_rng(seed)
        queries = None
        if len(given):
            single = searched and views > 1  # what is asked later is one view, so that is what leave-one-out has to ask
            with bar("encode", len(given) * (1 + single), shown=progress) as step:
                encode = partial(encode_support, self.encoder, given, exif_orientation=exif_orientation, step=step)
                embeddings = encode(views, mirror, rng)
                if single:
                    queries = encode(1, mirror, rng)
        else:
            nothing = np.zeros((0, self.encoder.width), np.float32)
            embeddings = Embeddings(nothing, nothing)
        examples = Examples(embeddings, ids, np.arange(len(given)), settings.thumbnails(given), queries)
        examples = examples.rows(np.argsort(ids, kind="stable"))
        support = examples.as_support(range(len(names)), text, self._tau)
        if searched and len(given):
            with bar("tune", None, shown=progress):
                chosen = search(method, support, reducer=reducer or "none")
        else:
            parameters = {**METHODS[method].parameters, **parameters}
            chosen = Tuned(method, reducer or "none", parameters, float("nan"), 0, "none")
        config = _config(chosen, key_precision, support)
        state = State.first(names, text, self._tau, examples, config)
        self._replace(state, chosen, replace(settings, single=queries is not None))
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
        state = self.snapshot()
        method = state.config.method if method is None else method
        check_choice(method, reducer, None)
        if (images is None) != (labels is None):
            raise ValueError("expected validation images and their labels together, got one without the other")
        queries, ids = None, None
        if images is not None:
            given = as_image_list(images)
            ids = class_ids(given, labels, state.class_names)
            rng = np.random.default_rng(0)
            queries = encode_support(self.encoder, given, 1, False, rng, exif_orientation=self.exif_orientation)
        reducer = state.config.reducer_name if reducer is None and method == state.config.method else reducer
        with self._changing:
            state = self._same_classes(state)
            tuned = search(method, state.support, queries, ids, reducer or "none")
            self._make(Change("retune", config=_config(tuned, state.config.key_precision)))
            self.tuned_ = tuned
        return tuned

    def retune(self) -> ChangeResult:
        """Choose the parameters of the method again, by leave-one-out on the examples as they are now (`tune`)."""
        with self._changing:
            config = self.snapshot().config
            tuned = search(config.method, self.snapshot().support, reducer=config.reducer_name)
            change = self._make(Change("retune", config=_config(tuned, config.key_precision)))
            self.tuned_ = tuned
        return change

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
        given = as_image_list(images)
        ids = class_ids(given, labels, self.snapshot().class_names)
        if not len(ids):
            raise ValueError("expected at least one image to score, got none")
        return float((self.decision_function(given).argmax(1) == ids).mean())

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
        classifier._replace(bundle.state, None, bundle.views)
        return classifier

    def snapshot(self) -> State:
        """What is classified with now. It never changes: predictions of one snapshot are of one version."""
        if not hasattr(self, "_state"):
            raise ValueError("this classifier is not fitted yet: call fit or fit_folder first")
        return self._state

    def _replace(self, state: State, chosen: Tuned | None, views: SupportViews) -> None:
        with self._changing:
            if self._log is not None:
                raise ValueError(f"expected no audit log to be open, got {self._log.path}: it has no line for a fit")
            self._state, self._views = state, views
            self.tuned_ = None if chosen is None or chosen.protocol == "none" else chosen

    def _text_of(self, name: str) -> np.ndarray:
        if self._text is None:
            raise ValueError(
                f"this classifier has no text encoder to embed {name!r} with: give text=, the embedding of the name"
            )
        row: np.ndarray = self._text.embed_classes([name], self._views.templates)[0]
        return row

    def _same_classes(self, before: State) -> State:
        """Under the lock: the state, if its classes are still those that labels were read for."""
        state = self.snapshot()
        if state.uids != before.uids:
            raise ValueError("the classes have changed while validation images were encoded: tune again")
        return state

    def _chunks(self, images: Any) -> Iterator[np.ndarray]:
        # A batch array stays one: pixels of the right size then reach the encoder without being touched.
        array = as_array(images)
        listed = array if array is not None and array.ndim == 4 else as_image_list(images)
        for start in range(0, len(listed), _CHUNK):
            try:
                yield to_pixels(listed[start : start + _CHUNK], self.encoder.image_size, self.exif_orientation)
            except BadImageError as error:
                raise error.moved(start) from error.__cause__


def labelled_images(folder: str | Path) -> tuple[list[Path], list[str], list[str]]:
    """Images of a folder of classes, the label of each, and all class names. Raises as `list_folder` does."""
    paths, names, classes = list_folder(folder)
    spoken = {name: name.replace("_", " ").strip() for name in classes}
    return paths, [spoken[name] for name in names], [spoken[name] for name in classes]


def check_support(
    views: int,
    mirror: bool,
    templates: Sequence[str] | None,
    key_precision: str,
    seed: int = 0,
    thumbnails: int = 96,
    exif_orientation: bool = True,
) -> SupportViews:
    """How support images and class names are encoded. Raises ValueError for what can't be, before anything is."""
    if key_precision not in PRECISIONS:
        raise ValueError(f"expected a key_precision of {', '.join(PRECISIONS)}, got {key_precision!r}")
    prompts = None if templates is None else check_templates(templates)
    return SupportViews(views, mirror, seed, False, prompts, thumbnails, exif_orientation)


@functools.cache
def _warn_of_the_demo() -> None:
    """Once a process."""
    log.warning(
        "no model was named, so this is the demo's CLIP: a toy that was trained on emoji of 64x64 pixels and is near "
        "chance on photographs. For photographs take a real one, like from_pretrained('ViT-B-32', "
        "'laion2b_s34b_b79k') or from_pretrained('ViT-B-16', 'openai'); from_pretrained('demo') silences this"
    )


def _config(chosen: Tuned, key_precision: Precision, support: SupportSet | None = None) -> MethodConfig:
    """What a search chose; without `support` its reducer is still to be fitted."""
    if support is None:
        return MethodConfig(chosen.method, dict(chosen.parameters), chosen.reducer, None, chosen.factor, key_precision)
    return fit_config(chosen.method, chosen.parameters, chosen.reducer, chosen.factor, key_precision, support)
