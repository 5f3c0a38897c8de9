"""The recipe for Triton Inference Server on the page of recipes, against a stand-in of its Python backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast import Classifier
from tests import ROOT
from tests.docs.documents import blocks
from tests.docs.place import users_place
from tests.docs.triton_python_backend_utils import InferenceRequest, InferenceResponse, Tensor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with users_place(tmp_path_factory.mktemp("user")) as folder:
        Classifier("demo", method="tip-adapter", tune="none").fit_folder("support").save("my-classifier")
        yield folder


@pytest.fixture
def model(folder: Path) -> Any:
    (recipe,) = [block.parsed for block in blocks(ROOT / "docs/recipes.md") if "TritonPythonModel" in block.parsed]
    names: dict[str, Any] = {}
    exec(recipe, names)
    model = names["TritonPythonModel"]()
    parameters = {"classifier": {"string_value": str(folder / "my-classifier")}}
    model.initialize({"model_config": json.dumps({"parameters": parameters})})
    return model


def request(*images: bytes) -> InferenceRequest:
    return InferenceRequest([Tensor("IMAGE", np.array(images, object)[:, None])])


def outputs(response: InferenceResponse) -> dict[str, np.ndarray]:
    assert response.error is None
    return {tensor.name: tensor.as_numpy() for tensor in response.output_tensors}


def test_the_model_gives_the_classifiers_labels_and_probabilities(folder: Path, model: Any) -> None:
    images = [path.read_bytes() for path in sorted(folder.glob("?.jpg"))]
    expected = Classifier.load(folder / "my-classifier")
    responses = [outputs(each) for each in model.execute([request(*images[:2]), request(images[2])])]
    assert [response["LABEL"].shape for response in responses] == [(2, 1), (1, 1)]
    labels = np.concatenate([response["LABEL"] for response in responses]).ravel().tolist()
    assert labels == [label.encode() for label in expected.predict(images[:3])]
    probabilities = np.concatenate([response["PROBABILITIES"] for response in responses])
    np.testing.assert_allclose(probabilities, expected.predict_proba(images[:3]), atol=1e-6)


def test_an_unreadable_image_fails_its_own_request_alone(folder: Path, model: Any) -> None:
    good = (folder / "a.jpg").read_bytes()
    first, bad, last = model.execute([request(good), request(b"no picture"), request(good)])
    assert "image" in bad.error.message()
    assert outputs(first)["LABEL"].tolist() == outputs(last)["LABEL"].tolist()
