"""A small stand-in for Triton Inference Server: reads, checks and executes a model repository.

It relies on config.pbtxt only, so that a wrong name, dtype or dim fails as it would in Triton. The rules are those of
Triton's ValidateModelConfig and ValidateEnsembleConfig, and of its onnxruntime backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

DTYPES = {schema.TYPE_UINT8: np.uint8, schema.TYPE_FP32: np.float32}
_SESSIONS: dict[bytes, ort.InferenceSession] = {}
_OF_ORT = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


class Repository:
    """Every folder of `root` is a model."""

    def __init__(self, root: Path) -> None:
        self.configs: dict[str, Any] = {}
        self._sessions: dict[str, ort.InferenceSession] = {}
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            text = (folder / "config.pbtxt").read_text(encoding="utf-8")
            self.configs[folder.name] = text_format.Parse(text, schema.ModelConfig())
        for name, config in self.configs.items():
            check_config(root / name, config)
            if config.backend == "onnxruntime":
                self._sessions[name] = open_session(root / name / "1" / config.default_model_filename)
                check_tensors(config, self._sessions[name])
        for config in self.configs.values():
            if config.platform == "ensemble":
                check_ensemble(config, self.configs)

    def infer(self, name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        config = self.configs[name]
        batch = check_given(config, config.input, tensors)
        assert 1 <= batch <= config.max_batch_size
        if config.platform == "ensemble":
            results = self._run_steps(config, tensors)
        else:
            outputs = [output.name for output in config.output]
            results = dict(zip(outputs, self._sessions[name].run(outputs, dict(tensors)), strict=True))
        assert check_given(config, config.output, results) == batch
        return results

    def warm_up(self) -> list[str]:
        """Run every sample of every model that is executed here; their names."""
        ran = []
        for name, config in self.configs.items():
            for sample in config.model_warmup if name in self._sessions else ():
                assert {*sample.inputs} == {tensor.name for tensor in config.input}
                shapes = {key: (sample.batch_size, *value.dims) for key, value in sample.inputs.items()}
                self.infer(name, {key: np.zeros(shapes[key], DTYPES[sample.inputs[key].data_type]) for key in shapes})
                ran.append(f"{name}: {sample.name}")
        return ran

    def _run_steps(self, config: Any, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Each step as soon as its inputs are there, in whatever order they stand."""
        known, waiting = dict(given), list(config.ensemble_scheduling.step)
        while waiting:
            ready = [step for step in waiting if all(name in known for name in step.input_map.values())]
            assert ready, f"nothing makes what {[step.model_name for step in waiting]} wait for"
            for step in ready:
                waiting.remove(step)
                results = self.infer(step.model_name, {key: known[value] for key, value in step.input_map.items()})
                known |= {value: results[key] for key, value in step.output_map.items()}
        return {output.name: known[output.name] for output in config.output}


def open_session(model: Path | bytes) -> ort.InferenceSession:
    """A session of a model; one that was opened before from the same bytes, weights beside it included."""
    contents = [model] if isinstance(model, bytes) else [path.read_bytes() for path in sorted(model.parent.iterdir())]
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).digest()
    if digest not in _SESSIONS:
        _SESSIONS[digest] = _open_session(model)
    return _SESSIONS[digest]


def _open_session(model: Path | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    given = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def check_given(config: Any, tensors: Any, given: Mapping[str, np.ndarray]) -> int:
    """Names, dtypes and dims are those of the configuration; returns the batch."""
    assert {*given} == {tensor.name for tensor in tensors}, config.name
    for tensor in tensors:
        array = given[tensor.name]
        assert array.dtype == DTYPES[tensor.data_type], (config.name, tensor.name)
        assert dims_agree(array.shape[1:], tensor.dims), (config.name, tensor.name, array.shape)
    batches = {array.shape[0] for array in given.values()}
    assert len(batches) == 1, config.name
    return batches.pop()


def dims_agree(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(-1 in (a, b) or a == b for a, b in zip(some, others, strict=True))


def check_config(folder: Path, config: Any) -> None:
    assert config.name == folder.name and config.max_batch_size >= 1
    assert config.HasField("version_policy")
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["1"]
    if config.platform == "ensemble":
        assert not config.backend
        assert not (config.instance_group or config.model_warmup or config.HasField("optimization"))
    else:
        pairs = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
        assert config.platform == pairs[config.backend]
        files = {config.default_model_filename, *config.cc_model_filenames.values()}
        if config.name == "encoder":
            files.add("encoder.weights")  # the graph has its name, and finds it beside itself
        assert {path.name for path in (folder / "1").iterdir()} == files
        assert len(config.instance_group) == 1 and config.instance_group[0].count >= 1
    for size in config.dynamic_batching.preferred_batch_size:
        assert 1 <= size <= config.max_batch_size
    for sample in config.model_warmup:
        assert 1 <= sample.batch_size <= config.max_batch_size
        assert all(dim > 0 for value in sample.inputs.values() for dim in value.dims)
        assert all(value.WhichOneof("input_data_type") for value in sample.inputs.values())
    for output in config.output:
        assert not output.label_filename or (folder / output.label_filename).is_file()


def check_tensors(config: Any, session: ort.InferenceSession) -> None:
    """Every tensor of the file is in the configuration, as the file has it, with a batch that may be any."""
    for tensors, there in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert {tensor.name for tensor in tensors} == {value.name for value in there}
        for tensor in tensors:
            value = next(value for value in there if value.name == tensor.name)
            batch, *dims = [dim if isinstance(dim, int) else -1 for dim in value.shape]
            assert DTYPES[tensor.data_type] == _OF_ORT[value.type]
            assert batch == -1 and list(tensor.dims) == dims, (config.name, tensor.name, value.shape)


def check_ensemble(config: Any, configs: Mapping[str, Any]) -> None:
    made: dict[str, Any] = {tensor.name: tensor for tensor in config.input}
    read: set[str] = set()
    steps = config.ensemble_scheduling.step
    for step in steps:
        model = configs[step.model_name]
        assert config.max_batch_size <= model.max_batch_size
        assert {*step.input_map} == {tensor.name for tensor in model.input}
        outputs = {tensor.name: tensor for tensor in model.output}
        for key, value in step.output_map.items():
            assert value not in made, f"{value} is written twice"
            made[value] = outputs[key]
    for step in steps:
        for tensor in configs[step.model_name].input:
            same_tensor(made[step.input_map[tensor.name]], tensor)
            read.add(step.input_map[tensor.name])
    for tensor in config.output:
        same_tensor(made[tensor.name], tensor)
        read.add(tensor.name)
    assert read == {*made}, "Triton refuses a tensor of an ensemble that nothing reads"


def same_tensor(some: Any, other: Any) -> None:
    assert some.data_type == other.data_type and dims_agree(some.dims, other.dims), (some.name, other.name)
