"""Fits on bursts: what is warned of, what the summary and the promises say, and what a bundle keeps."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from iosr_fast import FewShotHead
from iosr_fast.exceptions import IosrFastError, LookAlikesWarning
from iosr_fast.store.bundle import SavedHead, load

CLASSES, WIDTH, SESSIONS, BURST = 12, 64, 6, 4


def bursts(rng: np.random.Generator, sessions: int, burst: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of `sessions` of each class, which are as far from one another as classes are."""
    centres = np.random.default_rng(7).standard_normal((CLASSES, WIDTH))
    labels = np.repeat(np.arange(CLASSES), sessions * burst)
    shared = np.repeat(rng.standard_normal((CLASSES * sessions, WIDTH)), burst, axis=0)
    return centres[labels] + 2.0 * shared + rng.standard_normal(shared.shape), labels


def test_bursts_are_warned_of_and_judged_as_new_ones_will_be(rng: np.random.Generator, tmp_path: Path) -> None:
    (rows, labels), (new, truth) = bursts(rng, SESSIONS, BURST), bursts(rng, 60, 1)
    with pytest.warns(LookAlikesWarning, match="288 of 288 pictures look like another one of their class, as in"):
        head = FewShotHead().fit(rows, labels)
    accuracy, alone = head.score(new, truth), FewShotHead(look_alikes=False).fit(rows, labels)
    assert alone.calibration().accuracy > accuracy + 0.2  # the siblings stay in
    assert accuracy - 0.15 < head.calibration().accuracy < accuracy + 0.05
    first, *doubts = head.snapshot().summary().splitlines()
    assert re.search(", look-alikes left out together; .* if new pictures come from the same sessions$", first)
    assert doubts[1].startswith("let promises rest on labelled pictures from production (calibrate_on")
    curve, audit = head.automation(), head.audit()
    assert curve.images == 288 and 72 <= curve.count < 200
    assert f"(worth {curve.count:,.0f}, as look-alikes" in str(curve)
    assert all(doubt in text for doubt in doubts for text in (str(curve), audit.summary()))
    assert {one.distinct for one in audit.classes} == {SESSIONS} and "look-alikes: 24 images" in audit.classes[0].advice

    head.save(tmp_path / "head")
    saved = load(SavedHead, tmp_path / "head").head
    assert saved.computed("folds") is not None and saved.summary() == head.snapshot().summary()
    alone.save(tmp_path / "alone")
    assert not load(SavedHead, tmp_path / "alone").head.config.look_alikes

    with warnings.catch_warnings():
        warnings.simplefilter("error", LookAlikesWarning)
        FewShotHead().fit(*bursts(rng, SESSIONS * BURST, 1))  # independent pictures
        alone.fit(rows, labels)
    head.calibrate_on(*bursts(rng, 8, 1))
    assert "look like another" not in str(head.automation()) + head.snapshot().summary()

    images, truth = bursts(rng, 8, 1)
    alone.calibrate_on(images, truth, groups=np.arange(len(truth)) // 4)
    alone.save(tmp_path / "calibrated")
    groups = [one.calibration.units for one in (alone.snapshot(), load(SavedHead, tmp_path / "calibrated").head)]
    assert np.array_equal(*groups) and len(np.unique(groups[0])) < len(truth)


def test_one_picture_a_class_promises_nothing_and_says_so(rng: np.random.Generator) -> None:
    head = FewShotHead().fit(*bursts(rng, 1, 1))
    said = "probabilities at one picture a class are not measured, and nothing is promised from them"
    assert said in head.snapshot().summary() and said in str(head.automation())
    with pytest.raises(IosrFastError, match=r"0\.1 wrong labels needs at least 29 left-out support images, got 0"):
        head.predict(np.ones((1, WIDTH)), max_error=0.1)


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_look_alikes_are_left_out_together_or_not(wrong: object, rng: np.random.Generator) -> None:
    with pytest.raises(IosrFastError, match="expected look_alikes to be True or False, got"):
        FewShotHead(look_alikes=wrong).fit(*bursts(rng, 2, 1))
