"""Classifier as an estimator of scikit-learn: parameters, copies, pickles, integer labels."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import exceptions as sklearn_exceptions
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from iosr_fast import Classifier, IosrFastError
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.exceptions import LookAlikesWarning, NotFittedError
from iosr_fast.export import pretrained
from tests.classifier.conftest import GIVEN, NAMES
from tests.cli.runs import never
from tests.interpreter import printed
from tests.store.live_parts import (
    PixelEncoder,
    engine_folder,
    pixel_clip,
    small_classifier,
    text_embedding,
    unfitted,
    unit,
)


def test_parameters_are_stored_as_they_are_and_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "open_shared", never)
    values = {name: object() for name in Classifier().get_params()}
    odd = Classifier().set_params(**values)
    assert odd.get_params() == values
    assert all(getattr(odd, name) is value for name, value in values.items() if name != "tune")
    assert callable(odd.tune), "the method stays, and get_params has the parameter of its name"
    assert clone(odd.set_params(**Classifier().get_params())).get_params() == Classifier().get_params()
    with pytest.raises(IosrFastError, match="Classifier has no parameter 'shots'; it has model, pretrained, adapter, "):
        odd.set_params(margin=7, shots=2)
    assert odd.margin == 0, "all or nothing"
    with pytest.raises(IosrFastError, match=r"expected precision 'auto' or one of .*, got 'int9'"):
        Classifier("demo", precision="int9")
    given = {"method": "gda", "tune": "none", "alpha": 0.5}
    assert repr(Classifier("demo", **given)) == "Classifier(model='demo', method='gda', tune='none', alpha=0.5)"


def test_parameters_and_data_are_checked_before_a_clip_is_opened(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    monkeypatch.setattr(pretrained, "open_shared", never)
    images, labels = data
    for message, parameters in {
        "expected a method of": {"method": "magic"},
        "method 'auto' chooses by leave-one-out: leave alpha out": {"alpha": 1.0},
        "expected parameters or tune='loo', got both; leave alpha out": {"method": "gda", "alpha": 1.0, "tune": "loo"},
        "expected thumbnails from 0 to 1024, got 5000": {"thumbnails": 5000},
        "expected templates": {"templates": ["a photo"]},
        "expected a key precision of fp32, fp16, bf16, int8, got 'fp8'": {"key_precision": "fp8"},
    }.items():
        with pytest.raises(IosrFastError, match=message):
            Classifier("demo").set_params(**parameters).fit(images, labels, NAMES)
    for message, given in {
        "got 29 labels": (images, labels[1:], NAMES),
        "integer labels have no names.*: pass class_names": (images, labels, None),
        "nor has an indicator, .*: pass class_names": (images, np.eye(5, dtype=int)[labels], None),
        "expected integer labels from 0 to 9007199254740991, got '-1'": (images, labels - 1, None),
        "at least one image of each class, got none of 'spare'": (images, labels, [*NAMES, "spare"]),
        "expected labelled images or class_names, got neither": (None, None, None),
    }.items():
        with pytest.raises(IosrFastError, match=message):
            Classifier("demo").fit(*given)
    for message, texts in {
        "as lists of texts by class name, got list": [["a"]],
        r"by name, got 'motif', 'x'; did you mean 'motif ": {"motif": ["a"], "x": ["a"]},
        "by name, got '0'; the classes are 'motif 0', ": {0: ["a"]},
        "1 to 1,000 descriptions of 'motif 1', got 'a'": {"motif 1": "a"},
        r"1 to 1,000 descriptions of 'motif 1', got \[\]": {"motif 1": []},
        "got ' ', which is blank": {"motif 1": ["a", " "]},
    }.items():
        with pytest.raises(IosrFastError, match=message):
            Classifier("demo").fit(images, labels, NAMES, descriptions=texts)
    monkeypatch.undo()
    monkeypatch.setattr(pretrained, "load_model", never)
    for long in ({"templates": ["x " * 90 + "{}"]}, {"model": "ViT-B-16-quickgelu", "templates": ["{} x" * 70]}):
        with pytest.raises(IosrFastError, match=r"at most 77 tokens, .* shorten the name, or the prompts \(templates="):
            Classifier(**{"model": "ViT-B-32", "pretrained": "openai"} | long).fit(images, labels, NAMES)
    with pytest.raises(IosrFastError, match=r"each class with templates=\[\], got none of 'motif 0', 'motif 2', "):
        Classifier("demo", templates=[]).fit(images, labels, NAMES, descriptions={"motif 1": ["a"]})


@pytest.mark.usefixtures("clip")
def test_descriptions_make_the_texts_of_a_fit_and_of_changes(data: Any) -> None:
    def text(*texts: str) -> np.ndarray:
        return unit(np.mean([text_embedding(text) for text in texts], axis=0))

    classifier = Classifier("demo", **GIVEN).fit(*data, NAMES, descriptions={"motif 1": ["red", "blue"]})
    np.testing.assert_array_equal(classifier.support_.text[:2], [text("motif 0"), text("motif 1", "red", "blue")])
    classifier.add_class("new", data[0][:1] // 2, descriptions=["a", "b"])
    np.testing.assert_array_equal(classifier.support_.text[-1], text("new", "a", "b"))
    classifier.rename_class("new", "newer", descriptions=["c"])
    np.testing.assert_array_equal(classifier.support_.text[-1], text("newer", "c"))
    for wrong in ({"text": text("c")}, {"keep_text": True}):
        with pytest.raises(IosrFastError, match=r"expected .*, got both"):
            classifier.rename_class("newer", "newest", **wrong, descriptions=["c"])
    alone = Classifier("demo", **GIVEN, templates=[]).fit(*data, NAMES, descriptions={name: ["a"] for name in NAMES})
    np.testing.assert_array_equal(alone.support_.text, [text("a")] * 5)
    with pytest.raises(IosrFastError, match=r"of each class with templates=\[\], got none of 'n'"):
        alone.add_class("n", data[0][:1] // 2)


def test_set_params_counts_from_the_next_fit(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    images, labels = data
    clips = {"demo": pixel_clip(), "other": pixel_clip()}
    clips["other"].encoder.projections = clips["demo"].encoder.projections[::-1]  # type: ignore[attr-defined]
    monkeypatch.setattr(pretrained, "open_shared", lambda model, **_: clips[model])
    classifier = Classifier("demo", **GIVEN).fit(images, labels, NAMES)
    logits = classifier.decision_function(images)
    classifier.set_params(model="other", method="gda", alpha=None, beta=None, exif_orientation=False)
    assert classifier.encoder is clips["demo"].encoder and classifier.exif_orientation_
    np.testing.assert_array_equal(classifier.decision_function(images), logits)
    classifier.add_examples(NAMES[0], images[0] // 2)
    assert classifier.method_ == "tip-adapter++"
    classifier.fit(images, labels, NAMES)
    assert classifier.encoder is clips["other"].encoder and classifier.method_ == "gda"
    assert not classifier.exif_orientation_


def test_a_refused_fit_leaves_the_earlier_one(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = small_classifier()
    before = classifier.snapshot()
    burst = np.repeat(data[0], 4, axis=0)
    burst[..., 0] ^= np.arange(len(burst), dtype=np.uint8)[:, None, None] % 4
    with warnings.catch_warnings(), pytest.raises(LookAlikesWarning):
        warnings.simplefilter("error")
        classifier.fit(burst, np.repeat(data[1], 4), NAMES)
    assert classifier.snapshot() is before
    classifier.open_log(tmp_path / "changes.db")
    monkeypatch.setattr(classifier.encoder, "encode", never)
    for call in (lambda: classifier.fit(*data, NAMES), lambda: classifier.fit_folder(tmp_path / "none")):
        with pytest.raises(IosrFastError, match="expected no log to be open"):
            call()
    classifier.close_log()


@pytest.mark.parametrize("thumbnails", [96, 8], ids=["by the same settings", "by others"])
def test_a_fit_while_a_change_encodes_refuses_the_change(thumbnails: int, data: Any) -> None:
    """Another class may have its id by then."""
    classifier = small_classifier()
    text = classifier._fit.clip.text
    embed = text.embed_classes

    def refits(*arguments: Any) -> np.ndarray:
        text.embed_classes = embed
        classifier.set_params(thumbnails=thumbnails).fit(*data, NAMES[::-1])
        return embed(*arguments)

    text.embed_classes = refits
    with pytest.raises(IosrFastError, match="was fitted again while images or texts were encoded"):
        classifier.rename_class(NAMES[0], "new")
    assert [one.name for one in classifier.classes()] == NAMES[::-1]


def test_nothing_is_answered_before_a_fit(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    monkeypatch.setattr(pretrained, "open_shared", never)
    classifier, image = Classifier("demo"), data[0][:1]
    for call in (lambda: classifier.predict(image), lambda: classifier.add_class("a"), lambda: classifier.classes_):
        with pytest.raises(NotFittedError, match="this Classifier is not fitted yet: call fit or fit_folder") as raised:
            call()
        assert isinstance(pickle.loads(pickle.dumps(raised.value)), sklearn_exceptions.NotFittedError)
    assert not hasattr(classifier, "classes_")
    with pytest.raises(sklearn_exceptions.NotFittedError):
        check_is_fitted(classifier)
    check_is_fitted(small_classifier())


def test_predictions_import_no_scikit_learn() -> None:
    program = (
        "import sys; from tests.store.live_parts import small_classifier, pictures, unfitted; import numpy as np\n"
        "small_classifier().predict(pictures(np.random.default_rng(0), 2, 1)[0])\n"
        "try: unfitted().predict('a.jpg')\n"
        "except AttributeError as error: print(type(error).__name__, 'sklearn' in sys.modules)"
    )
    assert printed(program) == "NotFittedError False"


def test_a_copy_shares_the_encoder_and_changes_alone(data: Any, tmp_path: Path) -> None:
    classifier = small_classifier(templates=["the {}"])
    classifier.open_log(tmp_path / "changes.db")
    for copied in (copy.copy(classifier), copy.deepcopy(classifier)):
        assert copied.encoder is classifier.encoder and copied.get_params() == classifier.get_params()
        np.testing.assert_array_equal(copied.decision_function(data[0]), classifier.decision_function(data[0]))
        copied.remove_class("~0")
        copied.fit(data[0], data[1], NAMES)  # it logs nothing
        assert len(copied.classes_) == len(classifier.classes_) == 5 and classifier.version == 1
    classifier.close_log()


def test_pickles_have_parameters_alone() -> None:
    again = pickle.loads(pickle.dumps(Classifier("demo", method="gda", tune="none")))
    assert repr(again) == "Classifier(model='demo', method='gda', tune='none')" and not again.__sklearn_is_fitted__()
    with pytest.raises(IosrFastError, match=r"never pickled.*save\(folder\) writes it and load\(folder\) opens it"):
        pickle.dumps(small_classifier())


def test_integer_labels_come_back_as_integers(clip: OpenedModel, data: Any) -> None:
    images, labels = data
    names = [NAMES[c] for c in labels]
    for given in (labels.tolist(), labels.astype(np.uint32), labels.astype(object)):
        classifier = Classifier("demo", **GIVEN).fit(images, given, NAMES)
        assert classifier.classes_.dtype == np.int64 and classifier.classes_.tolist() == [0, 1, 2, 3, 4]
    found = classifier.predict(images)
    assert found.dtype == np.int64 and classifier.predict([]).dtype == np.int64
    assert classifier.score(images, labels) == classifier.score(images, names) == (found == labels).mean() > 0.9
    assert {type(one) for one in classifier.predict(images, unknown="reject", keep=0.9)} <= {int, type(None)}
    assert classifier.predict_sets(images)[0].dtype == np.int64
    one = classifier.explain(images[:1])[0]
    assert (one.label, one.class_id) == (NAMES[found[0]], f"~{found[0]}")
    by_name = Classifier("demo", **GIVEN).fit(images, names, NAMES)
    np.testing.assert_array_equal(by_name.predict(images), np.array(NAMES)[found])
    assert by_name.score(images, labels) == classifier.score(images, labels), "integers into classes_"


def test_a_class_keeps_its_integer_through_changes_log_and_bundle(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = data
    made = unfitted(engine_folder(tmp_path / "engine"), **GIVEN).fit(images, labels, NAMES)
    monkeypatch.setattr("iosr_fast.encoders.runtimes.open_engine", lambda *_, **__: PixelEncoder())
    row = made._fit.clip.text.embed_classes(["new"])[0]
    made.save(tmp_path / "bundle")
    classifier, expected = Classifier.load(tmp_path / "bundle"), np.where(labels == 1, 5, labels)
    classifier.open_log(tmp_path / "changes.db")
    classifier.remove_class("~1")
    classifier.add_class("new", images[labels == 1], text=row)
    assert classifier.score(images, expected) == classifier.tune(images, expected).evidence.accuracy == 1.0
    with pytest.raises(IosrFastError, match="the integers of the 5 classes, '0', '2', '3', '4', '5', got '1'"):
        classifier.score(images, labels)
    classifier.close_log()
    again = Classifier.load(tmp_path / "bundle")
    again.open_log(tmp_path / "changes.db")
    again.save(tmp_path / "later")
    for loaded in (again, Classifier.load(tmp_path / "later"), copy.deepcopy(classifier)):
        assert loaded.classes_.dtype == np.int64 and loaded.classes_.tolist() == [0, 2, 3, 4, 5]
        np.testing.assert_array_equal(loaded.predict(images), expected)
    again.close_log()


def test_a_loaded_classifier_knows_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    made = small_classifier(engine_folder(tmp_path / "engine"), margin=0.5, templates=["a {}"], thumbnails=8)
    made.save(tmp_path / "bundle")
    monkeypatch.setattr("iosr_fast.encoders.runtimes.open_engine", lambda *_, **__: PixelEncoder())
    loaded = Classifier.load(tmp_path / "bundle", runtime="onnxruntime")
    engine = tmp_path / "bundle" / "engine"
    known = {"model": "pixels", "runtime": "onnxruntime", "engine": engine, "reducer": "none", "templates": ("a {}",)}
    known |= {"precision": "fp32"}
    assert loaded.get_params() == made.get_params() | known
    with pytest.raises(IosrFastError, match="has no text encoder to fit with"):
        loaded.fit(*data, NAMES)
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr(pretrained, "open_shared", lambda **named: opened.append(named) or pixel_clip())
    again = clone(loaded)
    assert again.encoder is loaded.encoder and not hasattr(again, "classes_") and not opened
    again.set_params(pretrained="weights.pt").fit(*data, NAMES)
    assert opened[0]["engine"] == engine and opened[0]["pretrained"] == "weights.pt"
