"""The fused encoder quantised by NNCF, in OpenVINO: a rival of export/quantize.py. Needs `pip install nncf`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from iosr_fast.encoders.runtimes.batched import BatchedEncoder
from iosr_fast.encoders.runtimes.openvino import openvino_core

PICTURES = 32  # more change little, and its SmoothQuant keeps their activations in memory


class NncfEncoder(BatchedEncoder):
    """encoder.onnx after post-training quantisation as NNCF's documentation advises for transformers.

    `pictures` uint8 (N, S, S, 3) calibrate; the quantised model is saved as `target` (.xml).
    """

    def __init__(self, source: Path, target: Path, manifest: dict[str, Any], pictures: np.ndarray, threads: int):
        super().__init__(manifest, "openvino")
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        core = openvino_core()
        chosen = pictures[np.linspace(0, len(pictures) - 1, min(PICTURES, len(pictures))).astype(int)]
        quantised = nncf.quantize(
            core.read_model(str(source)),
            nncf.Dataset(list(chosen[:, None]), lambda pixels: {"pixels": pixels}),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(chosen),
        )
        openvino.save_model(quantised, str(target), compress_to_fp16=False)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        options["INFERENCE_NUM_THREADS"] = str(threads)
        self._request = core.compile_model(quantised, "CPU", options).create_infer_request()

    def _run(self, pixels: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        outputs = self._request.infer({"pixels": pixels})
        return tuple(np.array(outputs[name]) for name in self.outputs)
