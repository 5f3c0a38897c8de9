"""An image encoder in an ONNX file of any exporter, as an engine's graph; needs no torch.

encoder.onnx    one input, normalised pixels float32 (B, 3, S, S), and an output of features float32 (B, D)
encoder.json    how pictures become such pixels (PictureFacts), a file of the same name beside it:
                {"image_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

An engine's graph is the file's between nodes that normalise pixels and bring features to unit length. The file is not
trusted: no tensor is read from outside its folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
import numpy as np
from msgspec import Meta

from iosr_fast.encoders.encoder import unit
from iosr_fast.encoders.runtimes.onnxruntime import open_session
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.export.onnx import IR, OPSET, leading_to, save_onnx
from iosr_fast.images.geometry import Geometry, Interpolation, ResizeMode
from iosr_fast.sealed.schema import Deviations, Level, Share, Size, Strict
from iosr_fast.utils.require import require
from iosr_fast.utils.text import abbreviate

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

LARGEST_FILE = (1 << 31) - 1  # protobuf's limit; weights beside the file have none
_OURS = "file/"  # before every name of the file's graph, so that none is one of ours


class PictureFacts(Strict, frozen=True, kw_only=True):
    """How a picture becomes the input of an ONNX file (images.geometry), with mean and deviation of each channel for
    pixels from 0 to 1; and which `output` has the features, where there are several."""

    image_size: Size
    mean: Annotated[list[Share], Meta(min_length=3, max_length=3)]
    std: Deviations
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: Level = 0
    output: str | None = None


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """An image encoder of an ONNX file; what it shares with clip.load.LoadedModel has the same name.

    `graph` is the engine's, with all weights; `input` and `output` are the file's own. `fingerprint` is a SHA-256 over
    the file, its weights and its PictureFacts.
    """

    path: Path
    input: str
    output: str
    graph: ModelProto
    geometry: Geometry
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    tokenizer: ClassVar[None] = None
    logit_scale: ClassVar[float] = 100.0  # nothing uses it without texts

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def image_size(self) -> int:
        return self.geometry.size

    @property
    def opset(self) -> int:
        version: int = self.graph.opset_import[0].version
        return version

    def embed(self, pixels: np.ndarray) -> tuple[np.ndarray]:
        """The embeddings (B, D) of uint8 pixels (B, S, S, 3) by the file itself in ONNX Runtime.

        Raises IosrFastError for a graph that does not run, or gives something else than a row of numbers a picture.
        """
        planes = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        try:
            (features,) = open_session(self.path).run([self.output], {self.input: (planes - mean) / std})
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise IosrFastError(
                f"expected a graph in {self.path} that takes batches of any size, but ONNX Runtime can't run it on "
                f"{len(pixels)} pictures: {error.__cause__ or error}"
            ) from error
        if features.ndim != 2 or len(features) != len(pixels):
            raise _refused(self.path, f"an output of shape (B, D), {len(pixels)} rows here", f"{features.shape}")
        return (unit(features),)

    def export(self, path: Path) -> None:
        """Write the engine's graph, and its weights beside it, as export_onnx does."""
        model = type(self.graph)()
        model.CopyFrom(self.graph)  # saving takes the weights out
        save_onnx(model, path)


def read_onnx(file: str | Path) -> OnnxModel:
    """The encoder in an ONNX file, with the facts beside it. What the graph declares is checked; nothing runs.

    Raises FileNotFoundError for a missing file, IosrFastError for facts or a graph that can't become an engine,
    DamagedFileError for a file that is no ONNX model.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"expected an ONNX file at {path}, found none")
    onnx, facts = require("onnx", "cpu"), _read_facts(path)
    if path.stat().st_size > LARGEST_FILE:
        raise _refused(path, "at most 2 GB, with larger weights in a file beside it", f"{path.stat().st_size} bytes")
    content = path.read_bytes()
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's errors differ between its versions
        raise DamagedFileError(f"expected an ONNX model in {path}, got another or a damaged file: {error}") from error
    source, output = _check_graph(model, facts, path)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    if opset < OPSET:
        try:
            model = require("onnx.version_converter", "cpu").convert_version(model, OPSET)
        except Exception as error:  # the converter's errors share no base class
            raise _refused(path, f"opset {OPSET}", f"{opset}, which onnx can't convert: {error}") from error
    digest = hashlib.sha256(msgspec.json.encode(facts) + content)
    wrapped = _wrapped(model, source, output, facts)
    for tensor in _tensors(wrapped.graph):
        if tensor.data_location == tensor.EXTERNAL:
            _load(tensor, path)
            digest.update(tensor.raw_data)
    geometry = Geometry(facts.image_size, facts.resize_mode, facts.interpolation, facts.fill)
    return OnnxModel(path, source, output, wrapped, geometry, tuple(facts.mean), tuple(facts.std), digest.hexdigest())


def _read_facts(path: Path) -> PictureFacts:
    """The facts beside an ONNX file."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise FileNotFoundError(
            f"expected {beside.name} beside {path}, which says how pictures become its input, found none; for example "
            '{"image_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, for pixels from 0 to 1'
        )
    try:
        return msgspec.json.decode(beside.read_bytes(), type=PictureFacts)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise IosrFastError(
            f"{beside}: {error}; image_size, mean and std (for pixels from 0 to 1) are required, resize_mode, "
            "interpolation, fill and output may be there"
        ) from error


