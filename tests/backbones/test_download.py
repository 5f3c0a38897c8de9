"""Without a network: one attempt, one line and what to do instead; what was downloaded earlier is read."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from iosr_fast.backbones import download
from iosr_fast.backbones.download import downloading
from iosr_fast.backbones.image_models import load_encoder
from iosr_fast.backbones.load import DEMO_NAME, load_clip
from tests.backbones.test_models import CONFIG

Cache = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """The hub's address refuses connections. The folder in the client's cache of the files of a repository."""
    download._reach.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # a port that nothing listens on
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("the client waits to try again"))

    def files(repository: str) -> Path:
        folder, commit = tmp_path / f"models--{repository.replace('/', '--')}", "0123456789" * 4
        for path in (folder / "refs", folder / "snapshots" / commit):
            path.mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    return files


def test_a_hub_that_does_not_answer_is_asked_once() -> None:
    """The client alone would wait and try again five times for each file."""
    with pytest.raises(OSError, match="does not answer") as got, downloading("ViT", "the weights") as hub:
        hub.weights("owner/repository", "weights.bin")
    said = str(got.value)
    assert said.startswith("the weights of ViT can't be downloaded or read: 127.0.0.1 does not answer (")
    assert "--pretrained FILE" in said and "the model 'photographs'" in said and "\n" not in said


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_tag_is_loaded_with_its_preprocessing(file: str, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    tag = {**fields, "hf_hub": "owner/repository/", "quick_gelu": True, "url": ""}
    other = {**tag, "mean": (0.3,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, DEMO_NAME, {"ours": tag, "other": other})
    demo = load_clip("demo")
    write: Any = torch.save if file.endswith("bin") else save_file
    write(demo.model.state_dict(), cache("owner/repository") / file)
    clip = load_clip(DEMO_NAME, "ours")
    assert all(torch.equal(value, demo.model.state_dict()[key]) for key, value in clip.model.state_dict().items())
    assert (clip.mean, clip.std, clip.geometry.changes()["resize_mode"]) == ((0.1,) * 3, (0.2,) * 3, "squash")
    assert type(clip.model.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU


def test_a_repository_of_the_hub_is_loaded_by_its_own_configuration(cache: Cache) -> None:
    folder, name = cache("owner/repository"), "hf-hub:owner/repository"
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(OSError, match=f"the weights of {name} can't be downloaded or read: 127.0.0.1 does not answer"):
        load_clip(name)
    assert load_clip(name, "none").name == name
    save_file(load_clip("demo").model.state_dict(), folder / "open_clip_model.safetensors")
    clip = load_clip(name)
    assert clip.name == name and clip.fingerprint == load_clip(f"local-dir:{folder}").fingerprint
    with pytest.raises(OSError, match=r"the configuration of hf-hub:owner/other can't be downloaded or read: "):
        load_clip("hf-hub:owner/other")
    with pytest.raises(ValueError, match=r"names its weights itself.* got 'openai'"):
        load_clip(name, "openai")


def test_an_image_encoder_is_loaded_without_its_classifier(cache: Cache) -> None:
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), cache("timm/test_vit.r160_in1k") / "model.safetensors")
    loaded, state = load_encoder("timm/test_vit", None).state_dict(), model.state_dict()
    assert set(state) - set(loaded) == {"head.weight", "head.bias"}
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_a_home_that_is_read_only_is_named_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_reach", lambda *_: None)
    read_only = OSError(errno.EROFS, "denied", "/home/me/.cache/huggingface")
    said = r"/home/me.*; set HF_HOME to a folder that can be written"
    with pytest.raises(OSError, match=said), downloading("ViT", "the weights"):
        raise RuntimeError("Failed to download weights") from read_only
