"""A ScoringPlan as torch tensors on one device, and a cache of values derived from these tensors."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.fields import ARRAYS, CONSTANT_NAMES, EMBEDDINGS, PlanTerms
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class DevicePlan(PlanTerms):
    """A ScoringPlan for kernels on tensors: the same formula, fields and shapes (fields.py), on `device`.

    Keys are float32, float16, bfloat16 or int8; class_offsets are int32. reducer_shift and reducer_projection are the
    reducer's arrays, None without one. Tensors are contiguous and must never be written to: on the CPU they are the
    plan's own memory.
    """

    n_classes: int
    width: int
    device: torch.device
    text: Tensor | None
    tau: float
    keys: Tensor | None
    key_scales: Tensor | None
    class_offsets: Tensor | None
    weights: Tensor | None
    values: Tensor | None
    query_transform: Tensor | None
    alpha: float
    beta: float
    query: str
    linear: Tensor | None
    bias: Tensor | None
    feature: str
    temperature: float
    reducer_shift: Tensor | None
    reducer_projection: Tensor | None

    @property
    def offsets(self) -> np.ndarray | None:
        """The class offsets on the host, (C + 1,) int64."""
        return None if self.class_offsets is None else self.class_offsets.cpu().numpy().astype(np.int64)

    def cached(self, name: str, compute: Callable[[], _T]) -> _T:
        """compute(), once, for what a backend derives from the plan and keeps with it."""
        known: dict[str, Any] = vars(self).setdefault("_cached", {})
        if name not in known:
            known[name] = compute()
        value: _T = known[name]
        return value

    def query_rows(self, plain: Tensor, adapted: Tensor | None) -> Tensor:
        """The queries (B, D) of the cache term: reduced and transformed if the plan says so, else the given rows.

        Moved rows are float32, or the half type of the keys (float16 for int8) if the given rows are half and the keys
        aren't float32.
        """
        import torch

        assert self.keys is not None
        rows = _rows(self.query, plain, adapted)
        moved = self._reduced(rows)
        if self.query_transform is not None:
            moved = moved.float() @ self.query_transform.T
        if moved is rows or torch.float32 in (rows.dtype, self.keys.dtype):
            return moved
        return moved.to(torch.bfloat16 if self.keys.dtype == torch.bfloat16 else torch.float16)

    def feature_rows(self, plain: Tensor, adapted: Tensor | None) -> Tensor:
        """The features of the linear term: the given rows (B, D), or those reduced, float32; for "both", plain and
        adapted rows of this kind side by side, (B, 2 D); or, for a text distribution, [s, H], (B, C + 1) float32, with
        s = softmax(<plain, text> / temperature) and H = sum of s * log(C s)."""
        import torch

        if self.feature == "both":
            return torch.cat([self._reduced(_rows(which, plain, adapted)) for which in EMBEDDINGS], dim=1)
        if self.feature != "text-distribution":
            return self._reduced(_rows(self.feature, plain, adapted))
        assert self.text is not None
        exponents = (plain.float() @ self.text.T).div_(self.temperature)
        shares = exponents.softmax(dim=1)
        lifted = exponents - exponents.amax(dim=1, keepdim=True)
        log_ratios = lifted - lifted.exp().mean(dim=1, keepdim=True).log()
        negentropy = log_ratios.mul_(shares).sum(dim=1, keepdim=True)
        return torch.cat([shares, negentropy], dim=1)

    def _reduced(self, rows: Tensor) -> Tensor:
        """unit(projection @ (rows - shift)), float32; without a reducer the given rows."""
        import torch

        shift, projection = self.reducer_shift, self.reducer_projection
        if shift is None and projection is None:
            return rows
        moved = rows.float() if shift is None else rows.float() - shift
        if projection is not None:
            moved = moved * projection if projection.ndim == 1 else moved @ projection.T
        return torch.nn.functional.normalize(moved, dim=1, eps=1e-12)  # as Reducer: zero rows stay zero


def _rows(which: str, plain: Tensor, adapted: Tensor | None) -> Tensor:
    rows = plain if which == "plain" else adapted
    assert rows is not None  # guaranteed by scoring_inputs()
    return rows


_plans: weakref.WeakKeyDictionary[ScoringPlan, dict[Any, DevicePlan]] = weakref.WeakKeyDictionary()
_copies: weakref.WeakValueDictionary[tuple[int, Any], Tensor] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def device_plan(plan: ScoringPlan, device: Any) -> DevicePlan:
    """`plan` on `device`, a torch.device or its name, copied once and cached as long as the plan exists.

    On the CPU the tensors share the plan's memory (except class_offsets, which become int32). On a GPU, plans with the
    same array share one copy of it, so that a change of classes doesn't upload all keys again. Raises ImportError
    without PyTorch, ValueError for 2**31 keys or more.
    """
    torch = require("torch", "cpu")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    with _lock:
        known = _plans.setdefault(plan, {})
        if place not in known:
            known[place] = _move(plan, place)
        return known[place]


def _move(plan: ScoringPlan, device: torch.device) -> DevicePlan:
    if plan.keys is not None and len(plan.keys) >= 2**31:
        raise IosrFastError(f"expected fewer than 2**31 keys on a device, got {len(plan.keys)}; split the plan")
    tensors: dict[str, Any] = {}
    for field in ARRAYS:
        array = field.of(plan)
        if array is not None and field.device_dtype is not None:
            array = array.astype(field.device_dtype)
        tensors[field.name] = None if array is None else _copy_to(array, device, _held(plan))
    constants = {name: getattr(plan, name) for name in CONSTANT_NAMES}
    return DevicePlan(width=plan.width, device=device, **constants, **tensors)


class _Copies(dict[Any, "Tensor"]):
    """Copies of arrays on devices that plans hold. A class of its own, as a dict has no weak references."""


def _held(plan: ScoringPlan) -> _Copies:
    held: _Copies = vars(plan).setdefault("_device_copies", _Copies())
    return held


def _forget(held: weakref.ref[_Copies], place: tuple[int, Any]) -> None:
    if (copies := held()) is not None:
        copies.pop(place, None)


def _copy_to(array: np.ndarray, device: torch.device, held: _Copies) -> Tensor:
    """The array on a device, with one copy for all plans that share the array. It lives as long as one of them, or the
    array if that is shorter."""
    if device.type == "cpu":
        return as_tensor(array)
    place = (id(array), device)
    copy = _copies.get(place)
    if copy is None:
        copy = _copies[place] = as_tensor(array).to(device)
        # Another array may have the same id later.
        weakref.finalize(array, _copies.pop, place, None)
    if place not in held:
        held[place] = copy
        weakref.finalize(array, _forget, weakref.ref(held), place)
    return copy


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


@functools.cache
def _derived() -> Any:
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def cached(tensor: Tensor, key: Any, compute: Callable[[], _T]) -> _T:
    """compute(), cached under `key` as long as `tensor` exists, for values that kernels derive from a plan's tensors.

    The cache belongs to the tensors and not to the DevicePlan, because torch.ops.iosr_fast.score creates a DevicePlan
    at every call. Nothing is cached while a CUDA graph is recorded.
    """
    import torch

    with _lock:
        known = _derived().get(tensor, {})
    if key in known:
        found: _T = known[key]
        return found
    value = compute()
    # A result recorded into a graph exists only after the graph has run. A tensor cached under itself is never freed.
    if value is tensor or is_recording(tensor.device):
        return value
    if tensor.is_cuda:  # the next call may come on another stream, which doesn't wait for this one
        torch.cuda.current_stream(tensor.device).synchronize()
    with _lock:
        first: _T = _derived().setdefault(tensor, {}).setdefault(key, value)
    return first


def is_recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, during which nothing may wait for the device."""
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_gpu(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the current GPU for a with block.

    PyTorch's guard restores the device before without creating a context on it, which cudaSetDevice would do.
    """
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
