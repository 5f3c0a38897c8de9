"""What 8 bits need: an encoder with products, and pictures to calibrate on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.encoders.engine_folder import ONNX_RUNTIMES
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import IMAGE_SUFFIXES, list_images
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    from iosr_fast.images.geometry import Geometry

QUANTISED = ("int8", "fp8")
QUANTISER_VERSION = 3  # increases when the same weights and pictures give other embeddings
NO_PRODUCTS = "8 bits are for products with constant matrices, and its encoder has convolutions alone"
CALIBRATION_PICTURES, MIN_PICTURES = 256, 8
PRODUCTS = ("MatMul", "Gemm")


def is_product(node: Any, matrices: Any) -> bool:
    """Whether a node of a graph is x @ W + bias with a W of `matrices`, names of constants: MatMul or Gemm whose second
    factor is constant, and whose first is not transposed."""
    transposed = any(attribute.name == "transA" and attribute.i == 1 for attribute in node.attribute)
    return node.op_type in PRODUCTS and node.input[1] in matrices and not transposed


def graph_has_products(model: Any) -> bool:
    """Whether the graph of an onnx.ModelProto has products with constant matrices beside its last projection, which
    stays in float: one of convolutions alone has none."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return len({node.input[0] for node in model.graph.node if is_product(node, matrices)}) > 1


def module_has_products(module: Any) -> bool:
    """The same of a torch module, which may be of shapes alone."""
    linear = require("torch.nn", "cpu").Linear
    return sum(isinstance(layer, linear) for layer in module.modules()) > 1


def calibration_pictures(name: str, geometry: Geometry, folder: str | Path | None = None) -> np.ndarray:
    """At most 256 pictures, evenly spaced in `folder` (with sub-folders), as uint8 (N, S, S, 3), for the model `name`.

    Without a folder, the demo's CLIP takes its generic pictures, which show none of the held-out concepts. Raises
    ValueError for another model without a folder and for a folder without pictures, FileNotFoundError for a missing
    folder.
    """
    if folder is None:
        if name != "demo":
            raise IosrFastError(
                f"expected calibration pictures to quantise {name}, got none; give a folder of a few hundred "
                "like those to be classified (iosr-fast build-engine --calibration DIR)"
            )
        from iosr_fast.backbones.demo.pictures import load_pictures

        return evenly(load_pictures("generic").images, CALIBRATION_PICTURES)
    paths = list_images(folder).paths
    if not paths:
        raise IosrFastError(
            f"expected pictures to calibrate on ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}, found none"
        )
    return to_pixels(evenly(np.array(paths, dtype=object), CALIBRATION_PICTURES).tolist(), geometry)


def quantisation(image_size: int, runtime: str, precision: str, pictures: np.ndarray | None) -> dict[str, Any] | None:
    """What a quantised engine's embeddings depend on besides its weights, as JSON values; None for other precisions.

    Raises ValueError for calibration pictures that are missing, too few, or of another shape or dtype.
    """
    if precision not in QUANTISED:
        return None
    got = "none" if pictures is None else f"{pictures.dtype} {pictures.shape}"
    side = image_size, image_size, 3
    if pictures is None or pictures.dtype != "u1" or pictures.shape[1:] != side or len(pictures) < MIN_PICTURES:
        raise IosrFastError(
            f"expected calibration pictures as uint8 (N, {image_size}, {image_size}, 3) with N >= {MIN_PICTURES} for "
            f"{precision}, got {got}; calibration_pictures reads them from a folder, images.preprocess.to_pixels "
            "resizes them"
        )
    form = "fp8" if precision == "fp8" else "u8s8" if runtime in ONNX_RUNTIMES else "s8s8"
    digest = hashlib.sha256(pictures.tobytes()).hexdigest()
    return {"form": form, "calibration_sha256": digest, "version": QUANTISER_VERSION}


def evenly(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of `items`, evenly spaced from the first to the last, each once."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    chosen: np.ndarray = items[np.unique(places)]
    return chosen
