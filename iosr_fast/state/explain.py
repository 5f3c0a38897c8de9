"""From logits to predictions that people can look at: the parts of each logit, and the nearest support images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.support_set import image_rows
from iosr_fast.state.predictions import ClassScore, Neighbour, Prediction, class_id

if TYPE_CHECKING:
    from iosr_fast.state.state import State


def softmax(logits: np.ndarray) -> np.ndarray:
    """Row by row, (B, C)."""
    powers = np.exp(logits - logits.max(1, keepdims=True)) if len(logits) else logits
    probabilities: np.ndarray = powers / powers.sum(1, keepdims=True)
    return probabilities


def explain(state: State, embeddings: Embeddings, top: int, nearest: int, impl: str = "auto") -> list[Prediction]:
    """State.explain: logit = zero_shot + cache with zero_shot = factor * tau * <plain, text>, for the `top` classes.

    cache is all that the support images add, through keys or a linear term. Raises ValueError for top < 1 or
    nearest < 0, and as `score` does.
    """
    if top < 1 or nearest < 0:
        raise ValueError(f"expected top >= 1 and nearest >= 0, got {top} and {nearest}")
    logits = state.score(embeddings, impl)
    probabilities = softmax(logits)
    scale = np.float32(state.recipe.factor * state.tau)
    best = _leading(logits, top)
    found = neighbours(state, embeddings, nearest) if nearest else [()] * len(logits)
    ids, names = [class_id(uid) for uid in state.uids], state.class_names
    made = []
    for b, chosen in enumerate(best):
        logit = logits[b, chosen]
        zero_shot = scale * (state.text[chosen] @ embeddings.plain[b])
        columns = (chosen, probabilities[b, chosen], logit, zero_shot, logit - zero_shot)
        scores = tuple(
            ClassScore(names[c], ids[c], probability, value, text_part, rest)
            for c, probability, value, text_part, rest in zip(*(x.tolist() for x in columns), strict=True)
        )
        first = scores[0]
        made.append(
            Prediction(
                first.label,
                first.class_id,
                first.probability,
                first.logit,
                first.zero_shot,
                first.cache,
                scores,
                found[b],
                state.version,
            )
        )
    return made


def neighbours(state: State, embeddings: Embeddings, nearest: int) -> list[tuple[Neighbour, ...]]:
    """The support images with the highest cosine to each query, as the state's method compares images."""
    rows = image_rows(embeddings, state.recipe.which, state.recipe.reducer)
    blocks = [rows @ compared.T for compared in state.compared]
    if not blocks:
        return [()] * len(rows)
    for part, block in zip(state.segments, blocks, strict=True):
        if part.dead is not None:
            block[:, part.dead] = -np.inf
    cosines = np.concatenate(blocks, axis=1)
    owners = np.concatenate([part.owners for part in state.segments])
    numbers = np.concatenate([part.ids for part in state.segments])
    name_of = dict(zip(state.uids, state.class_names, strict=True))
    made = []
    for row, chosen in zip(cosines, _leading(cosines, nearest), strict=True):
        living = chosen[np.isfinite(row[chosen])]
        made.append(
            tuple(
                Neighbour(
                    f"e{numbers[j]}",
                    name_of[int(owners[j])],
                    class_id(int(owners[j])),
                    float(np.clip(row[j], -1.0, 1.0)),
                )
                for j in living
            )
        )
    return made


def _leading(values: np.ndarray, count: int) -> np.ndarray:
    """(B, k) column indices of each row's largest values, largest first; of equals the first, as argmax takes it."""
    width = values.shape[1]
    if count >= width or width <= 256:
        return np.argsort(-values, axis=1, kind="stable")[:, :count]
    # The k-th largest value of a row marks who may be among the first k; ties at the mark fall to the lowest index.
    marks = np.partition(values, width - count, axis=1)[:, width - count]
    made = np.empty((len(values), count), np.int64)
    for b, (row, mark) in enumerate(zip(values, marks, strict=True)):
        candidates = np.flatnonzero(row >= mark)
        made[b] = candidates[np.argsort(-row[candidates], kind="stable")][:count]
    return made
