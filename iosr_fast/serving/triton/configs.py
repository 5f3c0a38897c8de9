"""config.pbtxt of each model, written through the schema that Triton Inference Server publishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iosr_fast.serving.triton.graph import EXTRA
from iosr_fast.serving.triton.plans import EnginePlan
from iosr_fast.utils.require import require

PREPROCESS, ENCODER, ENCODER_TRT, SCORING, ENSEMBLE = "preprocess", "encoder", "encoder_trt", "scoring", "iosr_fast"
SCORES = ("LOGITS", "PROBABILITIES", "ZERO_SHOT", "CACHE")
LABELS = "labels.txt"
# The names in an engine's own files: those in a plan can't be changed.
EMBEDDINGS = {"PLAIN": "plain", "ADAPTED": "adapted"}
# Where ONNX Runtime keeps the engines that TensorRT builds for it, in the server's container.
ENGINE_CACHE = "/tmp/iosr_fast-tensorrt"
_ENCODER_DELAY_US = 2000
_SCORING_DELAY_US = 100  # what a batch of the encoder held arrives at once
_WORKSPACE_BYTES = 4 << 30

Tensors = Mapping[str, tuple[str, list[int]]]


@dataclass(frozen=True)
class Served:
    """What the configurations depend on."""

    image_size: int
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


def preprocess_config(served: Served) -> Any:
    """On the CPU always (preprocess_graph says why), one thread an instance. Pictures of one size form a batch."""
    picture: Tensors = {"IMAGE": ("UINT8", [-1, -1, 3])}
    config = _onnx(served, PREPROCESS, picture, {"PIXELS": ("UINT8", _pixels(served))}, gpu=False)
    # A GPU takes pictures faster than one core brings them to size.
    config.instance_group[0].count = served.instances * (4 if served.gpu else 1)
    if served.gpu:
        config.parameters["intra_op_thread_count"].string_value = "1"
    config.dynamic_batching.SetInParent()
    size = served.image_size
    _warm_up(config, 1, {"IMAGE": ("UINT8", [size + size // 2, 2 * size, 3])})
    return config


def encoder_config(served: Served) -> Any:
    """encoder.onnx; on a GPU through ONNX Runtime's TensorRT, which builds its engines in the warm-up.

    Beside a plan it is there in case the plan doesn't fit, and neither builds nor warms up anything.
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
    """The TensorRT plans, by the tensorrt backend, which takes the one for its GPU's compute capability."""
    config = _config(served, ENCODER_TRT, _encoder_inputs(served), _encoder_outputs(served))
    config.platform, config.backend = "tensorrt_plan", "tensorrt"
    config.default_model_filename = served.plans[0].path.name
    for plan in served.plans:
        config.cc_model_filenames[plan.capability] = plan.path.name
    _instances(config, served, gpu=True)
    return _encoder(config, served)


def scoring_config(served: Served) -> Any:
    inputs: Tensors = {name: ("FP32", [served.width]) for name in served.scoring_inputs}
    config = _onnx(served, SCORING, inputs, _scores(served), gpu=served.gpu)
    _batch(config, served, _SCORING_DELAY_US)
    for batch in _batches(served):
        _warm_up(config, batch, inputs, zero=True)  # random bytes are seldom finite numbers
    return config


def ensemble_config(served: Served) -> Any:
    """IMAGE -> preprocess -> encoder -> scoring. Only what a later step or a client reads may be mapped."""
    config = _config(served, ENSEMBLE, {"IMAGE": ("UINT8", [-1, -1, 3])}, _scores(served))
    config.platform = "ensemble"
    steps = config.ensemble_scheduling.step
    embeddings = {EMBEDDINGS[name]: name for name in served.scoring_inputs}
    encoder = ENCODER_TRT if served.plans else ENCODER
    for name, inputs, outputs in (
        (PREPROCESS, {"IMAGE": "IMAGE"}, {"PIXELS": "PIXELS"}),
        (encoder, {"pixels": "PIXELS"}, embeddings),
        (SCORING, {name: name for name in served.scoring_inputs}, {name: name for name in SCORES}),
    ):
        steps.add(model_name=name, model_version=-1, input_map=inputs, output_map=outputs)
    return config


def to_pbtxt(config: Any) -> str:
    text: str = require("google.protobuf.text_format", EXTRA).MessageToString(config)
    return text


def _schema() -> Any:
    return require("tritonclient.grpc.model_config_pb2", EXTRA)


def _pixels(served: Served) -> list[int]:
    return [served.image_size, served.image_size, 3]


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
    """The largest batch and a single picture: what lies between needs no engine of its own."""
    return sorted({1, served.max_batch}, reverse=True)


def _batch(config: Any, served: Served, delay_us: int) -> None:
    config.dynamic_batching.preferred_batch_size.extend(sorted({max(1, served.max_batch // 2), served.max_batch}))
    config.dynamic_batching.max_queue_delay_microseconds = delay_us


def _warm_up(config: Any, batch: int, inputs: Tensors, *, zero: bool = False) -> None:
    sample = config.model_warmup.add(name=f"batch of {batch}", batch_size=batch, count=1)
    for name, (kind, dims) in inputs.items():
        given = sample.inputs[name]
        given.data_type = _schema().DataType.Value(f"TYPE_{kind}")
        given.dims.extend(dims)
        setattr(given, "zero_data" if zero else "random_data", True)
