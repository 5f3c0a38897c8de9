"""A ScoringPlan as torch tensors on one device, made once for each plan and device."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.utils.require import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """What kernels on tensors execute; the formula, and which arrays may be None, are ScoringPlan's.

    text           (C, D) float32
    keys           (N, D) float32, float16, bfloat16 or int8; key_scales (N,) float32 with int8
    class_offsets  (C + 1,) int32
    weights        (N,) float32
    linear, bias   (C, D) and (C,) float32, linear (C, C + 1) where the feature is "text-distribution"
    query, feature ScoringPlan's names
    query_transform (D, D) float32 or None: query_rows
    values         (N, C) float32, in place of class_offsets
    reducer_shift, reducer_projection  the reducer's (D,) and (D, D) or (D,) float32, both None without one
    temperature    of the distribution over texts

    All on `device`, contiguous, and never written to: on the CPU they are the plan's own memory.
    """

    n_classes: int
    width: int
    text: Tensor | None
    tau: float
    keys: Tensor | None
    key_scales: Tensor | None
    class_offsets: Tensor | None
    weights: Tensor | None
    alpha: float
    beta: float
    linear: Tensor | None
    bias: Tensor | None
    query: str
    feature: str
    device: torch.device
    query_transform: Tensor | None = None
    values: Tensor | None = None
    reducer_shift: Tensor | None = None
    reducer_projection: Tensor | None = None
    temperature: float = 0.5

    @property
    def needs_adapted(self) -> bool:
        """Whether a term reads the adapted embedding."""
        return (self.keys is not None and self.query == "adapted") or (
            self.linear is not None and self.feature == "adapted"
        )

    def query_rows(self, plain: Tensor, adapted: Tensor | None) -> Tensor:
        """What meets the keys, (B, D): the plan's query, reduced and then transformed where it says so.

        Where it says neither, the rows that came; else float32, rounded to the half type that meets such keys (float16
        for int8, none for float32) where half rows came.
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
        """What meets the linear term: the rows that came, (B, D); those reduced, float32; or for a text distribution
        [s, H], (B, C + 1) float32, with s = softmax(<plain, text> / temperature) and H = sum of s * log(C s)."""
        import torch

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
        """unit(projection @ (rows - shift)), float32; the rows that came where there is no reducer."""
        import torch

        shift, projection = self.reducer_shift, self.reducer_projection
        if shift is None and projection is None:
            return rows
        moved = rows.float() if shift is None else rows.float() - shift
        if projection is not None:
            moved = moved * projection if projection.ndim == 1 else moved @ projection.T
        return torch.nn.functional.normalize(moved, dim=1, eps=1e-12)  # Reducer's, under which zero rows stay zero


def _rows(which: str, plain: Tensor, adapted: Tensor | None) -> Tensor:
    rows = plain if which == "plain" else adapted
    assert rows is not None  # whoever made the batch has seen to it
    return rows


_made: weakref.WeakKeyDictionary[ScoringPlan, dict[Any, DevicePlan]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def device_plan(plan: ScoringPlan, device: Any) -> DevicePlan:
    """`plan` on `device`, a torch.device or its name: copied there once, and kept as long as the plan lives.

    On the CPU the tensors share the plan's memory (class_offsets excepted, which become int32). Raises ImportError
    without PyTorch, ValueError for 2**31 keys or more.
    """
    torch = require("torch", "train")
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    with _lock:
        known = _made.setdefault(plan, {})
        if place not in known:
            known[place] = _move(plan, place)
        return known[place]


def _move(plan: ScoringPlan, device: torch.device) -> DevicePlan:
    if plan.keys is not None and len(plan.keys) >= 2**31:
        raise ValueError(f"expected fewer than 2**31 keys on a device, got {len(plan.keys)}; split the plan")

    def move(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else as_tensor(array).to(device)

    offsets = plan.class_offsets
    return DevicePlan(
        n_classes=plan.n_classes,
        width=plan.width,
        text=move(plan.text),
        tau=plan.tau,
        keys=move(plan.keys),
        key_scales=move(plan.key_scales),
        class_offsets=None if offsets is None else move(offsets.astype(np.int32)),
        weights=move(plan.weights),
        alpha=plan.alpha,
        beta=plan.beta,
        linear=move(plan.linear),
        bias=move(plan.bias),
        query=plan.query,
        feature=plan.feature,
        device=device,
        query_transform=move(plan.query_transform),
        values=move(plan.values),
        reducer_shift=None if plan.reducer is None else move(plan.reducer.shift),
        reducer_projection=None if plan.reducer is None else move(plan.reducer.projection),
        temperature=plan.temperature,
    )


class _Writable:
    """Memory of a read-only array, described as writable: torch knows no read-only tensors and warns of such arrays."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory alive for whatever is made from this
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def as_tensor(array: np.ndarray) -> Tensor:
    """A CPU tensor on the array's memory, which must then not be written to; uint16 is taken as bfloat16's bits."""
    torch = require("torch", "train")
    shared: np.ndarray = array if array.flags.writeable else np.asarray(_Writable(array))
    if array.dtype == np.uint16:
        bits: Tensor = torch.from_numpy(shared.view(np.int16)).view(torch.bfloat16)
        return bits
    tensor: Tensor = torch.from_numpy(shared)
    return tensor
