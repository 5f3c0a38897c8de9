"""Which scoring implementations exist here, why one is refused, and which one runs.

IOSR_FAST_IMPL=NAME forces one wherever the caller leaves the choice open; it fails loudly where it can't be met.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

ENVIRONMENT = "IOSR_FAST_IMPL"
_log = logging.getLogger("iosr_fast")


@dataclass(frozen=True)
class Implementation:
    """One way to execute a ScoringPlan.

    `target` is "module:function", imported when chosen. `kind` says what that takes: "arrays" (ScoringPlan, Embeddings
    of NumPy arrays), "tensors" (DevicePlan, plain, adapted); either returns the logits and the path that ran.
    `unavailable_reason` answers why it can't run here, or None where it can. `automatic` has the devices of the
    embeddings for which "auto" may take it; the registry's order is the order of preference. `interpreter` is the
    environment variable that, set, has an implementation for GPUs run on the CPU too.
    """

    name: str
    target: str
    kind: Literal["arrays", "tensors"]
    unavailable_reason: Callable[[], str | None]
    native: tuple[str, ...]
    automatic: tuple[str, ...] = ()
    interpreter: str | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it can execute: "cpu", "cuda"."""
        return ("cpu", *self.native) if self.interpreter and _is_set(self.interpreter) else self.native

    def load(self) -> Callable[..., tuple[Any, str]]:
        module, function = self.target.split(":")
        loaded: Callable[..., tuple[Any, str]] = getattr(importlib.import_module(module), function)
        return loaded


@dataclass(frozen=True)
class Availability:
    """A row of `iosr-fast info`; `unavailable_reason` is None where the implementation can run."""

    name: str
    unavailable_reason: str | None
    devices: tuple[str, ...]


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() in ("1", "y", "yes", "on", "true")


def _never() -> None:
    return None


@functools.cache
def _cpp_refusal() -> str | None:
    try:
        from iosr_fast import _C
    except ImportError as error:
        return f"the extension iosr_fast._C can't be imported ({error}); `pip install .` builds it"
    from iosr_fast import __version__

    if _C.version != __version__:
        return f"iosr_fast._C was built for version {_C.version}, this is {__version__}; `pip install .` rebuilds it"
    return None


@functools.cache
def _torch_refusal() -> str | None:
    return "PyTorch is not installed; pip install 'iosr_fast[train]' brings it" if find_spec("torch") is None else None


@functools.cache
def _driver_refusal() -> str | None:
    """Whether NVIDIA's driver is missing, told without the seconds that loading PyTorch takes."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return None
    return "no NVIDIA driver can be loaded here (libcuda); on a GPU machine, install the driver"


def _triton_refusal() -> str | None:
    unavailable_reason = None if _is_set("TRITON_INTERPRET") else _driver_refusal()
    if unavailable_reason is not None:
        return unavailable_reason
    from iosr_fast import kernels

    return kernels.unavailable_reason()


def _cuda_refusal() -> str | None:
    unavailable_reason = _driver_refusal()
    if unavailable_reason is not None:
        return unavailable_reason
    from iosr_fast.scoring import cuda_scorer as cuda

    told: str | None = cuda.unavailable_reason()
    return told


# For the CPU, then for GPUs. PyTorch never runs on its own account for NumPy arrays: loading it takes seconds.
REGISTRY: tuple[Implementation, ...] = (
    Implementation("cpp", "iosr_fast.scoring.numpy_scorer:score_cpp", "arrays", _cpp_refusal, ("cpu",), ("cpu",)),
    Implementation("numpy", "iosr_fast.scoring.numpy_scorer:score_numpy", "arrays", _never, ("cpu",), ("cpu",)),
    Implementation("cuda", "iosr_fast.scoring.cuda_scorer:score_cuda", "tensors", _cuda_refusal, ("cuda",), ("cuda",)),
    Implementation(
        "triton",
        "iosr_fast.kernels.cache_score:score_triton",
        "tensors",
        _triton_refusal,
        ("cuda",),
        ("cuda",),
        interpreter="TRITON_INTERPRET",
    ),
    Implementation(
        "torch", "iosr_fast.scoring.torch_scorer:score_torch", "tensors", _torch_refusal, ("cpu", "cuda"), ("cuda",)
    ),
    Implementation("reference", "iosr_fast.scoring.numpy_scorer:score_reference", "arrays", _never, ("cpu",)),
)


def available() -> list[Availability]:
    """Every implementation, in order of preference, with its devices and why it is refused here."""
    return [Availability(entry.name, entry.unavailable_reason(), entry.devices) for entry in REGISTRY]


def choose(impl: str = "auto", device: str = "cpu") -> Implementation:
    """What executes plans for embeddings on `device`: the named implementation, or for "auto" the best that can.

    IOSR_FAST_IMPL takes the place of "auto", never of a name that the caller gave. An implementation for GPUs alone may
    be named for embeddings on the CPU, where there is a GPU to take them to. Raises ValueError for an unknown name and
    RuntimeError for a known one that can't run here, or not on this device.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    asked_by = f"impl={impl!r}"
    if impl == "auto" and forced:
        impl, asked_by = forced, f"{ENVIRONMENT}={forced}"
    if impl == "auto":
        return _best(device)
    for entry in REGISTRY:
        if entry.name == impl:
            unavailable_reason = entry.unavailable_reason() or _device_refusal(entry, device)
            if unavailable_reason is not None:
                raise RuntimeError(f"{asked_by} can't run here: {unavailable_reason}")
            return entry
    names = ", ".join(["auto", *(entry.name for entry in REGISTRY)])
    raise ValueError(f"expected an implementation out of {names}, got {asked_by}")


def _device_refusal(entry: Implementation, device: str) -> str | None:
    if device in entry.devices:
        return None
    if device == "cuda":
        return (
            f"{entry.name} executes on {' and '.join(entry.devices)}, and the embeddings are on cuda; "
            "move them with .cpu() or leave the choice open"
        )
    import torch

    return None if torch.cuda.is_available() else f"{entry.name} needs a CUDA device, and PyTorch sees none"


@functools.cache
def _best(device: str) -> Implementation:
    refused: list[str] = []
    for entry in REGISTRY:
        if device not in entry.automatic:
            continue
        unavailable_reason = entry.unavailable_reason()
        if unavailable_reason is None:
            told = f" (refused: {'; '.join(refused)})" if refused else ""
            _log.info("scoring on %s with %s%s", device, entry.name, told)
            return entry
        refused.append(f"{entry.name}: {unavailable_reason}")
    raise RuntimeError(f"no scoring implementation can run on {device} here: {'; '.join(refused)}")
