"""An image encoder in an ONNX file of any exporter, as an engine's graph; needs no torch.

encoder.onnx    one input, normalised pixels float32 (B, 3, S, S), and an output of features float32 (B, D)
encoder.json    how pictures become such pixels (PictureFacts), a file of the same name beside it:
                {"image_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

An engine's graph is the file's between nodes that normalise pixels and bring features to unit length. The file is not
trusted: no tensor is read from outside its folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

from iosr_fast.encoders.encoder import unit
from iosr_fast.encoders.engine_folder import ONNX_FILE, Side
from iosr_fast.encoders.runtimes.onnxruntime import open_session
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.export.check import FP32_MAX_ERROR
from iosr_fast.export.one_file.value import Value
from iosr_fast.export.onnx import IR, OPSET, leading_to, save_onnx
from iosr_fast.export.quantize.calibration import graph_has_products
from iosr_fast.export.source import Source, own_facts
from iosr_fast.images.geometry import Geometry, Interpolation, ResizeMode
from iosr_fast.sealed.schema import Deviations, Level, Share, Strict
from iosr_fast.utils.require import require
from iosr_fast.utils.text import abbreviate

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto, ValueInfoProto

LARGEST_WIDTH = 1 << 16  # of an EngineManifest
LARGEST_FILE = (1 << 31) - 1  # protobuf's limit; weights beside the file have none
_FILE = "file/"  # before every name of the file's graph, so that none is one of ours
_DOMAINS = ("", "ai.onnx")
_FLOAT = 1  # of onnx.TensorProto


class PictureFacts(Strict, frozen=True, kw_only=True):
    """How a picture becomes the input of an ONNX file (images.geometry), with mean and deviation of each channel for
    pixels from 0 to 1; and which `output` has the features, where there are several."""

    image_size: Side
    mean: Annotated[list[Share], Meta(min_length=3, max_length=3)]
    std: Deviations
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: Level = 0
    output: str | None = None


class OnnxSource(Source):
    """An image encoder of an ONNX file, compared with the file itself in ONNX Runtime.

    `graph` is the engine's, with all weights; `input` and `output` are the file's own. `fingerprint` is a SHA-256 over
    the file, its weights and its PictureFacts.
    """

    tokenizer: ClassVar[None] = None

    def __init__(
        self, path: Path, names: tuple[str, str], graph: ModelProto, facts: PictureFacts, fingerprint: str
    ) -> None:
        super().__init__(path.name, fused=False, products=graph_has_products(graph))
        self.path, self.graph, self.fingerprint = path, graph, fingerprint
        self.input, self.output = names
        self.geometry = Geometry(facts.image_size, facts.resize_mode, facts.interpolation, facts.fill)
        self.mean, self.std = tuple(facts.mean), tuple(facts.std)

    def facts(self) -> dict[str, Any]:
        return own_facts(self, self)

    def write(self, folder: Path, runtime: str, precision: str) -> dict[str, Any]:
        model = type(self.graph)()
        model.CopyFrom(self.graph)  # saving takes the weights out
        save_onnx(model, folder / ONNX_FILE)
        return {"opset": self.graph.opset_import[0].version}

    def truth(self, pixels: np.ndarray) -> tuple[np.ndarray]:
        """The embeddings (B, D) of uint8 pixels (B, S, S, 3) by the file itself in ONNX Runtime.

        Raises IosrFastError for a graph that does not run, or does not give each picture a row of numbers that is the
        same alone and at every place of a batch.
        """
        planes = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        planes, places = (planes - mean) / std, np.arange(len(pixels))
        batches = [places, np.tile(places[::-1], 2), *places[:, None]]
        try:
            session = open_session(self.path)
            parts = [session.run([self.output], {self.input: planes[batch]})[0] for batch in batches]
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise IosrFastError(
                f"expected a graph in {self.path} that takes batches of any size, but ONNX Runtime can't run it on "
                f"{len(pixels)} pictures: {error.__cause__ or error}"
            ) from error
        for part, batch in zip(parts, batches, strict=True):
            shape = len(batch), *parts[0].shape[1:]
            if part.shape != shape or len(shape) != 2 or not 1 <= shape[1] <= LARGEST_WIDTH:
                expected = f"an output of shape (B, D), {len(batch)} rows here, D from 1 to {LARGEST_WIDTH:,}"
                raise _refused(self.path, expected, f"{part.shape}")
            if fault := _fault(part, parts[0][batch]):
                raise _refused(self.path, "a row for each picture that is its own at every place of a batch", fault)
        return (unit(parts[0]),)


def read_onnx(file: str | Path) -> OnnxSource:
    """The encoder in an ONNX file, with the facts beside it. What the graph declares is checked; nothing runs.

    Raises FileNotFoundError for a missing file, IosrFastError for facts or a graph that can't become an engine,
    DamagedFileError for a file that is no ONNX model.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"expected an ONNX file at {path}, found none")
    facts = _read_facts(path)
    model, content = _read_graph(path)
    source, output = _check_graph(model, facts, path)
    opset = next((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), 1)
    if opset < OPSET:
        try:
            model = require("onnx.version_converter", "cpu").convert_version(model, OPSET)
        except Exception as error:  # the converter's errors share no base class
            raise _refused(path, f"opset {OPSET}", f"{opset}, which onnx can't convert: {error}") from error
    wrapped = _wrapped(model, source, output, facts)
    digest = hashlib.sha256(msgspec.json.encode(facts) + content)
    for tensor in _external_tensors(wrapped):
        _load(tensor, path)
        digest.update(tensor.raw_data)
    return OnnxSource(path, (source, output), wrapped, facts, digest.hexdigest())


