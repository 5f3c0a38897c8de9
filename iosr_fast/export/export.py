"""From a CLIP and an adapter to an engine folder: fuse, export, quantise, compile, check, write the manifest."""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.fuse_config import unfusible_reason
from iosr_fast.clip.plain_encoder import PlainEncoder, plain_pass
from iosr_fast.clip.resize import resize_clip
from iosr_fast.clip.two_pass import two_passes
from iosr_fast.encoders.runtimes.engine import ENGINE_KIND, check_engine
from iosr_fast.encoders.runtimes.onnxruntime import FILE as ONNX_FILE
from iosr_fast.encoders.runtimes.onnxruntime import OnnxRuntimeEncoder
from iosr_fast.encoders.runtimes.tensorrt import EXTRAS, target
from iosr_fast.encoders.runtimes.torch import FILE as TORCH_FILE
from iosr_fast.encoders.runtimes.torch import TorchEncoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.convert import EXPORT_VERSION, device_of, fingerprint_of, finish_engine, write_plan
from iosr_fast.export.engine_precision import QUANTISED, choose_builder, graph_precision, quantised_by
from iosr_fast.export.export_check import check, checked_pictures
from iosr_fast.export.onnx_export import OPSET, export_onnx
from iosr_fast.utils.folders import new_folder
from iosr_fast.utils.machine import package_version
from iosr_fast.utils.manifest import OWN_FIELDS, write_manifest
from iosr_fast.utils.numbers import check_integer
from iosr_fast.utils.verified_folder import open_verified

if TYPE_CHECKING:
    from iosr_fast.clip.adapter import Adapter
    from iosr_fast.clip.load import LoadedClip

LAYOUT = 4  # increases when an engine with the same embeddings has other files


def engine_fingerprint(
    clip: LoadedClip,
    adapter: Adapter | None,
    precision: str,
    quantised: dict[str, Any] | None = None,
    tokens: dict[str, int] | None = None,
) -> str:
    """The fingerprint (convert.fingerprint_of) of an engine of this CLIP and adapter."""
    of_adapter = None if adapter is None else adapter.fingerprint()
    return fingerprint_of(clip.fingerprint, of_adapter, precision, quantised, tokens)


def random_adapter(clip: LoadedClip, first_adapted_block: int, bottleneck: int = 64) -> Adapter:
    """An adapter with random weights, marked as such, to measure speed: it is as fast as a trained one."""
    import torch

    from iosr_fast.clip.adapter import init_adapter

    adapter = init_adapter(clip, first_adapted_block, bottleneck, training={"random": True})
    generator = torch.Generator().manual_seed(0)
    for name, value in adapter.named_parameters():
        if "up_proj" in name:
            value.data = torch.randn(value.shape, generator=generator) * bottleneck**-0.5
    return adapter.eval().requires_grad_(False)


