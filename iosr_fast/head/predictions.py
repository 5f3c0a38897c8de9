"""Answers to embeddings: the label with the parts of each logit and the nearest support images, or a set of labels."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.head import Head
from iosr_fast.head.ids import class_id, example_id
from iosr_fast.head.labels import SEPARATOR
from iosr_fast.head.verdict import NONE_WITHHELD, Abstention, Rejection, Verdict, judge
from iosr_fast.methods import joint
from iosr_fast.methods.links import largest
from iosr_fast.methods.support_set import image_rows
from iosr_fast.methods.tree import Path
from iosr_fast.scoring.arrays import add_product_blas
from iosr_fast.scoring.fields import EMBEDDINGS
from iosr_fast.scoring.lower import feature_rows
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.short_repr import short_repr


@dataclass(frozen=True)
class ClassScore:
    """One class of a Prediction: logit = zero_shot + cache.

    `zero_shot` is the contribution of the class name, `cache` that of the support images, and `adapter` the part of it
    that comes through adapted embeddings. `probability` is the softmax over the logits of all classes, those that are
    not shown included, divided by the temperature (Head.temperature). `class_id` stays when a class is renamed.

    >>> score = ClassScore("pear", "~1", probability=0.9, logit=25.0, zero_shot=22.0, cache=3.0, adapter=1.0)
    >>> score.cache - score.adapter  # through plain embeddings of pictures
    2.0
    """

    label: str
    class_id: str
    probability: float
    logit: float
    zero_shot: float
    cache: float
    adapter: float


@dataclass(frozen=True)
class Neighbour:
    """A support image near the query; `similarity` is the cosine, in [-1, 1], of what the method compares. Where it has
    several labels, `label` and `class_id` have all of them, joined by ";".

    >>> Neighbour("~7", "pear", "~1", similarity=0.93).label
    'pear'
    """

    example_id: str
    label: str
    class_id: str
    similarity: float


@dataclass(frozen=True)
class Prediction:
    """The answer to one image and the reasons for it, all of one `version` of the classifier.

    `top` are the classes with the largest logits, best first: top[0] is the label. Where pictures may have several
    labels, `top` are all that the image has, most likely first, and `label` is the first of them, None of none. A label
    is a node of the tree where a promise accepts one: `level` is 0 for a class, 1 for the deepest nodes, and so on;
    `path` has the names of the nodes above the label, from the root down; `probability` is that of the node, the sum
    over its classes, and a node above classes has no class_id. `nearest` are the support images with the largest
    cosines, best first. `unknown` is None unless it was asked for; `label` and `class_id` are None for a picture that
    is rejected. `accepted` is whether a promise about errors lets the label pass without a look, None unless it was
    asked for; where pictures may have several labels, a tuple, of each of `top`. The other fields are those of the
    class with the largest logit (ClassScore).

    >>> from iosr_fast import Classifier
    >>> classifier = Classifier("demo", method="tip-adapter++").fit_folder("support")
    >>> [prediction] = classifier.explain("support/lemon/0.jpg", top=2, nearest=1)
    >>> prediction.label, len(prediction.top), prediction.nearest[0].label
    ('lemon', 2, 'lemon')
    >>> round(prediction.nearest[0].similarity, 3)  # it is one of the support images
    1.0
    >>> import numpy as np
    >>> from iosr_fast import FewShotHead
    >>> y = np.repeat(["siamese", "bengal", "pug"], 40)  # the first two look alike
    >>> X = np.repeat(np.eye(2, 8)[[0, 0, 1]], 40, axis=0) + 0.2 * np.random.default_rng(0).normal(size=(120, 8))
    >>> head = FewShotHead(look_alikes=False).fit(X, y, tree={"siamese": "cat", "bengal": "cat"})
    >>> [answer] = head.explain(X[:1], max_error=0.1)
    >>> answer.label, answer.level, answer.path, answer.top[0].label in ("siamese", "bengal")
    ('cat', 1, (), True)
    """

    label: str | None
    class_id: str | None
    probability: float
    logit: float
    zero_shot: float
    cache: float
    adapter: float
    top: tuple[ClassScore, ...]
    nearest: tuple[Neighbour, ...]
    version: int
    unknown: Rejection | None = None
    accepted: bool | tuple[bool, ...] | None = None
    level: int = 0
    path: Path = ()
    __repr__ = short_repr

    @property
    def pairs(self) -> list[tuple[str, float]]:
        """(label, probability) of each class of `top`."""
        return [(one.label, one.probability) for one in self.top]

    @property
    def accepted_labels(self) -> list[str]:
        """The labels that a promise lets pass: one or none, or where pictures may have several any number."""
        if isinstance(self.accepted, tuple):
            return [one.label for one, accepted in zip(self.top, self.accepted, strict=True) if accepted]
        return [self.label] if self.accepted and self.label is not None else []

    @property
    def answer(self) -> tuple[str, float]:
        """(label, probability) of the answer that is accepted, else of the most likely class."""
        return (self.label, self.probability) if self.label is not None and self.accepted else self.pairs[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        top, nearest = ([dict(vars(one)) for one in group] for group in (self.top, self.nearest))
        unknown = None if self.unknown is None else dict(vars(self.unknown))
        # A tenth of the time of dataclasses.asdict.
        return {**vars(self), "top": top, "nearest": nearest, "unknown": unknown}


def predict(
    head: Head,
    embeddings: Embeddings,
    top: int = 1,
    nearest: int = 0,
    abstention: Abstention = NONE_WITHHELD,
    logits: np.ndarray | None = None,
) -> list[Prediction]:
    """A Prediction for each query (B, D), of the Verdict by `abstention`; `top` and `nearest` as of `explained`,
    `logits` of queries that are scored already."""
    top, nearest = check_integer("top", top, 1), check_integer("nearest", nearest, 0)
    return explained(head, embeddings, judge(head, embeddings, abstention, logits), top, nearest)


def explained(head: Head, embeddings: Embeddings, verdict: Verdict, top: int, nearest: int) -> list[Prediction]:
    """A Prediction for each query of a Verdict: its `top` classes, or all that it has where these may be several, and
    the `nearest` support images, or all if there are fewer.

    logit = zero_shot + cache with zero_shot = weight * tau * <plain, text> (Config.text_weight), 0 without texts;
    cache is the contribution of the support images, through keys or a linear term, and `adapter` of it what adapted
    embeddings contribute (_adapter_part). Ties fall to the first class, as in argmax.
    """
    logits = verdict.logits
    embeddings = embeddings.to_numpy()
    unasked: list[Any] = [None] * len(logits)
    rejections = verdict.rejections or unasked
    accepted = unasked if verdict.accepted is None else verdict.accepted.tolist()
    zero_shot = np.zeros_like(logits)
    if head.text is not None:
        zero_shot = np.float32(head.text_weight) * (embeddings.plain @ head.text.T)
    cache = logits - zero_shot
    parts = head.probabilities(logits), logits, zero_shot, cache, _adapter_part(head, embeddings, cache)
    neighbours = _neighbours(head, embeddings, nearest) if nearest else [()] * len(logits)
    ids = [class_id(uid) for uid in head.uids]
    names = head.class_names
    predictions = []
    for b, classes in enumerate(head.link.listed(logits, top)):
        shown = classes if len(classes) else logits[b].argmax(keepdims=True)
        columns = (part[b, shown].tolist() for part in parts)
        scores = tuple(ClassScore(names[c], ids[c], *row) for c, *row in zip(shown.tolist(), *columns, strict=True))
        fields = {**vars(scores[0]), "top": scores[: len(classes)], "nearest": neighbours[b], "version": head.version}
        fields |= {"unknown": rejections[b], "accepted": accepted[b]}
        if isinstance(one := accepted[b], list):
            fields["accepted"] = tuple(one[c] for c in classes.tolist())
        if not len(classes) or (verdict.rejected is not None and verdict.rejected[b]):
            fields |= {"label": None, "class_id": None}
        else:
            node = shown[0] if head.is_multi_label else verdict.labels[b]
            fields |= _node_fields(head, int(node), parts[0][b])
        predictions.append(Prediction(**fields))
    return predictions


def _node_fields(head: Head, node: int, probabilities: np.ndarray) -> dict[str, Any]:
    """The fields of a Prediction that say which node the label is; `probabilities` (C,) are those of classes."""
    tree = head.tree
    fields: dict[str, Any] = {"level": int(tree.level_of[node]), "path": tree.path_of(node)}
    if node >= len(head.uids):
        mass = float(probabilities[tree.holds(np.array(node), np.arange(len(head.uids)))].sum())
        fields |= {"label": head.node_names[node], "class_id": None, "probability": min(mass, 1.0)}
    return fields


def _adapter_part(head: Head, embeddings: Embeddings, cache: np.ndarray) -> np.ndarray:
    """How much of `cache` (B, C), what the support images contribute, comes through adapted embeddings.

    If the terms of the plan read one kind of embedding, that is all of it or nothing. If they read both, it is the half
    of the linear term that is the adapted part or, where the keys are adapted, too, what is left of `cache` beside the
    other half. A linear term over the distribution of texts (Tip-X) reads plain ones.
    """
    plan = head.plan
    read: set[str] = {plan.query} if plan.keys is not None else set()
    if plan.linear is not None:
        read |= set(EMBEDDINGS) if plan.feature == "both" else {plan.feature}
    if "adapted" not in read:
        return np.zeros_like(cache)
    if read == {"adapted"} or plan.linear is None:
        return cache
    adapted_keys = plan.keys is not None and plan.query == "adapted"
    columns = slice(None)
    bias = np.zeros(plan.n_classes) if plan.bias is None else plan.bias
    if plan.feature == "both":
        columns = slice(plan.width) if adapted_keys else slice(plan.width, None)
        bias = bias - head.adapted_bias if adapted_keys else head.adapted_bias
    features = feature_rows(plan, embeddings, add_product_blas)[:, columns]
    product: np.ndarray = features @ plan.linear[:, columns].T + bias
    return cache - product if adapted_keys else product


def predict_jointly(
    head: Head, embeddings: Embeddings, classes: np.ndarray, check: bool = True
) -> joint.JointPrediction:
    """Queries (B, D) of the head's encoder, classified together (methods.joint), with labels of `classes` (C,).
    `check=False` takes rows that are not of unit norm."""
    plan, alone = head.plan.scaled(1.0 / head.temperature), head.calibrated_out_of_fold
    prediction = joint.predict_jointly(head.support, plan, alone, embeddings, head.config.which, check)
    return replace(prediction, classes=classes)


def _neighbours(head: Head, embeddings: Embeddings, nearest: int) -> list[tuple[Neighbour, ...]]:
    """The support images with the highest cosine to each query, as the head's method compares images."""
    rows = image_rows(embeddings, head.config.which, head.reducer)
    examples = head.examples
    if not len(examples):
        return [()] * len(rows)

    def neighbour(j: int, cosine: float) -> Neighbour:
        uids = examples.uids_of(j)
        names = SEPARATOR.join(head.class_names[bisect_left(head.uids, uid)] for uid in uids)
        ids = SEPARATOR.join(map(class_id, uids))
        return Neighbour(example_id(examples.ids[j]), names, ids, min(max(cosine, -1.0), 1.0))

    cosines = rows @ head.compared.T
    rows_and_best = zip(cosines, largest(cosines, nearest), strict=True)
    return [tuple(map(neighbour, best.tolist(), row[best].tolist())) for row, best in rows_and_best]
