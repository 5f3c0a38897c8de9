"""The backends of scoring and the choice among them: by the embeddings' device and the size of the batch.

IOSR_FAST_IMPL=NAME replaces the choice "auto"; it is an error if that backend can't run.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from iosr_fast.exceptions import IosrFastError, UnavailableError

ENVIRONMENT = "IOSR_FAST_IMPL"
FEW_QUERIES = 16  # the largest batch of the CUDA kernel
# What it takes by choice: so few queries that it waits for memory alone, or so few products that launches count. Both
# are estimates (benchmarks/roofline.py), until a GPU is measured.
READS_ALONE, FEW_PRODUCTS = 4, 2**19
OLDEST_TRITON = (3, 4)  # PyTorch 2.6 and 2.7 bring 3.2 and 3.3
_BUILD = "`pip install .` in its source builds it, with a C++ compiler (Debian: apt-get install build-essential)"
_BUILD_CUDA = "IOSR_FAST_CUDA=1 pip install . builds it, with nvcc on PATH"
_log = logging.getLogger("iosr_fast")


@dataclass(frozen=True)
class Backend:
    """What sums affinities (backends/).

    module       has the function affinity_sums, imported when chosen; "" for the reference, which runs a whole plan
    devices      where it executes, "cpu", "cuda", and where "auto" may choose it; BACKENDS has the order of preference
    unavailable_reason  returns why it can't run on this machine, or None
    tensors      whether it takes a DevicePlan and tensors; otherwise a ScoringPlan and NumPy arrays
    largest      the largest batch; None for any
    """

    name: str
    module: str
    devices: tuple[str, ...]
    unavailable_reason: Callable[[], str | None]
    tensors: bool = True
    largest: int | None = None

    def takes(self, batch: int) -> bool:
        return self.largest is None or batch <= self.largest


def cpp_unavailable_reason() -> str | None:
    """Why the C++ extension can't be used, or None."""
    return _build_unavailable_reason("_C", _BUILD)


@functools.cache
def _build_unavailable_reason(name: str, fix: str) -> str | None:
    from iosr_fast import __version__

    try:
        module = importlib.import_module(f"iosr_fast.{name}")
    except ImportError as error:
        return f"the extension iosr_fast.{name} can't be imported ({error}); {fix}"
    if module.version != __version__:
        return f"iosr_fast.{name} was built for version {module.version}, this is {__version__}; {fix}"
    if not hasattr(module, "affinity_sums" if name == "_C" else "BoundPlan"):
        return f"iosr_fast.{name} was built from older sources of this version; {fix}"
    return None


@functools.cache
def _package_unavailable_reason(package: str, extra: str, oldest: tuple[int, int] = (0, 0)) -> str | None:
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed; pip install 'iosr_fast[{extra}]' brings it"
    if tuple(int(part) for part in found.split(".")[:2]) < oldest:
        wanted = ".".join(map(str, oldest))
        return f"expected {package} {wanted} or newer, got {found}; pip install 'iosr_fast[{extra}]' brings a newer one"
    return None


def _torch_unavailable_reason() -> str | None:
    return _package_unavailable_reason("torch", "cpu")


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


def _interprets() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU; as it reads its variable."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "y", "yes", "on", "true")


def _triton_unavailable_reason() -> str | None:
    missing = _package_unavailable_reason("triton", "gpu", OLDEST_TRITON) or _torch_unavailable_reason()
    return missing or (None if _interprets() else _gpu_unavailable_reason())


def _cuda_unavailable_reason() -> str | None:
    # The build before the GPU, which imports PyTorch.
    reason = _driver_unavailable_reason() or _build_unavailable_reason("_C_cuda", _BUILD_CUDA)
    reason = reason or _gpu_unavailable_reason()
    if reason is not None:
        return reason
    try:  # the driver may be older than the extension's CUDA
        importlib.import_module("iosr_fast._C_cuda").tile_keys(0, 1)
    except RuntimeError as error:
        return f"iosr_fast._C_cuda can't call CUDA ({error}); update the driver, or with an older CUDA {_BUILD_CUDA}"
    return None


