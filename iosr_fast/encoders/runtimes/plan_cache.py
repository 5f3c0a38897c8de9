"""The compiled plan of an engine for this machine: from its folder, or built once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import convert

from iosr_fast.encoders.engine_folder import ONNX_FILE, PLANS, WEIGHTS, Target
from iosr_fast.exceptions import DamagedFileError, UnavailableError
from iosr_fast.utils.files import cache_folder, new_file
from iosr_fast.utils.manifest import sha256

_DIGEST = hashlib.sha256().digest_size
log = logging.getLogger(__name__)


def open_plan(
    folder: Path, manifest: Mapping[str, Any], target: Target, build: Callable[[Path], tuple[bytes, dict[str, Any]]]
) -> tuple[bytes, Path]:
    """The plan in an engine folder that fits `target`, else the one in the cache, which `build` makes of encoder.onnx.

    Returns the plan and its file, which is missing if the cache can't be written. A plan for another GPU or version is
    never loaded; a warning names it. A new plan is written to cache_folder(), not into the engine, under a name with
    everything that it depends on. Raises RuntimeError, naming the existing plans and this machine, if none fits and
    none can be built; ValueError if encoder.onnx is damaged.
    """
    others = []
    for name, facts in manifest["plans"].items():
        if (built_for := convert(facts, Target)) == target:
            return (folder / name).read_bytes(), folder / name
        others.append(f"{name} was built for {built_for}")
    misfit = f"{'; '.join(others) or f'{folder} has no plan'}; this is {target}"
    advice = (
        f"build the engine on this machine (iosr-fast build-engine --runtime {target.runtime}), or open it with "
        "runtime='onnxruntime'"
    )
    if ONNX_FILE not in manifest["files"]:
        raise UnavailableError(f"{misfit}; and {folder} has no {ONNX_FILE} to build a plan from: {advice}")
    expected = {name: manifest["files"][name]["sha256"] for name in (ONNX_FILE, WEIGHTS) if name in manifest["files"]}
    source = hashlib.sha256(json.dumps(expected).encode()).hexdigest()[:32]
    cached = cache_folder() / PLANS / f"{target.name(target.gpu)}-b{manifest['max_batch']}-{source}.plan"
    if (plan := _read(cached)) is not None:
        log.info("%s: using the plan built from %s, %s", misfit, ONNX_FILE, cached)
        return plan, cached
    log.warning("%s: building a plan from %s once, in %s", misfit, ONNX_FILE, cached)
    for name, digest in expected.items():
        if sha256(folder / name) != digest:
            raise DamagedFileError(f"{name} in {folder} does not match its manifest: it is damaged or was changed")
    try:
        plan, _ = build(folder / ONNX_FILE)
    except RuntimeError as error:
        raise UnavailableError(f"{misfit}; building a plan from {ONNX_FILE} failed: {error}; {advice}") from error
    store(cached, hashlib.sha256(plan).digest() + plan)
    return plan, cached


def store(file: Path, content: bytes) -> None:
    """Write a file of the cache. A failure costs time at the next start, and is logged."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        log.warning("%s can't be stored (%s); set IOSR_FAST_CACHE to a folder that can be written", file, error)


def _read(cached: Path) -> bytes | None:
    """The plan in a cache file, whose SHA-256 precedes it there; None without the file or for a damaged one."""
    try:
        content = cached.read_bytes()
    except OSError:
        return None
    digest, plan = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(plan).digest() != digest:
        log.warning("the plan in the cache is damaged and built again: %s", cached)
        return None
    return plan
