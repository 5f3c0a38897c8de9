"""export_triton writes a saved classifier as a model repository of NVIDIA Triton Inference Server."""

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
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.geometry import Geometry
from iosr_fast.methods.promise import check_share
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.score import score
from iosr_fast.serving.triton import configs
from iosr_fast.serving.triton.preprocess_graph import preprocess_model
from iosr_fast.serving.triton.readme import readme
from iosr_fast.serving.triton.scoring_graph import scoring_inputs, scoring_model
from iosr_fast.serving.triton.unknown_graph import check_unknown, unknown_inputs, unknown_model
from iosr_fast.state.bundle import ENGINE
from iosr_fast.state.bundle import KIND as BUNDLE_KIND
from iosr_fast.utils.files import new_folder
from iosr_fast.utils.manifest import MANIFEST, read_manifest, sha256, write_manifest
from iosr_fast.utils.require import require
from iosr_fast.utils.text import abbreviate
from iosr_fast.utils.verified_folder import open_verified

KIND = "triton-repository"
README = "README.txt"
ONNX = "model.onnx"  # as the onnxruntime backend expects
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
    keep: float | None = None,
) -> list[Path]:
    """Write the classifier of `bundle` to `out` as a model repository, atomically; returns its files.

        preprocess     IMAGE uint8 (B, H, W, 3) -> PIXELS uint8 (B, S, S, 3)     preprocess_graph.preprocess_model
        encoder        pixels -> plain, adapted float32 (B, D)                   the bundle's encoder.onnx
        encoder_trt    the same as a TensorRT plan, with `gpu` and if the bundle has one; the ensemble then uses it
        scoring        PLAIN, ADAPTED -> LOGITS, PROBABILITIES, ZERO_SHOT, CACHE float32 (B, C)    scoring_graph
        unknown        PLAIN, ADAPTED -> UNKNOWN_SCORE float32 (B, 1), with `keep`       unknown_graph
        iosr_fast      the ensemble of these: IMAGE -> the scores, with the class names as labels

    `max_batch` is the largest batch of a model; `instances` of each model run in parallel. `gpu` puts encoder and
    scoring on GPUs, the encoder through TensorRT. `top` is the number of classes in the example of README.txt.
    `keep` adds the unknown score, and the threshold above which pictures belong to none of the classes so that a share
    `keep` of known ones is not, as parameters of the ensemble; clients compare.

    The graphs are first compared with iosr_fast.score and Unknown.score. An older export at `out` is replaced unless
    files in it were added or changed. Needs the extra triton-server (onnx, onnxruntime, tritonclient).

    Raises FileNotFoundError or ValueError if `bundle` is not a classifier, has no encoder.onnx or can't be served (a
    plan of 2 GB, a class name with two lines, a TensorRT plan for smaller batches, too few support images for `keep`),
    FileExistsError if `out` is not an
    export or was changed, ArithmeticError if the scores of a graph differ.
    """
    bundle, out = Path(bundle), Path(out)
    for name, number in (("max_batch", max_batch), ("instances", instances), ("top", top)):
        if number < 1:
            raise IosrFastError(f"expected {name} of at least 1, got {number}")
    share = None if keep is None else check_share("keep", keep)
    for module in ("onnx", "onnxruntime", "tritonclient.grpc.model_config_pb2"):
        require(module, "triton-server")
    _check_places(bundle, out)
    folder = open_verified(bundle, BUNDLE_KIND)
    classifier = Classifier.load(folder, runtime="onnxruntime")
    classifier.snapshot().one_label("the Triton export", "use predict")
    engine = folder.inner(ENGINE, ENGINE_KIND).manifest
    plan, labels = classifier.plan_, list(classifier.snapshot().class_names)
    broken = [name for name in labels if len(name.splitlines()) > 1]
    if broken:
        raise IosrFastError(f"expected class names of one line each, as in a file of labels, got {abbreviate(broken)}")
    unknown = None if share is None else classifier.unknown_
    limits = {} if unknown is None or share is None else {"threshold": unknown.threshold(share), "keep": share}
    served = configs.Served(
        geometry=Geometry.from_facts(engine),
        width=engine["width"],
        adapted=engine["first_adapted_block"] is not None,
        precision=engine["precision"],
        n_classes=plan.n_classes,
        scoring_inputs=tuple(scoring_inputs(plan)),
        max_batch=max_batch,
        instances=instances,
        gpu=gpu,
        exif_orientation=classifier.exif_orientation_,
        plans=configs.choose_plans(classifier.engine_, engine, max_batch) if gpu else (),
        unknown_inputs=() if unknown is None else tuple(unknown_inputs(unknown)),
        **limits,
    )
    graphs = {configs.PREPROCESS: preprocess_model(served.geometry), configs.SCORING: scoring_model(plan)}
    check = {"logits_max_error": _check(graphs[configs.SCORING], plan)}
    if unknown is not None:
        graphs[configs.UNKNOWN] = unknown_model(unknown)
        check["unknown_max_error"] = check_unknown(graphs[configs.UNKNOWN], unknown)
    facts = {
        "method": classifier.method_,
        "encoder_fingerprint": classifier.encoder.fingerprint,
        "max_batch": max_batch,
        "instances": instances,
        "gpu": gpu,
        "check": check,
        **limits,
    }
    with new_folder(out) as temporary:
        _write_models(temporary, served, classifier.engine_, engine, graphs, labels)
        _write_text(temporary / README, readme(served, top))
        written = write_manifest(temporary, KIND, facts)["files"]
    return [out / name for name in (*written, MANIFEST)]


