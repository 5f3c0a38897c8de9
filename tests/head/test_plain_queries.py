"""Queries are encoded in the form that their method needs; support images always in both."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.methods import METHODS
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.serving.batching import BatchingClassifier
from tests.conftest import unit_rows

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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_state_says_what_the_plan_reads(method: str) -> None:
    rng = np.random.default_rng(0)
    rows, text = Embeddings(unit_rows(rng, 12, 16), unit_rows(rng, 12, 16)), unit_rows(rng, 3, 16)
    support = make_support_set(rows, np.repeat(range(3), 4), text, 100.0, 3)
    config = MethodConfig(method, dict(METHODS[method].parameters)).fitted(support)
    assert config.compile(support).needs_adapted == (config.which == "adapted")


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


def test_a_loaded_classifier_opens_both_forms_only_where_it_needs_them(
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
    assert "opening the engine for both embeddings" in caplog.text
    assert opened._other[0].adapted and not loaded.encoder.adapted
    added = loaded.support_.embeddings
    assert added.adapted is not None and len(added) == len(images) + 1
    row = int(np.argmax(loaded.support_.embeddings.plain @ clip.encoder.encode(queries[:1]).plain[0]))
    np.testing.assert_allclose(added.adapted[row], clip.encoder.encode(queries[:1]).adapted[0], atol=1e-5)
    # Saved again, it is the same classifier, and can be fitted by a method that compares adapted embeddings.
    loaded.save(tmp_path / "second")
    again = Classifier.load(tmp_path / "second", threads=1)
    np.testing.assert_allclose(again.decision_function(queries), loaded.decision_function(queries), atol=1e-4)
    refitted = again.set_params(method="tip-adapter++").fit(images, labels)
    direct = Classifier._with_clip(clip, method="tip-adapter++", **GIVEN).fit(images, labels)
    assert refitted.encoder.adapted
    np.testing.assert_allclose(refitted.decision_function(queries), direct.decision_function(queries), atol=1e-3)


def test_a_change_of_the_method_changes_the_form_and_says_so(
    clip: OpenedClip, pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels, queries = pictures
    Classifier._with_clip(clip, method="tip-adapter", **GIVEN).fit(images, labels).save(tmp_path / "bundle")
    classifier = Classifier.load(tmp_path / "bundle", threads=1)
    opened = classifier._fit.clip
    before = classifier.snapshot()
    with caplog.at_level(logging.INFO, "iosr_fast"):
        classifier.tune(method="tip-adapter++")
    assert "tip-adapter++ compares adapted embeddings; queries are encoded for it from now on" in caplog.text
    assert opened._other and classifier.encoder is opened._other[0] and classifier.encoder.adapted
    expected = classifier.snapshot().score(clip.encoder.encode(queries))
    np.testing.assert_allclose(classifier.decision_function(queries), expected, atol=1e-3)
    assert not before.needs_adapted and classifier.snapshot().needs_adapted
    classifier.tune(method="tip-adapter")
    assert classifier.encoder is opened.encoder and not classifier.encoder.adapted
    classifier.save(tmp_path / "plain")
    assert not Classifier.load(tmp_path / "plain").encoder.adapted
