"""The encoder on a GPU: the fused encoder in float16 against two literal passes and a plain pass, as CUDA graphs.

    fused, two-pass, one-pass    PyTorch's own kernels; one-pass has the plain embedding alone
    fused-compiled, ...          the same by torch.compile
    cudnn, flash, ...            attention of one block alone (encoder_attention)

fused and one-pass have the form of the torch runtime (clip.inference_form); its order of attention kernels holds for
all.
share_of_ceiling is the FLOP of a row's GEMMs over its time and the float16 GEMM rate of the same run (model FLOP
utilisation). Weights are random. Without open_clip there are no two passes, and the truth is the fused encoder in
float32 on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from iosr_fast.benchmarks import encoder_attention, harness
from iosr_fast.benchmarks.ceilings import Ceilings
from iosr_fast.benchmarks.devices import Device
from iosr_fast.clip.dual_config import DualEncoderConfig, Precision
from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.inference_form import attention_priority, to_inference_form
from iosr_fast.clip.load import load_clip
from iosr_fast.clip.two_pass import TwoPasses, two_passes
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.export_check import FP32_MAX_ERROR, MIN_COSINES

CHECKED = 3  # pictures
RIVALS = ("two-pass", "one-pass", "two-pass-compiled", "one-pass-compiled")
_VIT_B = DualEncoderConfig(224, 16, 768, 12, 12, 3072, 512, "gelu", True, 1e-5, "fp32", 8, 64)
_DEMO = DualEncoderConfig(64, 8, 128, 6, 4, 512, 128, "gelu", True, 1e-5, "fp32", 3, 64)
CONFIGS = {"ViT-B-16": _VIT_B, "ViT-B-32": replace(_VIT_B, patch_size=32), "demo": _DEMO}


@dataclass(frozen=True)
class Encoders:
    """`modules` fused, one-pass and (with open_clip) two-pass on a device; `truth` of CHECKED `pixels` in float32."""

    modules: dict[str, nn.Module]
    pixels: np.ndarray
    truth: tuple[np.ndarray, ...]

    def config(self, name: str) -> DualEncoderConfig:
        shapes: DualEncoderConfig = self.modules[name].shapes  # type: ignore[assignment]
        return shapes

    def batch(self, size: int, device: Device) -> torch.Tensor:
        """`size` pictures on the device, the checked ones, or as many of them as fit, first."""
        return torch.from_numpy(np.resize(self.pixels, (size, *self.pixels.shape[1:]))).to(device.torch)

    def errors(self, outputs: Sequence[torch.Tensor]) -> dict[str, float]:
        """max_abs_error and min_cosine of the checked pictures; NaN where an output isn't finite."""
        errors, cosines = [0.0], [1.0]
        for output, expected in zip(outputs, self.truth, strict=False):  # one-pass has the first alone
            got = output[:CHECKED].float().cpu().numpy()
            finite = float("nan") if not bool(torch.isfinite(output).all()) else 0.0
            expected = expected[: len(got)]  # a batch may be smaller
            errors.append(float(np.abs(got - expected).max()) + finite)
            cosines.append(float(((got * expected).sum(1) / np.linalg.norm(got, axis=1)).min()) + finite)
        return {"max_abs_error": float(np.max(errors)), "min_cosine": float(np.min(cosines))}


def right(errors: dict[str, float], precision: Precision) -> bool:
    """Whether the errors are those of rounding; NaN never is."""
    if precision == "fp32":
        return errors["max_abs_error"] <= FP32_MAX_ERROR
    return errors["min_cosine"] >= MIN_COSINES[precision]


