"""Callers' embeddings (NumPy, torch, DLPack), checked once and passed on, without a copy if possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from iosr_fast.encoders.encoder import Array, Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.fields import PlanTerms
from iosr_fast.scoring.key_precision import KeyPrecision
from iosr_fast.scoring.validation import UNIT_NORM_TOLERANCE, check_real, check_unit_rows, unit_norm_message
from iosr_fast.utils.numbers import is_tensor

if TYPE_CHECKING:
    from torch import Tensor

_DLPACK_CPU = (1, 3)  # kDLCPU and kDLCUDAHost of dlpack.h: memory that NumPy can read
_ROUNDED: dict[str, KeyPrecision] = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}


class Inputs(NamedTuple):
    """Embeddings that fit a plan: C-contiguous float32 NumPy arrays if `device` is "cpu"; if it is "cuda", contiguous
    tensors of float32, float16 or bfloat16, both of one dtype. `torch` says whether the caller gave tensors."""

    embeddings: Embeddings
    device: str = "cpu"
    torch: bool = False


def checked_inputs(plan: PlanTerms, embeddings: Embeddings, check: bool = True) -> Inputs:
    """Check embeddings against a plan. `check=False` skips finiteness and norms, never shapes.

    CPU tensors and DLPack objects in CPU memory become NumPy views, copied only if they aren't contiguous float32.
    Tensors on a CUDA device stay there; checking their norms reads one scalar back.
    Raises IosrFastError if a shape, a norm or the device of an array is wrong, and as `check_real`.
    """
    if plan.needs_adapted and embeddings.adapted is None:
        raise IosrFastError(
            "expected adapted embeddings, which this plan reads, got None; encode with an encoder that has an adapter, "
            'or compile the plan for query="plain"'
        )
    if _usual(plan, embeddings.plain, check) and (
        embeddings.adapted is None
        or (len(embeddings.adapted) == len(embeddings.plain) and _usual(plan, embeddings.adapted, check))
    ):
        return Inputs(embeddings)
    named = {"plain": _import(embeddings.plain)}
    if embeddings.adapted is not None:
        named["adapted"] = _import(embeddings.adapted)
    places = {
        name: str(getattr(array, "device", "cpu")) if is_tensor(array) else "numpy" for name, array in named.items()
    }
    if len(set(places.values())) > 1:
        raise IosrFastError(f"expected plain and adapted embeddings of one kind in one place, got {places}")
    n_queries = len(named["plain"]) if named["plain"].ndim else 0
    for name, array in named.items():
        check_real(f"{name} embeddings", array)
        if tuple(array.shape) != (n_queries, plan.width):
            raise IosrFastError(
                f"expected {name} embeddings of shape ({n_queries}, {plan.width}), got {tuple(array.shape)}; "
                "the plan and the embeddings must come from the same encoder"
            )
    precision = {name: _precision_of(array) for name, array in named.items()}
    tensors = is_tensor(named["plain"])
    if tensors and named["plain"].device.type != "cpu":
        on_device = _on_device(named)
        if check:
            _check_unit_tensors(on_device, precision)
        return Inputs(Embeddings(on_device["plain"], on_device.get("adapted")), "cuda", True)
    arrays = {name: _contiguous(array) for name, array in named.items()}
    if check:
        for name, array in arrays.items():
            check_unit_rows(name, array, precision=precision[name])
    return Inputs(Embeddings(arrays["plain"], arrays.get("adapted")), "cpu", tensors)


def _usual(plan: PlanTerms, rows: Any, check: bool) -> bool:
    """Whether `rows` are contiguous float32 unit rows (B, D), by a check of a microsecond. Others are converted or
    refused with a message."""
    if type(rows) is not np.ndarray or rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != plan.width:
        return False
    if not check:
        return rows.flags.c_contiguous
    try:
        from iosr_fast import _C
    except ImportError:  # dispatch says how to build it
        return False
    return rows.flags.c_contiguous and _C.unit_rows(rows, UNIT_NORM_TOLERANCE["fp32"])


def _precision_of(array: Array) -> KeyPrecision:
    if isinstance(array, np.ndarray):
        return "fp16" if array.dtype == np.float16 else "fp32"
    return _ROUNDED.get(str(array.dtype), "fp32")


def _import(array: Array) -> Array:
    """`array` as a NumPy array or a torch tensor; a view of the memory of DLPack objects."""
    if isinstance(array, np.ndarray) or is_tensor(array):
        return array
    if not hasattr(array, "__dlpack__"):
        return np.asanyarray(array)  # which leaves a mask
    if array.__dlpack_device__()[0] not in _DLPACK_CPU:
        from iosr_fast.utils.require import require

        return require("torch", "cpu").from_dlpack(array)
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise IosrFastError(
            f"expected embeddings that NumPy can read through DLPack, got {type(array).__name__} ({error}); "
            "convert them to float32 in CPU memory"
        ) from error


def _contiguous(array: Array) -> np.ndarray:
    if is_tensor(array):
        array = array.detach().float().numpy()
    return np.ascontiguousarray(array, dtype=np.float32)


def _on_device(named: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    first = named["plain"]
    if first.device.type != "cuda":
        raise IosrFastError(
            f"expected embeddings on the CPU or on a CUDA device, got {first.device}; move them with .cpu()"
        )
    one_dtype = len({array.dtype for array in named.values()}) == 1
    supported = one_dtype and first.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return {
        name: (array.detach() if supported else array.detach().float()).contiguous() for name, array in named.items()
    }


def _check_unit_tensors(named: dict[str, Tensor], precision: dict[str, KeyPrecision]) -> None:
    """check_unit_rows on the tensors' own device; reads one scalar if all rows pass."""
    import torch

    norms = {name: torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for name, rows in named.items()}
    # NaN compares false and so counts as wrong.
    good = {name: (norms[name] - 1.0).abs() <= UNIT_NORM_TOLERANCE[precision[name]] for name in named}
    if bool(torch.stack([rows.all() for rows in good.values()]).all()):
        return
    for name, rows in good.items():
        wrong = torch.nonzero(~rows).flatten()
        if len(wrong):
            first = int(wrong[0])
            finite = bool(torch.isfinite(named[name][wrong]).all())
            raise IosrFastError(
                unit_norm_message(name, len(wrong), len(rows), first, float(norms[name][first]), finite)
            )
