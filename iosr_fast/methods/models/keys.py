"""Terms of a key for each support image: Tip-Adapter, APE's channels and weights, Tip-X's divergences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.models.model import MOST, Model
from iosr_fast.methods.support_set import ROUNDING, SupportSet, blocks, class_weights, image_rows
from iosr_fast.scoring.lower import text_distribution
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.reference import softmax

CHANNEL_SHARE = 0.75  # of the channels that APE keeps
SIMILARITY_WEIGHT = 0.7
TEMPERATURE = 0.5  # of Tip-X's distributions over texts
_SMALL = 1e-6  # inside APE's logarithm, as in the public code
_TILE = 1 << 23  # elements of a block of products: 64 MB


@dataclass(frozen=True, eq=False)
class Refinement:
    """What moves keys and the queries that are compared with them, and the divergence of each key (N,) in bits."""

    reducer: Reducer | None
    divergences: np.ndarray | float = 0.0


@dataclass(frozen=True)
class KeyModel(Model):
    """w_c sum over keys j of class c: exp(-beta (1 - <x, key[j]>)), the cache term of Tip-Adapter (Zhang et al., ECCV
    2022, equations 4 to 6). w_c (support_set.class_weights) is 1 where classes are equally large, as in the paper;
    otherwise it makes a sum as large as that of a class of mean size.
    """

    beta: float = 5.5

    @cached_property
    def fitted(self) -> Refinement:
        return self._refined(self.support)

    def _refined(self, support: SupportSet) -> Refinement:
        return Refinement(self.reducer)

    def scores(self, queries: Embeddings) -> np.ndarray:
        cosines = self._cosines(queries, self.support, self.fitted)
        return self._term(cosines, self.fitted, self.support.counts)

    def scores_without(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """As fitted on the other images. A search tries many betas, so that cosines are kept where those of all images
        with all keys are few."""
        few = self.memory is not None and 4 * len(out) ** 2 <= MOST // 2
        counts = np.bincount(self.support.labels[~out], minlength=self.support.n_classes)

        def compared() -> tuple[Refinement, Iterable[np.ndarray]]:
            others = self.support.only(~out)
            refinement = self._refined(others)
            cosines = self._cosines(self.support.as_queries[rows], others, refinement)
            return refinement, list(cosines) if few else cosines

        n_bytes = 4 * (len(rows) * len(out) + self.support.embeddings.plain.shape[1] ** 2)  # with a projection
        refinement, cosines = self._once((type(self), out.tobytes()), n_bytes, compared) if few else compared()
        return self._term(cosines, refinement, counts)

    def _cosines(self, queries: Embeddings, support: SupportSet, refinement: Refinement) -> Iterator[np.ndarray]:
        """Blocks (b, N) float32 of the cosines of queries with the keys of a support set, as a plan computes them."""
        rows, keys = (image_rows(one, self.which, refinement.reducer) for one in (queries, support.embeddings))
        for block in blocks(len(rows), _TILE // max(1, len(keys))):
            yield rows[block] @ keys.T

    def _weights(self, refinement: Refinement, counts: np.ndarray) -> np.ndarray | None:
        """(N,), `class_weights` of each key of classes with `counts` (C,); None for classes of one size, for which all
        are 1."""
        weights = class_weights(counts)
        return None if (weights == 1.0).all() else np.repeat(weights, counts)

    def _term(self, cosines: Iterable[np.ndarray], refinement: Refinement, counts: np.ndarray) -> np.ndarray:
        """(B, C) of queries with these cosines to the keys of classes with `counts` (C,)."""
        weights = self._weights(refinement, counts)
        parts = [self._sums(block, weights, counts) for block in cosines]
        return np.concatenate([np.zeros((0, len(counts))), *parts])

    def _sums(self, cosines: np.ndarray, weights: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(cosines), len(counts)))
        offsets = np.cumsum(counts) - counts
        present = np.flatnonzero(counts)  # for an empty class reduceat gives a row, not 0
        affinity = np.exp((cosines - np.float32(1.0)) * np.float32(self.beta))
        if weights is not None:
            affinity *= weights.astype(np.float32)
        if len(present):
            scores[:, present] = np.add.reduceat(affinity, offsets[present], axis=1, dtype=np.float64)
        return scores

    def fields(self) -> dict[str, Any]:
        reducer = self.fitted.reducer
        return {
            "keys": image_rows(self.support.embeddings, self.which, reducer),
            "class_offsets": self.support.class_offsets,
            "weights": self._weights(self.fitted, self.support.counts),
            "query": self.which,
            "reducer": reducer,
            "alpha": 1.0,
            "beta": self.beta,
        }


@dataclass(frozen=True)
class RefinedKeyModel(KeyModel):
    """KeyModel on a subset of channels, with key j weighted by exp(gamma * KL(label[j] || p[j])): APE, adaptive prior
    refinement (Zhu et al., ICCV 2023, equations 6 to 12).

    p[j] = softmax(<key[j], text>), both restricted to the subset and normalised again. The subset is the three quarters
    of the D channels with the largest 0.3 * variance over texts - 0.7 * similarity between classes (`choose_channels`):
    the paper's weights for ImageNet. The paper chooses the number of channels for each data set.
    """

    gamma: float = 0.1

    def _refined(self, support: SupportSet) -> Refinement:
        rows = image_rows(support.embeddings, self.which, self.reducer)
        channels = choose_channels(rows, support.one_hot, self._text)
        only = Reducer(projection=channels)
        cosines = (only(support.embeddings.plain) @ only(self._text).T).astype(np.float64)
        shares = softmax(cosines)[np.arange(len(cosines)), support.labels]
        divergences = np.log2((1 + _SMALL) / (shares + _SMALL))
        return Refinement(only if self.reducer is None else self.reducer.then(channels), divergences)

    def _weights(self, refinement: Refinement, counts: np.ndarray) -> np.ndarray:
        of_classes = super()._weights(refinement, counts)
        with np.errstate(over="ignore"):  # ScoringPlan rejects weights that are too large
            weights: np.ndarray = np.exp(self.gamma * refinement.divergences)
        return weights if of_classes is None else weights * of_classes


def choose_channels(rows: np.ndarray, labels: np.ndarray, text: np.ndarray) -> np.ndarray:
    """(D,), 1 for chosen channels and 0 for others, by images (N, D) with labels (N, C) and texts (C, D).

    A channel's similarity is the mean of f_i f_j over all pairs of embeddings of different classes; the embeddings of a
    class are its text and its images. With F_c and m_c their sum and number in class c, that is
    ((sum F)^2 - sum F^2) / ((sum m)^2 - sum m^2). A channel's variance is that of the texts.
    """
    exact = text.astype(np.float64)
    sums = exact + labels.T @ rows
    numbers = 1 + labels.sum(0)
    similarity = (sums.sum(0) ** 2 - (sums**2).sum(0)) / max(1.0, numbers.sum() ** 2 - (numbers**2).sum())
    variance = exact.var(0, ddof=1) if len(exact) > 1 else np.zeros(exact.shape[1])
    criterion = (1 - SIMILARITY_WEIGHT) * variance - SIMILARITY_WEIGHT * similarity
    channels = np.zeros(exact.shape[1])
    channels[np.argsort(-criterion, kind="stable")[: max(1, round(CHANNEL_SHARE * len(channels)))]] = 1
    return channels


@dataclass(frozen=True)
class DivergenceModel(Model):
    """w_c sum over images j of class c: -scale(KL(s || S[j])), the third term of Tip-X (Udandarao et al., ICCV 2023,
    equations 5 to 7), w_c as in KeyModel.

    s (B, C) and S (N, C) are softmax(<plain, text> / 0.5) of queries and images; scale takes the range of the
    divergences to that of the cosines between images. With H = sum of s log(C s), the sum over a class collapses to a
    linear term over [s, H]:

        sum_j KL(s || S[j]) = n_c H - <s, sum_j log(C S[j])>

    The factor C affects only the rounding: both terms are as small as the divergences, instead of differences of large
    entropies. The public code takes both ranges over the whole test set, so that a label depends on its batch. Here
    they are those over all pairs of different support images, frozen in the plan (with a single image the term is not
    scaled). tests/methods/test_parity_formulas.py has the literal form.
    """

    @cached_property
    def fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """The linear term (C, C + 1) and its bias (C,)."""
        support = self.support
        s = self._distributions(support.embeddings)
        log_s = np.log(support.n_classes * s[:, :-1])
        least, most = pair_range(-log_s, s[:, :-1], s[:, -1:])
        keys = image_rows(support.embeddings, self.which, self.reducer)
        low, high = pair_range(keys, keys)
        # Divergences that differ by no more than their rounding in float32 have no usable range.
        resolved = most - least > ROUNDING * float(np.abs(log_s).max(initial=0.0))
        slope = (high - low) / (most - least) if resolved else 1.0
        weights = class_weights(support.counts)
        counts = weights * support.counts
        summed = weights[:, None] * (support.one_hot.T @ log_s)
        return slope * np.hstack([summed, -counts[:, None]]), -(low - slope * least) * counts

    def _distributions(self, embeddings: Embeddings) -> np.ndarray:
        """[s, H], (B, C + 1) float64."""
        cosines = np.asarray(embeddings.plain, np.float64) @ self._text.T.astype(np.float64)
        return text_distribution(cosines, TEMPERATURE)

    def scores(self, queries: Embeddings) -> np.ndarray:
        linear, bias = self.fitted
        return self._distributions(queries) @ linear.T + bias

    def fields(self) -> dict[str, Any]:
        linear, bias = self.fitted
        return {"linear": linear, "bias": bias, "feature": "text-distribution", "temperature": TEMPERATURE}


def pair_range(rows: np.ndarray, others: np.ndarray, offset: np.ndarray | float = 0.0) -> tuple[float, float]:
    """The least and the largest of offset[i] + <others[i], rows[j]> over i != j; (0, 0) for fewer than two rows.

    rows, others (N, D), offset (N, 1) or a number; in blocks of bounded memory.
    """
    if len(rows) < 2:
        return 0.0, 0.0
    low = np.inf
    high = -np.inf
    numbers = np.arange(len(rows))
    offsets = np.broadcast_to(offset, (len(rows), 1))
    for block in blocks(len(rows), _TILE // len(rows)):
        apart = (others[block] @ rows.T + offsets[block])[numbers[block, None] != numbers]
        low, high = min(low, float(apart.min())), max(high, float(apart.max()))
    return low, high