def load(model: str, device: Device, precision: Precision = "fp16") -> Encoders:
    """One of CONFIGS with random weights (the demo's own with open_clip) in `precision` on the device."""
    config = CONFIGS[model]
    shape = (CHECKED, config.image_size, config.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    modules: dict[str, nn.Module]
    if find_spec("open_clip") is None:
        print(f"left out: two passes of {model}: open_clip is not installed")
        state = random_state(config)
        modules = {"fused": from_state(state, config, precision)}
        plain = replace(config, first_adapted_block=None, bottleneck=None)
        modules["one-pass"] = from_state(state, plain, precision)
        with torch.inference_mode():
            truth = tuple(t.numpy() for t in from_state(state, config, "fp32")(torch.from_numpy(pixels)))
    else:
        from iosr_fast.export.export import random_adapter

        clip = load_clip(model, None if model == "demo" else "none")
        adapter = random_adapter(clip, config.first_adapted_block or 0)
        modules = {"fused": build_dual_encoder(clip, adapter, precision)}
        modules["one-pass"] = build_dual_encoder(clip, None, precision)
        dtype = torch.float32 if precision == "fp32" else torch.float16
        literal = TwoPasses(clip, adapter)
        for part in ("visual", "adapter"):  # mean and std stay in float32
            setattr(literal, part, copy.deepcopy(getattr(literal, part)).to(dtype))
        modules["two-pass"] = literal.eval()
        truth = two_passes(clip, adapter, pixels)
    for module in modules.values():
        if isinstance(module, DualEncoder):
            to_inference_form(module)
    return Encoders({name: module.to(device.torch) for name, module in modules.items()}, pixels, truth)


def from_state(state: dict[str, torch.Tensor], config: DualEncoderConfig, precision: Precision) -> DualEncoder:
    encoder = DualEncoder.from_config(asdict(replace(config, precision=precision)))
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    return encoder


def random_state(config: DualEncoderConfig) -> dict[str, torch.Tensor]:
    """Weights of a fused encoder in float32, such that activations neither vanish nor grow."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, value in DualEncoder.from_config(asdict(config)).state_dict().items():
        kind = name.split(".")[-2] if "." in name else name
        if kind.startswith("ln"):
            state[name] = torch.full(value.shape, float(name.endswith("weight")))
            continue
        scale = 0.02 if value.ndim < 2 or kind == "position" else value.shape[-1] ** -0.5
        if kind == "q_proj":  # holds the factor 1/sqrt(head width)
            scale *= (config.width // config.heads) ** -0.5
        state[name] = torch.randn(value.shape, generator=generator) * scale * (0.1 if kind == "up_proj" else 1.0)
    return state


def fused_flops(config: DualEncoderConfig, batch: int) -> float:
    """FLOP of the GEMMs that the fused encoder does, attention included."""
    tokens, width = config.tokens, config.width
    first = config.blocks if config.first_adapted_block is None else config.first_adapted_block
    adapter = 2 * width * (config.bottleneck or 0)
    mlp = (3 if config.activation == "swiglu" else 2) * width * config.mlp_width
    macs, inputs, side = 0.0, 3, config.image_size
    for kernel, outputs in zip(config.kernels, [*(outputs for _, outputs in config.stem), width], strict=True):
        side //= kernel
        macs += side**2 * kernel**2 * inputs * outputs
        inputs = outputs
    for i in range(config.blocks):
        streams = 2 if i > first else 1
        adapted = adapter if i >= first else 0
        if i < config.blocks - 1 or config.pool != "cls":
            macs += streams * tokens * (4 * width**2 + 2 * tokens * width + mlp) + adapted * tokens
            continue
        # The CLS token only: q, W_k' q, scores, mix, W_v, out-projection, MLP; rotated keys are those of all tokens.
        keys = tokens * width**2 + tokens * width if config.rotary else width**2 + config.heads * tokens * width
        macs += streams * (3 * width**2 + keys + config.heads * tokens * width + mlp) + adapted
    pool = 0
    if config.pool == "map":  # scores, mix, W_v, out-projection, MLP
        pool = 2 * config.pool_heads * tokens * width + 2 * width**2 + 2 * width * config.pool_mlp_width
    projection = width * config.embedding_width if config.proj else 0
    macs += (2 if first < config.blocks else 1) * (pool + projection)
    return 2.0 * macs * batch


def _embed(forward: Callable[[torch.Tensor], Any], pixels: torch.Tensor) -> Any:
    with torch.inference_mode(), attention_priority():
        return forward(pixels)


def run(
    model: str, batch: int = 256, repeats: int = 50, device: str = "cuda", compiled: bool = False
) -> list[dict[str, Any]]:
    """Verify and time one model at one batch, interleaved; one row an implementation."""
    target = Device(device)
    if model not in CONFIGS:
        raise IosrFastError(f"expected a model out of {', '.join(CONFIGS)} on a GPU, got {model}")
    encoders = load(model, target)
    pixels = encoders.batch(batch, target)
    case = f"{model.lower()}-s{encoders.config('fused').first_adapted_block}-b{batch}"
    calls, extra = {}, {}
    for name, module in encoders.modules.items():
        impl = f"{name}-compiled" if compiled else name
        try:
            forward = target.compile(module) if compiled else module
            call, launch = target.record(partial(_embed, forward, pixels))
            errors = encoders.errors(call())
        except RuntimeError as error:  # also OutOfMemoryError, and what compilers raise
            print(f"left out: {case}: {impl}: {str(error).splitlines()[0]}")
            continue
        if not right(errors, "fp16"):
            print(f"WRONG: {case}: {impl} has a cosine of {errors['min_cosine']:.5f} with float32; not timed")
            continue
        calls[impl] = call
        extra[impl] = {"launch": launch, "min_cosine": round(errors["min_cosine"], 6)}
    runtimes_ms = target.measure(calls, repeats)
    for impl, times in runtimes_ms.items():
        extra[impl]["images_per_s"] = round(batch / float(np.median(times)) * 1e3, 1)
    gflop = {
        impl: fused_flops(encoders.config(impl.removesuffix("-compiled")), batch) / 1e9
        for impl in calls
        if not impl.startswith("two-pass")
    }
    attention = [] if compiled else encoder_attention.rows(case, encoders.config("fused"), batch, repeats, target)
    return attention + harness.rows(
        "encoder",
        case,
        runtimes_ms,
        rivals=RIVALS,
        threads=1,
        precision="fp16",
        work=gflop,
        ceiling=Ceilings(target, 1).gemm_flops("fp16") / 1e9,
        packages=("numpy", "torch", "triton"),
        device=target.description,
        extra=extra,
    )
