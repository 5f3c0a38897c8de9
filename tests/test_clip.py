"""Loading CLIPs: by name, from open_clip's and OpenAI's files, all by one path."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
open_clip = pytest.importorskip("open_clip", reason="open_clip comes with the train extra")

from iosr_fast.offline.clip import DEMO_FOLDER, load_clip  # noqa: E402

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


def test_demo_has_trained_weights() -> None:
    clip = load_clip("demo")
    assert clip.name == "demo" and clip.image_size == 64
    assert clip.model.training is False and not any(p.requires_grad for p in clip.model.parameters())
    assert 1 < clip.logit_scale <= 100
    assert clip.fingerprint == load_clip("demo").fingerprint
    assert clip.fingerprint != load_clip("demo", pretrained="none").fingerprint


def test_safetensors(tiny_state: dict, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tiny_state, tmp_path / "weights.safetensors")
    clip = load_clip(TINY, tmp_path / "weights.safetensors")
    assert same_weights(clip, tiny_state)
    assert type(clip.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"


@pytest.mark.parametrize("wrapped", [False, True])
def test_state_dict_in_pt(tiny_state: dict, tmp_path: Path, wrapped: bool) -> None:
    state = {"state_dict": {f"module.{k}": v for k, v in tiny_state.items()}} if wrapped else tiny_state
    torch.save(state, tmp_path / "weights.pt")
    assert same_weights(load_clip(TINY, tmp_path / "weights.pt"), tiny_state)


def test_openai_torchscript_gets_quickgelu(tiny_state: dict, tmp_path: Path) -> None:
    torchscript_archive(tiny_state, tmp_path / "openai.pt")
    clip = load_clip(TINY, str(tmp_path / "openai.pt"))
    assert same_weights(clip, {key: value.half() for key, value in tiny_state.items()})
    assert type(clip.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_activation_is_part_of_the_fingerprint(tiny_state: dict, tmp_path: Path) -> None:
    torchscript_archive(tiny_state, tmp_path / "openai.pt")
    torch.save({key: value.half().float() for key, value in tiny_state.items()}, tmp_path / "plain.pt")
    quick, gelu = load_clip(TINY, tmp_path / "openai.pt"), load_clip(TINY, tmp_path / "plain.pt")
    assert same_weights(quick, gelu.model.state_dict())
    assert quick.fingerprint != gelu.fingerprint


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.nn.Linear(1, 1)}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_clip(TINY, tmp_path / "evil.pt")


def test_bad_names_say_what_exists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of open_clip's models, got 'ViT-Z-99'"):
        load_clip("ViT-Z-99", "none")
    with pytest.raises(ValueError, match=r"ViT-B-32 needs weights.*'openai'"):
        load_clip("ViT-B-32")
    with pytest.raises(ValueError, match="no pretrained tag 'opnai'"):
        load_clip("ViT-B-32", "opnai")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_clip("ViT-B-32", tmp_path / "nowhere.pt")


def test_weights_of_another_model_are_refused(tiny_state: dict, tmp_path: Path) -> None:
    torch.save({key: value for key, value in tiny_state.items() if "visual" not in key}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="does not hold weights of"):
        load_clip(TINY, tmp_path / "half.pt")
