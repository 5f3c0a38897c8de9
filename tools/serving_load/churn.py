"""Classes are added and removed under load: every answer must be of one version."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from tools.serving_load.client import BROKEN, Answer, Client, open_loop

CHANGES_A_SECOND = 20
ADDED = 5  # added classes that exist at any time
_CONCURRENT = 4  # changes sent and not yet answered
_SHOTS = 2
_EVERY_CLASS = 8  # every eighth request asks for as many classes as the API returns
_MAX_TOP = 100

Classes = dict[str, str]  # id -> name


@dataclass
class Changes:
    """Adds and removes classes and records the answers. The pictures of the classes are like the queries, so that
    predictions name them, and no other class has them."""

    client: Client
    token: str
    done: list[tuple[int, str, str | None]] = field(default_factory=list)  # (version, class id, name; None: removed)
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _added: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    _count: int = 0
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CONCURRENT))

    async def add(self) -> None:
        number, self._count = self._count, self._count + 1
        name, images = f"load test {number}", self.client.queries.bodies
        form = aiohttp.FormData({"name": name})
        for shot in range(_SHOTS):
            image = _shifted(images[(number * _SHOTS + shot) % len(images)], number)
            form.add_field("images", image, filename=str(shot), content_type=self.client.queries.content_type)
        answer = await self._change(201, self.client.request("POST", "/v1/classes", self.token, form))
        if answer is not None:
            self.done.append((answer["version"], answer["class_id"], name))
            self._added.put_nowait(answer["class_id"])

    async def remove_oldest(self) -> None:
        """Waits until there is one."""
        class_id = await self._added.get()
        answer = await self._change(200, self.client.request("DELETE", f"/v1/classes/{class_id}", self.token))
        if answer is not None:
            self.done.append((answer["version"], class_id, None))

    async def run(self, seconds: float) -> None:
        """CHANGES_A_SECOND for `seconds`, alternately an addition and a removal, each sent when it is due."""
        start, tasks = time.perf_counter(), []
        for number in range(round(seconds * CHANGES_A_SECOND / 2) * 2):
            await asyncio.sleep(start + number / CHANGES_A_SECOND - time.perf_counter())
            tasks.append(asyncio.ensure_future(self.remove_oldest() if number % 2 else self.add()))
        done, waiting = await asyncio.wait(tasks, timeout=60)
        for task in waiting:
            task.cancel()
            self.failed.append("not answered within a minute")
        for task in done:
            task.result()

    async def _change(self, expected: int, request: Coroutine[Any, Any, tuple[int, Any]]) -> Any:
        async with self._slots:
            start = time.perf_counter()
            try:
                status, answer = await request
            except BROKEN as error:
                self.failed.append(type(error).__name__)
                return None
            self.seconds.append(time.perf_counter() - start)
        if status != expected:
            self.failed.append(f"status {status}: {str(answer)[:200]}")
            return None
        return answer


def _shifted(image: bytes, number: int) -> bytes:
    """A picture that is moved to the side by as many pixels."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(image), formats=["JPEG", "PNG", "WEBP"]) as opened:
        pixels = np.asarray(opened.convert("RGB"))
        moved = np.roll(pixels, 1 + number % (pixels.shape[1] - 1), axis=1)
        Image.fromarray(moved).save(file, opened.format)
    return file.getvalue()


async def churn(
    client: Client, token: str, times: np.ndarray, seconds: float, answers: list[Answer], facts: dict[str, Any]
) -> None:
    """Adds the answers of an open loop at `times`, and facts of the changes that are made in it for `seconds`."""
    first = await _listed(client)
    changes = Changes(client, token)
    for _ in range(ADDED):
        await changes.add()

    async def ask(number: int, due: float) -> Answer:
        top = _MAX_TOP if number % _EVERY_CLASS == 0 else 5
        return await client.predict(number, due, f"&top={top}", lambda body: (top, _content(body)))

    start = time.perf_counter()

    async def change() -> float:
        await changes.run(seconds)
        return time.perf_counter() - start

    asked, took_s = await asyncio.gather(open_loop(ask, times), change())
    answers += asked
    versions = classes_by_version(first, changes.done)
    contents = [answer.content for answer in answers if answer.content is not None]
    added = {class_id for _, class_id, _ in changes.done}
    facts |= {
        "changes": len(changes.done),
        "changes_failed": sorted(set(changes.failed)),
        "changes_per_s": round((len(changes.done) - ADDED) / took_s, 2),
        "change_p50_ms": round(float(np.percentile(changes.seconds, 50)) * 1e3, 2),
        "change_p99_ms": round(float(np.percentile(changes.seconds, 99)) * 1e3, 2),
        "versions_seen": len({content[0] for _, content in contents}),
        "of_changed_classes": sum(bool(added & set(content[3])) for _, content in contents),
        "torn": sum(is_torn(top, content, versions) for top, content in contents),
        "last_classes_as_told": versions[max(versions)] == _classes(await _listed(client)),
    }


async def _listed(client: Client) -> Any:
    """The classes of all pages, and the version of the first."""
    _, listed = await client.request("GET", "/v1/classes")
    after = listed["next"]
    while after is not None:
        _, page = await client.request("GET", f"/v1/classes?after={after}")
        listed["classes"] += page["classes"]
        after = page["next"]
    return listed


def classes_by_version(first: Any, changes: list[tuple[int, str, str | None]]) -> dict[int, Classes]:
    """The classes of each version, from those of the first and the answers of the changes."""
    classes = _classes(first)
    versions = {first["version"]: dict(classes)}
    for version, class_id, name in sorted(changes, key=lambda change: change[0]):
        if name is None:
            classes.pop(class_id)
        else:
            classes[class_id] = name
        versions[version] = dict(classes)
    return versions


def is_torn(top: int, content: tuple[Any, ...], versions: dict[int, Classes]) -> bool:
    """Whether an answer is inconsistent with its version: another version inside, classes that the version does not
    have, or too few of them."""
    version, inner, named, ids = content
    classes = versions.get(version)
    if classes is None or inner != version:
        return True
    known = all(classes.get(class_id) == name for class_id, name in zip(ids, named, strict=True))
    return not known or len(set(ids)) != min(top, len(classes)) or len(ids) != len(set(ids))


def _content(body: Any) -> tuple[int, int, tuple[str, ...], tuple[str, ...]]:
    (prediction,) = body["predictions"]
    shown = prediction["top"]
    names, ids = tuple(score["label"] for score in shown), tuple(score["class_id"] for score in shown)
    return body["version"], prediction["version"], names, ids


def _classes(listed: Any) -> Classes:
    return {info["class_id"]: info["name"] for info in listed["classes"]}
