"""Classifier.audit and Classifier.suggest: what they name, after live changes too; the same of FewShotHead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier, FewShotHead
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.methods.links import Softmax
from iosr_fast.methods.suggest import suggest
from tests.classifier.conftest import NAMES
from tests.methods.support_sets import Clusters
from tests.store.live_parts import pairs_of_pictures


def test_an_audit_names_examples_and_is_right_after_a_change(clip: OpenedModel, data: Any) -> None:
    images, labels = data
    names = [NAMES[c] for c in labels]
    wrong = names.index(NAMES[1])
    classifier = Classifier("any", method="gda", alpha=1.0, thumbnails=0)
    classifier.fit(images, [NAMES[3] if i == wrong else name for i, name in enumerate(names)])
    (suspect,) = classifier.audit().likely_wrong
    assert (suspect.label, suspect.suggested) == (NAMES[3], NAMES[1])
    assert suspect.image in classifier.examples(NAMES[3])
    assert set(suspect.neighbours) <= set(classifier.examples(NAMES[1]))
    classifier.remove_examples([suspect.image])
    audit = classifier.audit()
    assert not audit.likely_wrong and len(audit.suspicion) == len(images) - 1
    assert [one.label for one in audit.classes] == NAMES and sum(one.images for one in audit.classes) == 29


def test_labels_corrected_by_an_audit_of_files_are_those_of_the_next_fit(
    clip: OpenedModel, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = data
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(images):
        file = Path("support", NAMES[{7: 3, 20: 0}.get(i, labels[i])], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    classifier = Classifier("any", method="gda", alpha=1.0).fit_folder("support")
    classifier.add_examples(NAMES[labels[20]], images[20] ^ 1)  # as good as a copy, under its right label
    audit = classifier.audit()
    wrong = {Path(one.path or "").relative_to(tmp_path): one.suggested for one in audit.likely_wrong}
    assert wrong == {Path("support", NAMES[c], f"{i}.png"): NAMES[labels[i]] for i, c in ((7, 3), (20, 0))}
    assert ("20.png", None) in [(Path(one.path or "").name, one.other_path) for one in audit.duplicates]
    Path("labels.csv").write_text("\n".join(["path,label", *(f"{path},{label}" for path, label in wrong.items())]))
    fixed = Classifier("any", method="gda", alpha=1.0).fit_folder("support", "labels.csv")
    assert not fixed.audit().likely_wrong
    given = dict(zip(fixed.snapshot().examples.paths, fixed.support_.labels, strict=True))
    assert {int(Path(path or "").stem): c for path, c in given.items()} == dict(enumerate(labels))


def test_of_several_labels_an_audit_names_the_wrong_and_the_missing_ones(clip: OpenedModel, tmp_path: Path) -> None:
    images, right, given = pairs_of_pictures(NAMES)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{';'.join(names)}" for i, names in enumerate(given)]
    (tmp_path / "given.csv").write_text("\n".join(["path,labels", *rows]))
    classifier = Classifier("any").fit_folder(tmp_path / "given.csv")
    audit = classifier.audit()
    edits = {(i, name, None) for i in range(60) for name in given[i] - right[i]}
    edits |= {(i, None, name) for i in range(60) for name in right[i] - given[i]}
    assert {(int(Path(one.path or "").stem), one.label, one.suggested) for one in audit.likely_wrong} == edits
    for image, names in audit.corrected.items():
        classifier.relabel([str(image)], names)
    assert not classifier.audit().likely_wrong and len(classifier.audit().suspicion) == 60
    indicator = np.array([[name in names for name in NAMES] for names in given], int)
    wrong = FewShotHead().fit(images.reshape(60, -1) / 127.5 - 1, indicator).audit().likely_wrong
    numbered = {None: None} | {name: c for c, name in enumerate(NAMES)}
    assert {(one.image, one.label, one.suggested) for one in wrong} == {
        (i, numbered[label], numbered[suggested]) for i, label, suggested in edits
    }


def test_suggestions_of_a_folder_with_and_without_labels(clip: OpenedModel, data: Any, paths: list[str]) -> None:
    images, labels = data
    folder = Path(paths[0]).parent
    start = Classifier("any").suggest(folder, 5)
    chosen = [paths.index(str(path)) for path in start.paths]
    assert len(start) == 5 and start.images == 30 and start.stands.sum() == 30
    assert len(set(labels[chosen])) == 5 and set(start.labels) == {""}
    known = labels < 3
    classifier = Classifier("any", method="gda", alpha=1.0).fit(images[known], [NAMES[c] for c in labels[known]])
    suggestions = classifier.suggest(folder, 4)
    first = [int(labels[paths.index(str(path))]) for path in suggestions.paths[:2]]
    assert set(first) <= {3, 4}  # of no known class
    for path, label, probability in suggestions:
        assert label == classifier.predict(str(path))[0]
        assert probability == pytest.approx(classifier.predict_proba(str(path)).max(), abs=1e-4)


def test_a_head_names_positions_in_x() -> None:
    images, labels = Clusters(10).queries(6)
    order = np.random.default_rng(1).permutation(len(labels))
    X, y = np.vstack([np.zeros((1, images.plain.shape[1])), images.plain[order]]), np.r_[0, labels[order]]
    names = np.array([f"class {c}" for c in y])
    names[[4, 9]] = names[[9, 4]]
    with pytest.warns(UserWarning, match="zeros only"):
        head = FewShotHead("gda", alpha=1.0).fit(X, names)
    wrong = head.audit().likely_wrong
    assert {one.image: one.suggested for one in wrong} == {4: names[9], 9: names[4]}
    queries = Clusters(10).queries(10, seed=5)[0].plain
    logits = head.snapshot().calibrated(head.decision_function(queries))
    expected = suggest(queries, 7, Softmax().entropy(logits))
    np.testing.assert_array_equal(head.suggest(queries, 7).rows, expected.rows)
