"""What an engine is made from: an image encoder in torch, fused or plain, an ONNX file (from_onnx), another engine."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.engine_folder import ENGINE_KIND, ONNX_FILE, TORCH_FILE, check_engine
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.onnx import OPSET, engine_graph, export_onnx
from iosr_fast.export.precision import EXPORT_VERSION, Exportable
from iosr_fast.export.quantize.calibration import graph_has_products, module_has_products
from iosr_fast.images.geometry import Geometry
from iosr_fast.sealed.manifest import OWN_FIELDS
from iosr_fast.sealed.verified_folder import VerifiedFolder, open_verified
from iosr_fast.utils.machine import package_version

if TYPE_CHECKING:
    from iosr_fast.backbones.adapter import Adapter
    from iosr_fast.backbones.dual_encoder import DualEncoder
    from iosr_fast.backbones.load import LoadedModel
    from iosr_fast.backbones.plain_encoder import PlainEncoder

_PACKAGES = ("iosr_fast", "numpy", "onnx", "onnxruntime", "onnxscript", "open_clip_torch", "torch")


class Source(Exportable, ABC):
    """An image encoder with its weights: what it is (`check` and `facts`), what is right (`truth`), and its graph
    (`write`)."""

    geometry: Geometry
    fingerprint: str  # of its weights
    loaded: tuple[LoadedModel, Adapter | None] | None = None  # the model in torch and its adapter, where it is one

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Fields of the manifest (encoders.engine_folder.EngineManifest) that no runtime and no precision changes."""

    @abstractmethod
    def truth(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        """The right embeddings (B, D) float32, plain and with an adapter adapted, of uint8 pixels (B, S, S, 3)."""

    @abstractmethod
    def write(self, folder: Path, runtime: str, precision: str) -> dict[str, Any]:
        """Write the encoder for a runtime into `folder`, for 8 bits in float; returns the manifest's fields of it."""


def own_facts(source: Source, model: Any) -> dict[str, Any]:
    """The facts of an encoder that is no engine yet; `model` has mean and std, and a logit scale if it reads texts."""
    return {
        "model": source.name,
        **source.geometry.facts(),
        "mean": list(model.mean),
        "std": list(model.std),
        "logit_scale": None if model.tokenizer is None else model.logit_scale,
        "clip_fingerprint": source.fingerprint,
        **dict.fromkeys(("adapter", "adapter_fingerprint", "first_adapted_block", "bottleneck", "dual_encoder")),
        "export_version": EXPORT_VERSION,
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}},
    }


