"""Classes come and go while pictures are classified: is every answer of one version, and does the log keep them all?"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iosr_fast.classifier import Classifier
from tools.serving_load.client import BROKEN, Answer, Client
from tools.serving_load.measure import Load
from tools.serving_load.open_loop import arrival_times, open_loop
from tools.serving_load.queries import Queries
from tools.serving_load.report import percentile_ms, row_of
from tools.serving_load.server_process import ServerProcess
from tools.serving_load.usage import Usage

CHANGES_A_SECOND = 20
_LOAD = 0.5
_LIVING = 5  # classes of ours that are there at any time
_AT_ONCE = 4  # changes that are sent and not answered
_SHOTS = 2
_EVERY_CLASS = 8  # each such answer is asked for as many classes as the API tells of
_MOST_TOP = 100
_COMPARED = 50

Classes = dict[str, str]  # id -> name


@dataclass
class Changes:
    """Adds and removes classes; keeps what each change's answer says. The classes' pictures are among those that are
    asked for, so that answers name them."""

    client: Client
    token: str
    made: list[tuple[int, str, str | None]] = field(default_factory=list)  # (version, class id, name; None: removed)
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _added: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    _count: int = 0
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    async def add(self) -> None:
        number, self._count = self._count, self._count + 1
        name = f"of the load test {number}"
        images = self.client.queries.images
        shown = [images[(number * _SHOTS + shot) % len(images)] for shot in range(_SHOTS)]
        answer = await self._change(201, self.client.post_form("/v1/classes", shown, {"name": name}, self.token))
        if answer is not None:
            self.made.append((answer["version"], answer["class_id"], name))
            self._added.put_nowait(answer["class_id"])

    async def remove_oldest(self) -> None:
        """Waits for one to be there."""
        class_id = await self._added.get()
        answer = await self._change(200, self.client.request("DELETE", f"/v1/classes/{class_id}", self.token))
        if answer is not None:
            self.made.append((answer["version"], class_id, None))

    async def run(self, seconds: float) -> None:
        """CHANGES_A_SECOND for `seconds`, in turn an addition and a removal, each sent when it is due."""
        start, tasks = time.perf_counter(), []
        for number in range(round(seconds * CHANGES_A_SECOND / 2) * 2):
            await asyncio.sleep(start + number / CHANGES_A_SECOND - time.perf_counter())
            tasks.append(asyncio.ensure_future(self.remove_oldest() if number % 2 else self.add()))
        done, waiting = await asyncio.wait(tasks, timeout=60)
        for task in waiting:
            task.cancel()
            self.failed.append("not done within a minute")
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


async def measure_churn(
    server: ServerProcess, queries: Queries, load: Load, capacity_rps: float, token: str
) -> tuple[dict[str, Any], list[Any]]:
    """{"changes", "failed", "versions_seen", "torn", ...}, and the bodies of the last answers, to compare with what
    the log makes (`is_rebuilt`)."""
    async with Client(server.url, queries, load.deadline_ms, check=False) as client:
        first = await _listed(client)
        changes = Changes(client, token)
        for _ in range(_LIVING):
            await changes.add()

        async def ask(number: int, due: float) -> Answer:
            top = _top(number)
            return await client.predict(number, due, f"&top={top}", lambda body: (top, _told(body)))

        rss_mb, usage, start = server.rss_mb(), Usage(server), time.perf_counter()
        times = arrival_times(_LOAD * capacity_rps, load.seconds, load.arrivals)

        async def change() -> float:
            await changes.run(load.seconds)
            return time.perf_counter() - start

        answers, took_s = await asyncio.gather(open_loop(ask, times), change())
        shares = usage.shares()
        last = []
        for number in range(min(_COMPARED, len(queries))):
            answer = await client.predict(number, None, "&top=5&nearest=3", lambda body: body["predictions"][0])
            last.append(answer.told)
        after = await _listed(client)
    versions = classes_by_version(first, changes.made)
    told = [answer.told for answer in answers if answer.told is not None]
    ours = {class_id for _, class_id, _ in changes.made}
    made = {
        "changes": len(changes.made),
        "failed": len(changes.failed),
        "versions_seen": len({version for _, (version, *_) in told}),
        "torn": sum(is_torn(top, answer, versions) for top, answer in told),
        "failures": sorted(set(changes.failed)),
        "changes_per_s": round((len(changes.made) - _LIVING) / took_s, 2),
        "change_p50_ms": percentile_ms(changes.seconds, 50),
        "change_p99_ms": percentile_ms(changes.seconds, 99),
        "last_version": max(versions),
        "last_classes_as_told": versions[max(versions)] == _classes(after),
        "answers_with_a_changed_class": sum(bool(ours & set(answer[3])) for _, answer in told),
        "load": _LOAD,
        **row_of(answers, client.deadline_s),
        "rss_mb_start": rss_mb,
        "rss_mb_end": server.rss_mb(),
        **shares,
    }
    return made, last


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
    """The classes of each version, from those of the first and the changes' own answers."""
    classes = _classes(first)
    versions = {first["version"]: dict(classes)}
    for version, class_id, name in sorted(changes, key=lambda change: change[0]):
        if name is None:
            classes.pop(class_id)
        else:
            classes[class_id] = name
        versions[version] = dict(classes)
    return versions


def is_torn(top: int, told: tuple[Any, ...], versions: dict[int, Classes]) -> bool:
    """Whether an answer can't be of the version that it carries: another version inside, classes that the version does
    not have, or too few of them."""
    version, inner, named, ids = told
    classes = versions.get(version)
    if classes is None or inner != version:
        return True
    known = all(classes.get(class_id) == name for class_id, name in zip(ids, named, strict=True))
    return not known or len(set(ids)) != min(top, len(classes)) or len(ids) != len(set(ids))


def is_rebuilt(bundle: Path, log: Path, version: int, queries: Queries, last: list[Any], threads: int) -> bool:
    """Whether the bundle and the log make a classifier of that version which says the very same, to the last bit."""
    classifier = Classifier.load(bundle, threads=threads)  # sums are rounded by how they are split
    classifier.open_log(log)
    try:
        if classifier.version != version or not last or None in last:
            return False
        # One at a time, as they were asked: a batch's sums are rounded otherwise.
        made = [classifier.explain(queries.images[i], top=5, nearest=3)[0].to_dict() for i in range(len(last))]
        return bool(json.loads(json.dumps(made)) == last)
    finally:
        classifier.close_log()


def _top(number: int) -> int:
    return _MOST_TOP if number % _EVERY_CLASS == 0 else 5


def _told(body: Any) -> tuple[int, int, tuple[str, ...], tuple[str, ...]]:
    (prediction,) = body["predictions"]
    shown = prediction["top"]
    names, ids = tuple(score["label"] for score in shown), tuple(score["class_id"] for score in shown)
    return body["version"], prediction["version"], names, ids


def _classes(listed: Any) -> Classes:
    return {info["class_id"]: info["name"] for info in listed["classes"]}
