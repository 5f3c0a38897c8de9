"""Keywords of photo libraries, XMP in pictures and in files beside them, are labels."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head.labelled_images import labelled_images
from iosr_fast.images.keywords import read_subjects
from tests.cli.runs import done, refused
from tests.files.runs import load_images
from tests.pictures import encode

GREY = np.full((8, 8, 3), 128, np.uint8)
FRAME = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:lr="http://ns.adobe.com/lightroom/1.0/"{}
<lr:hierarchicalSubject><rdf:Bag><rdf:li>animal|cat</rdf:li></rdf:Bag></lr:hierarchicalSubject>
<dc:creator><rdf:Seq><rdf:li>A. Nother</rdf:li></rdf:Seq></dc:creator>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>{}"""


def xmp(*words: str) -> bytes:
    items = "".join(f"\n  <rdf:li>{word}</rdf:li>" for word in words)
    return FRAME.format(f"><dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>", " " * 2000 + "\n").encode()


def picture(kind: str, *words: str) -> bytes:
    packet = xmp(*words)
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        return encode(GREY, kind, pnginfo=info)
    return encode(GREY, kind, **({"tiffinfo": {700: packet}} if kind == "TIFF" else {"xmp": packet}))


def late_png(*words: str) -> bytes:
    """With its XMP behind the pixels."""
    data = picture("PNG", *words)
    start = data.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    return data[:start] + data[end:-12] + data[start:end] + data[-12:]


