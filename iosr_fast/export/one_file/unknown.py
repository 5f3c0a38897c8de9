"""The score for pictures of unknown classes (methods.unknown) in a graph, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from iosr_fast.export.one_file.logits import largest, logits_of, odds_of_largest
from iosr_fast.export.one_file.value import Value
from iosr_fast.methods.models.model import Model, TextModel, join_terms
from iosr_fast.methods.ood_scores import BackgroundModel, DensityModel, NearestKeyModel
from iosr_fast.methods.unknown import Unknown


def unknown_score(unknown: Unknown, embeddings: Mapping[str, Value]) -> Value:
    """Unknown.score (B,) of "plain" and "adapted" `embeddings` (B, D)."""
    scorer = unknown.scorer
    columns = _columns(scorer.models, embeddings)
    if scorer.unknown_keys is not None:
        columns.append(largest(embeddings[scorer.unknown_which] @ scorer.unknown_keys.T).op("Neg"))
    weighted = [column * -weight for column, weight in zip(columns, unknown.weights.tolist(), strict=True) if weight]
    return sum(weighted[1:], weighted[0]) - unknown.bias


def _columns(models: Iterable[Model], embeddings: Mapping[str, Value]) -> list[Value]:
    """Each score (B,) of OodScores, in its order."""
    columns: list[Value] = []
    for model in models:
        n_classes = model.support.n_classes
        match model:
            case NearestKeyModel():
                columns.append(largest(embeddings[model.which] @ model.fields()["keys"].T))
            case BackgroundModel():  # after DensityModel, whose last score is "mahalanobis"
                columns.append(columns[-1] - largest(_densities(model, embeddings[model.which])))
            case DensityModel():
                logits = _densities(model, embeddings[model.which])
                columns += [odds_of_largest(logits, n_classes), largest(logits)]
            case _:
                logits = logits_of(join_terms(n_classes, [(1.0, model.fields())]), embeddings)
                columns.append(largest(logits))
                if isinstance(model, TextModel):
                    columns.append(odds_of_largest(logits, n_classes))
    return columns


def _densities(model: DensityModel, rows: Value) -> Value:
    """(B, C) G(x) - x' P x / 2. With y = x - m, m the mean of all images, the terms are small enough for float32:

    <y, linear - P m> + bias + <m, linear> - m' P m / 2 - |L' y|^2 / 2,  P = L L'
    """
    fitted = model.fitted
    precision = fitted.span.channel_precision(fitted.precision)
    mean = fitted.span.channels(model.moments.joined.means)[0].astype(np.float32)
    moved = rows - mean
    bias = fitted.bias + fitted.linear @ mean - mean @ precision @ mean / 2
    squares = (moved @ np.linalg.cholesky(precision)).op("ReduceSumSquare", [1])
    return moved @ (fitted.linear - precision @ mean).T + bias - squares * 0.5
