"""The boxes of detector files, and the classes that are written into these: JSON of one of three formats, which its
structure tells.

MegaDetector   https://lila.science/megadetector-output-format
COCO           https://cocodataset.org/#format-data; an annotation may have the `score` of its results
Label Studio   https://labelstud.io/guide/task_format and https://labelstud.io/guide/predictions

A file that was classified is read as the detector wrote it: what is added to a box takes the place of earlier classes,
also where no class is added.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.crop import Box
from iosr_fast.images.listing import refuse_url
from iosr_fast.utils.text import abbreviate

log = logging.getLogger(__name__)
Classes: TypeAlias = Sequence[tuple[str, float]]  # of a box, with their probabilities, best first
OURS = "iosr_fast "  # how the name of every `classifier` of this package begins


@dataclass(frozen=True)
class Selection:
    """Which boxes of a detector file are taken: of at least `min_confidence`, or without one; of these `categories` of
    the detector, if any. `root` is the folder that all pictures are below, None that of the file."""

    root: str | Path | None = None
    min_confidence: float | None = None
    categories: Sequence[str] = ()

    def check(self, places: Iterable[str | Path]) -> None:
        """Raise IosrFastError where something is selected, and no place is a detector file."""
        if self != ALL_BOXES and not any(map(is_detector_file, places)):
            raise IosrFastError("expected --root, --min-confidence and --category only with a detector file (.json)")

    def excludes(self, one: Detection) -> str:
        """Why a box is not taken; "" if it is."""
        if self.categories and one.name not in self.categories:
            return "of other categories"
        if self.min_confidence is None or one.confidence is None or float(one.confidence) >= self.min_confidence:
            return ""
        return "below the least confidence"


ALL_BOXES = Selection()


class Detection(NamedTuple):
    """A box of a document: `record` gets its class, `name` is the detector's or, of labelled boxes, the label, and
    `unit` is what 1 in its `numbers` is of a side of the picture, 0 for pixels. `fault` is why it can't be taken."""

    record: Any
    path: str
    numbers: Any
    unit: float
    name: str | None
    confidence: Any
    fault: str


class MegaDetector:
    """Paths may have backslashes. A detection gets `classifications`, which Timelapse shows: pairs of a key of
    `classification_categories` and a probability, best first."""

    def __init__(self, document: Any) -> None:
        self._document, self._classes = document, dict(_object_in(document, "classification_categories"))
        if wrong := [key for key in self._classes if not key.isdecimal()]:
            raise IosrFastError(f"expected integers as keys of classification_categories, got {abbreviate(wrong)}")
        self._keys = {name: key for key, name in reversed(self._classes.items())}
        self._new = count(max(map(int, self._classes), default=-1) + 1)

    def boxes(self, labelled: bool) -> Iterator[Detection]:
        names = _object_in(self._document, "detection_categories")
        for image in self._document["images"]:
            path = image["file"].replace("\\", "/")
            for one in image.get("detections") or ():
                name = names.get(one["category"])
                fault = "of no listed category" if name is None else "of videos" * ("frame_number" in one)
                if labelled:
                    name = self._classes[one["classifications"][0][0]] if one.get("classifications") else None
                yield Detection(one, path, one["bbox"], 1, name, one["conf"], fault)

    def add(self, record: Any, classes: Classes, classifier: str) -> None:
        for label, _ in classes:
            if label not in self._keys:
                key = self._keys[label] = str(next(self._new))
                self._classes[key] = label
                self._document["classification_categories"] = self._classes
                if described := _object_in(self._document, "classification_category_descriptions"):  # of the same keys
                    described[key] = label
        self._document["info"] = _object_in(self._document, "info") | {"classifier": classifier}
        record["classifications"] = [[self._keys[label], share] for label, share in classes]
        if not classes:
            del record["classifications"]


