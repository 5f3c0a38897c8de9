"""Engine folders: right numbers in every precision, what is recorded, fingerprints, written whole or not at all."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from iosr_fast.backbones.adapter import random_adapter
from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.backbones.fuse import build_dual_encoder
from iosr_fast.backbones.load import load_clip
from iosr_fast.delivery.engine_choice import EngineCandidate
from iosr_fast.encoders.engine_folder import ENGINE_KIND
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export import candidates
from iosr_fast.export.build import write_engine
from iosr_fast.export.candidates import Candidate, CandidateBuilder, with_smaller_images
from iosr_fast.export.check import MIN_COSINES, check
from iosr_fast.export.onnx import export_onnx
from iosr_fast.export.precision import engine_fingerprint
from iosr_fast.export.pretrained import choose_adapter
from iosr_fast.export.quantize.calibration import quantisation
from iosr_fast.export.source import EngineSource, source_of
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.sealed.manifest import read_manifest
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.utils.machine import Gpu
from tests.backbones.small_clip import random_pixels, small_clip
from tests.demo_cache import demo_engine
from tests.export.graphs import FLOAT, FLOAT16, element_types
from tests.store.manifests import rewrite_manifest

pytestmark = [pytest.mark.usefixtures("exports_once"), pytest.mark.slow]


@pytest.fixture(scope="module")
def generic() -> np.ndarray:
    return load_pictures("generic").images[:64]


@pytest.mark.parametrize("family", ["vit", "siglip", "pe-core", "eva02"])
def test_fp16_graphs_keep_softmax_and_layer_norm_in_fp32(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Squares and exponentials overflow in fp16. The families have each form of attention and each pool."""
    from tests.backbones.families import family_clip

    clip, path = family_clip(family), tmp_path / "encoder.onnx"
    encoder = build_dual_encoder(clip, random_adapter(clip, 1), "fp16")
    export_onnx(encoder, path)
    assert capfd.readouterr() == ("", "")
    assert b".py" not in path.read_bytes(), "the graph names local paths"
    model, types = onnx.load(path, load_external_data=False), element_types(path)
    assert all(len(t.raw_data) <= 1024 for t in model.graph.initializer), "protobuf's messages have at most 2 GB"
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    nodes: dict[str, list[Any]] = {}
    for node in model.graph.node:
        nodes.setdefault(node.op_type, []).append(node)
    for kind in ("Softmax", "LayerNormalization", "ReduceMean", "ReduceL2", "ReduceSum", "Pow", "Exp", "Sqrt"):
        assert all(types[node.input[0]] == FLOAT for node in nodes.get(kind, [])), kind
    for kind in ("MatMul", "Gemm", "Gelu"):
        assert all(types[node.input[0]] == FLOAT16 for node in nodes.get(kind, [])), kind
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(nodes["LayerNormalization"]) == len(norms), "a LayerNorm is decomposed"
    assert len(nodes["Softmax"]) == 3 + (family in ("siglip", "pe-core"))
    assert [types[value.name] for value in model.graph.output] == [FLOAT, FLOAT]


@pytest.mark.parametrize("image_size", [None, 24])
@pytest.mark.parametrize(("runtime", "precision"), [("onnxruntime", "fp32"), ("torch", "fp16")])
def test_an_engine_is_checked_and_recorded(
    runtime: str, precision: str, image_size: int | None, tmp_path: Path
) -> None:
    clip, side = small_clip(), image_size or 32
    adapter, folder = random_adapter(clip, 1), tmp_path / "engine"
    manifest = write_engine(
        source_of(clip, adapter, image_size), folder, runtime, precision, 4, random_pixels(20, side)
    )
    assert read_manifest(folder, "engine") == manifest and [path.name for path in tmp_path.iterdir()] == ["engine"]
    tokens = None if image_size is None else {"image_size": image_size}
    expected = {"runtime": runtime, "precision": precision, "max_batch": 4, "image_size": side, "tokens": tokens}
    expected |= {"adapter": "random", "first_adapted_block": 1, "clip_fingerprint": clip.fingerprint}
    expected["fingerprint"] = engine_fingerprint(clip.fingerprint, adapter.fingerprint(), precision, tokens=tokens)
    assert {name: manifest.get(name) for name in expected} == expected
    assert list(manifest["check"]) == ([runtime] if runtime == "torch" else [runtime, f"{runtime}, plain.onnx"])
    for kind, pictures in (("random", 3), ("real", 8)):
        found = manifest["check"][runtime][kind]
        assert found["pictures"] == pictures
        for name in ("plain", "adapted"):
            assert found[name]["min_cosine"] > 0.9999
            assert 0 < found[name]["max_abs_error"] < (1e-5 if precision == "fp32" else 5e-3)
    assert open_engine(folder, runtime).encode(random_pixels(3, side)).plain.shape == (3, 24)


