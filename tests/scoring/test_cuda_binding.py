"""Arguments that the CUDA module's functions refuse."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # compiles the emulation


def good_arguments() -> dict[str, Any]:
    return {
        "device": 0,
        "stream": 0,
        "key_precision": "fp16",
        "n_queries": 3,
        "n_keys": 4,
        "n_classes": 2,
        "queries": 4096,
        "query_bytes": 32,
        "query_parts": 1,
        "part_scale": 1.0,
        "keys": 4096,
        "key_bytes": 32,
        "key_class": 4096,
        "class_offsets": 4096,
        "weights": None,
        "key_scales": None,
        "scale": 1.0,
        "alpha": 1.0,
        "edges": None,
        "logits": 4096,
    }


def linear_arguments() -> dict[str, Any]:
    return {
        "device": 0,
        "stream": 0,
        "precision": "fp16",
        "n_queries": 3,
        "n_classes": 2,
        "operands": [(4096, 32, 8192, 128, 1.0)],
        "row_parts": 2,
        "part_scale": 1.0,
        "bias": None,
        "class_offsets": None,
        "logits": 4096,
    }


BAD_ARGUMENTS = [
    ({"keys": 4104}, "keys at a device address that is a multiple of 16, got 4104"),
    ({"logits": 0}, "logits at a device address"),
    ({"n_keys": 0}, "n_keys in 1"),
    ({"key_bytes": 40}, "key_bytes to be a multiple of 16, got 40"),
    ({"query_parts": 4}, "query_parts in 1..3, got 4"),
    ({"query_parts": 2}, "2 parts of 64 bytes in a query, got 32 bytes"),
    ({"key_precision": "int8"}, "key_scales with int8 keys and only there, got int8 without"),
    ({"key_precision": "fp8"}, "a key precision of fp32, fp16, bf16 or int8, got fp8"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_the_binding_refuses_what_cannot_be_right(change: dict[str, Any], message: str, emulation: Any) -> None:
    with pytest.raises(ValueError, match=message):
        emulation.cache(**{**good_arguments(), **change})


BAD_LINEAR_ARGUMENTS = [
    ({"precision": "bf16"}, "a precision of fp32 or fp16, got bf16"),
    ({"precision": "fp32"}, "row_parts in 1..1, got 2"),
    ({"operands": [(4096, 32, 8192, 96, 1.0)]}, "2 parts of 64 bytes in a row, got 96 bytes"),
    ({"operands": [(4096, 32, 8192, 128, 1.0)] * 3}, "at most 2 operands, got 3"),
    ({"n_classes": 0}, "n_classes in 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LINEAR_ARGUMENTS)
def test_the_binding_refuses_wrong_linear_terms(change: dict[str, Any], message: str, emulation: Any) -> None:
    with pytest.raises(ValueError, match=message):
        emulation.linear(**{**linear_arguments(), **change})


def test_importing_loads_neither_torch_nor_the_extension() -> None:
    code = (
        "import sys, iosr_fast.scoring.cuda_scorer; "
        "raise SystemExit(any(name in sys.modules for name in ('torch', 'iosr_fast._C_cuda')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
