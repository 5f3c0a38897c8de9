"""A saved classifier exported to Triton: the repository is executed as its configurations say, and agrees with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")
pytest.importorskip("onnxruntime", reason="onnxruntime comes with the triton-server extra")
pytest.importorskip("tritonclient.grpc", reason="tritonclient comes with the triton-server extra")

from tritonclient.grpc import model_config_pb2 as schema

from iosr_fast import Classifier, IosrFastError
from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.text_encoder import TextSource
from iosr_fast.export.pretrained import open_pretrained
from iosr_fast.serving.triton import export_triton, graph, repository
from iosr_fast.serving.triton.configs import choose_plans
from iosr_fast.utils.manifest import read_manifest, write_manifest
from tests.serving.triton_repository import Repository
from tests.state.live_parts import refit

CLASSES = 8
SCORES = ("LOGITS", "PROBABILITIES", "ZERO_SHOT", "CACHE")
FITS = {
    "zero-shot": {"method": "zero-shot", "tune": "none"},
    "tip-adapter": {"method": "tip-adapter", "tune": "none"},
    "tip-adapter++ of int8 keys": {"method": "tip-adapter++", "tune": "none", "key_precision": "int8"},
    "tip-adapter of bf16 keys": {"method": "tip-adapter", "tune": "none", "key_precision": "bf16", "reducer": "pca"},
    "tip-x": {"method": "tip-x", "tune": "none", "reducer": "centre"},
    "ape++": {"method": "ape++", "tune": "none", "reducer": "pca:16"},
    "gda": {"method": "gda", "tune": "none", "reducer": "centre"},
    "gda++": {"method": "gda++", "tune": "none"},
    "proker": {"method": "proker", "tune": "none", "reducer": "pca"},
    "proker++ of fp16 keys": {"method": "proker++", "key_precision": "fp16", "tune": "none"},
}


class KnownTexts:
    """A text encoder that is asked once for the same names, and leaves nothing in a bundle: both would take longer
    than all the rest here."""

    def __init__(self, text: TextSource) -> None:
        self._text = text
        self._known: dict[tuple[str, ...], np.ndarray] = {}

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        if tuple(names) not in self._known:
            self._known[tuple(names)] = self._text.embed_classes(names, templates)
        return self._known[tuple(names)]

    def write(self, folder: Path) -> None:
        return None


class Demo:
    """Support and query pictures of some held-out concepts, and a classifier of them in the folder `bundle`."""

    def __init__(self, bundle: Path) -> None:
        pictures = load_pictures("held-out", min_styles=5)
        chosen = np.linspace(0, len(pictures.names) - 1, CLASSES).astype(int)
        rows = [np.flatnonzero(pictures.concepts == concept) for concept in chosen]
        support = np.concatenate([row[: 2 + i % 2] for i, row in enumerate(rows)])  # classes of two sizes
        self.images, self.labels = pictures.images[support], np.searchsorted(chosen, pictures.concepts[support])
        self.queries = pictures.images[np.concatenate([row[3:5] for row in rows])]
        self.names = [pictures.names[concept] for concept in chosen]
        clip = open_pretrained("demo", None, "auto", "onnxruntime", "fp32", None)
        self.classifier = Classifier._with_clip(replace(clip, text=KnownTexts(clip.text)))
        self.bundle = bundle
        self.save(bundle, method="ape++", tune="none")

    def save(self, folder: Path, names: list[str] | None = None, **options: object) -> Classifier:
        refit(self.classifier, self.images, self.labels, names or self.names, views=1, **options)
        self.classifier.save(folder)
        return self.classifier


@pytest.fixture(scope="module")
def demo(demo_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IOSR_FAST_CACHE", str(demo_cache))
        return Demo(tmp_path_factory.mktemp("saved") / "bundle")


@pytest.fixture
def bundle(demo: Demo) -> Path:
    return demo.bundle


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_the_ensemble_says_what_the_classifier_says(name: str, demo: Demo, tmp_path: Path) -> None:
    classifier = demo.save(tmp_path / "bundle", **FITS[name])
    export_triton(tmp_path / "bundle", tmp_path / "models", max_batch=len(demo.queries))
    models = Repository(tmp_path / "models")
    # As they are, and larger: one request has pictures of one size.
    large = [Image.fromarray(query).resize((217, 150), Image.Resampling.LANCZOS) for query in demo.queries]
    for pictures in (list(demo.queries), large):
        made = models.infer("iosr_fast", {"IMAGE": np.stack([np.asarray(picture) for picture in pictures])})
        logits = classifier.decision_function(pictures)
        np.testing.assert_allclose(made["LOGITS"], logits, atol=1e-3 * np.abs(logits).max())
        np.testing.assert_array_equal(made["LOGITS"].argmax(1), logits.argmax(1))
        np.testing.assert_allclose(made["PROBABILITIES"], classifier.predict_proba(pictures), atol=2e-3)
        np.testing.assert_allclose(made["ZERO_SHOT"] + made["CACHE"], made["LOGITS"], atol=1e-4)
        for row, prediction in zip(range(len(pictures)), classifier.explain(pictures), strict=True):
            best = made["LOGITS"][row].argmax()
            assert demo.names[best] == prediction.label
            assert made["ZERO_SHOT"][row, best] == pytest.approx(prediction.zero_shot, rel=1e-2, abs=1e-2)
            assert made["CACHE"][row, best] == pytest.approx(prediction.cache, rel=1e-2, abs=1e-2)


@pytest.mark.slow
def test_what_is_written(bundle: Path, demo: Demo, tmp_path: Path) -> None:
    paths = export_triton(bundle, tmp_path / "models", max_batch=8, instances=3, top=20)
    written = {path.relative_to(tmp_path / "models").as_posix() for path in paths}
    assert written == {
        "README.txt",
        "manifest.json",
        "encoder/1/encoder.weights",
        "encoder/1/model.onnx",
        "encoder/config.pbtxt",
        "iosr_fast/1/ensemble.txt",
        "iosr_fast/config.pbtxt",
        "iosr_fast/labels.txt",
        "preprocess/1/model.onnx",
        "preprocess/config.pbtxt",
        "scoring/1/model.onnx",
        "scoring/config.pbtxt",
        "scoring/labels.txt",
    }
    assert all(path.is_file() for path in paths)
    manifest = read_manifest(tmp_path / "models", repository.KIND)
    assert manifest["check"]["logits_max_error"] < 1e-5 and manifest["max_batch"] == 8
    original = (bundle / "engine" / "encoder.onnx").read_bytes()
    assert (tmp_path / "models/encoder/1/model.onnx").read_bytes() == original
    weights = (bundle / "engine" / "encoder.weights").read_bytes()
    assert (tmp_path / "models/encoder/1/encoder.weights").read_bytes() == weights
    for name in ("scoring", "iosr_fast"):
        assert (tmp_path / "models" / name / "labels.txt").read_text("utf-8").splitlines() == demo.names
    models = Repository(tmp_path / "models")
    for name, config in models.configs.items():
        assert config.max_batch_size == 8 and config.version_policy.latest.num_versions == 1
        groups = [(group.count, group.kind) for group in config.instance_group]
        assert groups == ([] if name == "iosr_fast" else [(3, schema.ModelInstanceGroup.KIND_CPU)])
        assert not config.optimization.execution_accelerators.gpu_execution_accelerator
        labelled = {output.name for output in config.output if output.label_filename == "labels.txt"}
        assert labelled == (set(SCORES) if name in ("scoring", "iosr_fast") else set())
    for name in ("encoder", "scoring"):
        batching = models.configs[name].dynamic_batching
        assert list(batching.preferred_batch_size) == [4, 8] and batching.max_queue_delay_microseconds > 0
    assert models.warm_up() == [
        "encoder: batch of 8",
        "encoder: batch of 1",
        "preprocess: batch of 1",
        "scoring: batch of 8",
        "scoring: batch of 1",
    ]
    told = (tmp_path / "models/README.txt").read_text("utf-8")
    assert f"class_count={CLASSES}" in told and "--gpus" not in told and "up to 8 pictures" in told


@pytest.mark.parametrize("method", ["gda++", "tip-adapter"])
def test_the_ensemble_tells_unknown_pictures(method: str, demo: Demo, tmp_path: Path) -> None:
    classifier = demo.save(tmp_path / "bundle", method=method, tune="none")
    export_triton(tmp_path / "bundle", tmp_path / "models", max_batch=64, keep=0.9)
    models = Repository(tmp_path / "models")
    pictures = np.concatenate([demo.queries, load_pictures("held-out").images[100:1300:100]])
    made = models.infer("iosr_fast", {"IMAGE": pictures})
    scores = classifier.unknown_score(pictures)
    np.testing.assert_allclose(made["UNKNOWN_SCORE"][:, 0], scores, atol=2e-2)
    np.testing.assert_array_equal(made["LOGITS"].argmax(1), classifier.decision_function(pictures).argmax(1))
    parameters = models.configs["iosr_fast"].parameters
    limit = float(parameters["unknown_threshold"].string_value)
    assert limit == classifier.unknown_.threshold(0.9) and parameters["unknown_keep"].string_value == "0.9"
    assert 0 < (made["UNKNOWN_SCORE"] > limit).sum() < len(pictures)
    assert [name for name in models.warm_up() if name.startswith("unknown")] == [
        "unknown: batch of 64",
        "unknown: batch of 1",
    ]
    assert f"above {limit:.6g}, the parameter unknown_threshold" in (tmp_path / "models/README.txt").read_text("utf-8")
    manifest = read_manifest(tmp_path / "models", repository.KIND)
    assert (manifest["threshold"], manifest["keep"]) == (limit, 0.9) and manifest["check"]["unknown_max_error"] < 1e-3


def test_a_promise_that_needs_more_images_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(IosrFastError, match="needs at least 99 support images that can be left out, got 20"):
        export_triton(bundle, tmp_path / "models", keep=0.99)
    with pytest.raises(IosrFastError, match="expected keep above 0 and below 1"):
        export_triton(bundle, tmp_path / "models", keep=95)
    assert not (tmp_path / "models").exists()


def test_one_picture_at_a_time(bundle: Path, demo: Demo, tmp_path: Path) -> None:
    export_triton(bundle, tmp_path / "models", max_batch=1)
    models = Repository(tmp_path / "models")
    assert models.infer("iosr_fast", {"IMAGE": demo.queries[:1]})["LOGITS"].shape == (1, CLASSES)
    with pytest.raises(AssertionError):
        models.infer("iosr_fast", {"IMAGE": demo.queries[:2]})


def test_on_a_gpu_the_encoder_goes_through_tensorrt(bundle: Path, tmp_path: Path) -> None:
    export_triton(bundle, tmp_path / "models", gpu=True, instances=2)
    models = Repository(tmp_path / "models")
    kinds = {name: config.instance_group[0] for name, config in models.configs.items() if config.instance_group}
    group = schema.ModelInstanceGroup
    assert {name: (value.kind, value.count) for name, value in kinds.items()} == {
        "preprocess": (group.KIND_CPU, 8),  # the CUDA kernel of its Resize has a bug
        "encoder": (group.KIND_GPU, 2),
        "scoring": (group.KIND_GPU, 2),
    }
    accelerators = models.configs["encoder"].optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in accelerators] == ["tensorrt"]
    assert accelerators[0].parameters["precision_mode"] == "FP32"
    assert accelerators[0].parameters["trt_engine_cache_enable"] == "1"
    told = (tmp_path / "models/README.txt").read_text("utf-8")
    assert "--gpus all" in told and accelerators[0].parameters["trt_engine_cache_path"] in told


PLANS = {
    "plans/tensorrt-h100-10.9.plan": ("tensorrt", "10.9.0.34", "NVIDIA H100", "9.0"),
    "plans/tensorrt-h100-10.13.plan": ("tensorrt", "10.13.3.9", "NVIDIA H100", "9.0"),
    "plans/tensorrt-l4-10.13.plan": ("tensorrt", "10.13.3.9", "NVIDIA L4", "8.9"),
    "plans/tensorrt_rtx-any-1.7.plan": ("tensorrt_rtx", "1.7.1.116", None, None),
}


def reseal(folder: Path, kind: str, **facts: Any) -> None:
    """Write the manifest of a folder again, with these facts and the files that it now holds."""
    manifest = {**json.loads((folder / "manifest.json").read_bytes()), **facts}
    (folder / "manifest.json").unlink()
    for name in ("schema", "kind", "files", "checksum"):
        manifest.pop(name, None)
    write_manifest(folder, kind, manifest)


def with_plans(bundle: Path, names: list[str]) -> None:
    """Put files in the place of plans into a bundle's engine."""
    engine, plans = bundle / "engine", {}
    (engine / "plans").mkdir(exist_ok=True)
    for name in names:
        (engine / name).write_bytes(name.encode())
        facts = dict(zip(("runtime", "version", "gpu", "compute_capability"), PLANS[name], strict=True))
        plans[name] = {**facts, "profile": {"min": 1, "opt": 16, "max": 16}}
    reseal(engine, "engine", plans=plans)
    reseal(bundle, "classifier")


