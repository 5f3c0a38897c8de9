"""config.pbtxt of each model, written through the published protobuf schema of Triton Inference Server."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.utils.require import require

log = logging.getLogger(__name__)

PREPROCESS, ENCODER, ENCODER_TRT, SCORING, ENSEMBLE = "preprocess", "encoder", "encoder_trt", "scoring", "iosr_fast"
UNKNOWN = "unknown"
SCORES = ("LOGITS", "PROBABILITIES", "ZERO_SHOT", "CACHE")
UNKNOWN_SCORE = "UNKNOWN_SCORE"
LABELS = "labels.txt"
# Folder in the server's container for engines that TensorRT builds for ONNX Runtime.
ENGINE_CACHE = "/tmp/iosr_fast-tensorrt"
_ENCODER_DELAY_US = 2000
_SCORING_DELAY_US = 100  # the images of an encoder batch arrive together
_WORKSPACE_BYTES = 4 << 30

Tensors = Mapping[str, tuple[str, list[int]]]


@dataclass(frozen=True)
class EnginePlan:
    """The file of a plan, the compute capability of its GPU ("9.0"), and a description of GPU and version."""

    path: Path
    capability: str
    description: str


@dataclass(frozen=True)
class Served:
    """The facts that the configurations depend on. `unknown_inputs` are empty without the model of unknown pictures;
    `threshold` is the score above which they are rejected, where a share `keep` of known ones is not."""

    geometry: Geometry
    width: int
    adapted: bool
    precision: str
    n_classes: int
    scoring_inputs: tuple[str, ...]
    max_batch: int
    instances: int
    gpu: bool
    exif_orientation: bool = True
    plans: tuple[EnginePlan, ...] = ()
    unknown_inputs: tuple[str, ...] = ()
    threshold: float = 0.0
    keep: float = 0.0


def choose_plans(engine: Path, manifest: Mapping[str, Any], max_batch: int) -> tuple[EnginePlan, ...]:
    """The plan of the newest TensorRT for each compute capability; may be empty.

    Plans of TensorRT-RTX, for which Triton has no backend, are skipped with a warning. Raises ValueError for a plan
    that can't take `max_batch` pictures.
    """
    newest: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, facts in sorted(manifest.get("plans", {}).items()):
        if facts["runtime"] != "tensorrt":
            log.warning(
                "%s is a plan of %s, which Triton Inference Server can't execute; skipped", name, facts["runtime"]
            )
            continue
        capability = facts["compute_capability"]
        if capability not in newest or _version(newest[capability][1]) < _version(facts):
            newest[capability] = (name, facts)
    for name, facts in newest.values():
        largest = facts.get("profile", {}).get("max", manifest["max_batch"])
        if max_batch > largest:
            raise IosrFastError(
                f"expected a max_batch of at most {largest}, which {name} was built for, got {max_batch}; "
                f"build the engine with --max-batch {max_batch}, or export without gpu"
            )
    return tuple(
        EnginePlan(engine / name, capability, f"{facts['gpu']} with TensorRT {facts['version']}")
        for capability, (name, facts) in newest.items()
    )


def preprocess_config(served: Served) -> Any:
    """Always on the CPU (see preprocess_graph), one thread an instance. Pictures of the same size form a batch."""
    picture: Tensors = {"IMAGE": ("UINT8", [-1, -1, 3])}
    config = _onnx(served, PREPROCESS, picture, {"PIXELS": ("UINT8", _pixels(served))}, gpu=False)
    # A GPU encodes faster than one core can resize.
    config.instance_group[0].count = served.instances * (4 if served.gpu else 1)
    if served.gpu:
        config.parameters["intra_op_thread_count"].string_value = "1"
    config.dynamic_batching.SetInParent()
    size = served.geometry.size
    _warm_up(config, 1, {"IMAGE": ("UINT8", [size + size // 2, 2 * size, 3])})
    return config


def encoder_config(served: Served) -> Any:
    """encoder.onnx; on a GPU through ONNX Runtime's TensorRT provider, which builds its engines in the warm-up.

    If there are plans, it is only a fallback: it builds nothing and has no warm-up.
    """
    config = _onnx(served, ENCODER, _encoder_inputs(served), _encoder_outputs(served), gpu=served.gpu)
    if served.plans:
        _batch(config, served, _ENCODER_DELAY_US)
        return config
    if served.gpu:
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        half = served.precision == "fp16"
        accelerator.parameters["precision_mode"] = "FP16" if half else "FP32"
        if half:
            accelerator.parameters["trt_layer_norm_fp32_fallback"] = "1"
        accelerator.parameters["max_workspace_size_bytes"] = str(_WORKSPACE_BYTES)
        accelerator.parameters["trt_engine_cache_enable"] = "1"
        accelerator.parameters["trt_engine_cache_path"] = ENGINE_CACHE
    return _encoder(config, served)


def plan_config(served: Served) -> Any:
    """The TensorRT plans for the tensorrt backend, which chooses one by the compute capability of its GPU."""
    config = _config(served, ENCODER_TRT, _encoder_inputs(served), _encoder_outputs(served))
    config.platform, config.backend = "tensorrt_plan", "tensorrt"
    config.default_model_filename = served.plans[0].path.name
    for plan in served.plans:
        config.cc_model_filenames[plan.capability] = plan.path.name
    _instances(config, served, gpu=True)
    return _encoder(config, served)


def scoring_config(served: Served) -> Any:
    """The scoring graph, on a GPU with `gpu`."""
    return _of_embeddings(served, SCORING, served.scoring_inputs, _scores(served))


def unknown_config(served: Served) -> Any:
    """The graph of the unknown score, likewise."""
    return _of_embeddings(served, UNKNOWN, served.unknown_inputs, {UNKNOWN_SCORE: ("FP32", [1])})


def _of_embeddings(served: Served, name: str, inputs: tuple[str, ...], outputs: Tensors) -> Any:
    """A graph that reads embeddings; a warm-up runs its batch sizes with zeros."""
    tensors: Tensors = {name: ("FP32", [served.width]) for name in inputs}
    config = _onnx(served, name, tensors, outputs, gpu=served.gpu)
    _batch(config, served, _SCORING_DELAY_US)
    for batch in _batches(served):
        _warm_up(config, batch, tensors, zero=True)  # random bytes are rarely finite floats
    return config


def ensemble_config(served: Served) -> Any:
    """IMAGE -> preprocess -> encoder -> scoring, and unknown where there is that model, with the threshold as a
    parameter. Only tensors that a later step or a client reads may be mapped."""
    outputs, unknown = _scores(served), bool(served.unknown_inputs)
    if unknown:
        outputs = {**outputs, UNKNOWN_SCORE: ("FP32", [1])}
    config = _config(served, ENSEMBLE, {"IMAGE": ("UINT8", [-1, -1, 3])}, outputs)
    config.platform = "ensemble"
    steps = config.ensemble_scheduling.step
    read = dict.fromkeys((*served.scoring_inputs, *served.unknown_inputs))
    embeddings = {name.lower(): name for name in read}  # the names in an engine are lower case
    encoder = ENCODER_TRT if served.plans else ENCODER
    for name, inputs, results in (
        (PREPROCESS, {"IMAGE": "IMAGE"}, {"PIXELS": "PIXELS"}),
        (encoder, {"pixels": "PIXELS"}, embeddings),
        (SCORING, {name: name for name in served.scoring_inputs}, {name: name for name in SCORES}),
    ):
        steps.add(model_name=name, model_version=-1, input_map=inputs, output_map=results)
    if unknown:
        inputs = {name: name for name in served.unknown_inputs}
        steps.add(model_name=UNKNOWN, model_version=-1, input_map=inputs, output_map={UNKNOWN_SCORE: UNKNOWN_SCORE})
        config.parameters["unknown_threshold"].string_value = repr(served.threshold)
        config.parameters["unknown_keep"].string_value = repr(served.keep)
    return config


def to_pbtxt(config: Any) -> str:
    """The text of a config.pbtxt."""
    return require("google.protobuf.text_format", "triton-server").MessageToString(config)


def _schema() -> Any:
    return require("tritonclient.grpc.model_config_pb2", "triton-server")


def _pixels(served: Served) -> list[int]:
    return [served.geometry.size, served.geometry.size, 3]


def _encoder_inputs(served: Served) -> Tensors:
    return {"pixels": ("UINT8", _pixels(served))}


def _encoder_outputs(served: Served) -> Tensors:
    names = ("plain", "adapted") if served.adapted else ("plain",)
    return {name: ("FP32", [served.width]) for name in names}


def _scores(served: Served) -> Tensors:
    return {name: ("FP32", [served.n_classes]) for name in SCORES}


def _config(served: Served, name: str, inputs: Tensors, outputs: Tensors) -> Any:
    schema = _schema()
    config = schema.ModelConfig(name=name, max_batch_size=served.max_batch)
    config.version_policy.latest.num_versions = 1
    for tensor, (kind, dims) in inputs.items():
        config.input.add(name=tensor, data_type=schema.DataType.Value(f"TYPE_{kind}"), dims=dims)
    for tensor, (kind, dims) in outputs.items():
        output = config.output.add(name=tensor, data_type=schema.DataType.Value(f"TYPE_{kind}"), dims=dims)
        if tensor in SCORES:
            output.label_filename = LABELS
    return config


def _onnx(served: Served, name: str, inputs: Tensors, outputs: Tensors, *, gpu: bool) -> Any:
    config = _config(served, name, inputs, outputs)
    config.platform, config.backend, config.default_model_filename = "onnxruntime_onnx", "onnxruntime", "model.onnx"
    _instances(config, served, gpu=gpu)
    return config


def _instances(config: Any, served: Served, *, gpu: bool) -> None:
    group = _schema().ModelInstanceGroup
    config.instance_group.add(count=served.instances, kind=group.KIND_GPU if gpu else group.KIND_CPU)


def _encoder(config: Any, served: Served) -> Any:
    _batch(config, served, _ENCODER_DELAY_US)
    for batch in _batches(served):
        _warm_up(config, batch, _encoder_inputs(served))
    return config


def _batches(served: Served) -> list[int]:
    """The largest batch and a single picture; sizes in between need no separate engine."""
    return sorted({1, served.max_batch}, reverse=True)


def _batch(config: Any, served: Served, delay_us: int) -> None:
    config.dynamic_batching.preferred_batch_size.extend(sorted({max(1, served.max_batch // 2), served.max_batch}))
    config.dynamic_batching.max_queue_delay_microseconds = delay_us


def _warm_up(config: Any, batch: int, inputs: Tensors, *, zero: bool = False) -> None:
    sample = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch, count=1)
    for name, (kind, dims) in inputs.items():
        tensor = sample.inputs[name]
        tensor.data_type = _schema().DataType.Value(f"TYPE_{kind}")
        tensor.dims.extend(dims)
        setattr(tensor, "zero_data" if zero else "random_data", True)


def _version(facts: Mapping[str, Any]) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", facts["version"])]
