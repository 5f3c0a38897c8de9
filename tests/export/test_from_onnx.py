"""ONNX files of other exporters as encoders: their own numbers, without torch; and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from iosr_fast import Classifier
from iosr_fast.encoders.encoder import unit
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.build import write_engine
from iosr_fast.export.candidates import list_candidates
from iosr_fast.export.from_onnx import read_onnx
from iosr_fast.export.source import EngineSource
from iosr_fast.sealed.verified_folder import open_verified
from tests.backbones.small_clip import random_pixels
from tests.cli.runs import done, refused
from tests.export.onnx_files import FACTS, LAYERS, SHAPE, SIZE, WIDTH, encoder_model, write_encoder
from tests.interpreter import printed

CONVOLUTIONS = LAYERS[:4]
BESIDE = {"save_as_external_data": True, "location": "encoder.bin", "size_threshold": 0}


def own_embeddings(path: Path, pixels: np.ndarray) -> np.ndarray:
    """What the file itself gives."""
    mean, std = (np.array(FACTS[name], np.float32) for name in ("mean", "std"))
    planes = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    (features,) = onnxruntime.InferenceSession(path).run(["plain"], {"pixels": planes})
    return unit(features)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("opset", "options"), [(11, {}), (20, BESIDE), (23, {})])
def test_an_engine_gives_the_files_own_embeddings(
    opset: int, options: dict[str, Any], runtime: str, tmp_path: Path
) -> None:
    path = write_encoder(tmp_path / "encoder.onnx", encoder_model(opset=opset), **options)
    manifest = write_engine(read_onnx(path), tmp_path / "engine", runtime, max_batch=4)
    assert (manifest["model"], manifest["width"], manifest["opset"]) == ("encoder.onnx", WIDTH, max(opset, 20))
    assert manifest["logit_scale"] is manifest["dual_encoder"] is None
    pixels = random_pixels(7, SIZE)
    expected = own_embeddings(path, pixels)
    path.write_bytes(b"")  # the engine needs the file no longer
    encoder = open_engine(tmp_path / "engine", runtime)
    for count in (1, 7):
        np.testing.assert_allclose(encoder.encode(pixels[:count]).plain, expected[:count], atol=1e-6)


def test_int8_keeps_products_whose_activation_is_not_their_plain_first_factor(tmp_path: Path) -> None:
    """A Gemm of x' (transA) and W @ x are products with constants too: they stay in float, by name, and are right."""
    model = encoder_model((*LAYERS[:4], "MatMul", "MatMul", "Relu", "MatMul"))
    nodes = list(model.graph.node)
    gemm, left = nodes[4], nodes[5]
    (x, weight), (y, matrix) = gemm.input, left.input
    turned = [
        helper.make_node("Transpose", [x], ["turned"]),
        helper.make_node("Gemm", ["turned", weight], [gemm.output[0]], "gemm", transA=1),
        helper.make_node("Transpose", [y], ["columns"]),
        helper.make_node("MatMul", [matrix, "columns"], ["product"], "left"),
        helper.make_node("Transpose", ["product"], [left.output[0]]),
    ]
    del model.graph.node[:]
    tail = helper.make_node("MatMul", [nodes[6].output[0], matrix], ["more"])
    nodes[7].input[0] = "more"
    model.graph.node.extend([*nodes[:4], *turned, nodes[6], tail, nodes[7]])
    source, pictures = read_onnx(write_encoder(tmp_path / "encoder.onnx", model)), random_pixels(32, SIZE)
    manifest = write_engine(source, tmp_path / "engine", "onnxruntime", "int8", pictures=pictures)
    kept = manifest["quantised"]["kept"]
    reasons = {name.rpartition("_")[2]: reason for name, reason in kept.items() if "first factor" in reason}
    assert reasons.keys() == {"gemm", "left"} and "attention" not in kept and manifest["quantised"]["products"] > 0