class Coco:
    """An annotation gets the category and, as `score`, the probability of its class, as pycocotools, FiftyOne and
    Datumaro read them; the detector's own stay as detection_category_id and detection_score. Of several classes the
    others get a copy of it each, whose detection_copy_of is its id."""

    def __init__(self, document: Any) -> None:
        self._document, self._categories = document, list(document.get("categories") or ())
        ids = (key for one in document["annotations"] if type(key := one.get("id")) is int)
        self._copies, self._new_id = defaultdict[Any, list[Any]](list), count(max(ids, default=-1) + 1)
        self._names = {one["id"]: one["name"] for one in self._categories}
        if wrong := [key for key in self._names if type(key) is not int]:
            raise IosrFastError(f"expected integers as ids of categories, got {wrong[0]!r:.80}")
        self._keys = {name: key for key, name in reversed(self._names.items())}
        self._new = count(max(self._names, default=0) + 1)

    def boxes(self, labelled: bool) -> Iterator[Detection]:
        of_image = defaultdict[Any, list[Any]](list)
        for one in self._document["annotations"]:
            copy_of = None if labelled else one.get("detection_copy_of")
            (of_image[one["image_id"]] if copy_of is None else self._copies[copy_of]).append(one)
        paths = {image["id"]: image["file_name"] for image in self._document["images"]}
        if len(paths) < len(self._document["images"]):
            raise IosrFastError("expected an id of its own for each image, got one twice")
        for key in {**paths, **of_image}:  # the boxes of a picture together
            for one in of_image[key]:
                own = "" if labelled or "detection_category_id" not in one else "detection_"
                name = self._names.get(one.get(f"{own}category_id"))
                fault = "" if key in paths else "of unknown images"
                fault = fault or "without a box" * ("bbox" not in one) or "of crowds" * bool(one.get("iscrowd"))
                yield Detection(one, paths.get(key, ""), one.get("bbox"), 0, name, one.get(f"{own}score"), fault)

    def add(self, record: Any, classes: Classes, classifier: str) -> None:
        if "detection_category_id" in record:
            record |= {"category_id": record.pop("detection_category_id"), "score": record.pop("detection_score", None)}
            if record["score"] is None:
                del record["score"]
        for copy in self._copies.pop(record.get("id"), ()):
            copy.clear()  # `write` leaves it out
        if len(classes) > 1 and "id" not in record:
            record["id"] = next(self._new_id)
        boxes = [record, *(record | {"id": next(self._new_id), "detection_copy_of": record["id"]} for _ in classes[1:])]
        self._document["annotations"] += boxes[1:]
        for one, (label, share) in zip(boxes, classes, strict=False):
            if label not in self._keys:
                self._keys[label] = next(self._new)
                self._categories.append({"id": self._keys[label], "name": label, "supercategory": ""})
                self._document["categories"] = self._categories
            for name, value in (("category_id", self._keys[label]), ("score", share)):
                if name in one:
                    one[f"detection_{name}"] = one[name]
                one[name] = value