@functools.lru_cache(maxsize=16)
def weight_files(path: Path, version: tuple[int, ...]) -> tuple[Path, ...]:
    """The files of weights that an ONNX file names, one that is missing, too; `version` changes with the file."""
    return tuple(sorted({_weight_file(tensor, path) for tensor in _external_tensors(_read_graph(path)[0])}))


def _read_graph(path: Path) -> tuple[ModelProto, bytes]:
    """The graph in a file, without the weights beside it, and the file's bytes."""
    onnx = require("onnx", "cpu")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise _refused(path, "at most 2 GB, with larger weights in a file beside it", f"{size} bytes")
    content = path.read_bytes()
    try:
        return onnx.load_from_string(content), content
    except Exception as error:  # protobuf's errors differ between its versions
        raise DamagedFileError(f"expected an ONNX model in {path}, got another or a damaged file: {error}") from error


def _external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    for tensor in [*model.graph.initializer, *(one for each in attributes for one in (each.t, *each.tensors))]:
        if tensor.data_location == tensor.EXTERNAL:
            yield tensor


def _read_facts(path: Path) -> PictureFacts:
    """The facts beside an ONNX file."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise FileNotFoundError(
            f"expected {beside.name} beside {path}, which says how pictures become its input, found none; for example "
            '{"image_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, for pixels from 0 to 1'
        )
    content = beside.read_bytes()
    try:
        facts = msgspec.json.decode(content, type=PictureFacts)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        names = ", ".join(PictureFacts.__struct_fields__)
        raise IosrFastError(f"{beside}: {error}; it has {names}, mean and std for pixels from 0 to 1") from error
    json.loads(content, object_pairs_hook=lambda pairs: _check_once([name for name, _ in pairs], "fields", beside))
    return facts


def _check_graph(model: ModelProto, facts: PictureFacts, path: Path) -> tuple[str, str]:
    """The names of the input and of the output. Raises IosrFastError for a graph that can't become an engine."""
    graph = model.graph
    foreign = {f"{node.domain}.{node.op_type}" for node in graph.node if node.domain not in _DOMAINS}
    if foreign or model.functions:
        raise _refused(
            path, "operators of ai.onnx, which every runtime has", abbreviate(sorted(foreign)) or "functions"
        )
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    if graph.sparse_initializer or any(each.HasField("g") or each.graphs for each in attributes):
        raise _refused(path, "a graph without conditions, loops and sparse constants", "one with some")
    results = [name for node in graph.node for name in node.output if name]
    _check_once([*(tensor.name for tensor in graph.initializer), *results], "constants and results", path)
    _check_once([value.name for value in graph.output], "outputs", path)
    _check_once([entry.domain or _DOMAINS[1] for entry in model.opset_import], "domains of operators", path)
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = [value.name for value in inputs]
        raise _refused(path, "one input, of pixels", f"{names}; export the image encoder alone")
    outputs = {value.name: value for value in graph.output}
    name = facts.output or next(iter(outputs), "")
    if name not in outputs or (facts.output is None and len(outputs) > 1):
        expected = facts.output or f"one output, or its name as output in {path.stem}.json"
        raise _refused(path, expected, f"the outputs {list(outputs)}")
    size, source = facts.image_size, inputs[0].name
    what = f"the input {source!r} in float32 of shape (B, 3, {size}, {size}), for batches of any size B"
    _check_declared(inputs[0], ("B", 3, size, size), what, path)
    what = f"the output {name!r} in float32 of shape (B, D), which a Flatten makes of (B, D, 1, 1)"
    _check_declared(outputs[name], (None, None), what, path)
    return source, name