# For NumPy arrays PyTorch only replaces a missing extension: importing it takes seconds.
_CPU, _GPU = ("cpu",), ("cuda",)
BACKENDS: tuple[Backend, ...] = (
    Backend("cpp", "iosr_fast.scoring.backends.cpp", _CPU, cpp_unavailable_reason, tensors=False),
    Backend("cuda", "iosr_fast.scoring.backends.cuda", _GPU, _cuda_unavailable_reason, largest=FEW_QUERIES),
    Backend("triton", "iosr_fast.kernels.affinity_sums", _GPU, _triton_unavailable_reason),
    Backend("torch", "iosr_fast.scoring.backends.torch", _CPU + _GPU, _torch_unavailable_reason),
    Backend("reference", "", _CPU, lambda: None, tensors=False),
)


def devices_of(backend: Backend) -> tuple[str, ...]:
    """Where a backend executes; Triton's interpreter adds the CPU."""
    return ("cpu", *backend.devices) if backend.name == "triton" and _interprets() else backend.devices


def choose(impl: str = "auto", device: str = "cpu", batch: int = 1, n_keys: int = 0) -> Backend:
    """The backend of this name, or for "auto" the best available one, for `batch` embeddings on `device` and a plan of
    so many keys: on a GPU "cuda" for a few queries, "triton" for batches.

    IOSR_FAST_IMPL replaces "auto", never another name. A backend for GPUs may be named for embeddings on the CPU if
    there is a GPU to copy them to. Raises IosrFastError for an unknown name, UnavailableError for a backend that can't
    run here, on this device, or for so large a batch.
    """
    source = f"impl={impl!r}"
    if impl == "auto":
        impl = os.environ.get(ENVIRONMENT) or "auto"
        source = f"{ENVIRONMENT}={impl}"
    if impl != "auto":
        return _named(impl, source, device, batch)
    few = batch <= READS_ALONE or (batch <= FEW_QUERIES and batch * n_keys <= FEW_PRODUCTS)
    return _best(device, device == "cuda" and few)  # one choice on a CPU, and so one warning


def _named(name: str, source: str, device: str, batch: int) -> Backend:
    backend = next((backend for backend in BACKENDS if backend.name == name), None)
    if backend is None:
        names = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
        raise IosrFastError(f"expected a scoring backend of {names}, got {source}")
    reason = backend.unavailable_reason() or _device_unavailable_reason(backend, device)
    if reason is None and not backend.takes(batch):
        reason = f"it scores at most {backend.largest} embeddings at once, got {batch}; leave the choice open"
    if reason is not None:
        raise UnavailableError(f"{source} can't run here: {reason}")
    return backend


def _device_unavailable_reason(backend: Backend, device: str) -> str | None:
    devices = devices_of(backend)
    if device in devices:
        return None
    if device == "cuda":
        return (
            f"{backend.name} executes on {' and '.join(devices)}, and the embeddings are on cuda; "
            "move them with .cpu() or leave the choice open"
        )
    import torch

    return None if torch.cuda.is_available() else f"{backend.name} needs a CUDA device, and PyTorch sees none"


@functools.cache
def _best(device: str, few: bool) -> Backend:
    """The first available one in the order of BACKENDS; what is passed over for a reason is logged, once."""
    unavailable: list[str] = []
    for backend in BACKENDS:
        if device not in backend.devices or not (few or backend.largest is None):
            continue
        reason = backend.unavailable_reason()
        if reason is None:
            passed_over = f" (unavailable: {'; '.join(unavailable)})" if unavailable else ""
            level = logging.WARNING if backend.name in ("torch", "reference") else logging.INFO
            _log.log(level, "scoring on %s with %s%s", device, backend.name, passed_over)
            return backend
        unavailable.append(f"{backend.name}: {reason}")
    raise UnavailableError(f"no scoring backend can run on {device} here: {'; '.join(unavailable)}")
