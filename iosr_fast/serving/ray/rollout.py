"""Deployment of a bundle to the replicas: at the end all serve it, or all serve the previous one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.ray.deployment import CLASSIFIER, Scale, application
from iosr_fast.serving.ray.messages import Facts, Source
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
    """Serve a bundle on the Ray cluster that this process is connected to; returns the replicas' descriptions.

    If the application `name` runs already, this is an update: some replicas at a time load the bundle beside the old
    one and swap, and no request fails. New settings, or another version of the package, restart replicas, some at a
    time.

    Raises ValueError or OSError for a bundle that can't be read here, with nothing changed; RuntimeError if a replica
    can't load it, after the previous bundle (if any) is served again.
    """
    serve = require("ray.serve", "ray")
    settings, scale = settings or Settings(), scale or Scale()
    source = Source.of(str(Path(bundle).absolute()), verify=True)
    new = name not in serve.status().applications
    previous = running(name)
    if previous:
        _try(name, source)
    try:
        return _run(source, settings, scale, name, route_prefix)
    except RuntimeError:
        if previous:
            _run(previous[0].source, settings, scale, name, route_prefix)
        elif new:
            serve.delete(name)
        raise


def running(name: str = NAME) -> list[Facts]:
    """Descriptions of the replicas of an application, without those that are starting or dying; empty if there is no
    such application."""
    serve = require("ray.serve", "ray")
    status = serve.status().applications.get(name)
    if status is None or CLASSIFIER not in status.deployments:
        return []
    return _describe(name)[0]


def _describe(name: str) -> tuple[list[Facts], int]:
    """Descriptions of the replicas, and how many did not answer."""
    with _handle(name) as handle:
        answers = handle.broadcast("describe").results(timeout_s=_ANSWER_S, return_exceptions=True)
    facts = [answer for answer in answers if isinstance(answer, Facts)]
    return facts, len(answers) - len(facts)


@contextmanager
def _handle(name: str, method: str = "describe") -> Iterator[Any]:
    """A handle of the replicas, closed after the block: its threads would otherwise outlive the connection to Ray."""
    serve = require("ray.serve", "ray")
    handle = serve.get_deployment_handle(CLASSIFIER, app_name=name).options(method_name=method)
    try:
        yield handle
    finally:
        handle.shutdown()


def _try(name: str, source: Source) -> None:
    """Let one replica load the bundle and drop it, so that most errors show before anything changes.

    Raises RuntimeError if it can't be loaded.
    """
    with _handle(name, "try_bundle") as handle:
        refused = handle.remote(asdict(source)).result(timeout_s=_LOAD_S)
    if refused:
        raise RuntimeError(f"a replica can't load {source.bundle}, so nothing was changed: {refused}")


def _run(source: Source, settings: Settings, scale: Scale, name: str, route_prefix: str) -> list[Facts]:
    """Run the application on Ray Serve, and wait until every replica reports that it serves `source`."""
    serve = require("ray.serve", "ray")
    serve.run(application(source, settings, scale), name=name, route_prefix=route_prefix)
    until = time.monotonic() + _ANSWER_S
    while True:
        facts, silent = _describe(name)
        others = [replica for replica in facts if replica.source != source]
        if facts and not silent and not others:
            return facts
        if any(replica.refused for replica in others) or time.monotonic() > until:
            break
        time.sleep(0.2)  # a replica that died is being restarted
    reason = others[0].refused or f"it serves {others[0].source.bundle}" if others else "some do not answer"
    raise RuntimeError(
        f"expected {len(facts) + silent} replicas to serve {source.bundle}, got {len(facts) - len(others)}: {reason}"
    )
