"""Queries are encoded in the form that their method needs; support images always in both."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.serving.batching import BatchingClassifier

pytestmark = pytest.mark.slow

pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("onnxruntime", reason="onnxruntime comes with the cpu extra")

GIVEN = {"alpha": 3.0, "beta": 7.0, "views": 1}


@pytest.fixture(scope="module")
def clip(demo_cache: Path) -> OpenedClip:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache))
        return Classifier("demo", runtime="onnxruntime")._open()


@pytest.fixture(scope="module")
def pictures() -> tuple[list[np.ndarray], list[str], np.ndarray]:
    """Support images, their labels, and queries."""
    of = load_pictures("held-out", min_styles=5)
    rows = [np.flatnonzero(of.concepts == c)[:4] for c in range(5)]
    support = np.concatenate([r[:3] for r in rows])
    return list(of.images[support]), [of.names[c] for c in of.concepts[support]], of.images[[r[3] for r in rows]]


def test_a_plain_method_encodes_queries_by_the_plain_form(clip: OpenedClip, pictures, tmp_path: Path) -> None:
    images, labels, queries = pictures
    plain = Classifier._with_clip(clip, method="tip-adapter", **GIVEN).fit(images, labels)
    assert clip.encoder.adapted and not plain.encoder.adapted
    assert plain.encoder is clip.encoder_for(False) and plain.encoder.fingerprint == clip.encoder.fingerprint
    assert plain.support_.embeddings.adapted is not None
    expected = plain.snapshot().score(clip.encoder.encode(queries))
    np.testing.assert_allclose(plain.decision_function(queries), expected, atol=1e-4)
    adapted = Classifier._with_clip(clip, method="tip-adapter++", **GIVEN).fit(images, labels)
    assert adapted.encoder is clip.encoder
    # A folder, a server and an explanation use that form, too.
    for i, query in enumerate(queries):
        Image.fromarray(query).save(tmp_path / f"{i}.png")
    assert plain.predict_folder(tmp_path).labels.tolist() == plain.predict(queries).tolist()
    assert [p.label for p in plain.explain(queries, nearest=2)] == plain.predict(queries).tolist()
    with BatchingClassifier(plain) as batcher:
        assert batcher.submit(queries[0]).result(60).label == plain.predict(queries[:1])[0]


def test_a_loaded_classifier_opens_both_forms_when_it_needs_them(
    clip: OpenedClip, pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels, queries = pictures
    fitted = Classifier._with_clip(clip, method="tip-adapter", **GIVEN).fit(images, labels)
    fitted.save(tmp_path / "first")
    loaded = Classifier.load(tmp_path / "first", threads=1)
    opened = loaded._fit.clip
    assert not opened.encoder.adapted and not opened._other and opened.has_adapter
    np.testing.assert_allclose(loaded.decision_function(queries), fitted.decision_function(queries), atol=1e-4)
    with caplog.at_level(logging.INFO, "iosr_fast"):
        loaded.add_examples(labels[0], [queries[0]])
        assert opened._other[0].adapted and not loaded.encoder.adapted
        added = loaded.support_.embeddings
        row = int(np.argmax(added.plain @ clip.encoder.encode(queries[:1]).plain[0]))
        np.testing.assert_allclose(added.adapted[row], clip.encoder.encode(queries[:1]).adapted[0], atol=1e-5)
        loaded.tune(method="tip-adapter++")
    assert "tip-adapter++ compares adapted embeddings; queries are encoded for it from now on" in caplog.text
    assert loaded.encoder is opened._other[0] and loaded.encoder.adapted and loaded.snapshot().needs_adapted
    expected = loaded.snapshot().score(clip.encoder.encode(queries))
    np.testing.assert_allclose(loaded.decision_function(queries), expected, atol=1e-3)
    loaded.tune(method="tip-adapter")
    assert loaded.encoder is opened.encoder and not loaded.encoder.adapted
    loaded.save(tmp_path / "plain")
    assert not Classifier.load(tmp_path / "plain").encoder.adapted
