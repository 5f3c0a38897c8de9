"""What is compiled for this machine: an engine's plan, from its folder or built once, and the cache that keeps it."""

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
from iosr_fast.sealed.files import cache_folder, new_file, remove_leftovers
from iosr_fast.sealed.manifest import sha256

log = logging.getLogger(__name__)


class CachedFile:
    """A file of the user's cache: the SHA-256 of its content, then the content. Its name covers the target and
    `depends_on`, all else that the content depends on, as values of JSON."""

    def __init__(self, target: Target, suffix: str, *depends_on: Any) -> None:
        digest = hashlib.sha256(json.dumps([str(target), *depends_on]).encode()).hexdigest()[:32]
        self.path = cache_folder() / PLANS / f"{Path(target.file).stem}-{digest}.{suffix}"

    def read(self) -> bytes | None:
        """The content; None without the file and, with a warning, for a damaged one."""
        try:
            stored = self.path.read_bytes()
        except OSError:
            return None
        digest, content = stored[:32], stored[32:]
        if hashlib.sha256(content).digest() != digest:
            log.warning("%s in the cache is damaged and compiled again", self.path)
            return None
        return content

    def write(self, content: bytes) -> None:
        """Replace the content. A failure costs time at the next start, and is logged."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path.parent)  # of all plans: those of another version have no next writer
            with new_file(self.path) as temporary:
                temporary.write_bytes(hashlib.sha256(content).digest() + content)
        except OSError as error:
            log.warning("%s can't be stored (%s); set IOSR_FAST_CACHE to a writable folder", self.path, error)


def open_plan(
    folder: Path, manifest: Mapping[str, Any], target: Target, build: Callable[[Path], bytes]
) -> tuple[bytes, Path]:
    """The plan in an engine folder that fits `target`, else the one in the cache, which `build` makes of encoder.onnx.

    Returns the plan and its file, which is missing if the cache can't be written. A plan for another GPU or version is
    never loaded; a warning names it. A new plan is written to the cache, not into the engine. Raises RuntimeError,
    naming the existing plans and this machine, if none fits and none can be built; ValueError for a damaged engine.
    """
    others = []
    for name, facts in manifest["plans"].items():
        if (built_for := convert(facts, Target)) == target:
            return (folder / name).read_bytes(), folder / name
        others.append(f"{name} was built for {built_for}")
    misfit = f"{'; '.join(others) or 'the engine has no plan'}; this is {target}"
    expected = {name: manifest["files"][name]["sha256"] for name in (ONNX_FILE, WEIGHTS) if name in manifest["files"]}
    cached = CachedFile(target, "plan", manifest["max_batch"], expected)
    if (plan := cached.read()) is not None:
        log.info("%s: using the plan built from %s, %s", misfit, ONNX_FILE, cached.path)
        return plan, cached.path
    log.warning("%s: building a plan from %s once, in %s", misfit, ONNX_FILE, cached.path)
    for name, digest in expected.items():
        if sha256(folder / name) != digest:
            raise DamagedFileError(f"{name} in {folder} does not match its manifest: it is damaged or was changed")
    try:
        plan = build(folder / ONNX_FILE)
    except RuntimeError as error:
        raise UnavailableError(
            f"{misfit}; building a plan from {ONNX_FILE} failed: {error}; build the engine on this machine (iosr-fast "
            f"build-engine --runtime {target.runtime}), or open it with runtime='onnxruntime'"
        ) from error
    cached.write(plan)
    return plan, cached.path
