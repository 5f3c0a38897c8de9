"""Support images: decoded once, the same key in any order, and copies and unreadable ones named."""

from __future__ import annotations

import io
import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head import support_images
from iosr_fast.head.examples import Examples
from iosr_fast.head.support_images import SupportSettings, encode_images
from iosr_fast.images import pixels, preprocess
from tests.pictures import encode
from tests.store.live_parts import PixelEncoder, pictures, small_classifier, unfitted


def encoded(images: Any, labels: Any) -> Examples:
    found = encode_images(PixelEncoder(), images, SupportSettings(), np.asarray(labels), ["cat", "dog"])
    assert not found.errors and found.unknown is None
    return found.examples


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 17, 3), dtype=np.uint8))


def test_a_support_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(np.random.default_rng(0), 3, 3)
    paths = [str(tmp_path / f"{i}.png") for i in range(10)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    Path(paths[9]).write_bytes(b"no picture")
    decoded: Counter[str] = Counter()  # by any way: there is one that all of them take
    monkeypatch.setattr(preprocess, "opened", lambda file: decoded.update([str(file)]) or pixels.opened(file))
    classifier = unfitted(method="tip-adapter++", skip_bad=True)
    classifier.fit(paths, [*labels, 0], class_names=["a", "b", "c"])
    assert decoded == Counter(paths) and classifier.skipped_ == [paths[9]]
    assert all(classifier.snapshot().examples.pictures)
    decoded.clear()
    Image.fromarray(images[0] // 2).save(paths[9])
    classifier.add_examples("a", paths[9:])
    classifier.predict(paths[:2])
    assert decoded == Counter([paths[9], paths[0], paths[1]])


def test_a_key_depends_on_pixels_alone() -> None:
    """Not on the order of images, nor on whether they come by fit or by add_examples."""
    images, labels = pictures(np.random.default_rng(1), 4, 5)
    names = [f"motif {c}" for c in range(4)]

    def by_picture(order: np.ndarray, late: int = 0) -> dict[bytes, list[bytes]]:
        classifier = unfitted(method="tip-adapter++", thumbnails=8)
        first = order[: len(order) - late]
        classifier.fit(images[first], labels[first], class_names=names)
        for i in order[len(order) - late :]:
            classifier.add_examples(names[labels[i]], encode(images[i]))
        kept = classifier.snapshot().examples
        rows = kept.embeddings.plain, kept.embeddings.adapted
        return {picture: [row[j].tobytes() for row in rows] for j, picture in enumerate(kept.pictures) if picture}

    expected = by_picture(np.arange(20))
    by_shot = np.arange(20).reshape(4, 5).T.ravel()  # an image of each class first
    assert by_picture(by_shot[::-1]) == by_picture(by_shot, late=8) == expected


def test_unreadable_files_are_named_and_nothing_more_is_encoded(tmp_path: Path, monkeypatch: Any) -> None:
    good, text, cut = tmp_path / "good.png", tmp_path / "text.jpg", tmp_path / "cut.png"
    picture(0).save(good)
    text.write_text("this is no image")
    cut.write_bytes(good.read_bytes()[:300])
    examples, _, errors = encode_images(
        PixelEncoder(), [good, text, cut], SupportSettings(), np.arange(3), skip_bad=True
    )
    assert examples.class_ids.tolist() == [0] and [error.where for error in errors] == [str(text), str(cut)]
    monkeypatch.setattr(PixelEncoder, "encode", lambda *_: pytest.fail("an image was encoded"))
    with pytest.raises(ValueError, match=r"2 of 3 images can't be read \(skip_bad, .*leaves .*text.jpg: .*cut"):
        encoded([text, good, cut], [0, 0, 1])
    with pytest.raises(BadImageError, match=r"can't read image .*cut.png"):
        encoded([good, cut], [0, 0])


@pytest.mark.parametrize("bad", [None, b"no picture"])
def test_an_iterator_of_images_is_taken_one_after_another(bad: bytes | None) -> None:
    """As a server needs it, which decodes pictures elsewhere and has no room for many."""
    images, alive, most = pictures(np.random.default_rng(2), 3, 50)[0], set(), 0
    classifier = small_classifier()
    head = classifier.snapshot()

    def one_by_one() -> Iterator[Any]:
        nonlocal most
        for i, one in enumerate(images):
            image = np.array(one)
            alive.add(mark := object())
            weakref.finalize(image, alive.remove, mark)
            most = max(most, len(alive))
            yield image
            if bad is not None and i == 70:
                yield bad

    if bad is None:
        added = []
        for name, given in (("many", one_by_one()), ("the same", images)):
            classifier.add_class(name, given)
            added.append(classifier.snapshot().examples.rows(np.arange(15, 165)))
            classifier.remove_class(name)
        many, same = added
        np.testing.assert_array_equal(many.embeddings.plain, same.embeddings.plain)
        assert many.pictures == same.pictures
    else:
        for call, name in ((classifier.add_examples, "motif 1"), (classifier.add_class, "new")):
            with pytest.raises(BadImageError, match="can't read image number 71") as error:
                call(name, one_by_one())
            assert error.value.position == 71 and classifier.snapshot() is head
    assert most <= 7


def test_one_picture_under_two_labels_is_refused_and_copies_in_a_class_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, out = picture(0), io.BytesIO()
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "again.bmp")
    image.save(out, "TIFF")
    # One picture in every form that an image may come in.
    forms = [tmp_path / "a.png", str(tmp_path / "again.bmp"), out.getvalue(), image, np.asarray(image)]
    for same in forms:
        with pytest.raises(ValueError, match=r"same picture under two: .*a\.png \('cat'\) and .* \('dog'\)") as error:
            encoded([tmp_path / "a.png", picture(1), same], [0, 0, 1])
        assert (str(same) if isinstance(same, str | Path) else "number 2") in str(error.value)
    with pytest.raises(ValueError, match=r"number 4 .* and number 11 \('dog'\); and 2 more"):
        encoded([picture(i % 7) for i in range(14)], np.arange(14) // 7)
    with caplog.at_level(logging.WARNING, "iosr_fast.head.support_images"):
        assert len(encoded([*forms, picture(1)], np.zeros(6, int))) == 6
    assert "4 of 6 pictures are copies of another of their class" in caplog.text and "a.png" in caplog.text
    turned = np.asarray(image).reshape(17, 12, 3)  # the same bytes in another shape are another picture
    assert encoded([image, turned], [0, 1]).class_ids.tolist() == [0, 1]


def test_equal_files_under_two_labels_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, image in (("a.png", picture(0)), ("b.png", picture(1))):
        image.save(tmp_path / name)
    copy = (tmp_path / "a.png").read_bytes()
    for name in ("none.png", "empty.png"):  # what is no picture is said of each, or left out
        (tmp_path / name).touch()
    unreadable = [tmp_path / "none.png", tmp_path / "b.png", str(tmp_path / "empty.png"), tmp_path / "gone.png"]
    settings, names = SupportSettings(), ["cat", "dog"]
    found = encode_images(PixelEncoder(), unreadable, settings, np.array([0, 0, 1, 1]), names, skip_bad=True)
    assert len(found.errors) == 3 and len(found.examples) == 1
    monkeypatch.setattr(support_images, "_prepare_all", lambda *_: pytest.fail("decoded"))
    for same in (copy, bytearray(copy)):
        with pytest.raises(IosrFastError, match=r"same picture under two: .*a\.png \('cat'\) and number 2 \('dog'\)"):
            encoded([tmp_path / "a.png", tmp_path / "b.png", same], [0, 0, 1])
