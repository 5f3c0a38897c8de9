"""Classifier on an image encoder that reads no texts: answers, refusals, changes and files, on a real engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.ensemble import VotingClassifier
from sklearn.model_selection import cross_val_predict, cross_val_score

from iosr_fast import Classifier, FewShotHead, IosrFastError
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.store.bundle import Bundle, save
from iosr_fast.store.description import describe
from tests.backbones.image_model import IMAGE_WIDTH, open_image_model
from tests.pictures import encode
from tests.serving.http_client import AUTHORISED, error_of, fields, form, serving
from tests.store.live_parts import WrittenText, engine_folder, pictures, small_classifier, unit

pytestmark = pytest.mark.slow
NAMES = [f"motif {c}" for c in range(5)]
IMAGES, CLASSES = pictures(np.random.default_rng(3), 5, 6)
LABELS = np.array(NAMES)[CLASSES]
QUERIES, ASKED = pictures(np.random.default_rng(7), 5, 4)
NEW = pictures(np.random.default_rng(1), 8, 3)[0][-3:]  # of another class
TEXTS: dict[str, Any] = {"text": unit(np.ones(IMAGE_WIDTH)), "descriptions": ["striped"]}
BY_IMAGES = "this classifier knows classes by their images alone"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_image_model(tmp_path_factory.mktemp("images") / "engine")


@pytest.fixture
def fitted(model: OpenedModel) -> Classifier:
    return Classifier._with_clip(model).fit(IMAGES, LABELS)


@pytest.fixture
def bundle(fitted: Classifier, tmp_path: Path) -> Path:
    fitted.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def load(folder: Path) -> Classifier:
    return Classifier.load(folder, runtime="onnxruntime")


@pytest.mark.parametrize("method", ["auto", "tip-adapter", "gda", "proker", "several labels"])
def test_answers_are_those_of_a_head_on_the_embeddings(method: str, model: OpenedModel, tmp_path: Path) -> None:
    labels, truth = LABELS.tolist(), np.array(NAMES)[ASKED].tolist()
    if several := method == "several labels":
        method, labels, truth = "auto", [{label} for label in labels], [{label} for label in truth]
    classifier = Classifier._with_clip(model, method=method).fit(IMAGES, labels)
    head = FewShotHead(method, tau=model.tau).fit(classifier.snapshot().examples.embeddings.plain, labels)
    (queries,) = classifier._fit.queries(QUERIES)
    logits = classifier.decision_function(QUERIES)
    np.testing.assert_allclose(logits, head.decision_function(queries.plain), rtol=1e-5, atol=1e-5)
    assert classifier.score(QUERIES, truth) > 0.9
    if not several:
        assert {(one.zero_shot, one.cache == one.logit) for one in classifier.explain(QUERIES)} == {(0.0, True)}
    classifier.save(tmp_path / "bundle")
    np.testing.assert_array_equal(load(tmp_path / "bundle").decision_function(QUERIES), logits)


@pytest.mark.parametrize(
    ("message", "parameters", "options"),
    [
        ("zero-shot compares images with texts, .* take a CLIP", {"method": "zero-shot"}, {}),
        ("compares adapted embeddings, and there are none: use 'gda'", {"method": "gda++"}, {}),
        ("expected no templates .* a CLIP reads texts", {"templates": ["a {}"]}, {}),
        ("no descriptions: this model has no text encoder", {}, {"descriptions": {"motif 1": ["striped"]}}),
        ("needs at least one image of each class, got none of 'sixth'", {}, {"class_names": [*NAMES, "sixth"]}),
    ],
)
def test_a_fit_with_texts_is_refused_before_an_image_is_read(
    message: str, parameters: dict[str, Any], options: dict[str, Any], model: OpenedModel
) -> None:
    with pytest.raises(IosrFastError, match=message):
        Classifier._with_clip(model, **parameters).fit([b"no picture"] * 5, NAMES, **options)


def test_a_loaded_classifier_fits_again(fitted: Classifier, bundle: Path) -> None:
    loaded = load(bundle)
    assert {"model": "small-images", "adapter": None, "templates": None}.items() <= loaded.get_params().items()
    again = clone(loaded).fit(IMAGES, LABELS)
    np.testing.assert_array_equal(again.decision_function(QUERIES), fitted.decision_function(QUERIES))
    assert cross_val_score(loaded, list(IMAGES), LABELS, cv=3, error_score="raise").min() > 0.8
    with pytest.raises(IosrFastError, match="expected no templates"):
        again.set_params(templates=["{}"]).fit(IMAGES, LABELS)
    shown = describe(bundle)
    assert "\nimage encoder 0000" in shown and "\ntext encoder none: this model reads no texts\n" in shown


def test_integer_labels_need_no_names(model: OpenedModel, tmp_path: Path) -> None:
    classifier = Classifier._with_clip(model).fit(IMAGES, 2 * CLASSES + 1)
    classifier.save(tmp_path / "bundle")
    loaded = load(tmp_path / "bundle")
    for one in (classifier, loaded):
        assert one.classes_.tolist() == [1, 3, 5, 7, 9] and one.snapshot().class_names == ("1", "3", "5", "7", "9")
        assert one.score(QUERIES, 2 * ASKED + 1) == (one.predict(QUERIES) == 2 * ASKED + 1).mean() > 0.9
    loaded.add_class("new", NEW[:2])
    assert loaded.predict(NEW[2]).tolist() == [10] and loaded.score(QUERIES, 2 * ASKED + 1) > 0.9
    several = clone(classifier).fit(IMAGES, np.eye(5, dtype=int)[CLASSES])
    assert several.classes_.tolist() == [0, 1, 2, 3, 4] and several.predict(QUERIES).shape == (len(QUERIES), 5)


@pytest.mark.parametrize("labels", [LABELS, CLASSES, 2 * CLASSES + 1])
def test_estimators_that_number_the_classes_take_it(labels: np.ndarray, model: OpenedModel) -> None:
    classifier = Classifier._with_clip(model, method="gda")
    for voting in ("hard", "soft"):
        votes = VotingClassifier([("one", classifier), ("another", clone(classifier))], voting=voting)
        assert votes.fit(IMAGES, labels).score(IMAGES, labels) > 0.9
    found = cross_val_predict(classifier, list(IMAGES), labels, cv=3, method="predict_proba")
    assert (np.unique(labels)[found.argmax(1)] == labels).mean() > 0.8


@pytest.mark.parametrize("has", ["no texts of a CLIP", "texts", "a text encoder"])
def test_a_bundle_has_texts_if_its_model_reads_them(has: str, tmp_path: Path) -> None:
    facts = {} if has == "no texts of a CLIP" else {"logit_scale": None}
    made = Bundle.of(small_classifier(engine_folder(tmp_path / "engine", **facts), method="gda", beta=None)._fit)
    head = made.head if has == "texts" else replace(made.head, text=None)
    with pytest.raises(IosrFastError, match="a text encoder of a CLIP alone"):
        save(replace(made, head=head, text=WrittenText() if has == "a text encoder" else None), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_changes_take_no_texts_and_are_logged(fitted: Classifier, bundle: Path, tmp_path: Path) -> None:
    fitted.open_log(tmp_path / "log.db")
    refused: list[tuple[str, Callable[[], Any]]] = [
        *((BY_IMAGES, lambda one=one: fitted.add_class("new", NEW, **dict([one]))) for one in TEXTS.items()),
        *((BY_IMAGES, lambda one=one: fitted.rename_class("motif 1", "new", **dict([one]))) for one in TEXTS.items()),
        ("at least one image of 'new', got none", lambda: fitted.add_class("new")),
        ("an image of 'motif 1' to stay", lambda: fitted.remove_examples(fitted.examples("motif 1"))),
    ]
    for message, call in refused:
        with pytest.raises(IosrFastError, match=message):
            call()
    assert fitted.version == 1 and fitted.add_class("new", NEW[:2]).class_id == "~5"
    assert fitted.predict(NEW[2]).tolist() == ["new"]
    fitted.rename_class("new", "newer")
    fitted.rename_class("motif 1", "first", keep_text=True)
    two = [fitted.examples(name)[0] for name in ("newer", "first")]
    assert fitted.remove_examples(two).class_id == "", "of several classes"
    fitted.retune()
    fitted.close_log()
    again = load(bundle)
    again.open_log(tmp_path / "log.db")
    again.close_log()
    assert again.version == 6 and again.classes() == fitted.classes()
    np.testing.assert_array_equal(again.decision_function(QUERIES), fitted.decision_function(QUERIES))


def test_changes_over_http(bundle: Path) -> None:
    with serving(load(bundle)) as client:
        new = {"headers": AUTHORISED, "files": form(*map(encode, NEW[:2]))}
        answer = client.ask("POST", "/v1/classes", data={"name": "new", "description": "striped"}, **new)
        assert error_of(answer, 422) == "refused" and BY_IMAGES in answer.text
        assert client.ask("POST", "/v1/classes", data={"name": "new"}, **new).json()["class_id"] == "~5"
        for texts, status in (({"description": "striped"}, 422), ({}, 200)):
            answer = client.ask("PATCH", "/v1/classes/~5", files=fields(name="newer", **texts), headers=AUTHORISED)
            assert answer.status_code == status and (BY_IMAGES in answer.text) == (status == 422)
        assert client.predict(encode(NEW[2])).json()["predictions"][0]["label"] == "newer"
        assert client.get("/v1/classifier").json()["model"] == "small-images"


def test_promises_reports_and_one_file(fitted: Classifier, tmp_path: Path) -> None:
    """The export compares the file's answers with the classifier's."""
    given = {"unknown_images": 255 - QUERIES, "tree": {"motif 0": "even", "motif 2": "even", "motif 4": "even"}}
    for classifier in (fitted, clone(fitted).fit(IMAGES, LABELS, **given)):
        assert classifier.predict_jointly(QUERIES).labels.tolist() == classifier.predict(QUERIES).tolist()
        assert max(map(len, classifier.predict_sets(QUERIES))) == 1
        assert len(classifier.audit().suspicion) == len(IMAGES)
        report = classifier.evaluate(QUERIES, np.array(NAMES)[ASKED], unknown_images=255 - QUERIES)
        assert "are right" in report.summary() and classifier.unknown_score(255 - QUERIES).min() > 0
        classifier.export(tmp_path / "all.onnx", max_error=0.3, unknown="reject")


def test_the_engine_is_chosen(fitted: Classifier, bundle: Path) -> None:
    choice = fitted.optimize(IMAGES, LABELS, precision="fp32")
    assert choice.judged == len(IMAGES) and {one.verdict for one in choice.candidates} <= {"chosen", "accepted"}
    with pytest.raises(IosrFastError, match="a vision transformer for smaller_images, got small-images"):
        load(bundle).optimize(IMAGES, LABELS, smaller_images=True, pretrained="none")
