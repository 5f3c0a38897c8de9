"""A ScoringPlan as torch tensors on one device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.fields import ARRAYS, CONSTANTS, PlanTerms
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_T = TypeVar("_T")
_lock = threading.RLock()


class DevicePlan(PlanTerms):
    """The arrays of a ScoringPlan as contiguous tensors on `device`, under the names and with the shapes of fields.py,
    and its constants.

    Keys are float32, float16, bfloat16 or int8; class_offsets are int32, and `offsets` the same on the host, int64.
    Tensors must never be written to: on the CPU they are the plan's own memory.
    """

    def __init__(self, plan: ScoringPlan, device: torch.device) -> None:
        if plan.keys is not None and len(plan.keys) >= 2**31:
            raise IosrFastError(f"expected fewer than 2**31 keys on a device, got {len(plan.keys)}; split the plan")
        self.device, self.width, self.offsets = device, plan.width, plan.class_offsets
        for field in ARRAYS:
            array: np.ndarray | None = getattr(plan, field.name)
            if array is not None and field.device_dtype is not None:
                array = array.astype(field.device_dtype)
            setattr(self, field.name, None if array is None else as_tensor(array).to(device))
        for constant in CONSTANTS:
            setattr(self, constant.name, getattr(plan, constant.name))
        if device.type == "cuda":  # the next call may come on another stream, which doesn't wait for the copies
            require("torch", "gpu").cuda.current_stream(device).synchronize()
        self._cached: dict[str, Any] = {}

    def cached(self, name: str, compute: Callable[[], _T]) -> _T:
        """compute(), once, for what a backend derives from the plan and keeps with it."""
        with _lock:
            if name not in self._cached:
                self._cached[name] = compute()
            value: _T = self._cached[name]
            return value

    def add_product(self, rows: Tensor, matrix: Tensor, factor: float, logits: Tensor) -> None:
        """AddProduct (scoring.arrays) of a matrix of this plan: in float32; on a GPU, as exactly, by float16 parts."""
        from iosr_fast.scoring.half_products import add_split_product, has_half_products, matrix_parts

        if not has_half_products(self.device):
            logits.addmm_(rows.float(), matrix.T, alpha=factor)
            return
        parts = self.cached(f"parts/{matrix.data_ptr()}", lambda: matrix_parts(matrix))
        add_split_product(rows, parts, factor, logits)


def device_plan(plan: ScoringPlan, device: Any) -> DevicePlan:
    """`plan` on `device`, a torch.device or its name; copied once and kept as long as the plan.

    On the CPU the tensors share the plan's memory (but class_offsets). Raises MissingPackageError without PyTorch,
    IosrFastError for 2**31 keys or more.
    """
    torch = require("torch", "cpu")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    with _lock:
        known: dict[Any, DevicePlan] = vars(plan).setdefault("_on_device", {})
        if place not in known:
            known[place] = DevicePlan(plan, place)
        return known[place]


class _Writable:
    """Memory of a read-only array, described as writable: torch has no read-only tensors and warns of such arrays."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory alive
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def as_tensor(array: np.ndarray) -> Tensor:
    """A CPU tensor on the array's memory, which must not be written to; uint16 holds the bits of bfloat16."""
    torch = require("torch", "cpu")
    shared: np.ndarray = array if array.flags.writeable else np.asarray(_Writable(array))
    if array.dtype == np.uint16:
        bits: Tensor = torch.from_numpy(shared.view(np.int16)).view(torch.bfloat16)
        return bits
    tensor: Tensor = torch.from_numpy(shared)
    return tensor
