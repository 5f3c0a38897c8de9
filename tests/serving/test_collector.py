"""Uploads that need a look are kept for labelling: which ones, how many, and what somebody has labelled stays."""

from __future__ import annotations

import csv
import errno
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.backbones.demo.pictures import load_pictures
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.source import read_source
from iosr_fast.head.labelled_images import labelled_images
from iosr_fast.serving.batching.decoder import grey_png
from iosr_fast.serving.collector import Collector
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.kept_folder import LABELS, SECRET, STATE
from iosr_fast.serving.limits import Limits
from tests.pictures import encode
from tests.serving.http_client import AUTHORISED, Client, form, load, probe_soon, queries, query_labels, serving
from tests.waiting import wait_until

MAX_ERROR, TABLE, CHECKS = 0.3, "collected.csv", "checks.csv"


@contextmanager
def collecting(
    folder: Path, limit: int = 1_000, classifier: Any = None
) -> Iterator[tuple[Client, list[str], Callable[..., None]]]:
    """A client of a server that collects, what became of its uploads that need a look, and what sends it pictures."""
    outcomes: list[str] = []
    collector = Collector(folder, limit, MAX_ERROR, outcomes.append)
    settings: dict[str, Any] = {"max_error": MAX_ERROR, "collect": folder, "collect_limit": limit}
    with serving(classifier, collector=collector, **settings) as client:

        def send(*images: bytes | int, by: str = "192.0.2.9") -> None:
            """Pictures one by one, of `noise` by their seeds, of a client; returns when they are judged."""
            for image in images:
                data = image if isinstance(image, bytes) else encode(noise(image))
                client.served.batching.submit(data, client=by).result(20)
            collector.settle()

        yield client, outcomes, send
    collector.close()


def table(folder: Path, name: str = TABLE) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def save_labels(folder: Path, labels: dict[str, str], column: str = "label") -> None:
    text = "".join(f"{path},{label}\n" for path, label in labels.items())
    (folder / LABELS).write_text(f"path,{column}\n{text}", encoding="utf-8")


def link_to(target: Path) -> Callable[[Path], None]:
    """What puts a link to it in a place."""

    def link(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return link


def noise(seed: int = 0) -> np.ndarray:
    """A picture of no class, which is near no other one."""
    return np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8).repeat(32, 0).repeat(32, 1)


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {TABLE, LABELS, SECRET, STATE}


def test_pictures_are_served_kept_suggested_labelled_added_and_then_answered(tmp_path: Path) -> None:
    """100 pictures, of the classes and of others; labels are those that a person would type."""
    classifier, kept, pictures = load(), tmp_path / "kept", load_pictures("held-out", min_styles=5)
    named = [(encode(image), pictures.names[c]) for image, c in zip(pictures.images, pictures.concepts, strict=True)]
    others = [pair for pair in named if pair[1] not in classifier.classes_]
    pairs = [*zip(queries(), query_labels(), strict=True), *others][:100]
    files, truth = [file for file, _ in pairs], dict(pairs)
    assert len(files) == 100
    with collecting(kept, classifier=classifier) as (client, outcomes, send):
        answers = [one for i in range(0, 100, 20) for one in client.predict(*files[i : i + 20]).json()["predictions"]]
        doubtful = [i for i, one in enumerate(answers) if not one["accepted"]]
        send()
        rows = table(kept)
        assert rows and {(kept / row["path"]).read_bytes() for row in rows} <= {files[i] for i in doubtful}
        assert outcomes.count("kept") == len(rows) and {row["reason"] for row in rows} <= {"needs a look", "unknown"}
        guesses = {files[i]: answers[i]["top"][0]["label"] for i in doubtful}
        assert all(guesses[(kept / row["path"]).read_bytes()] == row["guess"] for row in rows)

        chosen = classifier.suggest(read_source([str(kept / TABLE)]), 5).paths
        save_labels(kept, {path.name: truth[path.read_bytes()] for path in chosen})
        paths, given, _ = labelled_images(kept / LABELS)[:3]
        assert sorted(paths) == sorted(chosen)
        for path, label in zip(paths, given, strict=True):
            ids = {one.name: one.class_id for one in classifier.classes()}
            added = {"files": form(path.read_bytes()), "headers": AUTHORISED}
            place = f"/{ids[label]}/examples" if label in ids else ""
            added |= {} if label in ids else {"data": {"name": label}}
            assert client.ask("POST", f"/v1/classes{place}", **added).status_code in (200, 201)
        again = client.predict(*(path.read_bytes() for path in paths)).json()
        assert again["version"] == 1 + len(paths)
        assert [one["label"] for one in again["predictions"]] == given


