"""Connecting to a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import iosr_fast
from iosr_fast.utils.require import require

# Ray Serve kills an HTTP proxy that is not ready within three times this, 15 seconds by default, and then
# `serve.start` fails; on two busy cores the imports alone take longer. `serve.start` itself gives up after 60 seconds.
_PROXY_READY = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"


@contextmanager
def joined(address: str | None, cores: int) -> Iterator[Any]:
    """The module ray, connected for the block to the cluster at `address` ("auto": the one on this machine) or, with
    None, to one started here with `cores` cores and without dashboard.

    Workers import iosr_fast from this path, so all machines need it at the same place. Raises ImportError without Ray,
    ConnectionError without such a cluster.
    """
    ray = require("ray", "ray")
    root = Path(iosr_fast.__file__).resolve().parent.parent
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONPATH": str(root), _PROXY_READY: os.environ.get(_PROXY_READY, "60")}},
    }
    if address is None:
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **options)
    else:
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise ConnectionError(
                f"expected a Ray cluster at {address}: {error}; if it exists and requires tokens ('ray start' says "
                "so), set RAY_AUTH_MODE=token here"
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
