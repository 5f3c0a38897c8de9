"""images.preprocess.resize_and_crop as an ONNX graph, for a batch of pictures of the same size."""

from __future__ import annotations

import numpy as np

from iosr_fast.serving.triton.graph import Graph

# Aspect ratio above which both ends are cut off before resizing.
MAX_RATIO = 32


def preprocess_model(size: int) -> bytes:
    """IMAGE uint8 (B, H, W, 3) -> PIXELS uint8 (B, size, size, 3), as iosr_fast.images.preprocess.resize_and_crop:

        H', W' = size * (H, W) // min(H, W)
        PIXELS = bicubic(IMAGE to H', W')[top : top + size, left : left + size]
        top, left = round((H' - size) / 2), round((W' - size) / 2)      halves to even, as Python rounds

    Resize with a = -0.5, antialiasing and no weight outside of the picture is Pillow's filter. On uint8 the CPU kernel
    of ONNX Runtime rounds after each axis, like Pillow: about one value in a thousand differs, by 1. The model must run
    on the CPU, because the CUDA kernel of this mode has a bug (microsoft/onnxruntime, issue 25264).

    A picture of 1 x 100,000 pixels would become size x size * 100,000. If the aspect ratio exceeds 32, the graph first
    cuts off an even multiple of the shorter side at each end, which does not move the crop.
    """
    graph = Graph({"IMAGE": (np.uint8, ("batch", "height", "width", 3))})

    def integers(name: str, value: int | list[int]) -> str:
        return graph.constant(name, value, np.int64)

    sides = graph.add("Shape", "IMAGE", name="sides", start=1, end=3)
    shortest = graph.add("ReduceMin", sides, name="shortest", keepdims=0)
    # A picture without pixels yields none, which the encoder refuses; a division by zero would crash the server.
    short = graph.add("Max", shortest, integers("one", 1), name="short")
    ratio = graph.add("Div", sides, short, name="ratio")
    beyond = graph.add("Sub", ratio, integers("largest_ratio", MAX_RATIO), name="beyond")
    excess = graph.add("Max", beyond, integers("none", 0), name="excess")
    pairs = graph.add("Div", excess, integers("four", 4), name="pairs")
    two = integers("two", 2)
    cut = graph.add("Mul", graph.add("Mul", pairs, two, name="squares"), short, name="cut")
    end = graph.add("Sub", sides, cut, name="cut_end")
    axes = integers("axes", [1, 2])
    image = graph.add("Slice", "IMAGE", cut, end, axes, name="image")

    length = graph.add("Sub", end, cut, name="length")
    target = graph.add("Div", graph.add("Mul", length, integers("size", size), name="scaled"), short, name="target")
    batch = graph.add("Shape", "IMAGE", name="batch_size", start=0, end=1)
    shape = graph.add("Concat", batch, target, integers("channels", [3]), name="target_shape", axis=0)
    resized = graph.add(
        "Resize",
        image,
        "",
        "",
        shape,
        name="resized",
        mode="cubic",
        cubic_coeff_a=-0.5,
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
    )

    surplus = graph.add("Sub", target, integers("crop", [size, size]), name="surplus")
    half = graph.constant("half", 0.5, np.float32)
    middle = graph.add("Mul", graph.cast(surplus, np.float32, "surplus_float"), half, name="middle")
    start = graph.cast(graph.add("Round", middle, name="rounded"), np.int64, "start")
    graph.add("Slice", resized, start, graph.add("Add", start, "crop", name="end"), axes, name="PIXELS")
    return graph.model("preprocess", {"PIXELS": (np.uint8, ("batch", size, size, 3))})
