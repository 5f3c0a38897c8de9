"""The registry of scoring implementations and the choice among them.

IOSR_FAST_IMPL=NAME replaces the choice "auto"; it is an error if that implementation can't run.
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

from iosr_fast.exceptions import IosrFastError, UnavailableError

ENVIRONMENT = "IOSR_FAST_IMPL"
_BUILD_CUDA = "IOSR_FAST_CUDA=1 pip install . builds it, with nvcc on PATH"
_log = logging.getLogger("iosr_fast")


@dataclass(frozen=True)
class Implementation:
    """One way to execute a ScoringPlan.

    target       "module:function", imported when chosen
    kind         the function's arguments: "arrays" (ScoringPlan, Embeddings of NumPy arrays) or "tensors" (DevicePlan,
                 plain, adapted); either returns the logits and the path that ran
    unavailable_reason  returns why it can't run on this machine, or None
    native       the devices it executes on
    automatic    the devices of embeddings for which "auto" may choose it; the registry's order is the preference
    interpreter  the environment variable that makes an implementation for GPUs run on the CPU too
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
        """The devices on which it can execute: "cpu", "cuda"."""
        return ("cpu", *self.native) if self.interpreter and _is_set(self.interpreter) else self.native

    def load(self) -> Callable[..., tuple[Any, str]]:
        module, function = self.target.split(":")
        loaded: Callable[..., tuple[Any, str]] = getattr(importlib.import_module(module), function)
        return loaded


def _is_set(variable: str) -> bool:
    """As Triton reads its variables."""
    return os.environ.get(variable, "0").lower() in ("1", "y", "yes", "on", "true")


def _always() -> None:
    return None


@functools.cache
def cpp_unavailable_reason() -> str | None:
    """Why the C++ extension can't be used, or None."""
    try:
        from iosr_fast import _C
    except ImportError as error:
        return f"the extension iosr_fast._C can't be imported ({error}); `pip install .` builds it"
    from iosr_fast import __version__

    if _C.version != __version__:
        return f"iosr_fast._C was built for version {_C.version}, this is {__version__}; `pip install .` rebuilds it"
    if not hasattr(_C, "BoundPlan"):
        return "iosr_fast._C was built from older sources of this version; `pip install .` rebuilds it"
    return None


def _torch_unavailable_reason() -> str | None:
    return _missing_package("torch", "cpu")


@functools.cache
def _missing_package(package: str, extra: str) -> str | None:
    if find_spec(package) is not None:
        return None
    return f"{package} is not installed; pip install 'iosr_fast[{extra}]' brings it"


@functools.cache
def _driver_unavailable_reason() -> str | None:
    """Why NVIDIA's driver can't be loaded, or None, without importing PyTorch, which takes seconds."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return None
    return "no NVIDIA driver can be loaded here (libcuda); on a GPU machine, install the driver"


def _gpu_unavailable_reason() -> str | None:
    """Why PyTorch can't use an NVIDIA GPU of compute capability 8.0 or newer here."""
    reason = _driver_unavailable_reason() or _torch_unavailable_reason()
    if reason is not None:
        return reason
    import torch

    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no CUDA device{_why_no_device(torch)}"
    if torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return f"a GPU of compute capability 8.0 or newer is needed, got {name} ({major}.{minor})"
    return None


def _why_no_device(torch: Any) -> str:
    if torch.version.cuda is None:
        return ": it is a CPU build; install a CUDA build from pytorch.org"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f": {error}"
    return ""


def _triton_unavailable_reason() -> str | None:
    """Triton's interpreter needs no GPU."""
    missing = _missing_package("triton", "gpu") or _torch_unavailable_reason()
    return missing or (None if _is_set("TRITON_INTERPRET") else _gpu_unavailable_reason())


def _cuda_unavailable_reason() -> str | None:
    # The build first: asking for the GPU imports PyTorch.
    return _driver_unavailable_reason() or _cuda_build_unavailable_reason() or _gpu_unavailable_reason()


