"""The stack: a sum with weights >= 0 of texts, Gaussian discriminant analysis and kernel ridge regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.kernel_ridge import class_ridge, kernel_matrix, regress_labels
from iosr_fast.methods.method import Method
from iosr_fast.methods.multi_label_set import KeyTerm, LinearTerm, MultiLabelSet
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.methods.timo import estimate
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer

# The (N, N) system takes minutes beyond this number of support images.
MAX_KEYS = 8192
_FOLDS = 16  # in which images with several labels are left out of the discriminant


def stack(
    support: SupportSet,
    which: Which = "plain",
    reducer: Reducer | None = None,
    text: float = 1.0,
    discriminant: float = 0.03,
    regression: float = 5.0,
    text_regression: float = 5.0,
    beta: float = 1.0,
    ridge: float = 0.1,
    text_images: float = 0.0,
    discriminant_adapted: float = 0.0,
    adapted_keys: float = 0.0,
) -> ScoringPlan:
    """logits[b, c] = text * tau <plain[b], text[c]>
                    + discriminant * G(plain[b], c) + discriminant_adapted * G(adapted[b], c)
                    + sum_j exp(-beta (1 - <x[b], key[j]>)) V[j, c], (B, C),

    V = (K + ridge W^-1)^-1 (regression * Y - text_regression * F), (N, C).

    G(x, c) = x' P mu_c - (mu_c' P mu_c - e_c) / 2 is the discriminant of methods.gda with the precision
    P = inv(Sigma + tr(Sigma) / (N - 1) I), or I if each class has one image and no text. Means and covariance are those
    of the images and, as in methods.timo, of `text_images` copies of <u_c, text_c> text_c, u_c the unit mean of class
    c. A class without images takes the mean of the others, which says nothing about it. K (N, N) is the kernel of the
    keys, which are the plain embeddings of the support images, or with adapted_keys = 1 the adapted ones; x is the same
    of the query; Y (N, C) are the one-hot labels, F = <plain key, text> the zero-shot cosines and
    W = diag(SupportSet.key_weights), I for classes of one size. With regression = text_regression the last term is
    ProKeR's.

    All weights are >= 0, without units; ridge > 0. A term whose weight is 0 is left out of the plan. Solved in float64;
    N^3 operations for the regression, N D^2 + D^3 for the discriminants. Without text the text terms are left out.

    Raises IosrFastError for values that a plan can't have (ScoringPlan) and if all weights are 0.

    Sources: the terms are those of GDA (Wang et al., ICLR 2024, equations 4 to 8), with texts as TIMO takes them (Li et
    al., AAAI 2025), and of ProKeR (Bendou et al., CVPR 2025, section 4); their sum is a convex combination as in
    stacked generalisation (Wolpert, 1992; Breiman, 1996).

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, score
    >>> from iosr_fast.methods.support_set import make_support_set
    >>> images = Embeddings(np.eye(4, dtype=np.float32)[:3])
    >>> support = make_support_set(images, labels=np.array([0, 0, 1]), text=np.eye(2, 4), tau=10.0)
    >>> score(stack(support, discriminant=1.0), images).argmax(1)
    array([0, 0, 1])
    """
    arrays: dict[str, Any] = {}
    weights: dict[Which, float] = {"plain": discriminant, "adapted": discriminant_adapted}
    used = [name for name, weight in weights.items() if weight > 0]
    if used:
        parts = [linear_discriminant(image_rows(support.embeddings, name, None), support, text_images) for name in used]
        arrays["linear"] = np.concatenate([weights[name] * part[0] for name, part in zip(used, parts, strict=True)], 1)
        arrays["bias"] = sum(weights[name] * part[1] for name, part in zip(used, parts, strict=True))
        arrays["feature"] = used[0] if len(used) == 1 else "both"
    if regression > 0 or (text_regression > 0 and support.text is not None):
        if len(support.embeddings) > MAX_KEYS:
            raise IosrFastError(
                f"the stack's regression: expected at most {MAX_KEYS} support images, got {len(support.embeddings)}; "
                "tune the classifier again, which leaves the regression out, or choose another method"
            )
        query: Which = "adapted" if adapted_keys else "plain"
        keys = image_rows(support.embeddings, query, None)
        kernel = kernel_matrix(keys, keys, beta)
        kernel[np.diag_indices(len(keys))] += class_ridge(ridge, support)
        values = np.linalg.solve(kernel, regression * one_hot(support) - text_regression * zero_shot(support))
        arrays |= {"keys": keys, "values": values, "query": query, "beta": beta}
    if support.text is not None and text > 0:
        arrays |= {"text": support.text, "tau": text * support.tau}
    if not arrays:
        raise IosrFastError("expected at least one weight of the stack above 0, got none")
    return ScoringPlan(n_classes=support.n_classes, **arrays)


def linear_discriminant(
    rows: np.ndarray, support: SupportSet, text_images: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """G of `stack` as linear (C, D) and bias (C,), float64, from the rows (N, D) of the support set's images."""
    exact = rows.astype(np.float64)
    sums = class_sums(exact, support)
    return discriminant_of_moments(support.counts, sums, exact.T @ exact, support.text, text_images)


