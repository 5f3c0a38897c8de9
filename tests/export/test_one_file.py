"""A classifier as one ONNX file: the answers are the library's, in every part and as a whole."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from iosr_fast import Classifier, Embeddings, FewShotHead
from iosr_fast.backbones.adapter import load_adapter
from iosr_fast.backbones.load import load_clip
from iosr_fast.delivery import one_file
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.build import write_engine
from iosr_fast.export.one_file import graph
from iosr_fast.export.one_file.graph import Answers, add_answers
from iosr_fast.export.one_file.logits import odds_of_largest
from iosr_fast.export.one_file.pixels import resized_pixels
from iosr_fast.export.one_file.value import Value
from iosr_fast.export.pretrained import DEMO_ADAPTER
from iosr_fast.export.source import EngineSource, source_of
from iosr_fast.images.geometry import INTERPOLATIONS, RESIZE_MODES, Geometry
from iosr_fast.images.pixels import VERSION
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.methods import METHODS
from iosr_fast.methods.automation import least_odds
from iosr_fast.methods.log_loss import log_odds_of_largest
from iosr_fast.methods.tree import Tree
from iosr_fast.scoring.key_precision import PRECISIONS
from iosr_fast.scoring.reference import score_reference, softmax
from iosr_fast.sealed.verified_folder import open_verified
from tests.cli.runs import done, never, refused
from tests.conftest import EXTENDED, random_embeddings, random_plan
from tests.demo_cache import demo_bundle, demo_engine
from tests.interpreter import printed
from tests.methods.support_sets import Clusters
from tests.serving.http_client import several_bundle, tagged
from tests.store.live_parts import with_tree
from tools.demo.bundle import held_out_queries

Outputs = dict[str, np.ndarray]
PROMISES: dict[str, Any] = {"max_error": 0.4, "unknown": "reject", "keep": 0.7}


def opened(model: Path | onnx.ModelProto, runtime: str = "onnxruntime") -> Callable[[Outputs], Outputs]:
    """What a runtime answers to named inputs, of which it takes those that it has."""
    model = onnx.load(model) if isinstance(model, Path) else model
    onnx.checker.check_model(model, full_check=True)
    names = [output.name for output in model.graph.output]
    content = model.SerializeToString()
    if runtime == "openvino":
        core = openvino_core()
        execute = core.compile_model(core.read_model(content, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    else:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        execute = lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))  # noqa: E731

    def run(inputs: Outputs) -> Outputs:
        values = execute({value.name: inputs[value.name] for value in model.graph.input})
        return {name: values[name] for name in names}

    return run


def as_model(made: Any) -> onnx.ModelProto:
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def answers_of(embeddings: Embeddings, answers: Answers) -> Outputs:
    """What the head's part of a file answers to embeddings."""
    made = onnx.GraphProto(name="head")
    inputs = {name: Value(made, name, np.float32) for name in ("plain", "adapted")}
    made.input.extend(value.info(embeddings.plain.shape[1]) for value in inputs.values())
    add_answers(answers, inputs)
    return opened(as_model(made))(vars(embeddings))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_the_resize_is_the_librarys_to_the_last_bit(mode: Any, interpolation: Any) -> None:
    """OpenVINO, which has no float64, is at most two levels off in a few pixels."""
    size = 37 if mode == "squash" else 32
    geometry = Geometry(size, mode, interpolation, fill=128 if mode == "longest" else 0)
    made = onnx.GraphProto(name="pixels")
    picture = Value(made, "picture", np.uint8)
    made.input.append(picture.info("height", "width", 3))
    made.output.append(resized_pixels(picture, geometry).op("Identity", name="pixels").info(size, size, 3))
    exact, single = (opened(as_model(made), runtime) for runtime in ("onnxruntime", "openvino"))
    rng = np.random.default_rng(0)
    shapes = ((size, size), (1, 1), (1, 90), (90, 1), (3, 2), (41, 37), (300, 31), (97, 613), (400, 300))
    for height, width in shapes:
        pictures = rng.integers(0, 256, (2, height, width, 3), np.uint8)
        pictures[1] = 255 * (pictures[1] > 127)
        expected = to_pixels(list(pictures), geometry)
        np.testing.assert_array_equal(exact({"picture": pictures})["pixels"], expected, f"{height} x {width}")
        off = np.abs(single({"picture": pictures})["pixels"].astype(int) - expected)
        assert off.max() <= 2 and (off > 0).mean() < 0.05, (height, width)


