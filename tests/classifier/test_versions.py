"""Every answer and every bundle of a classifier is of one version, whatever takes its place meanwhile."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast import IosrFastError
from iosr_fast.classifier import Classifier
from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.export import pretrained
from iosr_fast.store.store import Store
from tests.classifier.conftest import GIVEN
from tests.store.live_parts import LetterText, PixelEncoder, engine_folder

SECONDS = float(os.environ.get("IOSR_FAST_RACE_S", "5"))
REFUSALS = "fitted again while", "no class", "ids of examples"


class Race:
    """A classifier that threads ask, change, refit and save. Fit k has the encoder k % 3 and the class names "k 0" to
    "k 4": an answer that mixes fits has names of several, or labels that are wrong."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, self.labels, self.folder = images, labels, folder
        self.clips = [self.clip(k) for k in range(3)]
        monkeypatch.setattr(pretrained, "open_shared", lambda model, **_: self.clips[int(model)])
        opened = "iosr_fast.encoders.runtimes.open_engine"
        monkeypatch.setattr(opened, lambda engine, *_, **__: self.clips[int(engine.manifest["fingerprint"][0])].encoder)
        self.fits, self.done, self.failures = itertools.count(), Counter[str](), list[Exception]()
        self.classifier = Classifier(**GIVEN, thumbnails=0)
        self.refit()

    def clip(self, k: int) -> OpenedModel:
        encoder = PixelEncoder()
        encoder.fingerprint = str(k) * 64
        encoder.projections = np.random.default_rng(k).standard_normal(encoder.projections.shape).astype(np.float32)
        engine = engine_folder(self.folder / f"engine {k}", fingerprint=encoder.fingerprint)
        return OpenedModel(encoder, engine, LetterText(), 20.0)

    def of_one_fit(self, answer: Any, truth: Any = None) -> None:
        """The labels of an answer are those of one fit, and right: of all images, or of the classes `truth`."""
        fits, classes = zip(*(str(label).rstrip("'").split() for label in answer), strict=True)
        right = np.mean(np.array(classes, int) == (self.labels if truth is None else truth))
        assert len(set(fits)) == 1 and right >= 0.9, answer

    def predict(self) -> None:
        self.of_one_fit(self.classifier.predict(self.images))

    def explain(self) -> None:
        predictions = self.classifier.explain(self.images, nearest=1)
        assert len({one.version for one in predictions}) == 1
        self.of_one_fit([one.label for one in predictions])
        self.of_one_fit([one.nearest[0].label for one in predictions])

    def predict_folder(self) -> None:
        self.of_one_fit(self.classifier.predict_folder(self.folder / "images").labels)

    def suggest(self) -> None:
        suggested = self.classifier.suggest(self.folder / "images", 5)
        self.of_one_fit(suggested.labels, [int(path.stem) // 6 for path in suggested.paths])

    def evaluate(self) -> None:
        measured = self.classifier.evaluate(self.images, self.labels)
        self.of_one_fit(np.array(measured.classes)[measured.predicted])

    def refit(self) -> None:
        k = next(self.fits)
        self.classifier.set_params(model=str(k % 3)).fit(self.images, [f"{k} {c}" for c in self.labels])

    def rename(self) -> None:
        name = self.classifier.classes()[1].name
        self.classifier.rename_class(name, name[:-1] if name.endswith("'") else f"{name}'")

    def add(self) -> None:
        added = self.classifier.add_examples(self.classifier.classes()[2].name, self.images[14] ^ 9)
        self.classifier.remove_examples(added.example_ids)

    def save(self) -> None:
        self.classifier.save(self.folder / "saved")
        saved = Classifier.load(self.folder / "saved")
        assert saved.encoder is self.clips[int(saved.classes_[0].split()[0]) % 3].encoder
        self.of_one_fit(saved.predict(self.images))

    def run(self, until: float, *steps: Callable[[], None]) -> None:
        """The steps in turn. A change that is refused has changed nothing."""
        while time.monotonic() < until and not self.failures:
            for step in steps:
                try:
                    step()
                    self.done[step.__name__] += 1
                except Exception as error:
                    if not isinstance(error, IosrFastError) or not any(text in str(error) for text in REFUSALS):
                        self.failures.append(error)


@pytest.fixture
def race(data: Any, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Race:
    (tmp_path / "images").mkdir()
    for i, path in enumerate(paths):
        Path(path).rename(tmp_path / "images" / f"{i:02}.png")
    return Race(*data, tmp_path, monkeypatch)


class Refitted(Store):
    """Another fit takes the place of the first one as soon as that is read."""

    def __init__(self, *fits: FittedClassifier) -> None:
        self.fits = [*fits]
        super().__init__()

    def fitted(self) -> FittedClassifier:
        return self.fit

    @property
    def fit(self) -> FittedClassifier:
        return self.fits.pop(0) if len(self.fits) > 1 else self.fits[0]

    @fit.setter
    def fit(self, fit: FittedClassifier | None) -> None:
        pass


@pytest.mark.parametrize("question", ["predict", "explain", "predict_folder", "suggest", "evaluate"])
def test_a_refit_during_a_question_changes_no_answer(question: str, race: Race) -> None:
    first = race.classifier._fit
    race.refit()
    race.classifier._store = Refitted(first, race.classifier._fit)
    getattr(race, question)()
    assert race.classifier.classes_[0] == "1 0"


@pytest.mark.slow
def test_eight_threads_see_and_save_whole_versions(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = Store.fitted
    monkeypatch.setattr(Store, "fitted", lambda store: (fitted(store), time.sleep(0.002))[0])  # it may be old by then
    turns: list[tuple[Callable[[], None], ...]] = [(race.refit,), (race.rename,), (race.add,), (race.save,)]
    turns += [(race.predict, race.explain), (race.predict_folder,), (race.predict_folder, race.suggest)]
    turns += [(race.evaluate,)]
    until, interval = time.monotonic() + SECONDS, sys.getswitchinterval()
    threads = [threading.Thread(target=race.run, args=(until, *steps)) for steps in turns]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not race.failures and len(race.done) == 9, (race.failures, race.done)
