"""The ONNX graphs of an export to Triton: scoring against the float64 reference, preprocessing against Pillow."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx", reason="onnx comes with the triton-server extra")
pytest.importorskip("onnxruntime", reason="onnxruntime comes with the triton-server extra")
pytest.importorskip("tritonclient.grpc", reason="tritonclient comes with the triton-server extra")

import onnx

from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.images.geometry import RESIZE_MODES, Geometry, ResizeMode
from iosr_fast.images.preprocess import resize_and_crop
from iosr_fast.methods.support_set import SupportSet, make_support_set
from iosr_fast.methods.unknown import fit_unknown
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.scoring.precision import PRECISIONS, Precision
from iosr_fast.scoring.reference import score_reference, softmax
from iosr_fast.serving.triton import graph
from iosr_fast.serving.triton.preprocess_graph import MAX_RATIO, preprocess_model
from iosr_fast.serving.triton.scoring_graph import scoring_inputs, scoring_model
from iosr_fast.serving.triton.unknown_graph import check_unknown, unknown_inputs, unknown_model
from tests.conftest import EXTENDED, random_embeddings, random_plan, random_reducer, unit_rows
from tests.scoring.numerics import allowed_error, assert_as_good_as_eager
from tests.scoring.test_precision import correlated_rows
from tests.scoring.test_score import BATCHES, LAYOUTS, WIDTHS
from tests.serving.triton_repository import open_session

OUTPUTS = ("LOGITS", "PROBABILITIES", "ZERO_SHOT", "CACHE")
KINDS: dict[str, dict[str, Any]] = {
    **EXTENDED,
    "every term": {},
    "text": {"terms": ("text",)},
    "cache": {"terms": ("cache",)},
    "linear": {"terms": ("linear",)},
}


def run(plan: ScoringPlan, embeddings: Embeddings) -> dict[str, np.ndarray]:
    """The four outputs; the graph is given what it reads and nothing else."""
    session = open_session(scoring_model(plan))
    given = {"PLAIN": embeddings.plain, "ADAPTED": embeddings.adapted}
    inputs = [value.name for value in session.get_inputs()]
    assert inputs == scoring_inputs(plan)
    results = session.run(list(OUTPUTS), {name: given[name] for name in inputs})
    for result in results:
        assert result.dtype == np.float32 and result.shape == (len(embeddings), plan.n_classes)
    return dict(zip(OUTPUTS, results, strict=True))


def assert_true(plan: ScoringPlan, embeddings: Embeddings) -> None:
    """As good as eager in all its outputs: the sum of two parts is off by no more than they are."""
    made, truth = run(plan, embeddings), score_reference(plan, embeddings)
    allowed = allowed_error(truth, plan, embeddings)
    assert_as_good_as_eager(made["LOGITS"], truth, allowed)
    zero_shot = np.zeros_like(truth)
    if plan.text is not None:
        zero_shot = plan.tau * embeddings.plain.astype(np.float64) @ plan.text.T.astype(np.float64)
    assert_as_good_as_eager(made["ZERO_SHOT"], zero_shot, allowed)
    assert_as_good_as_eager(made["CACHE"], truth - zero_shot, allowed)
    np.testing.assert_allclose(made["PROBABILITIES"], softmax(made["LOGITS"].astype(np.float64)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plan_at_every_precision(kind: str, precision: Precision, rng: np.random.Generator) -> None:
    widths, batches = itertools.cycle(WIDTHS), itertools.cycle(BATCHES)
    for counts in LAYOUTS:
        width = next(widths)
        plan = random_plan(rng, list(counts), width, **KINDS[kind], precision=precision)
        assert_true(plan, random_embeddings(rng, next(batches), width))


@pytest.mark.parametrize("reducer", [None, "projection", "diagonal"])
def test_int8_keys_in_a_basis_of_their_own(reducer: str | None, rng: np.random.Generator) -> None:
    keys = correlated_rows(rng, 701, 48)
    plan = ScoringPlan(4, keys=keys, class_offsets=[0, 400, 400, 700, 701], query="adapted", beta=8.0, alpha=-2.0)
    plan = plan.with_key_precision("int8")
    assert plan.query_transform is not None
    plan = replace(plan, reducer=None if reducer is None else random_reducer(rng, reducer, 48))
    assert_true(plan, Embeddings(unit_rows(rng, 5, 48), correlated_rows(rng, 40, 48)[:5]))


@pytest.mark.parametrize("temperature", [0.01, 0.5, 30.0])
def test_temperatures(temperature: float, rng: np.random.Generator) -> None:
    plan = random_plan(rng, [1] * 9, 33, ("text", "linear"), feature="text-distribution")
    assert_true(replace(plan, temperature=temperature), random_embeddings(rng, 33, 33))


def test_a_bias_alone_is_added_to_the_texts(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [1, 1, 1], 9, ("text",))
    assert_true(replace(plan, bias=rng.standard_normal(3)), random_embeddings(rng, 5, 9))


def test_a_row_that_the_reducer_takes_to_zero_stays_zero(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [2, 3], 16, ("cache", "linear"), query="plain", reducer="centre")
    assert plan.reducer is not None and plan.reducer.shift is not None
    rows = plan.reducer.shift + np.float32([[0.0], [1e-3]]) * unit_rows(rng, 1, 16)  # and a short one becomes a unit
    embeddings = Embeddings(rows, rows)
    np.testing.assert_allclose(run(plan, embeddings)["LOGITS"], score_reference(plan, embeddings), rtol=1e-4, atol=1e-4)


def test_very_uneven_classes_take_no_more_room_than_their_keys(rng: np.random.Generator) -> None:
    counts = [0, 1, 3000, 2, 64, 65, 0, *[1] * 500]
    plan = random_plan(rng, counts, 16, ("cache",))
    model = onnx.load_from_string(scoring_model(plan))
    groups = [node for node in model.graph.node if node.op_type == "Gather"][:-1]
    assert len(groups) == 5  # of 1 (and none), 2, 64, 128 and 4096 keys
    size = {constant.name: int(np.prod(constant.dims)) for constant in model.graph.initializer}
    assert sum(size[node.input[1]] for node in groups) <= 2 * max(sum(counts), len(counts))
    assert_true(plan, random_embeddings(rng, 3, 16))
    even = onnx.load_from_string(scoring_model(random_plan(rng, [4] * 9, 16, ("cache",))))
    assert "Gather" not in {node.op_type for node in even.graph.node}


def test_narrow_keys_make_a_small_file(rng: np.random.Generator) -> None:
    plan = random_plan(rng, [16] * 40, 128, ("cache",), weighted=False)
    size = {precision: len(scoring_model(plan.with_key_precision(precision))) for precision in PRECISIONS}
    keys = 640 * 128
    for precision, width in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        assert keys * width < size[precision] < keys * width + 8192
    assert keys < size["int8"] < keys + 4 * 128 * 128 + 8192  # a query_transform may come with them


def test_only_what_a_term_reads_is_an_input(rng: np.random.Generator) -> None:
    for terms, options, expected in (
        (("text",), {}, ["PLAIN"]),
        (("cache",), {"query": "adapted"}, ["ADAPTED"]),
        (("linear",), {"feature": "adapted"}, ["ADAPTED"]),
        (("cache", "linear"), {"query": "plain", "feature": "adapted"}, ["PLAIN", "ADAPTED"]),
        (("linear",), {"feature": "both"}, ["PLAIN", "ADAPTED"]),
        (("text", "linear"), {"feature": "text-distribution"}, ["PLAIN"]),
    ):
        assert scoring_inputs(random_plan(rng, [2, 2], 8, terms, **options)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["alpha", "beta", "weights", "values", "reducer", "temperature", "linear", "bias"])
def test_the_yardstick_sees_each_part(part: str, rng: np.random.Generator) -> None:
    dense = part == "values"
    plan = random_plan(rng, [3, 2], 16, dense=dense, reducer="centre", feature="text-distribution")
    embeddings = random_embeddings(rng, 5, 16)
    value = getattr(plan, part)
    changed = replace(value, shift=1.01 * value.shift) if part == "reducer" else 1.01 * value
    truth = score_reference(plan, embeddings)
    wrong = run(replace(plan, **{part: changed}), embeddings)["LOGITS"]
    with pytest.raises(AssertionError):
        assert_as_good_as_eager(wrong, truth, allowed_error(truth, plan, embeddings))


def test_a_graph_too_large_for_one_file_is_refused(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(rng, [50, 50], 64, ("cache",))
    monkeypatch.setattr(graph, "MAX_FILE_BYTES", 20_000)
    with pytest.raises(ValueError, match=r"scoring graph under 2 GB.*got 0\.0 GB; fit with key_precision='int8'"):
        scoring_model(plan)
    scoring_model(random_plan(rng, [50, 50], 64, ("cache",), weighted=False, precision="int8"))


# Height and width: as large, larger, smaller, odd, long and wide.
SIZES = [(64, 64), (65, 64), (64, 131), (480, 641), (37, 53), (20, 20), (1, 1), (1, 29), (300, 11), (127, 1000)]


def smooth(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def preprocess(pictures: list[Image.Image], geometry: Geometry) -> np.ndarray:
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    made: np.ndarray = open_session(preprocess_model(geometry)).run(["PIXELS"], {"IMAGE": stacked})[0]
    assert made.dtype == np.uint8 and made.shape == (len(pictures), geometry.size, geometry.size, 3)
    return made


def differences(pictures: list[Image.Image], geometry: Geometry) -> np.ndarray:
    """Levels between the graph's pixels and resize_and_crop's."""
    expected = np.stack([resize_and_crop(picture, geometry) for picture in pictures])
    return np.abs(preprocess(pictures, geometry).astype(int) - expected)


GEOMETRIES = [
    *map(Geometry, (64, 63, 224)),
    Geometry(64, "shortest", "bilinear"),
    Geometry(224, "squash"),
    Geometry(63, "squash", "bilinear"),
    Geometry(64, "longest", fill=127),
    Geometry(224, "longest"),
    Geometry(63, "longest", "bilinear"),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_pixels_are_pillows(geometry: Geometry, rng: np.random.Generator) -> None:
    for height, width in SIZES:
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        off = differences([noise, smooth(rng, height, width)], geometry)
        if geometry.interpolation == "bilinear":  # the outermost rows and columns have other weights
            columns, rows = geometry.resized(width, height)
            assert off.mean() <= 0.5 and off[1].mean() <= 0.2, (height, width)
            top, left = max(0, geometry.size - rows) // 2 + 1, max(0, geometry.size - columns) // 2 + 1
            off = off[:, top : top + min(rows, geometry.size) - 2, left : left + min(columns, geometry.size) - 2]
            if not off.size:
                continue
        if height > 4 * width and geometry.resize_mode != "shortest":
            # Pillow resizes some tall pictures top to bottom first, and the overshoot of noise is clipped in between.
            assert off.mean() <= 0.5, (height, width)
            continue
        assert (
            off.max() <= 2
            and (off > 1).mean() <= 1e-4
            and off.mean() <= (0.05 if geometry.interpolation == "bilinear" else 0.005)
        ), (height, width)
        if geometry.resized(width, height) == (width, height):
            assert off.max() == 0


def test_pixels_of_real_pictures_are_pillows() -> None:
    emoji = [Image.fromarray(image) for image in load_pictures("held-out").images[:400:40]]
    for scaled in (emoji, [picture.resize((301, 211), Image.Resampling.LANCZOS) for picture in emoji]):
        for size in (32, 64, 97):
            off = differences(scaled, Geometry(size))
            assert off.max() <= 1 and off.mean() <= 0.001


@pytest.mark.parametrize(("height", "width"), [(7, 1000), (1001, 3), (2, 700)])
def test_long_pictures_are_pillows_but_for_a_level_or_two(height: int, width: int, rng: np.random.Generator) -> None:
    assert max(height, width) // min(height, width) > MAX_RATIO
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for size in (64, 63):
        off = differences([noise], Geometry(size))
        assert off.max() <= 2 and off.mean() <= 0.1


def test_a_very_long_picture_is_not_resized_whole(rng: np.random.Generator) -> None:
    model = onnx.load_from_string(preprocess_model(Geometry(64)))
    model.graph.output.append(onnx.helper.make_tensor_value_info("resized", onnx.TensorProto.UINT8, None))
    strip = rng.integers(0, 256, (1, 1, 50_000, 3), dtype=np.uint8)
    pixels, resized = open_session(model.SerializeToString()).run(["PIXELS", "resized"], {"IMAGE": strip})
    assert pixels.shape == (1, 64, 64, 3)
    assert resized.shape[2] <= (MAX_RATIO + 4) * 64
    middle = Image.fromarray(strip[0, :, 24_980:25_020])
    assert np.abs(pixels[0].astype(int) - resize_and_crop(middle, Geometry(64))).max() <= 1


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("shape", [(1, 0, 9, 3), (1, 9, 0, 3), (1, 0, 0, 3)])
def test_a_picture_without_pixels_is_no_crash(shape: tuple[int, ...], mode: ResizeMode) -> None:
    session = open_session(preprocess_model(Geometry(64, mode)))
    assert session.run(["PIXELS"], {"IMAGE": np.zeros(shape, np.uint8)})[0].size == 0


def unknown_support(rng: np.random.Generator, shots: int, text: bool, classes: int = 6) -> SupportSet:
    labels, width = np.repeat(np.arange(classes), shots), 24
    centres = rng.standard_normal((2, classes, width))
    parts = [centre[labels] + 0.7 * rng.standard_normal((len(labels), width)) for centre in centres]
    rows = Embeddings(*((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32) for part in parts))
    return make_support_set(rows, labels, unit_rows(rng, classes, width) if text else None, 20.0, classes)


@pytest.mark.parametrize(
    ("shots", "text", "adapted", "classes"),
    [(1, True, False, 6), (2, False, True, 6), (5, True, True, 6), (4, False, False, 2), (5, True, False, 2)],
)
def test_the_unknown_score_is_that_of_numpy(
    shots: int, text: bool, adapted: bool, classes: int, rng: np.random.Generator
) -> None:
    support = unknown_support(rng, shots, text, classes)
    pictures = random_embeddings(rng, 5, 24) if shots == 5 else None
    unknown = fit_unknown(support, adapted, pictures)
    assert ("nearest unknown key" in unknown.names) == (shots == 5)
    assert unknown_inputs(unknown) == (["PLAIN", "ADAPTED"] if adapted else ["PLAIN"])
    graph = unknown_model(unknown)
    queries = random_embeddings(rng, 40, 24)
    given = {"PLAIN": queries.plain, "ADAPTED": queries.adapted}
    scores = open_session(graph).run(None, {name: given[name] for name in unknown_inputs(unknown)})[0]
    assert scores.dtype == np.float32 and scores.shape == (40, 1)
    np.testing.assert_allclose(scores[:, 0], unknown.score(queries), rtol=1e-4, atol=1e-4)
    assert check_unknown(graph, unknown) < 1e-3
    with pytest.raises(ArithmeticError, match="the unknown graph's scores differ"):
        check_unknown(graph, replace(unknown, bias=unknown.bias + 1.0))


def test_every_score_has_its_term(rng: np.random.Generator) -> None:
    """Each score alone, with weight 1."""
    support, queries = unknown_support(rng, 4, True), random_embeddings(rng, 12, 24)
    fitted = fit_unknown(support, adapted=True, unknown=random_embeddings(rng, 4, 24))
    for i, name in enumerate(fitted.names):
        alone = replace(fitted, weights=np.eye(len(fitted.names))[i], bias=0.0)
        inputs = {"PLAIN": queries.plain, "ADAPTED": queries.adapted}
        scores = open_session(unknown_model(alone)).run(None, inputs)[0][:, 0]
        np.testing.assert_allclose(scores, alone.score(queries), rtol=1e-4, atol=1e-4, err_msg=name)