def _check_declared(value: ValueInfoProto, sides: tuple[int | str | None, ...], what: str, path: Path) -> None:
    """Refuse another type or shape than float32 and `sides`: None is any from 1. What is not declared, a run shows."""
    tensor = value.type.tensor_type
    declared = [side.dim_value if side.HasField("dim_value") else side.dim_param or "?" for side in tensor.shape.dim]
    fits = len(declared) == len(sides) and all(
        isinstance(got, str) or (got > 0 if side is None else got == side)
        for got, side in zip(declared, sides, strict=True)
    )
    if tensor.elem_type != _FLOAT or (tensor.HasField("shape") and not fits):
        raise _refused(path, what, f"{declared} in type {tensor.elem_type}")


def _wrapped(model: ModelProto, source: str, output: str, facts: PictureFacts) -> ModelProto:
    """The engine's graph around the file's: "pixels" uint8 (batch, S, S, 3) -> "plain" float32 (batch, D)."""
    helper = require("onnx.helper", "cpu")
    nodes, read = leading_to(model.graph.node, output)
    for number, node in enumerate(nodes):
        node.name = f"{_FILE}{number}_{node.name or node.op_type}"  # the quantiser needs names, each once
        node.input[:] = [name and _FILE + name for name in node.input]
        node.output[:] = [name and _FILE + name for name in node.output]
        node.ClearField("metadata_props")  # exporters leave local paths there
        node.ClearField("doc_string")
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    for tensor in constants:
        tensor.name = _FILE + tensor.name
    graph = helper.make_graph([], "encoder", [], [], constants)
    pixels = _Value(graph, "pixels", np.uint8)
    planes = pixels.cast(np.float32).op("Transpose", perm=[0, 3, 1, 2])  # TensorRT can't transpose uint8
    mean, std = (255 * np.array(values).reshape(1, 3, 1, 1) for values in (facts.mean, facts.std))
    ((planes - mean) / std).op("Identity", name=_FILE + source)
    graph.node.extend(nodes)
    features = _Value(graph, _FILE + output, np.float32)
    plain = (features / features.op("ReduceL2", [1]).op("Max", 1e-12)).op("Identity", name="plain")
    graph.input.append(pixels.info(facts.image_size, facts.image_size, 3))
    graph.output.append(plain.info("width"))
    opsets = [entry for entry in model.opset_import if entry.domain in _DOMAINS]
    wrapped: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=max(IR, model.ir_version))
    return wrapped


class _Value(Value):
    prefix = "engine/"


def _weight_file(tensor: TensorProto, path: Path) -> Path:
    """The file beside the graph's that has the data of a tensor."""
    _check_once([entry.key for entry in tensor.external_data], f"facts of the weights {tensor.name!r}", path)
    place = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
    is_name = place not in ("", ".", "..") and PurePosixPath(place).name == place == PureWindowsPath(place).name
    if not is_name or (path.parent / place).is_symlink():
        raise _refused(path, "weights in files of the same folder, which are no links", f"{place!r}")
    return path.parent / place


def _load(tensor: TensorProto, path: Path) -> None:
    """Read the data of a tensor from a file beside the graph's."""
    beside = _weight_file(tensor, path)
    if not beside.is_file():
        raise FileNotFoundError(f"expected weights of {path.name} in {beside}, found no such file: copy it there")
    try:
        require("onnx.external_data_helper", "cpu").load_external_data_for_tensor(tensor, str(path.parent))
    except Exception as error:  # onnx's errors share no base class
        raise DamagedFileError(f"{path.name} can't read its weights in {beside}: {error}") from error


def _fault(rows: np.ndarray, expected: np.ndarray) -> str:
    """What is wrong with the features (N, D) of pictures that are expected to be the same elsewhere; "" if nothing."""
    if not np.isfinite(rows).all():
        return "NaN or infinite numbers"
    if not rows.any(axis=1).all():
        return "a row of zeros, which has no direction"
    error = float(np.abs(unit(rows) - unit(expected)).max())
    return "" if error <= FP32_MAX_ERROR else f"rows that differ by {error:.2g} with the place or the other pictures"


def _check_once(names: Iterable[str], what: str, path: Path) -> None:
    """Refuse a name that is given twice: readers differ in which of the two they take."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise _refused(path, f"each of the {what} once", f"{abbreviate(twice)} more than once")


def _refused(path: Path, expected: str, got: str) -> IosrFastError:
    return IosrFastError(f"expected {expected}, in {path}, got {got}")
