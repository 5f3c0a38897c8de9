"""Classifier in scikit-learn's cross-validation and searches."""

from __future__ import annotations

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
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score, cross_validate  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

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


def test_the_tags_say_that_pictures_are_no_matrix() -> None:
    """So that scikit-learn's own checks, which know matrices of features alone, leave them out."""
    passed = [one["check_name"] for one in check_estimator(Classifier("demo"), on_skip=None)]
    assert passed == ["check_estimator_cloneable"]
