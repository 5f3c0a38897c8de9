"""Classifier: class names and a few images in, labels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from iosr_fast.delivery.answering import Answering, FittedAttribute
from iosr_fast.delivery.engine_choice import EngineChoice
from iosr_fast.delivery.fit import FitData, fit
from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.delivery.one_file import write_one_file
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.engine_folder import EnginePrecision, Runtime, check_engine_choice
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.evaluate import evaluate_images
from iosr_fast.files.folder import FolderPredictions, predict_folder
from iosr_fast.files.source import Source, check_files
from iosr_fast.files.stream import Reader, ReadOptions
from iosr_fast.files.suggest import FolderSuggestions, suggest_from_folder
from iosr_fast.head.class_tree import Parents, read_parents
from iosr_fast.head.descriptions import read_descriptions
from iosr_fast.head.fit import warn_of_look_alikes
from iosr_fast.head.head import ClassInfo
from iosr_fast.head.ids import example_id
from iosr_fast.head.labelled_images import calibration_images, labelled_images, unknown_folder
from iosr_fast.head.quality import Evaluation
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.head.verdict import UNKNOWN_LABEL, Abstention, check_abstention
from iosr_fast.methods.conformal import COVERAGE
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tune import TUNE_SECONDS, asked_config
from iosr_fast.methods.unknown import KEEP
from iosr_fast.scoring.key_precision import KeyPrecision
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.store.bundle import Bundle, load, save
from iosr_fast.store.store import Store
from iosr_fast.store.updates import Changing, calibrate
from iosr_fast.utils.estimator import Estimator

# The parameters that choose what is opened; the others are those of a fit.
OPENING = ("model", "pretrained", "adapter", "runtime", "precision", "engine")


class Classifier(Answering, Changing, Estimator):
    """A few-shot image classifier on a CLIP or any image encoder, an estimator of scikit-learn. Nothing is trained.

    It is an encoder, a head (how embeddings become labels) and a store of heads, which changes replace: any number of
    threads may classify meanwhile, and each call sees exactly one version. Images are paths, encoded bytes, PIL images,
    uint8 arrays (H, W, 3) or uint8 tensors (3, H, W) or (H, W, 3), or parts of these (images.crop): one, a sequence, a
    pandas Series or an array of them (rules: iosr_fast.images.pixels). Methods raise BadImageError for an unreadable
    image, NotFittedError before a fit, FileNotFoundError for a missing folder, and IosrFastError, a ValueError, for
    other wrong arguments, before an image is read.

    Parameters
    ----------
    model, pretrained, adapter : str or Path
        The encoder. A CLIP, which reads class names: a model of open_clip, like "ViT-B-32", with a tag
        ("laion2b_s34b_b79k", downloaded once), a weights file or "none" for random weights; or "demo", a toy. Or an
        image encoder without texts: "photographs", small weights that the extras bring, which None is, too, with a
        line that a CLIP is better; "timm/NAME" with its published weights, a file or "none"; a file "encoder.onnx" with
        "encoder.json" beside it. An adapter is a file of `iosr-fast train-adapter`; None for none, "auto" for the
        shipped one, which only the demo has.
    runtime, precision, engine : str, str or None, str or Path
        How it runs: by "onnxruntime", "openvino", "torch", "tensorrt", "tensorrt_rtx" or the best there is ("auto"); in
        "fp32", "fp16", "bf16", "int8", "fp8", or by `optimize` after the fit ("auto"), which costs seconds and a second
        encoding; None is fp32, and on a GPU the first of fp16, bf16 and fp32 whose embeddings are right (cosines of at
        least 0.999) and whose labels of left-out images are as good as those of fp32; from a folder of `iosr-fast
        build-engine`, or from one that is built once and kept (None).
    method, reducer : str
        A name of `iosr_fast.methods.METHODS`; "++" compares adapted embeddings. "auto" is the stack, with weights by
        leave-one-out. "zero-shot", "tip-x", "timo" and "ape" need texts. "none", "centre", "pca" or "pca:64" is applied
        before images are compared, not by the stack.
    tune, tune_seconds : str, float
        "loo" searches the method's parameters, "none" takes its defaults; None is "loo" unless a parameter is given.
        Seconds on one core are counted in operations, so that the same images give the same choice everywhere.
    alpha, beta, gamma, ridge : float
        Parameters of the method, as far as it has them. None: searched, or the method's default.
    key_precision : {"fp32", "fp16", "bf16", "int8"}
        How the keys are stored for scoring. None is fp32, held in fp16 on a GPU where that keeps the labels.
    look_alikes : bool
        Whether support images of a class that look alike, as in bursts, are left out together in all that left-out
        images say (folds.make_folds). False is for images that were drawn independently, and promises more of these.
    templates, class_names : sequence of str
        Prompts with {} for the class name, of CLIPs alone (None: its own; [] for descriptions alone); the names that
        integer labels index, where `fit` is given none, as in scikit-learn's `cross_val_predict` of "predict_proba".
    thumbnails : int
        Longer side in pixels of the stored picture of a support image. 0 stores none.
    margin : float
        How much of a box's sides is taken beside it on each side, of parts of pictures (images.crop), queries too.
    exif_orientation, skip_bad, progress : bool
        Whether images are turned upright by their EXIF data; whether `fit` leaves unreadable ones out (`skipped_`)
        instead of refusing them; whether to show bars on stderr if that is a terminal.
    memory : str, Path or joblib.Memory
        Where `fit`, `predict` and `score` keep embeddings, as scikit-learn's pipelines keep results: a search then
        encodes each picture once (twice, where queries need no adapted embeddings). None keeps none. Joblib reads
        pickles there, which may run code: name a folder that nobody else writes.

    Attributes
    ----------
    classes_ : array of shape (C,)
        Class names, in the order of `class_names` or sorted; integers (int64) if the labels were integers.
    plan_, support_
        The ScoringPlan that is executed; the SupportSet of images and class names.
    method_, reducer_, key_precision_, parameters_, tuned_
        The choices made or given; what a search knows of them (Evidence), `stale` after a
        change, or None if nothing was searched.
    unknown_ : Unknown
        How pictures of no class are recognised; `unknown_.summary()` says in words what can be promised.
    thresholds_ : array of shape (C,) or None
        After a fit with several labels a picture: the probability from which a picture has a label.
    encoder, engine_, engine_choice_, exif_orientation_
        The image encoder of queries, its folder, the engines that were tried (EngineChoice or None), the setting.
    skipped_, version
        The unreadable images that `skip_bad` left out; a number that rises by one with every change.

    Notes
    -----
    `fit` opens the model (extra `cpu` or `gpu`), which the classifiers of a process share. After `set_params`, a fitted
    classifier predicts as before until the next `fit`. `tune` is also a method; `get_params()["tune"]` has the
    parameter. A change waits for others and compiles the method once. What left-out support images answer
    (`unknown_score`, `predict_sets`, `calibration`, `audit`) is computed at its first use after a change, or with it
    (`serve_promises`). Sources: CLIP (Radford et al., ICML 2021); the adapter (Kravets & Namboodiri, BMVC 2024);
    methods, `iosr_fast.methods`.

    Examples
    --------
    >>> from iosr_fast import Classifier
    >>> classifier = Classifier("demo", method="tip-adapter++").fit_folder("support")
    >>> classifier, classifier.predict(["a.jpg", "b.jpg"]).tolist()
    (Classifier(model='demo', method='tip-adapter++'), ['banana', 'melon'])
    >>> change = classifier.add_class("pear", ["d.jpg", "e.jpg"])
    >>> change.version, change.class_id, classifier.predict("e.jpg").tolist()
    (2, '~10', ['pear'])
    >>> classifier.save("my-classifier")
    >>> Classifier.load("my-classifier").classes_.tolist() == classifier.classes_.tolist()
    True
    >>> classifier.export("fruit.onnx")  # pictures of any size in, probabilities and labels out, in any runtime
    """

    _stored_as: ClassVar[dict[str, str]] = {"tune": "_tune"}
    _shared: ClassVar[tuple[str, ...]] = ("_fit", "_given_clip")

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | Path | None = None,
        adapter: str | Path | None = "auto",
        *,
        runtime: Literal["auto"] | Runtime = "auto",
        precision: Literal["auto"] | EnginePrecision | None = None,
        engine: str | Path | None = None,
        method: str = "auto",
        reducer: str | None = None,
        tune: Literal["loo", "none"] | None = None,
        tune_seconds: float = TUNE_SECONDS,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        ridge: float | None = None,
        templates: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        key_precision: KeyPrecision | None = None,
        look_alikes: bool = True,
        thumbnails: int = 96,
        exif_orientation: bool = True,
        margin: float = 0.0,
        skip_bad: bool = False,
        progress: bool = False,
        memory: Any = None,
    ) -> None:
        self._store = Store()
        self.model, self.pretrained, self.adapter = model, pretrained, adapter
        self.runtime, self.precision, self.engine = runtime, precision, engine
        self.method, self.reducer, self._tune, self.tune_seconds = method, reducer, tune, tune_seconds
        self.alpha, self.beta, self.gamma, self.ridge = alpha, beta, gamma, ridge
        self.templates, self.class_names, self.look_alikes = templates, class_names, look_alikes
        self.key_precision, self.thumbnails, self.exif_orientation = key_precision, thumbnails, exif_orientation
        self.margin, self.skip_bad, self.progress = margin, skip_bad, progress
        self.memory = memory
        self._given_clip: tuple[dict[str, Any], OpenedModel] | None = None
        check_engine_choice(runtime, precision)
        asked_config(**self.get_params())  # refuses what no fit takes

    support_ = FittedAttribute[SupportSet](lambda fit: fit.head.support)
    key_precision_ = FittedAttribute[KeyPrecision | None](lambda fit: fit.head.config.key_precision)
    skipped_ = FittedAttribute[list[str]](lambda fit: [error.where for error in fit.skipped])
    engine_ = FittedAttribute[Path](lambda fit: fit.clip.engine)
    engine_choice_ = FittedAttribute[EngineChoice | None](lambda fit: fit.engine_choice)
    exif_orientation_ = FittedAttribute[bool](lambda fit: fit.settings.exif_orientation)
    version = FittedAttribute[int](lambda fit: fit.head.version)

    @property
    def _fit(self) -> FittedClassifier | None:  # which a copy shares (Estimator)
        return self._store.fit

    @_fit.setter
    def _fit(self, fit: FittedClassifier | None) -> None:
        self._store.fit = fit

    def fit(
        self,
        images: Any = None,
        labels: Any = None,
        class_names: Any = None,
        *,
        unknown_images: Any = None,
        groups: Any = None,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        tree: Parents | None = None,
    ) -> Self:
        """Encode the support images and class names, and compile the method.

        `labels` are class names, or integers into `class_names` (here or as a parameter; any from 0 on where the model
        reads no names): `classes_`, `predict` and `score` then speak in integers, and a class keeps its integer through
        changes. Where pictures may have several labels, they are sets of names, some may be empty, or an indicator (N,
        C) of 0 and 1: each class is then judged by itself (methods.multi_label), and nothing changes until the next
        fit. "zero-shot" needs no images. `unknown_images`, pictures of none of the classes, sharpen `unknown_score` and
        change no label. `groups`, a text or a number for each image, name what images have in common that new ones have
        not, as a video or one object: images of a group are left out together in all that left-out images say. None or
        NaN is a group of its own, and so are images that are added later. `descriptions` are lists of texts by class
        name: a class's text embedding is the normalised mean of the unit embeddings of its prompts and its
        descriptions, of the latter alone with templates=[]. `tree` names the node above each class, and above each node
        unless that is the root, as {"siamese": "cat", "pug": "dog", "cat": "animal", "dog": "animal"}:
        predict(max_error=...) then answers with a node where the class is not sure enough.

        Raises IosrFastError before an encoder is opened for wrong parameters, labels, names, descriptions and tree;
        before anything is encoded for a model, engine, adapter or runtime that don't fit, and texts that the model
        can't read or that are too long; for unreadable images, and one picture under two labels.
        """
        self._store.check_no_log()
        names = self.class_names if class_names is None else class_names
        data = FitData(images, labels, names, unknown_images, groups, descriptions, tree)
        fitted = fit(self.get_params(), self._open, data)
        warn_of_look_alikes(fitted.head)  # before the fit is published: a warning may be an error
        self._store.replace(fitted)
        return self

    def fit_folder(
        self,
        folder: str | Path,
        *more: str | Path,
        unknown_images: str | Path | None = None,
        descriptions: Mapping[str, Sequence[str]] | str | Path | None = None,
        calibrate_on: str | Path | None = None,
        tree: Parents | str | Path | None = None,
        nested: bool = False,
        root: str | Path | None = None,
        label_column: str | None = None,
        similar_names: bool = False,
        keywords: str | None = None,
    ) -> Self:
        """`fit` on folders with a sub-folder of images for each class, CSV files of path and label, or detector files,
        whose pictures are below `root` (labelled_images). `label_column` names the column of labels of CSV files, if it
        is another than `label`; with `keywords`, "tagged" or "all", the labels in folders are the pictures' XMP
        keywords. All images in the folder `unknown_images` and below belong to none of the classes. `descriptions` may
        be a file: JSON, or CSV of class and text (head.descriptions). `calibrate_on` is a place of labelled images, on
        which promises then rest. `tree` may be a CSV file of class and parent; `nested` makes one of folders in
        folders, in which each folder of images is a class. Raises IosrFastError, before it encodes anything, for a
        class that may be another one mistyped (names.mistyped), unless `similar_names` are meant."""
        self._store.check_no_log()
        unknown = None if unknown_images is None else unknown_folder(unknown_images)
        texts = read_descriptions(descriptions) if isinstance(descriptions, str | Path) else descriptions
        if nested and tree is not None:
            raise IosrFastError("expected a tree of nested folders (nested, --nested) or of tree (--tree), got both")
        skip_bad = bool(self.skip_bad)
        parents = read_parents(tree) if isinstance(tree, str | Path) else tree
        places: dict[str, Any] = {"nested": nested, "root": root, "label_column": label_column, "keywords": keywords}
        support = labelled_images(folder, *more, skip_bad=skip_bad, similar_names=similar_names, **places)
        new = None
        if calibrate_on is not None:
            new = calibration_images(calibrate_on, support, skip_bad=skip_bad, **places)
        if not skip_bad:
            check_files([*support.paths, *([] if new is None else new.paths)])
        data = FitData(*support[:3], unknown, support.groups, texts, support.tree if nested else parents)
        fitted = fit(self.get_params(), self._open, data)
        if new is not None:
            fitted = calibrate(fitted, new.paths, new.labels, new.groups, skip_bad)
        warn_of_look_alikes(fitted.head)
        self._store.replace(fitted)
        return self

    def _open(self, texts: Any = None) -> OpenedModel:
        """The model that the parameters name; a loaded classifier's own, until `set_params` names another. `texts` are
        class names, templates and descriptions; a model that reads names is refused where these are None."""
        from iosr_fast.backbones.image_models import is_image_model

        named = {name: getattr(self, name) for name in OPENING}
        given = self._given_clip[1] if self._given_clip is not None and self._given_clip[0] == named else None
        reads_text = given.reads_text if given else self.model is not None and not is_image_model(str(self.model))
        if texts is not None and texts[0] is None and reads_text:
            raise IosrFastError(
                "integer labels have no names, nor has an indicator, and this model reads names: pass class_names, the "
                "name of each class in order, to fit or to Classifier; cross-validation of predict_proba needs "
                "Classifier(class_names=sorted names)"
            )
        if given is not None:
            return given
        from iosr_fast.export.pretrained import open_shared

        return open_shared(**named, shown=bool(self.progress), texts=texts)

    @classmethod
    def _with_clip(cls, clip: OpenedModel, **parameters: Any) -> Self:
        """A classifier on an opened model, whatever `parameters` name."""
        classifier = cls(**parameters)
        classifier._given_clip = {name: getattr(classifier, name) for name in OPENING}, clip
        return classifier

    @property
    def encoder(self) -> Encoder:
        """The image encoder of queries; before a fit, that of the parameters, opened now."""
        return self._open().encoder if self._fit is None else self._fit.encoder

    def _fitted(self) -> FittedClassifier:
        return self._store.fitted()

    def classes(self) -> list[ClassInfo]:
        """The classes in their order, each with its id, the number of its examples and, in a tree, its path."""
        return self.snapshot().classes()

    def examples(self, name_or_id: str) -> list[str]:
        """The ids of a class's examples."""
        head = self.snapshot()
        return [example_id(number) for number in head.examples_of(head.find_class(name_or_id))]

    def picture(self, name_or_id: str) -> bytes | None:
        """An example's thumbnail, WebP, by its id; None where none was stored."""
        return self.snapshot().picture(name_or_id)

    def score(self, images: Any, labels: Any) -> float:
        """The share of images whose predicted class is their label: a name, or an integer as at the fit (into
        `classes_` if the fit had names). With several labels a picture, given as for `fit`, the mean average precision
        over the classes that a picture has."""
        fit = self._store.fitted()
        listed = fit.listed(images)
        truth = fit.read_labels(listed, labels)
        return fit.head.link.quality(truth, self._logits(fit, listed))

    def predict_folder(
        self,
        folder: str | Path,
        batch: int | None = None,
        skip_bad: bool = False,
        threads: int | None = None,
        joint: bool = False,
        unknown: Literal["reject"] | None = None,
        unknown_label: str = UNKNOWN_LABEL,
        keep: float = KEEP,
        max_error: float | None = None,
    ) -> FolderPredictions:
        """Classify all images in a folder and below, in the order of their paths: paths, labels, probabilities, errors.

        `batch` images (None: 16 on a CPU, 64 on a GPU) are in memory at a time, on so many CPU `threads` (None: all).
        Labels are those of `predict`. The first unreadable image is an error unless `skip_bad`. `joint` classifies all
        together, as `predict_jointly`. unknown="reject" gives `unknown_label`, which no class may have, to pictures of
        none of the classes; with `joint` they are left out first. `max_error` says whose label is `accepted`, as in
        `predict`, and keeps all labels (of several a picture those that are accepted, FolderPredictions); it is refused
        with `joint`.
        """
        abstention = check_abstention(unknown, unknown_label, keep, max_error)
        fit = self._store.fitted()
        return predict_folder(fit.head, self._reader(fit, batch, skip_bad, threads), folder, joint, abstention)

    def suggest(
        self,
        folder: str | Path | Source,
        n: int,
        batch: int | None = None,
        skip_bad: bool = False,
        threads: int | None = None,
    ) -> FolderSuggestions:
        """The n images of a folder and below, or of a Source, to label next: each is typical of as many others, and
        those of which this classifier is uncertain count more (methods.suggest); before a fit all count the same.
        Options are those of `predict_folder`."""
        fit = self._fit
        head = None if fit is None else fit.head
        return suggest_from_folder(head, self._reader(fit, batch, skip_bad, threads), folder, n)

    def evaluate(
        self,
        images: Any,
        labels: Any,
        unknown_images: Any = None,
        coverage: float = COVERAGE,
        keep: float = KEEP,
        batch: int | None = None,
        skip_bad: bool = False,
        threads: int | None = None,
    ) -> Evaluation:
        """Measure the classifier on labelled images that are not its support images: accuracy, classes, confusions,
        calibration, mistakes, and what the promises of `predict_sets` (`coverage`) and of unknown="reject" (`keep`) are
        worth; print its `summary()`. Labels are those of `score`, `unknown_images` belong to none of the classes, other
        options are those of `predict_folder`. With several labels a picture figures are of the labels given, with the
        share of labels found, and `unknown_images`, `coverage` and `keep` are refused."""
        fit = self._store.fitted()
        reader = self._reader(fit, batch, skip_bad, threads)
        return evaluate_images(fit, reader, images, labels, unknown_images, coverage, keep, bool(self.progress))

    def _reader(self, fit: FittedClassifier | None, batch: int | None, skip_bad: bool, threads: int | None) -> Reader:
        """Decodes and encodes queries by the encoder of `fit`, whose head answers; None: by that of the parameters."""
        clip = self._open() if fit is None else fit.clip
        queries = SupportSettings(exif_orientation=self.exif_orientation, margin=self.margin)
        options = ReadOptions(batch, threads=threads, skip_bad=skip_bad)
        return Reader((fit or clip).encoder, clip.engine, queries if fit is None else fit.settings, options)

    def serve_promises(self) -> None:
        """Compute what `max_error` rests on now, and with every later fit and change before anybody sees it, so that no
        prediction waits for it; and so what `unknown` rests on with the changes that follow a first question for it.
        BatchingClassifier and the server do so. With 300 images of 1,280 channels a change takes 0.6 s of one core for
        `max_error` and 0.5 s for `unknown`; with 1,600 images 5.4 s and 12 s."""
        self._store.serve_promises()

    def open_log(self, path: str | Path) -> None:
        """Log every change from now on, after making those that the log has already: `load`, then `open_log`. Raises
        ValueError for a log of another classifier or a damaged one, or where one is open (change_log)."""
        self._store.open_log(path)

    def close_log(self) -> None:
        """Close the log; later changes are not written."""
        self._store.close_log()

    @property
    def log_failure(self) -> str:
        """Why the last change could not be written to the log, and so was not made; "" where it could."""
        log = self._store.log
        return "" if log is None else log.failure

    def save(self, folder: str | Path) -> None:
        """Write everything `load` needs to `folder`; a crash leaves the earlier content or the new one. Without a text
        encoder that can be exported, classes can later be added with `text=` only. DamagedFileError, with nothing
        written, for an engine file that is not as its manifest says."""
        save(Bundle.of(self._store.fitted()), folder)

    def export(
        self,
        path: str | Path,
        max_error: float | None = None,
        unknown: Literal["reject"] | None = None,
        source: Literal["picture", "pixels"] = "picture",
        keep: float = KEEP,
    ) -> None:
        """Write the classifier as one ONNX file, for any runtime; needs no torch.

        The input is "picture", uint8 (B, H, W, 3), upright RGB pictures of any one size, or with source="pixels"
        "pixels" (B, S, S, 3), as `Encoder.encode` takes them. Outputs are "probabilities" (B, C), "label" (B,), a
        position in the metadata's "class_names"; with `max_error` "accepted" (B,), and the label may be a node of the
        tree, whose names follow those of the classes; with unknown="reject" "unknown" (B,), the `unknown_score`, and
        "rejected" (B,), as `predict` decides with these options.

        The resize is that of this package, exact and slow for large pictures: shrink those first. In fp32 labels are
        the same in any runtime, in fp16 and int8 on the same kernels only. IosrFastError for several labels,
        embeddings, an engine without an ONNX graph or in bf16 or fp8, more than 2 GB, and too few support images for a
        promise; ArithmeticError, with nothing written, where ONNX Runtime answers otherwise than the classifier."""
        write_one_file(self._store.fitted(), path, Abstention.of(unknown, None, keep, max_error), source)

    @classmethod
    def load(
        cls,
        folder: str | Path | VerifiedFolder,
        runtime: str = "auto",
        verify: bool = True,
        threads: int | None = None,
        expected_digest: str | None = None,
        runs: int = 1,
    ) -> Self:
        """A fitted classifier from `save`, whatever writers do to the folder meanwhile; needs no torch. One from
        FewShotHead.save takes rows of embeddings, (n, D), as images.

        Checks every field, every array and every file's hash (hashes not where `verify` is False). `expected_digest`,
        the "sha256:..." that `iosr-fast info FOLDER` prints, pins the content. The `runtime` "auto" is the one that was
        chosen by measuring where this is the same processor. `threads` of the encoders on a CPU (None: one a core);
        `runs` threads may encode at once. The parameters are those that the bundle knows: not `pretrained`, and the
        fitted method with its parameters. `fit` uses its encoders, until `set_params` names another model. Raises
        DamagedFileError naming what is missing, damaged or foreign, and what open_engine raises.
        """
        saved = load(folder, verify, threads, expected_digest)
        return cls._opened(saved, saved.open(runtime, threads, runs), runtime)

    @classmethod
    def _opened(cls, saved: Bundle, fit: FittedClassifier, runtime: str) -> Self:
        classifier = cls._with_clip(fit.clip, runtime=runtime, **saved.parameters())
        classifier._store.fit = fit
        return classifier


def open_together(
    saved: Sequence[Bundle], runtime: str = "auto", threads: int | None = None, runs: int = 1
) -> list[Classifier]:
    """Classifiers that share a model, which is opened once: all `saved` have equal `shares`."""
    clip = saved[0].open(runtime, threads, runs, saved[1:]).clip
    return [Classifier._opened(one, one.on(clip), runtime) for one in saved]
