"""Models and options of Classifier and `iosr-fast fit` that don't fit are refused before a CLIP is made."""

from __future__ import annotations

import logging
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from iosr_fast import Classifier
from iosr_fast.backbones import download
from iosr_fast.export import pretrained
from tests.cli.runs import never, refused
from tests.store.live_parts import pixel_clip

pytestmark = pytest.mark.slow


def test_without_a_model_it_is_photographs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clip = pixel_clip()
    monkeypatch.setattr(pretrained, "open_pretrained", lambda model, *_: clip if model == "photographs" else never())
    monkeypatch.setattr(pretrained, "_in_use", {})
    monkeypatch.setattr(pretrained, "_latest", None)
    pretrained._recommend_a_clip.cache_clear()
    with caplog.at_level(logging.WARNING, "iosr_fast"):
        assert Classifier("photographs").encoder is clip.encoder
        assert not caplog.records
        assert Classifier().encoder is Classifier().encoder is clip.encoder
    assert len(caplog.records) == 1
    for words in ("'photographs'", "a CLIP, like 'ViT-B-32'", "reads class names"):
        assert words in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"adapter": "clip"}, "not an adapter of iosr_fast"),
        ({"adapter": "demo"}, "expected demo with 6 blocks of width 128, got ViT-B-32 with 12 of width 768"),
        ({"engine": "nowhere"}, "expected a folder with a manifest.json"),
        ({"runtime": "abacus"}, "expected runtime 'auto' or one of"),
        ({"precision": "fp7"}, "expected precision 'auto' or one of"),
        ({"precision": "bf16", "runtime": "onnxruntime"}, "which compute in bf16"),
        ({"pretrained": "no-such-tag"}, "has no pretrained tag 'no-such-tag'"),
        ({"pretrained": None}, "expected weights for"),
        ({"model": "ViT-Z-99"}, "one of open_clip's models"),
        ({"pretrained": "openia"}, "did you mean 'openai'"),
        (
            {"model": "RN50", "adapter": "demo"},
            "RN50 has a ModifiedResNet image encoder; .* every method without",
        ),
        ({"model": "RN50", "runtime": "torch"}, "an image encoder that can't be fused, got the runtime 'torch'"),
        ({"model": "RN50", "precision": "fp16"}, "expected fp32, bf16 or int8 for .* got fp16"),
        ({"model": "local-dir:nowhere", "pretrained": None}, "open_clip_config.json and weights at nowhere"),
        ({"model": "hf-hub:a/b", "pretrained": "openai"}, "names its weights itself"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_clip_is_made(
    options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    from iosr_fast.export.pretrained import DEMO_ADAPTER, DEMO_FOLDER

    for name in ("create_model", "create_model_and_transforms", "get_tokenizer", "load_openai_model"):
        monkeypatch.setattr(open_clip, name, never, raising=False)
    files = {"demo": DEMO_ADAPTER, "clip": DEMO_FOLDER / "clip.safetensors"}
    given = {"model": "ViT-B-32", "pretrained": "openai", **options}
    if "adapter" in given:
        given["adapter"] = files.get(given["adapter"], given["adapter"])
    with pytest.raises((ValueError, OSError), match=said):
        Classifier(**given).fit(["a.jpg", "b.jpg"], ["a", "b"])


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        RuntimeError("Failed to download weights for 'ViT-B-32'\ntraceback of theirs"),
    ],
)
def test_a_download_that_fails_is_one_line_that_names_the_model(
    failure: Exception, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fails(*_: object, **__: object) -> Any:
        raise failure

    monkeypatch.setattr(download, "_reach", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    words = ("--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k")
    said = refused("fit", folder, "--out", tmp_path / "out", *words)
    assert "the weights 'laion2b_s34b_b79k' of ViT-B-32 can't be downloaded" in said and "--pretrained FILE" in said
    assert "take the model 'photographs', which needs none" in said
    assert len(said.strip().splitlines()) == 1
    with pytest.raises(OSError, match="of ViT-B-32 can't be downloaded"):
        Classifier("ViT-B-32", "laion2b_s34b_b79k").fit(["a.jpg", "b.jpg"], ["a", "b"])
