"""Results in a console: at most ten lines, with what a user looks for first."""

from __future__ import annotations

import numpy as np

from iosr_fast.files.folder import FolderPredictions
from iosr_fast.images.listing import Skipped
from iosr_fast.methods.suggest import suggest
from tests.store.live_parts import pictures, small_classifier


def test_the_repr_of_a_result_fits_ten_lines_whatever_its_size() -> None:
    classifier = small_classifier(classes=300, shots=2)
    images, labels = pictures(np.random.default_rng(1), 300, 2)
    names = [f"motif {label}" for label in labels]
    head = classifier.snapshot()
    evaluation = classifier.evaluate(images, names)
    together = classifier.predict_jointly(images)
    answers = [f"{name}.jpg" for name in names], together.labels, together.probabilities.max(1)
    results = (
        *(evaluation, evaluation.automation, classifier.audit(), FolderPredictions(*answers, [], Skipped())),
        *(together, classifier.explain(images[0], top=300)[0], suggest(together.probabilities, 200)),
        *(head, classifier.plan_, classifier.support_, classifier.unknown_, head.out_of_fold),
    )
    for result in results:
        lines = repr(result).splitlines()
        assert len(lines) <= 10 and max(map(len, lines)) <= 110 and lines[0].startswith(type(result).__name__)
    assert "array of shape (600, 300)" in repr(together) and evaluation.summary().splitlines()[0] in repr(evaluation)
    assert "path='motif 0.jpg', label='motif 0'" in repr(results[3]), "the first rows"
