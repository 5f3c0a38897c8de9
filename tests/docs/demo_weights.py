"""open_clip with the demo's architecture and weights under the name of every pretrained ViT.

The documents name real CLIPs, whose weights tests can't download. What is replaced is open_clip's download alone: names
and tags are still checked against open_clip's own list, and everything in iosr_fast runs as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tests.demo_cache import export_once

EXPORT, JUDGE = "iosr_fast.export.build", "iosr_fast.head.engine_judge"
REPLACED = ("create_model", "get_model_config", "get_tokenizer")


def use_demo_weights(open_clip: Any) -> None:
    """Replace three functions of open_clip."""
    from iosr_fast.clip.load import DEMO_FOLDER, DEMO_NAME

    create, config, tokenizer = (getattr(open_clip, name) for name in REPLACED)
    open_clip.add_model_config(DEMO_FOLDER / f"{DEMO_NAME}.json")

    def demo_name(name: str) -> str:
        return DEMO_NAME if name.startswith("ViT-") else name

    def create_model(name: str, pretrained: str | None = None, **options: Any) -> Any:
        if pretrained not in open_clip.list_pretrained_tags_by_model(name):
            return create(demo_name(name), pretrained=pretrained, **options)
        return create(demo_name(name), pretrained=str(DEMO_FOLDER / "clip.safetensors"))  # and no QuickGELU

    open_clip.create_model = create_model
    open_clip.get_model_config = lambda name: config(demo_name(name))
    open_clip.get_tokenizer = lambda name: tokenizer(demo_name(name))


def save_time(patch: Callable[[Any, str, Any], None], module: Any) -> None:
    """Share exports with other tests, and time engines in the fewest rounds."""
    if module.__name__ == EXPORT:
        patch(module, "export_onnx", export_once)
    else:
        patch(module, "_TIMING_S", 0.1)


class _AtImport:
    """A finder that changes a module as soon as it is imported: importing it here would cost seconds."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def use_at_import() -> None:
    changes = {"open_clip": use_demo_weights, **dict.fromkeys((EXPORT, JUDGE), partial(save_time, setattr))}
    for name, change in changes.items():
        sys.meta_path.insert(0, _AtImport(name, change))  # type: ignore[arg-type]
