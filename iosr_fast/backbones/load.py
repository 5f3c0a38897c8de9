"""Loading a model: an image encoder without texts, or a CLIP: the embedded demo, one of open_clip's by tag, a file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from iosr_fast.backbones.download import downloading
from iosr_fast.backbones.image_models import image_model, is_image_model, load_encoder
from iosr_fast.backbones.load_tokenizer import load_tokenizer
from iosr_fast.backbones.models import (
    DEMO_FOLDER,
    DEMO_NAME,
    HUB,
    LOCAL,
    check_model,
    find_weights,
    is_torchscript,
    own_folder,
)
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from collections.abc import Iterator


log = logging.getLogger(__name__)
_loading = ContextVar("_loading", default=False)  # in this thread
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's archives, not weights


@dataclass(frozen=True)
class LoadedModel:
    """A model on the CPU in fp32 and evaluation mode, whose `visual` encodes images, with its preprocessing: a CLIP of
    open_clip, or an image encoder without texts, which has no tokenizer.

    `geometry` is how a picture becomes pixels; `mean` and `std` are per channel for pixels in [0, 1]; `logit_scale` is
    exp of the trained parameter (100 for CLIP; nothing uses it without texts); `fingerprint` is a SHA-256 over the
    configuration and every weight.
    SigLIP's logit bias is left out: it shifts all classes alike, and so changes neither labels nor probabilities.
    """

    model: Any
    tokenizer: Any  # of texts to torch.Tensor; None: the model reads no texts
    name: str
    geometry: Geometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    logit_scale: float
    fingerprint: str

    @property
    def image_size(self) -> int:
        """Side of the square pictures that the model takes."""
        return self.geometry.size


def shapes_of(name: str, config: dict[str, Any]) -> Any:
    """The image encoder of a model, as a module of shapes without weights (torch's meta device), which takes no memory:
    what is refused of a loaded encoder is refused of it, before anything is downloaded. `config`: as of check_model.

    Raises DamagedFileError for a configuration that open_clip can't build.
    """
    if is_image_model(name):
        return image_model(name).shapes
    torch, open_clip = require("torch", "cpu"), require("open_clip.model", "cpu")
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    try:
        with torch.device("meta"), torch.inference_mode():
            return open_clip._build_vision_tower(config["embed_dim"], vision)
    except Exception as error:  # what open_clip and timm raise depends on the configuration
        what = f"expected a vision_cfg that open_clip can build in the configuration of {name}"
        raise DamagedFileError(f"{what}, got: {error}") from error


def load_model(name: str, pretrained: str | Path | None = None) -> LoadedModel:
    """Load a model by name: a CLIP as `load_clip`, or an image encoder without texts as backbones.image_models.

    Raises what `check_model`, `load_clip` and `load_encoder` raise.
    """
    if not is_image_model(name):
        return load_clip(name, pretrained)
    check_model(name, pretrained)
    known = image_model(name)
    nn, crop = require("torch.nn", "cpu"), require("torchvision.transforms", "cpu").CenterCrop(known.centre)
    modules = nn.ModuleDict({"visual": nn.Sequential(crop, load_encoder(name, pretrained))})
    model = modules.float().eval().requires_grad_(False)
    facts = {"architecture": known.architecture.partition(".")[0], "geometry": known.geometry.facts()}
    return LoadedModel(
        model=model,
        tokenizer=None,
        name=name,
        geometry=known.geometry,
        mean=known.mean,
        std=known.std,
        logit_scale=100.0,
        fingerprint=_fingerprint(model, facts | {"centre": known.centre, "mean": known.mean, "std": known.std}),
    )


def load_clip(name: str, pretrained: str | Path | None = None) -> LoadedModel:
    """Load a CLIP by name.

    `load_clip("demo")` is the small CLIP that ships with the package. "hf-hub:OWNER/REPOSITORY" and "local-dir:FOLDER"
    have their own configuration and weights (backbones.models). Otherwise `name` is one of open_clip's models and
    `pretrained` one of its tags ("openai": downloaded from the hub), a file (open_clip's .safetensors, a state dict in
    .pt, or OpenAI's own TorchScript .pt), or "none" for random weights from a fixed seed (to measure speed).
    Models whose weights were trained with QuickGELU use it, even if their name does not end in "-quickgelu".
    Preprocessing is that of the tag. For a file and for random weights it is the one that all tags of the model share,
    and open_clip's default, with a warning, if they differ.

    No code of a file runs: a .pt may contain tensors only, and a TorchScript archive, which is a program, is loaded
    only if its SHA-256 is the one that OpenAI published for `name`.

    Raises ValueError for an unknown model or tag and for a file with anything but its weights, FileNotFoundError for a
    missing file, OSError for a failed download; what the configuration can say, before a model is made (check_model).
    """
    if is_image_model(name):
        raise IosrFastError(f"expected a CLIP, which reads texts, got {name}: `iosr-fast models` lists CLIPs")
    open_clip = require("open_clip", "cpu")
    if name == "demo":
        name, pretrained = DEMO_NAME, pretrained or DEMO_FOLDER / "clip.safetensors"
    if name == DEMO_NAME:
        open_clip.add_model_config(DEMO_FOLDER / f"{DEMO_NAME}.json")
    config = check_model(name, pretrained)
    if not name.startswith((HUB, LOCAL)):
        name = name.replace("/", "-")
    with _quiet_open_clip():
        tokenizer = _tokenizer(name, config, needed=str(pretrained) != "none")
        model = _model(open_clip, name, None if pretrained is None else str(pretrained))
    model = model.float().eval().requires_grad_(False)
    preprocess = _preprocessing(open_clip, model, name, str(pretrained))
    geometry = Geometry.from_open_clip(preprocess)
    mean, std = tuple(preprocess["mean"]), tuple(preprocess["std"])
    facts = {"image_size": geometry.size, "mean": mean, "std": std, "gelu": _activation(model), **geometry.changes()}
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name="demo" if name == DEMO_NAME else name,
        geometry=geometry,
        mean=mean,
        std=std,
        logit_scale=float(model.logit_scale.exp()),
        fingerprint=_fingerprint(model, facts),
    )


def _preprocessing(open_clip: Any, model: Any, name: str, pretrained: str) -> dict[str, Any]:
    """The fields of open_clip's PreprocessCfg for a model; open_clip gives the weights of a file its default."""
    preprocess: dict[str, Any] = dict(open_clip.get_model_preprocess_cfg(model))
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        return preprocess
    fields = ("mean", "std", "interpolation", "resize_mode")
    published = [pretrained] if pretrained in tags else tags
    shared = [{key: open_clip.get_pretrained_cfg(name, tag)[key] for key in fields} for tag in published]
    if all(each == shared[0] for each in shared):
        return preprocess | shared[0]
    if pretrained != "none":
        log.warning(
            "the published weights of %s differ in preprocessing; %s gets open_clip's default, %s. If its weights need "
            "another, load it by local-dir: with an open_clip_config.json beside it",
            name,
            pretrained,
            {key: preprocess[key] for key in fields},
        )
    return preprocess


def _tokenizer(name: str, config: dict[str, Any], needed: bool) -> Any:
    """The model's tokenizer. If it is not `needed` and can't be downloaded, one that raises when it is called: random
    weights measure speed, for which no text is necessary."""
    try:
        return load_tokenizer(name, config)
    except OSError as error:
        if needed:
            raise
        reason = error

    def unavailable(*_: Any, **__: Any) -> Any:
        raise reason

    return unavailable


def _model(open_clip: Any, name: str, pretrained: str | None) -> Any:
    """The model with its own weights (None), those of a tag or of a file, or random ones from a fixed seed ("none").

    open_clip reads tensors only (weights_only). An archive that OpenAI published implies QuickGELU.
    """
    torch, source = require("torch", "cpu"), name
    if name.startswith((HUB, LOCAL)):
        source = f"{LOCAL}{own_folder(name, weights=pretrained is None)}"
    if pretrained == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return open_clip.create_model(source, load_weights=False, pretrained_text=False)
    path, quick = _weights(open_clip, name, source, pretrained)
    archive = _published_archive(open_clip, name, path) if is_torchscript(path) else None
    try:
        if archive is None:
            file = str(path) if source == name else None  # which open_clip finds in the folder of a model of its own
            return open_clip.create_model(source, pretrained=file, force_quick_gelu=quick, require_pretrained=True)
        model = open_clip.create_model(name, force_quick_gelu=True)
        state = torch.jit.load(archive, map_location="cpu").state_dict()
        model.load_state_dict({key: value for key, value in state.items() if key not in NO_WEIGHTS})
        return model
    except Exception as error:  # what open_clip, torch and safetensors raise depends on the file
        reason = " ".join(str(error).strip().split("\n")[:2])
        what = f"expected weights of {name}, tensors by open_clip's names, in {path}: {reason:.300}"
        raise IosrFastError(what) from error


def _weights(open_clip: Any, name: str, source: str, pretrained: str | None) -> tuple[Path, bool]:
    """The file of weights, and whether they were trained with QuickGELU, if more is known than the model's name."""
    if pretrained is None:
        return find_weights(Path(source.removeprefix(LOCAL))), False
    published = open_clip.get_pretrained_cfg(name, pretrained)
    if not published:
        return Path(pretrained), False
    repository, _, file = published["hf_hub"].rpartition("/")
    with downloading(name, f"the weights {pretrained!r}") as hub:
        return hub.weights(repository, file or "open_clip_pytorch_model.bin"), bool(published.get("quick_gelu"))


def _published_archive(open_clip: Any, name: str, path: Path) -> io.BytesIO:
    """The bytes of a TorchScript archive, if OpenAI published them for `name`; torch.jit.load runs the archive's code.

    The bytes are hashed and loaded from memory, so replacing the file in between has no effect.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    url = open_clip.get_pretrained_url(name, "openai")  # .../<SHA-256 of the file>/ViT-B-32.pt
    published = url.split("/")[-2] if url else None
    if digest != published:
        expected = f"OpenAI published {published} for {name}" if published else f"OpenAI published none for {name}"
        script = (
            "import sys, torch, safetensors.torch as s; "
            "w = torch.jit.load(sys.argv[1], map_location='cpu').state_dict(); "
            f"s.save_file({{k: v.contiguous() for k, v in w.items() if k not in {NO_WEIGHTS}}}, sys.argv[2])"
        )
        raise IosrFastError(
            f"{path} is a TorchScript archive, a program that loading would run, with SHA-256 {digest}; {expected}. "
            "If you trust it, convert it to safetensors where it may run:\n"
            f'python -c "{script}" {quote(str(path))} {quote(str(path.with_suffix(".safetensors")))}\n'
            "Weights that were trained with QuickGELU (all of OpenAI's) are then loaded by the name "
            f"{name.removesuffix('-quickgelu')}-quickgelu"
        )
    return io.BytesIO(content)


def _activation(model: Any) -> str:
    blocks = getattr(getattr(model.visual, "transformer", None), "resblocks", None)
    return type(blocks[0].mlp.gelu).__name__ if blocks else ""


def _fingerprint(model: Any, config: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


def _is_shown(record: logging.LogRecord) -> bool:
    return not (_loading.get() and Path(record.pathname).parent.name == "open_clip")


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Suppress what open_clip logs in this thread about random weights, GELU mismatches and failed downloads, which
    `load_clip` handles."""
    logging.root.addFilter(_is_shown)  # open_clip's logger; added once, it stays, as other threads may be loading
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)