def place(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def labels_of(folder: Path, kind: str = "tagged", **options: Any) -> dict[str, Any]:
    found = labelled_images(folder, keywords=kind, **options)
    names = (path.relative_to(folder).as_posix() for path in found.paths)
    return dict(zip(names, found.labels, strict=True))


def test_keywords_of_every_kind_of_picture_are_its_labels(tmp_path: Path) -> None:
    kinds = "JPEG", "PNG", "TIFF", "WEBP"
    files = {f"{kind}.{kind}": picture(kind, kind, " K&#246;ln &amp; Bonn\n") for kind in kinds}
    padded = {f"{i}.jpg": encode(GREY, "JPEG", xmp=packet) for i, packet in enumerate((xmp("cat") + b"\0", b" \n\0"))}
    place(tmp_path, files | padded | {"late.png": late_png("late")})
    labels = {name: {name.partition(".")[0], "Köln & Bonn"} for name in files}
    assert labels_of(tmp_path) == labels | {"0.jpg": {"cat"}, "late.png": {"late"}}


def test_a_file_beside_a_picture_is_newer_than_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own, none, bare = picture("JPEG", "own"), encode(GREY), FRAME.format(">", "").encode()
    files = {"a/1.jpg": own, "a/1.xmp": xmp("lightroom"), "a/2.jpg": own, "a/2.jpg.xmp": xmp("darktable")}
    files |= {"a/2.XMP": xmp("older"), "3.jpg": own, "3.xmp": bare, "4.png": none, "4.png.XMP": xmp("beside")}
    files |= {
        "5.jpg": own,
        "5.xmp": xmp(),
        "6.png": none,
        "raw.xmp": xmp("raw"),
        "2_01.jpg.xmp": xmp("copy"),
        "7.txt": b"",
    }
    place(tmp_path, files)
    tagged = {"3.jpg": {"own"}, "4.png": {"beside"}, "a/1.jpg": {"lightroom"}, "a/2.jpg": {"darktable"}}
    assert labels_of(tmp_path) == tagged
    said = "skipped 5 of 9 files: 1 not images (.txt), 2 .xmp without an image, 2 without keywords"
    assert caplog.messages == [f"{tmp_path}: {said}"]
    assert labels_of(tmp_path, "all") == tagged | {"5.jpg": set(), "6.png": set()}
    (tmp_path / "fixed.csv").write_text("path,labels\n3.jpg,own;more\n3.jpg,most\n")
    assert labelled_images(tmp_path, tmp_path / "fixed.csv", keywords="tagged").labels[0] == {"own", "more", "most"}


BOMB = b'<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;&b;">]><a>&c;</a>'


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (xmp("cat")[:-2030], "its XMP is damaged: "),
        (xmp("&cat;"), "undefined entity"),
        (BOMB, "expected XMP without a DOCTYPE"),
        (b'<?xml version="1.0" encoding="klingon"?><a/>', "unknown encoding"),
        (b"\xff\xd8", "its XMP is damaged"),
        (xmp().replace(b"<rdf:Bag></rdf:Bag>", b"cat, dog"), "a list of keywords .* got 'cat, dog'"),
        (FRAME.format(' dc:subject="cat">', "").encode(), "a list of keywords .* got 'cat'"),
    ],
)
def test_damaged_xmp_is_named_and_may_be_left_out(
    damaged: bytes, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inside = encode(GREY, "JPEG", xmp=damaged)
    for files in ({"2.jpg": inside}, {"2.jpg": inside, "2.xmp": damaged}):
        place(tmp_path, {"1.jpg": picture("JPEG", "cat")} | files)
        with pytest.raises(BadImageError, match=rf"can't read image {tmp_path}/2\.jpg: .*{words}") as caught:
            labels_of(tmp_path)
        assert (f"{tmp_path}/2.xmp beside it: " in str(caught.value)) == (len(files) > 1)
        assert labels_of(tmp_path, skip_bad=True) == {"1.jpg": {"cat"}} and "left out: can't read" in caplog.text


@given(st.binary(max_size=60), st.integers(0, 900), st.integers(0, 80))
@example(b"\0", 0, 0)
def test_any_bytes_are_keywords_or_an_error_in_words(noise: bytes, at: int, over: int) -> None:
    good = xmp("cat", "dog")
    for data in (noise, good[:at] + noise + good[at + over :]):
        try:
            found = read_subjects(io.BytesIO(data))
        except IosrFastError as error:
            assert "its XMP is damaged: " in str(error)
        else:
            assert found is None or all(word == word.strip() != "" for word in found)


def test_no_entity_is_ever_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expat itself would expand them; the parser stops before the first."""
    parser, seen = expat.ParserCreate(namespace_separator=" "), list[Any]()
    parser.EntityDeclHandler = lambda *entity: seen.append(entity)
    monkeypatch.setattr(expat, "ParserCreate", lambda **_: parser)
    with pytest.raises(IosrFastError, match="DOCTYPE"):
        read_subjects(io.BytesIO(BOMB))
    assert seen == []


def test_what_has_no_keywords_is_refused(tmp_path: Path) -> None:
    folder = place(tmp_path, {"photos/a/1.png": encode(GREY), "a.csv": b"path,label\n1.png,a\n"})
    with pytest.raises(IosrFastError, match=r"expected keywords .* found none in 1 images"):
        labels_of(folder / "photos", "all")
    for options in ({"keywords": "some"}, {"keywords": "all", "nested": True}):
        with pytest.raises(IosrFastError, match=r"expected keywords \(--keywords\) tagged or all, of a folder"):
            labelled_images(folder / "photos", **options)
    with pytest.raises(IosrFastError, match="of a folder that is not nested, got 'all'"):
        labelled_images(folder / "a.csv", keywords="all")


@pytest.mark.slow
def test_a_photo_library_is_fitted_and_a_promise_rests_on_another(tmp_path: Path, demo_cache: Path) -> None:
    """Keywords that are no classes are no labels of the second."""
    for part in ("first", "second"):
        for i in range(100):
            words = xmp(f"motif {i // 20}", *["odd"] * (i % 2), *["holiday"] * (part == "second"))
            picked = 2 * i + (part == "second")
            place(tmp_path / part, {f"{i}.png": encode(Image.fromarray(load_images()[picked])), f"{i}.xmp": words})
    out, photos = tmp_path / "out", tmp_path / "first"
    calibrated = "--calibrate-on", tmp_path / "second", "--keywords", "tagged"
    said = done("fit", photos, "--model", "demo", "--out", out, *calibrated)
    assert "several labels a picture" in said and "6 classes, 100 images" in said
    shutil.rmtree(out)
    place(photos, {"0.xmp": b"<a"})
    said = refused("fit", photos, "--model", "demo", "--out", out, *calibrated)
    assert "0.png" in said and "--skip-bad" in said