def write_engine(
    clip: LoadedClip,
    adapter: Adapter | None,
    out: str | Path,
    runtime: str = "auto",
    precision: str = "fp32",
    max_batch: int = 32,
    real_images: np.ndarray | None = None,
    calibration: np.ndarray | None = None,
    *,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Build an engine folder and return its manifest.

    Files: for onnxruntime and openvino encoder.onnx and encoder.weights, and with an adapter plain.onnx, which computes
    the plain embedding alone (plain_graph); for torch encoder.safetensors; for tensorrt and tensorrt_rtx the same as
    for onnxruntime, so that the engine opens on machines with another GPU or none, and a plan in plans/, named after
    its runtime, GPU and version (`add_plan` adds further plans). "int8" and "fp8" are quantised
    (quantize.quantize_onnx) with ranges measured on `calibration` pictures, uint8 (N, S, S, 3), which should resemble
    those to be classified. Embeddings of random pictures, and of `real_images` uint8 (N, S, S, 3), are compared with
    the two literal passes in fp32 PyTorch (clip.two_pass) before `out` is written, atomically.

    Smaller pictures are faster and not exact: `image_size` (None: the CLIP's) is a smaller multiple of its patches,
    with interpolated positions (clip.resize), and then also the S of all pictures given here. It is in the manifest's
    `tokens` and in the fingerprint, so support images are encoded by the same engine. The comparison is then with the
    two passes of the CLIP with interpolated positions. What it costs in accuracy only labelled pictures can say.

    An image encoder that can't be fused (clip.plain_encoder) gives the plain embedding only, compared with open_clip's
    encode_image, in ONNX files whose graph is fp32.

    Raises ValueError for an adapter with an encoder that can't be fused, a precision that the runtime doesn't support,
    a size that doesn't fit, and missing calibration pictures; ArithmeticError for an error above 1e-4 (fp32) or a
    cosine below 0.999 (fp16, bf16) or 0.99 (int8, fp8); RuntimeError with TensorRT's message.
    """
    max_batch = check_integer("max_batch", max_batch, 1, 1 << 16)
    started = time.perf_counter()
    reason = unfusible_reason(clip)
    if reason is not None and adapter is not None:
        raise IosrFastError(reason)
    runtime = choose_builder(runtime, precision, reason is None)
    tokens = None if image_size is None or image_size == clip.image_size else {"image_size": image_size}
    clip = resize_clip(clip, clip.image_size if image_size is None else image_size)
    quantised = quantised_by(clip.image_size, runtime, precision, calibration)
    encoder: DualEncoder | PlainEncoder = (
        build_dual_encoder(clip, adapter, graph_precision(precision, runtime)) if reason is None else PlainEncoder(clip)
    )
    facts: dict[str, Any] = {
        "model": clip.name,
        **clip.geometry.facts(),
        "mean": list(clip.mean),
        "std": list(clip.std),
        "logit_scale": clip.logit_scale,
        "clip_fingerprint": clip.fingerprint,
        "adapter": None if adapter is None else "random" if adapter.config.training.get("random") else "trained",
        "adapter_fingerprint": None if adapter is None else adapter.fingerprint(),
        "first_adapted_block": None if adapter is None else adapter.config.first_adapted_block,
        "bottleneck": None if adapter is None else adapter.config.bottleneck,
        "runtime": runtime,
        "precision": precision,
        "max_batch": max_batch,
        "fingerprint": engine_fingerprint(clip, adapter, precision, quantised, tokens),
        "export_version": EXPORT_VERSION,
        "opset": None if runtime == "torch" else OPSET,
        "dual_encoder": None if isinstance(encoder, PlainEncoder) else encoder.config,
        "versions": _versions(runtime),
        "device": device_of(runtime),
        "plans": {},
        "check": {},
        **({} if tokens is None else {"tokens": tokens}),  # left out, so that earlier versions read the engine
    }
    if runtime in EXTRAS:
        _ = target(runtime).file  # raises, before any work, if no plan can be built
    pictures = checked_pictures(clip.image_size, real_images, noise=precision not in QUANTISED)
    if reason is not None:
        truth = {kind: plain_pass(clip, pixels) for kind, pixels in pictures.items()}
    else:
        truth = {kind: two_passes(clip, adapter, pixels) for kind, pixels in pictures.items()}
    facts["width"] = next(iter(truth.values()))[0].shape[1]
    with new_folder(out, ENGINE_KIND) as folder:
        if runtime == "torch":
            from safetensors.torch import save_file

            save_file(encoder.state_dict(), folder / TORCH_FILE)
            facts["check"][runtime] = check(TorchEncoder(folder, facts), pictures, truth, precision)
            facts["build_seconds"] = round(time.perf_counter() - started, 2)
            return write_manifest(folder, ENGINE_KIND, facts)
        with tempfile.TemporaryDirectory() as temporary:
            exported = (folder if quantised is None else Path(temporary)) / ONNX_FILE
            export_onnx(encoder, exported)
            return finish_engine(folder, facts, exported, quantised, calibration, pictures, truth, started)


def add_plan(engine: str | Path, runtime: str) -> dict[str, Any]:
    """Build a plan for `runtime` and this GPU from an engine's encoder.onnx, and add it to the engine's plans.

    With a GPU the plan is first compared with ONNX Runtime. The engine folder is replaced atomically. Returns its
    manifest. Raises ValueError for another runtime or an engine without encoder.onnx, and as write_engine does.
    """
    engine = Path(engine)
    source = open_verified(engine, ENGINE_KIND)
    check_engine(source)
    manifest = source.manifest
    if runtime not in EXTRAS or ONNX_FILE not in manifest["files"]:
        raise IosrFastError(
            f"expected one of {sorted(EXTRAS)} and an engine with {ONNX_FILE} to add a plan, got {runtime!r} and an "
            f"engine with {sorted(manifest['files'])}"
        )
    facts = {name: value for name, value in manifest.items() if name not in OWN_FIELDS}
    with new_folder(engine, ENGINE_KIND) as folder:
        for name in source.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            source.copy(name, folder / name)
        compiled, facts["check"][runtime] = write_plan(folder, facts, runtime), None
        if compiled is not None:
            pictures = checked_pictures(manifest["image_size"], None)
            expected = OnnxRuntimeEncoder(folder, facts).encode(pictures["random"])
            truth = {"random": tuple(getattr(expected, name) for name in compiled.outputs)}
            facts["check"][runtime] = check(compiled, pictures, truth, facts["precision"])
        facts["versions"] |= {runtime: package_version(runtime)}
        return write_manifest(folder, ENGINE_KIND, facts)


def _versions(runtime: str) -> dict[str, str | None]:
    names = {"iosr_fast", "numpy", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", runtime}
    return {"python": platform.python_version()} | {name: package_version(name) for name in sorted(names)}
