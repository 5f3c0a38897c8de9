"""The same labels whichever way a picture comes in, and a classifier that keeps the way it was fit with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.classifier import Classifier
from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.exceptions import BadImageError
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import as_image_list, open_image, to_pixels
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.store.bundle import load
from tests.images.test_formats import oriented
from tests.pictures import encode
from tests.store.live_parts import engine_folder, pixel_clip, unfitted
from tests.store.manifests import rewrite_manifest

NAMES = ["down", "left", "right", "up"]
PATIENCE_S = 30.0


def arrow(direction: int, side: int = 32) -> np.ndarray:
    """Brightness that falls by one of four directions: turned, it is another class."""
    ramp = np.tile(np.linspace(250, 5, side).astype(np.uint8), (side, 1))
    return np.rot90(ramp, direction)[:, :, None].repeat(3, 2)


def fitted(engine: Path = Path("none"), **options: Any) -> Classifier:
    chosen = {"method": "tip-adapter", "alpha": 400.0, "beta": 5.0} | options
    return unfitted(engine, **chosen).fit([arrow(i) for i in range(4)], NAMES)


def test_a_rotated_support_picture_is_fit_upright() -> None:
    turned = [oriented("PNG", arrow(i), 6) for i in range(4)]
    classifier = unfitted(method="tip-adapter", alpha=400.0, beta=5.0).fit(turned, NAMES)
    assert classifier.predict([arrow(i) for i in range(4)]).tolist() == NAMES
    shown = np.asarray(open_image(classifier.picture(classifier.examples(NAMES[0])[0]))).astype(int)
    assert np.abs(shown - arrow(0)).mean() < 8, "the thumbnail too"


def test_a_bundle_keeps_the_orientation_it_was_fit_with(tmp_path: Path) -> None:
    data = oriented("PNG", arrow(1), 6)
    as_stored = fitted().predict(open_image(data, exif_orientation=False))[0]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(data)
    assert as_stored != NAMES[1]
    for chosen, expected in ((True, NAMES[1]), (False, as_stored)):
        made = fitted(engine_folder(tmp_path / f"engine {chosen}"), exif_orientation=chosen)
        made.save(tmp_path / f"bundle {chosen}")
        bundle = load(tmp_path / f"bundle {chosen}")
        loaded = unfitted()
        loaded._fit = FittedClassifier(pixel_clip(bundle.engine), bundle.head, bundle.settings)
        assert loaded.exif_orientation_ is chosen
        assert loaded.predict([data]).tolist() == [expected]
        assert loaded.predict_folder(tmp_path / "in").labels.tolist() == [expected]
        with BatchingClassifier(loaded) as batching:
            assert batching.submit(data).result(PATIENCE_S).label == expected
        speckled = oriented("PNG", np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8), 6)
        loaded.add_examples(NAMES[1], [speckled])
        nearest = loaded.explain(open_image(speckled, exif_orientation=chosen), nearest=1)[0].nearest[0]
        assert nearest.example_id == loaded.examples(NAMES[1])[-1] and nearest.similarity > 0.99


def test_a_bundle_of_before_takes_pictures_as_they_are_stored(tmp_path: Path) -> None:
    made = fitted(engine_folder(tmp_path / "engine"))
    made.save(tmp_path / "bundle")
    views = json.loads((tmp_path / "bundle" / "manifest.json").read_bytes())["views"]
    assert views.pop("exif_orientation") is True
    rewrite_manifest(tmp_path / "bundle", views=views)
    assert load(tmp_path / "bundle").settings.exif_orientation is False


def test_a_torch_tensor_is_one_picture_and_a_batch_is_its_pictures() -> None:
    import torch

    classifier = fitted()
    last = torch.from_numpy(np.ascontiguousarray(arrow(1)))  # (H, W, C)
    first = last.permute(2, 0, 1)
    batch = torch.stack([torch.from_numpy(np.ascontiguousarray(arrow(i))) for i in range(4)])
    grey = first[:1]
    for one in (first, last, first.contiguous(), grey, grey[0], grey.permute(1, 2, 0), [first], (last,)):
        assert classifier.predict(one).tolist() == [NAMES[1]]
        assert classifier.decision_function(one).shape == (1, 4) and len(classifier.explain(one)) == 1
    for many in (batch, batch.permute(0, 3, 1, 2), list(batch), list(batch.permute(0, 3, 1, 2)), batch[:, :, :, :1]):
        assert classifier.predict(many).tolist() == NAMES
        assert classifier.score(many, NAMES) == 1
    assert len(as_image_list(first)) == 1 and len(as_image_list(batch)) == 4
    alpha = torch.cat([first, torch.zeros_like(first[:1])])
    assert (np.asarray(open_image(alpha)) == 255).all(), "transparent"
    exact = to_pixels(batch, Geometry(32))
    assert (exact == batch.numpy()).all() and (
        to_pixels(batch.permute(0, 3, 1, 2), Geometry(32)) == batch.numpy()
    ).all()
    with BatchingClassifier(classifier) as batching:
        assert batching.submit(first).result(PATIENCE_S).label == NAMES[1]
        for given, expected in ((first, NAMES[1:2]), (arrow(1), NAMES[1:2]), (batch, NAMES), (list(batch), NAMES)):
            assert [future.result(PATIENCE_S).label for future in batching.submit_many(given)] == expected
    refit = unfitted(method="tip-adapter", alpha=400.0, beta=5.0)
    refit.fit(batch.permute(0, 3, 1, 2), NAMES)
    assert refit.predict(batch).tolist() == NAMES
    refit.add_examples(NAMES[1], first)
    assert len(refit.examples(NAMES[1])) == 2, "one picture, not three"


def test_a_tensor_of_anything_but_uint8_pixels_says_what_to_do() -> None:
    import torch

    classifier = fitted()
    for tensor, said in (
        (torch.rand(3, 8, 8), r"tensor of torch\.float32; .*\(tensor \* 255\)\.round\(\)\.to\(torch\.uint8\)"),
        (torch.rand(2, 3, 8, 8).half(), r"tensor of torch\.float16"),
        (torch.zeros(2, 8, 8, 8, dtype=torch.uint8), r"got \(2, 8, 8, 8\)"),
        (torch.zeros(8, 8, 8, dtype=torch.uint8), r"got \(8, 8, 8\)"),
        (torch.zeros(8, dtype=torch.uint8), r"got \(8,\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta"), "meta"),
    ):
        for given in (tensor, [tensor]):
            with pytest.raises(BadImageError, match=said):
                classifier.predict(given)
    with BatchingClassifier(classifier) as batching, pytest.raises(BadImageError, match="float32"):
        batching.submit(torch.rand(3, 8, 8)).result(PATIENCE_S)


def test_a_training_depends_on_the_rules_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from iosr_fast.training import pictures

    (tmp_path / "a.png").write_bytes(encode(arrow(0)))
    prints = [pictures.FilePictures([tmp_path / "a.png"], torch.zeros(1), ["a"], Geometry(8)).fingerprint]
    monkeypatch.setattr(pictures, "VERSION", 1)
    prints.append(pictures.FilePictures([tmp_path / "a.png"], torch.zeros(1), ["a"], Geometry(8)).fingerprint)
    assert prints[0] != prints[1]
