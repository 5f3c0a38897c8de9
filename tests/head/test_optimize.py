"""The choice of an engine: every verdict, on encoders of known speed and error; nothing is compiled here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from iosr_fast import Classifier, IosrFastError
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.export.candidates import Candidate
from iosr_fast.head import optimize as module
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.utils.verified_folder import open_verified
from tests.store.live_parts import PixelEncoder, engine_folder, pictures, pixel_clip, refit, unit

FP32, INT8, BF16 = ("openvino", "fp32"), ("openvino", "int8"), ("openvino", "bf16")
EXACT = {FP32: (None, 4.0, 20.0)}  # the present engine: milliseconds of one picture, and of a batch
CLASSES, SHOTS = 5, 8
GIVEN = {"method": "tip-adapter++", "alpha": 40.0, "beta": 5.0, "views": 1}


class Rounded(PixelEncoder):
    """PixelEncoder with an error of `error` in each embedding."""

    def __init__(self, error: float = 0.0, fails: str = "") -> None:
        super().__init__()
        self.error, self.fails, self.fingerprint = error, fails, str(error)
        self.source: Any = SimpleNamespace(files={"encoder.onnx": SimpleNamespace(size=100)}, manifest={})

    def encode(self, pixels: np.ndarray) -> Embeddings:
        if self.fails:
            raise RuntimeError(self.fails)
        exact = super().encode(pixels)
        noise = unit(np.random.default_rng(3).standard_normal(exact.plain.shape))
        return Embeddings(*(unit(rows + self.error * noise) for rows in (exact.plain, exact.adapted)))


@pytest.fixture
def images() -> tuple[np.ndarray, list[str]]:
    pixels, labels = pictures(np.random.default_rng(0), CLASSES, SHOTS)
    return pixels, [f"motif {label}" for label in labels]


def clip_of(folder: Path) -> OpenedClip:
    clip = pixel_clip(engine_folder(folder / "engine"))
    clip.encoder.source = open_verified(clip.engine, "engine")
    clip.encoder.runtime = "openvino"  # type: ignore[misc]
    return clip


@pytest.fixture
def fitted(tmp_path: Path, images: tuple[np.ndarray, list[str]]) -> Classifier:
    return refit(Classifier._with_clip(clip_of(tmp_path)), *images, **GIVEN)


def run(
    classifier: Classifier,
    images: tuple[np.ndarray, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    candidates: Mapping[tuple[str, str], tuple[Any, float, float]],
    **options: Any,
) -> EngineChoice:
    """`optimize` on candidates: an encoder, an error or why it is left out; ms of one picture and of a batch."""

    class Builder:
        def __init__(self, engine: Any, *_: Any) -> None:
            self.engine = engine

        def open(self, candidate: Candidate) -> Any:
            one = candidates[candidate.runtime, candidate.precision][0]
            if isinstance(one, Exception):
                raise one
            return one

        def keep(self, encoder: Any) -> Any:
            return self.engine.folder

        def close(self) -> None:
            pass

    def listed(*_: Any) -> list[Candidate]:
        return [Candidate(*name, one[0] if isinstance(one[0], str) else "") for name, one in candidates.items()]

    def times(encoders: Mapping[int, Any], *_: Any) -> dict[int, tuple[float, float]]:
        return {i: list(candidates.values())[i][1:] for i in encoders}

    monkeypatch.setattr(module, "CandidateBuilder", Builder)
    monkeypatch.setattr(module, "list_candidates", listed)
    monkeypatch.setattr(module, "time_encoders", times)
    return classifier.optimize(*images, **options)


def verdicts(choice: EngineChoice) -> dict[tuple[str, str], str]:
    return {(row.runtime, row.precision): row.verdict for row in choice.candidates}


def test_the_fastest_is_taken_and_the_support_is_encoded_with_it(fitted, images, monkeypatch) -> None:
    before, fast = fitted.snapshot(), Rounded(0.02)
    candidates = EXACT | {BF16: (Rounded(0.01), 3.0, 15.0), INT8: (fast, 2.0, 10.0)}
    choice = run(fitted, images, monkeypatch, candidates)
    assert [*verdicts(choice).items()] == [(INT8, "chosen"), (BF16, "accepted"), (FP32, "accepted")]
    assert choice is fitted.engine_choice_ and choice.judged == choice.calibrated == CLASSES * SHOTS
    best = choice.chosen
    assert best.accuracy == 1.0 and best.agreement == 1.0 and 0.99 < best.cosines["plain"][0] < 1.0
    after = fitted.snapshot()
    assert fitted.encoder is fast and after.version == before.version + 1
    np.testing.assert_allclose(after.examples.embeddings.plain, fast.encode(images[0]).plain, atol=1e-6)
    for name in ("class_names", "uids", "next_class", "next_example", "text"):
        assert getattr(after, name) is getattr(before, name)
    assert after.examples.ids is before.examples.ids and after.examples.pictures is before.examples.pictures
    assert after.config.parameters == before.config.parameters


@pytest.mark.parametrize(
    ("candidate", "verdict", "reason"),
    [
        ((Rounded(0.02), 3.9, 20.0), "accepted", "level with the choice, which is more exact"),
        ((Rounded(0.3), 2.0, 10.0), "rejected", r"cosine of plain embeddings 0\.9.*"),
        ((ArithmeticError("cosine 0.5"), 0.0, 0.0), "rejected", r"cosine 0\.5"),
        ((RuntimeError("no\nmemory \x1b[31m"), 0.0, 0.0), "failed", r"no memory \[31m"),
        ((Rounded(fails="driver"), 0.0, 0.0), "failed", "driver"),
        (("no instructions", 0.0, 0.0), "left out", "no instructions"),
    ],
)
def test_other_candidates_have_a_verdict_and_a_reason(
    candidate: Any, verdict: str, reason: str, fitted, images, monkeypatch
) -> None:
    choice = run(fitted, images, monkeypatch, EXACT | {INT8: candidate}, tolerance=100)
    assert verdicts(choice) == {FP32: "chosen", INT8: verdict}
    assert re.fullmatch(reason, choice.candidates[1].reason)
    assert fitted.version == 1  # the same embeddings: nothing was encoded again


def test_the_present_engine_stays_where_nothing_is_accepted(fitted, images, monkeypatch) -> None:
    choice = run(fitted, images, monkeypatch, {INT8: (Rounded(0.3), 2.0, 10.0)})
    assert verdicts(choice) == {FP32: "chosen", INT8: "rejected"} and fitted.version == 1


def test_a_lost_accuracy_is_rejected_unless_it_is_tolerated(fitted, images, monkeypatch) -> None:
    monkeypatch.setattr("iosr_fast.head.engine_choice.LEAST_COSINE", -1.0)
    candidates = EXACT | {INT8: (Rounded(3.0), 2.0, 10.0)}
    row = run(fitted, images, monkeypatch, candidates).candidates[1]
    assert row.verdict == "rejected" and "accuracy falls by " in row.reason
    assert row.accuracy < 0.9 and row.agreement == row.accuracy
    assert run(fitted, images, monkeypatch, candidates, tolerance=100).chosen.precision == "int8"


def test_one_image_a_class_is_judged_by_cosines(fitted, images, monkeypatch) -> None:
    rows = np.arange(0, CLASSES * SHOTS, SHOTS)
    few = images[0][rows], [images[1][i] for i in rows]
    refit(fitted, *few, **GIVEN)
    choice = run(fitted, few, monkeypatch, EXACT | {INT8: (Rounded(0.02), 2.0, 10.0)})
    assert choice.chosen.precision == "int8" and choice.judged == 0 and choice.chosen.accuracy is None
    assert "each class has one image" in choice.note and choice.lines()[-1] == choice.note


def test_images_are_found_again_in_any_order(fitted, images, monkeypatch, caplog) -> None:
    """Foreign images, of known and of unknown classes, are left out; a removed example needs no image."""
    fitted.remove_examples(["e3"])
    fitted.remove_class("motif 4")
    pixels, labels = images
    order = np.random.default_rng(1).permutation(len(pixels))
    mixed = [*(pixels[i] for i in order), 255 - pixels[0], pixels[0] // 2]
    names = [*(labels[i] for i in order), "motif 0", "unknown"]
    fast = Rounded(0.02)
    run(fitted, (mixed, names), monkeypatch, EXACT | {INT8: (fast, 2.0, 10.0)})
    examples = fitted.snapshot().examples
    np.testing.assert_allclose(examples.embeddings.plain, fast.encode(pixels[examples.ids]).plain, atol=1e-6)
    assert fitted.version == 4 and len(examples) == (CLASSES - 1) * SHOTS - 1
    assert f"left out {len(mixed) - len(examples)} of {len(mixed)} images" in caplog.text


def test_a_missing_image_is_named(fitted, images, monkeypatch) -> None:
    pixels, labels = images
    with pytest.raises(IosrFastError, match=r"found none for 3 of them: 'motif 0 \(2 of 8\)', 'motif 2 \(1 of 8\)'"):
        keep = [i for i in range(len(pixels)) if i not in (0, 5, 16)]
        run(fitted, (pixels[keep], [labels[i] for i in keep]), monkeypatch, {FP32: (None, 1.0, 1.0)})
    with pytest.raises(IosrFastError, match="found none for 8 of them"):  # an image under another label
        wrong = ["motif 1" if label == "motif 0" else label for label in labels]
        run(fitted, (pixels, wrong), monkeypatch, {FP32: (None, 1.0, 1.0)})
    assert fitted.engine_choice_ is None


def test_refusals(fitted, images, tmp_path: Path) -> None:
    with pytest.raises(IosrFastError, match="expected an objective of latency, throughput, size, got 'speed'"):
        fitted.optimize(*images, objective="speed")
    with pytest.raises(IosrFastError, match="expected a tolerance of 0 to 100 points"):
        fitted.optimize(*images, tolerance=-1)
    with pytest.raises(IosrFastError, match="labels"):
        fitted.optimize(images[0], images[1][:3])
    with pytest.raises(IosrFastError, match="opened from an engine folder"):
        refit(Classifier._with_clip(pixel_clip()), *images, **GIVEN).optimize(*images)
    fitted.open_log(tmp_path / "changes.db")
    with pytest.raises(IosrFastError, match="expected no log to be open"):
        fitted.optimize(*images)
    fitted.close_log()


def test_a_change_meanwhile_is_not_lost(fitted, images, monkeypatch) -> None:
    slow = Rounded(0.02)

    def encode(pixels: np.ndarray) -> Embeddings:
        if fitted.version == 1:
            fitted.remove_examples(["e0"])
        return Rounded.encode(slow, pixels)

    changing = Rounded(0.02)
    changing.encode = encode  # type: ignore[method-assign]
    with pytest.raises(IosrFastError, match="has changed while engines were tried"):
        run(fitted, images, monkeypatch, EXACT | {INT8: (changing, 2.0, 10.0)})
    assert fitted.version == 2 and fitted.engine_choice_ is None


def test_views_are_encoded_again_and_found_by_their_queries(tmp_path: Path, images, monkeypatch) -> None:
    clip, fast = clip_of(tmp_path), Rounded(0.02)
    expected = refit(Classifier._with_clip(replace(clip, encoder=fast)), *images, method="tip-adapter++", views=3)
    classifier = refit(Classifier._with_clip(clip), *images, method="tip-adapter++", views=3)
    run(classifier, images, monkeypatch, EXACT | {INT8: (fast, 2.0, 10.0)})
    ours, theirs = (each.snapshot().examples for each in (classifier, expected))
    np.testing.assert_allclose(ours.embeddings.plain, theirs.embeddings.plain, atol=1e-6)
    np.testing.assert_allclose(ours.queries.adapted, theirs.queries.adapted, atol=1e-6)


def test_unknown_images_are_encoded_with_the_choice(tmp_path: Path, images, monkeypatch) -> None:
    fast, unknown = Rounded(0.02), images[0][:6] // 9
    fitted = Classifier._with_clip(clip_of(tmp_path), **GIVEN).fit(*images, unknown_images=unknown)
    run(fitted, images, monkeypatch, EXACT | {INT8: (fast, 2.0, 10.0)}, unknown_images=unknown[:4])
    found = fitted.snapshot().unknown_images
    assert fitted.version == 2 and len(found) == 4
    cosines = (found.plain * PixelEncoder().encode(unknown[:4]).plain).sum(1)  # 1 with the engine before
    np.testing.assert_allclose(cosines, 1.0 / np.sqrt(1.0 + fast.error**2), atol=1e-4)