def test_the_fingerprint_is_of_graph_weights_and_facts(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"

    def fingerprint(facts: Any = FACTS, **options: Any) -> str:
        return read_onnx(write_encoder(path, facts=facts, **options)).fingerprint

    prints = [fingerprint(), fingerprint({**FACTS, "fill": 7, "resize_mode": "longest"}), fingerprint(**BESIDE)]
    weights = bytearray((tmp_path / "encoder.bin").read_bytes())
    weights[5] ^= 1
    (tmp_path / "encoder.bin").write_bytes(weights)
    prints += [read_onnx(path).fingerprint, fingerprint(model=encoder_model(CONVOLUTIONS))]
    assert len(set(prints)) == 5 and fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (None, r"expected encoder\.json beside .*\"image_size\": 224, \"mean\""),
        ({"image_size": SIZE}, r"encoder\.json: Object missing required field `mean`.*pixels from 0 to 1"),
        ({**FACTS, "crop": 0.9}, "unknown field `crop`"),
        ({**FACTS, "mean": [123.7, 116.3, 103.5]}, r"<= 1\.0 - at `\$\.mean"),
        ({**FACTS, "interpolation": "nearest"}, "Invalid enum value 'nearest'"),
        ({**FACTS, "fill": 3}, "a fill only with resize_mode longest"),
        ({**FACTS, "image_size": 1 << 16}, r"Expected `int` <= 4096 - at `\$\.image_size"),
        ({**FACTS, "image_size": 32}, rf"of shape \(B, 3, 32, 32\).* got \['B', 3, {SIZE}, {SIZE}\]"),
        ({**FACTS, "output": "features"}, r"expected features, in .* got the outputs \['plain'\]"),
    ],
)
def test_facts_that_do_not_fit_are_refused(facts: Any, told: str, tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "encoder.onnx", facts=facts)
    if facts is None:
        path.with_suffix(".json").unlink()
    with pytest.raises((IosrFastError, FileNotFoundError), match=told):
        read_onnx(path)


def test_a_name_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path, graphs = tmp_path / "encoder.onnx", [encoder_model() for _ in range(4)]
    graphs[0].graph.output.append(graphs[0].graph.output[0])
    graphs[1].graph.initializer.append(graphs[1].graph.initializer[1])
    graphs[2].graph.node.append(graphs[2].graph.node[3])
    graphs[3].opset_import.append(helper.make_opsetid("ai.onnx", 13))
    for model, name in zip(graphs, ("plain", "weight4", "Flatten3", "ai.onnx"), strict=True):
        with pytest.raises(IosrFastError, match=rf"once, in .*encoder\.onnx, got '{name}' more than once"):
            read_onnx(write_encoder(path, model))
    write_encoder(path)
    path.with_suffix(".json").write_text(json.dumps(FACTS)[:-1] + ', "image_size": 16}')
    with pytest.raises(IosrFastError, match=r"fields once, in .*encoder\.json, got 'image_size' more than once"):
        read_onnx(path)


def two_outputs(model: Any) -> None:
    model.graph.output.append(helper.make_tensor_value_info("Flatten3", TensorProto.FLOAT, ["B", WIDTH]))


def two_inputs(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["B", 1]))


def of_a_runtime(model: Any) -> None:
    model.graph.node[1].op_type, model.graph.node[1].domain = "QuickGelu", "com.microsoft"


def with_a_condition(model: Any) -> None:
    attribute = helper.make_attribute("then_branch", helper.make_graph([], "then", [], []))
    model.graph.node[0].attribute.append(attribute)


def in_float64(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def declares(*shape: Any) -> Callable[[Any], None]:
    def declare(model: Any) -> None:
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("plain", TensorProto.FLOAT, shape))

    return declare


@pytest.mark.parametrize(
    ("model", "change", "told"),
    [
        (encoder_model(), two_outputs, r"one output, or its name as output in encoder\.json.*\['plain', 'Flatten3'\]"),
        (encoder_model(), two_inputs, r"one input.*\['pixels', 'mask'\]; export the image encoder alone"),
        (encoder_model(), of_a_runtime, r"operators of ai\.onnx, which every.*com\.microsoft\.QuickGelu"),
        (encoder_model(), with_a_condition, "without conditions"),
        (encoder_model(), in_float64, "the input 'pixels' in float32.* in type 11"),
        (encoder_model(), declares("B", WIDTH, 1, 1), rf"a Flatten.* got \['B', {WIDTH}, 1, 1\]"),
        (encoder_model(), declares("B", 0), r"shape \(B, D\).* got \['B', 0\]"),
        (encoder_model(shape=["B", 3, 0, SIZE]), None, r"the input 'pixels' in float32.* got \['B', 3, 0, 16\]"),
        (encoder_model(shape=[1, *SHAPE[1:]]), None, r"for batches of any size B.* got \[1, 3, 16, 16\]"),
        (encoder_model(shape=["B", SIZE, SIZE, 3]), None, r"shape \(B, 3, 16, 16\)"),
    ],
)
def test_graphs_that_can_not_become_engines_are_refused_before_they_run(
    model: Any, change: Any, told: str, tmp_path: Path
) -> None:
    if change is not None:
        change(model)
    with pytest.raises(IosrFastError, match=told):
        read_onnx(write_encoder(tmp_path / "encoder.onnx", model))


