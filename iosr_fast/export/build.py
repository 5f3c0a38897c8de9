"""From a CLIP and an adapter to an engine folder, checked before it is written.

    write_engine      choose runtime -> fuse -> export -> quantise -> plain form -> compile -> check -> manifest;
                      the graph of an ONNX file (export.from_onnx) takes the place of an export, without torch
    convert_engine    the same from quantise on, with the graph of an engine in fp32; needs no torch

encoders.engine_folder has the files. An engine for TensorRT has the ONNX files too, so it opens on machines with
another GPU or none.
"""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import asdict

from iosr_fast.backbones.image_models import NO_PRODUCTS, has_products
from iosr_fast.encoders.engine_folder import (
    ENGINE_KIND,
    EXTRAS,
    ONNX_FILE,
    ONNX_RUNTIMES,
    PLAIN_FILE,
    TORCH_FILE,
    check_engine,
    target,
    unavailable_reason,
)
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.onnxruntime import OnnxRuntimeEncoder
from iosr_fast.encoders.runtimes.openvino import OpenVINOEncoder
from iosr_fast.encoders.runtimes.tensorrt import TensorRTEncoder, build_plan
from iosr_fast.encoders.runtimes.torch import TorchEncoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.check import Truth, check, checked_pictures
from iosr_fast.export.from_onnx import OnnxModel
from iosr_fast.export.onnx import OPSET, engine_graph, export_onnx, write_plain_graph
from iosr_fast.export.precision import (
    EXPORT_VERSION,
    QUANTISED,
    choose_builder,
    default_batch,
    engine_fingerprint,
    graph_precision,
    quantisation,
)
from iosr_fast.export.quantize.encoder import quantize_onnx
from iosr_fast.export.quantize.graph import graph_has_products
from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import OWN_FIELDS, write_manifest
from iosr_fast.sealed.verified_folder import VerifiedFolder, open_verified
from iosr_fast.utils.machine import cpu_model, package_version, this_gpu
from iosr_fast.utils.numbers import check_integer

if TYPE_CHECKING:
    from iosr_fast.backbones.adapter import Adapter
    from iosr_fast.backbones.dual_config import GraphPrecision
    from iosr_fast.backbones.dual_encoder import DualEncoder
    from iosr_fast.backbones.load import LoadedModel
    from iosr_fast.backbones.plain_encoder import PlainEncoder

log = logging.getLogger(__name__)
LAYOUT = 4  # increases when an engine with the same embeddings has other files


