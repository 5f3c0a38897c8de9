"""The choice of an engine's compiled plan for this machine, and the cache of plans that are built here.

A plan runs with the version of TensorRT that built it, on the GPU that it was built for; a plan of TensorRT-RTX runs on
any GPU that TensorRT-RTX supports. An engine may have several plans; if none fits, one is built from encoder.onnx.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iosr_fast.encoders.runtimes.onnxruntime import FILE as ONNX_FILE
from iosr_fast.encoders.runtimes.onnxruntime import WEIGHTS
from iosr_fast.exceptions import DamagedFileError, UnavailableError
from iosr_fast.utils.files import cache_folder
from iosr_fast.utils.folders import new_folder
from iosr_fast.utils.machine import Gpu
from iosr_fast.utils.manifest import read_manifest, sha256, write_manifest
from iosr_fast.utils.renames import recover

FOLDER = "plans"
PORTABLE = ("tensorrt_rtx",)  # its plans are completed at run time, for the GPU in use
CACHED_KIND, CACHED_FILE = "compiled plan", "encoder.plan"
Build = Callable[[Path], tuple[bytes, dict[str, Any]]]  # an ONNX file -> a plan and its facts
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """The target of a plan: a runtime, its version, and this machine's GPU (None without one)."""

    runtime: str
    version: str
    gpu: Gpu | None

    @property
    def built_for(self) -> Gpu | None:
        """The only GPU on which a plan of this target runs; None if it runs on every GPU that the runtime supports.

        Raises RuntimeError if the runtime compiles for the GPU that it runs on and there is none.
        """
        if self.runtime in PORTABLE:
            return None
        if self.gpu is None:
            raise UnavailableError(
                f"{self.runtime} compiles for the NVIDIA GPU that it runs on, and PyTorch sees none here; build the "
                "engine on the machine that will run it, or for another runtime"
            )
        return self.gpu

    @property
    def file(self) -> str:
        """The plan's path in an engine folder: "plans/tensorrt-nvidia-h100-80gb-hbm3-10.13.3.9.plan"."""
        return f"{FOLDER}/{self._slug(self.built_for)}.plan"

    def kernels_file(self, fingerprint: str) -> Path:
        """The cache file of the kernels that TensorRT-RTX compiles for an engine on this GPU."""
        return cache_folder() / "kernels" / f"{self._slug(self.gpu)}-{fingerprint[:16]}.cache"

    def facts(self) -> dict[str, str | None]:
        """The target as a manifest describes it."""
        gpu = self.built_for
        capability = None if gpu is None else f"{gpu.capability[0]}.{gpu.capability[1]}"
        return {
            "runtime": self.runtime,
            "version": self.version,
            "gpu": None if gpu is None else gpu.name,
            "compute_capability": capability,
        }

    def cached(self, max_batch: int, source_sha256: str) -> Path:
        """The cache folder of a plan for batches of up to `max_batch`; `source_sha256` is of its graph and weights."""
        return cache_folder() / FOLDER / f"{self._slug(self.built_for)}-b{max_batch}-{source_sha256[:32]}"

    def _slug(self, gpu: Gpu | None) -> str:
        name = "any" if gpu is None else re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        return f"{self.runtime}-{name}-{re.sub(r'[^A-Za-z0-9.]+', '-', self.version)}"

    def __str__(self) -> str:
        return f"{self.gpu or 'a machine without a GPU'} with {self.runtime} {self.version}"


def describe_target(facts: Mapping[str, Any]) -> str:
    """The target of a plan in a manifest, in words."""
    gpu = f"{facts['gpu']} (compute capability {facts['compute_capability']})"
    return f"{'any GPU' if facts['gpu'] is None else gpu} with {facts['runtime']} {facts['version']}"


@dataclass(frozen=True)
class Plan:
    """A plan's bytes, and its file (which is missing if the cache can't be written)."""

    data: bytes
    path: Path


def open_plan(folder: Path, manifest: Mapping[str, Any], target: Target, build: Build) -> Plan:
    """The plan in an engine folder that fits `target`, else the one in the user's cache, which is built if necessary.

    A plan for another GPU or version is never loaded; a warning names it. A new plan is written to cache_folder(), not
    into the engine, under a name with everything that it depends on. Raises RuntimeError, naming the existing plans and
    this machine, if none fits and none can be built; ValueError if encoder.onnx is damaged.
    """
    others = []
    for name, facts in manifest["plans"].items():
        if all(facts[key] == value for key, value in target.facts().items()):
            return Plan((folder / name).read_bytes(), folder / name)
        others.append(f"{name} was built for {describe_target(facts)}")
    misfit = f"{'; '.join(others) or f'{folder} has no plan'}; this is {target}"
    advice = f"build the engine on this machine (iosr-fast build-engine --runtime {target.runtime}), or open it with "
    advice += "runtime='onnxruntime'"
    if ONNX_FILE not in manifest["files"]:
        raise UnavailableError(f"{misfit}; and {folder} has no {ONNX_FILE} to build a plan from: {advice}")
    expected = {name: manifest["files"][name]["sha256"] for name in (ONNX_FILE, WEIGHTS) if name in manifest["files"]}
    source = hashlib.sha256(json.dumps(expected).encode()).hexdigest()
    cached = target.cached(manifest["max_batch"], source)
    plan = _read_cached(cached)
    if plan is not None:
        log.info("%s: using the plan built from %s, %s", misfit, ONNX_FILE, cached)
        return plan
    log.warning("%s: building a plan from %s once, in %s", misfit, ONNX_FILE, cached)
    for name, digest in expected.items():
        if sha256(folder / name) != digest:
            raise DamagedFileError(f"{name} in {folder} does not match its manifest: it is damaged or was changed")
    try:
        data, built = build(folder / ONNX_FILE)
    except RuntimeError as error:
        raise UnavailableError(f"{misfit}; building a plan from {ONNX_FILE} failed: {error}; {advice}") from error
    return _write_cached(cached, data, {**target.facts(), **built, "source_sha256": source})


def _read_cached(folder: Path) -> Plan | None:
    """The plan in a cache folder, or None; a damaged one is removed with a warning."""
    if not folder.exists() and not recover(folder):
        return None
    try:
        read_manifest(folder, CACHED_KIND)
        return Plan((folder / CACHED_FILE).read_bytes(), folder / CACHED_FILE)
    except (ValueError, FileNotFoundError) as error:
        log.warning("the plan in the cache is damaged and removed: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        log.warning("the plan in the cache can't be read: %s", error)
    return None


def _write_cached(folder: Path, data: bytes, facts: dict[str, Any]) -> Plan:
    try:
        with new_folder(folder, CACHED_KIND) as temporary:
            (temporary / CACHED_FILE).write_bytes(data)
            write_manifest(temporary, CACHED_KIND, facts)
    except OSError as error:
        log.warning(
            "the plan can't be stored (%s) and will be built at every start; set IOSR_FAST_CACHE to a folder that can "
            "be written",
            error,
        )
    return Plan(data, folder / CACHED_FILE)
