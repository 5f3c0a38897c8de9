"""The TensorRT plans of an engine folder that Triton's tensorrt backend can execute."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePlan:
    """A plan's file, the compute capability of its GPU ("9.0"), and what it was built for in words."""

    path: Path
    capability: str
    told: str


def choose_plans(engine: Path, manifest: Mapping[str, Any], max_batch: int) -> tuple[EnginePlan, ...]:
    """The plan of the newest TensorRT for each compute capability that the engine has plans for; may be none.

    Plans of TensorRT-RTX, which Triton has no backend for, are named in a warning and left out. Raises ValueError for a
    plan that takes no `max_batch` pictures.
    """
    newest: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, facts in sorted(manifest.get("plans", {}).items()):
        if facts["runtime"] != "tensorrt":
            log.warning(
                "%s is a plan of %s, which Triton Inference Server can't execute; left out", name, facts["runtime"]
            )
            continue
        capability = facts["compute_capability"]
        if capability not in newest or _version(newest[capability][1]) < _version(facts):
            newest[capability] = (name, facts)
    for name, facts in newest.values():
        largest = facts.get("profile", {}).get("max", manifest["max_batch"])
        if max_batch > largest:
            raise ValueError(
                f"expected a max_batch of at most {largest}, which {name} was built for, got {max_batch}; "
                f"build the engine with --max-batch {max_batch}, or export without gpu"
            )
    return tuple(
        EnginePlan(engine / name, capability, f"{facts['gpu']} with TensorRT {facts['version']}")
        for capability, (name, facts) in newest.items()
    )


def _version(facts: Mapping[str, Any]) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", facts["version"])]
