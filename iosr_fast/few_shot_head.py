"""FewShotHead: embeddings and labels in, labels out; a scikit-learn estimator."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from iosr_fast.delivery.answering import Answering
from iosr_fast.delivery.fitted import FittedClassifier, SavedEstimator
from iosr_fast.encoders.encoder import Embeddings, are_usable, unit
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.encoders.rows import Rows
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.class_tree import paths_of
from iosr_fast.head.examples import Examples
from iosr_fast.head.fit import check_multi_label, fit_head, warn_of_look_alikes
from iosr_fast.head.labels import are_label_sets, classes_of, dense, positions, read_groups, read_label_sets
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.images.preprocess import open_image, thumbnail
from iosr_fast.methods.suggest import Suggestions, suggest
from iosr_fast.methods.support_set import image_rows
from iosr_fast.methods.tune import TUNE_SECONDS, asked_config
from iosr_fast.methods.unknown import check_unknown_images
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.key_precision import KeyPrecision
from iosr_fast.scoring.validation import check_number
from iosr_fast.store.bundle import HEAD_KIND, Bundle, load, save
from iosr_fast.utils.estimator import not_fitted
from iosr_fast.utils.numbers import check_integer, refuse_masked
from iosr_fast.utils.require import require

require("sklearn.base", "sklearn")

from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: E402
from sklearn.metrics import accuracy_score  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_array, validate_data  # noqa: E402

_BLOCK = 64  # rows that are scored together


class FewShotHead(Answering, ClassifierMixin, BaseEstimator):
    """A few-shot classifier on embeddings, for scikit-learn's pipelines, cross-validation and searches.

    It is the head of a `Classifier` on embeddings that exist already: of a CLIP, or of any encoder whose cosines mean
    similarity. Nothing is trained. It executes `plan_`, whose formula is that of ScoringPlan, on the rows of X at unit
    length. The logits of a row do not depend on the other rows of X or on their order. Methods that `Classifier` has,
    too, give what it gives for images.

    Parameters
    ----------
    method, reducer, tune, tune_seconds, alpha, beta, gamma, ridge, key_precision, look_alikes
        As of Classifier. "stack", "tip-adapter", "gda" and "proker" work without `text`; "zero-shot", "tip-x", "timo"
        and "ape" need it. A name with "++" compares adapted embeddings and needs `adapted=True`.
    text : array of shape (C, D), default=None
        The text embedding of each class, in the order of `classes_` (sorted labels); scaled to unit length. None leaves
        the text term out.
    tau : float, default=100.0
        The CLIP's logit scale, which multiplies cosines between images and texts.
    adapted : bool, default=False
        Whether X is (n, 2 D), the plain embedding beside the adapted one.

    Attributes
    ----------
    classes_ : array of shape (C,)
        The labels, sorted, with the type that they had in y.
    plan_, method_, reducer_, parameters_, tuned_, unknown_
        As of Classifier.
    thresholds_
        As of Classifier.
    n_features_in_ : int
        D, or 2 D with `adapted=True`. `feature_names_in_` exists if X had names for its columns.

    Notes
    -----
    What scikit-learn refuses is refused as IosrFastError, a ValueError. Before `fit`, methods raise a NotFittedError
    that is scikit-learn's, too. A row of zeros has no direction: `fit` leaves it out, and refuses a class that has no
    other; the other methods take its cosines as 0; both warn.

    Examples
    --------
    >>> import numpy as np
    >>> from iosr_fast import FewShotHead
    >>> rng = np.random.default_rng(0)
    >>> centres = rng.standard_normal((3, 32))  # of three classes; images of a class lie around its centre
    >>> labels = np.repeat(["cat", "dog", "fox"], 4)
    >>> X = np.repeat(centres, 4, axis=0) + 0.5 * rng.standard_normal((12, 32))
    >>> head = FewShotHead(method="gda").fit(X, labels)
    >>> head.predict(centres)
    array(['cat', 'dog', 'fox'], dtype='<U3')
    >>> head.predict_proba(centres).shape, head.tuned_.protocol, head.tuned_.scored
    ((3, 3), 'loo', 12)
    """

    _fit: FittedClassifier | None = None
    _unit_rows = False  # rows of zeros
    _probability_dtype = np.float64

    def __init__(
        self,
        method: str = "auto",
        *,
        reducer: str | None = None,
        tune: Literal["loo", "none"] | None = None,
        tune_seconds: float = TUNE_SECONDS,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        ridge: float | None = None,
        text: Any = None,
        tau: float = 100.0,
        adapted: bool = False,
        key_precision: KeyPrecision | None = None,
        look_alikes: bool = True,
    ) -> None:
        self.method, self.reducer, self.tune, self.tune_seconds = method, reducer, tune, tune_seconds
        self.alpha, self.beta, self.gamma, self.ridge = alpha, beta, gamma, ridge
        self.text, self.tau, self.adapted = text, tau, adapted
        self.key_precision, self.look_alikes = key_precision, look_alikes

    def fit(
        self, X: Any, y: Any, unknown_images: Any = None, groups: Any = None, *, tree: Any = None, paths: Any = None
    ) -> Self:
        """Compile the method on support rows X, (n, D) or (n, 2 D), of any length and real dtype, and their labels y,
        (n,): any that scikit-learn accepts.

        For rows with any number of labels y are sets (or lists, or tuples) of names, of which some may be empty, or an
        indicator (n, C) of 0 and 1, whose classes are their numbers; `predict` answers in the form of y
        (methods.multi_label). `unknown_images` are rows of pictures that belong to none of the classes, if you have
        any: they sharpen `unknown_score` alone. `groups` (n,) and `tree` as in Classifier.fit; labels stand in `tree`
        as they are, or as text. `paths` (n,) are the rows' picture files, which `audit` names and pages show.
        """
        asked = asked_config(**self.get_params(deep=False))
        tau = check_number("tau, the CLIP's logit scale,", self.tau, *RANGES["tau"])
        multi_label = are_label_sets(y)
        if multi_label:
            check_multi_label(asked, unknown_images, tree)
            X = self._validated(X, reset=True)
        else:
            X, y = self._validated(X, y, reset=True)
        classes, ids, sets = classes_of(y, len(X))
        names = [str(name) for name in classes.tolist()]
        nodes = paths_of(tree, names, classes.tolist())
        listed = [] if paths is None else [*paths]  # by position: a column of pandas is read by its index
        if paths is not None and len(listed) != len(X):
            raise IosrFastError(f"expected a path for each of the {len(X)} rows of X, got {len(listed)}")
        kept, embeddings, group_of = self._support(X, "left out of the support rows", groups)
        if other := [path for path in listed if not isinstance(path, str | os.PathLike)]:
            raise IosrFastError(f"expected the paths of picture files, got {other[0]!r:.80}")
        files = tuple(os.path.abspath(listed[i]) for i in kept.tolist()) if listed else ()
        pictures = tuple(thumbnail(open_image(file), 96) for file in files) or (None,) * len(kept)
        examples = Examples(embeddings, ids[kept], kept, pictures, groups=group_of, paths=files)
        text = self._text_rows(classes, X.shape[1])
        unknown = None
        if not multi_label and len(empty := np.setdiff1d(np.arange(len(classes)), examples.class_ids)):
            raise IosrFastError(f"expected a row other than zero for each class, got none of {classes[empty[0]]!r}")
        if unknown_images is not None:
            _, unknown, _ = self._support(self._validated(unknown_images), "left out of the unknown rows")
            check_unknown_images(len(unknown))
        choice = asked, self.tune, float(self.tune_seconds)
        head = fit_head(*choice, names, text, tau, examples, sets, unknown, nodes)
        warn_of_look_alikes(head)
        indicator = dense(y).dtype.name if multi_label and classes.dtype.kind == "i" else None
        columns = getattr(self, "feature_names_in_", None)
        labels = "str" if classes.dtype.kind == "U" else classes.dtype.name
        given = SavedEstimator({}, labels, indicator, None if columns is None else [*columns])
        clip = OpenedModel(Rows.like(embeddings), Path(), None, tau)
        self._fit = FittedClassifier(clip, head, SupportSettings(), estimator=given, classes=classes)
        return self

    def save(self, folder: str | Path) -> None:
        """Write everything `load` needs to `folder`: a bundle without an encoder, and no pickle. The commands and the
        server open it, too. A crash leaves the earlier content or the new one.

        Raises IosrFastError for labels other than text, integers, booleans and floats, and names of classes that no
        saved classifier may have (names.check_names); FileExistsError where `folder` holds anything else.
        """
        fitted = self._fitted()
        bundle, labels = Bundle.of(fitted), fitted.labels
        assert bundle.estimator is not None
        if labels.dtype.kind not in "Ubiuf" and not all(isinstance(label, str) for label in labels.tolist()):
            got = bundle.estimator.labels
            raise IosrFastError(f"expected labels of text, integers, booleans or floats to save, got {got}")
        parameters = {
            name: value.item() if isinstance(value, np.generic) else value  # a number of NumPy is none of JSON
            for name, value in self.get_params(deep=False).items()
            if name != "text"
        }
        save(replace(bundle, estimator=replace(bundle.estimator, estimator=parameters)), folder)

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True, expected_digest: str | None = None) -> Self:
        """The fitted head that `save` wrote, with the same logits to the last bit; `text` is of unit length. Checks and
        errors are those of Classifier.load."""
        fit = load(folder, verify, expected_digest=expected_digest, kind=HEAD_KIND).open("auto", None, 1)
        saved = fit.estimator
        assert saved is not None
        made = cls(**saved.estimator, text=fit.head.text)
        made._fit = replace(fit, classes=saved.classes(fit.head.class_names))
        made.n_features_in_ = fit.clip.encoder.width
        if saved.columns is not None:
            made.feature_names_in_ = np.array(saved.columns, object)
        return made

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        """As scikit-learn writes it; of an array in `text` its shape."""
        shown = copy(self)
        shape = getattr(self.text, "shape", None)
        if shape is not None:
            shown.text = _Shown(f"array of shape {tuple(shape)}")
        text: str = BaseEstimator.__repr__(shown, N_CHAR_MAX)
        return text

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """For notebooks, in place of scikit-learn's diagram."""
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def calibrate_on(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Let promises rest on labelled rows that are no support rows, as Classifier.calibrate_on."""
        fitted = self._fitted()
        classes = fitted.labels.tolist()
        if fitted.head.is_multi_label:
            rows = self._validated(X)
            labels = read_label_sets(y, len(rows), classes)[1]
        else:
            rows, y = self._validated(X, y)
            position = positions(classes, y.tolist())
            labels = np.array([position[label] for label in y.tolist()])
        kept, embeddings, group_of = self._support(rows, "left out of the rows to calibrate on", groups)
        calibrated = fitted.head.calibrated_on(embeddings, labels[kept], group_of)
        warn_of_look_alikes(calibrated)
        self._fit = replace(fitted, head=calibrated)
        return self

    def suggest(self, X: Any, n: int) -> Suggestions:
        """The n rows of X to label next: the result's `rows` are positions in X. Before the first labels exist, call
        methods.suggest.suggest."""
        fitted = self._fitted()
        n = check_integer("n", n, 1)
        head = fitted.head
        blocks = [*self._queries(fitted, X)]
        logits = np.concatenate([self._score(fitted, block) for block in blocks])
        rows = image_rows(Embeddings.concatenate(blocks), head.config.which, None)
        return suggest(rows, n, head.link.entropy(head.calibrated(logits)))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of rows whose predicted label is theirs. After a fit with several labels the mean average precision
        over the classes that a row of y has (utils.ranking.mean_average_precision); y as for `fit`."""
        fitted = self._fitted()
        logits = self._logits(fitted, X)
        if not fitted.head.is_multi_label:
            return float(accuracy_score(y, self._labels(fitted, logits), sample_weight=sample_weight))
        if sample_weight is not None:
            raise IosrFastError("several labels an image: expected no sample_weight, got one; leave it out")
        return fitted.head.link.quality(read_label_sets(y, len(X), fitted.labels.tolist())[1], logits)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return self._fit is not None

    def _fitted(self) -> FittedClassifier:
        fit = self._fit
        if fit is None:
            raise not_fitted("this FewShotHead instance is not fitted yet: call fit first")
        return fit

    def _queries(self, fitted: FittedClassifier, X: Any) -> Iterator[Embeddings]:
        """Rows to classify, in blocks. A row of zeros stays, with a warning."""
        rows: np.ndarray = self._validated(X)
        self._usable(rows, "their cosines count as 0, and their labels mean nothing")
        starts = range(0, len(rows), _BLOCK)
        return (Embeddings.of_rows(rows[start : start + _BLOCK], self.adapted) for start in starts)

    def _score(self, fitted: FittedClassifier, block: Embeddings) -> np.ndarray:
        """Logits of a block, scored as one of _BLOCK rows: those of a row have the same bits in any."""
        filled = block[np.minimum(np.arange(_BLOCK), len(block) - 1)]
        return super()._score(fitted, filled)[: len(block)]

    def _in_form(self, fitted: FittedClassifier, labels: np.ndarray) -> np.ndarray:
        indicator = None if fitted.estimator is None else fitted.estimator.indicator
        return labels if indicator is None else labels.astype(indicator)

    def _name_of(self, number: int) -> int:
        return number

    def _validated(self, X: Any, *y: Any, reset: bool = False) -> Any:
        """X, or X and y, as scikit-learn checks them."""
        for name, values in zip(("X", "y"), (X, *y), strict=False):
            refuse_masked(name, values)
        with _as_iosr_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # of few shots
            if y and reset:
                check_classification_targets(*y)
            return validate_data(self, X, *y, reset=reset, dtype=(np.float64, np.float32), order="C")

    def _support(
        self, rows: np.ndarray, use: str, groups: Any = None
    ) -> tuple[np.ndarray, Embeddings, np.ndarray | None]:
        """The positions (k,) of `_usable` rows, their embeddings (k, D), and of `groups` (n,) theirs."""
        kept = self._usable(rows, use)
        group_of = read_groups(groups, len(rows))
        return kept, Embeddings.of_rows(rows[kept], self.adapted), None if group_of is None else group_of[kept]

    def _usable(self, rows: np.ndarray, use: str) -> np.ndarray:
        """(k,) the rows that have a direction; a warning names the others and says what becomes of them (`use`)."""
        if self.adapted and rows.shape[1] % 2:
            raise IosrFastError(
                "expected plain and adapted embeddings side by side, an even number of columns, for adapted=True, "
                f"got {rows.shape[1]}"
            )
        usable = are_usable(rows, self.adapted)
        if len(zero := np.flatnonzero(~usable)):
            message = f"{len(zero)} of {len(rows)} rows of X hold zeros only, the first is row {zero[0]}: {use}"
            warnings.warn(message, stacklevel=4)
        return np.flatnonzero(usable)

    def _text_rows(self, classes: np.ndarray, width: int) -> np.ndarray | None:
        if self.text is None:
            return None
        refuse_masked("text", self.text)
        with _as_iosr_errors():
            text = check_array(self.text, dtype=np.float64, input_name="text")
        shape = (len(classes), width // (2 if self.adapted else 1))
        if text.shape != shape:
            raise IosrFastError(f"expected text of shape {shape}, (classes in y, channels), got {text.shape}")
        if not text.any(axis=1).all():
            raise IosrFastError(f"expected text rows other than zero, got zeros in row {text.any(axis=1).argmin()}")
        return unit(text)


class _Shown(str):
    """A text that is its own repr."""

    __repr__ = str.__str__


@contextmanager
def _as_iosr_errors() -> Iterator[None]:
    """Raise scikit-learn's ValueErrors as IosrFastError, with their messages."""
    try:
        yield
    except ValueError as error:
        raise IosrFastError(str(error)) from error
