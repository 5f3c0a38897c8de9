"""Detector files: their boxes are classified, and the classes are written where the tools of each format read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from iosr_fast import Classifier, __version__
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.detections import DetectionsTable
from iosr_fast.files.source import read_source
from iosr_fast.files.tables import TableRow
from iosr_fast.head.labelled_images import labelled_images
from iosr_fast.head.verdict import Rejection
from iosr_fast.images.crop import Box, Crop
from iosr_fast.images.detector_files import OURS, DetectorFile, Selection
from iosr_fast.store.head_files import fingerprint
from tests.files.runs import classify, done, load_images, read_rows

FILES, SIZE = ("scenes/café 1.png", "scenes/2.png"), (160, 100)
BOXES = [[10, 20, 64, 64], [84.5, 10, 64, 64], [20, 20, 64, 64]]  # two of the first file, and one of the second
SHARES = [[value / side for value, side in zip(box, SIZE * 2, strict=True)] for box in BOXES]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    (tmp_path / "scenes").mkdir()
    for name, places in zip(FILES, ([0, 1], [2]), strict=True):
        scene = Image.new("RGB", SIZE, "white")
        for place in places:
            x, y, *side = map(int, BOXES[place])
            scene.paste(Image.fromarray(load_images()[7 * place]).resize(side), (x, y))
        scene.save(tmp_path / name)
    return tmp_path


def megadetector() -> Any:
    """With a video, a failure, a category that is not listed, and the class of another classifier."""
    found = [{"category": "1", "conf": 0.10 + 0.3 * i, "bbox": box} for i, box in enumerate(SHARES)]
    found[0]["classifications"] = [["7", 0.5]]
    rest = [{"category": "9", "conf": 0.9, "bbox": [0, 0, 1, 1]}, {"category": "2", "conf": 0.9, "bbox": [0, 0, 0, 1]}]
    images = [
        {"file": FILES[0].replace("/", "\\"), "detections": found[:2]},
        {"file": "a.mp4", "frame_rate": 20, "detections": [found[2] | {"frame_number": 0}]},
        {"file": FILES[1], "detections": [*found[2:], *rest]},
        {"file": "b.png", "failure": "no image", "detections": None},
    ]
    names = {"classification_categories": {"7": "fox"}, "classification_category_descriptions": {"7": "vulpes"}}
    info = {"format_version": "1.4", "detector": "MDV5A"}
    return {"info": info, "detection_categories": {"1": "animal", "2": "person"}, **names, "images": images}


def coco() -> Any:
    """Not in the order of the images; with a crowd, a caption, and an annotation of an image that is not there."""
    keys = ({"id": i, "image_id": 5 + i // 2, "category_id": 3} for i in range(3))
    found = [key | {"bbox": box, "iscrowd": 0} for key, box in zip(keys, BOXES, strict=True)]
    found[1] |= {"score": 0.25, "segmentation": [[1.5, 2, 3, 4, 5, 6]], "area": 64.0}
    rest = [found[0] | {"iscrowd": 1}, found[0] | {"image_id": 1}, {"id": 10, "image_id": 5, "caption": ""}]
    images = [{"id": 5 + i, "file_name": name, "width": 160, "height": 100} for i, name in enumerate(FILES)]
    return {
        "images": images,
        "annotations": [*found[2:], *found[:2], *rest],
        "categories": [{"id": 3, "name": "thing"}],
    }


def label_studio() -> Any:
    """A task with a region of either kind, one with a rotation and one that was cancelled; one with predictions."""
    values = [dict(zip(("x", "y", "width", "height"), (100 * one for one in box), strict=True)) for box in SHARES]
    regions = [{"id": f"r{i}", "from_name": "tag", "to_name": "img", "value": one} for i, one in enumerate(values)]
    first, second, third = (one | {"type": "rectangle", "original_width": 160, "image_rotation": 0} for one in regions)
    tag = first | {"type": "rectanglelabels", "value": values[0] | {"rectanglelabels": ["thing"], "rotation": 0}}
    text = second | {"from_name": "name", "type": "labels", "value": values[1] | {"labels": ["thing"]}}
    rest = [first | {"value": values[0] | {"rotation": 30}}, {"type": "choices", "value": {"choices": ["night"]}}]
    drawn = [{"result": [tag, second, text, *rest], "was_cancelled": False}, {"result": [tag], "was_cancelled": True}]
    path = "/data/local-files/?d=scenes/caf%C3%A9%201.png"
    last = third | {"type": "rectanglelabels", "value": values[2] | {"rectanglelabels": ["thing"]}}
    predictions = [3, {"score": 0.5, "result": [tag]}, {"score": 0.25, "result": [last]}]
    return [{"data": {"image": path}, "annotations": drawn}, {"data": {"img": FILES[1]}, "predictions": predictions}]


def in_megadetector(new: Any, classes: list[Any], keys: dict[str, int], model: str) -> None:
    for name in ("classification_categories", "classification_category_descriptions"):
        new[name] |= {str(8 + key): label for label, key in keys.items()}
    new["info"]["classifier"] = model
    for one, best in zip([*new["images"][0]["detections"], new["images"][2]["detections"][0]], classes, strict=True):
        one["classifications"] = [[str(8 + keys[label]), share] for label, share in best]


def in_coco(new: Any, classes: list[Any], keys: dict[str, int], model: str) -> None:
    new["categories"] += [{"id": 4 + key, "name": label, "supercategory": ""} for label, key in keys.items()]
    for one, [(label, share)] in zip([*new["annotations"][1:3], new["annotations"][0]], classes, strict=True):
        own = {f"detection_{name}": one[name] for name in ("category_id", "score") if name in one}
        one |= own | {"category_id": 4 + keys[label], "score": share}


def in_label_studio(new: Any, classes: list[Any], keys: dict[str, int], model: str) -> None:
    [[(one, sure)], [(other, less)], [(last, share)]] = classes
    tag, second, text = new[0]["annotations"][0]["result"][:3]
    third = new[1]["predictions"][-1]["result"][0]
    result = [tag | {"value": tag["value"] | {"rectanglelabels": [one]}, "score": sure}, second | {"score": less}]
    result.append(text | {"value": text["value"] | {"labels": [other]}, "score": less})
    new[0]["predictions"] = [{"model_version": model, "score": min(sure, less), "result": result}]
    result = [third | {"value": third["value"] | {"rectanglelabels": [last]}, "score": share}]
    new[1]["predictions"].append({"model_version": model, "score": share, "result": result})


FORMATS = {megadetector: in_megadetector, coco: in_coco, label_studio: in_label_studio}


def write(folder: Path, document: Any) -> Path:
    """A document with half a surrogate."""
    text = json.dumps(document, indent=1, ensure_ascii=False).replace('"MDV5A"', r'"\ud800é"')
    (folder / "detections.json").write_text(text, encoding="utf-8")
    return folder / "detections.json"


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("made", FORMATS)
def test_the_same_file_has_the_classes_too(made: Callable[[], Any], bundle: Path, scenes: Path) -> None:
    file, out, top = write(scenes, made()), scenes / "out.json", 3 if made is megadetector else 1
    words = [bundle, file, "--chunk", 2, "--top", top, "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionsTable, "finish", interrupted)
        assert "the same command resumes" in classify(*words, out).output and not out.exists()
    said = done(classify(*words, out))
    assert "3 of 3 images are done already" in said and f"wrote {out}: 3 boxes" in said
    done(classify(*words, scenes / "out.csv"))
    rows, places = read_rows(scenes / "out.csv"), zip((FILES[0], *FILES), BOXES, strict=True)
    crops, classifier = [Crop(scenes / name, Box(*box)) for name, box in places], Classifier.load(bundle)
    assert [row["label"] for row in rows] == classifier.predict(crops).tolist()
    assert rows[0]["path"].startswith(f"{scenes / FILES[0]}#xywh=")
    classes = [[(row[f"label{at}"], float(row[f"probability{at}"])) for at in ("", "_2", "_3")[:top]] for row in rows]
    keys = {label: key for key, label in enumerate(dict.fromkeys(label for best in classes for label, _ in best))}
    expected = json.loads(file.read_bytes())
    FORMATS[made](
        expected, classes, keys, f"iosr_fast {__version__} classifier {fingerprint(classifier.snapshot())[:12]}"
    )
    assert json.loads(out.read_bytes()) == expected


def box_of(box: str = "[0, 0, 1, 1]", file: str = '"a.png"', more: str = "") -> str:
    found = (
        f'{{"category": "1", "conf": 0.9, "bbox": {box}{more}}}, {{"category": "1", "conf": 1, "bbox": [0, 0, 1, 2]}}'
    )
    return f'{{"detection_categories": {{"1": "a"}}, "images": [{{"file": {file}, "detections": [{found}]}}]}}'


REGION = '[{"data": {"image": "s3://a/b.png"}, "annotations": [{"result": [{"type": "rectangle", "value": %s}]}]}]'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (box_of("[0, 0, NaN, 1]"), "NaN is no number"),
        (box_of("[0, 0, 1e400, 1]"), "1e400 is no number of JSON, or too large"),
        (box_of(file='"https://a.org/b.png"'), "got the URL https://a.org/b.png"),
        (REGION % '{"x": 0, "y": 0, "width": 1, "height": 1}', "got the URL s3://"),
        (REGION % '{"y": 0}', "an entry is not as the format has it"),
        (box_of(more=', "a": 1, "a": 2'), "twice"),
        (box_of(more=', "a": ' + "[" * 99_999), "RecursionError"),
        (box_of(more=f', "a": 1{"0" * 5000}'), "4300"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}', "one twice"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}]', "its results alone name no files"),
        ('[{"data": {"a": "1.png", "b": "2.png"}}]', "under image in its data, got 'a', 'b'"),
        ("{", "Expecting"),
        (box_of(), "found none at"),
        (box_of(file='"../a.png"'), r"expected pictures below .*, got \.\./a\.png: give --root"),
        (box_of(file='"b/../../a.png"'), r"expected pictures below .*, got b/\.\./\.\./a\.png"),
        (box_of(file='"/etc/a.png"'), "expected pictures below .*, got /etc/a.png: give --root"),
        (box_of().replace('{"1": "a"}', '["a"]'), "expected detection_categories as an object, got list"),
        ('{"images": [], "annotations": [], "categories": [{"id": "3", "name": "a"}]}', "expected integers as ids"),
        ('{"images": [], "annotations": []}', "found none in"),
    ],
)
def test_a_file_that_can_not_be_used_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises((IosrFastError, FileNotFoundError), match=words):
        read_source([str(tmp_path / "a.json")])


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("info", ["MDV5A"], "expected info as an object, got list"),
        ("classification_category_descriptions", "vulpes", "expected classification_category_descriptions as an"),
        ("classification_categories", {"fox": "fox"}, "expected integers as keys of classification_categories, got"),
    ],
)
def test_a_document_without_a_place_for_classes_is_refused_before_any_work(
    part: str, value: Any, words: str, scenes: Path
) -> None:
    file = write(scenes, megadetector() | {part: value})
    with pytest.raises(IosrFastError, match=words):
        DetectionsTable.of(str(file), Selection(), 1)


def test_pictures_are_below_the_root_from_which_paths_are_relative_or_the_file_is(scenes: Path) -> None:
    (scenes / "boxes").mkdir()
    for path in (f"../{FILES[0]}", str(scenes / FILES[0])):
        (file := scenes / "boxes" / "a.json").write_text(box_of(file=json.dumps(path)))
        assert read_source([str(file)], boxes=Selection(scenes)).paths[0].startswith(f"{scenes / FILES[0]}#")
        with pytest.raises(IosrFastError, match="expected pictures below"):
            read_source([str(file)], skip_bad=True)
    file.write_text(box_of(file=json.dumps("../boxes of others/a.png")))  # a folder whose name begins like the root's
    with pytest.raises(IosrFastError, match="expected pictures below"):
        read_source([str(file)])


@pytest.mark.parametrize(
    "box", ["[0, 0, 0, 1]", "[0, 0, -1, 1]", f"[0, 0, 1{'0' * 400}, 1]", '["0", 0, 1, 1]', "[1]", "null"]
)
def test_what_is_no_box_is_left_out_and_counted(box: str, scenes: Path, caplog: pytest.LogCaptureFixture) -> None:
    (scenes / "a.json").write_text(box_of(box, file=json.dumps(FILES[0])))
    assert read_source([str(scenes / "a.json")]).keys == [f"{scenes / FILES[0]}#xywh=percent:0,0,100,200"]
    assert "left out 1 of 2 boxes: 1 of other than four numbers" in caplog.text


def test_boxes_are_selected_by_confidence_and_category(scenes: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(scenes / "scenes", megadetector())
    keys = read_source([str(file)], boxes=Selection(scenes, 0.4, ["animal"])).keys
    assert [key.partition("#")[0] for key in keys] == [str(scenes / name) for name in FILES]
    for reason in ("4 of 6", "1 of other categories", "1 of videos", "1 of no listed category", "1 below"):
        assert reason in caplog.text
    with pytest.raises(IosrFastError, match="only with a detector file"):
        read_source([str(scenes)], boxes=Selection(scenes))


@pytest.mark.parametrize(("made", "names"), [*zip(FORMATS, (["fox"], ["thing"] * 3, ["thing"] * 2), strict=True)])
def test_labelled_boxes_are_a_place_of_labelled_images(made: Callable[[], Any], names: list[str], scenes: Path) -> None:
    images = labelled_images(write(scenes / "scenes", made()), root=scenes)
    assert images.labels == names and all(f"{scenes}/scenes/" in str(path) for path in images.paths)


@pytest.mark.parametrize("made", FORMATS)
def test_what_was_classified_is_read_as_the_detector_wrote_it(made: Callable[[], Any], scenes: Path) -> None:
    """A box that gets no class in a later run keeps none of an earlier one, which a promise would not hold for."""
    seen, out = list[Any](), write(scenes, made())
    for classes in ([("cat", 0.5)], [], [("cow", 0.5)]):
        document = DetectorFile(out)
        found = [one for one, _ in document.boxes(Selection())]
        seen.append([(one.path, one.numbers, one.name, one.confidence) for one in found])
        for one in found:
            document.format.add(one.record, classes, f"iosr_fast 1 classifier {len(seen)}")
        out = scenes / f"{len(seen)}.json"
        document.write(out)
    assert seen[0] == seen[1] == seen[2] and len(found) == 3
    new = json.loads((scenes / "2.json").read_bytes())
    if made is coco:
        assert new["annotations"] == json.loads(write(scenes, coco()).read_bytes())["annotations"]
    assert made is label_studio or "classifications" not in json.dumps(new)


@pytest.mark.parametrize("made", [coco, label_studio])
def test_a_box_has_all_of_its_labels_and_none_of_an_earlier_run(made: Callable[[], Any], scenes: Path) -> None:
    out, seen = write(scenes, made()), list[Any]()
    for labels in ("ab", "cab", "b"):
        document = DetectorFile(out)
        for one, _ in document.boxes(Selection()):
            seen.append((one.path, one.numbers, one.name, one.confidence))
            document.format.add(one.record, [(name, 0.5 + k / 8) for k, name in enumerate(labels)], f"{OURS}{labels}")
        out = scenes / f"{labels}.json"
        document.write(out)
        written = json.loads(out.read_bytes())
        if made is label_studio:
            regions = written[0]["predictions"][-1]["result"] + written[1]["predictions"][-1]["result"]
            found = [one["value"].get(one["type"], []) for one in regions if one["type"] != "rectangle"]
            assert found == [list(labels)] * 3 and {one["score"] for one in regions} == {0.5}
            continue
        names = {one["id"]: one["name"] for one in written["categories"]}
        boxes = [one for one in written["annotations"] if "detection_category_id" in one]
        assert len(boxes) == 3 * len(labels) and all(one["detection_category_id"] == 3 for one in boxes)
        for box in BOXES:
            alike = [one for one in boxes if one["bbox"] == box]
            assert [(names[one["category_id"]], one["score"]) for one in alike] == [
                (name, 0.5 + k / 8) for k, name in enumerate(labels)
            ]
            assert {one["detection_copy_of"] for one in alike[1:]} <= {alike[0]["id"]}
        assert len({one["id"] for one in boxes}) == len(boxes) and len(written["annotations"]) == len(boxes) + 3
    assert seen[:3] == seen[3:6] == seen[6:]


def test_what_is_rejected_or_not_accepted_is_not_written() -> None:
    table, best = DetectionsTable("a.json", Selection(), ""), [("cat", 0.98765)]
    rows = [TableRow("", best, Rejection(1.0, rejected)) for rejected in (True, False)]
    rows += [TableRow("", best, accepted=accepted) for accepted in (True, False)] + [TableRow("", error="no image")]
    written = [json.loads(line) for line in table.encode(rows, True).splitlines()]
    assert written == [[], [["cat", 0.9877]], [["cat", 0.9877]], [], []]
    several = [TableRow("", [*best, ("dog", 0.5)], accepted=one) for one in (None, (False, True), (False, False))]
    written = [json.loads(line) for line in table.encode(several, True).splitlines()]
    assert written == [[["cat", 0.9877], ["dog", 0.5]], [["dog", 0.5]], []]