def test_the_oldest_without_a_label_go_and_labelled_ones_stay(tmp_path: Path) -> None:
    with collecting(tmp_path, limit=3) as (_, outcomes, send):
        send(0, 1, 2)
        first = table(tmp_path)
        labels = {f"elsewhere/{first[0]['path']}": "apple"}
        save_labels(tmp_path, labels)
        send(3, 4)
        rows = table(tmp_path)
        assert len(rows) == 3 and rows[0] == first[0] and pictures(tmp_path) == {row["path"] for row in rows}
        save_labels(tmp_path, labels | {row["path"]: "pear" for row in rows})
        send(5)
        assert table(tmp_path) == rows and outcomes == ["kept"] * 5 + ["left out"]


def test_a_client_with_most_pictures_loses_its_own_oldest(tmp_path: Path) -> None:
    """Across a restart, too."""
    with collecting(tmp_path, limit=4) as (_, _, send):
        send(0, by="192.0.2.1")
        send(1, 2, 3, 4, by="192.0.2.2")
        rows = table(tmp_path)
        assert [(tmp_path / row["path"]).read_bytes() for row in rows] == [encode(noise(i)) for i in (0, 2, 3, 4)]
    with collecting(tmp_path, limit=4) as (_, _, send):
        send(5, by="192.0.2.3")
        send(6, 7, by="192.0.2.2")
        kept = table(tmp_path)
        assert kept[0] == rows[0] and [row["client"] for row in kept[1:]].count(rows[1]["client"]) == 2
        assert [len({row["client"] for row in kept}), len(kept)] == [3, 4]
        assert "192.0.2" not in (tmp_path / TABLE).read_text()


def test_what_waits_to_be_judged_is_shared_and_one_reading_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "uploads_to_judge", 100)
    judge, outcomes, read = threading.Event(), [], []

    def on_outcome(outcome: str) -> None:
        outcomes.append(outcome)
        assert outcome == "left out" or judge.wait(20)

    made = Collector(tmp_path, 10, MAX_ERROR, on_outcome, check_share=0.5)
    monkeypatch.setattr(made.checks, "read_labels", read.append)
    embeddings, head = Embeddings(np.zeros((1, 8), np.float32), None), None
    made.offer(bytes(30), embeddings, head, "a")  # type: ignore[arg-type]
    wait_until(lambda: outcomes == ["failed"])  # without a head; the thread waits
    for client, size, left_out in (("a", 21, 1), ("a", 20, 1), ("a", 1, 2), ("b", 25, 2), ("b", 1, 3), ("", 25, 3)):
        made.offer(bytes(size), embeddings, head, client)  # type: ignore[arg-type]
        assert outcomes.count("left out") == left_out, (client, size)
    for _ in range(9):
        made.read_labels(head)  # type: ignore[arg-type]
    judge.set()
    made.settle()
    assert len(read) == 1 + outcomes.count("failed") == 5
    made.offer(bytes(50), embeddings, head, "b")  # type: ignore[arg-type]
    made.close()
    assert outcomes.count("failed") == 5


