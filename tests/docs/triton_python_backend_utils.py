"""What Triton Inference Server's Python backend gives to a model.py, as far as the recipe of recipes.md uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


class TritonError(Exception):
    def message(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass(frozen=True)
class InferenceRequest:
    inputs: Sequence[Tensor]


@dataclass(frozen=True)
class InferenceResponse:
    output_tensors: Sequence[Tensor] = field(default_factory=list)
    error: TritonError | None = None


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor:
    (tensor,) = (tensor for tensor in request.inputs if tensor.name == name)
    return tensor
