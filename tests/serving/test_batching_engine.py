"""BatchingClassifier on the demo's CLIP in ONNX Runtime: batches, splits and threads change no answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.serving.batching import BatchingClassifier
from tests.demo_cache import demo_bundle
from tests.pictures import encode
from tools.demo.bundle import held_out_queries

pytestmark = pytest.mark.slow

if find_spec("open_clip") is None:
    pytest.skip("open_clip comes with the cpu extra", allow_module_level=True)
pytest.importorskip("onnxruntime", reason="onnxruntime comes with the cpu extra")

CLASSES, SHOTS = 12, 3
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.load(demo_bundle(CLASSES, SHOTS))


def test_equals_the_classifier_itself(classifier: Classifier, tmp_path: Path) -> None:
    images, _labels = held_out_queries(CLASSES, SHOTS)
    images = images[:40]
    wide = [np.asarray(Image.fromarray(image).resize((90, 70))) for image in images]
    names = classifier.classes_.tolist()
    for forms, expected in (
        (list(images), classifier.predict_proba(images)),
        ([encode(image) for image in wide], classifier.predict_proba(wide)),
    ):
        with (
            BatchingClassifier(classifier, max_batch=7, decode_threads=2) as batching,
            ThreadPoolExecutor(4) as callers,
        ):
            ask = lambda form, made=batching: made.submit(form, top=CLASSES, nearest=2).result(PATIENCE_S)  # noqa: E731
            found = list(callers.map(ask, forms))
        for prediction, row in zip(found, expected, strict=True):
            got = {score.label: score.probability for score in prediction.top}
            np.testing.assert_allclose([got[name] for name in names], row, atol=1e-5)
            assert prediction.label == names[row.argmax()] and len(prediction.nearest) == 2
            assert prediction.version == classifier.version


def test_a_change_after_the_submission_does_not_make_a_batch_wait_for_a_fit(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _labels = held_out_queries(CLASSES, SHOTS)
    expected = classifier.explain(images[:2], unknown="reject", keep=0.7)
    encode, begun, go = classifier.encoder.encode_on_device, Event(), Event()
    name = classifier.classes()[0].name

    def held(pixels: np.ndarray) -> object:
        begun.set()
        assert go.wait(PATIENCE_S)
        return encode(pixels)

    with BatchingClassifier(classifier, max_batch=8) as batching:
        monkeypatch.setattr(classifier.encoder, "encode_on_device", held)
        futures = batching.submit_many(images[:2], keep=0.7)
        assert begun.wait(PATIENCE_S)
        later = batching.submit(images[0])
        classifier.rename_class("~0", "renamed", keep_text=True)
        monkeypatch.setattr("iosr_fast.head.head.fit_unknown", lambda *_: pytest.fail("fitted by a batch"))
        go.set()
        found = [future.result(PATIENCE_S) for future in futures]
        assert [one.version for one in found] == [one.version for one in expected]
        assert [(one.label, one.unknown.rejected) for one in found] == [
            (one.label, one.unknown.rejected) for one in expected
        ]
        plain = later.result(PATIENCE_S)
        assert plain.version == found[0].version + 1 and plain.unknown is None
    classifier.rename_class("~0", name, keep_text=True)
