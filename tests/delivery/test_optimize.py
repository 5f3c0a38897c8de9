"""The choice of an engine: the rule, and every verdict on encoders of known speed and error; nothing is compiled."""

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
from iosr_fast.delivery import optimize as module
from iosr_fast.delivery.engine_choice import EngineChoice, rejection_reason
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.export.candidates import Candidate
from iosr_fast.sealed.verified_folder import open_verified
from tests.store.live_parts import PixelEncoder, engine_folder, pictures, pixel_clip, refit, unit

FP32, INT8, BF16 = ("openvino", "fp32"), ("openvino", "int8"), ("openvino", "bf16")
EXACT = {FP32: (None, 4.0, 20.0)}  # the present engine: milliseconds of one picture, and of a batch
CLASSES, SHOTS = 5, 8
GIVEN = {"method": "tip-adapter++", "alpha": 40.0, "beta": 5.0}


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


def clip_of(folder: Path) -> OpenedModel:
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
    heading, _, row, *_ = choice.lines()
    assert heading.startswith("engine openvino int8, chosen for latency on ") and "; 40 left-out images, " in heading
    assert " ".join(row.split()).startswith("openvino int8 2.00 ms 10.00 ms 0.0 MB 0.99") and row.endswith(" chosen")
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


def test_a_lost_accuracy_is_rejected_unless_it_is_tolerated(fitted, images, monkeypatch) -> None:
    monkeypatch.setattr("iosr_fast.delivery.engine_choice.LEAST_COSINE", -1.0)
    candidates = EXACT | {INT8: (Rounded(3.0), 2.0, 10.0)}
    row = run(fitted, images, monkeypatch, candidates).candidates[1]
    assert row.verdict == "rejected" and "accuracy falls by " in row.reason
    assert row.accuracy < 0.9 and row.agreement == row.accuracy
    assert run(fitted, images, monkeypatch, candidates, tolerance=100).chosen.precision == "int8"


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


def test_refusals(fitted, images, tmp_path: Path, monkeypatch) -> None:
    pixels, labels = images
    keep = [i for i in range(len(pixels)) if i not in (0, 5, 16)]
    wrong = ["motif 1" if label == "motif 0" else label for label in labels]
    kept = pixels[keep], [labels[i] for i in keep]
    for message, given in {
        r"found none for 3 of them: 'motif 0 \(2 of 8\)', 'motif 2 \(1 of 8\)'": kept,
        "found none for 8 of them": (pixels, wrong),  # an image under another label
        "labels": (pixels, labels[:3]),
    }.items():
        with pytest.raises(IosrFastError, match=message):
            run(fitted, given, monkeypatch, {FP32: (None, 1.0, 1.0)})
    with pytest.raises(IosrFastError, match="expected an objective of latency, throughput, size, got 'speed'"):
        fitted.optimize(*images, objective="speed")
    with pytest.raises(IosrFastError, match="expected a tolerance of 0 to 100 points"):
        fitted.optimize(*images, tolerance=-1)
    with pytest.raises(IosrFastError, match="opened from an engine folder"):
        refit(Classifier._with_clip(pixel_clip()), *images, **GIVEN).optimize(*images)
    fitted.open_log(tmp_path / "changes.db")
    with pytest.raises(IosrFastError, match="expected no log to be open"):
        fitted.optimize(*images)
    fitted.close_log()
    assert fitted.engine_choice_ is None


def test_a_change_meanwhile_is_not_lost(fitted, images, monkeypatch) -> None:
    slow = Rounded(0.02)

    def encode(pixels: np.ndarray) -> Embeddings:
        if fitted.version == 1:
            fitted.remove_examples(["e0"])
        return Rounded.encode(slow, pixels)

    changing = Rounded(0.02)
    changing.encode = encode  # type: ignore[method-assign]
    with pytest.raises(IosrFastError, match="has changed while images were encoded"):
        run(fitted, images, monkeypatch, EXACT | {INT8: (changing, 2.0, 10.0)})
    assert fitted.version == 2 and fitted.engine_choice_ is None


def test_support_and_unknown_images_are_encoded_again(tmp_path: Path, images, monkeypatch) -> None:
    clip, fast, unknown = clip_of(tmp_path), Rounded(0.02), images[0][:6] // 9
    given = {"method": "tip-adapter++", "reducer": "centre"}
    expected, classifier = (
        Classifier._with_clip(one, **given).fit(*images, unknown_images=unknown)
        for one in (replace(clip, encoder=fast), clip)
    )
    run(classifier, images, monkeypatch, EXACT | {INT8: (fast, 2.0, 10.0)}, unknown_images=unknown)
    ours, theirs = (each.snapshot() for each in (classifier, expected))
    np.testing.assert_allclose(ours.examples.embeddings.plain, theirs.examples.embeddings.plain, atol=1e-6)
    np.testing.assert_allclose(ours.examples.embeddings.adapted, theirs.examples.embeddings.adapted, atol=1e-6)
    np.testing.assert_allclose(ours.unknown_images.plain, theirs.unknown_images.plain, atol=1e-6)
    np.testing.assert_allclose(ours.reducer.shift, theirs.reducer.shift, atol=1e-6)


# --- the rule ---

GOOD = {"plain": (0.995, 0.999), "adapted": (0.996, 0.999)}


def flips(n: int, lost: int, won: int) -> tuple[np.ndarray, np.ndarray]:
    """What the reference and a candidate get right of n images."""
    return np.arange(n) >= won, (np.arange(n) < won) | (np.arange(n) >= won + lost)


@pytest.mark.parametrize(
    ("n", "lost", "won", "tolerance", "rejected"),
    [
        (40, 1, 0, 0.5, False),  # 2.5 points, but one image
        (40, 3, 0, 0.5, True),
        (400, 2, 0, 0.5, False),  # within the tolerance
        (400, 14, 6, 0.5, True),
    ],
)
def test_accuracy(n: int, lost: int, won: int, tolerance: float, rejected: bool) -> None:
    reason = rejection_reason(*flips(n, lost, won), GOOD, tolerance)
    assert bool(reason) == rejected
    assert not rejected or f"({lost} images lost, {won} won, chance" in reason


def test_cosines_reject_whatever_the_accuracy_unless_images_are_smaller() -> None:
    same, far = flips(40, 0, 0), {"plain": (0.8, 0.9)}
    assert rejection_reason(*same, {"plain": (0.9901, 0.999)}, 100) == ""
    reason = rejection_reason(*same, GOOD | {"adapted": (0.97, 0.999)}, 100)
    assert reason == "cosine of adapted embeddings 0.970 < 0.99"
    assert rejection_reason(*same, {"plain": (float("nan"), 1.0)}, 100) == "cosine of plain embeddings nan < 0.99"
    assert rejection_reason(*flips(400, 2, 0), far, 0.5, smaller_images=True) == ""
    assert "with smaller images any loss above 0.5 points" in rejection_reason(
        *flips(40, 1, 0), far, 0.5, smaller_images=True
    )
    assert "was not compared" in rejection_reason(*flips(0, 0, 0), GOOD, 0.5, smaller_images=True)
