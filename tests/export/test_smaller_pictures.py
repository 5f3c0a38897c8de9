"""Engines for smaller pictures: recorded, distinguished by their fingerprint, converted, and fitted like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytest.importorskip("open_clip")

from iosr_fast import Classifier  # noqa: E402
from iosr_fast.clip.demo.pictures import load_pictures  # noqa: E402
from iosr_fast.clip.load import load_clip  # noqa: E402
from iosr_fast.encoders.runtimes import open_engine  # noqa: E402
from iosr_fast.encoders.runtimes.engine import ENGINE_KIND  # noqa: E402
from iosr_fast.exceptions import IosrFastError  # noqa: E402
from iosr_fast.export.candidates import Candidate, with_smaller_images  # noqa: E402
from iosr_fast.export.convert import convert_engine  # noqa: E402
from iosr_fast.export.export import random_adapter, write_engine  # noqa: E402
from iosr_fast.export.pretrained import choose_adapter  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from iosr_fast.images.preprocess import to_pixels  # noqa: E402
from iosr_fast.utils.manifest import read_manifest  # noqa: E402
from iosr_fast.utils.verified_folder import open_verified  # noqa: E402
from tests.clip.small_clip import random_pixels, small_clip  # noqa: E402
from tests.store.manifests import rewrite_manifest  # noqa: E402

pytestmark = [pytest.mark.usefixtures("exports_once"), pytest.mark.slow]


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_the_size_is_recorded_and_in_the_fingerprint(runtime: str, tmp_path: Path) -> None:
    clip = small_clip()
    adapter = random_adapter(clip, 1)
    seen, tokens = [], [{}, {"image_size": 24}]
    for i, fewer in enumerate(tokens):
        folder = tmp_path / str(i)
        manifest = write_engine(clip, adapter, folder, runtime, max_batch=4, **fewer)
        assert manifest.get("tokens", {}) == fewer
        assert manifest["image_size"] == fewer.get("image_size", 32)
        assert manifest["clip_fingerprint"] == clip.fingerprint
        encoder = open_engine(folder, runtime)
        assert encoder.encode(random_pixels(3, encoder.image_size)).plain.shape == (3, 24)
        seen.append(manifest["fingerprint"])
    assert len(set(seen)) == len(tokens)
    with pytest.raises(IosrFastError, match="a multiple of 8"):
        write_engine(clip, adapter, tmp_path / "new", runtime, image_size=20)


def test_the_demo_on_smaller_pictures(tmp_path: Path) -> None:
    """In a size that `iosr-fast optimize --smaller-images` tries, whose test shares the exports."""
    fewer, size = {"image_size": 48}, 48
    clip = load_clip("demo")
    pictures = load_pictures("held-out", min_styles=5)
    images, labels = pictures.images[:60], [pictures.names[c] for c in pictures.concepts[:60]]
    adapter = choose_adapter(clip, "auto")
    manifest = write_engine(clip, adapter, tmp_path / "engine", "onnxruntime", **fewer)
    generic = to_pixels(load_pictures("generic").images[:16], Geometry(size), False)
    converted = convert_engine(tmp_path / "engine", tmp_path / "int8", "openvino", "int8", generic)
    direct = write_engine(clip, adapter, tmp_path / "direct", "openvino", "int8", calibration=generic, **fewer)
    assert converted["fingerprint"] == direct["fingerprint"] != manifest["fingerprint"]
    for folder in ("engine", "int8"):
        classifier = Classifier("demo", engine=tmp_path / folder, method="tip-adapter++", alpha=3.0, beta=7.0, views=1)
        classifier.fit(images, labels)
        assert classifier.encoder.image_size == size
        assert classifier.score(images, labels) > 0.5
        classifier.save(tmp_path / "bundle")
        loaded = Classifier.load(tmp_path / "bundle")
        np.testing.assert_allclose(
            loaded.decision_function(images[:4]), classifier.decision_function(images[:4]), atol=1e-2
        )


@pytest.mark.parametrize("family", ["siglip", "pe-core"])
def test_families_take_smaller_pictures(family: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from tests.clip.families import family_clip

    clip = family_clip(family)
    adapter = random_adapter(clip, 1)
    write_engine(clip, adapter, tmp_path / "engine", "torch", max_batch=4)  # no export: test_families has them
    source = open_verified(tmp_path / "engine", ENGINE_KIND)
    (one,) = with_smaller_images(source, [Candidate("torch", "fp32")])
    assert one.tokens == {"image_size": 24}
    manifest = write_engine(clip, adapter, tmp_path / "smaller", "torch", max_batch=4, **one.tokens)
    assert manifest["tokens"] == one.tokens


def test_an_engine_that_merges_tokens_is_refused_and_one_of_version_0_2_opens(tmp_path: Path) -> None:
    clip = small_clip()
    write_engine(clip, random_adapter(clip, 1), tmp_path / "engine", "torch", max_batch=4)
    facts = read_manifest(tmp_path / "engine", ENGINE_KIND)
    for merged in (0, 3):
        facts["dual_encoder"]["merged"] = merged
        rewrite_manifest(tmp_path / "engine", dual_encoder=facts["dual_encoder"])
        if not merged:
            assert open_engine(tmp_path / "engine", "torch").encode(random_pixels(2, 32)).plain.shape == (2, 24)
            continue
        with pytest.raises(IosrFastError, match="merges tokens, which iosr_fast no longer does: build it again"):
            open_engine(tmp_path / "engine", "torch")
