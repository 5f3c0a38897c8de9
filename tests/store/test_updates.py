"""Changes of a classifier in use: what each does, what is refused, and what readers see meanwhile."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head.predictions import predict
from iosr_fast.store.bundle import load
from iosr_fast.store.description import describe
from tests.pictures import encode
from tests.store.live_parts import WIDTH, engine_folder, pictures, small_classifier, unfitted, unit

pytestmark = pytest.mark.slow


@pytest.fixture
def images() -> np.ndarray:
    """Eight motifs, four pictures each; the classifier was fitted on other pictures of the first five."""
    made, _ = pictures(np.random.default_rng(99), 8, 4)
    return made.reshape(8, 4, *made.shape[1:])


def test_a_class_that_is_added_is_predicted_and_explained(images: np.ndarray) -> None:
    classifier = small_classifier()
    assert not set(classifier.predict(images[6])) & {"motif 6"}
    change = classifier.add_class("motif 6", [encode(image) for image in images[6, :3]])
    assert (change.version, change.class_id, change.example_ids) == (2, "~5", ("e15", "e16", "e17"))
    assert classifier.predict(images[6, 3]).tolist() == ["motif 6"] and classifier.version == 2
    assert classifier.predict(images[2]).tolist() == ["motif 2"] * 4
    shown = classifier.explain(images[6, 3], top=3, nearest=2)[0]
    assert (shown.label, shown.class_id, shown.version, len(shown.top)) == ("motif 6", "~5", 2, 3)
    assert {near.class_id for near in shown.nearest} == {"~5"}
    picture = Image.open(io.BytesIO(classifier.picture(shown.nearest[0].example_id)))
    assert picture.format == "WEBP" and picture.size == (8, 8)
    classifier.remove_class("motif 6")
    assert "motif 6" not in classifier.classes_ and classifier.add_class("motif 7", images[7]).class_id == "~6"
    classifier.rename_class("~3", "third", keep_text=True)
    assert classifier.add_examples("third", images[3, :2]).class_id == "~3"
    assert classifier.examples("~3") == ["e9", "e10", "e11", "e22", "e23"]
    assert classifier.remove_examples(["e10", "e23"]).example_ids == ("e10", "e23")


def test_a_change_that_is_refused_changes_nothing(images: np.ndarray) -> None:
    classifier = small_classifier()
    head, new, bad = classifier.snapshot(), images[5], [images[5, 0], b"no picture"]
    masked = np.ma.masked_array(np.ones(WIDTH), mask=True)
    for message, call in {
        "expected class names to differ, got 'motif 1' more": lambda: classifier.add_class("motif 1", new),
        "got '~9', which is how ids of classes look": lambda: classifier.add_class("~9", new),
        "expected at least one image of 'new', got none": lambda: classifier.add_class("new", []),
        "can't read image number 1: it is not an image": lambda: classifier.add_class("new", bad),
        r"text embedding of shape \(24,\), got \(3,\)": lambda: classifier.add_class("new", new, text=[1, 0, 0]),
        "expected text rows of unit norm": lambda: classifier.add_class("new", new, text=np.ones(WIDTH)),
        "text without masked values": lambda: classifier.add_class("new", new, text=masked),
        "no class 'unknown'; there are 'motif 0'": lambda: classifier.add_examples("unknown", new),
        "at least one image to add to '~1', got none": lambda: classifier.add_examples("~1", []),
        "no class '~7'": lambda: classifier.remove_class("~7"),
        "each once, got 'e77', 'x'": lambda: classifier.remove_examples(["e1", "e77", "x"]),
        "each once, got 'e1', 'e1'": lambda: classifier.remove_examples(["e1", "e1"]),
        "each once, got 'e99'": lambda: classifier.picture("e99"),
        "got 'motif 2' and 'Motif 2', which differ in case": lambda: classifier.rename_class("~1", "Motif 2"),
        "got 'motif 1' and 'MOTIF 1', which differ in case": lambda: classifier.add_class("MOTIF 1", new),
        "got 'motif 2' more than once": lambda: classifier.rename_class("~1", "motif 2"),
        "got 'a.u202eb', which has invisible": lambda: classifier.rename_class("~1", "a\u202eb"),
        "keep_text, or text or descriptions .* got both": lambda: classifier.rename_class(
            "~1", "x", text=np.ones(3), keep_text=True
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(BadImageError):
        classifier.add_examples("~1", bad)
    assert classifier.snapshot() is head
    for _ in range(3):
        classifier.remove_class(classifier.classes()[0].class_id)
    with pytest.raises(ValueError, match="at least two classes to tell apart: '~3' can't be removed"):
        classifier.remove_class("~3")
    classifier._fit = replace(classifier._fit, clip=replace(classifier._fit.clip, text=None))
    with pytest.raises(ValueError, match="no text encoder to embed 'new' with: give text="):
        classifier.add_class("new", new)
    assert classifier.add_class("new", new, text=unit(np.ones(WIDTH))).class_id == "~5"


def test_a_picture_that_another_class_has_is_refused_as_by_fit(images: np.ndarray) -> None:
    support, labels = pictures(np.random.default_rng(0), 2, 3)
    unknown = images[6]
    classifier = unfitted(method="gda").fit(support, labels, ["cat", "dog"], unknown_images=unknown)
    head = classifier.snapshot()
    for message, image in ((r"'cat' \(~0\) has as 'e2'", support[2]), ("is an unknown image", unknown[3])):
        with pytest.raises(IosrFastError, match=f"got image number 1, which {message}"):
            classifier.add_examples("dog", [images[5, 0], image, images[5, 1]])
        with pytest.raises(IosrFastError, match=f"got image number 0, which {message}"):
            classifier.add_class("new", [image])
    assert classifier.snapshot() is head
    classifier.add_examples("cat", support[2])  # a copy within its class
    classifier.remove_examples(["e2", "e6"])
    assert classifier.add_examples("dog", support[2]).example_ids == ("e7",)


def test_images_added_to_a_classifier_of_means_of_views_are_as_they_are(images: np.ndarray) -> None:
    """Earlier versions averaged random views of an image into its key, and kept the image as it is beside it."""
    classifier = small_classifier()
    fit = classifier._fit
    kept = fit.head.examples
    means = replace(kept, embeddings=kept.embeddings[::-1], queries=kept.embeddings)
    classifier._fit = replace(fit, head=replace(fit.head, examples=means).compiled())
    with pytest.raises(IosrFastError, match=r"which 'motif 0' \(~0\) has as 'e1'"):
        classifier.add_examples("motif 1", pictures(np.random.default_rng(0), 5, 3)[0][1:2])
    classifier.add_examples("motif 4", images[4, :2])
    now = classifier.snapshot().examples
    np.testing.assert_array_equal(now.embeddings.plain[:15], kept.embeddings.plain[::-1])
    np.testing.assert_array_equal(now.queries.plain[:15], kept.embeddings.plain)
    np.testing.assert_array_equal(now.queries.adapted[15:], now.embeddings.adapted[15:])


def test_classes_by_name_alone(images: np.ndarray) -> None:
    classifier = small_classifier(method="zero-shot", alpha=None, beta=None)
    assert classifier.add_class("motif 9").example_ids == ()
    classifier.add_examples("motif 9", images[5])
    assert classifier.classes()[-1].examples == 4
    classifier.remove_examples(classifier.examples("motif 9"))
    assert classifier.decision_function(images[0]).shape == (4, 6)
    alone = unfitted(method="zero-shot").fit(class_names=["one", "two"])
    with pytest.raises(IosrFastError, match=r"expected support images or validation images .* got none"):
        alone.retune()
    with pytest.raises(IosrFastError, match="expected at least one validation image, got none"):
        alone.tune([], [])
    with pytest.raises(IosrFastError, match="validation images and their labels together"):
        alone.tune(images[0])
    alone.add_examples("one", images[0])
    assert alone.classes()[0].examples == 4


def test_the_choice_of_parameters_is_of_its_version_and_kept_in_bundle_and_log(
    images: np.ndarray, tmp_path: Path
) -> None:
    engine = engine_folder(tmp_path / "engine")
    classifier = small_classifier(engine, reducer="centre")
    assert classifier.tuned_ is None and "15 left-out support images right" in classifier.snapshot().summary()
    classifier.save(tmp_path / "before")
    assert load(tmp_path / "before").head.config.evidence is None
    before = classifier.snapshot().reducer
    classifier.open_log(tmp_path / "log.jsonl")
    assert classifier.retune().version == classifier.tuned_.version == 2 and classifier.tuned_.scored == 15
    assert classifier.reducer_ == "centre" and set(classifier.parameters_) == {"alpha", "beta"}
    classifier.add_class("motif 6", images[6])
    assert classifier.tuned_.stale
    tuned = classifier.tune(method="gda").evidence
    assert classifier.method_ == "gda" and tuned.scored == 19 and (tuned.version, tuned.stale) == (4, False)
    assert classifier.score(images[6], ["motif 6"] * 4) == 1.0
    classifier.add_examples("motif 6", images[5, :1])
    assert classifier.tuned_.stale and classifier.tuned_.accuracy == tuned.accuracy
    classifier.save(tmp_path / "after")
    assert repr(load(tmp_path / "after").head.config.evidence) == repr(tuned)
    assert classifier.snapshot().summary() in describe(tmp_path / "after")
    classifier.close_log()
    again = small_classifier(engine, reducer="centre")
    assert np.array_equal(again.snapshot().reducer.shift, before.shift)
    again.open_log(tmp_path / "log.jsonl")
    assert repr(again.tuned_) == repr(classifier.tuned_) and again.tuned_.stale
    again.close_log()


def test_readers_see_whole_versions_while_classes_change(images: np.ndarray) -> None:
    """Every answer equals, to the last bit, that of the version that it names."""
    classifier = small_classifier()
    heads, seen, stop, failures = {1: classifier.snapshot()}, [], threading.Event(), []
    queries = classifier.encoder.encode(images[:, 3])

    def read() -> None:
        try:
            while not stop.is_set():
                head = classifier.snapshot()
                assert head.computed("plan") is not None, "a reader would have to compile the plan"
                seen.append(predict(head, queries, top=3, nearest=2))
                classifier.predict(images[0])
        except Exception as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(40):
        classifier.add_class(f"late {i}", images[5 + i % 3, :2] ^ i)
        heads[classifier.version] = classifier.snapshot()
        if i % 2:
            classifier.remove_class(f"late {i - 1}")
            heads[classifier.version] = classifier.snapshot()
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures and len(heads) == 61
    for predictions in seen:
        (version,) = {made.version for made in predictions}
        assert predictions == predict(heads[version], queries, top=3, nearest=2)


def test_changes_from_many_threads_all_happen(images: np.ndarray) -> None:
    classifier = small_classifier()

    def write(thread: int) -> None:
        for i in range(5):
            classifier.add_class(f"{thread} {i}", images[thread, :1] ^ i)
            classifier.add_examples(f"{thread} {i}", images[thread, 1:3] ^ i)

    writers = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert classifier.version == 41 and len(classifier.classes()) == 25
    assert sorted(classifier.snapshot().examples.ids) == list(range(15 + 60))
