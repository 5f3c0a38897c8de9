"""Encoders with random weights, fused and as two literal passes, and what both must give."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from iosr_fast.clip.adapter import Adapter, encode_adapted
from iosr_fast.clip.dual_encoder import DualEncoder, DualEncoderConfig, Precision
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.load import LoadedClip, load_clip

FIRST_ADAPTED = 8
MIN_COSINE = 0.999  # of each embedding in half precision with the one in float32
MAX_ERROR = 1e-4  # of float32 embeddings
CHECKED = 3  # pictures
WITHOUT_OPEN_CLIP = "open_clip is not installed"


def vit_b(patch_size: int, precision: Precision) -> DualEncoderConfig:
    """open_clip's ViT-B/16 or /32 with an adapter in its last blocks."""
    return DualEncoderConfig(
        image_size=224,
        patch_size=patch_size,
        width=768,
        blocks=12,
        heads=12,
        mlp_width=3072,
        embedding_width=512,
        activation="gelu",
        ln_pre=True,
        eps=1e-5,
        precision=precision,
        first_adapted_block=FIRST_ADAPTED,
        bottleneck=64,
    )


def demo(precision: Precision) -> DualEncoderConfig:
    """The shape of the demo's CLIP, for trying the program."""
    small: dict[str, Any] = {"image_size": 64, "patch_size": 8, "width": 128, "blocks": 6, "heads": 4, "mlp_width": 512}
    return replace(vit_b(8, precision), **small, embedding_width=128, first_adapted_block=3)


CONFIGS: dict[str, Callable[[Precision], DualEncoderConfig]] = {
    "ViT-B-16": lambda precision: vit_b(16, precision),
    "ViT-B-32": lambda precision: vit_b(32, precision),
    "demo": demo,
}


class TwoPasses(nn.Module):
    """The public way: normalise, open_clip's own forward, then the forward with the adapter.

    uint8 (B, S, S, 3) -> (plain, adapted), each (B, D) float32, L2-normalised. Has copies of the weights.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: LoadedClip, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.visual = copy.deepcopy(clip.model.visual).to(dtype)
        self.adapter = copy.deepcopy(adapter).to(dtype)
        holder = nn.Module()
        holder.visual = self.visual
        self.clip = replace(clip, model=holder)
        self.dtype = dtype
        for name in ("mean", "std"):  # which stay in float32
            self.register_buffer(name, torch.tensor(getattr(clip, name)).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = ((pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std).to(self.dtype)
        features = (self.visual(x), encode_adapted(self.clip, self.adapter, x))
        return tuple(F.normalize(feature.float(), dim=-1) for feature in features)


@dataclass(frozen=True)
class Models:
    """`fused` and `two` (None without open_clip) on the device in `precision`; `pixels` uint8 NumPy, and `truth`, what
    float32 on the CPU makes of them: by two passes, or without open_clip by the fused encoder itself."""

    name: str
    fused: DualEncoder
    two: TwoPasses | None
    pixels: np.ndarray
    truth: tuple[np.ndarray, ...]

    @property
    def case(self) -> str:
        return f"{self.name.lower()}-s{self.fused.shapes.first_adapted_block}"

    @property
    def verified_against(self) -> str:
        return "the fused encoder in float32 on the CPU" if self.two is None else "two passes in float32 on the CPU"

    def batch(self, size: int, device: str) -> torch.Tensor:
        """`size` pictures on the device, the checked ones first."""
        return torch.from_numpy(np.resize(self.pixels, (size, *self.pixels.shape[1:]))).to(device)

    def errors(self, outputs: Iterable[torch.Tensor]) -> dict[str, float]:
        """max_abs_error and min_cosine of the checked pictures; NaN where any output isn't finite."""
        worst, least = 0.0, 1.0
        for output, truth in zip(outputs, self.truth, strict=True):
            n = min(len(output), len(truth))
            got, expected = output[:n].float().cpu().numpy(), truth[:n]
            worst = max(worst, float(np.abs(got - expected).max()))
            least = min(least, float(((got * expected).sum(1) / np.linalg.norm(got, axis=1)).min()))
            if not bool(torch.isfinite(output).all()):
                worst = least = float("nan")
                break
        return {"max_abs_error": worst, "min_cosine": least}

    def verify(self, name: str, outputs: Iterable[torch.Tensor]) -> float:
        """The least cosine. Raises ArithmeticError where it is too low."""
        cosine = self.errors(outputs)["min_cosine"]
        if not cosine >= MIN_COSINE:
            raise ArithmeticError(
                f"{name} of {self.name} is wrong: cosine {cosine:.5f} with {self.verified_against}; not timed"
            )
        return cosine


@functools.cache
def loaded(name: str) -> tuple[LoadedClip, Adapter]:
    """open_clip's model with random weights from a fixed seed (the demo's own for the demo), and a random adapter."""
    from iosr_fast.export.export import random_adapter

    clip = load_clip(name, None if name == "demo" else "none")
    first = CONFIGS[name]("fp32").first_adapted_block
    assert first is not None
    return clip, random_adapter(clip, first)


def make(name: str, device: str, precision: Precision = "fp16") -> Models:
    """Models of one of CONFIGS on a device."""
    config = CONFIGS[name](precision)
    shape = (CHECKED, config.image_size, config.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if find_spec("open_clip") is not None:
        clip, adapter = loaded(name)
        fused = build_dual_encoder(clip, adapter, precision)
        truth = evaluate(TwoPasses(clip, adapter), pixels)
        two = TwoPasses(clip, adapter, config.dtype).eval().to(device)
        return Models(name, fused.to(device), two, pixels, truth)
    state = random_state(CONFIGS[name]("fp32"))
    exact, fused = (DualEncoder.from_config(asdict(CONFIGS[name](kind))) for kind in ("fp32", precision))
    exact.load_state_dict(state)
    fused.load_state_dict(state)
    return Models(name, fused.to(device), None, pixels, evaluate(exact, pixels))


@torch.inference_mode()
def evaluate(encoder: nn.Module, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """On the CPU."""
    return tuple(output.numpy() for output in encoder(torch.from_numpy(pixels)))


def random_state(config: DualEncoderConfig) -> dict[str, torch.Tensor]:
    """Weights of a fused encoder in float32, such that activations neither vanish nor grow."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    for name, value in DualEncoder.from_config(asdict(config)).state_dict().items():
        kind = name.split(".")[-2] if "." in name else name
        if kind.startswith("ln_"):
            made[name] = torch.full(value.shape, float(name.endswith("weight")))
            continue
        drawn = torch.randn(value.shape, generator=generator)
        scale = 0.02 if value.ndim < 2 or kind == "position" else value.shape[-1] ** -0.5
        if kind == "q_proj":  # 1/sqrt(head width) is in it
            scale *= (config.width // config.heads) ** -0.5
        made[name] = drawn * scale * (0.1 if kind == "up_proj" else 1.0)
    return made


def two_pass_flops(config: DualEncoderConfig, batch: int) -> float:
    """FLOP of the GEMMs of both literal passes, attention included; tools.bench.encoder.fused_flops has the fused."""
    tokens, width = config.patches_per_side**2 + 1, config.width
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * config.mlp_width
    one_pass = 3 * config.patch_size**2 * width * (tokens - 1) + config.blocks * block + width * config.embedding_width
    first = config.blocks if config.first_adapted_block is None else config.first_adapted_block
    adapters = (config.blocks - first) * 2 * tokens * width * (config.bottleneck or 0)
    return 2.0 * batch * (2 * one_pass + adapters)
