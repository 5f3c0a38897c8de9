"""Every answer of a classifier is of one version, whatever takes its place meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.classifier import Classifier
from iosr_fast.head.fitted import Fit
from iosr_fast.store.store import Store
from tests.classifier.conftest import GIVEN, NAMES
from tests.store.live_parts import pixel_clip

QUESTIONS: dict[str, Callable[[Classifier, Any, Path], Any]] = {
    "predict": lambda one, images, _: one.predict(images).tolist(),
    "predict_proba": lambda one, images, _: one.predict_proba(images).tolist(),
    "predict_sets": lambda one, images, _: [each.tolist() for each in one.predict_sets(images)],
    "unknown_score": lambda one, images, _: one.unknown_score(images).tolist(),
    "explain": lambda one, images, _: one.explain(images, nearest=2),
    "predict_jointly": lambda one, images, _: one.predict_jointly(images).labels.tolist(),
    "predict_folder": lambda one, _, folder: [*one.predict_folder(folder)],
    "suggest": lambda one, _, folder: [*one.suggest(folder, 5)],
    "evaluate": lambda one, images, _: one.evaluate(images, NAMES[:1] * len(images)).to_dict(),
}


class Refitted(Store):
    """Another fit takes the place of the first one as soon as that is read."""

    def __init__(self, first: Fit, second: Fit) -> None:
        self.fits = [first, second]
        super().__init__()

    @property
    def fit(self) -> Fit:
        return self.fits.pop(0) if len(self.fits) > 1 else self.fits[0]

    @fit.setter
    def fit(self, fit: Fit) -> None:
        pass


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_refit_during_a_question_changes_no_answer(question: str, data: Any, paths: list[str]) -> None:
    clips, (images, labels) = (pixel_clip(), pixel_clip()), data
    clips[1].encoder.projections = clips[0].encoder.projections[::-1, ::-1]  # type: ignore[attr-defined]
    fitted = [
        Classifier._with_clip(clip, **GIVEN).fit(images, np.roll(NAMES, i)[labels].tolist())
        for i, clip in enumerate(clips)
    ]
    first, second = (QUESTIONS[question](one, images, Path(paths[0]).parent) for one in fitted)
    classifier = fitted[0]
    classifier._store = Refitted(classifier._fit, fitted[1]._fit)
    assert QUESTIONS[question](classifier, images, Path(paths[0]).parent) == first != second
