"""POST /v1/predict with boxes: an answer for each part of one picture, which is decoded once."""

from __future__ import annotations

import io
import json
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from iosr_fast.images import preprocess
from iosr_fast.images.crop import Box, Crop
from tests.pictures import GREY, encode, turned
from tests.serving.http_client import Client, error_of, form, queries, serving

BOXES = [[10, 20, 100, 100], [0.25, 0.1, 0.3, 0.4], [0, 0, 1, 280], [105, 50, 5000, 100]]
OUTSIDE = [400, 0, 5, 5]


def scene(size: tuple[int, int] = (400, 300)) -> Image.Image:
    """Four queries on white."""
    made = Image.new("RGB", (400, 300), "white")
    for i, query in enumerate(queries()[::6][:4]):
        made.paste(Image.open(io.BytesIO(query)).resize((100, 100)), (10 + 95 * i, 20 + 30 * i))
    return made.resize(size)


def ask(client: Client, image: bytes, boxes: Any, query: str = "") -> Any:
    """One request with the boxes in the query, and one in the form; the answer, which is the same."""
    text = boxes if isinstance(boxes, str) else json.dumps(boxes)
    answers = [
        client.ask("POST", f"/v1/predict?{query}&boxes={quote(text)}", content=image),
        client.ask("POST", f"/v1/predict?{query}", data={"boxes": text}, files=form(image)),
    ]
    told = [answer.json().get("predictions", [answer.json()]) for answer in answers]
    first, second = ([(one.get("error"), one.get("label")) for one in each] for each in told)
    assert first == second and answers[0].status_code == answers[1].status_code
    return answers[0]


@pytest.mark.parametrize("isolated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_part_is_answered_as_by_the_library(isolated: bool) -> None:
    data = turned(scene(), 6, quality=95)
    with serving(batching={"isolated": isolated, "decode_threads": 2}) as client:
        made = ask(client, data, [*BOXES[:2], OUTSIDE, *BOXES[2:]]).json()["predictions"]
        bad = made.pop(2)["error"]
        assert bad["code"] == "bad_image" and "expected a box within the picture of 400 x 300 pixels" in bad["message"]
        crops = [Crop(data, Box.of(box)) for box in BOXES]
        expected = client.served.classifier.explain(crops)
        assert [one["label"] for one in made] == [one.label for one in expected]
        wanted = pytest.approx([one.probability for one in expected], abs=1e-5)
        assert [one["probability"] for one in made] == wanted
        assert len({one["probability"] for one in made}) == 4, "as parts differ, so do the answers"
        assert 'image_seconds_count{outcome="bad_image"} 2.0' in client.get("/metrics").text, "of both requests"


def test_what_is_asked_of_images_is_asked_of_parts() -> None:
    image, boxes, kept = encode(scene()), BOXES[:2], []
    with serving(max_error=0.4, batching={"collect": lambda image, *_: kept.append(image)}) as client:
        (made, _) = ask(client, image, boxes, "top=2&nearest=3&unknown=reject&keep=0.5").json()["predictions"]
        assert len(made["top"]) == 2 and len(made["nearest"]) == 3
        assert made["accepted"] is not None and made["unknown"] is not None
        assert error_of(ask(client, image, boxes, "max_error=0.001"), 422) == "no_promise"
        assert kept == [], "a part has no file of its own"
        client.predict(image)
        assert kept == [image]


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ("", "truncated"),
        ("[[0, 0, 1, NaN]]", "malformed"),
        ("[[0, 0, 1, 1e999]]", "out of range - at `$[0][3]`"),
        ("[" * 500, "got `array` - at `$[0][0]`"),
        ([1], "got `int` - at `$[0]`"),
        ([[0, 0, 1, 1], [0, 0, "1", 1]], "got `str` - at `$[1][2]`"),
        ([[0, 0, 1, 1], [0, 0, 1]], "numbers, sides above 0, got [0.0, 0.0, 1.0]"),
        ([[0, 0, 1, 0]], "expected a box"),
        ([], "from 1 to 64, got 0"),
        ([[0, 0, 1, 1]] * 65, "from 1 to 64, got 65"),
    ],
)
def test_wrong_boxes_refuse_the_request(shared: Client, boxes: Any, told: str) -> None:
    refused = ask(shared, GREY, boxes)
    assert error_of(refused, 422) == "invalid_parameters" and told in refused.json()["error"]["message"]


def test_boxes_are_of_one_image_and_come_once(shared: Client) -> None:
    data = {"boxes": "[[0, 0, 1, 1]]"}
    for query, images in ((data, [GREY]), ({}, [GREY, GREY])):
        refused = shared.ask("POST", "/v1/predict", params=query, data=data, files=form(*images))
        assert error_of(refused, 422) == "invalid_parameters" and f"of one image; got {len(images)} im" in refused.text
    long = shared.ask("POST", "/v1/predict", data={"boxes": "[[0, 0, 1, 1]]" + " " * 9000}, files=form(GREY))
    assert error_of(long, 413) == "too_large"
    for image, code in ((b"<svg/>", "unsupported_type"), (encode(scene(), "JPEG")[:2000], "bad_image")):
        answer = ask(shared, image, BOXES)
        assert answer.status_code == 422
        assert [one["error"]["code"] for one in answer.json()["predictions"]] == [code] * 4


def test_a_large_photo_with_many_boxes_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    photo, decoded, upright_rgb = encode(scene((4000, 3000)), "JPEG"), list[Any](), preprocess.upright_rgb
    boxes = [[x / 8, y / 8, 1 / 8, 1 / 8] for x in range(8) for y in range(8)]
    monkeypatch.setattr(preprocess, "upright_rgb", lambda *given: decoded.append(given[0].size) or upright_rgb(*given))
    with serving() as client:
        answer = client.ask("POST", "/v1/predict", params={"boxes": json.dumps(boxes)}, content=photo)
        assert len(answer.json()["predictions"]) == 64 and decoded == [(4000, 3000)], "at its full size"
