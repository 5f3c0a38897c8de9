"""The resize and crop of images.preprocess as nodes, equal to the last bit where a runtime has float64.

Each pass is a product with the weights of Pillow's filter, integers of 22 bits (libImaging/Resample.c), which the graph
computes from the sizes; float64 holds every sum exactly. OpenVINO computes in float32: there up to 2% of the pixels
differ, most by one level and none by more than two.
"""

from __future__ import annotations

import numpy as np

from iosr_fast.export.one_file.nodes import Nodes, axes
from iosr_fast.images.geometry import Geometry, Interpolation

_UNIT = float(1 << 22)  # the weight 1 as an integer
_NUMBER = np.float64


def add_pixels(nodes: Nodes, picture: str, geometry: Geometry) -> str:
    """uint8 pictures (B, H, W, 3) of any size to uint8 pixels (B, S, S, 3), as `resize_and_crop` makes them."""
    size = geometry.size
    sides = nodes.add("Shape", picture, start=1, end=3)  # (H, W)
    resized = _resized(nodes, sides, geometry)
    shown = resized if geometry.resize_mode == "longest" else axes(size, size)
    cropped = nodes.cast(nodes.add("Sub", resized, shown), np.float32)
    begin = nodes.cast(nodes.add("Round", nodes.add("Mul", cropped, 0.5)), np.int64)  # halves to even, as Python's
    end = nodes.add("Add", begin, shown)
    values = nodes.cast(nodes.add("Transpose", picture, perm=[0, 3, 1, 2]), np.float64)
    for side in (1, 0):  # columns first: ONNX Runtime has no product of a transposed matrix in float64, so turn results
        before, after, first, last = (
            nodes.add("Gather", each, np.int64(side)) for each in (sides, resized, begin, end)
        )
        weights = _weights(nodes, before, after, first, last, geometry.interpolation)
        sums = nodes.add("MatMul", values, weights)
        values = _levels(nodes, nodes.add("Transpose", sums, perm=[0, 1, 3, 2]))
    pixels = nodes.add("Transpose", nodes.cast(values, np.uint8), perm=[0, 2, 3, 1])
    if geometry.resize_mode != "longest":
        return pixels
    free = nodes.add("Sub", axes(size, size), resized)
    before = nodes.add("Div", free, axes(2))
    after = nodes.add("Sub", free, before)  # an odd pixel more at the end
    none = axes(0)
    margins = nodes.add("Concat", none, before, none, none, after, none, axis=0)
    return nodes.add("Pad", pixels, margins, np.uint8(geometry.fill))


def _resized(nodes: Nodes, sides: str, geometry: Geometry) -> str:
    """Geometry.resized: (H, W) after the resize, int64."""
    size = geometry.size
    if geometry.resize_mode == "squash":
        return nodes.constant(axes(size, size))
    if geometry.resize_mode == "shortest":
        shortest = nodes.add("ReduceMin", sides, axes(0), keepdims=1)
        return nodes.add("Div", nodes.add("Mul", sides, axes(size)), shortest)
    longest = nodes.cast(nodes.add("ReduceMax", sides, axes(0), keepdims=1), np.float64)
    exact = nodes.add("Div", nodes.cast(sides, np.float64), nodes.add("Div", longest, _NUMBER(size)))
    return nodes.add("Max", nodes.cast(nodes.add("Round", exact), np.int64), axes(1))


def _weights(nodes: Nodes, side: str, new_side: str, begin: str, end: str, interpolation: Interpolation) -> str:
    """(side, end - begin) float64: what each row of a picture weighs in the rows `begin` to `end` of the resized one.
    Operations and their order are those of Pillow's precompute_coeffs."""
    add = nodes.add
    half = _NUMBER(0.5)
    old = add("Unsqueeze", nodes.cast(add("Range", np.int64(0), side, np.int64(1)), np.float64), axes(1))
    new = nodes.cast(add("Range", begin, end, np.int64(1)), np.float64)
    scale = add("Div", nodes.cast(side, np.float64), nodes.cast(new_side, np.float64))
    wide = add("Max", scale, _NUMBER(1))
    support = add("Mul", wide, _NUMBER(2 if interpolation == "bicubic" else 1))
    centre = add("Mul", add("Add", new, half), scale)
    low = add("Floor", add("Add", add("Sub", centre, support), half))
    high = add("Floor", add("Add", add("Add", centre, support), half))
    inside = add("And", add("GreaterOrEqual", old, low), add("Less", old, high))
    distance = add("Abs", add("Mul", add("Add", add("Sub", old, centre), half), add("Reciprocal", wide)))
    weights = _filter(nodes, distance, interpolation)
    weights = add("Where", inside, weights, _NUMBER(0))
    weights = add("Div", weights, add("ReduceSum", weights, axes(0), keepdims=1))
    rounded = add("Floor", add("Add", add("Abs", add("Mul", weights, _NUMBER(_UNIT))), half))
    return add("Mul", add("Sign", weights), rounded)  # halves away from zero


def _filter(nodes: Nodes, x: str, interpolation: Interpolation) -> str:
    """Pillow's filter at the distances x >= 0, float64."""
    if interpolation == "bilinear":
        return nodes.add("Max", nodes.add("Sub", _NUMBER(1), x), _NUMBER(0))

    def plus(value: str, constant: float) -> str:
        return nodes.add("Add", value, _NUMBER(constant))

    def times(value: str, other: str | float) -> str:
        return nodes.add("Mul", value, other if isinstance(other, str) else _NUMBER(other))

    near = plus(times(times(plus(times(x, 1.5), -2.5), x), x), 1.0)
    far = times(plus(times(plus(times(plus(x, -5.0), x), 8.0), x), -4.0), -0.5)
    beyond_1 = nodes.add("Where", nodes.add("Less", x, _NUMBER(2)), far, _NUMBER(0))
    return nodes.add("Where", nodes.add("Less", x, _NUMBER(1)), near, beyond_1)


def _levels(nodes: Nodes, sums: str) -> str:
    """Sums of levels times integer weights to levels 0 .. 255, halves up, float64."""
    scaled = nodes.add("Mul", nodes.add("Add", sums, _NUMBER(_UNIT / 2)), _NUMBER(1 / _UNIT))
    return nodes.add("Clip", nodes.add("Floor", scaled), _NUMBER(0), _NUMBER(255))