def test_what_cannot_be_read_at_a_start_is_an_error(tmp_path: Path) -> None:
    """Nothing of it is used or changed: no pipe keeps the start waiting, and no link is followed."""
    (tmp_path / "outside").touch()
    Collector(tmp_path / "made", 10, MAX_ERROR).close()
    state = (tmp_path / "made" / STATE).read_bytes()
    damaged = b"", b"none", state[:-4096], state[:8192] + bytes(4096) + state[12288:]
    contents = [(STATE, one, "state.db is damaged: .*; restore it") for one in damaged]
    contents += [(TABLE, b"\xff\xfe", "can't read .*collected.csv as CSV"), (TABLE, b"label\nfig", "move its column")]
    cases = [(name, partial(Path.write_bytes, data=data), said) for name, data, said in contents]
    for name in (TABLE, LABELS, CHECKS, SECRET, STATE):
        cases += (name, os.mkfifo, f"regular file at .*{name}"), (name, link_to(tmp_path / "outside"), "symbolic links")
    for number, (name, make, said) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / name)
        with pytest.raises((IosrFastError, OSError), match=said):
            Collector(folder, 10, MAX_ERROR, check_share=0.5)
    assert (tmp_path / "outside").read_bytes() == b""


def test_tables_are_written_anew_whatever_happens_to_them_and_only_the_owner_reads(tmp_path: Path) -> None:
    outside, kept = tmp_path / "outside", tmp_path / "kept"
    outside.write_bytes(b"path,label\n")
    edits = partial(Path.write_bytes, data=b"\xff\xfe"), Path.unlink, link_to(outside)
    with collecting(kept) as (_, outcomes, send):
        send(0)
        for number, edit in enumerate(edits, 1):
            before = table(kept)
            edit(kept / TABLE)
            (kept / ".tmp").write_bytes(b"of a server that was killed")
            send(number)
            assert table(kept)[:-1] == before and pictures(kept) == {row["path"] for row in table(kept)}
        assert outcomes == ["kept"] * 4 and outside.read_bytes() == b"path,label\n"
        assert {stat.S_IMODE(path.lstat().st_mode) for path in kept.iterdir()} == {0o600}
    (kept / STATE).unlink()  # as the error of a damaged one says
    rows = table(kept)
    Collector(kept, 10, MAX_ERROR).close()
    assert table(kept) == rows