@functools.cache
def _cuda_build_unavailable_reason() -> str | None:
    try:
        module = importlib.import_module("iosr_fast._C_cuda")
    except ImportError as error:
        return f"the extension iosr_fast._C_cuda can't be imported ({error}); {_BUILD_CUDA}"
    from iosr_fast import __version__

    if module.version != __version__:
        built = f"iosr_fast._C_cuda was built for version {module.version}, this is {__version__}"
        return f"{built}; {_BUILD_CUDA} again"
    return None


# First the CPU's, then the GPU's, in order of preference. The CUDA kernels use mma.sync only, Triton compiles to the
# newer tensor-core instructions too. PyTorch is never chosen for NumPy arrays: importing it takes seconds.
REGISTRY: tuple[Implementation, ...] = (
    Implementation(
        "cpp",
        "iosr_fast.scoring.cpp_scorer:score_cpp",
        kind="arrays",
        unavailable_reason=cpp_unavailable_reason,
        native=("cpu",),
        automatic=("cpu",),
    ),
    Implementation(
        "numpy",
        "iosr_fast.scoring.numpy_scorer:score_numpy",
        kind="arrays",
        unavailable_reason=_always,
        native=("cpu",),
        automatic=("cpu",),
    ),
    Implementation(
        "triton",
        "iosr_fast.kernels.cache_score:score_triton",
        kind="tensors",
        unavailable_reason=_triton_unavailable_reason,
        native=("cuda",),
        automatic=("cuda",),
        interpreter="TRITON_INTERPRET",
    ),
    Implementation(
        "cuda",
        "iosr_fast.scoring.cuda_scorer:score_cuda",
        kind="tensors",
        unavailable_reason=_cuda_unavailable_reason,
        native=("cuda",),
        automatic=("cuda",),
    ),
    Implementation(
        "torch",
        "iosr_fast.scoring.torch_scorer:score_torch",
        kind="tensors",
        unavailable_reason=_torch_unavailable_reason,
        native=("cpu", "cuda"),
        automatic=("cuda",),
    ),
    Implementation(
        "reference",
        "iosr_fast.scoring.numpy_scorer:score_reference",
        kind="arrays",
        unavailable_reason=_always,
        native=("cpu",),
    ),
)


def choose(impl: str = "auto", device: str = "cpu") -> Implementation:
    """The implementation of this name, or for "auto" the best available one, for embeddings on `device`.

    IOSR_FAST_IMPL replaces "auto", never another name. An implementation for GPUs may be named for embeddings on the
    CPU if there is a GPU to copy them to. Raises ValueError for an unknown name, RuntimeError for an implementation
    that can't run here or not on this device.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    source = f"impl={impl!r}"
    if impl == "auto" and forced:
        impl, source = forced, f"{ENVIRONMENT}={forced}"
    if impl == "auto":
        return _best(device)
    for entry in REGISTRY:
        if entry.name == impl:
            reason = entry.unavailable_reason() or _device_unavailable_reason(entry, device)
            if reason is not None:
                raise UnavailableError(f"{source} can't run here: {reason}")
            return entry
    names = ", ".join(["auto", *(entry.name for entry in REGISTRY)])
    raise IosrFastError(f"expected an implementation of {names}, got {source}")


def _device_unavailable_reason(entry: Implementation, device: str) -> str | None:
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
    unavailable: list[str] = []
    for entry in REGISTRY:
        if device not in entry.automatic:
            continue
        reason = entry.unavailable_reason()
        if reason is None:
            note = f" (unavailable: {'; '.join(unavailable)})" if unavailable else ""
            _log.info("scoring on %s with %s%s", device, entry.name, note)
            return entry
        unavailable.append(f"{entry.name}: {reason}")
    raise UnavailableError(f"no scoring implementation can run on {device} here: {'; '.join(unavailable)}")
