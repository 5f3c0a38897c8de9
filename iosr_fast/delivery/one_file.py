"""A fit as one ONNX file, for any runtime: pictures in, what a Verdict says out, checked before it is written."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from iosr_fast.delivery.fitted import FittedClassifier
from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.onnxruntime import open_session
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.one_file.graph import Answers, Source, check_engine_graph, make_graph
from iosr_fast.head.verdict import Abstention, judge
from iosr_fast.images.pixels import VERSION
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.methods.automation import automation
from iosr_fast.sealed.files import new_file
from iosr_fast.sealed.outputs import check_new_file
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.utils.json_values import json_values
from iosr_fast.utils.machine import package_version
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from onnx import ModelProto

# The most by which a probability of the file may differ from the library's, and other numbers in proportion.
TOLERANCE = 1e-3
# Of the shapes that are checked, in parts of the encoder's: smaller and larger, tall and wide, two pictures at a time.
_SHAPES = ((1.0, 1.0), (0.6, 1.7), (2.3, 1.1))
_LICENCES = {"demo": "MIT", "photographs": "Apache-2.0"}  # of weights
log = logging.getLogger(__name__)


def one_file(fit: FittedClassifier, abstention: Abstention, source: Source = "picture") -> ModelProto:
    """The onnx.ModelProto of Classifier.export. Raises IosrFastError for what one file can't hold or promise."""
    if source not in get_args(Source):
        raise IosrFastError(f"expected source to be 'picture' or 'pixels', got {source!r}")
    head, engine = fit.head, check_engine_graph(fit.clip.encoder.source)
    onnx = require("onnx", "cpu")
    abstention.check(head)
    least = unknown = tree = promise = None
    threshold = np.inf
    if abstention.max_error is not None:
        least, tree = head.least_odds(abstention.max_error), head.tree if head.tree.inner else None
        promise = automation(head.judged, notes=head.doubts)
    if abstention.keep is not None:
        unknown, threshold = head.unknown, head.unknown.threshold(abstention.keep)
    plan = head.plan.scaled(1.0 / head.temperature)
    answers = Answers(plan, head.needs_adapted, least, unknown, threshold, tree, head.thresholds)
    model = make_graph(engine, answers, source)
    names = head.class_names if tree is None else head.node_names
    facts = {
        "max_error": abstention.max_error,
        "keep": abstention.keep,
        "promise": promise,
        "head_version": head.version,
        "encoder_fingerprint": engine.manifest["fingerprint"],
        "model": engine.manifest["model"],
        "precision": engine.manifest["precision"],
        "weights_licence": _LICENCES.get(engine.manifest["model"]),
        "geometry": fit.clip.encoder.geometry.facts(),
        "exif_orientation": fit.settings.exif_orientation,
        "pixels": VERSION,
        "versions": {name: package_version(name) for name in ("iosr_fast", "onnx")},
    }
    texts = {"class_names": names, "iosr_fast": json_values(facts)}
    onnx.helper.set_model_props(model, {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()})
    return model


def write_one_file(fit: FittedClassifier, path: str | Path, abstention: Abstention, source: Source = "picture") -> None:
    """Write `one_file`, whole or not at all, after ONNX Runtime answered a few pictures with it as the library does.
    Raises ArithmeticError where it did not, and as `check_new_file`."""
    check_new_file(Path(path), (".onnx",))
    require("onnxruntime", "cpu")
    content = one_file(fit, abstention, source).SerializeToString()
    check_file(fit, content, abstention, source)
    with new_file(path) as temporary:
        temporary.write_bytes(content)
    if (precision := _engine(fit).manifest["precision"]) != "fp32":
        log.warning(
            "%s is in %s, which processors and runtimes round differently: elsewhere a few of 100 labels may be "
            "others; a file in fp32 answers alike everywhere",
            path,
            precision,
        )


def _engine(fit: FittedClassifier) -> VerifiedFolder:
    engine = fit.clip.encoder.source
    assert engine is not None, "one_file has checked it"
    return engine


def check_file(fit: FittedClassifier, content: bytes, abstention: Abstention, source: Source) -> None:
    """Raise ArithmeticError unless ONNX Runtime answers noise of several shapes as the library does on that runtime."""
    encoder = open_engine(_engine(fit), "onnxruntime", verify=False, adapted=fit.head.needs_adapted)
    session = open_session(content)
    names = [output.name for output in session.get_outputs()]
    rng = np.random.default_rng(0)
    for shape in _SHAPES if source == "picture" else _SHAPES[:1]:
        height, width = (round(part * encoder.image_size) for part in shape)
        pictures = rng.integers(0, 256, (2, height, width, 3), np.uint8)
        got = dict(zip(names, session.run(None, {source: pictures}), strict=True))
        check_answers(got, fit, encoder, pictures, abstention)


def check_answers(
    got: Mapping[str, np.ndarray], fit: FittedClassifier, encoder: Encoder, pictures: np.ndarray, abstention: Abstention
) -> None:
    """Raise ArithmeticError unless these outputs of a file or plan are what the library answers on `pictures` uint8
    (B, H, W, 3): labels the same, but for ties, what is accepted or rejected the same, numbers up to TOLERANCE."""
    head = fit.head
    verdict = judge(head, encoder.encode(to_pixels(pictures, encoder.geometry)), abstention)
    expected = head.probabilities(verdict.logits)
    differences = {"probabilities": got["probabilities"] - expected}
    if head.thresholds is not None:
        differences["labels"] = (got["labels"] ^ verdict.labels) * (expected - head.thresholds)
    else:
        labels, classes = np.stack([verdict.labels, got["label"]], 1), np.arange(expected.shape[1])
        masses = (expected[:, None] * head.tree.holds(labels[:, :, None], classes)).sum(2)
        differences["label"] = np.append(np.diff(masses), np.diff(head.tree.level_of[labels]))
    if verdict.accepted is not None:
        differences["accepted"] = got["accepted"] ^ verdict.accepted
    if verdict.unknown_score is not None:
        differences["rejected"] = got["rejected"] ^ verdict.rejected
        differences["unknown"] = (got["unknown"] - verdict.unknown_score) / (1 + np.abs(verdict.unknown_score))
    height, width = pictures.shape[1:3]
    for name, difference in differences.items():
        if not (largest := np.abs(difference).max()) <= TOLERANCE:
            raise ArithmeticError(
                f"expected the output {name} of pictures of {height} x {width} to be the classifier's, got a "
                f"difference of {largest:.2g}, where {TOLERANCE:g} is allowed; nothing was written or timed"
            )
