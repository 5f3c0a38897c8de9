"""Classifier in scikit-learn's cross-validation and searches, and under its estimator checks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast import Classifier, IosrFastError
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.export import pretrained
from tests.classifier.conftest import GIVEN, NAMES
from tests.store.live_parts import pixel_clip, small_classifier

sklearn = pytest.importorskip("sklearn", reason="scikit-learn comes with the sklearn extra")
pandas = pytest.importorskip("pandas", reason="pandas comes with the dev extra")
from sklearn.base import is_classifier  # noqa: E402
from sklearn.metrics import accuracy_score  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score, cross_validate  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.utils import estimator_checks as checks  # noqa: E402

pytestmark = pytest.mark.slow

# Model selection


def test_cross_validation_takes_images_in_every_form(clip: OpenedClip, data: Any, paths: list[str]) -> None:
    images, labels = data
    classifier, names = Classifier("demo", **GIVEN), [NAMES[c] for c in labels]
    expected = cross_val_score(classifier, images, names, cv=3)
    assert expected.shape == (3,) and expected.min() > 0.8
    series = pandas.Series(paths, index=range(7, 7 + len(paths)))
    for given in (paths, [Path(path) for path in paths], np.array(paths, dtype=object), series, list(images)):
        assert cross_val_score(classifier, given, names, cv=3).tolist() == expected.tolist()
    for given in (np.array(names), np.array(names, dtype=object), pandas.Series(names, index=series.index)):
        assert cross_val_score(classifier, paths, given, cv=3).tolist() == expected.tolist()
    assert cross_val_score(small_classifier(), images, names, cv=3).tolist() == expected.tolist(), "on its own CLIP"
    by_number = cross_val_score(classifier, paths, labels, cv=3, params={"class_names": NAMES})
    assert by_number.tolist() == expected.tolist()
    assert cross_val_score(make_pipeline("passthrough", classifier), paths, names, cv=3).tolist() == expected.tolist()
    assert not classifier.__sklearn_is_fitted__() and is_classifier(classifier)


@pytest.mark.parametrize("method", ["predict_proba", "decision_function"])
def test_out_of_fold_probabilities_of_named_classes(clip: OpenedClip, data: Any, paths: list[str], method: str) -> None:
    """scikit-learn encodes string labels as integers there; the parameter class_names gives them their names back."""
    names = [NAMES[c] for c in data[1]]
    classifier = Classifier("demo", class_names=sorted(set(names)), **GIVEN)
    found = cross_val_predict(classifier, paths, names, cv=3, method=method)
    labels = cross_val_predict(classifier, paths, names, cv=3)
    assert np.unique(names)[found.argmax(1)].tolist() == labels.tolist()
    with pytest.raises(IosrFastError, match=r"needs Classifier\(class_names=sorted names\)"):
        cross_val_predict(Classifier("demo", **GIVEN), paths, names, cv=3, method=method)


def test_a_table_is_no_sequence_of_images(paths: list[str]) -> None:
    table = pandas.DataFrame({"path": paths, "label": "x"})
    for call in (lambda: small_classifier().predict(table), lambda: Classifier("demo").fit(table, table["label"])):
        with pytest.raises(IosrFastError, match=r"a table with the columns 'path', 'label'; .* like table\['path'\]"):
            call()


def test_a_grid_search_on_the_demo_opens_one_clip(demo_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
    monkeypatch.setenv("IOSR_FAST_CACHE", str(demo_cache))
    opened = []
    really = pretrained.open_pretrained
    monkeypatch.setattr(pretrained, "open_pretrained", lambda *named: opened.append(named) or really(*named))
    monkeypatch.setattr(pretrained, "_latest", None)
    monkeypatch.setattr(pretrained, "_in_use", type(pretrained._in_use)())
    held_out = load_pictures("held-out", min_styles=5)
    rows = np.flatnonzero(np.isin(held_out.concepts, np.linspace(0, len(held_out.names) - 1, 8).astype(int)))
    images, labels = held_out.images[rows], [held_out.names[c] for c in held_out.concepts[rows]]
    classifier = Classifier("demo", runtime="onnxruntime", method="tip-adapter++", views=1)
    search = GridSearchCV(classifier, {"method": ["zero-shot", "gda++"]}, cv=2).fit(images, labels)
    assert search.best_params_ == {"method": "gda++"} and search.best_score_ > 3 / 8
    assert search.best_estimator_.method_ == "gda++" and search.classes_.tolist() == sorted(set(labels))
    assert len(opened) == 1, "for all folds"
    with pytest.raises(IosrFastError, match=r"a fitted Classifier is never pickled.*save\(folder\)"):
        cross_validate(classifier, images, labels, cv=2, n_jobs=2, return_estimator=True)


def test_classifiers_share_a_clip_until_its_files_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(pretrained, "open_pretrained", lambda *named: opened.append(named) or pixel_clip())
    monkeypatch.setattr(pretrained, "_latest", None)
    monkeypatch.setattr(pretrained, "_in_use", type(pretrained._in_use)())
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes(b"one")
    one = Classifier("demo", adapter=adapter).encoder
    assert Classifier("demo", adapter=adapter, method="gda").encoder is one and len(opened) == 1
    adapter.write_bytes(b"another")
    assert Classifier("demo", adapter=adapter).encoder is not one
    assert Classifier("demo", adapter=None).encoder is not Classifier("demo", adapter="None").encoder
    assert len(pretrained._in_use) == 1, "nothing holds the others: only the latest stays in memory"


# scikit-learn's own checks, which know matrices of features alone

NOT_FOR_PICTURES = {
    "check_n_features_in": "pictures have no features to count",
    "check_n_features_in_after_fitting": "pictures have no features to count",
    "check_classifiers_train": "it ends in pictures of another size, which is no error: each is resized",
    "check_estimators_nan_inf": "pixels are uint8",
    "check_complex_data": "pixels are uint8; the labels are refused, in other words than it expects",
    "check_estimators_empty_data_messages": "a picture has no features that could be none",
    "check_estimator_sparse_tag": "a sparse matrix is no picture",
    "check_estimator_sparse_array": "a sparse matrix is no picture",
    "check_estimator_sparse_matrix": "a sparse matrix is no picture",
    "check_estimators_pickle": "a fitted classifier is saved, never pickled",
    "check_dtype_object": "labels of another type are refused, in other words than it expects",
    "check_classifiers_regression_target": "labels of another type are refused, in other words than it expects",
    "check_supervised_y_2d": "a column of labels is refused; it expects a warning",
    "check_fit2d_1sample": "one class is refused, in other words than it expects",
}


def as_pictures(rows: Any) -> np.ndarray:
    """A picture of 8x8 for each row of features (n, m), its features one after another."""
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2:
        raise ValueError("Reshape your data: expected a matrix")
    pixels = np.tile(127.5 + 127.5 * np.sin(rows / 2), (1, -(-192 // rows.shape[1])))[:, :192]
    return pixels.astype(np.uint8).reshape(-1, 8, 8, 3)


class RowClassifier(Classifier):
    """A Classifier of rows of features, so that the checks reach it; their integer labels need names."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array = False, True
        return tags

    def fit(self, X: Any, y: Any = None) -> RowClassifier:  # type: ignore[override]
        labels = np.asarray(y)
        self._integers = np.unique(labels) if labels.dtype.kind in "iu" else None
        if self._integers is None:
            return super().fit(as_pictures(X), labels)
        ids = np.searchsorted(self._integers, labels)
        return super().fit(as_pictures(X), ids, [f"class {number}" for number in self._integers])

    @property
    def classes_(self) -> np.ndarray:
        return super().classes_ if self._integers is None else self._integers[super().classes_]

    def predict(self, X: Any) -> np.ndarray:
        found = super().predict(as_pictures(X))
        return found if self._integers is None else self._integers[found]

    def decision_function(self, X: Any) -> np.ndarray:  # type: ignore[override]
        return super().decision_function(as_pictures(X))

    def predict_proba(self, X: Any) -> np.ndarray:
        return super().predict_proba(as_pictures(X))

    def score(self, X: Any, y: Any) -> float:
        return accuracy_score(y, self.predict(X))


def test_scikit_learns_checks_pass_where_they_suit_pictures(clip: OpenedClip) -> None:
    estimator = RowClassifier("demo", method="tip-adapter++", alpha=40.0, beta=5.0, views=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = checks.check_estimator(estimator, expected_failed_checks=NOT_FOR_PICTURES, on_skip=None, on_fail=None)
    wrong = [f"{one['check_name']}: {one['exception']}" for one in results if one["status"] == "failed"]
    assert not wrong, "\n".join(wrong)
    assert {one["check_name"] for one in results if one["status"] == "xfail"} == set(NOT_FOR_PICTURES)
    assert sum(one["status"] == "passed" for one in results) >= 30
    assert [one["check_name"] for one in checks.check_estimator(Classifier("demo"), on_skip=None)] == [
        "check_estimator_cloneable"
    ], "the tags say that Classifier takes no matrix, so that scikit-learn checks no more of it"
