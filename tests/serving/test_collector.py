"""Uploads that need a look are kept for labelling: which ones, how many, and what somebody has labelled stays."""

from __future__ import annotations

import csv
import errno
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.clip.demo.pictures import load_pictures
from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.source import read_source
from iosr_fast.head.labelled_images import labelled_images
from iosr_fast.serving.batching.decoder import grey_png
from iosr_fast.serving.collector import TABLE, Collector
from iosr_fast.serving.http.settings import Settings
from tests.pictures import encode
from tests.serving.http_client import AUTHORISED, Client, form, load, queries, query_labels, serving

MAX_ERROR = 0.3


@contextmanager
def collecting(
    folder: Path, limit: int = 1_000, classifier: Any = None
) -> Iterator[tuple[Client, list[str], Callable[[], None]]]:
    """A client of a server that collects, what became of its uploads that need a look, and a wait for all."""
    outcomes: list[str] = []
    collector = Collector(folder, limit, MAX_ERROR, outcomes.append)
    settings: dict[str, Any] = {"max_error": MAX_ERROR, "collect": folder, "collect_limit": limit}
    with serving(classifier, collector=collector, **settings) as client:
        yield client, outcomes, collector.settle
    collector.close()


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / TABLE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_pictures_are_served_kept_suggested_labelled_added_and_then_answered(tmp_path: Path) -> None:
    """100 pictures, of the classes and of others; labels are those that a person would type."""
    classifier, kept, pictures = load(), tmp_path / "kept", load_pictures("held-out", min_styles=5)
    named = [(encode(image), pictures.names[c]) for image, c in zip(pictures.images, pictures.concepts, strict=True)]
    others = [pair for pair in named if pair[1] not in classifier.classes_]
    pairs = [*zip(queries(), query_labels(), strict=True), *others][:100]
    files, truth = [file for file, _ in pairs], dict(pairs)
    assert len(files) == 100
    with collecting(kept, classifier=classifier) as (client, outcomes, settle):
        answers = [one for i in range(0, 100, 20) for one in client.predict(*files[i : i + 20]).json()["predictions"]]
        doubtful = [i for i, one in enumerate(answers) if not one["accepted"]]
        settle()
        rows = table(kept)
        assert rows and {(kept / row["path"]).read_bytes() for row in rows} <= {files[i] for i in doubtful}
        assert outcomes.count("kept") == len(rows) and {row["reason"] for row in rows} <= {"needs a look", "unknown"}
        guesses = {files[i]: answers[i]["top"][0]["label"] for i in doubtful}
        assert all(guesses[(kept / row["path"]).read_bytes()] == row["guess"] for row in rows)

        chosen = classifier.suggest(read_source([str(kept / TABLE)]), 5).paths
        for row in rows:
            if kept / row["path"] in chosen:
                row["label"] = truth[(kept / row["path"]).read_bytes()]
        with (kept / TABLE).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        paths, given, _ = labelled_images(kept / TABLE)[:3]
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


def test_the_oldest_without_a_label_go_and_labels_stay(tmp_path: Path) -> None:
    images = queries()
    with collecting(tmp_path, limit=3) as (client, outcomes, settle):

        def send(number: int, until: int) -> list[dict[str, str]]:
            for image in images[number:]:
                client.predict(image)
                settle()
                if outcomes.count("kept") == until:
                    break
            return table(tmp_path)

        first = send(0, 3)[:3]
        text = (tmp_path / TABLE).read_text(encoding="utf-8").splitlines()
        text[1] = text[1].replace(",,", ",apple,", 1)
        (tmp_path / TABLE).write_text("\n".join(text) + "\n", encoding="utf-8")
        rows = send(20, 5)
        assert len(rows) == 3 and rows[0] == first[0] | {"label": "apple"}
        assert {path.name for path in tmp_path.iterdir()} == {TABLE, *(row["path"] for row in rows)}


def test_equal_pictures_and_near_duplicates_are_kept_once(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)  # no class has it
    near = np.clip(noise.astype(int) + 1, 0, 255).astype(np.uint8)
    with collecting(tmp_path) as (client, outcomes, settle):
        for one in (noise, noise, near):
            client.predict(encode(one))
        settle()
        assert outcomes == ["kept", "near duplicate", "near duplicate"] and len(table(tmp_path)) == 1


