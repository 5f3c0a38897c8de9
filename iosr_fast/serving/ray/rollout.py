"""Bringing a bundle to the replicas, and making sure that it arrived: all of them serve it, or all the one before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.deployment import CLASSIFIER, EXTRA, application
from iosr_fast.serving.ray.messages import Facts
from iosr_fast.serving.ray.scale import Scale
from iosr_fast.serving.ray.source import Source
from iosr_fast.utils.require import require

NAME = "iosr_fast"  # of the application
_ANSWER_S = 30.0
_LOAD_S = 600.0


def deploy(
    bundle: str | Path,
    settings: Settings | None = None,
    scale: Scale | None = None,
    name: str = NAME,
    route_prefix: str = "/",
) -> list[Facts]:
    """Serve a bundle on the Ray that this process is connected to; returns what the replicas say of themselves.

    Where the application `name` runs already, this is an update: some replicas at a time load the bundle beside the
    old one and swap, and no request fails. Other settings, or a package of another version, restart replicas, some at
    a time.

    Raises ValueError or OSError for a bundle that can't be read here, and changes nothing; RuntimeError where a replica
    can't load it, and then the bundle before is served again, or nothing where there was none.
    """
    serve = require("ray.serve", EXTRA)
    settings, scale = settings or Settings(), scale or Scale()
    source = Source.of(str(Path(bundle).absolute()), verify=settings.verify)
    new = name not in serve.status().applications
    before = running(name)
    if before:
        _try(name, source)
    try:
        return _run(source, settings, scale, name, route_prefix)
    except RuntimeError:
        if before:
            _run(before[0].source, settings, scale, name, route_prefix)
        elif new:
            serve.delete(name)
        raise


def running(name: str = NAME) -> list[Facts]:
    """What the replicas of an application say of themselves, those that are starting or dying left out; an empty list
    where there is no such application."""
    serve = require("ray.serve", EXTRA)
    found = serve.status().applications.get(name)
    if found is None or CLASSIFIER not in found.deployments:
        return []
    return _describe(name)[0]


def _describe(name: str) -> tuple[list[Facts], int]:
    """What the replicas say of themselves, and how many did not answer."""
    with _handle(name) as handle:
        said = handle.broadcast("describe").results(timeout_s=_ANSWER_S, return_exceptions=True)
    facts = [one for one in said if isinstance(one, Facts)]
    return facts, len(said) - len(facts)


@contextmanager
def _handle(name: str, method: str = "describe") -> Iterator[Any]:
    """A handle of the replicas. It ends with the block: its threads would otherwise outlive the connection to Ray."""
    serve = require("ray.serve", EXTRA)
    handle = serve.get_deployment_handle(CLASSIFIER, app_name=name).options(method_name=method)
    try:
        yield handle
    finally:
        handle.shutdown()


def _try(name: str, source: Source) -> None:
    """Have one replica load the bundle and forget it: most of what may be wrong shows before anything is changed.
    Raises RuntimeError where it can't."""
    with _handle(name, "try_bundle") as handle:
        refused = handle.remote(source.to_config()).result(timeout_s=_LOAD_S)
    if refused:
        raise RuntimeError(f"a replica can't load {source.bundle}, so nothing was changed: {refused}")


def _run(source: Source, settings: Settings, scale: Scale, name: str, route_prefix: str) -> list[Facts]:
    """Have Ray Serve run the application, and wait until every replica says that it serves `source`."""
    serve = require("ray.serve", EXTRA)
    serve.run(application(source, settings, scale), name=name, route_prefix=route_prefix)
    until = time.monotonic() + _ANSWER_S
    while True:
        facts, silent = _describe(name)
        others = [one for one in facts if one.source != source]
        if facts and not silent and not others:
            return facts
        if any(one.refused for one in others) or time.monotonic() > until:
            break
        time.sleep(0.2)  # one that died meanwhile is being started again
    told = others[0].refused or f"it serves {others[0].source.bundle}" if others else "some do not answer"
    raise RuntimeError(
        f"expected {len(facts) + silent} replicas to serve {source.bundle}, got {len(facts) - len(others)}: {told}"
    )
