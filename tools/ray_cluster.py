"""Joining a cluster of Ray, or starting one on this machine, and leaving it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from iosr_fast.utils.require import require
from tools.source_tree import ROOT

EXTRA = "ray"


@contextmanager
def joined(address: str | None, cores: int) -> Iterator[Any]:
    """The module ray, connected to the cluster at `address` ("auto": the one on this machine) or, with None, to one
    that is started here with `cores` cores, without dashboard, and ends with the block.

    Workers import from this tree: machines have to see it at the same place. Raises ImportError without Ray,
    ConnectionError where there is no such cluster.
    """
    ray = require("ray", EXTRA)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
    }
    if address is None:
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **options)
    else:
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise ConnectionError(
                f"expected a cluster of Ray at {address}: {error}; where it is there and asks for tokens (its "
                "'ray start' said so), set RAY_AUTH_MODE=token here"
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
