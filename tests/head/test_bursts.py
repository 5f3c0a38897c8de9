"""Fits on bursts: what is warned of, what the summary and the promises say, and what a bundle keeps."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from iosr_fast import FewShotHead
from iosr_fast.exceptions import IosrFastError, LookAlikesWarning
from iosr_fast.store.bundle import load
from iosr_fast.store.bundle_arrays import LEFT_OUT
from iosr_fast.store.head_files import head_from_bytes, head_to_bytes
from tests.methods.made_up import Population

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
    assert re.match(r"\d+% to \d+% of 288 left-out support images right \(95%: .*% if new pictures are of other", first)
    assert doubts[1].startswith("let promises rest on labelled pictures from production (calibrate_on")
    curve, audit = head.automation(), head.audit()
    assert curve.images == 288 and curve.count == pytest.approx(72) and "(effective sample size 72: look-" in str(curve)
    assert all(doubt in text for doubt in doubts for text in (str(curve), audit.summary()))
    assert {one.distinct for one in audit.classes} == {SESSIONS} and "look-alikes: 24 images" in audit.classes[0].advice

    head.save(tmp_path / "head")
    saved = load(tmp_path / "head").head
    assert saved.computed("folds") is not None and saved.summary() == head.snapshot().summary()
    alone.save(tmp_path / "alone")
    assert not load(tmp_path / "alone").head.config.look_alikes

    with warnings.catch_warnings():
        warnings.simplefilter("error", LookAlikesWarning)
        FewShotHead().fit(*bursts(rng, SESSIONS * BURST, 1))  # independent pictures
        alone.fit(rows, labels)
    head.calibrate_on(*bursts(rng, 8, 1))
    assert "look like another" not in str(head.automation()) + head.snapshot().summary()

    images, truth = bursts(rng, 8, 1)
    alone.calibrate_on(images, truth, groups=np.arange(len(truth)) // 4)
    alone.save(tmp_path / "calibrated")
    groups = [one.calibration.units for one in (alone.snapshot(), load(tmp_path / "calibrated").head)]
    assert np.array_equal(*groups) and len(np.unique(groups[0])) < len(truth)


def quiet(head: FewShotHead, *images: np.ndarray) -> list[str]:
    """What `calibrate_on` warns of."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", LookAlikesWarning)
        head.calibrate_on(*images)
    return [str(one.message) for one in raised]


def test_images_of_the_support_s_sessions_are_no_calibration(rng: np.random.Generator) -> None:
    """They look as if all were right: they are left out and counted, and said to be siblings where they are many."""
    population = Population(classes=8, dimensions=512, session=3.0, noise=2.0)
    sessions, others = population.sessions(rng, 4), population.sessions(rng, 12)
    support, labels = population.images(rng, sessions, 4)
    (siblings, same), (new, truth) = population.images(rng, sessions, 4), population.images(rng, others, 1)
    with pytest.warns(LookAlikesWarning, match="128 of 128 pictures look like another one of their class"):
        head = FewShotHead().fit(support.plain, labels)
    own = head.snapshot().look_alike_warning
    with pytest.raises(IosrFastError, match="got 0 beside 128 siblings of support images: give more pictures"):
        head.calibrate_on(siblings.plain, same)
    both = np.concatenate([siblings.plain, new.plain]), np.concatenate([same, truth])
    (said,) = quiet(head, *both)
    found = re.match(r"(\d+) of 224 labelled pictures are siblings of support pictures, as of one session", said)
    assert found and 128 <= int(found[1]) < 140 and own[0] in said, "the support's own warning stays"
    assert head.calibration().n_images == 224 - int(found[1]) and said.split("; ")[0] in str(head.automation())
    assert quiet(head, new.plain, truth) == [] == list(head.snapshot().look_alike_warning)
    assert abs(head.calibration().accuracy - head.score(new.plain, truth)) < 0.05
    assert quiet(FewShotHead(look_alikes=False).fit(support.plain, labels), *both) == []


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_of_bursts_do_not_run_away(seed: int, tmp_path: Path) -> None:
    """A search that leaves images out one by one finds all of them right, and has no bound for the scale of logits."""
    rng, population = np.random.default_rng(seed), Population(6, 512, session=4.0, noise=2.0, seed=seed)
    support, labels = population.images(rng, population.sessions(rng, 3), 4)
    new, truth = population.images(rng, population.sessions(rng, 40), 1)
    with pytest.warns(LookAlikesWarning):
        head = FewShotHead().fit(support.plain, labels)
    inner, shares = head.snapshot(), head.predict_proba(new.plain)
    assert -np.log(shares[np.arange(len(truth)), truth]).mean() < np.log(6) < -np.log(0.1)
    assert head.calibration().log_loss < np.log(6) and inner.temperature > 2.0
    logits = head.decision_function(new.plain)  # and so labels, are those of before
    assert (shares.argmax(1) == logits.argmax(1)).all() and (head.predict(new.plain) == logits.argmax(1)).all()
    low, high = inner.accuracy_range
    assert low <= head.score(new.plain, truth) <= high < 1.0 + 1e-9
    first = inner.summary().splitlines()[0]
    assert f"{head.calibration().accuracy:.1%}" in first and "right" not in head.tuned_.summary(), "one accuracy"
    head.save(tmp_path / "head")
    assert load(tmp_path / "head").head.computed("temperature") == inner.temperature


