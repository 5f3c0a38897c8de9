"""What an engine's embeddings depend on: its precision, the runtimes that compute in it, and the fingerprint."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from iosr_fast.encoders.engine_folder import EXTRAS, ONNX_RUNTIMES, choose_runtime, target
from iosr_fast.exceptions import IosrFastError
from iosr_fast.export.quantize.calibration import NO_PRODUCTS, QUANTISED
from iosr_fast.utils import machine

if TYPE_CHECKING:
    from iosr_fast.backbones.dual_config import GraphPrecision

log = logging.getLogger(__name__)
_Built = TypeVar("_Built")
# The runtimes of each precision. For OpenVINO's bf16 the graph is fp32, and it rounds.
RUNTIMES_OF = {
    "fp32": ("onnxruntime", "openvino", "torch", "tensorrt", "tensorrt_rtx"),
    "fp16": ("onnxruntime", "openvino", "torch", "tensorrt", "tensorrt_rtx"),
    "bf16": ("openvino", "torch"),
    "int8": ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"),
    "fp8": ("tensorrt", "tensorrt_rtx"),
}
EXPORT_VERSION = 1  # increases when the same weights give other embeddings


class Exportable:
    """An image encoder, as far as it decides what its engines can be: one that is fused, with or without an adapter
    (backbones.fuse), or one that is exported as it is, in fp32 and as ONNX; with products for 8 bits, or without."""

    def __init__(self, name: str, fused: bool, products: bool) -> None:
        self.name, self.fused, self.products = name, fused, products

    def runtimes(self, precision: str) -> tuple[str, ...]:
        """The runtimes that compute it in a precision."""
        possible = RUNTIMES_OF[precision] if self.fused or precision not in ("fp16", "fp8") else ()
        return tuple(name for name in possible if self.fused or name != "torch")

    def check(self, runtime: str, precision: str) -> str:
        """The runtime to build an engine for: `runtime` itself, or the best one here for "auto".

        Raises ValueError for an unknown precision, one that the runtime doesn't compute in, and 8 bits without
        products; ImportError for a missing package; RuntimeError for a plan that can't be built here.
        """
        if precision not in RUNTIMES_OF:
            raise IosrFastError(f"expected a precision of {list(RUNTIMES_OF)}, got {precision!r}")
        capable = self.runtimes(precision)
        of = "" if self.fused else " for an image encoder that can't be fused"
        if not capable:
            raise IosrFastError(f"expected fp32, bf16 or int8{of}, got {precision}")
        runtime = choose_runtime(runtime, capable if runtime == "auto" else None)
        if runtime not in capable:
            raise IosrFastError(
                f"expected one of {list(capable)}, which compute in {precision}{of}, got the runtime {runtime!r}"
            )
        if precision in QUANTISED and not self.products:
            raise IosrFastError(f"expected fp32 or bf16 for {self.name}, got {precision}: {NO_PRODUCTS}")
        if runtime in EXTRAS:
            target(runtime)
        return runtime

    def default_precisions(self, runtime: str) -> tuple[str, ...]:
        """What an engine is built in where no precision is named: the first whose embeddings are right. On a CPU, and
        of an encoder that is not fused, fp32."""
        if not self.fused or self.check(runtime, "fp32") in ONNX_RUNTIMES or machine.this_gpu() is None:
            return ("fp32",)
        return tuple(name for name in ("fp16", "bf16", "fp32") if runtime in ("auto", *RUNTIMES_OF[name]))

    def graph_precision(self, precision: str, runtime: str) -> GraphPrecision:
        """The precision of the exported graph; of a quantised one, the precision outside the products: fp16 for
        TensorRT, fp32 on a CPU and for an encoder that is not fused."""
        if precision == "bf16" and runtime == "torch":
            return "bf16"
        half = precision == "fp16" or (precision in QUANTISED and runtime in EXTRAS)
        return "fp16" if half and self.fused else "fp32"


def default_batch(runtime: str) -> int:
    """The pictures of one run: 32 on a CPU; on a GPU one for each 128 MiB of its memory, a power of two from 32 to
    256."""
    gpu = None if runtime in ONNX_RUNTIMES else machine.this_gpu()
    return 32 if gpu is None else min(max(1 << ((gpu.memory >> 27).bit_length() - 1), 32), 256)


def first_right(precisions: Sequence[str], build: Callable[[str], _Built]) -> _Built:
    """What `build` returns for the first precision that it raises no ArithmeticError for; raises that of the last."""
    for name in precisions[:-1]:
        try:
            return build(name)
        except ArithmeticError as error:
            log.warning("the engine is not in %s: %s", name, error)
    return build(precisions[-1])


def engine_fingerprint(
    clip: str,
    adapter: str | None,
    precision: str,
    quantised: dict[str, Any] | None = None,
    tokens: dict[str, int] | None = None,
) -> str:
    """SHA-256 over the fingerprints of CLIP and adapter, precision, export version, `quantisation` and `tokens` (as in
    the manifest).

    It is equal for all runtimes that compute the same embeddings, so that they share cached keys.
    """
    parts = [clip, adapter or "", precision, str(EXPORT_VERSION)]
    if quantised is not None:
        parts.append(json.dumps(quantised, sort_keys=True))
    if tokens is not None:
        parts.append(json.dumps({"tokens": tokens}, sort_keys=True))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