def write_engine(
    clip: LoadedModel | OnnxModel,
    adapter: Adapter | None,
    out: str | Path,
    runtime: str = "auto",
    precision: str = "fp32",
    max_batch: int | None = None,
    pictures: np.ndarray | None = None,
    *,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Build an engine folder, atomically, and return its manifest. `max_batch` None is default_batch.

    `pictures` uint8 (N, S, S, 3) should resemble those to be classified: "int8" and "fp8" need them, to measure ranges
    (quantize.encoder). Embeddings of some of them, and but for these precisions of random pictures, are compared with
    the two literal passes in fp32 PyTorch (backbones.two_pass) before `out` is written.

    Smaller pictures are faster and not exact: `image_size` (None: the CLIP's) is a smaller multiple of its patches,
    with interpolated positions (resize_clip), and then also the S of `pictures`. It is in the manifest's `tokens` and
    in the fingerprint, so support images are encoded by the same engine. The comparison is then with the two passes of
    the CLIP with interpolated positions. What it costs in accuracy only labelled pictures can say.

    An image encoder that can't be fused (plain_encoder) gives the plain embedding only, compared with that of its
    own library, in ONNX files whose graph is fp32. So does an ONNX file, compared with itself in ONNX Runtime.

    Raises ValueError for an adapter with an encoder that can't be fused, a precision that the runtime doesn't support,
    8 bits for an encoder of convolutions alone, a size that doesn't fit, and missing calibration pictures;
    ArithmeticError for an error above 1e-4 (fp32) or a cosine below 0.999 (fp16, bf16) or 0.99 (int8, fp8);
    RuntimeError with TensorRT's message.
    """
    started = time.perf_counter()
    most = None if max_batch is None else check_integer("max_batch", max_batch, 1, 1 << 16)
    tokens = None if image_size is None or image_size == clip.image_size else {"image_size": image_size}
    if isinstance(clip, OnnxModel):
        fused = False
        if adapter is not None or tokens is not None:
            raise IosrFastError(f"expected no adapter and no image_size for {clip.name}, whose graph is complete")
    else:
        from iosr_fast.backbones.fuse import unfusible_reason
        from iosr_fast.backbones.vision_tower import resize_clip

        reason = unfusible_reason(clip)
        if reason is not None and adapter is not None:
            raise IosrFastError(reason)
        fused = reason is None
        clip = resize_clip(clip, clip.image_size if image_size is None else image_size)
    runtime = choose_builder(runtime, precision, fused)
    if not fused and runtime in ONNX_RUNTIMES and this_gpu() is not None:
        log.warning("%s runs on the CPU: %s needs TensorRT for the GPU here", runtime, clip.name)
    check_products(clip, precision)
    quantised = quantisation(clip.image_size, runtime, precision, pictures)
    if runtime in EXTRAS:
        target(runtime)  # raises, before any work, if no plan can be built
    encoder, embed = _encoder(clip, adapter, graph_precision(precision, runtime) if fused else None)
    checked = checked_pictures(clip.image_size, pictures, noise=precision not in QUANTISED)
    truth = {kind: (pixels, embed(pixels)) for kind, pixels in checked.items()}
    adapter_fingerprint = None if adapter is None else adapter.fingerprint()
    adapted = None if adapter is None else adapter.config
    packages = {"iosr_fast", "numpy", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", runtime}
    facts: dict[str, Any] = {
        "model": clip.name,
        **clip.geometry.facts(),
        "width": next(iter(truth.values()))[1][0].shape[1],
        "mean": list(clip.mean),
        "std": list(clip.std),
        "logit_scale": None if clip.tokenizer is None else clip.logit_scale,
        "clip_fingerprint": clip.fingerprint,
        "adapter": None if adapted is None else "random" if adapted.training.get("random") else "trained",
        "adapter_fingerprint": adapter_fingerprint,
        "first_adapted_block": None if adapted is None else adapted.first_adapted_block,
        "bottleneck": None if adapted is None else adapted.bottleneck,
        "runtime": runtime,
        "precision": precision,
        "max_batch": default_batch(runtime) if most is None else most,
        "fingerprint": engine_fingerprint(clip.fingerprint, adapter_fingerprint, precision, quantised, tokens),
        "export_version": EXPORT_VERSION,
        "opset": None if runtime == "torch" else getattr(encoder, "opset", OPSET),
        "dual_encoder": getattr(encoder, "config", None),  # of a DualEncoder
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in sorted(packages)}},
        **({} if tokens is None else {"tokens": tokens}),  # left out, so that earlier versions read the engine
    }
    with new_folder(out, ENGINE_KIND) as folder, tempfile.TemporaryDirectory() as temporary:
        exported = folder if quantised is None else Path(temporary)
        if isinstance(encoder, OnnxModel):
            encoder.export(exported / ONNX_FILE)
        elif runtime == "torch":
            from safetensors.torch import save_file

            save_file(encoder.state_dict(), folder / TORCH_FILE)
        else:
            export_onnx(encoder, exported / ONNX_FILE)
        return _finish(folder, exported, facts, quantised, pictures, truth, started)


def check_products(model: LoadedModel | OnnxModel, precision: str) -> None:
    """Raise ValueError for 8 bits where there is nothing to compute in them, before any work."""
    if precision not in QUANTISED:
        return
    if not (graph_has_products(model.graph) if isinstance(model, OnnxModel) else has_products(model.model.visual)):
        raise IosrFastError(f"expected fp32 or bf16 for {model.name}, got {precision}: {NO_PRODUCTS}")


def _encoder(
    clip: LoadedModel | OnnxModel, adapter: Adapter | None, fused: GraphPrecision | None
) -> tuple[DualEncoder | PlainEncoder | OnnxModel, Callable[[np.ndarray], tuple[np.ndarray, ...]]]:
    """What is exported, fused in a precision or (None) as it is; and the right embeddings of uint8 pixels."""
    if isinstance(clip, OnnxModel):
        return clip, clip.embed
    from iosr_fast.backbones.fuse import build_dual_encoder
    from iosr_fast.backbones.plain_encoder import PlainEncoder
    from iosr_fast.backbones.two_pass import two_passes

    encoder = PlainEncoder(clip) if fused is None else build_dual_encoder(clip, adapter, fused)
    return encoder, partial(two_passes, clip, adapter)


def convert_engine(
    source: str | Path | VerifiedFolder,
    out: str | Path,
    runtime: str,
    precision: str,
    pictures: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write an fp32 engine with encoder.onnx to `out` in another precision or for another runtime; returns its
    manifest, with the fingerprint that write_engine gives.

    `pictures` as for write_engine, N >= 8 for "int8" and "fp8". Embeddings are compared with those of `source`.

    Raises ValueError for an engine of another precision or without encoder.onnx, for a precision whose graph is fp16
    (it is exported from the CLIP: write_engine), and as write_engine does; ArithmeticError for embeddings that are off.
    """
    started = time.perf_counter()
    verified = source if isinstance(source, VerifiedFolder) else open_verified(source, ENGINE_KIND)
    engine = check_engine(verified)
    fused = engine.dual_encoder is not None
    runtime = choose_builder(runtime, precision, fused)
    if engine.precision != "fp32" or ONNX_FILE not in verified.files:
        raise IosrFastError(
            f"expected an engine in fp32 with {ONNX_FILE} to convert, got one in {engine.precision} with "
            f"{sorted(verified.files)}; `iosr-fast build-engine` builds one from the CLIP"
        )
    if runtime == "torch" or graph_precision(precision, runtime, fused) != "fp32":
        raise IosrFastError(
            f"expected a precision whose graph is that of fp32, got {precision} for {runtime}, which is exported from "
            f"the CLIP: iosr-fast build-engine --precision {precision} --runtime {runtime}"
        )
    if precision in QUANTISED and not graph_has_products(engine_graph(verified)):
        raise IosrFastError(f"expected fp32 or bf16 for {engine.model}, got {precision}: {NO_PRODUCTS}")
    quantised = quantisation(engine.image_size, runtime, precision, pictures)
    prints = engine.clip_fingerprint, engine.adapter_fingerprint
    facts = {name: value for name, value in verified.manifest.items() if name not in OWN_FIELDS} | {
        "runtime": runtime,
        "precision": precision,
        "fingerprint": engine_fingerprint(*prints, precision, quantised, engine.tokens),
        "versions": engine.versions | {name: package_version(name) for name in ("onnx", runtime)},
    }
    encoder, truth = open_engine(verified), {}
    for kind, pixels in checked_pictures(engine.image_size, pictures, noise=precision not in QUANTISED).items():
        rows = encoder.encode(pixels)
        truth[kind] = pixels, (rows.plain,) if rows.adapted is None else (rows.plain, rows.adapted)
    with new_folder(out, ENGINE_KIND) as folder, tempfile.TemporaryDirectory() as temporary:
        exported = folder if quantised is None else Path(temporary)
        for name in verified.files:
            if "/" not in name:  # not the plans
                verified.copy(name, exported / name)
        return _finish(folder, exported, facts, quantised, pictures, truth, started)


def _finish(
    folder: Path,
    exported: Path,
    facts: dict[str, Any],
    quantised: dict[str, Any] | None,
    pictures: np.ndarray | None,
    truth: Truth,
    started: float,
) -> dict[str, Any]:
    """Quantise the graph in `exported` into `folder` (they are one unless `quantised`), write its plain form, compile
    it, compare all that runs here with `truth`, and write the manifest."""
    gpu = None if facts["runtime"] in ONNX_RUNTIMES else this_gpu()
    facts |= {"device": cpu_model() if gpu is None else gpu.name, "plans": {}, "check": {}}
    if quantised is not None:
        assert pictures is not None
        report = quantize_onnx(exported / ONNX_FILE, folder / ONNX_FILE, pictures, quantised["form"])
        facts["quantised"] = quantised | report
    for name, encoder in _encoders(folder, facts):
        facts["check"][name] = None if encoder is None else check(encoder, truth, facts["precision"])
    facts["build_seconds"] = round(time.perf_counter() - started, 2)
    return write_manifest(folder, ENGINE_KIND, facts)


def _encoders(folder: Path, facts: dict[str, Any]) -> Iterator[tuple[str, BatchedEncoder | None]]:
    """Every form of an engine, which is written where it is missing, and its encoder; None if no GPU here runs it."""
    runtime = facts["runtime"]
    if runtime == "torch":
        yield runtime, TorchEncoder(folder, facts)
        return
    has_plain, on_cpu = write_plain_graph(folder), OpenVINOEncoder if runtime == "openvino" else OnnxRuntimeEncoder
    name = runtime if runtime in ONNX_RUNTIMES else "onnxruntime"
    yield name, on_cpu(folder, facts)
    if has_plain:
        yield f"{name}, {PLAIN_FILE}", on_cpu(folder, facts, adapted=False)
    if runtime in EXTRAS:
        yield runtime, _compile(folder, facts, runtime)


def _compile(folder: Path, facts: dict[str, Any], runtime: str) -> BatchedEncoder | None:
    """Compile encoder.onnx for this machine and add the plan to `facts`; returns its encoder if this GPU can run it."""
    plan_target = target(runtime)
    (folder / plan_target.file).parent.mkdir(exist_ok=True)
    (folder / plan_target.file).write_bytes(build_plan(folder / ONNX_FILE, runtime, facts["max_batch"]))
    facts["plans"][plan_target.file] = {**asdict(plan_target), "precision": facts["precision"]}
    return TensorRTEncoder(folder, facts, runtime) if unavailable_reason(runtime) is None else None