class LabelStudio:
    """Rectangles of annotations that were not cancelled; of a task without one those of its last prediction. A path
    /data/local-files/?d=PATH is PATH below Label Studio's document root, /data/upload/PATH upload/PATH below its media.

    A task gets one more prediction, after those of earlier classifiers: these regions with their classes; its score is
    the smallest probability, and that of a region with several classes the smallest of these."""

    def __init__(self, document: Any) -> None:
        self._document, self._added = document, dict[int, dict[str, Any]]()

    def tasks(self) -> Iterator[tuple[Any, str, list[Any]]]:
        """Each with the path of its picture and its annotations that were not cancelled."""
        for task in self._document:
            path = _picture_of_task(task["data"])
            if path.startswith(("/data/upload/", "/data/local-files/?d=")):
                path = unquote(path.removeprefix("/data/").removeprefix("local-files/?d="))
            yield task, path, [one for one in task.get("annotations") or () if not one.get("was_cancelled")]

    def boxes(self, labelled: bool) -> Iterator[Detection]:
        for task, path, drawn in self.tasks():
            predicted = [one for one in task.get("predictions") or () if _is_of_detector(one)]
            for group in drawn or ([] if labelled else predicted[-1:]):
                texts = {one.get("id"): one for one in group["result"] if one["type"] == "labels"}
                for one in group["result"]:
                    if one["type"] in ("rectanglelabels", "rectangle"):
                        value, text = one["value"], texts.get(one.get("id"))
                        labels = value.get("rectanglelabels") or (text["value"]["labels"] if text else [None])
                        if labelled and len(labels) > 1:
                            raise IosrFastError(f"expected one label for a region of {path}, got {abbreviate(labels)}")
                        fault = "with a rotation" if value.get("rotation") or one.get("image_rotation") else ""
                        numbers = [value[name] for name in ("x", "y", "width", "height")]
                        sure = one.get("score", group.get("score"))
                        yield Detection((task, one, text), path, numbers, 0.01, labels[0], sure, fault)

    def add(self, record: Any, classes: Classes, classifier: str) -> None:
        if not classes:
            return
        (task, region, text), share = record, min(share for _, share in classes)
        made = self._added.setdefault(id(task), {"model_version": classifier, "score": share, "result": []})
        if not made["result"]:
            task["predictions"] = [*(task.get("predictions") or ()), made]
        made["score"] = min(made["score"], share)
        for one in (region, text) if text else (region,):
            kept = {name: value for name, value in one.items() if name not in ("origin", "meta")} | {"score": share}
            if one is text or not text:
                kept["type"] = "labels" if text else "rectanglelabels"
                kept["value"] = one["value"] | {kept["type"]: [label for label, _ in classes]}
            made["result"].append(kept)


class DetectorFile:
    """A detector file in memory, of one `format`.

    Raises FileNotFoundError, and IosrFastError for what is no JSON, or another one.
    """

    def __init__(self, file: str | Path) -> None:
        self.file, self.left_out = file, Counter[str]()
        if not os.path.isfile(file):
            raise FileNotFoundError(f"expected a detector file, found no file {file}")
        content = Path(file).read_bytes()
        with self.damages():
            self._document = json.loads(content, parse_float=_number, parse_constant=_number, object_pairs_hook=_object)
            self.format = _format(self._document)

    def boxes(self, selection: Selection, labelled: bool = False) -> Iterator[tuple[Detection, str]]:
        """The boxes that can be classified, those of a picture one after another, and the path and fragment of each
        (images.crop); the others are counted in `left_out`, by reason. Raises IosrFastError for a URL, a picture that
        is not below the root, and an entry that is not as the format has it.
        """
        with self.damages():
            for one in self.format.boxes(labelled):
                reason = one.fault or selection.excludes(one)
                reason = reason or "without a label" * (labelled and not one.name)
                if reason or (box := _box(one)) is None:
                    self.left_out[reason or "of other than four numbers with sides above 0"] += 1
                    continue
                refuse_url(one.path)
                yield one, f"{self.picture(one.path, selection.root)}#{box}"

    def picture(self, path: str, root: str | Path | None) -> str:
        """The place of a picture below `root`: relative to it or, where that leads out of it, to the file."""
        folder = os.path.dirname(self.file)
        root = folder if root is None else root
        for base in (root, folder):
            place = os.path.normpath(os.path.join(base, path))
            if os.path.abspath(place).startswith(os.path.join(os.path.abspath(root), "")):
                return place
        raise IosrFastError(f"expected pictures below {root or '.'}, got {path}: give --root, a folder above them all")

    def add(self, record: Any, classes: Classes, classifier: str) -> None:
        """Give a box its classes. Raises IosrFastError where the document has no place for them."""
        with self.damages():
            self.format.add(record, classes, classifier)

    def write(self, out: Path) -> None:
        """The document with what was added to it."""
        if isinstance(self.format, Coco):
            self._document["annotations"] = [*filter(None, self._document["annotations"])]
        out.write_bytes(json.dumps(self._document).encode())

    @contextmanager
    def damages(self) -> Iterator[None]:
        """Turn what an entry of another shape raises in the block into an IosrFastError that names the file."""
        try:
            yield
        except _DAMAGES as error:
            shape = f"an entry is not as the format has it ({type(error).__name__} {error}); export it again"
            reason = error if isinstance(error, ValueError) else shape
            raise IosrFastError(f"can't read {self.file}: {reason}") from error


