"""The audit log: the state is made again from it to the last bit, and whatever happened to the file is named."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.classifier import Classifier
from iosr_fast.methods import METHODS
from iosr_fast.store.audit import open_log, read_log
from iosr_fast.store.head_files import fingerprint
from tests import ROOT
from tests.store.live_parts import pictures, small_classifier


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    made, _ = pictures(np.random.default_rng(99), 8, 4)
    return made.reshape(8, 4, *made.shape[1:])


def changes(classifier: Classifier, images: np.ndarray) -> None:
    """One of each kind."""
    classifier.add_class("sixth", images[6, :3])
    classifier.add_examples("motif 2", images[2, :2])
    classifier.rename_class("~1", "first")
    classifier.rename_class("~4", "fourth", keep_text=True)
    classifier.remove_examples(classifier.examples("motif 2")[1:3])
    classifier.remove_class("motif 3")
    classifier.retune()
    classifier.add_class("seventh", images[7, :2])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tip-adapter++", "proker", "gda++", "ape", "tip-x++", "zero-shot"])
def test_the_state_is_made_again_from_the_log(method: str, images: np.ndarray, tmp_path: Path) -> None:
    options = {"method": method, "alpha": None, "beta": None, "views": 3}
    options["reducer"] = "centre" if METHODS[method].needs_support else None
    classifier = small_classifier(**options)
    classifier.open_log(path := tmp_path / "log" / "changes.jsonl")
    changes(classifier, images)
    classifier.close_log()
    again = small_classifier(**options)
    again.open_log(path)
    assert again.version == 9 and again.snapshot().next_class == 7
    assert fingerprint(again.snapshot()) == fingerprint(classifier.snapshot())
    queries = images.reshape(-1, *images.shape[2:])
    np.testing.assert_array_equal(again.decision_function(queries), classifier.decision_function(queries))
    assert again.explain(queries[:4], nearest=3) == classifier.explain(queries[:4], nearest=3)
    assert again.picture("e15") == classifier.picture("e15") is not None
    for one in (again, classifier):  # and it goes on from there
        one.add_examples("seventh", images[7, 2:])
    again.close_log()
    third = small_classifier(**options)
    third.open_log(path)
    assert fingerprint(third.snapshot()) == fingerprint(classifier.snapshot())


def test_lines_can_be_read(images: np.ndarray, tmp_path: Path) -> None:
    classifier = small_classifier()
    classifier.open_log(path := tmp_path / "changes.jsonl")
    base = fingerprint(classifier.snapshot())
    changes(classifier, images)
    first, *lines = read_log(path)
    assert (first["op"], first["base"], first["format"], first["version"]) == ("open", base, 2, 1)
    assert [line["version"] for line in lines] == list(range(2, 10))
    assert [line["op"] for line in lines] == [
        *("add_class", "add_examples", "rename_class", "rename_class"),
        *("remove_examples", "remove_class", "retune", "add_class"),
    ]
    assert (lines[0]["class"], lines[0]["name"], lines[0]["examples"]) == (5, "sixth", [15, 16, 17])
    assert lines[4]["examples"] == [7, 8] and lines[6]["recipe"]["method"] == "tip-adapter++"
    assert all(line["time"].startswith("20") and line["time"].endswith("+00:00") for line in (first, *lines))
    assert path.stat().st_mode & 0o077 == 0


def test_half_a_line_that_was_never_acknowledged_is_dropped(images: np.ndarray, tmp_path: Path, caplog) -> None:
    classifier = small_classifier(thumbnails=0)
    classifier.open_log(path := tmp_path / "changes.jsonl")
    classifier.add_class("sixth", images[6, :1])
    head = tmp_path / "changes.jsonl.head"
    before, whole, proved = fingerprint(classifier.snapshot()), path.read_bytes(), head.read_bytes()
    classifier.remove_class("~0")
    classifier.close_log()
    full = path.read_bytes()
    base = small_classifier(thumbnails=0).snapshot()
    for cut in range(len(whole), len(full), 3):  # a crash before the head was written
        path.write_bytes(full[:cut])
        head.write_bytes(proved)
        log, state = open_log(path, base)
        log.close(state)
        assert fingerprint(state) == before and path.read_bytes() == whole
    assert "ends in half a line, which is dropped" in caplog.text
    path.write_bytes(full)
    head.write_bytes(proved)
    fresh = small_classifier(thumbnails=0)
    fresh.open_log(path)
    assert fingerprint(fresh.snapshot()) == fingerprint(classifier.snapshot())


def test_every_damage_is_named(images: np.ndarray, tmp_path: Path) -> None:
    classifier = small_classifier()
    classifier.open_log(path := tmp_path / "changes.jsonl")
    changes(classifier, images)
    classifier.close_log()
    full = path.read_bytes()
    lines = full.split(b"\n")[:-1]
    rng = np.random.default_rng(0)
    again = small_classifier()
    state = again.snapshot()

    def refused(data: bytes, said: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            again.open_log(path)
        assert again.snapshot() is state and path.read_bytes() == data

    for at in rng.choice(len(full) - 1, 100, replace=False):  # the last byte is a line's end: a cut
        flipped = bytearray(full)
        flipped[at] ^= 1 << int(rng.integers(8))
        refused(bytes(flipped), r"line \d of .* (is damaged|was changed)")
    refused(b"\n".join([*lines[:3], *lines[4:], b""]), "line 4 of .* was changed, or one before it is missing")
    refused(b"\n".join([lines[0], lines[2], lines[1], *lines[3:], b""]), "line 2 of .* was changed")
    path.write_bytes(full)
    with pytest.raises(ValueError, match=r"log of another state: expected one that begins from .*; load the bundle"):
        small_classifier(seed=1).open_log(path)


def test_what_can_not_be_logged_is_not_done(images: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    classifier = small_classifier()
    classifier.open_log(path := tmp_path / "changes.jsonl")
    classifier.add_class("sixth", images[6])
    state, written = classifier.snapshot(), path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("iosr_fast.store.audit.os.fsync", full)
    with pytest.raises(OSError, match=r"the change was not made: it can't be logged \(No space left"):
        classifier.remove_class("~1")
    assert classifier.snapshot() is state and path.read_bytes() == written
    monkeypatch.undo()
    classifier.remove_class("~1")
    classifier.close_log()
    again = small_classifier()
    again.open_log(path)
    assert fingerprint(again.snapshot()) == fingerprint(classifier.snapshot())


def test_one_process_writes_a_log(images: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="locks of files are POSIX's")
    classifier = small_classifier()
    classifier.open_log(path := tmp_path / "changes.jsonl")
    with pytest.raises(ValueError, match=r"expected no log to be open, got .*changes.jsonl; close_log"):
        classifier.open_log(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="it has no line for a fit"):
        classifier.set_params(method="tip-adapter").fit(images[:2, 0], ["a", "b"])
    code = (
        "import sys; from pathlib import Path; from tests.store.live_parts import small_classifier\n"
        "try: small_classifier().open_log(sys.argv[1])\n"
        "except BlockingIOError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert "another process writes this log" in said.stdout, said.stderr


def test_lines_hold_embeddings_without_loss(images: np.ndarray, tmp_path: Path) -> None:
    classifier = small_classifier()
    classifier.open_log(path := tmp_path / "changes.jsonl")
    classifier.add_class("sixth", images[6, :2])
    line = json.loads(path.read_bytes().split(b"\n")[1])
    from iosr_fast.store.changes import Change

    made = Change.from_json(line, 24)
    kept = classifier.snapshot().examples.rows(np.array([15, 16]))
    np.testing.assert_array_equal(made.added.embeddings.adapted, kept.embeddings.adapted)
    assert made.added.pictures == kept.pictures and os.path.getsize(path) < 20_000
    with pytest.raises(ValueError, match="expected an op of add_class"):
        Change.from_json({**line, "op": "eval"}, 24)