def test_a_full_disk_stops_collecting_and_not_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with collecting(tmp_path) as (client, outcomes, settle):
        with monkeypatch.context() as patch:
            patch.setattr("iosr_fast.serving.kept_folder.os.fsync", full)
            assert client.predict(encode(noise)).status_code == 200
            settle()
            assert [path.name for path in tmp_path.iterdir()] == [TABLE]
        assert client.predict(encode(noise)).status_code == 200
        settle()
        assert outcomes == ["failed", "kept"]


def test_what_a_table_names_is_removed_only_if_it_is_a_kept_picture(tmp_path: Path) -> None:
    """Whoever may edit the table alone, or put links into the folder, removes nothing else with it."""
    kept, outside = tmp_path / "kept", tmp_path / "outside"
    outside.mkdir()
    name = f"{0:032x}.png"
    for path in (outside / "changes.db", outside / name):
        path.write_bytes(b"precious")
    Collector(kept, 3, MAX_ERROR).close()
    (kept / "notes.txt").write_bytes(b"precious")
    (kept / f"{1:032x}.png").write_bytes(b"kept")
    (kept / f"{2:032x}.png").symlink_to(outside / name)
    (kept / "link").symlink_to(outside, target_is_directory=True)
    (kept / f"{3:032x}.png").mkdir()
    foreign = [str(outside / "changes.db"), f"../outside/{name}", "notes.txt", f"link/{name}", "", ".", "no-file.png"]
    gone = [f"{number:032x}.png" for number in range(1, 4)]
    with (kept / TABLE).open("a", encoding="utf-8") as file:
        file.writelines(f"{path},,pear,0.5,needs a look,\n" for path in [*foreign, *gone])
    with collecting(kept, limit=1) as (client, outcomes, settle):
        client.predict(grey_png())  # as /healthz does
        client.predict(encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
        settle()
        assert outcomes == ["kept"]
    paths = [row["path"] for row in table(kept)]
    assert paths[:-1] == foreign and not (kept / gone[0]).exists()
    assert {path.read_bytes() for path in (*outside.iterdir(), kept / "notes.txt")} == {b"precious"}
    assert (kept / gone[1]).is_symlink() and (kept / gone[2]).is_dir() and (kept / paths[-1]).is_file()


def test_only_the_owner_can_read_what_is_kept_and_no_link_is_written_through(tmp_path: Path) -> None:
    outside, kept = tmp_path / "outside", tmp_path / "kept"
    outside.write_bytes(b"path,label\n")
    with collecting(kept) as (client, _, settle):
        for name in (TABLE, f".{TABLE}.tmp"):
            (kept / name).unlink(missing_ok=True)
            (kept / name).symlink_to(outside)
        client.predict(encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
        settle()
        (kept / TABLE).unlink()
        (kept / f".{TABLE}.tmp").unlink(missing_ok=True)
        client.predict(queries()[0], encode(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)))
        settle()
    assert outside.read_bytes() == b"path,label\n"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()}
    assert len(modes) >= 2 and set(modes.values()) == {0o600}


def test_collecting_is_off_unless_asked_for_and_then_said(tmp_path: Path) -> None:
    with pytest.raises(IosrFastError, match="expected --max-error with --collect"):
        Settings(collect=tmp_path)
    said = {}
    for settings in ({}, {"collect": tmp_path, "max_error": MAX_ERROR}):
        with serving(**settings) as client:
            words = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]["description"]
            said[client.get("/v1/classifier").json()["collects"]] = "keeps uploads that need a look" in words
    assert said == {False: False, True: True}
    collector = Collector(tmp_path / "one", 10, MAX_ERROR)
    with pytest.raises(IosrFastError, match="another server collects into"):
        Collector(tmp_path / "one", 10, MAX_ERROR)
    collector.close()
    (tmp_path / "one" / TABLE).write_bytes(b"\xff\xfe")
    with pytest.raises(IosrFastError, match=r"can't read .*collected.csv as CSV in UTF-8"):
        Collector(tmp_path / "one", 10, MAX_ERROR)
