"""export_triton: a saved classifier as a model repository of NVIDIA Triton Inference Server."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.classifier import Classifier
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.encoders.runtimes.engine import ENGINE_KIND
from iosr_fast.encoders.runtimes.onnxruntime import FILE as ONNX_FILE
from iosr_fast.encoders.runtimes.onnxruntime import WEIGHTS
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score
from iosr_fast.serving.triton import configs
from iosr_fast.serving.triton.configs import Served
from iosr_fast.serving.triton.graph import EXTRA
from iosr_fast.serving.triton.instructions import readme
from iosr_fast.serving.triton.plans import choose_plans
from iosr_fast.serving.triton.preprocess_graph import preprocess_model
from iosr_fast.serving.triton.scoring_graph import scoring_inputs, scoring_model
from iosr_fast.state.bundle import ENGINE
from iosr_fast.state.bundle import KIND as BUNDLE_KIND
from iosr_fast.utils.files import new_folder
from iosr_fast.utils.manifest import MANIFEST, read_manifest, sha256, write_manifest
from iosr_fast.utils.require import require
from iosr_fast.utils.text import abbreviate
from iosr_fast.utils.verified_folder import open_verified

KIND = "triton-repository"
README = "README.txt"
ONNX = "model.onnx"  # the name that the onnxruntime backend looks for
_CHECKED_ROWS = 16
_MAX_ERROR = 1e-4  # of the largest logit


def export_triton(
    bundle: str | Path,
    out: str | Path,
    *,
    max_batch: int = 32,
    instances: int = 1,
    gpu: bool = False,
    top: int = 5,
) -> list[Path]:
    """Write the classifier of `bundle` to `out` as a model repository, whole or not at all; returns its files.

        preprocess     IMAGE uint8 (B, H, W, 3) -> PIXELS uint8 (B, S, S, 3)     preprocess_graph.preprocess_model
        encoder        pixels -> plain, adapted float32 (B, D)                   the bundle's encoder.onnx
        encoder_trt    the same by a TensorRT plan, with `gpu` where the bundle has one; the ensemble then uses it
        scoring        PLAIN, ADAPTED -> LOGITS, PROBABILITIES, ZERO_SHOT, CACHE float32 (B, C)    scoring_graph
        iosr_fast      the ensemble of the three: IMAGE -> the four scores, with the class names as labels

    `max_batch` pictures at most go through a model at once; `instances` of each model work side by side. `gpu` puts
    encoder and scoring on GPUs, the encoder through TensorRT. `top` is the number of classes in README.txt's example.

    The scoring graph is compared with iosr_fast.score first. `out` may be an older export, which it replaces as long as
    nothing in it was added or changed. Needs the extra triton-server (onnx, onnxruntime, tritonclient).

    Raises FileNotFoundError or ValueError where `bundle` is no classifier, has no encoder.onnx or can't be served (a
    plan of 2 GB, a class name of two lines, a TensorRT plan for smaller batches), FileExistsError where `out` is
    something else, ArithmeticError where the graph's logits differ.
    """
    bundle, out = Path(bundle), Path(out)
    for name, number in (("max_batch", max_batch), ("instances", instances), ("top", top)):
        if number < 1:
            raise ValueError(f"expected {name} of at least 1, got {number}")
    for module in ("onnx", "onnxruntime", "tritonclient.grpc.model_config_pb2"):
        require(module, EXTRA)
    _check_places(bundle, out)
    held = open_verified(bundle, BUNDLE_KIND)
    classifier = Classifier.load(held, runtime="onnxruntime")
    engine = held.inner(ENGINE, ENGINE_KIND).manifest
    plan, labels = classifier.plan_, classifier.classes_.tolist()
    broken = [name for name in labels if len(name.splitlines()) > 1]
    if broken:
        raise ValueError(f"expected class names of one line each, as in a file of labels, got {abbreviate(broken)}")
    served = Served(
        image_size=engine["image_size"],
        width=engine["width"],
        adapted=engine["first_adapted_block"] is not None,
        precision=engine["precision"],
        n_classes=plan.n_classes,
        scoring_inputs=tuple(scoring_inputs(plan)),
        max_batch=max_batch,
        instances=instances,
        gpu=gpu,
        exif_orientation=classifier.exif_orientation,
        plans=choose_plans(classifier.engine, engine, max_batch) if gpu else (),
    )
    scoring = scoring_model(plan)
    facts = {
        "method": classifier.method_,
        "encoder_fingerprint": classifier.encoder.fingerprint,
        "max_batch": max_batch,
        "instances": instances,
        "gpu": gpu,
        "check": {"logits_max_error": _check(scoring, plan)},
    }
    with new_folder(out) as folder:
        _write_models(folder, served, classifier.engine, engine, scoring, labels)
        _write_text(folder / README, readme(served, top))
        written = write_manifest(folder, KIND, facts)["files"]
    return [out / name for name in (*written, MANIFEST)]


def _write_models(
    folder: Path, served: Served, engine: Path, facts: dict[str, Any], scoring: bytes, labels: list[str]
) -> None:
    (_model(folder, configs.preprocess_config(served)) / ONNX).write_bytes(preprocess_model(served.image_size))
    (_model(folder, configs.scoring_config(served)) / ONNX).write_bytes(scoring)
    encoder = _model(folder, configs.encoder_config(served))
    copies = {engine / ONNX_FILE: encoder / ONNX}
    if WEIGHTS in facts["files"]:
        copies[engine / WEIGHTS] = encoder / WEIGHTS  # the graph knows it by this name
    if served.plans:
        compiled = _model(folder, configs.plan_config(served))
        copies |= {plan.path: compiled / plan.path.name for plan in served.plans}
    for original, copy in copies.items():
        shutil.copyfile(original, copy)
        name = original.relative_to(engine).as_posix()
        if sha256(copy) != facts["files"][name]["sha256"]:
            raise ValueError(
                f"{name} in {engine} does not match its manifest: it was changed or replaced; export again"
            )
    # An ensemble has no file of its own, but a version, and neither git nor a bucket keeps empty folders.
    ensemble = _model(folder, configs.ensemble_config(served))
    _write_text(ensemble / "ensemble.txt", "an ensemble: see config.pbtxt\n")
    for name in (configs.SCORING, configs.ENSEMBLE):
        _write_text(folder / name / configs.LABELS, "".join(f"{label}\n" for label in labels))


def _model(folder: Path, config: Any) -> Path:
    """Write a model's configuration; returns the folder of its only version."""
    version = folder / config.name / "1"
    version.mkdir(parents=True)
    _write_text(folder / config.name / "config.pbtxt", configs.to_pbtxt(config))
    return version


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")  # whatever system this is, a server runs on Linux


