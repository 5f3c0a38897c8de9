"""FewShotHead: embeddings and labels in, labels out; a scikit-learn estimator."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head import multi_label
from iosr_fast.head.embedding_rows import as_iosr_errors, unit, unit_rows, usable_rows
from iosr_fast.head.examples import Examples
from iosr_fast.head.head import Head
from iosr_fast.head.labels import are_label_sets, dense, read_label_sets
from iosr_fast.head.method_config import MethodChoice
from iosr_fast.head.names import check_unknown_label
from iosr_fast.head.predictions import AnyHead, predict_jointly
from iosr_fast.methods import METHODS, unavailable_reason
from iosr_fast.methods.conformal import COVERAGE, Reliability, check_share, sets_of_labels
from iosr_fast.methods.joint import JointPrediction
from iosr_fast.methods.multi_label import MultiLabelFit
from iosr_fast.methods.suggest import Suggestions, entropy, suggest
from iosr_fast.methods.support_audit import SupportAudit
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.tune import TUNE_SECONDS
from iosr_fast.methods.unknown import KEEP, Unknown, check_unknown, check_unknown_images, without_rejected
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.key_precision import Precision
from iosr_fast.scoring.score import score
from iosr_fast.scoring.validation import check_number
from iosr_fast.utils.estimator import not_fitted
from iosr_fast.utils.numbers import check_integer, refuse_masked
from iosr_fast.utils.require import require

require("sklearn.base", "sklearn")

from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_array, check_is_fitted, validate_data  # noqa: E402

# Rows are scored in blocks of one shape, the last one filled up: a row's logits then have the same bits in any batch.
_BLOCK = 64


class FewShotHead(ClassifierMixin, BaseEstimator):
    """A few-shot classifier on embeddings, for scikit-learn's pipelines, cross-validation and searches.

    It is the head of a `Classifier` on embeddings that exist already: of a CLIP, or of any encoder whose cosines mean
    similarity. Nothing is trained. For C classes and D channels it computes

        logits[b, c] = tau * <x[b], text[c]>
                     + alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - <r(x[b]), keys[j]>))
                     + <f(x[b]), linear[c]> + bias[c]

    with x the rows of X at unit length, r the reducer, and the terms that the method has (`plan_`, a ScoringPlan).

    Parameters
    ----------
    method, reducer, tune, tune_seconds, alpha, beta, gamma, ridge, key_precision
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
    plan_ : ScoringPlan
        What is executed. `iosr_fast.score` executes it too, on NumPy arrays and on tensors.
    method_, reducer_, parameters_, tuned_
        What was chosen or given, and the search that chose it (Tuned); None if nothing was searched.
    multi_label_ : MultiLabelFit or None
        After a fit with several labels: the threshold of each class, and the average precision and log-loss of left-out
        rows.
    unknown_ : Unknown
        How unknown pictures are recognised; `unknown_.promise()` says what can be promised.
    n_features_in_ : int
        D, or 2 D with `adapted=True`. `feature_names_in_` exists if X had names for its columns.

    Raises
    ------
    IosrFastError
        A ValueError, by `fit`: for a single class, a class of which all rows are zero, wrong parameters, `text` of
        another shape than (C, D), and a method that needs `text` or `adapted=True` without it. By all methods: for
        values that are not finite, and another number of columns.
    NotFittedError
        By all methods before `fit`: that of `iosr_fast.exceptions` and scikit-learn's in one.
    MissingPackageError
        By the import of this class, without scikit-learn.

    Notes
    -----
    The logits of a row do not depend on the other rows of X or on their order. Probabilities are calibrated as those of
    `Classifier` are. A row of zeros has no direction: `fit` leaves it out, the other methods take its cosines as 0;
    both warn. Sources: `iosr_fast.methods` names the paper of each method.

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

    classes_: np.ndarray
    multi_label_: MultiLabelFit | None
    _head: AnyHead
    _indicator_type: np.dtype[Any] | None

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
        key_precision: Precision = "fp32",
    ) -> None:
        self.method, self.reducer, self.tune, self.tune_seconds = method, reducer, tune, tune_seconds
        self.alpha, self.beta, self.gamma, self.ridge = alpha, beta, gamma, ridge
        self.text, self.tau, self.adapted, self.key_precision = text, tau, adapted, key_precision

    def fit(self, X: Any, y: Any, unknown_images: Any = None) -> FewShotHead:
        """Compile the method on support rows X, (n, D) or (n, 2 D), of any length and real dtype, and their labels y,
        (n,): any that scikit-learn accepts.

        For rows with any number of labels y are sets (or lists, or tuples) of names, of which some may be empty, or an
        indicator (n, C) of 0 and 1, whose classes are their numbers. Each class is then judged by itself
        (methods.multi_label.fit_multi_label), and `predict` answers in the form of y. `unknown_images` are rows of
        pictures that belong to none of the classes, if you have any: they sharpen `unknown_score` alone.
        """
        choice = MethodChoice.of(self.get_params(deep=False))
        tau = check_number("tau, the CLIP's logit scale,", self.tau, *RANGES["tau"])
        several = are_label_sets(y)
        if several:
            multi_label.check_several(choice, unknown_images)
        X, classes, labels = self._read_sets(X, y) if several else self._read_labels(X, y)
        kept = np.flatnonzero(usable_rows(X, self.adapted, "left out of the support rows"))
        rows, labels, text = unit_rows(X[kept], self.adapted), labels[kept], self._text_rows(classes, X.shape[1])
        names = [str(name) for name in classes.tolist()]
        examples = Examples(rows, np.zeros(len(kept), np.int64) if several else labels, kept, (None,) * len(kept))
        self.multi_label_ = None
        if several:
            self._head, self.multi_label_ = multi_label.fit_head(names, text, tau, examples, labels, choice)
        else:
            if len(empty := np.setdiff1d(np.arange(len(classes)), labels)):
                raise IosrFastError(f"expected a row other than zero for each class, got none of {classes[empty[0]]!r}")
            unknown = None if unknown_images is None else self._unknown_rows(unknown_images)
            examples = examples.sorted_by_class()
            support = examples.as_support(range(len(classes)), text, tau)
            self._check_method(support)
            self._head = Head.first(names, text, tau, examples, choice.config(support), unknown_images=unknown)
        self.plan_, self.tuned_, config = self._head.plan, self._head.tuned, self._head.config
        self.method_, self.reducer_, self.parameters_ = config.method, config.reducer_name, config.parameters
        self.classes_ = classes
        return self

    def _read_labels(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, classes (C,), and each row's class by its position (n,)."""
        X, y = self._validated(X, y, reset=True)
        with as_iosr_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # of few shots
            check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise IosrFastError(f"expected labels of at least two classes, got one class: {classes[0]!r}")
        self._indicator_type = None
        return X, classes, labels.astype(np.int64)

    def _read_sets(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, classes (C,), and an indicator (n, C) bool of each row's classes."""
        X = self._validated(X, reset=True)
        names, labels = read_label_sets(y, len(X))
        self._indicator_type = None if names is not None else dense(y).dtype
        return X, np.arange(labels.shape[1]) if names is None else np.array(names, str), labels

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (n, C) float32; for two classes (n,), the second one's logit minus the first one's. After a fit with
        several labels always (n, C), each class by itself."""
        return self._fitted().decision(self._logits(X))

    def predict(
        self,
        X: Any,
        unknown: Literal["reject"] | None = None,
        unknown_label: str | None = None,
        keep: float = KEEP,
    ) -> np.ndarray:
        """The label of the largest logit, (n,); of equal ones the first. After a fit with several labels a frozenset of
        labels for each row, (n,) of dtype object, or an indicator (n, C) of the dtype of y, as y was. `unknown`,
        `unknown_label`, `keep` and their errors are those of Classifier.predict."""
        share = check_unknown(unknown, keep, unknown_label)
        if share is not None:
            head = self._fitted().one_label("predict(unknown='reject')", "a row of none of the classes gets no label")
            check_unknown_label(unknown_label, self.classes_.tolist())
            rejected = head.unknown.rejects(self._queries(X), share)
            return without_rejected(self.classes_[self._logits(X).argmax(1)], rejected, unknown_label)
        answers = self._fitted().answers(self._logits(X), self.classes_)
        return answers if self._indicator_type is None else answers.astype(self._indicator_type)

    def unknown_score(self, X: Any) -> np.ndarray:
        """How unlike all classes each row is, (n,) float64: as Classifier.unknown_score."""
        return self._fitted().one_label("unknown_score").unknown.score(self._queries(X))

    def predict_sets(self, X: Any, coverage: float = COVERAGE, per_class: bool = False) -> list[np.ndarray]:
        """For each row the labels that it may have, most likely first: as Classifier.predict_sets."""
        head, share = self._fitted().one_label("predict_sets"), check_share("coverage", coverage)
        classes, logits = self.classes_ if per_class else None, self._logits(X)
        return sets_of_labels(self.classes_, logits, head.left_out_labels.sets(logits, share, classes))

    def calibration(self) -> Reliability:
        """How right the probabilities of left-out support rows are, by bins; print it for a table."""
        return self._fitted().one_label("calibration").left_out_labels.reliability

    @property
    def unknown_(self) -> Unknown:
        return self._fitted().one_label("unknown_").unknown

    def predict_proba(self, X: Any) -> np.ndarray:
        """softmax of the logits, (n, C) float64, in the order of `classes_`. After a fit with several labels the
        probability of each class by itself, 1 / (1 + exp(-logit))."""
        return self._fitted().probabilities(self._logits(X).astype(np.float64))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of rows whose predicted label is theirs. After a fit with several labels the mean average precision
        over the classes that a row of y has (utils.ranking.mean_average_precision); y as for `fit`."""
        head = self._fitted()
        if self.multi_label_ is None:
            return float(super().score(X, y, sample_weight))
        if sample_weight is not None:
            raise IosrFastError("several labels an image: expected no sample_weight, got one; leave it out")
        return head.quality(read_label_sets(y, len(X), self.classes_.tolist())[1], self._logits(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def predict_jointly(self, X: Any) -> JointPrediction:
        """Probabilities (n, C) float32 of rows that are classified together: as Classifier.predict_jointly."""
        head = self._fitted().one_label("predict_jointly")
        return predict_jointly(head, self._queries(X), self.classes_, check=False)

    def audit(self) -> SupportAudit:
        """What is wrong with the support rows: as Classifier.audit. Images are named by their positions in the X of
        `fit`."""
        head = self._fitted().one_label("audit")
        return head.audit(head.examples.ids, self.classes_)

    def suggest(self, X: Any, n: int) -> Suggestions:
        """The n rows of X to label next, as Classifier.suggest: the result's `rows` are positions in X. Before the
        first labels exist, call methods.suggest.suggest."""
        head, n = self._fitted().one_label("suggest"), check_integer("n", n, 1)
        return suggest(image_rows(self._queries(X), head.config.which, None), n, entropy(self._logits(X)))

    def _queries(self, X: Any) -> Embeddings:
        return unit_rows(self._rows(X), self.adapted)

    def _unknown_rows(self, unknown: Any) -> Embeddings:
        rows = self._validated(unknown, reset=False)
        rows = rows[usable_rows(rows, self.adapted, "left out of the unknown rows")]
        check_unknown_images(len(rows))
        return unit_rows(rows, self.adapted)

    def _rows(self, X: Any) -> np.ndarray:
        """Rows to classify. A row of zeros stays, with a warning."""
        self._fitted()
        rows: np.ndarray = self._validated(X, reset=False)
        usable_rows(rows, self.adapted, "their cosines count as 0, and their labels mean nothing")
        return rows

    def _validated(self, *rows_and_labels: Any, reset: bool) -> Any:
        for name, values in zip(("X", "y"), rows_and_labels, strict=False):
            refuse_masked(name, values)
        with as_iosr_errors():
            return validate_data(self, *rows_and_labels, reset=reset, dtype=(np.float64, np.float32), order="C")

    def _fitted(self) -> AnyHead:
        """The head. Raises NotFittedError before a fit."""
        try:
            check_is_fitted(self)
        except NotFittedError as error:
            raise not_fitted(str(error)) from None
        return self._head

    def _logits(self, X: Any) -> np.ndarray:
        rows = self._rows(X)
        logits = np.empty((len(rows), len(self.classes_)), np.float32)
        for first in range(0, len(rows), _BLOCK):
            block = np.minimum(np.arange(first, first + _BLOCK), len(rows) - 1)
            scores = score(self.plan_, unit_rows(rows[block], self.adapted), check=False)
            logits[first : first + _BLOCK] = scores[: len(rows) - first]
        return logits

    def _text_rows(self, classes: np.ndarray, width: int) -> np.ndarray | None:
        if self.text is None:
            return None
        refuse_masked("text", self.text)
        with as_iosr_errors():
            text = check_array(self.text, dtype=np.float64, input_name="text")
        shape = (len(classes), width // (2 if self.adapted else 1))
        if text.shape != shape:
            raise IosrFastError(
                f"expected text of shape {shape}, a row for each of the {len(classes)} classes in y and a column for "
                f"each channel, got {text.shape}"
            )
        if not text.any(axis=1).all():
            raise IosrFastError(f"expected text rows other than zero, got zeros in row {text.any(axis=1).argmin()}")
        return unit(text)

    def _check_method(self, support: SupportSet) -> None:
        """Raise IosrFastError if the named method needs more than the data has; "auto" takes what there is."""
        if self.method in METHODS and (reason := unavailable_reason(self.method, support)) is not None:
            fix = "" if support.text is not None else "; give text=, an array (C, D)"
            if METHODS[self.method].needs_adapter and not self.adapted:
                fix = "; adapted embeddings: expected adapted=True and X of (n, 2 D), got adapted=False"
            raise IosrFastError(f"{reason}{fix}")
