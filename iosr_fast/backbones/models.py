"""What a configuration says of a model before one is made: whether it exists, what it has, what it can.

CLIPs have the names that open_clip takes: one of its own ("ViT-B-16"), "hf-hub:OWNER/REPOSITORY" of the Hugging Face
hub, and "local-dir:FOLDER", a folder with open_clip_config.json and a file of weights. Image encoders without texts are
those of backbones.image_models. Nothing is loaded here; only the configuration of a model of the hub is downloaded.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from iosr_fast.backbones.demo.pictures import FOLDER as DEMO_FOLDER
from iosr_fast.backbones.download import downloading
from iosr_fast.backbones.image_models import TIMM, check_image_model, is_image_model
from iosr_fast.backbones.load_tokenizer import require_transformers
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.utils.require import require, require_installed
from iosr_fast.utils.text import did_you_mean

DEMO_NAME = "iosr-fast-demo"
HUB, LOCAL = "hf-hub:", "local-dir:"
CONFIG = "open_clip_config.json"
# The order in which open_clip looks for weights in a folder; then any other, safetensors first.
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


def model_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of a CLIP: embed_dim, vision_cfg, text_cfg and more.

    Raises ValueError for an unknown model and for a configuration that is none, FileNotFoundError for a missing folder
    or file, OSError for a failed download.
    """
    open_clip = require("open_clip", "cpu")
    if name in ("demo", DEMO_NAME):
        return _checked(json.loads((DEMO_FOLDER / f"{DEMO_NAME}.json").read_text()), name)
    if name.startswith((HUB, LOCAL)):
        return _checked(_read_config(own_folder(name)), f"{CONFIG} of {name}")
    config = open_clip.get_model_config(own_name(name))
    if config is None:
        raise _unknown(name, open_clip.list_models())
    return dict(config)


def check_model(name: str, pretrained: str | Path | None) -> dict[str, Any]:
    """Refuse what `load_model` could not load, from configurations and the names of files alone; returns open_clip's
    configuration of a CLIP.

    Raises ValueError for an unknown model or tag and for a model without weights or with two; FileNotFoundError for
    missing files; ImportError for a model that needs a package that is missing.
    """
    if is_image_model(name):
        check_image_model(name, pretrained)
        if pretrained is not None and str(pretrained) != "none":
            refuse_programs(Path(pretrained))
        return {}
    if name.startswith((HUB, LOCAL)) and pretrained is not None and str(pretrained) != "none":
        raise IosrFastError(
            f"{name} names its weights itself, so expected no pretrained beside it (or 'none', random weights, to "
            f"measure speed), got {str(pretrained)!r}"
        )
    config = model_config(name)
    if model := config["text_cfg"].get("hf_model_name"):
        require_transformers(f"the text encoder of {name}, {model}, runs in Hugging Face's transformers")
    if config["vision_cfg"].get("timm_model_name"):
        require_installed("timm", "cpu")
    if str(pretrained) == "none" or (name == "demo" and pretrained is None):
        return config
    if name.startswith(LOCAL):
        refuse_programs(find_weights(Path(name.removeprefix(LOCAL))))
    if name.startswith((HUB, LOCAL)):
        return config
    tags = require("open_clip", "cpu").list_pretrained_tags_by_model(own_name(name))
    published = f"one of its tags {tags}" if tags else "(open_clip lists none for it)"
    if pretrained is None:
        raise IosrFastError(
            f"expected weights for {name}, got none: give pretrained= {published}, a .safetensors or .pt file, or "
            "'none' (random weights, to measure speed)"
        )
    if str(pretrained) in tags or Path(pretrained).is_file():
        return config
    if Path(pretrained).suffix:
        raise FileNotFoundError(f"expected a file of weights at {pretrained}, found none")
    raise IosrFastError(
        f"{name} has no pretrained tag {str(pretrained)!r}: {did_you_mean(str(pretrained), tags)}expected {published}, "
        "a file, or 'none'"
    )


def own_folder(name: str, weights: bool = False) -> Path:
    """The folder of a model that has its own configuration; of the hub the one with the downloaded files, its `weights`
    among them if they are needed. Raises OSError for a failed download."""
    folder, repository = Path(name.removeprefix(LOCAL)), name.removeprefix(HUB)
    if name.startswith(LOCAL):
        return folder
    with downloading(name, "the configuration") as hub:
        folder = hub.file(repository, CONFIG).parent  # named by the commit
    if weights:
        with downloading(name, "the weights") as hub:
            hub.weights(f"{repository}@{folder.name}", "open_clip_pytorch_model.bin")
    return folder


def find_weights(folder: Path) -> Path:
    """The file that open_clip loads from a folder. Raises FileNotFoundError if there is none."""
    files = [path for suffix in ("safetensors", "bin", "pth") for path in sorted(folder.glob(f"*.{suffix}"))]
    if not files:
        raise FileNotFoundError(
            f"expected weights beside {CONFIG} in {folder} (open_clip_model.safetensors, or another .safetensors, .bin "
            "or .pth), found none"
        )
    named = [path for path in files if path.name in _WEIGHTS]
    return min(named, key=lambda path: _WEIGHTS.index(path.name)) if named else files[0]


def is_torchscript(path: Path) -> bool:
    """Whether PyTorch would load the file as a program."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        inside = {entry.split("/")[1] for entry in archive.namelist() if "/" in entry}
    return not inside.isdisjoint({"code", "constants.pkl"})


def refuse_programs(path: Path) -> None:
    """Raise ValueError for a TorchScript archive."""
    if is_torchscript(path):
        raise IosrFastError(
            f"{path} is a TorchScript archive, a program that loading would run; expected .safetensors, or a .bin or "
            ".pth with tensors only"
        )


def own_name(name: str) -> str:
    return name.replace("/", "-")


def _unknown(name: str, names: list[str]) -> IosrFastError:
    return IosrFastError(
        f"expected 'photographs', {TIMM}NAME, {HUB}OWNER/REPOSITORY, {LOCAL}FOLDER, 'demo' or one of open_clip's "
        f"models, got {name!r}: "
        f"{did_you_mean(own_name(name), names, 3)}`iosr-fast models` lists all"
    )


def _read_config(folder: Path) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder with {CONFIG} and weights at {folder}, found none")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"expected {CONFIG} in {folder}, found none; open_clip's save_for_hf writes it")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"expected JSON in {path}, got: {error}") from error
    return content.get("model_cfg") if isinstance(content, dict) else None


def _checked(config: Any, what: str) -> dict[str, Any]:
    """The configuration. Raises ValueError for one without the fields of every CLIP."""
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    fields = config if isinstance(config, dict) else {}
    wrong = [key for key, kind in kinds.items() if not isinstance(fields.get(key), kind)]
    if wrong:
        raise DamagedFileError(
            f"expected embed_dim, vision_cfg and text_cfg of a CLIP in {what}, below model_cfg; {', '.join(wrong)} "
            "missing or of another type"
        )
    return dict(config)