def test_the_fingerprint_follows_what_changes_embeddings_and_is_that_of_earlier_versions() -> None:
    black, white = np.zeros((8, 32, 32, 3), np.uint8), np.full((8, 32, 32, 3), 255, np.uint8)
    given = (("onnxruntime", "int8", black), ("onnxruntime", "int8", white), ("tensorrt", "int8", black))
    quantised = [quantisation(32, *one) for one in given]
    prints = [
        *(engine_fingerprint(*names, "fp32") for names in (("clip", None), ("other", None), ("clip", "adapter"))),
        *(engine_fingerprint("clip", None, "int8", one) for one in quantised),
        engine_fingerprint("clip", None, "fp16"),
        engine_fingerprint("clip", None, "fp32", None, {"image_size": 24}),
    ]
    assert len(set(prints)) == len(prints)
    assert quantisation(32, "openvino", "int8", black) == quantised[0]
    assert prints[0] == "f61e16e233f5688912f823b03215489d8e2a272a0fbbf9f9aa3e1c0e70d87338"
    facts = {"form": "u8s8", "calibration_sha256": "00", "version": 3}
    last = engine_fingerprint("clip", "adapter", "int8", facts, {"image_size": 192})
    assert last == "87ec6ab55a4550b02621599dfa2eee80a83b4ab3cde09e4b694568ea157f4148"


def slightly_wrong(*arguments: Any, build: Any = build_dual_encoder) -> Any:
    encoder = build(*arguments)
    encoder.cls_token.data[..., 0] += 5  # one channel: ln_pre would take a shift of all of them out again
    return encoder