@pytest.mark.parametrize("kind", EXTENDED)
def test_logits_of_every_term_are_the_references(rng: np.random.Generator, kind: str) -> None:
    for precision in PRECISIONS if "cache" in EXTENDED[kind].get("terms", ("cache",)) else ("fp32",):
        plan = random_plan(rng, [3, 0, 5, 1], 24, precision=precision, **EXTENDED[kind])
        queries = random_embeddings(rng, 17, 24)
        expected = score_reference(plan, queries)
        got = answers_of(queries, Answers(plan, adapted=True))
        np.testing.assert_array_equal(got["label"], expected.argmax(1))
        np.testing.assert_allclose(got["probabilities"], softmax(expected), atol=1e-5)


def test_several_labels_are_the_same_by_file_folder_and_command(tmp_path: Path) -> None:
    """As by the library; tests.serving compares HTTP and batches with it."""
    classifier, photos = Classifier.load(several_bundle()), tmp_path / "photos"
    photos.mkdir()
    for i, content in enumerate(tagged()[2]):
        (photos / f"{i:02d}.png").write_bytes(content)
    paths = sorted(photos.iterdir())
    answers, probabilities = classifier.explain(paths, max_error=0.3), classifier.predict_proba(paths)
    accepted = [{*one.accepted_labels} for one in answers]
    expected = [{label for label, _ in one.pairs} for one in answers]
    assert {(len(one), len(ok)) for one, ok in zip(expected, accepted, strict=True)} >= {(0, 0), (1, 0), (1, 1), (2, 0)}
    classifier.export(tmp_path / "several.onnx", max_error=0.3)
    names = np.array(json.loads(onnx.load(tmp_path / "several.onnx").metadata_props[0].value))
    for runtime in ("onnxruntime", "openvino"):
        execute = opened(tmp_path / "several.onnx", runtime)
        got = [execute({"picture": np.asarray(Image.open(path))[None]}) for path in paths]
        assert list(got[0]) == ["probabilities", "labels", "accepted"]
        np.testing.assert_allclose([one["probabilities"][0] for one in got], probabilities, atol=5e-3)
        assert [{*names[one["labels"][0]]} for one in got] == expected
        assert [{*names[one["accepted"][0]]} for one in got] == accepted
    found = classifier.predict_folder(photos, max_error=0.3)
    assert found.paths == paths and [{*one} for one in found.labels] == accepted
    assert [{*one} for one in found.probabilities] == expected
    done("classify", several_bundle(), photos, "--max-error", "30%", "--out", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = [{name: text.split(";") if text else [] for name, text in row.items()} for row in csv.DictReader(file)]
    assert [{*row["labels"]} for row in rows] == expected
    passed = [{label for label, ok in zip(row["labels"], row["accepted"], strict=True) if ok == "true"} for row in rows]
    assert passed == accepted


@pytest.mark.parametrize("method", ["stack", "stack++", *METHODS])
def test_every_method_answers_as_the_library(method: str) -> None:
    """With promises and the score for unknown pictures, by texts and by pictures of no class, or without."""
    clusters = Clusters(8, noise=1.0, adapted=True)
    support, (queries, _) = clusters.support([4, 5, 3, 4, 1, 2]), clusters.queries(9)
    X, rows = (np.hstack([one.plain, one.adapted]) for one in (support.embeddings, queries))
    for k, reducer in enumerate(("none", "centre", "pca")):
        options = {} if method.startswith(("stack", "zero-shot")) else {"reducer": reducer}
        text = support.text if k != 1 or method not in ("stack", "tip-adapter", "gda", "proker") else None
        head = FewShotHead(method, tune="none", text=text, adapted=True, key_precision=PRECISIONS[k], **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head.fit(X, support.labels, unknown_images=rows[-9:] if k else None)
        assert isinstance(head, FewShotHead)
        promised = least_odds(head.snapshot().judged, 0.4)
        unknown, plan = head.unknown_, head.plan_.scaled(1.0 / head.snapshot().temperature)
        answers = Answers(plan, head.snapshot().needs_adapted, promised, unknown, unknown.threshold(0.7))
        got = answers_of(queries, answers)
        expected = head.explain(rows, **PROMISES)
        np.testing.assert_allclose(got["probabilities"], head.predict_proba(rows), atol=2e-5)
        np.testing.assert_array_equal(got["label"], head.predict(rows))
        np.testing.assert_array_equal(got["accepted"], [one.accepted for one in expected])
        np.testing.assert_array_equal(got["rejected"], [one.unknown.rejected for one in expected])
        np.testing.assert_allclose(got["unknown"], head.unknown_score(rows), atol=1e-4)


def test_odds_of_large_logits_are_finite_where_a_runtime_sums_exponentials_as_they_are() -> None:
    """As TensorRT 10 and OpenVINO 2025 do: the logarithm of ReduceSum(Exp(x)) stands for ReduceLogSumExp here."""
    made = onnx.GraphProto(name="odds")
    logits = Value(made, "logits", np.float32)
    made.input.append(logits.info(4))
    made.output.append(odds_of_largest(logits, 4).op("Identity", name="odds").info())
    nodes = list(made.node)
    del made.node[:]
    for node in nodes:
        parts = [node]
        if node.op_type == "ReduceLogSumExp":
            exponentials = onnx.helper.make_node("Exp", node.input[:1], ["exponentials"])
            sums = onnx.helper.make_node("ReduceSum", ["exponentials", node.input[1]], ["sums"], keepdims=0)
            parts = [exponentials, sums, onnx.helper.make_node("Log", ["sums"], node.output)]
        made.node.extend(parts)
    rows = np.random.default_rng(0).normal(0, 3, (20, 4)) + np.repeat([-300, -90, 0, 90, 300], 4)[:, None]
    got = opened(as_model(made))({"logits": rows.astype(np.float32)})["odds"]
    np.testing.assert_allclose(got, log_odds_of_largest(rows), atol=1e-3)


@pytest.mark.parametrize("scale", [0.1, 9.0])
def test_answers_with_nodes_are_those_of_the_tree(rng: np.random.Generator, scale: float) -> None:
    """Where probabilities are exactly 0 in float32, too."""
    tree = Tree(tuple((f"a{c // 8}", f"b{c // 4}")[: c % 3] for c in range(24)))
    plan, rows = random_plan(rng, [2] * 24, 24).scaled(scale), random_embeddings(rng, 300, 24)
    logits = score_reference(plan, rows)
    assert (softmax(logits.astype(np.float32)) == 0).any() == (scale > 1)
    (odds, _), given = tree.of_logits(logits), set[int]()
    for share in np.linspace(0.05, 0.95, 7):
        least = float(np.quantile(odds[:, -1], share)) + 1e-3
        labels, accepted = tree.answer(logits, least)
        got = answers_of(rows, Answers(plan, adapted=True, least_odds=least, tree=tree))
        np.testing.assert_array_equal(got["label"], labels)
        np.testing.assert_array_equal(got["accepted"], accepted)
        given |= {*tree.level_of[labels[accepted]].tolist()}
    assert given >= {0, 2}


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Of the demo, from 20 to 300 pixels, tall and wide."""
    rng = np.random.default_rng(0)
    sides = [(64, 64), *rng.integers(20, 300, (11, 2)).tolist()]
    images = held_out_queries(12, 3)[0]
    return [np.asarray(Image.fromarray(image).resize(side)) for image, side in zip(images, sides, strict=False)]


@pytest.mark.parametrize("method", ["tip-adapter++", "gda"])
@pytest.mark.parametrize("promises", [{}, PROMISES])
def test_a_file_answers_as_the_classifier(
    method: str, promises: dict[str, Any], pictures: list[np.ndarray], tmp_path: Path
) -> None:
    """With the adapted embeddings that it compares, or the plain graph; pictures of any size, one or several; nodes of
    a tree, if it has one."""
    classifier, file = Classifier.load(demo_bundle(12, 3, method)), tmp_path / "demo.onnx"
    if method == "gda":
        with_tree(classifier, [("left", f"pair {c // 2}") if c < 6 else () for c in range(12)])
    classifier.export(file, **promises)
    names = json.loads(onnx.load(file).metadata_props[0].value)
    assert len(names) == (16 if method == "gda" and promises else 12)
    expected = classifier.explain(pictures, top=1, **promises)
    for runtime in ("onnxruntime", "openvino"):
        execute = opened(file, runtime)
        for picture, one in zip(pictures, expected, strict=True):
            got = execute({"picture": np.stack([picture, picture])})
            assert names[got["label"][1]] == (one.label or one.top[0].label)
            np.testing.assert_allclose(got["probabilities"][1], classifier.predict_proba(picture)[0], atol=5e-3)
            if promises:
                assert got["accepted"][0] == one.accepted and got["rejected"][0] == one.unknown.rejected
                np.testing.assert_allclose(got["unknown"][0], one.unknown.score, atol=5e-3)
        assert list(got) == ["probabilities", "label", *(("accepted", "unknown", "rejected") if promises else ())]
    adapted = "adapted" in {name for node in onnx.load(file).graph.node for name in node.output}
    assert adapted == (method == "tip-adapter++")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fewer_bits_answer_alike_on_the_same_kernels_and_say_so(
    precision: str, pictures: list[np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = held_out_queries(12, 3)
    if precision == "int8":
        write_engine(
            EngineSource(open_verified(demo_engine(), "engine")),
            tmp_path / "engine",
            "onnxruntime",
            "int8",
            pictures=images,
        )
    else:
        pytest.importorskip("tensorrt_rtx")
        write_engine(
            source_of(load_clip("demo"), load_adapter(DEMO_ADAPTER)), tmp_path / "engine", "tensorrt_rtx", "fp16"
        )
    classifier = Classifier(
        "demo",
        engine=tmp_path / "engine",
        runtime="onnxruntime",
        precision=precision,
        method="tip-adapter++",
        look_alikes=False,
        exif_orientation=False,
    )
    classifier.fit(images, labels).save(tmp_path / "saved")
    done("export", tmp_path / "saved", tmp_path / "demo.onnx", "--pixels")
    assert f"is in {precision}, which processors and runtimes round differently" in caplog.text
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "demo.onnx").metadata_props}
    assert (facts["iosr_fast"]["precision"], facts["iosr_fast"]["exif_orientation"]) == (precision, False)
    pixels = to_pixels(pictures, Geometry(64))
    got = opened(tmp_path / "demo.onnx")({"pixels": pixels})
    expected = Classifier.load(tmp_path / "saved", runtime="onnxruntime")
    np.testing.assert_array_equal(expected.classes_[got["label"]], expected.predict(pixels))
    np.testing.assert_allclose(got["probabilities"], expected.predict_proba(pixels), atol=1e-3)


def test_the_metadata_say_what_the_answers_are_and_no_torch_is_needed(tmp_path: Path) -> None:
    bundle, file = demo_bundle(), tmp_path / "demo.onnx"
    code = """if True:
        import sys
        from iosr_fast.cli import app
        app(sys.argv[1:], standalone_mode=False)
        print("torch" in sys.modules)"""
    options = ("--max-error", "40%", "--reject-unknown")
    assert printed(code, "export", str(bundle), str(file), *options) == "False"
    texts = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    classifier, facts = Classifier.load(bundle), texts["iosr_fast"]
    assert texts["class_names"] == classifier.classes_.tolist()
    assert facts["max_error"] == 0.4 and facts["keep"] == 0.95 and facts["exif_orientation"]
    assert facts["promise"]["max_errors"] == classifier.automation().max_errors.tolist()
    assert facts["encoder_fingerprint"] == classifier.encoder.fingerprint and facts["head_version"] == 1
    assert facts["geometry"] == {"image_size": 64, "interpolation": "bicubic"} and facts["pixels"] == VERSION
    assert (facts["model"], facts["precision"], facts["weights_licence"]) == ("demo", "fp32", "MIT")
    assert set(facts["versions"]) == {"iosr_fast", "onnx"}


def test_a_file_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then, and where it can't be renamed, the earlier file stays, and nothing beside it; so does another's file."""
    file, classifier = tmp_path / "demo.onnx", Classifier.load(demo_bundle())
    onnx.save(onnx.ModelProto(producer_name="iosr_fast"), file)
    with pytest.raises(FileExistsError, match="does not say that iosr_fast wrote it"):
        classifier.export(file)
    file.unlink()
    classifier.export(file)
    earlier = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            graph, "resized_pixels", lambda picture, geometry: resized_pixels(picture, Geometry(64, "squash"))
        )
        with pytest.raises(ArithmeticError, match=r"output probabilities of pictures of 38 x 109 .* nothing was"):
            classifier.export(file)
    with monkeypatch.context() as patch:
        patch.setattr(one_file, "Answers", lambda *answers: Answers(*answers[:-1], np.full(5, 0.01, np.float32)))
        with pytest.raises(ArithmeticError, match="expected the output labels of pictures"):
            Classifier.load(several_bundle()).export(tmp_path / "several.onnx")
    monkeypatch.setattr("os.replace", never)
    with pytest.raises(AssertionError, match="work has begun"):
        classifier.export(file)
    assert file.read_bytes() == earlier and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "image"}, "expected source to be 'picture' or 'pixels', got 'image'"),
        ({"max_error": 0.01}, "needs at least 299 left-out support images, got 36"),
        ({"unknown": "reject", "keep": 0.999}, "needs at least 999 left-out support images, got 36"),
        ({"keep": 0.9}, "expected keep only with unknown='reject'"),
        ({"path": "demo.bin"}, "expected the name of the file to end in .onnx"),
    ],
)
def test_what_one_file_cannot_answer_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    classifier = Classifier.load(demo_bundle())
    with pytest.raises(ValueError, match=message):
        classifier.export(tmp_path / options.pop("path", "demo.onnx"), **options)


def test_what_has_no_graph_to_export_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_file, "make_graph", never)
    X, file = np.eye(6), tmp_path / "head.onnx"
    with pytest.raises(ValueError, match="not fitted"):
        Classifier("demo").export(file)
    FewShotHead(look_alikes=False).fit(X, list("aabbcc")).save(tmp_path / "rows")
    assert "on an encoder of an" in refused("export", tmp_path / "rows", file)
    engine = open_verified(demo_engine(), "engine")
    for change, message in (
        ({"files": {}}, f"an ONNX graph, got one for {engine.manifest['runtime']}: build it with runtime="),
        ({"manifest": {**engine.manifest, "precision": "bf16"}}, "expected an engine in fp32, fp16, int8, got bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            graph.check_engine_graph(replace(engine, **change))
    monkeypatch.setattr(graph, "MOST_BYTES", 1_000_000)
    with pytest.raises(ValueError, match=r"expected a model of at most 0\.0 GB, .* take a smaller model"):
        Classifier.load(demo_bundle()).export(file)
