"""A saved classifier on more than one process or machine: replicas behind one HTTP API, by Ray Serve. Needs the extras
`ray` and `serve`.

    from iosr_fast.serving.ray import Scale, deploy
    deploy("bundle", scale=Scale(replicas=4))    # on the Ray that was joined; again, with another bundle: an update

tools/serve_ray.py does it from a command line, `from_config` from a file of `serve deploy`.

Every replica has a classifier of its own, so classes are not changed over this API: a change would be one replica's.
They are changed on one classifier (in Python, or by `iosr-fast serve`), which is saved as a bundle and rolled out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iosr_fast.serving.ray.deployment import build_app, from_config
    from iosr_fast.serving.ray.rollout import deploy
    from iosr_fast.serving.ray.scale import Scale

_HOME = {"Scale": "scale", "build_app": "deployment", "deploy": "rollout", "from_config": "deployment"}
__all__ = ["Scale", "build_app", "deploy", "from_config"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'iosr_fast.serving.ray' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"iosr_fast.serving.ray.{_HOME[name]}"), name)