class PlainSource(Source):
    """An image encoder of open_clip or timm that can't be fused: the plain embedding, compared with the library's own,
    in ONNX files whose graph is fp32."""

    def __init__(self, clip: LoadedModel, adapter: Adapter | None = None, fused: bool = False) -> None:
        super().__init__(clip.name, fused, module_has_products(clip.model.visual))
        self.clip, self.adapter, self.loaded = clip, adapter, (clip, adapter)
        self.geometry, self.fingerprint = clip.geometry, clip.fingerprint

    def facts(self) -> dict[str, Any]:
        return own_facts(self, self.clip)

    def truth(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        from iosr_fast.backbones.two_pass import two_passes

        return two_passes(self.clip, self.adapter, pixels)

    def module(self, precision: str = "fp32", runtime: str = "auto") -> PlainEncoder | DualEncoder:
        """The encoder as one module from uint8 pixels to its embeddings."""
        from iosr_fast.backbones.plain_encoder import PlainEncoder

        return PlainEncoder(self.clip)

    def write(self, folder: Path, runtime: str, precision: str) -> dict[str, Any]:
        export_onnx(self.module(precision, runtime), folder / ONNX_FILE)
        return {"opset": OPSET}


class DualSource(PlainSource):
    """A CLIP whose image encoder is fused with an adapter, or without one; compared with two literal passes in fp32
    PyTorch (backbones.two_pass), of the CLIP with interpolated positions if it is for a smaller `image_size`."""

    def __init__(self, clip: LoadedModel, adapter: Adapter | None, image_size: int | None) -> None:
        from iosr_fast.backbones.vision_tower import resize_clip

        smaller = image_size not in (None, clip.image_size)
        super().__init__(resize_clip(clip, image_size or clip.image_size), adapter, fused=True)
        # Left out where it changes nothing, so that earlier versions read the engine.
        self._tokens: dict[str, Any] = {"tokens": {"image_size": image_size}} if smaller else {}

    def facts(self) -> dict[str, Any]:
        facts = super().facts() | self._tokens
        if self.adapter is not None:
            config = self.adapter.config
            facts |= {
                "adapter": "random" if config.training.get("random") else "trained",
                "adapter_fingerprint": self.adapter.fingerprint(),
                "first_adapted_block": config.first_adapted_block,
                "bottleneck": config.bottleneck,
            }
        return facts

    def module(self, precision: str = "fp32", runtime: str = "auto") -> PlainEncoder | DualEncoder:
        from iosr_fast.backbones.fuse import build_dual_encoder

        return build_dual_encoder(self.clip, self.adapter, self.graph_precision(precision, runtime))

    def write(self, folder: Path, runtime: str, precision: str) -> dict[str, Any]:
        encoder: Any = self.module(precision, runtime)
        if runtime != "torch":
            export_onnx(encoder, folder / ONNX_FILE)
            return {"opset": OPSET, "dual_encoder": encoder.config}
        from safetensors.torch import save_file

        save_file(encoder.state_dict(), folder / TORCH_FILE)
        return {"opset": None, "dual_encoder": encoder.config}


def source_of(clip: LoadedModel, adapter: Adapter | None = None, image_size: int | None = None) -> PlainSource:
    """A loaded model as a source. Smaller pictures are faster and not exact: `image_size` (None: the CLIP's) is a
    smaller multiple of its patches, with interpolated positions (resize_clip).

    Raises ValueError for an adapter of another CLIP, for an adapter or a size where the encoder can't be fused, and for
    a size that doesn't fit.
    """
    from iosr_fast.backbones.adapter import check_belongs
    from iosr_fast.backbones.fuse import unfusible_reason

    reason = unfusible_reason(clip.model.visual, clip.name)
    if reason is not None and (adapter is not None or image_size not in (None, clip.image_size)):
        raise IosrFastError(reason)
    if adapter is not None:
        check_belongs(adapter, clip)
    return PlainSource(clip) if reason is not None else DualSource(clip, adapter, image_size)


class EngineSource(Source):
    """An engine in fp32 with encoder.onnx, whose graph is that of other precisions and runtimes; needs no torch. Its
    embeddings are the truth."""

    def __init__(self, engine: str | Path | VerifiedFolder) -> None:
        self.engine = engine if isinstance(engine, VerifiedFolder) else open_verified(engine, ENGINE_KIND)
        known = check_engine(self.engine)
        fused = known.dual_encoder is not None
        # Fused encoders have products; of another the graph says it, and without onnx building does.
        products = fused or find_spec("onnx") is None or graph_has_products(engine_graph(self.engine))
        super().__init__(known.model, fused, products)
        self.precision, self.geometry, self.fingerprint = known.precision, known.geometry, known.clip_fingerprint
        self.exact = known.precision == "fp32" and ONNX_FILE in self.engine.files

    def has_graph_of(self, precision: str, runtime: str) -> bool:
        """Whether an engine in this precision is made of this one, and not exported from the model's weights."""
        return self.exact and runtime != "torch" and self.graph_precision(precision, runtime) == "fp32"

    def check(self, runtime: str, precision: str) -> str:
        runtime = super().check(runtime, precision)
        if self.has_graph_of(precision, runtime):
            return runtime
        if not self.exact:
            raise IosrFastError(
                f"expected an engine in fp32 with {ONNX_FILE} to convert, got one in {self.precision} with "
                f"{sorted(self.engine.files)}; `iosr-fast build-engine` builds one from the CLIP"
            )
        raise IosrFastError(
            f"expected a precision whose graph is that of fp32, got {precision} for {runtime}, which is exported from "
            f"the CLIP: iosr-fast build-engine --precision {precision} --runtime {runtime}"
        )

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in self.engine.manifest.items() if name not in OWN_FIELDS}

    @cached_property
    def _encoder(self) -> Encoder:
        return open_engine(self.engine)

    def truth(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = self._encoder.encode(pixels)
        return (rows.plain,) if rows.adapted is None else (rows.plain, rows.adapted)

    def write(self, folder: Path, runtime: str, precision: str) -> dict[str, Any]:
        for name in self.engine.files:
            if "/" not in name:  # not the plans
                self.engine.copy(name, folder / name)
        return {}
