"""open_clip with the demo's architecture and weights under the name of every pretrained ViT.

The documents name real CLIPs, whose weights tests can't download. What is replaced is open_clip's download alone: names
and tags are still checked against open_clip's own list, and everything in iosr_fast runs as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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


class _AtImport:
    """A finder that changes open_clip as soon as it is imported: importing it here would cost seconds."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "open_clip":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                use_demo_weights(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def use_at_import() -> None:
    sys.meta_path.insert(0, _AtImport())  # type: ignore[arg-type]
