"""The CLIP's projections: from its model to the engine folder, a fit by "isoclip", a saved classifier and a retune."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from iosr_fast.classifier import Classifier
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.encoders.projections import FILE, Projections, read_projections
from iosr_fast.scoring.isoclip import fit_isoclip
from iosr_fast.scoring.score import score
from iosr_fast.state.bundle import load_bundle
from iosr_fast.utils.verified_folder import open_verified
from tests.state.live_parts import WIDTH, LetterText, PixelEncoder, engine_folder, pictures, random_queries, unfitted
from tests.state.manifests import sign_again


def projections(width: int = WIDTH) -> Projections:
    rng = np.random.default_rng(3)
    return Projections(*(rng.standard_normal((width, each)).astype(np.float32) for each in (30, 26)))


def engine_with(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    engine_folder(folder)
    save_file(arrays, folder / FILE)
    sign_again(folder)
    return folder


def classifier(engine: Path, **parameters: object) -> Classifier:
    encoder = PixelEncoder()
    encoder.source = open_verified(engine, "engine")
    made = Classifier._with_clip(OpenedClip(encoder, engine, LetterText(), 20.0), **parameters)
    return fit(made)


def fit(classifier: Classifier) -> Classifier:
    return classifier.fit(*pictures(np.random.default_rng(0), 5, 3), class_names=[f"motif {i}" for i in range(5)])


def test_a_saved_classifier_keeps_the_reducer_and_can_fit_it_again(tmp_path: Path) -> None:
    made = classifier(engine_with(tmp_path / "engine", projections()._asdict()), method="gda", reducer="isoclip")
    support = made.support_
    expected = fit_isoclip("isoclip", support.embeddings.plain, support.labels, projections())
    np.testing.assert_array_equal(made.plan_.reducer.projection, expected.projection)
    made.save(tmp_path / "bundle")
    state = load_bundle(tmp_path / "bundle").state
    queries = random_queries(np.random.default_rng(1), 9)
    np.testing.assert_array_equal(score(state.plan, queries), score(made.plan_, queries))
    assert state.config.reducer_name == "isoclip" and state.projections is not None
    np.testing.assert_array_equal(state.projections.text, projections().text)
    np.testing.assert_array_equal(state.config.fitted(state.support).reducer.projection, expected.projection)


def test_changes_and_a_tune_keep_the_projections(tmp_path: Path) -> None:
    made = classifier(engine_with(tmp_path / "engine", projections()._asdict()), method="gda", alpha=0.1)
    images, _ = pictures(np.random.default_rng(4), 5, 1)
    made.add_examples(made.snapshot().class_names[0], images[:1])
    tuned = made.tune(reducer="isoclip:4,2")
    assert tuned.reducer == "isoclip:4,2" and np.linalg.matrix_rank(made.plan_.reducer.projection) == WIDTH - 6
    made.retune()
    assert made.reducer_ == "isoclip:4,2" and made.snapshot().projections is not None


def test_a_clip_without_projections_is_told_before_anything_is_encoded(tmp_path: Path) -> None:
    made = unfitted(engine_folder(tmp_path / "engine"), method="gda", reducer="isoclip")
    made._open().encoder.encode = None  # would raise TypeError
    with pytest.raises(ValueError, match="needs the image and the text projection of the CLIP, got neither"):
        fit(made)


@pytest.mark.parametrize(
    "arrays",
    [
        {"image": projections().image},
        projections(WIDTH - 1)._asdict(),
        {**projections()._asdict(), "text": np.zeros(WIDTH, np.float32)},
        {**projections()._asdict(), "text": projections().text.astype(np.float64)},
        {**projections()._asdict(), "image": np.full((WIDTH, 2), np.nan, np.float32)},
    ],
    ids=["one is missing", "another width", "a vector", "another type", "not finite"],
)
def test_other_content_of_the_file_is_refused(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    source = open_verified(engine_with(tmp_path / "engine", arrays), "engine")
    with pytest.raises(ValueError, match=f"not a complete engine: {FILE}: expected "):
        read_projections(source)
    (source.folder / FILE).write_bytes(b"no arrays")
    sign_again(source.folder)
    with pytest.raises(ValueError, match=f"not a complete engine: {FILE}: expected "):
        read_projections(open_verified(source.folder, "engine"))
    assert read_projections(open_verified(engine_folder(tmp_path / "other"), "engine")) is None
    assert read_projections(None) is None
