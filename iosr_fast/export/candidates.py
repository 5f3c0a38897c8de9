"""The engines that this machine can run in place of a given one, and each of them built and opened."""

from __future__ import annotations

import logging
import shutil
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.encoders.engine_folder import ONNX_RUNTIMES, runtimes_of, unavailable_reason
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.encoders.runtimes.openvino import openvino_core
from iosr_fast.export.build import write_engine
from iosr_fast.export.quantize.calibration import MIN_PICTURES, NO_PRODUCTS, QUANTISED
from iosr_fast.export.source import EngineSource, source_of
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.sealed.files import in_cache, temporary_folder
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.utils.machine import this_gpu

if TYPE_CHECKING:
    from iosr_fast.backbones.adapter import Adapter
    from iosr_fast.backbones.load import LoadedModel

ON_CPU, ON_GPU = ("fp32", "bf16", "int8"), ("fp32", "fp16", "int8", "fp8")
log = logging.getLogger(__name__)
Tokens = dict[str, int]  # of an engine for smaller images: {"image_size": 192}


class Candidate(NamedTuple):
    """A runtime and a precision, and the size of smaller images; `left_out` says why it is not tried, "" if it is."""

    runtime: str
    precision: str
    left_out: str = ""
    tokens: Tokens | None = None


def with_smaller_images(engine: VerifiedFolder, listed: list[Candidate]) -> list[Candidate]:
    """Candidates for images of 6/7 and 5/7 of the side (192 and 160 of 224); in int8 where that is tried, in the
    runtime that comes first."""
    config, tried = engine.manifest["dual_encoder"], [one for one in listed if not one.left_out]
    if not tried or config is None:
        return []
    first = next((one for one in tried if one.precision == "int8"), tried[0])
    side = engine.manifest["image_size"] // config["patch_size"]
    sizes = sorted({round(side * part / 7) * config["patch_size"] for part in (6, 5)}, reverse=True)
    return [first._replace(tokens={"image_size": size}) for size in sizes]


def list_candidates(
    engine: VerifiedFolder, pictures: int, runtime: str = "auto", precision: str = "auto", with_clip: bool = False
) -> list[Candidate]:
    """The engines to try in place of `engine`, more exact precisions first; another name than "auto" restricts them.

    `pictures` are at hand to calibrate with; `with_clip`, the CLIP is at hand to export from. On a GPU: TensorRT,
    TensorRT-RTX and PyTorch in fp32 and fp16, the first two in int8 and fp8, too. On a CPU: OpenVINO and ONNX Runtime
    in fp32, bf16 and int8; fp16 and fp8 are no faster there. Runtimes that are not installed are not listed. An engine
    that is not in fp32 keeps its precision, because its weights are rounded.
    """
    gpu = None if runtime in ONNX_RUNTIMES else this_gpu()
    names: tuple[str, ...] = ONNX_RUNTIMES if gpu is None else ("tensorrt", "tensorrt_rtx", "torch")
    precisions: tuple[str, ...] = ON_CPU if gpu is None else ON_GPU
    if engine.manifest["precision"] != "fp32":
        precisions = (engine.manifest["precision"],)
    source = EngineSource(engine)
    listed = [
        Candidate(name, each)
        for each in precisions
        for name in names
        if name in source.runtimes(each) and runtime in ("auto", name) and precision in ("auto", each)
        if runtime != "auto" or unavailable_reason(name) is None
    ]
    return [one._replace(left_out=_left_out(one, source, pictures, with_clip)) for one in listed]


def _left_out(one: Candidate, source: EngineSource, pictures: int, with_clip: bool) -> str:
    if (reason := unavailable_reason(one.runtime)) is not None:
        return reason
    in_bf16 = one.precision == "bf16" and one.runtime == "openvino"
    if in_bf16 and "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this processor has no bf16 instructions"
    gpu = this_gpu() if one.precision == "fp8" else None
    if gpu is not None and gpu.capability < (8, 9):
        return f"{gpu.name} has no fp8 instructions"
    if _is_there(one, source.engine):
        return ""
    if one.precision in QUANTISED and not source.products:
        return NO_PRODUCTS
    if one.precision in QUANTISED and pictures < MIN_PICTURES:
        return f"{MIN_PICTURES} pictures are needed to calibrate, got {pictures}"
    if not with_clip and not source.has_graph_of(one.precision, one.runtime):
        return "it is exported from the model's weights, which were not named"
    return ""


