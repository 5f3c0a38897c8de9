"""images.preprocess.resize_and_crop as an ONNX graph, for a batch of pictures of the same size."""

from __future__ import annotations

from typing import Any

import numpy as np

from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.triton.graph import Graph

# Aspect ratio above which both ends are cut off before the shorter side is resized.
MAX_RATIO = 32
_FILTERS: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
    "bilinear": {"mode": "linear"},  # exclude_outside is for cubic only
}


def preprocess_model(geometry: Geometry) -> bytes:
    """IMAGE uint8 (B, H, W, 3) -> PIXELS uint8 (B, S, S, 3), as iosr_fast.images.preprocess.resize_and_crop, S = size:

        shortest  H', W' = S * (H, W) // min(H, W)
                  PIXELS = resize(IMAGE to H', W')[top : top + S, left : left + S]
                  top, left = round((H' - S) / 2), round((W' - S) / 2)      halves to even, as Python rounds
        longest   H', W' = max(1, round((H, W) / (max(H, W) / S)))
                  PIXELS = resize(IMAGE to H', W') padded with fill, (S - H') // 2 above, (S - W') // 2 to the left
        squash    PIXELS = resize(IMAGE to S, S)

    Cubic resizing with a = -0.5, antialiasing and no weight outside of the picture is Pillow's bicubic filter. On uint8
    the CPU kernel of ONNX Runtime rounds after each axis, like Pillow: about one value in a thousand differs, by 1.
    Linear resizing with antialiasing is Pillow's bilinear filter inside the picture; outside of it ONNX Runtime repeats
    the edge, where Pillow leaves out the weight, so the outermost rows and columns differ by a few levels. The model
    must run on the CPU, because the CUDA kernel of this mode has a bug (microsoft/onnxruntime, issue 25264).

    With "shortest" a picture of 1 x 100,000 pixels would become S x S * 100,000. If the aspect ratio exceeds 32, the
    graph first cuts off an even multiple of the shorter side at each end, which does not move the crop.
    """
    graph = Graph({"IMAGE": (np.uint8, ("batch", "height", "width", 3))})
    sides = graph.add("Shape", "IMAGE", name="sides", start=1, end=3)
    shortest = graph.add("ReduceMin", sides, name="shortest", keepdims=0)
    graph.constant("one", 1, np.int64)
    graph.constant("axes", [1, 2], np.int64)
    if geometry.resize_mode == "shortest":
        _resize_shorter_side(graph, geometry, sides, shortest)
    else:
        # A picture without pixels keeps its sides and yields none, which the encoder refuses.
        has_pixels = graph.cast(shortest, np.bool_, "has_pixels")
        size = graph.constant("size", [geometry.size, geometry.size], np.int64)
        square = graph.add("Where", has_pixels, size, sides, name="square")
        if geometry.resize_mode == "longest":
            _resize_longer_side(graph, geometry, sides, square)
        else:
            graph.add("Identity", _resize(graph, geometry, "IMAGE", square), name="PIXELS")
    return graph.model("preprocess", {"PIXELS": (np.uint8, ("batch", geometry.size, geometry.size, 3))})


def _resize_shorter_side(graph: Graph, geometry: Geometry, sides: str, shortest: str) -> None:
    def integers(name: str, value: int | list[int]) -> str:
        return graph.constant(name, value, np.int64)

    # A picture without pixels yields none, which the encoder refuses; a division by zero would crash the server.
    short = graph.add("Max", shortest, "one", name="short")
    ratio = graph.add("Div", sides, short, name="ratio")
    beyond = graph.add("Sub", ratio, integers("largest_ratio", MAX_RATIO), name="beyond")
    excess = graph.add("Max", beyond, integers("none", 0), name="excess")
    pairs = graph.add("Div", excess, integers("four", 4), name="pairs")
    cut = graph.add("Mul", graph.add("Mul", pairs, integers("two", 2), name="squares"), short, name="cut")
    end = graph.add("Sub", sides, cut, name="cut_end")
    image = graph.add("Slice", "IMAGE", cut, end, "axes", name="image")

    length = graph.add("Sub", end, cut, name="length")
    scaled = graph.add("Mul", length, integers("size", geometry.size), name="scaled")
    target = graph.add("Div", scaled, short, name="target")
    resized = _resize(graph, geometry, image, target)

    surplus = graph.add("Sub", target, integers("crop", [geometry.size, geometry.size]), name="surplus")
    half = graph.constant("half", 0.5, np.float32)
    middle = graph.add("Mul", graph.cast(surplus, np.float32, "surplus_float"), half, name="middle")
    start = graph.cast(graph.add("Round", middle, name="rounded"), np.int64, "start")
    graph.add("Slice", resized, start, graph.add("Add", start, "crop", name="end"), "axes", name="PIXELS")


def _resize_longer_side(graph: Graph, geometry: Geometry, sides: str, square: str) -> None:
    # In float64 and in this order, because Python rounds so: halves are met often.
    lengths = graph.cast(sides, np.float64, "lengths")
    longest = graph.add("ReduceMax", lengths, name="longest", keepdims=0)
    side = graph.constant("side", float(geometry.size), np.float64)
    ratio = graph.add("Div", longest, side, name="ratio")
    exact = graph.add("Div", lengths, ratio, name="exact")
    rounded = graph.cast(graph.add("Round", exact, name="rounded"), np.int64, "rounded_size")
    # At least 1, unless the picture has no pixels.
    target = graph.add("Min", graph.add("Max", rounded, "one", name="at_least"), square, name="target")
    resized = _resize(graph, geometry, "IMAGE", target)

    margin = graph.add("Sub", square, target, name="margin")
    before = graph.add("Div", margin, graph.constant("two", 2, np.int64), name="before")
    after = graph.add("Sub", margin, before, name="after")
    pads = graph.add("Concat", before, after, name="pads", axis=0)
    graph.add("Pad", resized, pads, graph.constant("fill", geometry.fill, np.uint8), "axes", name="PIXELS")


def _resize(graph: Graph, geometry: Geometry, image: str, target: str) -> str:
    """`image` (B, H, W, 3) resized to `target`, (H', W')."""
    batch = graph.add("Shape", "IMAGE", name="batch_size", start=0, end=1)
    channels = graph.constant("channels", [3], np.int64)
    shape = graph.add("Concat", batch, target, channels, name="target_shape", axis=0)
    return graph.add(
        "Resize",
        image,
        "",
        "",
        shape,
        name="resized",
        antialias=1,
        coordinate_transformation_mode="half_pixel",
        **_FILTERS[geometry.interpolation],
    )