def _write_models(
    folder: Path,
    served: configs.Served,
    engine: Path,
    facts: dict[str, Any],
    graphs: dict[str, bytes],
    labels: list[str],
) -> None:
    for config in (configs.preprocess_config, configs.scoring_config, configs.unknown_config):
        if (made := config(served)).name in graphs:
            (_model(folder, made) / ONNX).write_bytes(graphs[made.name])
    encoder = _model(folder, configs.encoder_config(served))
    copies = {engine / ONNX_FILE: encoder / ONNX}
    if WEIGHTS in facts["files"]:
        copies[engine / WEIGHTS] = encoder / WEIGHTS  # the name in the graph
    if served.plans:
        compiled = _model(folder, configs.plan_config(served))
        copies |= {plan.path: compiled / plan.path.name for plan in served.plans}
    for original, copy in copies.items():
        shutil.copyfile(original, copy)
        name = original.relative_to(engine).as_posix()
        if sha256(copy) != facts["files"][name]["sha256"]:
            raise IosrFastError(
                f"{name} in {engine} does not match its manifest: it was changed or replaced; export again"
            )
    # An ensemble has a version but no file, and neither git nor object storage keeps empty folders.
    ensemble = _model(folder, configs.ensemble_config(served))
    _write_text(ensemble / "ensemble.txt", "an ensemble: see config.pbtxt\n")
    for name in (configs.SCORING, configs.ENSEMBLE):
        _write_text(folder / name / configs.LABELS, "".join(f"{label}\n" for label in labels))


def _model(folder: Path, config: Any) -> Path:
    """Write the configuration of a model; returns the folder of its only version."""
    version = folder / config.name / "1"
    version.mkdir(parents=True)
    _write_text(folder / config.name / "config.pbtxt", configs.to_pbtxt(config))
    return version


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")  # servers run on Linux


def _check_places(bundle: Path, out: Path) -> None:
    """Raise unless an export to `out` keeps the bundle and all other files."""
    inner, outer = sorted((bundle.resolve(), out.resolve()), key=lambda path: len(path.parts), reverse=True)
    if inner.is_relative_to(outer):
        raise IosrFastError(
            f"expected an output folder outside of the classifier, got {out} for {bundle}: one is in the other"
        )
    if not os.path.lexists(out / MANIFEST):
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(f"{out} exists and is not an export to Triton; choose another folder")
        return
    try:
        manifest = read_manifest(out, KIND, verify=False)
    except (ValueError, FileNotFoundError) as error:
        raise FileExistsError(
            f"{out} exists and is not a complete export to Triton ({error}); choose another folder"
        ) from error
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    unchanged = {name for name, entry in manifest["files"].items() if sha256(out / name) == entry["sha256"]}
    if others := sorted(present - unchanged - {MANIFEST}):
        raise FileExistsError(
            f"{out} contains {abbreviate(others)}, added or changed since it was exported, which would be lost; "
            "move that away or choose another folder"
        )


def _check(scoring: bytes, plan: ScoringPlan) -> float:
    """The largest error of the graph's logits on random embeddings, relative to the largest logit."""
    ort = require("onnxruntime", "triton-server")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, _CHECKED_ROWS, plan.width))
    plain, adapted = (rows / np.linalg.norm(rows, axis=2, keepdims=True)).astype(np.float32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(scoring, options, providers=["CPUExecutionProvider"])
    inputs = {"PLAIN": plain, "ADAPTED": adapted}
    got = session.run(["LOGITS"], {name: inputs[name] for name in scoring_inputs(plan)})[0]
    expected = np.asarray(score(plan, Embeddings(plain, adapted)))
    error = float(np.abs(got - expected).max() / max(1e-6, float(np.abs(expected).max())))
    if not error <= _MAX_ERROR:  # also refuses NaN
        raise ArithmeticError(
            f"the scoring graph's logits differ from iosr_fast.score by {error:.2g} of the largest, expected at most "
            f"{_MAX_ERROR:g}; nothing was written"
        )
    return error
