"""Which compiled plan of an engine fits this machine; where one that has to be built again is kept.

A plan runs with the version of TensorRT that built it, on the GPU that it was built for (TensorRT-RTX's on any that
TensorRT-RTX supports). An engine may hold several; a machine that none of them fits builds its own from encoder.onnx.
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
from iosr_fast.utils.files import cache_folder, new_folder, recover
from iosr_fast.utils.machine import Gpu
from iosr_fast.utils.manifest import read_manifest, sha256, write_manifest

FOLDER = "plans"
PORTABLE = ("tensorrt_rtx",)  # its plans are compiled to the end by the GPU's own machine
KEPT_KIND, KEPT_FILE = "compiled plan", "encoder.plan"
Build = Callable[[Path], tuple[bytes, dict[str, Any]]]  # an ONNX file -> a plan, and what there is to say of it
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a plan is built for: a runtime, its version, and the GPU here (None where there is none)."""

    runtime: str
    version: str
    gpu: Gpu | None

    @property
    def built_for(self) -> Gpu | None:
        """The only GPU on which a plan of this target runs; None: every GPU that the runtime supports.

        Raises RuntimeError where the runtime compiles for the GPU it runs on and there is none.
        """
        if self.runtime in PORTABLE:
            return None
        if self.gpu is None:
            raise RuntimeError(
                f"{self.runtime} compiles for the NVIDIA GPU that it runs on, and PyTorch sees none here; build the "
                "engine on the machine that will run it, or for another runtime"
            )
        return self.gpu

    @property
    def file(self) -> str:
        """The plan's place in an engine folder: "plans/tensorrt-nvidia-h100-80gb-hbm3-10.13.3.9.plan"."""
        return f"{FOLDER}/{self._slug(self.built_for)}.plan"

    def kernels_file(self, fingerprint: str) -> Path:
        """Where what TensorRT-RTX compiles of an engine on this very GPU is kept between starts."""
        return cache_folder() / "kernels" / f"{self._slug(self.gpu)}-{fingerprint[:16]}.cache"

    def facts(self) -> dict[str, str | None]:
        """What a manifest says of its plan's target."""
        gpu = self.built_for
        capability = None if gpu is None else f"{gpu.capability[0]}.{gpu.capability[1]}"
        return {
            "runtime": self.runtime,
            "version": self.version,
            "gpu": None if gpu is None else gpu.name,
            "compute_capability": capability,
        }

    def kept(self, max_batch: int, source_sha256: str) -> Path:
        """The folder in the cache of a plan for batches of up to `max_batch`, built from this graph and weights."""
        return cache_folder() / FOLDER / f"{self._slug(self.built_for)}-b{max_batch}-{source_sha256[:32]}"

    def _slug(self, gpu: Gpu | None) -> str:
        name = "any" if gpu is None else re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        return f"{self.runtime}-{name}-{re.sub(r'[^A-Za-z0-9.]+', '-', self.version)}"

    def __str__(self) -> str:
        return f"{self.gpu or 'a machine without a GPU'} with {self.runtime} {self.version}"


def told(facts: Mapping[str, Any]) -> str:
    """A plan's target as a manifest has it, in words."""
    gpu = f"{facts['gpu']} (compute capability {facts['compute_capability']})"
    return f"{'any GPU' if facts['gpu'] is None else gpu} with {facts['runtime']} {facts['version']}"


@dataclass(frozen=True)
class Plan:
    """A plan's bytes, and the file that has them (or would, where they could not be kept)."""

    data: bytes
    path: Path


def open_plan(folder: Path, manifest: Mapping[str, Any], target: Target, build: Build) -> Plan:
    """The plan in an engine folder that fits `target`, else the one in the user's cache, built there if need be.

    A plan for another GPU or version is named in a warning and never loaded. What is built goes into cache_folder(),
    not into the engine, under a name with all that it depends on. Raises RuntimeError, naming the plans that there are
    and what this machine is, where none fits and none can be built; ValueError where encoder.onnx is damaged.
    """
    others = []
    for name, facts in manifest["plans"].items():
        if all(facts[key] == value for key, value in target.facts().items()):
            return Plan((folder / name).read_bytes(), folder / name)
        others.append(f"{name} was built for {told(facts)}")
    misfit = f"{'; '.join(others) or f'{folder} has no plan'}; this is {target}"
    advice = f"build the engine on this machine (tools/build_engine.py --runtime {target.runtime}), or open it with "
    advice += "runtime='onnxruntime'"
    if ONNX_FILE not in manifest["files"]:
        raise RuntimeError(f"{misfit}; and {folder} has no {ONNX_FILE} to build a plan from: {advice}")
    expected = {name: manifest["files"][name]["sha256"] for name in (ONNX_FILE, WEIGHTS) if name in manifest["files"]}
    source = hashlib.sha256(json.dumps(expected).encode()).hexdigest()
    kept = target.kept(manifest["max_batch"], source)
    found = _read_kept(kept)
    if found is not None:
        log.info("%s: taking the plan that was built from %s, %s", misfit, ONNX_FILE, kept)
        return found
    log.warning("%s: building again from %s, once, kept in %s", misfit, ONNX_FILE, kept)
    for name, digest in expected.items():
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} in {folder} does not match its manifest: it is damaged or was changed")
    try:
        data, built = build(folder / ONNX_FILE)
    except RuntimeError as error:
        raise RuntimeError(f"{misfit}; building again from {ONNX_FILE} failed: {error}; {advice}") from error
    return _keep(kept, data, {**target.facts(), **built, "source_sha256": source})


def _read_kept(kept: Path) -> Plan | None:
    """What is in the cache, if it is as it was written; what is damaged is told and removed."""
    if not kept.exists() and not recover(kept):
        return None
    try:
        read_manifest(kept, KEPT_KIND)
        return Plan((kept / KEPT_FILE).read_bytes(), kept / KEPT_FILE)
    except (ValueError, FileNotFoundError) as error:
        log.warning("the plan in the cache is damaged and removed: %s", error)
        shutil.rmtree(kept, ignore_errors=True)
    except OSError as error:
        log.warning("the plan in the cache can't be read: %s", error)
    return None


def _keep(kept: Path, data: bytes, facts: dict[str, Any]) -> Plan:
    try:
        with new_folder(kept) as made:
            (made / KEPT_FILE).write_bytes(data)
            write_manifest(made, KEPT_KIND, facts)
    except OSError as error:
        log.warning(
            "the plan can't be kept (%s) and will be built at every start; IOSR_FAST_CACHE names a place", error
        )
    return Plan(data, kept / KEPT_FILE)