def _check_places(bundle: Path, out: Path) -> None:
    """That an export to `out` loses nothing: neither the bundle nor what is there."""
    inner, outer = sorted((bundle.resolve(), out.resolve()), key=lambda path: len(path.parts), reverse=True)
    if inner.is_relative_to(outer):
        raise ValueError(
            f"expected an output folder beside the classifier, got {out} for {bundle}: one is in the other"
        )
    if not os.path.lexists(out / MANIFEST):
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(f"{out} exists and holds other things than an export to Triton; choose another place")
        return
    try:
        manifest = read_manifest(out, KIND, verify=False)
    except (ValueError, FileNotFoundError) as error:
        raise FileExistsError(
            f"{out} exists and is no whole export to Triton ({error}); choose another place"
        ) from error
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    kept = {name for name, entry in manifest["files"].items() if sha256(out / name) == entry["sha256"]}
    if others := sorted(found - kept - {MANIFEST}):
        raise FileExistsError(
            f"{out} holds {abbreviate(others)}, added or changed since it was exported, which would be lost; "
            "move that away or choose another place"
        )


def _check(scoring: bytes, plan: ScoringPlan) -> float:
    """The largest error of the graph's logits on random embeddings, relative to the largest logit."""
    ort = require("onnxruntime", EXTRA)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, _CHECKED_ROWS, plan.width))
    plain, adapted = (rows / np.linalg.norm(rows, axis=2, keepdims=True)).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(scoring, options, providers=["CPUExecutionProvider"])
    given = {"PLAIN": plain, "ADAPTED": adapted}
    got = session.run(["LOGITS"], {name: given[name] for name in scoring_inputs(plan)})[0]
    expected = np.asarray(score(plan, Embeddings(plain, adapted)))
    error = float(np.abs(got - expected).max() / max(1e-6, float(np.abs(expected).max())))
    if not error <= _MAX_ERROR:  # so that a NaN is refused too
        raise ArithmeticError(
            f"the scoring graph's logits differ from iosr_fast.score by {error:.2g} of the largest, expected at most "
            f"{_MAX_ERROR:g}; nothing was written"
        )
    return error