def test_what_a_graph_does_not_declare_is_found_by_a_run(tmp_path: Path) -> None:
    path, out = tmp_path / "encoder.onnx", tmp_path / "engine"
    for model, told in (
        (encoder_model(LAYERS[:3]), rf"an output of shape \(B, D\).* got \(3, {WIDTH}, 1, 1\)"),
        (encoder_model(("Conv", "MatMul")), "ONNX Runtime can't run it on 3 pictures"),
    ):
        with pytest.raises(IosrFastError, match=told):
            write_engine(read_onnx(write_encoder(path, model)), out, "onnxruntime")
    path.write_bytes(b"no graph")
    with pytest.raises(IosrFastError, match=r"expected an ONNX model in .*encoder\.onnx"):
        read_onnx(path)
    assert not out.exists()


def ending(kind: str, *inputs: Any, **options: Any) -> Any:
    """An encoder that ends in a layer of this kind, on the features and constants."""
    model = encoder_model()
    model.graph.node[-1].output[0] = "features"
    names = [f"constant{i}" for i in range(len(inputs))]
    model.graph.initializer.extend(map(numpy_helper.from_array, inputs, names))
    model.graph.node.append(helper.make_node(kind, ["features", *names], ["plain"], **options))
    return model


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (ending("Mul", np.float32(0)), "got a row of zeros"),
        (ending("Add", np.float32([np.nan] + [0] * (WIDTH - 1))), "got NaN or infinite numbers"),
        (ending("CumSum", np.int64(0)), "got rows that differ by 0.* with the place or the other pictures"),
        (ending("LpNormalization", axis=0), "got rows that differ"),
        (ending("Slice", np.int64([0]), np.int64([0]), np.int64([1])), r"D from 1 to 65,536, in .* got \(3, 0\)"),
        (ending("Slice", np.int64([0]), np.int64([4]), np.int64([0])), rf"6 rows here, .* got \(4, {WIDTH}\)"),
    ],
    ids=["zeros", "nan", "place", "neighbours", "width", "batch"],
)
def test_a_row_is_of_its_picture_alone(model: Any, told: str, tmp_path: Path) -> None:
    source = read_onnx(write_encoder(tmp_path / "encoder.onnx", model))
    with pytest.raises(IosrFastError, match=told):
        write_engine(source, tmp_path / "engine", "onnxruntime")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("of_a_node", [False, True])
@pytest.mark.parametrize("place", ["../secret", "{secret}", "link", "folder/weights", "..", "", "hidden"])
def test_no_weights_are_read_from_elsewhere(place: str, of_a_node: bool, tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    (folder / "folder").mkdir(parents=True)
    secret.write_bytes(bytes(10_000))
    (folder / "folder" / "weights").write_bytes(bytes(10_000))
    (folder / "link").symlink_to(secret)
    path = write_encoder(folder / "encoder.onnx", **BESIDE)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location" and place != "hidden":
            entry.value = place.format(secret=secret)
    if place == "hidden":  # behind the name of a file that may be read: readers differ in which of two they take
        model.graph.initializer[0].external_data.add(key="location", value="../secret")
    if of_a_node:
        weight = model.graph.initializer.pop(0)
        model.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], value=weight))
    path.write_bytes(model.SerializeToString())
    told = "got 'location' more" if place == "hidden" else "weights in files of the same folder, which are no links"
    with pytest.raises(IosrFastError, match=told):
        read_onnx(path)


def test_one_of_several_outputs_is_an_engine_of_what_it_needs(tmp_path: Path) -> None:
    model = encoder_model()
    two_outputs(model)
    path = write_encoder(tmp_path / "encoder.onnx", model, {**FACTS, "output": "Flatten3"})
    write_engine(read_onnx(path), tmp_path / "engine", "onnxruntime")
    graph = onnx.load(tmp_path / "engine" / "encoder.onnx").graph
    assert [value.name for value in graph.output] == ["plain"] and "MatMul" not in {node.op_type for node in graph.node}


