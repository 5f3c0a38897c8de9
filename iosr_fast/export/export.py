"""From a CLIP and an adapter to an engine folder: fuse, export, quantise, check against PyTorch, compile, write the
manifest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from iosr_fast.clip.dual_encoder import DualEncoder
from iosr_fast.clip.fuse import build_dual_encoder
from iosr_fast.clip.two_pass import two_passes
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.engine import ENGINE_KIND, check_engine, unavailable_reason
from iosr_fast.encoders.runtimes.onnxruntime import FILE as ONNX_FILE
from iosr_fast.encoders.runtimes.onnxruntime import OnnxRuntimeEncoder
from iosr_fast.encoders.runtimes.openvino import OpenVINOEncoder
from iosr_fast.encoders.runtimes.tensorrt import EXTRAS, TensorRTEncoder, build_plan, target
from iosr_fast.encoders.runtimes.torch import FILE as TORCH_FILE
from iosr_fast.encoders.runtimes.torch import TorchEncoder
from iosr_fast.export.engine_precision import QUANTISED, choose_builder, graph_precision, quantised_by
from iosr_fast.export.export_check import check, pictures_of
from iosr_fast.export.onnx_files import save_onnx
from iosr_fast.utils.files import new_folder
from iosr_fast.utils.machine import cpu_model, package_version
from iosr_fast.utils.manifest import write_manifest
from iosr_fast.utils.require import require
from iosr_fast.utils.verified_folder import open_verified

if TYPE_CHECKING:
    from iosr_fast.clip.adapter import Adapter
    from iosr_fast.clip.load import LoadedClip

EXPORT_VERSION = 1  # goes up when the same weights give other embeddings than before
LAYOUT = 2  # goes up when the same embeddings come from other files than before
OPSET = 20  # the first with Gelu as one operator
LARGEST_FILE = 2**31 - 2**24  # protobuf's limit, less some room for the graph


def export_onnx(encoder: DualEncoder, path: Path) -> None:
    """Write `encoder` as ONNX, opset 20: "pixels" uint8 (batch, S, S, 3) -> "plain" and "adapted" (batch, D) fp32.

    The batch is dynamic; weights are in a second file beside it (save_onnx), in the encoder's precision. Raises
    ValueError where they take 2 GB or more, RuntimeError where the exported graph has a fixed batch.
    """
    require("onnxscript", "train")
    size = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    if size > LARGEST_FILE:
        raise ValueError(
            f"expected weights under 2 GB, which is what one ONNX file holds, got {size / 1e9:.1f} GB; "
            "export in fp16, or use the torch runtime"
        )
    shapes = encoder.shapes
    names = ["plain"] if shapes.first_adapted_block is None else ["plain", "adapted"]
    with quiet_exporter():
        program = torch.onnx.export(
            encoder,
            (torch.zeros(2, shapes.image_size, shapes.image_size, 3, dtype=torch.uint8),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=names,
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
        )
    assert program is not None
    model = program.model_proto
    for item in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        item.ClearField("metadata_props")  # the exporter leaves stack traces with local paths there
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise RuntimeError(f"{value.name} was exported with a fixed batch; expected a dynamic one")
    save_onnx(model, path)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter prints its progress and warns of its own internals; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def engine_fingerprint(
    clip: LoadedClip, adapter: Adapter | None, precision: str, quantised: dict[str, Any] | None = None
) -> str:
    """SHA-256 over CLIP, adapter, precision and export version, and how it was quantised: the same for every runtime
    that computes the same embeddings, so one cache fits all of them."""
    parts = [clip.fingerprint, "" if adapter is None else adapter.fingerprint(), precision, str(EXPORT_VERSION)]
    if quantised is not None:
        parts.append(json.dumps(quantised, sort_keys=True))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def random_adapter(clip: LoadedClip, first_adapted_block: int, bottleneck: int = 64) -> Adapter:
    """Random weights, up_proj included, and marked as such: it costs what a trained adapter costs, to measure speed."""
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
) -> dict[str, Any]:
    """Build an engine folder and return its manifest.

    onnxruntime, openvino: encoder.onnx and encoder.weights. torch: encoder.safetensors. tensorrt, tensorrt_rtx: a plan
    in plans/, named after its runtime, GPU and version, and encoder.onnx, so that the engine also opens where no GPU or
    another one is (`add_plan` adds further plans). "int8" and "fp8" are quantised (quantize.quantize_onnx) with ranges
    measured on `calibration` pictures, uint8 (N, S, S, 3), which should look like those to come. Embeddings of random
    pictures, and of `real_images` uint8 (N, S, S, 3) where given, are compared with the two literal passes in fp32
    PyTorch first. `out` appears complete or not at all.

    Raises ValueError for an encoder that can't be fused or exported, for a precision that the runtime doesn't compute
    in and for missing calibration pictures, ArithmeticError where an embedding is off by more than 1e-4 (fp32) or its
    cosine is below 0.999 (fp16, bf16) or 0.99 (int8, fp8), RuntimeError with TensorRT's own words.
    """
    if max_batch < 1:
        raise ValueError(f"expected max_batch >= 1, got {max_batch}")
    started = time.perf_counter()
    runtime = choose_builder(runtime, precision)
    quantised = quantised_by(clip, runtime, precision, calibration)
    encoder = build_dual_encoder(clip, adapter, graph_precision(precision, runtime))
    facts: dict[str, Any] = {
        "model": clip.name,
        "image_size": clip.image_size,
        "width": encoder.shapes.embedding_width,
        "mean": list(clip.mean),
        "std": list(clip.std),
        "interpolation": clip.interpolation,
        "logit_scale": clip.logit_scale,
        "clip_fingerprint": clip.fingerprint,
        "adapter": None if adapter is None else "random" if adapter.config.training.get("random") else "trained",
        "adapter_fingerprint": None if adapter is None else adapter.fingerprint(),
        "first_adapted_block": encoder.shapes.first_adapted_block,
        "bottleneck": encoder.shapes.bottleneck,
        "runtime": runtime,
        "precision": precision,
        "max_batch": max_batch,
        "fingerprint": engine_fingerprint(clip, adapter, precision, quantised),
        "export_version": EXPORT_VERSION,
        "opset": None if runtime == "torch" else OPSET,
        "dual_encoder": encoder.config,
        "versions": _versions(runtime),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model(),
        "plans": {},
        "check": {},
    }
    if runtime in EXTRAS:
        _ = target(runtime).file  # refuses where no plan can be built, before any work
    pictures = pictures_of(clip.image_size, real_images, noise=precision not in QUANTISED)
    truth = {kind: two_passes(clip, adapter, given) for kind, given in pictures.items()}
    with new_folder(out) as folder:
        if runtime == "torch":
            from safetensors.torch import save_file

            save_file(encoder.state_dict(), folder / TORCH_FILE)
            facts["check"][runtime] = check(TorchEncoder(folder, facts), pictures, truth, precision)
        else:
            if quantised is None:
                export_onnx(encoder, folder / ONNX_FILE)
            else:
                assert calibration is not None
                made_of = _export_quantised(encoder, folder, calibration, QUANTISED[precision], quantised["scheme"])
                facts["quantised"] = quantised | made_of
            if runtime == "openvino":
                facts["check"][runtime] = check(OpenVINOEncoder(folder, facts), pictures, truth, precision)
            elif runtime == "onnxruntime" or not torch.cuda.is_available() or package_version("onnxruntime"):
                facts["check"]["onnxruntime"] = check(OnnxRuntimeEncoder(folder, facts), pictures, truth, precision)
            if runtime in EXTRAS:
                made = _write_plan(folder, facts, runtime)
                facts["check"][runtime] = None if made is None else check(made, pictures, truth, precision)
        facts["build_seconds"] = round(time.perf_counter() - started, 2)
        return write_manifest(folder, "engine", facts)


def _export_quantised(
    encoder: DualEncoder,
    folder: Path,
    calibration: np.ndarray,
    kind: Literal["int8", "fp8"],
    scheme: Literal["cpu", "tensorrt"],
) -> dict[str, Any]:
    """encoder.onnx with quantised products; returns what quantize_onnx says of it."""
    from iosr_fast.export.quantize import quantize_onnx

    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / ONNX_FILE
        export_onnx(encoder, source)
        return quantize_onnx(source, folder / ONNX_FILE, calibration, kind, scheme)


def add_plan(engine: str | Path, runtime: str) -> dict[str, Any]:
    """Build a plan for `runtime`, and for this GPU, from an engine's encoder.onnx; put it beside those that are there.

    On a GPU it is compared with ONNX Runtime first. The engine folder is replaced whole or not at all; returns its
    manifest. Raises ValueError for another runtime or an engine without encoder.onnx, and what write_engine raises.
    """
    engine = Path(engine)
    held = open_verified(engine, ENGINE_KIND)
    check_engine(held)
    manifest = held.manifest
    if runtime not in EXTRAS or ONNX_FILE not in manifest["files"]:
        raise ValueError(
            f"expected one of {sorted(EXTRAS)} and an engine with {ONNX_FILE} to add a plan, got {runtime!r} and an "
            f"engine with {sorted(manifest['files'])}"
        )
    facts = {name: value for name, value in manifest.items() if name not in ("schema", "kind", "files", "checksum")}
    with new_folder(engine) as folder:
        for name in held.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            held.copy(name, folder / name)
        made, facts["check"][runtime] = _write_plan(folder, facts, runtime), None
        if made is not None:
            pictures = pictures_of(manifest["image_size"], None)
            expected = OnnxRuntimeEncoder(folder, facts).encode(pictures["random"])
            truth = {"random": tuple(getattr(expected, name) for name in made.outputs)}
            facts["check"][runtime] = check(made, pictures, truth, facts["precision"])
        facts["versions"] |= {runtime: package_version(runtime)}
        return write_manifest(folder, "engine", facts)


def _write_plan(folder: Path, facts: dict[str, Any], runtime: str) -> BatchedEncoder | None:
    """Compile encoder.onnx for this machine and describe the plan in `facts`; opened, where this GPU can run it."""
    here = target(runtime)
    data, built = build_plan(folder / ONNX_FILE, runtime, facts["max_batch"])
    (folder / here.file).parent.mkdir(exist_ok=True)
    (folder / here.file).write_bytes(data)
    facts["plans"][here.file] = {**here.facts(), "precision": facts["precision"], **built}
    return TensorRTEncoder(folder, facts, runtime) if unavailable_reason(runtime) is None else None


def _versions(runtime: str) -> dict[str, str | None]:
    names = {"iosr_fast", "numpy", "torch", "open_clip_torch", "onnx", "onnxscript", "onnxruntime", runtime}
    return {"python": platform.python_version()} | {name: package_version(name) for name in sorted(names)}
