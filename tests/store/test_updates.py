"""Classes and examples in and out of a classifier that is in use: what is refused, what stays, what readers see."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import BadImageError, IosrFastError
from iosr_fast.head.predictions import predict
from iosr_fast.store.bundle import load_bundle
from iosr_fast.store.description import describe
from tests.pictures import encode
from tests.store.live_parts import WIDTH, PixelEncoder, engine_folder, pictures, small_classifier, unfitted, unit

pytestmark = pytest.mark.slow


@pytest.fixture
def images() -> np.ndarray:
    """Eight motifs, four pictures each; the classifier was fitted on other pictures of the first five."""
    made, _ = pictures(np.random.default_rng(99), 8, 4)
    return made.reshape(8, 4, *made.shape[1:])


def test_a_class_that_comes_later_is_told_apart(images: np.ndarray) -> None:
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


def test_ids_stay(images: np.ndarray) -> None:
    classifier = small_classifier()
    classifier.remove_class("motif 1")
    classifier.rename_class("~3", "third", keep_text=True)
    change = classifier.add_examples("third", images[3, :2])
    assert change.class_id == "~3" and classifier.examples("~3") == ["e9", "e10", "e11", "e15", "e16"]
    assert [(info.class_id, info.name, info.examples) for info in classifier.classes()] == [
        ("~0", "motif 0", 3),
        ("~2", "motif 2", 3),
        ("~3", "third", 5),
        ("~4", "motif 4", 3),
    ]
    assert classifier.remove_examples(["e10", "e16"]).example_ids == ("e10", "e16")
    assert classifier.examples("third") == ["e9", "e11", "e15"]
    assert classifier.predict(images[3]).tolist() == ["third"] * 4


def test_a_name_is_what_the_text_says() -> None:
    classifier = small_classifier(templates=["the {}"])
    text = classifier._fit.clip.text
    assert text is not None
    classifier.rename_class("motif 0", "zero")
    np.testing.assert_array_equal(classifier.support_.text[0], text.embed_classes(["zero"], ["the {}"])[0])
    classifier.rename_class("zero", "nought", keep_text=True)
    np.testing.assert_array_equal(classifier.support_.text[0], text.embed_classes(["zero"], ["the {}"])[0])
    own = unit(np.arange(1.0, WIDTH + 1))
    classifier.rename_class("nought", "motif 0", text=own)
    np.testing.assert_array_equal(classifier.support_.text[0], own)


@pytest.mark.parametrize("views", [1, 4])
def test_the_same_image_makes_the_same_key_whenever_it_comes(images: np.ndarray, views: int) -> None:
    one, other = (small_classifier(views=views, tune="loo", alpha=None, beta=None) for _ in range(2))
    one.add_examples("motif 1", images[1, :1])
    one.add_examples("motif 2", images[2, :1])
    other.add_examples("motif 2", encode(images[2, 0]))
    kept, late = one.snapshot().examples, other.snapshot().examples
    assert (kept.queries is not None) == (late.queries is not None) == (views > 1)
    for rows in ("embeddings", "queries"):
        if getattr(kept, rows) is not None:
            first = getattr(kept, rows).adapted[kept.ids == 16]
            np.testing.assert_array_equal(first, getattr(late, rows).adapted[late.ids == 15])


def test_what_can_not_be_done_changes_nothing(images: np.ndarray) -> None:
    classifier = small_classifier()
    head = classifier.snapshot()
    bad = [images[5, 0], b"no picture"]
    for said, call in {
        "expected class names to differ, got 'motif 1' more than once": lambda: classifier.add_class(
            "motif 1", images[5]
        ),
        "expected class names, got '  ', which is blank": lambda: classifier.add_class("  ", images[5]),
        "got '~9', which is how ids of classes look": lambda: classifier.add_class("~9", images[5]),
        "expected at least one image of 'new', got none": lambda: classifier.add_class("new", []),
        "can't read image number 1: it is not an image": lambda: classifier.add_class("new", bad),
        r"text embedding of shape \(24,\), got \(3,\)": lambda: classifier.add_class("new", images[5], text=[1, 0, 0]),
        "expected text rows of unit norm": lambda: classifier.add_class("new", images[5], text=np.ones(WIDTH)),
        "no class 'unknown'; there are 'motif 0'": lambda: classifier.add_examples("unknown", images[5]),
        "no class '~7'": lambda: classifier.remove_class("~7"),
        "at least one image to add to '~1', got none": lambda: classifier.add_examples("~1", []),
        "ids of examples that are there, each once, got 'e77', 'x'": lambda: classifier.remove_examples(
            ["e1", "e77", "x"]
        ),
        "each once, got 'e1', 'e1'": lambda: classifier.remove_examples(["e1", "e1"]),
        "each once, got 'e99'": lambda: classifier.picture("e99"),
        "got 'motif 2' more than once": lambda: classifier.rename_class("~1", "motif 2"),
        "look alike: 'motif 2' and 'm.u043etif 2'": lambda: classifier.add_class("m\u043etif 2", images[5]),
        "got 'a.u202eb', which has invisible characters": lambda: classifier.rename_class("~1", "a\u202eb"),
        "text without masked values": lambda: classifier.add_class(
            "new", images[5], text=np.ma.masked_array(np.ones(WIDTH), mask=True)
        ),
        "text or keep_text, got both": lambda: classifier.rename_class("~1", "x", text=np.ones(3), keep_text=True),
    }.items():
        with pytest.raises(ValueError, match=said):
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
        classifier.add_class("new", images[5])
    assert classifier.add_class("new", images[5], text=unit(np.ones(WIDTH))).class_id == "~5"
    with pytest.raises(ValueError, match="not fitted yet"):
        type(classifier)(PixelEncoder(), Path("none")).add_class("new", images[5])


def test_classes_by_name_alone(images: np.ndarray) -> None:
    classifier = small_classifier(method="zero-shot", alpha=None, beta=None)
    assert classifier.add_class("motif 9").example_ids == ()
    classifier.add_examples("motif 9", images[5])
    assert classifier.classes()[-1].examples == 4
    alone = unfitted(method="zero-shot").fit(class_names=["one", "two"])
    with pytest.raises(IosrFastError, match=r"expected support images or validation images .* got none"):
        alone.retune()
    with pytest.raises(IosrFastError, match="expected at least one validation image, got none"):
        alone.tune([], [])
    assert "no support image can be left out" in str(alone.calibration())
    classifier.remove_examples(classifier.examples("motif 9"))
    assert classifier.decision_function(images[0]).shape == (4, 6)


def test_retune_and_tune_begin_from_what_is_there_now(images: np.ndarray) -> None:
    classifier = small_classifier(reducer="centre")
    before = classifier.snapshot().config.reducer
    classifier.add_class("motif 6", images[6])
    assert classifier.snapshot().config.reducer is before
    change = classifier.retune()
    assert change.version == classifier.version == 3 and classifier.tuned_.scored == 19
    assert not np.array_equal(classifier.snapshot().config.reducer.shift, before.shift)
    assert classifier.reducer_ == "centre" and classifier.parameters_ == classifier.tuned_.parameters
    tuned = classifier.tune(method="gda")
    assert classifier.method_ == tuned.method == "gda" and classifier.version == 4
    assert classifier.score(images[6], ["motif 6"] * 4) == 1.0


def test_evidence_is_stale_after_a_change_and_survives_a_bundle_and_a_log(images: np.ndarray, tmp_path: Path) -> None:
    engine = engine_folder(tmp_path / "engine")
    classifier = small_classifier(engine)
    assert classifier.tuned_ is None
    classifier.save(tmp_path / "before")
    assert load_bundle(tmp_path / "before").head.config.tuned is None
    assert "tuned" not in json.loads((tmp_path / "before" / "manifest.json").read_bytes())
    classifier.open_log(tmp_path / "log.jsonl")
    tuned = classifier.tune(method="gda")
    assert classifier.tuned_ is tuned and (tuned.version, tuned.stale) == (2, False)
    classifier.add_class("motif 6", images[6])
    assert classifier.tuned_.stale and classifier.tuned_.accuracy == tuned.accuracy
    classifier.save(tmp_path / "after")
    loaded = load_bundle(tmp_path / "after").head.config.tuned
    assert repr(loaded) == repr(tuned) and loaded.right is None
    line = classifier.snapshot().summary()
    assert line in describe(tmp_path / "after").splitlines() and "version 2; the classifier has changed" in line
    classifier.close_log()
    again = small_classifier(engine)
    again.open_log(tmp_path / "log.jsonl")
    assert repr(again.tuned_) == repr(classifier.tuned_) and again.tuned_.stale
    again.retune()
    assert not again.tuned_.stale and again.tuned_.version == again.version == 4
    again.close_log()


def test_no_reader_sees_half_a_change(images: np.ndarray) -> None:
    """Readers classify while classes come and go: what each was told is what its version says, to the last bit."""
    classifier = small_classifier()
    states, told, stop, failures = {1: classifier.snapshot()}, [], threading.Event(), []
    queries = classifier.encoder.encode(images[:, 3])

    def read() -> None:
        try:
            while not stop.is_set():
                told.append(predict(classifier.snapshot(), queries, top=3, nearest=2))
                classifier.predict(images[0])
        except Exception as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(40):
        classifier.add_class(f"late {i}", images[5 + i % 3, :2])
        states[classifier.version] = classifier.snapshot()
        if i % 2:
            classifier.remove_class(f"late {i - 1}")
            states[classifier.version] = classifier.snapshot()
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures and len(states) == 61
    versions = {made.version for predictions in told for made in predictions}
    assert len(versions) > 5
    expected = {version: predict(states[version], queries, top=3, nearest=2) for version in versions}
    for predictions in told:
        assert len({made.version for made in predictions}) == 1
        assert predictions == expected[predictions[0].version]


def test_embeddings_of_a_gpu_encoder_are_scored_where_they_are(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that gives tensors, on the CPU in place of a GPU: a plan in one piece, and one in several."""
    torch = pytest.importorskip("torch")
    classifier, pixels, given = small_classifier(method="tip-adapter++", alpha=1.0, beta=5.0), images[:5, 3], []
    encoder = classifier.encoder
    for change in (
        lambda: None,
        lambda: classifier.add_class("motif 6", images[6]),
        lambda: classifier.remove_class("motif 1"),
    ):
        change()
        expected = classifier.explain(pixels, top=2, nearest=1)
        rows = encoder.encode(pixels)
        tensors = Embeddings(torch.from_numpy(rows.plain), torch.from_numpy(rows.adapted))
        head = classifier.snapshot()
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "encode_on_device", lambda _, rows=tensors: given.append(1) or rows)
            assert isinstance(head.score(tensors), np.ndarray)
            np.testing.assert_array_equal(head.score(tensors), head.score(rows))
            assert classifier.explain(pixels, top=2, nearest=1) == expected and given
            np.testing.assert_array_equal(classifier.predict_proba(pixels).argmax(1), head.score(rows).argmax(1))
        given.clear()


