"""Queries are encoded in the form that their method needs; support images always in both."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from iosr_fast import Classifier, IosrFastError
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.serving.batching import BatchingClassifier

pytestmark = pytest.mark.slow


GIVEN = {"alpha": 3.0, "beta": 7.0}


def test_a_plain_method_encodes_queries_by_the_plain_form(
    demo_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    of = load_pictures("held-out", min_styles=5)
    rows = np.stack([np.flatnonzero(of.concepts == c)[:4] for c in range(5)])
    support, queries = rows[:, :3].ravel(), of.images[rows[:, 3]]
    labels = [of.names[c] for c in of.concepts[support]]
    plain = Classifier("demo", runtime="onnxruntime", method="tip-adapter", **GIVEN).fit(of.images[support], labels)
    clip = plain._fit.clip
    assert clip.encoder.adapted and not plain.encoder.adapted and plain.support_.embeddings.adapted is not None
    assert plain.encoder.fingerprint == clip.encoder.fingerprint
    both = clip.encoder.encode(queries)
    np.testing.assert_allclose(plain.decision_function(queries), plain.snapshot().score(both), atol=1e-4)
    with BatchingClassifier(plain) as batcher:
        assert batcher.submit(queries[0]).result(60).label == plain.predict(queries[:1])[0]
    plain.save(tmp_path / "bundle")
    loaded = Classifier.load(tmp_path / "bundle", threads=1)
    opened = loaded._fit.clip  # which opens the other form when it is needed
    assert not opened.encoder.adapted and not opened._other and opened.has_adapter
    np.testing.assert_allclose(loaded.decision_function(queries), plain.decision_function(queries), atol=1e-4)
    loaded.add_examples(labels[0], [queries[0]])
    with pytest.raises(IosrFastError, match="has as 'e0': leave it out"):
        loaded.add_examples(labels[-1], [of.images[support[0]]])  # which was encoded among others then, alone now
    assert opened._other[0].adapted and not loaded.encoder.adapted
    added = loaded.support_.embeddings
    row = int(np.argmax(added.plain @ both.plain[0]))
    np.testing.assert_allclose(added.adapted[row], both.adapted[0], atol=1e-5)
    with caplog.at_level(logging.INFO, "iosr_fast"):
        loaded.tune(method="tip-adapter++")
    assert "tip-adapter++ compares adapted embeddings; queries are encoded for it from now on" in caplog.text
    assert loaded.encoder is opened._other[0] and loaded.encoder.adapted
    np.testing.assert_allclose(loaded.decision_function(queries), loaded.snapshot().score(both), atol=1e-3)
    loaded.tune(method="tip-adapter")
    assert loaded.encoder is opened.encoder
