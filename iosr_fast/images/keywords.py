"""The keywords of pictures, as photo libraries write them: `dc:subject` of XMP, in the picture or in a file beside it.

Lightroom and Apple Photos write IMG_1.xmp beside IMG_1.jpg, darktable and digiKam IMG_1.jpg.xmp. Such a file, the one
with the longer name first, is newer than the picture, whose own keywords count where it has no dc:subject.

XML is read by expat, piece by piece. A DOCTYPE is refused: without it there are no entities to expand or to fetch.
"""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import BinaryIO
from xml.parsers import expat

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.images.listing import list_images
from iosr_fast.images.pixels import opened
from iosr_fast.images.preprocess import naming

log = logging.getLogger(__name__)
TAGGED, ALL = KINDS = "tagged", "all"
_SUBJECT, _ITEM = "http://purl.org/dc/elements/1.1/ subject", "http://www.w3.org/1999/02/22-rdf-syntax-ns# li"


def list_keywords(folder: str | Path, kind: str, skip_bad: bool = False) -> list[tuple[Path, frozenset[str]]]:
    """The images in a folder and all below it, each with its keywords: those that have some (TAGGED), or ALL. A warning
    counts what is left out, and XMP files without an image.

    Raises BadImageError for damaged XMP, with `skip_bad` a warning; IosrFastError where no image has keywords; and as
    `list_images` does.
    """
    listing = list_images(folder, warn=False)
    listed, used, skipped = list[tuple[Path, frozenset[str]]](), set[str](), listing.skipped
    for i, path in enumerate(listing.paths):
        used.update(beside := _beside(path))
        try:
            words = _keywords_of(Path(path), i, beside)
        except BadImageError as error:
            if not skip_bad:
                raise
            log.warning("left out: %s", error)
            skipped.reasons["unreadable"] += 1
            continue
        if words or kind == ALL:
            listed.append((Path(path), words))
        else:
            skipped.reasons["without keywords"] += 1
    if alone := skipped.suffixes.pop(".xmp", 0) - len(used):
        skipped.reasons[".xmp without an image"] = alone
    if not any(words for _, words in listed):
        raise IosrFastError(
            f"expected keywords (dc:subject of XMP) in images of {folder} or in .xmp files beside them, found none in "
            f"{len(listing.paths)} images: have the photo library write its keywords to the files"
        )
    skipped.warn(folder, len(listed))
    return listed


def read_subjects(xmp: BinaryIO) -> frozenset[str] | None:
    """The keywords in XMP, without blanks around them; None where it has no dc:subject. Raises IosrFastError for
    damaged XML, a DOCTYPE, and a dc:subject that is no list.

    >>> read_subjects(io.BytesIO(b'''<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><r:Description>
    ...     <subject xmlns="http://purl.org/dc/elements/1.1/"><r:Bag><r:li>cat</r:li></r:Bag></subject>
    ... </r:Description></r:RDF>'''))
    frozenset({'cat'})
    """
    found: set[str] | None = None
    inside, texts = list[str](), list[str]()  # the elements from dc:subject down to this one, and the texts in it

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal found
        if _SUBJECT in attributes:
            raise _no_list(attributes[_SUBJECT])
        if inside or name == _SUBJECT:
            inside.append(name)
            found = found or set()
        if name == _ITEM:
            texts.clear()

    def end(name: str) -> None:
        text = "".join(texts).strip()
        if inside and name == _ITEM and found is not None:
            found.update({text} - {""})
            texts.clear()
        if inside and inside.pop() == _SUBJECT and text:
            raise _no_list(text)

    def data(text: str) -> None:
        if inside:
            texts.append(text)

    def doctype(*_: object) -> None:
        raise IosrFastError("expected XMP without a DOCTYPE")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, data
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.ParseFile(xmp)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise IosrFastError(f"its XMP is damaged: {error}") from error
    return None if found is None else frozenset(found)


def _no_list(text: str) -> IosrFastError:
    return IosrFastError(f"expected a list of keywords (rdf:li) in dc:subject of XMP, got {text!r:.80}")


def _keywords_of(path: Path, position: int, beside: list[str]) -> frozenset[str]:
    """Of an image, with the XMP files beside it. Raises BadImageError."""
    with naming(path, position):
        for name in beside:
            try:
                with open(name, "rb") as file:
                    found = read_subjects(file)
            except (IosrFastError, OSError) as error:
                raise IosrFastError(f"{name} beside it: {error}") from error
            if found is not None:
                return found
        with opened(path) as image:
            if image.format == "PNG" and "xmp" not in image.info:
                image.load()  # ExifTool writes it behind the pixels
            packet = image.info.get("xmp") or b""
        packet = packet.strip(b"\0 \t\r\n")
        return read_subjects(io.BytesIO(packet)) or frozenset() if packet else frozenset()


def _beside(path: str) -> list[str]:
    """The XMP files of an image."""
    found = (
        next(filter(os.path.isfile, (f"{stem}.xmp", f"{stem}.XMP")), "") for stem in (path, os.path.splitext(path)[0])
    )
    return [*filter(None, found)]
