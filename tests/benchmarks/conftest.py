"""Exports of the benches' small encoders, each made once for all workers and runs of one state of the sources."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.demo_cache import demo_cache


@pytest.fixture
def cached_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.onnx's exporter takes seconds a module: a module of the same code and weights is exported once."""
    import onnx

    from benchmarks import encoder_rivals
    from iosr_fast.export import onnx as room
    from iosr_fast.export.onnx import save_onnx

    export = room.to_onnx
    source = Path(encoder_rivals.__file__).read_bytes()

    def cached(
        module: Any,
        example: Any,
        name: str,
        outputs: Sequence[str],
        dynamic: Mapping[int, Any],
        weights: Path | None = None,
    ) -> Any:
        digest = hashlib.sha256(source + f"{type(module)} {example.shape} {outputs}".encode())
        adapters = getattr(module, "adapters", {})  # Pass has them in a plain dictionary
        states = {"": module.state_dict(), **{key: adapter.state_dict() for key, adapter in adapters.items()}}
        for prefix, state in states.items():
            for key, value in state.items():
                digest.update(f"{prefix} {key} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        path = demo_cache() / "exports" / f"{digest.hexdigest()[:32]}.onnx"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            onnx.save_model(export(module, example, name, outputs, dynamic), str(partial))
            os.replace(partial, path)
        if weights is None:
            return onnx.load(str(path))
        save_onnx(onnx.load(str(path)), weights.with_suffix(".onnx"))
        return onnx.load(str(weights.with_suffix(".onnx")), load_external_data=False)

    for module in (room, encoder_rivals):
        monkeypatch.setattr(module, "to_onnx", cached)