def _check_graph(model: ModelProto, facts: PictureFacts, path: Path) -> tuple[str, str]:
    """The names of the input and of the output. Raises IosrFastError for a graph that can't become an engine."""
    graph = model.graph
    foreign = {f"{node.domain}.{node.op_type}" for node in graph.node if node.domain not in ("", "ai.onnx")}
    if model.functions or foreign:
        names = sorted(foreign | {f"{each.domain}.{each.name}" for each in model.functions})
        raise _refused(
            path,
            "operators of ai.onnx alone, which every runtime has",
            f"{abbreviate(names)}; export it without a runtime's own optimisations",
        )
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    if graph.sparse_initializer or any(each.HasField("g") or each.graphs for each in attributes):
        raise _refused(
            path, "a graph without conditions, loops and sparse constants", "some; export it with fixed sizes"
        )
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = [value.name for value in inputs]
        raise _refused(path, "one input, of pixels", f"{names}; export the image encoder alone")
    outputs = {value.name: value for value in graph.output}
    if facts.output is None and len(outputs) != 1:
        raise _refused(path, f"one output, or its name as output in {path.stem}.json", f"the outputs {list(outputs)}")
    name = next(iter(outputs)) if facts.output is None else facts.output
    if name not in outputs:
        raise _refused(path, f"the output {name!r}, which {path.stem}.json names", f"the outputs {list(outputs)}")
    size = facts.image_size
    _check_shape(inputs[0], (3, size, size), path, f"the input {inputs[0].name!r}")
    _check_shape(outputs[name], (None,), path, f"the output {name!r}")
    return inputs[0].name, name


def _check_shape(value: ValueInfoProto, expected: tuple[int | None, ...], path: Path, what: str) -> None:
    """Refuse another type than float32, a fixed batch, and other sides than `expected` (None: any), as declared."""
    tensor = value.type.tensor_type
    if tensor.elem_type != 1:  # TensorProto.FLOAT
        raise _refused(path, f"{what} in float32", "another type")
    if not tensor.HasField("shape"):
        return  # a run will show it
    sides = [side.dim_value if side.HasField("dim_value") else side.dim_param or "?" for side in tensor.shape.dim]
    shown = f"({', '.join(map(str, ['B', *('D' if side is None else side for side in expected)]))})"
    if len(sides) != 1 + len(expected):
        flat = "; add a Flatten" if sides[2:] == [1, 1] else ""
        raise _refused(path, f"{what} of shape {shown}", f"{sides}{flat}")
    if isinstance(sides[0], int) and len(expected) > 1:  # exporters are careless about outputs
        raise _refused(path, f"{what} with a dynamic batch", f"{sides}; export it with a dynamic first axis")
    if any(isinstance(got, int) and side not in (None, got) for got, side in zip(sides[1:], expected, strict=True)):
        raise _refused(path, f"{what} of shape {shown}, for the image_size of {path.stem}.json", f"{sides}")


def _wrapped(model: ModelProto, source: str, output: str, facts: PictureFacts) -> ModelProto:
    """The engine's graph around the file's: "pixels" uint8 (batch, S, S, 3) -> "plain" float32 (batch, D)."""
    helper, numpy_helper = require("onnx.helper", "cpu"), require("onnx.numpy_helper", "cpu")
    nodes, read = leading_to(model.graph.node, output)
    for number, node in enumerate(nodes):
        node.name = f"{_OURS}{number}_{node.name or node.op_type}"  # the quantiser needs names, each once
        node.input[:] = [name and _OURS + name for name in node.input]
        node.output[:] = [name and _OURS + name for name in node.output]
        node.ClearField("metadata_props")  # exporters leave local paths there
        node.ClearField("doc_string")
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    for tensor in constants:
        tensor.name = _OURS + tensor.name
    numbers = {
        "mean": np.array(facts.mean, np.float32).reshape(1, 3, 1, 1) * 255,
        "std": np.array(facts.std, np.float32).reshape(1, 3, 1, 1) * 255,
        "channels": np.array([1]),
        "least": np.array(1e-12, np.float32),
    }
    constants += [numpy_helper.from_array(value, name) for name, value in numbers.items()]
    size = facts.image_size
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixels"], ["values"], "values", to=1),  # TensorRT can't transpose uint8
            helper.make_node("Transpose", ["values"], ["planes"], "planes", perm=[0, 3, 1, 2]),
            helper.make_node("Sub", ["planes", "mean"], ["centred"], "centred"),
            helper.make_node("Div", ["centred", "std"], [_OURS + source], "normalised"),
            *nodes,
            helper.make_node("ReduceL2", [_OURS + output, "channels"], ["length"], "length"),
            helper.make_node("Max", ["length", "least"], ["divisor"], "divisor"),
            helper.make_node("Div", [_OURS + output, "divisor"], ["plain"], "plain"),
        ],
        "encoder",
        [helper.make_tensor_value_info("pixels", 2, ["batch", size, size, 3])],  # TensorProto.UINT8
        [helper.make_tensor_value_info("plain", 1, ["batch", "width"])],
        constants,
    )
    opsets = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    wrapped: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=max(IR, model.ir_version))
    return wrapped


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All tensors of a graph without inner graphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors


def _load(tensor: TensorProto, path: Path) -> None:
    """Read the data of a tensor from a file beside the graph's."""
    place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    beside = path.parent / place
    is_name = place not in ("", ".", "..") and PurePosixPath(place).name == place == PureWindowsPath(place).name
    if not is_name or beside.is_symlink() or not beside.is_file():
        raise _refused(path, "weights in files of the same folder, which are no links", f"{place!r}")
    try:
        require("onnx.external_data_helper", "cpu").load_external_data_for_tensor(tensor, str(path.parent))
    except Exception as error:  # onnx's errors share no base class
        raise DamagedFileError(f"{path.name} can't read its weights in {beside}: {error}") from error


def _refused(path: Path, expected: str, got: str) -> IosrFastError:
    return IosrFastError(f"expected {expected}, in {path}, got {got}")