_DAMAGES = KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError


def _object_in(document: Any, name: str) -> dict[str, Any]:
    value = document.get(name) or {}
    if not isinstance(value, dict):
        raise IosrFastError(f"expected {name} as an object, got {type(value).__name__}")
    return value


def _picture_of_task(data: Any) -> str:
    """The path in the data of a task: under "image", or the only text, as the name is that of a labelling interface."""
    texts = [value for value in data.values() if isinstance(value, str)]
    if "image" not in data and len(texts) != 1:
        raise IosrFastError(f"expected the picture of a task under image in its data, got {abbreviate(sorted(data))}")
    return str(data.get("image", texts[0] if texts else ""))


def is_detector_file(place: str | Path) -> bool:
    """By its name; the content tells the format."""
    return str(place).lower().endswith(".json")


def read_boxes(file: str | Path, selection: Selection) -> list[tuple[str, str]]:
    """As `list_boxes`, of a file. Raises as DetectorFile does."""
    return list_boxes(DetectorFile(file), selection)


def list_boxes(document: DetectorFile, selection: Selection, labelled: bool = False) -> list[tuple[str, str]]:
    """The boxes of a detector file: the name and the path of each (Detection, DetectorFile.boxes). A warning counts
    those that are left out.

    With `labelled` the name is the category of COCO, the label of a region, or the most likely class of a MegaDetector
    file that is classified. Raises as DetectorFile.boxes does, and IosrFastError without any such box.
    """
    boxes = [(str(one.name).strip(), path) for one, path in document.boxes(selection, labelled)]
    reasons = ", ".join(f"{number} {reason}" for reason, number in document.left_out.most_common())
    if labelled and not boxes:
        none = f"got none ({reasons or 'nothing is annotated'}): classify or label them"
        raise IosrFastError(f"expected labelled boxes or choices in {document.file}, {none}")
    if reasons:
        left_out = document.left_out.total()
        log.warning("%s: left out %d of %d boxes: %s", document.file, left_out, left_out + len(boxes), reasons)
    return boxes


def _is_of_detector(prediction: Any) -> bool:
    """Not an id in its place, nor one that `add` made."""
    return isinstance(prediction, dict) and not str(prediction.get("model_version")).startswith(OURS)


def _format(document: Any) -> MegaDetector | Coco | LabelStudio:
    if isinstance(document, dict) and "images" in document and "annotations" in document:
        return Coco(document)
    if isinstance(document, dict) and "images" in document and "detection_categories" in document:
        return MegaDetector(document)
    if isinstance(document, list) and document and all("data" in task for task in document):
        return LabelStudio(document)
    raise IosrFastError(
        "expected a detector file with images and detection_categories (MegaDetector), images and annotations (COCO; "
        "its results alone name no files), or a list of tasks with data (Label Studio), got another JSON"
    )


def _box(one: Detection) -> Box | None:
    if not isinstance(one.numbers, list) or any(type(value) not in (int, float) for value in one.numbers):
        return None
    try:
        return Box.of([float(value) * (one.unit or 1) for value in one.numbers], relative=one.unit > 0)
    except (IosrFastError, OverflowError):
        return None


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise IosrFastError(f"{text:.20} is no number of JSON, or too large for one")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        raise IosrFastError(f"an object has a name twice among {abbreviate([name for name, _ in pairs])}")
    return made
