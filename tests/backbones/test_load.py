"""Loading CLIPs: by name, from open_clip's and OpenAI's files, all by one path."""

from __future__ import annotations

import hashlib
import logging
import shlex
import subprocess
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip
import pytest
import torch

from iosr_fast.backbones import load
from iosr_fast.backbones.load import DEMO_FOLDER, load_clip
from iosr_fast.backbones.prompts import embed_classes
from tests.interpreter import printed

pytestmark = pytest.mark.slow

TINY = "iosr-fast-demo"


@pytest.fixture(scope="module")
def tiny_state() -> dict:
    """Random weights in the demo's architecture."""
    open_clip.add_model_config(DEMO_FOLDER / f"{TINY}.json")
    torch.manual_seed(3)
    return {key: value.clone() for key, value in open_clip.create_model(TINY).state_dict().items()}


def same_weights(clip, state: dict) -> bool:
    loaded = clip.model.state_dict()
    return set(loaded) == set(state) and all(torch.equal(loaded[key], state[key].float()) for key in state)


def torchscript_archive(state: dict, path: Path) -> None:
    """A TorchScript archive like OpenAI's: parameters in nested modules, and three numbers beside them."""
    root = torch.nn.Module()
    for key, value in state.items():
        module = root
        *parents, name = key.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_parameter(name, torch.nn.Parameter(value.half(), requires_grad=False))
    for name, number in (("input_resolution", 64), ("context_length", 16), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(number))
    torch.jit.script(root).save(str(path))


def publish(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip's table name the file at `path` as what OpenAI published."""
    url = f"https://openaipublic.azureedge.net/clip/models/{hashlib.sha256(path.read_bytes()).hexdigest()}/{path.name}"
    monkeypatch.setattr(open_clip, "get_pretrained_url", lambda name, tag: url if tag == "openai" else "")


class Writing(torch.nn.Module):
    """TorchScript that writes a file when the archive is loaded."""

    def __init__(self, target: Path) -> None:
        super().__init__()
        self.weight, self.target = torch.zeros(2), str(target)

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight, self.target, self.training = state
        torch.save(self.weight, self.target)


def test_the_demo_has_trained_weights() -> None:
    clip = load_clip("demo")
    assert clip.model.training is False and not any(p.requires_grad for p in clip.model.parameters())
    assert clip.fingerprint == load_clip("demo").fingerprint != load_clip("demo", pretrained="none").fingerprint


def test_the_application_logs_as_ever_while_clips_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create, level = open_clip.create_model, logging.root.level

    def created(*names: str, **options: bool) -> object:
        logging.getLogger("application").warning("of its own logger")
        logging.warning("of the root logger")
        return create(*names, **options)

    monkeypatch.setattr(open_clip, "create_model", created)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load_clip, ["demo"] * 4, ["none"] * 4))
    assert Counter(caplog.messages) == {"of its own logger": 4, "of the root logger": 4}  # and none of open_clip
    assert logging.root.level == level


def test_files_of_weights(tiny_state: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors, a state dict, one of a parallel module, OpenAI's archive; which activation is in the fingerprint."""
    from safetensors.torch import save_file

    save_file(tiny_state, tmp_path / "weights.safetensors")
    torch.save(tiny_state, tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in tiny_state.items()}}, tmp_path / "wrapped.pt")
    clips = [load_clip(TINY, tmp_path / name) for name in ("weights.safetensors", "plain.pt", "wrapped.pt")]
    assert all(same_weights(clip, tiny_state) for clip in clips)
    torchscript_archive(tiny_state, tmp_path / "openai.pt")
    publish(tmp_path / "openai.pt", monkeypatch)
    quick = load_clip(TINY, str(tmp_path / "openai.pt"))
    rounded = {key: value.half().float() for key, value in tiny_state.items()}
    assert same_weights(quick, rounded)
    torch.save(rounded, tmp_path / "rounded.pt")
    kinds = [type(c.model.visual.transformer.resblocks[0].mlp.gelu).__name__ for c in (clips[0], quick)]
    assert kinds == ["GELU", "QuickGELU"] and quick.fingerprint != load_clip(TINY, tmp_path / "rounded.pt").fingerprint


@pytest.mark.parametrize("name", ["weights.pt", "weights"])
def test_a_program_in_a_weights_file_is_not_run(name: str, tmp_path: Path) -> None:
    torch.jit.script(Writing(tmp_path / "written")).save(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"TorchScript archive.*OpenAI published none for .*safetensors"):
        load_clip(TINY, tmp_path / name)
    assert not (tmp_path / "written").exists()
    torch.jit.load(tmp_path / name)  # it is such a program
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize("folder", ["code", "Code", "code\\", "constants.pkl"])
def test_a_program_in_disguise_is_not_run(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of an archive is renamed or left out, nothing hands it to torch.jit.load."""
    torch.jit.script(Writing(tmp_path / "written")).save(str(tmp_path / "whole.pt"))
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
        for entry in whole.namelist():
            top, inside = entry.split("/", 1)
            if inside != folder:
                evil.writestr(f"{top}/{inside.replace('code/', folder + '/')}", whole.read(entry))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the archive is run"))
    with pytest.raises((ValueError, RuntimeError), match="TorchScript archive"):
        load_clip(TINY, tmp_path / "evil.pt")
    assert not (tmp_path / "written").exists()


def test_another_archive_than_the_published_one_is_converted_by_the_command_in_the_error(
    tiny_state: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "our own.pt"
    torchscript_archive(tiny_state, path)
    publish(path, monkeypatch)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("our own/code/more.py", "")
    with pytest.raises(ValueError, match=rf"SHA-256 [0-9a-f]{{64}}; OpenAI published [0-9a-f]{{64}} for {TINY}") as got:
        load_clip(TINY, path)
    python, *arguments = shlex.split(str(got.value).splitlines()[1])
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    clip = load_clip(TINY, path.with_suffix(".safetensors"))
    assert same_weights(clip, {key: value.half() for key, value in tiny_state.items()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(2)}, "'int' object"),
        ({"state_dict": 3}, "'int' object"),
        ({"visual.proj": torch.zeros(2)}, "Missing key"),
        ({"weights": torch.nn.Linear(1, 1)}, r"[Ww]eights.only"),  # a pickle with code in it
    ],
)
def test_other_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"expected weights of {TINY}, tensors by .*other\.pt: .*{message}"):
        load_clip(TINY, tmp_path / "other.pt")


def test_random_weights_need_no_download_of_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(load, "load_tokenizer", fails)
    clip = load_clip("demo", "none")
    assert clip.model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    for call in (lambda: embed_classes(clip, ["a cat"]), lambda: load_clip("demo")):
        with pytest.raises(OSError, match="no route to the hub"):
            call()


def test_without_torch_the_pip_command_is_named() -> None:
    code = """
import importlib, sys
sys.modules["torch"] = None
for name in ("backbones.demo.pictures", "backbones.load", "backbones.prompts", "export.pretrained"):
    importlib.import_module(f"iosr_fast.{name}")
from iosr_fast import Classifier
for name in ("backbones.adapter", "backbones.dual_encoder", "backbones.fuse", "backbones.two_pass", "encoder"):
    try:
        Classifier("demo").encoder if name == "encoder" else importlib.import_module(f"iosr_fast.{name}")
    except ImportError as error:
        assert "pip install 'iosr_fast[cpu]'" in str(error), (name, error)
    else:
        raise AssertionError(name)
"""
    printed(code)