def test_tables_of_earlier_versions_are_taken_over_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They had no column `client` at first, later lines in place of earlier ones, and a last line that was cut off.
    Whoever may put tables or links into the folder has nothing else removed with them than kept pictures."""
    kept, outside = tmp_path / "kept", tmp_path / "outside"
    picture, first, second, torn, link, folder = (f"{number:032x}.png" for number in range(6))
    (kept / folder).mkdir(parents=True)
    outside.mkdir()
    foreign = [str(outside / picture), f"../outside/{picture}", "notes.txt", f"link/{picture}", "."]
    precious = [outside / picture, kept / "notes.txt"]
    for path in (*precious, *(kept / name for name in (picture, first, second, torn))):
        path.write_bytes(b"precious")
    (kept / link).symlink_to(outside / picture)
    (kept / "link").symlink_to(outside, target_is_directory=True)
    lines = [f"{path},'=pear,2026-01-01" for path in (picture, *foreign, link, folder)]
    (kept / TABLE).write_text("\n".join(["path,guess,time", *lines, f"{torn},pe"]))
    lines = [f"{path},pear,0.3,one rule 2,{label},2026" for path, label in ((first, ""), (second, ""), (first, "fig"))]
    (kept / CHECKS).write_text("\n".join(["path,answered,max_error,classifier,checked,time", *lines]))
    for left in ({picture: "'=pear", torn: ""}, {torn: ""}):
        made = Collector(kept, len(left), MAX_ERROR, check_share=0.5, digest="one")
        made.close()
        assert made.checks is not None and (made.checks.result.checks, made.checks.result.wrong) == (1, 1)
        assert {row["path"]: row["guess"] for row in table(kept)} == left
        assert [(row["path"], row["checked"]) for row in table(kept, CHECKS)] == [(second, ""), (first, "fig")]
        (kept / TABLE).write_text("path,label\nx,y\n")
    assert [record.message for record in caplog.records] == [
        f"state.db takes 3 of the 9 rows of {kept / TABLE}",
        f"state.db takes 3 of the 3 rows of {kept / CHECKS}",
    ]
    assert {path.read_bytes() for path in precious} == {b"precious"} and not (kept / picture).exists()
    assert (kept / link).is_symlink() and (kept / folder).is_dir()


def test_files_that_no_table_lists_are_found(tmp_path: Path) -> None:
    with collecting(tmp_path) as (_, _, send):
        send(0, 1)
    gone, _ = (row["path"] for row in table(tmp_path))
    lost = f"{0:032x}.png"
    (tmp_path / lost).write_bytes(b"kept")
    (tmp_path / gone).unlink()
    with collecting(tmp_path, limit=1) as (_, _, send):
        assert [(row["path"], row["reason"]) for row in table(tmp_path)] == [(lost, "found")]
        assert pictures(tmp_path) == {lost}
        send(2)
        assert pictures(tmp_path) == {row["path"] for row in table(tmp_path)} and len(table(tmp_path)) == 1


def test_a_probe_is_nobodys_picture_and_its_bytes_may_be_somebodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_soon(monkeypatch)
    with collecting(tmp_path) as (client, outcomes, send):
        monkeypatch.setattr(client.served.uploads, "probe", encode(noise()))
        wait_until(lambda: client.get("/healthz").status_code == 200 and "seconds_count" in client.get("/metrics").text)
        send()
        assert not outcomes and not pictures(tmp_path)
        assert "iosr_fast_predictions_total{" not in client.get("/metrics").text
        assert math.isnan(client.served.recent.median_probability)
        send(grey_png(), 1)
        assert outcomes == ["kept", "kept"]


def test_equal_pictures_and_near_duplicates_are_kept_once(tmp_path: Path) -> None:
    near = np.clip(noise().astype(int) + 1, 0, 255).astype(np.uint8)
    with collecting(tmp_path) as (_, outcomes, send):
        send(0, 0, encode(near))
    with collecting(tmp_path) as (_, after_a_restart, send):
        send(0)
    assert outcomes + after_a_restart == ["kept", *["near duplicate"] * 3] and len(table(tmp_path)) == 1


def test_a_full_disk_stops_collecting_and_not_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with collecting(tmp_path) as (_, outcomes, send):
        with monkeypatch.context() as patch:
            patch.setattr("iosr_fast.serving.kept_folder.os.fsync", full)
            send(0)
            assert pictures(tmp_path) == {".tmp"}
            with pytest.raises(OSError, match=r"expected to write .*new/secret, got No space .*: make room"):
                Collector(tmp_path / "new", 10, MAX_ERROR)
        link_to(tmp_path / "outside")(tmp_path / f"{STATE}-journal")  # which SQLite does not follow
        send(0)
        assert not table(tmp_path) and not (tmp_path / "outside").exists()
        (tmp_path / f"{STATE}-journal").unlink()
        send(1)
        assert outcomes == ["failed", "failed", "kept"]
        assert [row["reason"] == "found" for row in table(tmp_path)] == [True, False]


def test_collecting_is_off_unless_asked_for_and_then_said(tmp_path: Path) -> None:
    with pytest.raises(IosrFastError, match="expected --max-error with --collect"):
        Settings(collect=tmp_path)
    said = {}
    for settings in ({}, {"collect": tmp_path, "max_error": MAX_ERROR}):
        with serving(**settings) as client:
            words = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["description"]
            said[client.get("/v1/classifier").json()["collects"]] = "keeps whole uploads that need a look" in words
    assert said == {False: False, True: True}
    collector = Collector(tmp_path / "one", 10, MAX_ERROR)
    with pytest.raises(IosrFastError, match="another server collects into"):
        Collector(tmp_path / "one", 10, MAX_ERROR)
    collector.close()