def test_8_bits_are_for_encoders_with_products(tmp_path: Path) -> None:
    """Convolutions alone are refused before any work, and left out of the candidates."""
    reasons, models = {}, {}
    for name, layers in (("products", LAYERS), ("convolutions", CONVOLUTIONS), ("one product", LAYERS[:5])):
        model = models[name] = read_onnx(write_encoder(tmp_path / f"{name}.onnx", encoder_model(layers)))
        folder = tmp_path / name
        write_engine(model, folder, "onnxruntime")
        listed = list_candidates(open_verified(folder, "engine"), 16, "onnxruntime")
        (reasons[name],) = [one.left_out for one in listed if one.precision == "int8"]
        if reasons[name]:
            told = "expected fp32 or bf16 for .*onnx, got int8: 8 bits are for products with constant matrices"
            with pytest.raises(IosrFastError, match=told):
                write_engine(model, tmp_path / "int8", "onnxruntime", "int8")
            with pytest.raises(IosrFastError, match=told):
                write_engine(EngineSource(folder), tmp_path / "int8", "onnxruntime", "int8")
    assert "convolutions alone" in reasons["convolutions"] and reasons["one product"] == reasons["convolutions"]
    assert reasons["products"] == ""
    given = tmp_path / "int8", "openvino", "int8"
    manifest = write_engine(models["products"], *given, pictures=random_pixels(16, SIZE))
    assert manifest["quantised"]["products"] == 2
    converted = write_engine(EngineSource(tmp_path / "products"), *given, pictures=random_pixels(16, SIZE))
    assert converted["fingerprint"] == manifest["fingerprint"]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder with products in a file, and the engines' cache beside it."""
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    return write_encoder(tmp_path / "model" / "encoder.onnx", **BESIDE)


PICTURES = [picture // (1 + 3 * (i % 2)) for i, picture in enumerate(random_pixels(16, SIZE))]
KINDS = ["bright", "dark"] * 8


@pytest.mark.slow
def test_a_classifier_on_a_file_needs_no_torch(cached: Path, tmp_path: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "timm", "open_clip")))
import numpy as np
from iosr_fast import Classifier
pictures = np.load(sys.argv[1])
classifier = Classifier(sys.argv[2], precision="auto").fit(pictures, ["bright", "dark"] * 8)
print(classifier.get_params()["model"] == sys.argv[2], classifier.engine_choice_ is not None)
classifier.save(sys.argv[3])
classifier.export(sys.argv[3] + ".onnx")
loaded = Classifier.load(sys.argv[3])
loaded.add_class("grey", [np.full((20, 30, 3), 99, np.uint8)])
print(*loaded.predict(pictures[:4]), *loaded.predict(np.full((20, 30, 3), 99, np.uint8)))
"""
    np.save(tmp_path / "pictures.npy", PICTURES)
    printed_lines = printed(code, str(tmp_path / "pictures.npy"), str(cached), str(tmp_path / "saved")).splitlines()
    assert printed_lines == ["True True", "bright dark bright dark grey"]


def test_a_classifier_opens_a_file_again_when_it_or_its_facts_change(cached: Path) -> None:
    first = Classifier(cached).encoder
    assert Classifier(str(cached), runtime="auto").encoder is first
    cached.with_suffix(".json").write_text(json.dumps({**FACTS, "std": [0.5, 0.5, 0.5]}))
    second = Classifier(cached).encoder
    assert second.fingerprint != first.fingerprint
    (cached.parent / "dangling").symlink_to("nothing")
    assert Classifier(cached).encoder is second  # of other files nothing depends
    weights, times = cached.with_suffix(".bin"), cached.with_suffix(".bin").stat()
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Classifier(cached).encoder.fingerprint != second.fingerprint
    weights.rename(cached.with_suffix(".moved"))
    with pytest.raises(FileNotFoundError, match=r"expected weights of encoder\.onnx in .*encoder\.bin, found no such"):
        Classifier(cached).encoder  # noqa: B018  # which is opened by its name
    cached.with_suffix(".moved").rename(weights)
    second = Classifier(cached).encoder
    for options, told in (
        ({"pretrained": "openai"}, r"encoder\.onnx has weights of its own: expected no pretrained"),
        ({"adapter": "adapter.safetensors"}, "expected a CLIP for an adapter, got .*encoder.onnx"),
        ({"precision": "fp16"}, "expected fp32, bf16 or int8"),
        ({"precision": "int8"}, "--calibration DIR"),
        ({"method": "zero-shot"}, "zero-shot"),
        ({"templates": ["a {}"]}, "no text encoder"),
        ({"engine": second.source.folder, "model": write_encoder(cached)}, "that the engine was built from"),
    ):
        with pytest.raises(IosrFastError, match=told):
            Classifier(**{"model": cached, **options}).fit(PICTURES, KINDS)


@pytest.mark.slow
def test_build_engine_makes_an_int8_engine_of_a_file(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    words = ("build-engine", "--model", cached, "--out", tmp_path / "engine", "--precision", "int8", "--calibration")
    assert "encoder.onnx int8 for" in done(*words, tmp_path / "pictures")
    classifier = Classifier(cached, engine=tmp_path / "engine", method="tip-adapter").fit(PICTURES, KINDS)
    assert classifier.predict(PICTURES).tolist() == KINDS
    write_encoder(cached, encoder_model(CONVOLUTIONS))
    assert "convolutions alone" in refused(*words, tmp_path / "none")  # before pictures are read
