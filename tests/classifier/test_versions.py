"""Every answer of a classifier is of one version, whatever takes its place meanwhile."""

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
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.export import pretrained
from iosr_fast.head.fitted import Fit
from iosr_fast.store.store import Store
from tests.classifier.conftest import GIVEN, NAMES
from tests.store.live_parts import LetterText, PixelEncoder, engine_folder, pixel_clip

SECONDS = float(os.environ.get("IOSR_FAST_RACE_S", "4"))

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


class Race:
    """Threads that ask, change, refit and save one classifier. Fit k has the encoder k % 3 and the class names "k 0" to
    "k 4": an answer that mixes fits has names of several, or labels that are wrong."""

    def __init__(self, folder: Path, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, (self.images, self.labels), self.rng = folder, data, np.random.default_rng(0)
        self.clips = {f"clip {k}": self.clip(k) for k in range(3)}
        encoders = {clip.encoder.fingerprint: clip.encoder for clip in self.clips.values()}
        monkeypatch.setattr(pretrained, "open_shared", lambda model, **_: self.clips[model])
        opened = "iosr_fast.encoders.runtimes.open_engine"
        monkeypatch.setattr(opened, lambda engine, *_, **__: encoders[engine.manifest["fingerprint"]])
        self.fits, self.done, self.failures = itertools.count(), Counter[str](), list[Any]()
        fitted = Store.fitted
        monkeypatch.setattr(Store, "fitted", lambda store: (fitted(store), time.sleep(0.002))[0])  # the newest no more
        self.classifier = Classifier(**GIVEN, thumbnails=0)
        self.refit()

    def clip(self, k: int) -> OpenedClip:
        encoder = PixelEncoder()
        encoder.fingerprint = str(k) * 64
        encoder.projections = np.random.default_rng(k).standard_normal(encoder.projections.shape).astype(np.float32)
        engine = engine_folder(self.folder / f"engine {k}", fingerprint=encoder.fingerprint)
        return OpenedClip(encoder, engine, LetterText(), 20.0)

    def refit(self) -> None:
        k = next(self.fits)
        self.classifier.set_params(model=f"clip {k % 3}").fit(self.images, [f"{k} {c}" for c in self.labels])

    def of_one_fit(self, labels: Any, truth: Any) -> None:
        """All `labels` are of one fit, and right."""
        fits, classes = zip(*(str(label).rstrip("'").split() for label in labels), strict=True)
        assert len(set(fits)) == 1 and np.mean(np.array(classes, int) == truth) >= 0.9, (labels, truth)

    def predict(self) -> None:
        self.of_one_fit(self.classifier.predict(self.images), self.labels)

    def explain(self) -> None:
        explained = self.classifier.explain(self.images[::6], top=5, nearest=3)
        assert len({one.version for one in explained}) == 1
        self.of_one_fit([one.label for one in explained], self.labels[::6])
        self.of_one_fit([near.label for one in explained for near in one.nearest], np.repeat(self.labels[::6], 3))

    def classify_folder(self) -> None:
        self.of_one_fit(self.classifier.predict_folder(self.folder / "images").labels, self.labels)

    def suggest(self) -> None:
        suggested = self.classifier.suggest(self.folder / "images", 5)
        self.of_one_fit(suggested.labels, [int(path.stem) // 6 for path in suggested.paths])

    def rename(self) -> None:
        name = self.classifier.classes()[1].name
        self.classifier.rename_class(name, name[:-1] if name.endswith("'") else f"{name}'")

    def add(self) -> None:
        name = self.classifier.classes()[2].name
        change = self.classifier.add_examples(name, self.images[14] ^ self.rng.integers(1, 64, dtype=np.uint8))
        self.classifier.remove_examples(change.example_ids)

    def save(self) -> None:
        self.classifier.save(self.folder / "saved")
        saved = Classifier.load(self.folder / "saved")
        assert saved.encoder.fingerprint == str(int(saved.classes_[0].split()[0]) % 3) * 64
        self.of_one_fit(saved.predict(self.images), self.labels)

    def run(self, *steps: Callable[[], None]) -> None:
        """The steps in turn, until time is over. A change may be refused; it then changed nothing."""
        while time.monotonic() < self.end and not self.failures:
            for step in steps:
                try:
                    step()
                    self.done[step.__name__] += 1
                except IosrFastError as error:
                    refused = any(text in str(error) for text in ("fitted again", "no class", "ids of examples"))
                    self.failures += [] if refused else [error]
                except Exception as error:
                    self.failures.append(error)


@pytest.mark.slow
def test_answers_and_bundles_are_of_one_fit_while_threads_refit_and_change(
    data: Any, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    for i, path in enumerate(paths):
        Path(path).rename(tmp_path / "images" / f"{i:02}.png")
    race = Race(tmp_path, data, monkeypatch)
    turns = [
        (race.refit,),
        (race.rename,),
        (race.add,),
        (race.predict, race.explain),
        (race.predict,),
        (race.classify_folder,),
        (race.suggest, race.classify_folder),
        (race.save,),
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    race.end = time.monotonic() + SECONDS
    threads = [threading.Thread(target=race.run, args=steps) for steps in turns]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    print(dict(race.done))
    assert not race.failures and len(race.done) == 8, race.failures