def test_plans_of_tensorrt_go_to_its_backend(demo: Demo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    demo.save(tmp_path / "bundle", method="gda", tune="none")
    with_plans(tmp_path / "bundle", list(PLANS))
    with pytest.raises(ValueError, match=r"max_batch of at most 16, which plans/tensorrt-\S+ was built for, got 32"):
        export_triton(tmp_path / "bundle", tmp_path / "models", gpu=True)
    assert not (tmp_path / "models").exists()
    caplog.clear()
    export_triton(tmp_path / "bundle", tmp_path / "models", gpu=True, max_batch=16)
    assert "plans/tensorrt_rtx-any-1.7.plan is a plan of tensorrt_rtx, which Triton" in caplog.text
    models = Repository(tmp_path / "models")
    config = models.configs["encoder_trt"]
    assert (config.backend, config.instance_group[0].kind) == ("tensorrt", schema.ModelInstanceGroup.KIND_GPU)
    assert dict(config.cc_model_filenames) == {"9.0": "tensorrt-h100-10.13.plan", "8.9": "tensorrt-l4-10.13.plan"}
    assert (tmp_path / "models/encoder_trt/1/tensorrt-l4-10.13.plan").read_bytes() == b"plans/tensorrt-l4-10.13.plan"
    steps = models.configs["iosr_fast"].ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["preprocess", "encoder_trt", "scoring"]
    # It takes what encoder takes, in whose place it stands; encoder itself prepares nothing then.
    encoder = models.configs["encoder"]
    assert list(config.input) == list(encoder.input) and list(config.output) == list(encoder.output)
    assert not encoder.model_warmup and not encoder.HasField("optimization")
    told = (tmp_path / "models/README.txt").read_text("utf-8")
    assert "for NVIDIA H100 with TensorRT 10.13.3.9 and for NVIDIA L4 with TensorRT 10.13.3.9" in told
    # Without gpu, plans are nobody's business.
    export_triton(tmp_path / "bundle", tmp_path / "models")
    assert "encoder_trt" not in Repository(tmp_path / "models").configs


def test_an_engine_with_plans_of_tensorrt_rtx_alone_goes_through_onnx_runtime(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = {"runtime": "tensorrt_rtx", "version": "1.7", "gpu": None, "compute_capability": None}
    assert choose_plans(tmp_path, {"plans": {"plans/rtx.plan": entry}, "max_batch": 8}, 32) == ()
    assert "plans/rtx.plan" in caplog.text
    assert choose_plans(tmp_path, {"max_batch": 8}, 32) == ()


def test_an_older_export_is_replaced_and_nothing_else_is(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    export_triton(bundle, out, max_batch=4)
    export_triton(bundle, out, max_batch=2)
    assert Repository(out).configs["iosr_fast"].max_batch_size == 2
    config = out / "encoder" / "config.pbtxt"
    written = config.read_text("utf-8")
    config.write_text(written + "# by hand\n", "utf-8")
    with pytest.raises(FileExistsError, match=r"contains 'encoder/config.pbtxt', added or changed"):
        export_triton(bundle, out)
    config.write_text(written, "utf-8")
    (out / "resnet" / "1").mkdir(parents=True)
    (out / "resnet" / "1" / "model.onnx").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match=r"contains 'resnet/1/model.onnx'"):
        export_triton(bundle, out)
    assert (out / "resnet" / "1" / "model.onnx").read_bytes() == b"somebody's"


def test_places_that_an_export_would_spoil(bundle: Path, demo: Demo, tmp_path: Path) -> None:
    demo.save(tmp_path / "other", method="zero-shot", tune="none")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"is not a complete export to Triton \(.*got a classifier\)"):
        export_triton(bundle, tmp_path / "other")
    for out in (bundle, bundle / "triton", bundle.parent):
        with pytest.raises(ValueError, match="one is in the other"):
            export_triton(bundle, out)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an export to Triton"):
        export_triton(bundle, tmp_path)
    with pytest.raises(FileExistsError, match="is not an export to Triton"):
        export_triton(bundle, tmp_path / "notes.txt")
    (tmp_path / "notes.txt").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_is_refused_and_nothing_written(
    bundle: Path, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "models"
    for option in ("max_batch", "instances", "top"):
        with pytest.raises(ValueError, match=f"expected {option} of at least 1, got 0"):
            export_triton(bundle, out, **{option: 0})
    with pytest.raises(FileNotFoundError, match=r"expected a folder with a manifest.json \(classifier\)"):
        export_triton(tmp_path / "nothing", out)
    with pytest.raises(ValueError, match="to hold a classifier, got a engine"):
        export_triton(bundle / "engine", out)
    monkeypatch.setattr(graph, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match="scoring graph under 2 GB"):
        export_triton(bundle, out)
    monkeypatch.undo()
    monkeypatch.setattr(repository, "_MAX_ERROR", -1.0)
    with pytest.raises(ArithmeticError, match=r"logits differ from iosr_fast.score by .*nothing was written"):
        export_triton(bundle, out)
    monkeypatch.undo()
    demo.save(tmp_path / "named", method="zero-shot", tune="none")
    reseal(tmp_path / "named", "classifier", class_names=["a\nb", *demo.names[1:]])  # no fit takes such a name
    with pytest.raises(ValueError, match=r"class names of one line each.*got 'a\\nb'"):
        export_triton(tmp_path / "named", out)
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["named"]


def test_an_engine_without_an_onnx_file_is_refused(demo: Demo, tmp_path: Path) -> None:
    demo.save(tmp_path / "bundle", method="zero-shot", tune="none")
    engine = tmp_path / "bundle" / "engine"
    (engine / "encoder.onnx").rename(engine / "encoder.safetensors")
    (engine / "encoder.weights").unlink()
    reseal(engine, "engine", runtime="torch")
    reseal(tmp_path / "bundle", "classifier")
    with pytest.raises(ValueError, match=r"runtimes this engine was built for.*\['torch'\], got 'onnxruntime'"):
        export_triton(tmp_path / "bundle", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_command(demo: Demo, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from iosr_fast.cli import app

    done = CliRunner().invoke(app, ["export-triton", str(demo.bundle), str(tmp_path / "models"), "--max-batch", "4"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "models" / "README.txt").read_text() in done.output
    assert Repository(tmp_path / "models").configs["encoder"].max_batch_size == 4
    refused = CliRunner().invoke(app, ["export-triton", str(tmp_path / "none"), str(tmp_path / "other")])
    assert refused.exit_code == 2 and "found none at" in refused.output and "Traceback" not in refused.output
