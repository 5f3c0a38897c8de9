"""The resize and crop of images.preprocess in a graph, equal to the last bit where a runtime has float64.

Each pass is a product with the weights of Pillow's filter, integers of 22 bits (libImaging/Resample.c), which the graph
computes from the sizes; float64 holds every sum exactly. OpenVINO computes in float32: there up to 2% of the pixels
differ, most by one level and none by more than two.
"""

from __future__ import annotations

import numpy as np

from iosr_fast.export.one_file.value import Value
from iosr_fast.images.geometry import Geometry

_UNIT = 1 << 22  # the weight 1 as an integer


def resized_pixels(picture: Value, geometry: Geometry) -> Value:
    """uint8 pictures (B, H, W, 3) of any size to uint8 pixels (B, S, S, 3), as `resize_and_crop` makes them."""
    sides = picture.op("Shape", start=1, end=3)  # (H, W)
    resized = _resized(sides, geometry)
    shown = resized.op("Min", geometry.size)
    begin = ((resized - shown).cast(np.float32) * 0.5).op("Round").cast(np.int64)  # halves to even, as Python's
    values = picture.op("Transpose", perm=[0, 3, 1, 2]).cast(np.float64)
    for axis in (1, 0):  # columns first
        ends = (one.op("Gather", axis) for one in (sides, resized, begin, begin + shown))
        sums = values @ _weights(geometry.interpolation == "bicubic", *ends)
        # ONNX Runtime 1.21 has no product of a transposed matrix in float64, so the sums are transposed.
        levels = ((sums.op("Transpose", perm=[0, 1, 3, 2]) + _UNIT / 2) * (1 / _UNIT)).op("Floor")  # halves up
        values = levels.op("Clip", 0, 255)
    pixels = values.cast(np.uint8).op("Transpose", perm=[0, 2, 3, 1])
    if geometry.resize_mode != "longest":
        return pixels
    free = resized.op("Neg") + geometry.size
    before = free / 2
    return pixels.op("Pad", before.op("Concat", free - before, axis=0), geometry.fill, [1, 2])


def _resized(sides: Value, geometry: Geometry) -> Value:
    """Geometry.resized: (H, W) after the resize, int64."""
    if geometry.resize_mode == "squash":
        return sides.constant(np.array([geometry.size] * 2))
    if geometry.resize_mode == "shortest":
        return sides * geometry.size / sides.op("ReduceMin", [0])
    exact = sides.cast(np.float64)
    return (exact / (exact.op("ReduceMax", [0]) / geometry.size)).op("Round").cast(np.int64).op("Max", 1)


def _weights(bicubic: bool, side: Value, new_side: Value, begin: Value, end: Value) -> Value:
    """(side, end - begin) float64: what each row of a picture weighs in the rows `begin` to `end` of the resized one.
    Operations and their order are those of Pillow's precompute_coeffs."""
    old = side.constant(np.array(0)).op("Range", side, 1).cast(np.float64).op("Unsqueeze", [1])
    scale = side.cast(np.float64) / new_side.cast(np.float64)
    wide = scale.op("Max", 1)
    support = wide * (2 if bicubic else 1)
    centre = (begin.op("Range", end, 1).cast(np.float64) + 0.5) * scale
    inside = (old >= (centre - support + 0.5).op("Floor")) & (old < (centre + support + 0.5).op("Floor"))
    x = ((old - centre + 0.5) * wide.op("Reciprocal")).op("Abs")
    if bicubic:
        near = (x * 1.5 - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        weights = (x < 1).op("Where", near, (x < 2).op("Where", far, 0))
    else:
        weights = (x.op("Neg") + 1).op("Max", 0)
    weights = inside.op("Where", weights, 0)
    weights = weights / weights.op("ReduceSum", [0])
    return weights.op("Sign") * ((weights * _UNIT).op("Abs") + 0.5).op("Floor")  # halves away from zero
