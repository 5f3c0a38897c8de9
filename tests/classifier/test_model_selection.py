"""Classifier in scikit-learn's cross-validation and searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from joblib import Memory
from sklearn.base import is_classifier
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from iosr_fast import Classifier, IosrFastError
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.export import pretrained
from tests.classifier.conftest import GIVEN, NAMES
from tests.store.live_parts import pixel_clip, small_classifier

pytestmark = pytest.mark.slow


def test_cross_validation_takes_images_in_every_form(clip: OpenedModel, data: Any, paths: list[str]) -> None:
    images, labels = data
    classifier, names = Classifier("demo", **GIVEN), [NAMES[c] for c in labels]
    expected = cross_val_score(classifier, images, names, cv=3).tolist()
    assert len(expected) == 3 and min(expected) > 0.8
    series = pandas.Series(paths, index=range(7, 7 + len(paths)))
    for given in ([Path(path) for path in paths], np.array(paths, dtype=object), series, list(images)):
        assert cross_val_score(classifier, given, pandas.Series(names, index=series.index), cv=3).tolist() == expected
    assert cross_val_score(small_classifier(), images, names, cv=3).tolist() == expected, "on its own CLIP"
    by_number = cross_val_score(classifier, paths, labels, cv=3, params={"class_names": NAMES})
    assert by_number.tolist() == expected
    assert cross_val_score(make_pipeline("passthrough", classifier), paths, names, cv=3).tolist() == expected
    assert not classifier.__sklearn_is_fitted__() and is_classifier(classifier)
    table = pandas.DataFrame({"path": paths, "label": "x"})
    with pytest.raises(IosrFastError, match=r"a table with the columns 'path', 'label'; .* like table\['path'\]"):
        Classifier("demo").fit(table, table["label"])


def test_out_of_fold_probabilities_of_named_classes(clip: OpenedModel, data: Any, paths: list[str]) -> None:
    """scikit-learn encodes string labels as integers there; the parameter class_names gives them their names back."""
    names = [NAMES[c] for c in data[1]]
    classifier = Classifier("demo", class_names=sorted(set(names)), **GIVEN)
    found = cross_val_predict(classifier, paths, names, cv=3, method="predict_proba")
    assert np.unique(names)[found.argmax(1)].tolist() == cross_val_predict(classifier, paths, names, cv=3).tolist()
    with pytest.raises(IosrFastError, match=r"needs Classifier\(class_names=sorted names\)"):
        cross_val_predict(Classifier("demo", **GIVEN), paths, names, cv=3, method="predict_proba")


def test_a_grid_search_opens_one_clip_until_its_files_change(data: Any, monkeypatch: Any, tmp_path: Path) -> None:
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(pretrained, "open_pretrained", lambda *named: opened.append(named) or pixel_clip())
    monkeypatch.setattr(pretrained, "_latest", None)
    monkeypatch.setattr(pretrained, "_in_use", type(pretrained._in_use)())
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes(b"one")
    classifier, names = Classifier("demo", adapter=adapter, **GIVEN), [NAMES[c] for c in data[1]]
    search = GridSearchCV(classifier, {"alpha": [0.01, 40.0]}, cv=2).fit(data[0], names)
    assert search.best_params_ == {"alpha": 40.0} and search.best_score_ > 0.8
    assert len(opened) == 1, "for all folds"
    adapter.write_bytes(b"another")
    assert Classifier("demo", adapter=adapter).encoder is not search.best_estimator_.encoder
    assert len(opened) == 2 and len(pretrained._in_use) <= 2, "nothing holds the others"


def test_a_search_with_a_memory_encodes_each_picture_once(
    clip: OpenedModel, data: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def encode(pixels: np.ndarray) -> Embeddings:
        encoded.append(len(pixels))
        return type(clip.encoder).encode(clip.encoder, pixels)

    encoded, names, grid = list[int](), [NAMES[c] for c in data[1]], {"alpha": [0.01, 40.0]}
    without = GridSearchCV(Classifier("demo", **GIVEN), grid, cv=3).fit(data[0], names)
    expected = without.decision_function(data[0])
    monkeypatch.setattr(clip.encoder, "encode", encode)
    for memory in (tmp_path / "path", Memory(tmp_path / "joblib", verbose=0)):
        search = GridSearchCV(Classifier("demo", memory=memory, **GIVEN), grid, cv=3).fit(data[0], names)
        assert search.cv_results_["mean_test_score"].tolist() == without.cv_results_["mean_test_score"].tolist()
        np.testing.assert_array_equal(search.decision_function(data[0]), expected)
        assert sum(encoded) == len(names) and len(encoded) < 5, "together"
        encoded.clear()
    for differs, value in (("fingerprint", "0" * 64), ("runtime", "another")):
        monkeypatch.setattr(clip.encoder, differs, value)
        Classifier("demo", memory=memory, **GIVEN).fit(data[0], names)
        assert sum(encoded) == len(names), "another encoder has embeddings of its own"
        encoded.clear()


def test_the_tags_say_that_pictures_are_no_matrix() -> None:
    """So that scikit-learn's own checks, which know matrices of features alone, leave them out."""
    passed = [one["check_name"] for one in check_estimator(Classifier("demo"), on_skip=None)]
    assert passed == ["check_estimator_cloneable"]
