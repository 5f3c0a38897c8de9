"""Classes are added and removed under load: every answer must be of one version."""

from __future__ import annotations

import asyncio
import io
from collections import deque
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from tools.serving_load.client import Answer, Client, open_loop

CHANGES_A_SECOND = 20
ADDED = 5  # added classes that exist at any time; more than _CONCURRENT, so that there is always one to remove
_CONCURRENT = 4  # changes sent and not yet answered
_SHOTS = 2
_TOPS = (100, *[5] * 7)  # classes asked for, in turn; the API returns up to 100

Classes = dict[str, str]  # id -> name
Change = tuple[int, str, str | None]  # version, class id, name; None: removed
Content = tuple[int, int, int, Classes]  # classes asked for, version, version inside, classes in the answer


async def churn(client: Client, token: str, rate: float, seconds: float) -> tuple[list[Answer], dict[str, Any]]:
    """The answers of an open loop, and facts of the changes that are made in it: alternately an addition, of pictures
    of the queries so that predictions name the class, and a removal of the oldest."""
    url, headers = f"{client.urls[0]}/v1/classes", {"Authorization": f"Bearer {token}"}
    slots = asyncio.Semaphore(_CONCURRENT)
    changes: list[Change] = []
    contents: list[Content] = []
    added: deque[str] = deque()

    async def add(number: int) -> Answer:
        form, bodies = aiohttp.FormData({"name": f"load test {number}"}), client.queries.bodies
        for shot in range(_SHOTS):
            image = _moved(bodies[(number * _SHOTS + shot) % len(bodies)], number)
            form.add_field("images", image, filename=str(shot), content_type=client.queries.content_type)
        answer, content = await client.request("POST", url, form, headers)
        if answer.outcome == "ok":
            changes.append((content["version"], content["class_id"], f"load test {number}"))
            added.append(content["class_id"])
        return answer

    async def remove() -> Answer:
        class_id = added.popleft() if added else "none-was-added"
        answer, content = await client.request("DELETE", f"{url}/{class_id}", None, headers)
        if answer.outcome == "ok":
            changes.append((content["version"], class_id, None))
        return answer

    async def change(number: int, due: float) -> Answer:
        async with slots:
            return await (remove() if number % 2 else add(ADDED + number // 2))

    def is_wrong(number: int, answer: Any) -> bool:
        (prediction,) = answer["predictions"]
        named = {score["class_id"]: score["label"] for score in prediction["top"]}
        contents.append((_TOPS[number % len(_TOPS)], answer["version"], prediction["version"], named))
        return len(named) != len(prediction["top"])

    version, classes = await _listed(client, url)
    made = [await add(number) for number in range(ADDED)]
    queries = replace(client.queries, is_wrong=is_wrong, paths=[f"/v1/predict?top={top}" for top in _TOPS])
    answers, others = await asyncio.gather(
        open_loop(replace(client, queries=queries).predict, rate, seconds),
        open_loop(change, CHANGES_A_SECOND, seconds),
    )
    made += others
    versions, (_, last) = classes_by_version(version, classes, changes), await _listed(client, url)
    changed = {class_id for _, class_id, _ in changes}
    took_s = max(answer.done for answer in others) - others[0].sent
    return answers, {
        "changes": len(changes),
        "changes_failed": len(made) - len(changes),
        "changes_lost": len(versions[max(versions)].items() ^ last.items()),
        "change_errors": sorted({answer.outcome for answer in made} - {"ok"}),
        "changes_per_s": round((len(changes) - ADDED) / took_s, 2),
        "change_p50_ms": round(float(np.median([answer.done - answer.sent for answer in made])) * 1e3, 2),
        "versions_seen": len({content[1] for content in contents}),
        "of_changed_classes": sum(not changed.isdisjoint(content[3]) for content in contents),
        "torn": sum(is_torn(content, versions) for content in contents),
    }


def _moved(image: bytes, number: int) -> bytes:
    """A picture that is moved to the side by as many pixels: no other class has it."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(image), formats=["JPEG", "PNG"]) as opened:
        pixels = np.asarray(opened.convert("RGB"))
        Image.fromarray(np.roll(pixels, 1 + number % (pixels.shape[1] - 1), axis=1)).save(file, opened.format)
    return file.getvalue()


async def _listed(client: Client, url: str) -> tuple[int, Classes]:
    """The version and its classes, of all pages."""
    classes: Classes = {}
    query: str | None = ""
    while query is not None:
        answer, page = await client.request("GET", url + query)
        if answer.outcome != "ok":
            raise RuntimeError(f"expected the list of classes, got {answer.outcome}")
        classes |= {info["class_id"]: info["name"] for info in page["classes"]}
        query = page["next"] and f"?after={page['next']}"
    return page["version"], classes


def classes_by_version(version: int, classes: Classes, changes: list[Change]) -> dict[int, Classes]:
    """The classes of each version, from those of the first and the answers of the changes."""
    versions = {version: classes}
    for changed, class_id, name in sorted(changes, key=lambda change: change[0]):
        classes = {one: of_one for one, of_one in classes.items() if one != class_id}
        versions[changed] = classes = classes if name is None else {**classes, class_id: name}
    return versions


def is_torn(content: Content, versions: dict[int, Classes]) -> bool:
    """Whether an answer is inconsistent with its version: another version inside, classes that the version does not
    have, or another number of them than was asked for."""
    top, version, inner, named = content
    if inner != version or version not in versions:
        return True
    classes = versions[version]
    return not named.items() <= classes.items() or len(named) != min(top, len(classes))