def test_changes_from_many_threads_all_happen(images: np.ndarray) -> None:
    classifier = small_classifier()

    def write(thread: int) -> None:
        for i in range(5):
            classifier.add_class(f"{thread} {i}", images[thread, :1])
            classifier.add_examples(f"{thread} {i}", images[thread, 1:3])

    writers = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert classifier.version == 41 and len(classifier.classes()) == 25
    ids = [number for info in classifier.classes() for number in classifier.examples(info.class_id)]
    assert sorted(ids, key=lambda e: int(e[1:])) == [f"e{i}" for i in range(15 + 60)]


def test_scoring_takes_no_lock(images: np.ndarray) -> None:
    """Who holds the writers' lock for ever does not keep anybody from classifying."""
    classifier = small_classifier()
    with classifier._store.lock:
        answered: list[np.ndarray] = []
        reader = threading.Thread(target=lambda: answered.append(classifier.predict(images[2])))
        reader.start()
        reader.join(30)
    assert len(answered) == 1 and answered[0].tolist() == ["motif 2"] * 4


def test_embeddings_of_queries_without_an_adapter() -> None:
    classifier = small_classifier(method="tip-adapter")
    head = classifier.snapshot()
    plain = Embeddings(head.support.embeddings.plain[:2])
    assert [made.label for made in predict(head, plain, nearest=1)] == ["motif 0", "motif 0"]
