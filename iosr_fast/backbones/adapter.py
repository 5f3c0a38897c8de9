"""The bottleneck adapter of Kravets & Namboodiri (BMVC 2024), its files, and the literal encoding with it.

In each adapted block, beside the MLP and on the residual stream after attention, in every family of encoders:

    x <- x + mlp(ln_2(x)) + scale * up_proj(relu(down_proj(x)))
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from iosr_fast.backbones.load import LoadedModel
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.sealed.files import new_file
from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from iosr_fast.backbones.vision_tower import vision_tower  # noqa: E402


@dataclass(frozen=True)
class AdapterConfig:
    """The shape of an adapter and its CLIP. Blocks `first_adapted_block` to `blocks - 1` have an adapter."""

    clip_fingerprint: str
    clip_name: str
    width: int
    blocks: int
    first_adapted_block: int
    bottleneck: int = 64
    scale: float = 0.03
    dropout: float = 0.1
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.first_adapted_block < self.blocks:
            raise IosrFastError(
                f"expected first_adapted_block in 0..{self.blocks - 1} ({self.clip_name} has {self.blocks} blocks), "
                f"got {self.first_adapted_block}"
            )
        if self.bottleneck < 1:
            raise IosrFastError(f"expected a bottleneck of at least 1, got {self.bottleneck}")


class BottleneckAdapter(nn.Module):
    """scale * up_proj(relu(down_proj(x))), x (..., width). Kaiming init for down_proj, zeros for up_proj and biases."""

    def __init__(self, width: int, bottleneck: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down_proj.weight, a=5**0.5)
        for zeroed in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zeroed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(torch.relu(self.down_proj(x)))
        return self.scale * self.up_proj(hidden)


class Adapter(nn.Module):
    """The adapters of all adapted blocks; `blocks[str(i)]` belongs to the encoder's block i."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleDict(
            {
                str(i): BottleneckAdapter(config.width, config.bottleneck, config.scale, config.dropout)
                for i in range(config.first_adapted_block, config.blocks)
            }
        )

    def fingerprint(self) -> str:
        """SHA-256 over the weights, the scale and the CLIP's fingerprint."""
        digest = hashlib.sha256(f"{self.config.clip_fingerprint} {self.config.scale}".encode())
        for key, value in sorted(self.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().float().contiguous().numpy().data)
        return digest.hexdigest()


def init_adapter(
    clip: LoadedModel,
    first_adapted_block: int = 0,
    bottleneck: int = 64,
    scale: float = 0.03,
    seed: int = 0,
    **more: Any,
) -> Adapter:
    """A new adapter for `clip`. It changes no embedding before training, because up_proj is zero."""
    tower = vision_tower(clip.model.visual, clip.name)
    config = AdapterConfig(
        clip_fingerprint=clip.fingerprint,
        clip_name=clip.name,
        width=tower.width,
        blocks=len(tower.blocks),
        first_adapted_block=first_adapted_block,
        bottleneck=bottleneck,
        scale=scale,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Adapter(config)


def random_adapter(clip: LoadedModel, first_adapted_block: int, bottleneck: int = 64) -> Adapter:
    """An adapter with random weights, marked as such, to measure speed: it is as fast as a trained one."""
    adapter = init_adapter(clip, first_adapted_block, bottleneck, training={"random": True})
    generator = torch.Generator().manual_seed(0)
    for name, value in adapter.named_parameters():
        if "up_proj" in name:
            value.data = torch.randn(value.shape, generator=generator) * bottleneck**-0.5
    return adapter.eval().requires_grad_(False)


def check_fits(adapter: Adapter, visual: Any, name: str) -> None:
    """Raise ValueError unless `adapter` has the blocks and the width of this image encoder, which may be of shapes
    alone (load.shapes_of)."""
    tower, config = vision_tower(visual, name), adapter.config
    expected, got = (config.blocks, config.width), (len(tower.blocks), tower.width)
    if expected != got:
        raise IosrFastError(
            f"the adapter was trained for another CLIP: expected {config.clip_name} with {expected[0]} blocks of width "
            f"{expected[1]}, got {name} with {got[0]} of width {got[1]}"
        )


def check_belongs(adapter: Adapter, clip: LoadedModel) -> None:
    """Raise ValueError unless `adapter` was trained for this CLIP's weights."""
    expected, got = adapter.config.clip_fingerprint, clip.fingerprint
    if expected != got:
        raise IosrFastError(
            f"the adapter was trained for another CLIP: expected {adapter.config.clip_name} with fingerprint "
            f"{expected[:12]}, got {clip.name} with {got[:12]}; load that CLIP, or train an adapter for this one"
        )


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write one safetensors file: fp16 weights, and the configuration as JSON in its header.

    The weights are rounded to fp16 in place first, so that the saved adapter equals the one in memory.
    """
    from safetensors.torch import save_file

    with torch.no_grad():
        for value in adapter.parameters():
            value.copy_(value.half())
    state = {key: value.half().contiguous() for key, value in adapter.state_dict().items()}
    with new_file(path) as temporary:
        save_file(state, temporary, metadata={"iosr_fast_adapter": json.dumps(asdict(adapter.config))})


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter written by `save_adapter`, in evaluation mode. Raises FileNotFoundError or ValueError."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}; `iosr-fast train-adapter` trains one")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("iosr_fast_adapter")
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is not a readable safetensors file: {error}") from error
    if header is None:
        raise DamagedFileError(
            f"{path} is a safetensors file but not an adapter of iosr_fast (its header has no config)"
        )
    known = {f.name for f in fields(AdapterConfig)}
    adapter = Adapter(AdapterConfig(**{key: value for key, value in json.loads(header).items() if key in known}))
    adapter.load_state_dict(state)
    return adapter.eval().requires_grad_(False)


def adapted_pass(visual: Any, adapter: Adapter, pixels: torch.Tensor) -> torch.Tensor:
    """The image embedding with the adapter, by a whole pass of its own, as in the paper's code.

    `visual` is a vision transformer of open_clip or timm (`vision_tower`), `pixels` (B, 3, S, S) normalised floats;
    returns (B, D), not L2-normalised.
    """
    tower = vision_tower(visual)
    x = tower.embed(pixels)
    for i, block in enumerate(tower.blocks):
        x = block.attend(x)
        update = block.mlp(x)
        if str(i) in adapter.blocks:
            update = update + adapter.blocks[str(i)](x)
        x = x + update
    return tower.pool(x)