def test_wrong_numbers_are_not_written(generic: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = demo_engine()  # built before anything is wrong
    monkeypatch.setattr("iosr_fast.backbones.fuse.build_dual_encoder", slightly_wrong)
    for precision in ("fp32", "fp16"):
        with pytest.raises(ArithmeticError, match="plain embeddings of random pictures by torch"):
            write_engine(source_of(small_clip()), tmp_path / "engine", "torch", precision)
    monkeypatch.setattr("iosr_fast.export.build.checked_pictures", lambda *_: {"real": generic[:8]})
    with pytest.raises(ArithmeticError, match=r"in int8 are wrong: expected cosine >= 0\.99"):
        write_engine(
            EngineSource(source), tmp_path / "engine", "onnxruntime", "int8", pictures=np.zeros_like(generic[:8])
        )
    assert list(tmp_path.iterdir()) == []


def test_a_candidate_that_is_not_exact_is_no_fault_of_the_user(
    generic: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(MIN_COSINES, "int8", 1.1)
    caplog.set_level(logging.INFO, "iosr_fast")
    builder = CandidateBuilder(open_verified(demo_engine(), ENGINE_KIND), generic[:16])
    with pytest.raises(ArithmeticError, match=r"^onnxruntime int8 changes embeddings too much on this processor$"):
        builder.open(Candidate("onnxruntime", "int8"))
    builder.close()
    assert "onnxruntime int8 is not taken: plain embeddings of real pictures" in caplog.text
    row = EngineCandidate(runtime="onnxruntime", precision="int8", verdict="rejected", reason="it is off")
    assert row.cells()[-1] == "not taken: it is off"


def test_one_picture_alone_is_checked_like_a_batch() -> None:
    """A plan of TensorRT has a profile of its own for it."""
    right = np.eye(3, dtype=np.float32)

    class WrongAlone(BatchedEncoder):
        def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
            return (right if len(pixels) == 3 else right[1:2],)

    facts = {"image_size": 32, "width": 3, "fingerprint": "", "max_batch": 4, "first_adapted_block": None}
    with pytest.raises(ArithmeticError, match="plain embeddings of random pictures by onnxruntime in fp32 are wrong"):
        check(WrongAlone(facts, "onnxruntime"), {"random": (random_pixels(3, 32), (right,))}, "fp32")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_batch": 0}, "max_batch from 1 to 65536"),
        ({"runtime": "tvm"}, "got 'tvm'"),
        ({"precision": "int4"}, "expected a precision of .* got 'int4'"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, r"\['openvino', 'torch'\], which compute in bf16"),
        ({"runtime": "onnxruntime", "precision": "int8"}, "expected calibration pictures as uint8 .* int8, got none"),
        ({"precision": "int8", "pictures": np.zeros((4, 31, 32, 3), "u1")}, r"got uint8 \(4, 31, 32, 3\)"),
        ({"image_size": 20}, "a multiple of 8"),
    ],
)
def test_refusals_come_before_any_work(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        size = given.pop("image_size", None)
        write_engine(source_of(small_clip(), image_size=size), tmp_path / "engine", **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("runtime", "precision"), [("onnxruntime", "int8"), ("openvino", "bf16")])
def test_an_engine_becomes_one_in_another_precision(
    runtime: str, precision: str, generic: np.ndarray, tmp_path: Path
) -> None:
    manifest = write_engine(EngineSource(demo_engine()), tmp_path / "engine", runtime, precision, pictures=generic[:32])
    assert manifest == read_manifest(tmp_path / "engine", "engine")
    assert list(manifest["check"]) == [runtime, f"{runtime}, plain.onnx"]
    source = read_manifest(demo_engine(), "engine")
    same = ("model", "width", "clip_fingerprint", "adapter_fingerprint", "dual_encoder", "max_batch", "export_version")
    assert all(manifest[name] == source[name] for name in same)
    quantised = quantisation(64, runtime, precision, generic[:32])
    prints = source["clip_fingerprint"], source["adapter_fingerprint"]
    assert manifest["fingerprint"] == engine_fingerprint(*prints, precision, quantised)
    got, exact = (open_engine(folder).encode(generic[32:40]) for folder in (tmp_path / "engine", demo_engine()))
    assert (got.plain * exact.plain).sum(1).min() > 0.99 and (got.adapted * exact.adapted).sum(1).min() > 0.99
    new, old = (sum(entry["bytes"] for entry in m["files"].values()) for m in (manifest, source))
    assert new < 0.5 * old if precision == "int8" else new == old
    with pytest.raises(IosrFastError, match=f"an engine in fp32 with encoder.onnx to convert, got one in {precision}"):
        write_engine(EngineSource(tmp_path / "engine"), tmp_path / "new", "openvino", "fp32")


@pytest.mark.parametrize(
    ("runtime", "precision", "count", "message"),
    [
        ("onnxruntime", "int8", 0, r"N >= 8 for int8, got uint8 \(0, 64, 64, 3\)"),
        ("onnxruntime", "fp16", 8, "exported from the CLIP: iosr-fast build-engine --precision fp16"),
    ],
)
def test_refused_conversions(
    runtime: str, precision: str, count: int, message: str, generic: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(IosrFastError, match=message):
        write_engine(EngineSource(demo_engine()), tmp_path / "new", runtime, precision, pictures=generic[:count])
    assert list(tmp_path.iterdir()) == []


def test_fp8_is_tried_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "unavailable_reason", lambda runtime: None)
    source = open_verified(demo_engine(), ENGINE_KIND)
    for capability, reason in (((8, 9), ""), ((8, 6), "NVIDIA A10 has no fp8 instructions"), (None, None)):
        gpu = None if capability is None else Gpu("NVIDIA A10", capability)
        monkeypatch.setattr(candidates, "this_gpu", lambda gpu=gpu: gpu)
        listed = candidates.list_candidates(source, 16, "auto", "fp8", with_clip=True)
        expected = [] if gpu is None else [("tensorrt", reason), ("tensorrt_rtx", reason)]
        assert [(one.runtime, one.left_out) for one in listed] == expected


def test_an_engine_for_smaller_pictures_becomes_one_in_int8(tmp_path: Path) -> None:
    """In a size that `iosr-fast optimize --smaller-images` tries, whose test shares the exports."""
    clip, size = load_clip("demo"), 48
    write = partial(write_engine, source_of(clip, choose_adapter(clip, "auto"), size))
    manifest = write(tmp_path / "engine", "onnxruntime")
    (one, _) = with_smaller_images(open_verified(demo_engine(), "engine"), [Candidate("onnxruntime", "fp32")])
    assert manifest["tokens"] == {"image_size": size} and one.tokens is not None
    generic = to_pixels(load_pictures("generic").images[:16], Geometry(size), False)
    converted = write_engine(EngineSource(tmp_path / "engine"), tmp_path / "int8", "openvino", "int8", pictures=generic)
    direct = write(tmp_path / "direct", "openvino", "int8", pictures=generic)
    assert converted["fingerprint"] == direct["fingerprint"] != manifest["fingerprint"]
    assert open_engine(tmp_path / "int8").image_size == size


def test_an_engine_that_merges_tokens_is_refused_and_one_of_version_0_2_opens(tmp_path: Path) -> None:
    clip = small_clip()
    facts = write_engine(source_of(clip, random_adapter(clip, 1)), tmp_path / "engine", "torch", max_batch=4)
    rewrite_manifest(tmp_path / "engine", dual_encoder=facts["dual_encoder"] | {"merged": 0})
    assert open_engine(tmp_path / "engine", "torch").encode(random_pixels(2, 32)).plain.shape == (2, 24)
    rewrite_manifest(tmp_path / "engine", dual_encoder=facts["dual_encoder"] | {"merged": 3})
    with pytest.raises(IosrFastError, match="merges tokens, which iosr_fast no longer does: build it again"):
        open_engine(tmp_path / "engine", "torch")