def test_a_bundle_without_a_temperature_computes_all_that_left_out_images_say(rng: np.random.Generator) -> None:
    """As those of earlier versions: they counted bursts otherwise."""
    head = FewShotHead().fit(*bursts(rng, 4, 1)).snapshot()
    facts, files = msgspec.msgpack.decode(head_to_bytes(head))
    arrays = load_arrays(files[LEFT_OUT])
    assert arrays["temperature"].tolist() == [head.temperature] != [1.0]
    files[LEFT_OUT] = save_arrays({name: array for name, array in arrays.items() if name != "temperature"})
    former = head_from_bytes(msgspec.msgpack.encode((facts, files)))
    assert former.computed("folds") is None and former.temperature == head.temperature
    assert former.summary() == head.summary()
    files[LEFT_OUT] = save_arrays({**arrays, "temperature": np.array([-1.0])})
    with pytest.raises(ValueError, match="expected a temperature above 0"):
        head_from_bytes(msgspec.msgpack.encode((facts, files)))


def test_where_bursts_cannot_be_told_it_is_said_unless_groups_name_them(rng: np.random.Generator) -> None:
    population = Population(12, 16)
    (rows, labels), groups = population.images(rng, population.sessions(rng, 8), 1), np.arange(96) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", LookAlikesWarning)
        alone, grouped = FewShotHead().fit(rows.plain, labels), FewShotHead().fit(rows.plain, labels, groups=groups)
    said = "independent directions do not tell bursts from other pictures"
    assert said in alone.snapshot().summary() and said in str(alone.automation())
    assert said not in grouped.snapshot().summary()


def test_what_few_pictures_say_of_the_accuracy_holds_it(rng: np.random.Generator) -> None:
    """Of two pictures a class one judges a fit on the other, which is right far less often."""
    held = []
    for seed in range(20):
        population = Population(20, 128, session=1.0, noise=1.0, seed=seed)
        support, labels = population.images(rng, population.sessions(rng, 2), 1)
        new, truth = population.images(rng, population.sessions(rng, 20), 1)
        head = FewShotHead().fit(support.plain, labels)
        (low, high), accuracy = head.snapshot().accuracy_range, head.score(new.plain, truth)
        held.append(low <= accuracy <= high)
        assert "each was judged by 50% of its class, so more may be right" in head.snapshot().summary()
    assert np.mean(held) >= 0.9


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
