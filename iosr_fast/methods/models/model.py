"""What all families share: a term of the logits, its predictions without a fold, and the plan of a sum of terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.methods.folds import Folds
from iosr_fast.methods.support_set import SupportSet, image_rows
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer

_T = TypeVar("_T")
MOST = 1 << 28  # bytes


class Memory:
    """What models of one support set share while they are judged: values by their keys, of at most MOST bytes together;
    the one that was asked for least recently goes first."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[object, int]] = {}

    def get(self, key: Hashable, n_bytes: int, make: Callable[[], _T]) -> _T:
        """The value of a key, made if it is not kept; one of more than MOST bytes is never kept."""
        entry = self._kept.pop(key, None)
        value: _T = make() if entry is None else entry[0]  # type: ignore[assignment]
        if n_bytes <= MOST:
            while sum(size for _, size in self._kept.values()) + n_bytes > MOST:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = value, n_bytes
        return value


@dataclass(frozen=True)
class Model(ABC):
    """A term of the logits, fitted on a support set at the first use, in float64. Equal fields, equal models.

    which    the embeddings of images that it compares
    reducer  moves these embeddings first. It sees no label, so it is fitted on all support images, left-out ones too:
             the accuracy of these is 0.8 to 2 points too high with "pca" and two images a class, else at most 0.4
    memory   for what models of other parameters need, too; None: nothing is kept
    """

    support: SupportSet
    which: Which = "plain"
    reducer: Reducer | None = None
    memory: Memory | None = field(default=None, compare=False, repr=False, kw_only=True)

    @cached_property
    def fitted(self) -> Any:
        """What the fit of all support images gives, for `scores` and `fields`; None if that is nothing."""
        return None

    @abstractmethod
    def scores(self, queries: Embeddings) -> np.ndarray:
        """The term of each query and class, (B, C)."""

    @abstractmethod
    def fields(self) -> dict[str, Any]:
        """The fields of a ScoringPlan that give this term (`join_terms`)."""

    def without(self, folds: Folds) -> np.ndarray:
        """(N, C): the term of each support image as a query, fitted without the images of its fold; NaN for an image
        that is not scored."""
        scores = np.full((len(self.support.embeddings), self.support.n_classes), np.nan)
        for rows, out in folds.splits:
            scores[rows] = self.scores_without(rows, out)
        return scores

    def scores_without(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """(len(rows), C): the term of some of the images `out` (N,) bool as queries, fitted without all of these.
        Families with a closed form override this."""
        others = replace(self.unfitted(), support=self.support.only(~out))
        return others.scores(self.support.as_queries[rows])

    def in_use(self, rows: np.ndarray, units: np.ndarray) -> np.ndarray:
        """(len(rows), C): the term of these support images as the fit of all images has it for new ones; `units` (N,)
        as of folds.Folds. Here that is their own score, of which only the classes that are not their own compare with
        those of new images."""
        return self.scores(self.support.as_queries[rows])

    def unfitted(self) -> Self:
        """An equal model that holds nothing that was computed."""
        return replace(self, memory=None)

    def kept(self) -> Self:
        """An equal model that holds `fitted`, and nothing else that was computed."""
        model = self.unfitted()
        vars(model)["fitted"] = self.fitted
        return model

    def _once(self, name: Hashable, n_bytes: int, make: Callable[[], _T]) -> _T:
        """What the models of these embeddings compute under a name, whatever their other parameters."""
        return make() if self.memory is None else self.memory.get((self.which, self.reducer, name), n_bytes, make)

    @property
    def _text(self) -> np.ndarray:
        assert self.support.text is not None  # guaranteed by unavailable_reason
        return self.support.text

    def _rows(self, embeddings: Embeddings) -> np.ndarray:
        """The rows (B, D) float64 that it compares."""
        return image_rows(embeddings, self.which, self.reducer).astype(np.float64)


# A weight and the model that it multiplies.
Term = tuple[float, Model]


@dataclass(frozen=True)
class TextModel(Model):
    """tau <plain, text>, zero-shot CLIP (Radford et al., ICML 2021); zeros without texts. Images change nothing."""

    def scores(self, queries: Embeddings) -> np.ndarray:
        if self.support.text is None:
            return np.zeros((len(queries), self.support.n_classes))
        return self.support.tau * (np.asarray(queries.plain, np.float64) @ self.support.text.T)

    def fields(self) -> dict[str, Any]:
        text = self.support.text
        return {} if text is None else {"text": text, "tau": self.support.tau}


# The fields of a plan that a term's weight multiplies.
_WEIGHTED = ("tau", "alpha", "values", "linear", "bias")


def join_terms(n_classes: int, terms: Iterable[tuple[float, Mapping[str, Any]]], **fields: Any) -> ScoringPlan:
    """The plan whose logits are the sum of weighted terms, given by their `fields` of a plan. Terms with values share
    their keys, linear terms of plain and of adapted embeddings stand side by side. `fields` are further ones. Raises
    IosrFastError as ScoringPlan does."""
    for weight, term in terms:
        for name, value in term.items():
            weighted = weight * value if name in _WEIGHTED else value
            if name not in fields:
                fields[name] = weighted
            elif name in ("values", "bias"):
                fields[name] = fields[name] + weighted
            elif name == "linear":
                fields[name] = np.concatenate([fields[name], weighted], axis=1)
            elif name == "feature" and fields[name] != value:
                fields[name] = "both"
    return ScoringPlan(n_classes, **fields)