def class_sums(rows: np.ndarray, support: SupportSet) -> np.ndarray:
    """The sums (C, D) float64 of the rows (N, D) of each class."""
    present = support.counts > 0
    sums = np.zeros((support.n_classes, rows.shape[1]))
    sums[present] = np.add.reduceat(rows.astype(np.float64), support.class_offsets[:-1][present], axis=0)
    return sums


def discriminant_of_moments(
    counts: np.ndarray, sums: np.ndarray, second: np.ndarray, text: np.ndarray | None, text_images: float
) -> tuple[np.ndarray, np.ndarray]:
    """`linear_discriminant` from counts (C,), sums (C, D) and the second moment (D, D) of the images."""
    present = counts > 0
    copies, texts = (0.0, np.zeros_like(sums)) if text is None else (text_images, text.astype(np.float64))
    means, precision, excess = estimate(counts[present], sums[present], second, texts[present], copies)
    if copies or counts.sum() > present.sum():
        # To the precision of one image, which shots do not change; shrunk_precision has D / (N - 1) of it.
        scale = (counts.sum() + copies * present.sum() - 1) / len(precision)
        precision, excess = scale * precision, scale * excess
    linear, bias = np.empty((len(counts), second.shape[1])), np.empty(len(counts))
    linear[present] = means @ precision
    linear[~present] = linear[present].mean(0)
    bias[present] = -0.5 * (np.einsum("cd,cd->c", linear[present], means) - excess)
    bias[~present] = bias[present].mean()
    return linear, bias


def one_hot(support: SupportSet) -> np.ndarray:
    """Y of `stack`, (N, C) float64."""
    return np.eye(support.n_classes)[support.labels]


def zero_shot(support: SupportSet) -> np.ndarray:
    """F of `stack`, (N, C) float64: the cosines of the support images and the texts; 0 without texts."""
    if support.text is None:
        return np.zeros((len(support.embeddings), support.n_classes))
    cosines: np.ndarray = support.embeddings.plain.astype(np.float64) @ support.text.T
    return cosines


def multi_label(images: MultiLabelSet, which: Which, setting: Mapping[str, float]) -> dict[str, KeyTerm | LinearTerm]:
    """Method.multi_label: the regression on the embeddings `which`, and the discriminant on all that there are."""
    known: dict[str, LinearTerm] | None = vars(images).get("_discriminants")  # the same at all settings
    if known is None:
        known = {"discriminant": multi_label_discriminant(images, "plain")}
        if images.embeddings.adapted is not None:
            known["discriminant_adapted"] = multi_label_discriminant(images, "adapted")
        vars(images)["_discriminants"] = known
    return {"regression": regress_labels(images, which, setting["beta"], setting["ridge"]), **known}


def multi_label_discriminant(images: MultiLabelSet, which: Which) -> LinearTerm:
    """G of `stack` minus its mean over classes, where an image counts for each of its classes: mu_c is the mean of the
    images with label c, Sigma the covariance around these means over all pairs of image and label. The mean says how
    unlike all classes an image is, not which it has. Left-out images are those of a fold of up to _FOLDS, over which
    the images of a class are spread.
    """
    rows, queries = (images.rows(which, own).astype(np.float64) for own in (False, True))

    def of(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels, some = images.labels[chosen].astype(np.float64), rows[chosen]
        if not labels.any():  # all labels are those of one image, which is left out
            return np.zeros((images.n_classes, rows.shape[1])), np.zeros(images.n_classes)
        second = (some * labels.sum(1)[:, None]).T @ some
        linear, bias = discriminant_of_moments(labels.sum(0), labels.T @ some, second, None, 0.0)
        return linear - linear.mean(0), bias - bias.mean()

    folds, left_out = _spread_folds(images.labels), np.zeros(images.labels.shape)
    for fold in range(folds.max() + 1):
        linear, bias = of(folds != fold)
        left_out[folds == fold] = queries[folds == fold] @ linear.T + bias
    return LinearTerm(which, *of(np.ones(len(rows), bool)), left_out)


def _spread_folds(labels: np.ndarray) -> np.ndarray:
    """A fold for each image (N,), of up to _FOLDS: that with fewest images of its classes, then fewest at all."""
    number = min(_FOLDS, len(labels))
    of_class, sizes = np.zeros((number, labels.shape[1])), np.zeros(number)
    folds = np.zeros(len(labels), np.int64)
    for i, row in enumerate(labels):
        folds[i] = np.lexsort((sizes, of_class[:, row].sum(1)))[0]
        of_class[folds[i]] += row
        sizes[folds[i]] += 1
    return folds


METHOD = Method(
    "stack",
    stack,
    parameters={
        "text": 1.0,
        "discriminant": 0.03,
        "regression": 5.0,
        "text_regression": 5.0,
        "beta": 1.0,
        "ridge": 0.1,
        "text_images": 0.0,
    },
    adapted_parameters={"discriminant_adapted": 0.03, "adapted_keys": 1.0},
    scales="cache",
    weighted=True,
    multi_label=multi_label,
)
