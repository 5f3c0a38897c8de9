"""BatchingClassifier on the demo's CLIP in ONNX Runtime: which head answers, and what it waits for."""

from __future__ import annotations

from importlib.util import find_spec
from threading import Event

import numpy as np
import pytest

from iosr_fast import Classifier
from iosr_fast.head import head as head_module
from iosr_fast.head.predictions import predict
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.batching.item import Query
from tests.demo_cache import demo_bundle
from tools.demo.bundle import held_out_queries

pytestmark = pytest.mark.slow

if find_spec("open_clip") is None:
    pytest.skip("open_clip comes with the cpu extra", allow_module_level=True)

CLASSES, SHOTS = 12, 3
PATIENCE_S = 60.0


@pytest.mark.parametrize("query", [{}, {"keep": 0.7}, {"max_error": 0.4}])
def test_each_request_is_answered_by_the_head_of_its_submission(
    query: dict[str, float],
) -> None:
    images, _labels = held_out_queries(CLASSES, SHOTS)
    classifier = Classifier.load(demo_bundle(CLASSES, SHOTS))
    encode, begun, go = classifier.encoder.encode_on_device, Event(), Event()

    def held(pixels: np.ndarray) -> object:
        begun.set()
        assert go.wait(PATIENCE_S)
        return encode(pixels)

    heads, waiting = [], []
    with BatchingClassifier(classifier, max_batch=8) as batching, pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier.encoder, "encode_on_device", held)
        batching.submit(images[0])
        assert begun.wait(PATIENCE_S)
        for uid in ("~0", "~1"):
            heads.append(classifier.snapshot())
            waiting.append(batching.submit_many(images[:20], **query))
            classifier.remove_class(uid)
        go.set()
        found = [[future.result(PATIENCE_S) for future in futures] for futures in waiting]
    embeddings = encode(images[:20])
    expected = [predict(head, embeddings, 5, 0, Query(**query).abstention) for head in heads]
    decided = [
        [(one.version, one.label, one.accepted, one.unknown and one.unknown.rejected) for part in parts for one in part]
        for parts in (found, expected)
    ]
    assert decided[0] == decided[1] and {version for version, *_ in decided[0]} == {1, 2}


def test_what_promises_rest_on_is_computed_by_changes_once_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier.load(demo_bundle(CLASSES, SHOTS))
    images, _labels = held_out_queries(CLASSES, SHOTS)
    fits = list[str]()

    def counted(name: str) -> None:
        compute = getattr(head_module, name)
        monkeypatch.setattr(head_module, name, lambda *given: fits.append(f"{name} {version()}") or compute(*given))

    def version() -> int:
        return classifier.version

    for name in ("fit_unknown", "out_of_fold"):
        counted(name)
    classifier.predict(images[:2])
    classifier.rename_class("~0", "plain", keep_text=True)
    assert not fits, "who asks for no promise pays for none"
    with BatchingClassifier(classifier) as batching:
        assert not fits, "a bundle has the out-of-fold logits"
        classifier.add_class("new", images[:2])
        assert fits == ["out_of_fold 2"], "before it is published; nobody has asked for unknown pictures"
        batching.submit(images[5], max_error=0.4).result(PATIENCE_S)
        assert len(fits) == 1
        batching.submit(images[5], keep=0.7, max_error=0.4).result(PATIENCE_S)
        assert fits[1:] == ["fit_unknown 3"]
        classifier.remove_class("~0")
        assert sorted(fits[2:]) == ["fit_unknown 3", "out_of_fold 3"]
        expected = len(fits)
        batching.submit(images[5], keep=0.7, max_error=0.4).result(PATIENCE_S)
        assert len(fits) == expected
        classifier.rename_class("~1", "another", keep_text=True)
        batching.submit(images[5], keep=0.7, max_error=0.4).result(PATIENCE_S)
        assert len(fits) == expected, "a name alone changes no promise"
