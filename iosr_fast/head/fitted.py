"""What a fitted classifier shows of itself."""

from __future__ import annotations

import numpy as np

from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.fit import Fit
from iosr_fast.head.head import ClassInfo, Head
from iosr_fast.head.ids import example_id
from iosr_fast.head.multi_label import MultiLabels
from iosr_fast.methods.multi_label_set import MultiLabelSet
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.tuned import Tuned
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import Precision
from iosr_fast.utils.estimator import not_fitted


class FittedAttributes:
    """The part of Classifier that reads what is fitted. All of it raises NotFittedError before a fit.

    `_fit` is immutable and replaced in one step: whoever reads it once has a head and the encoder that belongs to it.
    """

    _fit: Fit | None = None

    def _fitted(self) -> Fit:
        if self._fit is None:
            raise not_fitted(f"this {type(self).__name__} is not fitted yet: call fit or fit_folder first")
        return self._fit

    def snapshot(self) -> Head:
        """The current head, which never changes: all predictions of it are of one version."""
        return self._fitted().head

    @property
    def classes_(self) -> np.ndarray:
        """(C,) the class names; the classes' integers (int64) if the fit had integer labels."""
        return self._fitted().labels()

    @property
    def plan_(self) -> ScoringPlan:
        """The plan that the scoring kernels execute."""
        return self.snapshot().whole_plan

    @property
    def support_(self) -> SupportSet | MultiLabelSet:
        """The encoded support images and class names; a MultiLabelSet after a fit with several labels a picture."""
        head = self.snapshot()
        if head.multi_label is None:
            return head.support
        rows = head.examples
        return MultiLabelSet(rows.embeddings, head.multi_label.labels, head.text, head.tau, rows.queries)

    @property
    def multi_label_(self) -> MultiLabels | None:
        """After a fit with several labels a picture, the labels of the support images and the threshold of each class;
        otherwise None."""
        return self.snapshot().multi_label

    @property
    def method_(self) -> str:
        """The method that was fitted, chosen if the parameter is "auto"."""
        return self.snapshot().config.method

    @property
    def reducer_(self) -> str:
        """The reducer that was fitted."""
        return self.snapshot().config.reducer_name

    @property
    def parameters_(self) -> dict[str, float]:
        """The parameters of the fitted method."""
        return dict(self.snapshot().config.parameters)

    @property
    def key_precision_(self) -> Precision:
        """The precision of the keys."""
        return self.snapshot().config.key_precision

    @property
    def tuned_(self) -> Tuned | None:
        """The last search of parameters, `stale` if the classifier has changed since; None if they were given."""
        return self.snapshot().tuned

    @property
    def skipped_(self) -> list[str]:
        """The unreadable images that `skip_bad` left out of the fit."""
        return [error.where for error in self._fitted().skipped]

    @property
    def engine_choice_(self) -> EngineChoice | None:
        """The candidates for the engine and what was measured of each; None if none were tried."""
        return self._fitted().engine_choice

    @property
    def exif_orientation_(self) -> bool:
        """Whether images are turned upright by EXIF, as they were at the fit."""
        return self._fitted().views.exif_orientation

    @property
    def version(self) -> int:
        """Rises by one with every change."""
        return self.snapshot().version

    def classes(self) -> list[ClassInfo]:
        """The classes in their order, each with its id and the number of its examples."""
        return self.snapshot().classes()

    def examples(self, name_or_id: str) -> list[str]:
        """The ids of a class's examples. Raises ValueError for an unknown class."""
        head = self.snapshot()
        return [example_id(number) for number in head.examples_of(head.find_class(name_or_id))]

    def picture(self, name_or_id: str) -> bytes | None:
        """An example's thumbnail, WebP; None where none was stored. Raises ValueError for an unknown id."""
        head = self.snapshot()
        (number,) = head.find_examples([name_or_id])
        segment, row = next(
            (segment, rows[0]) for segment in head.segments if len(rows := np.flatnonzero(segment.ids == number))
        )
        return segment.pictures[int(row)]