def _is_there(one: Candidate, engine: VerifiedFolder) -> bool:
    """Whether the engine itself is this candidate."""
    manifest = engine.manifest
    return not one.tokens and one.precision == manifest["precision"] and one.runtime in runtimes_of(manifest)


class CandidateBuilder:
    """Opens candidates in place of `engine`, in the form that open_engine's `adapted` names. What has to be built is
    built once, in a folder of its own in the cache, of which `keep` leaves one engine, and `close` nothing.

    `pictures` uint8 (N, S, S, 3) calibrate and check; `loaded` is the CLIP and the adapter to export from.
    """

    def __init__(
        self,
        engine: VerifiedFolder,
        pictures: np.ndarray,
        loaded: tuple[LoadedModel, Adapter | None] | None = None,
        threads: int | None = None,
        adapted: bool = True,
    ) -> None:
        self.engine, self._pictures, self._loaded = engine, pictures if len(pictures) else None, loaded
        self._options: dict[str, Any] = {"threads": threads, "adapted": adapted}
        self._building = ExitStack()
        self._folder = self._building.enter_context(temporary_folder(in_cache("optimize")))
        self._errors: dict[str, Exception | None] = {}  # of each folder that was built, or tried

    def start_in_fp32(self, runtime: str) -> Encoder:
        """Export the CLIP in fp32, which replaces an `engine` in another precision; returns the encoder."""
        encoder = self.open(Candidate(runtime, "fp32"))
        assert encoder.source is not None
        self.engine = encoder.source
        return encoder

    def open(self, one: Candidate) -> Encoder:
        """The candidate's encoder. Raises what building raises; for embeddings that are off an ArithmeticError in words
        for those who never asked for this engine. The numbers are logged."""
        if _is_there(one, self.engine):
            return open_engine(self.engine, one.runtime, **self._options)
        runtime = "cpu" if one.runtime in ONNX_RUNTIMES else one.runtime  # which execute the same file
        name = "-".join(map(str, (one.precision, runtime, *(one.tokens or {}).values())))
        if name not in self._errors:
            self._errors[name] = None
            try:
                self._build(self._folder / name, one)
            except ArithmeticError as error:
                log.info("%s %s is not taken: %s", one.runtime, one.precision, error)
                what = f"{one.runtime} {one.precision} changes embeddings too much on this processor"
                self._errors[name] = ArithmeticError(what)
            except Exception as error:
                self._errors[name] = error
        if (failed := self._errors[name]) is not None:
            raise failed
        return open_engine(self._folder / name, one.runtime, verify=False, **self._options)

    def keep(self, encoder: Encoder) -> Path:
        """The folder of an encoder that was opened here, or of the first engine's, while all others are removed. What
        was built stays as long as the encoder."""
        assert encoder.source is not None
        folder = encoder.source.folder
        if folder.parent != self._folder:
            self.close()
            return folder
        for other in self._folder.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        weakref.finalize(encoder, self._building.close)
        return folder

    def close(self) -> None:
        """Remove what was built."""
        self._building.close()

    def _build(self, folder: Path, one: Candidate) -> None:
        engine = EngineSource(self.engine)
        if not one.tokens and engine.has_graph_of(one.precision, one.runtime):
            write_engine(engine, folder, one.runtime, one.precision, pictures=self._pictures)
            return
        assert self._loaded is not None  # _left_out
        clip, adapter = self._loaded
        pictures, size = self._pictures, (one.tokens or {}).get("image_size")
        if size is not None and pictures is not None:
            pictures = to_pixels(list(pictures), replace(clip.geometry, size=size))
        max_batch = self.engine.manifest["max_batch"]
        write_engine(source_of(clip, adapter, size), folder, one.runtime, one.precision, max_batch, pictures)
