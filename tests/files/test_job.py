"""iosr-fast classify: its rows, and a run with --out that may be killed anywhere and goes on."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from iosr_fast.classifier import Classifier
from iosr_fast.cli import app
from iosr_fast.files.journal import open_journal
from iosr_fast.files.tables import write_table
from tests.files.runs import write_pictures

pytestmark = pytest.mark.slow

COUNT = 60


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return write_pictures(tmp_path / "in", COUNT)


def run(bundle: Path, *words: object) -> Result:
    return CliRunner().invoke(app, ["classify", str(bundle), *map(str, words), "--batch", "5", "--threads", "1"])


def written(bundle: Path, out: Path, *words: object) -> bytes:
    """What a run that must go well has written."""
    done = run(bundle, *words, "--out", out)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name)) == [out.name]
    return out.read_bytes()


def assert_rows(bundle: Path, out: Path, paths: list[Path], top: int) -> None:
    classifier = Classifier.load(bundle)
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for row, told in zip(rows, classifier.predict_proba(paths), strict=True):
        for place, best in enumerate(np.argsort(-told)[:top], start=1):
            suffix = "" if place == 1 else f"_{place}"
            assert row[f"label{suffix}"] == classifier.classes_[best] and row["error"] == ""
            assert abs(float(row[f"probability{suffix}"]) - told[best]) < 2e-4
    assert len(rows[0]) == 2 + 2 * top


def test_csv_has_what_the_classifier_says(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    written(bundle, tmp_path / "labels.csv", tmp_path / "in", "--top", "3")
    assert_rows(bundle, tmp_path / "labels.csv", pictures, top=3)
    written(bundle, tmp_path / "all.csv", pictures[3], pictures[1], "--top", "100")
    assert_rows(bundle, tmp_path / "all.csv", [pictures[3], pictures[1]], top=8)
    printed = run(bundle, tmp_path / "in", "--top", "2")
    assert printed.exit_code == 0
    lines = printed.stdout.splitlines()
    assert lines[0] == "path,label,probability,label_2,probability_2,error" and len(lines) == COUNT + 1
    saved = (tmp_path / "labels.csv").read_text().splitlines()
    assert [line.split(",")[:5] for line in lines] == [line.split(",")[:5] for line in saved]


def test_parquet_has_the_same(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pictures[17].write_bytes(b"no picture")
    out = tmp_path / "labels.parquet"
    first = written(bundle, out, tmp_path / "in", "--top", "2", "--skip-bad")
    table = pq.read_table(out)
    assert table.column_names == ["path", "label", "probability", "top", "error"]
    good = [i for i in range(COUNT) if i != 17]
    expected = Classifier.load(bundle).predict_proba([pictures[i] for i in good])
    assert table["path"].to_pylist() == [str(path) for path in pictures]
    kept = table.take(good)
    np.testing.assert_allclose(kept["probability"].to_numpy(), expected.max(1), atol=1e-5)
    assert [told[0]["label"] for told in kept["top"].to_pylist()] == kept["label"].to_pylist()
    np.testing.assert_allclose(
        [told[1]["probability"] for told in kept["top"].to_pylist()], np.sort(expected)[:, -2], atol=1e-5
    )
    bad = table.slice(17, 1).to_pylist()[0]
    assert bad["label"] is bad["probability"] is bad["top"] is None and "known format" in bad["error"]
    assert kept["error"].null_count == COUNT - 1
    out.unlink()
    assert written(bundle, out, tmp_path / "in", "--top", "2", "--skip-bad") == first


def start(bundle: Path, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "iosr_fast", "classify", str(bundle), *map(str, words)]
    return subprocess.Popen(
        [*command, "--batch", "5", "--threads", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(("name", "stop"), [("labels.csv", signal.SIGKILL), ("labels.parquet", signal.SIGINT)])
def test_a_stopped_run_resumes_and_ends_with_the_same_bytes(
    bundle: Path, tmp_path: Path, name: str, stop: signal.Signals
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    paths = write_pictures(tmp_path / "in", 150)
    out, journal = tmp_path / name, tmp_path / f"{name}.journal"
    process = start(bundle, tmp_path / "in", "--out", out)
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") >= 4:
                break
            time.sleep(0.002)
    finally:
        process.send_signal(stop)
        _, told = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130 and f"the same command resumes {out}" in told
        assert "Traceback" not in told
    else:
        assert process.returncode == -signal.SIGKILL
    kept = journal.read_bytes()
    assert 4 <= kept.count(b"\n") < 31 and not out.exists(), "the run was to be stopped in its middle"
    whole = kept[: kept.rindex(b"\n") + 1]
    journal.write_bytes(whole + kept[:70])  # as if it had been killed within a line
    again = written(bundle, out, tmp_path / "in")
    assert again == written(bundle, tmp_path / f"whole-{name}", tmp_path / "in")
    assert len(paths) == 150


def test_what_was_classified_is_not_classified_again(
    bundle: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad picture stops the run; what came before is kept, and so is all when only the file was not renamed yet."""
    from iosr_fast.encoders.runtimes.batched import BatchedEncoder
    from iosr_fast.files import job

    seen: list[int] = []
    encode = BatchedEncoder.encode_on_device
    monkeypatch.setattr(BatchedEncoder, "encode_on_device", lambda self, x: seen.append(len(x)) or encode(self, x))
    good = pictures[32].read_bytes()
    pictures[32].write_bytes(b"no picture")
    stopped = run(bundle, tmp_path / "in", "--out", tmp_path / "labels.csv")
    assert stopped.exit_code == 2 and f"can't read image {pictures[32]}" in stopped.output
    assert "earlier results are kept" in stopped.output
    seen.clear()
    skipped = run(bundle, tmp_path / "in", "--out", tmp_path / "labels.csv", "--skip-bad")
    assert skipped.exit_code == 0 and f"could not read 1 of {COUNT} images" in skipped.output
    assert sum(seen) == COUNT - 31  # batches 0 to 5 were kept
    rows = (tmp_path / "labels.csv").read_text().splitlines()
    assert rows[33].startswith(f'{pictures[32]},,,"it is not an image') and len(rows) == COUNT + 1

    (tmp_path / "labels.csv").unlink()
    monkeypatch.setattr(job, "write_table", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    full = run(bundle, tmp_path / "in", "--out", tmp_path / "labels.csv", "--skip-bad")
    assert full.exit_code == 2 and "no space left" in full.output
    monkeypatch.setattr(job, "write_table", write_table)
    seen.clear()
    strict = run(bundle, tmp_path / "in", "--out", tmp_path / "labels.csv")
    assert strict.exit_code == 2 and "skipped unreadable images, the first is" in strict.output
    assert run(bundle, tmp_path / "in", "--out", tmp_path / "labels.csv", "--skip-bad").exit_code == 0
    assert seen == [] and (tmp_path / "labels.csv").read_text().splitlines() == rows
    pictures[32].write_bytes(good)


def test_results_of_two_runs_never_mix(
    bundle: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "labels.csv"
    good = pictures[40].read_bytes()
    pictures[40].write_bytes(b"no picture")
    assert run(bundle, tmp_path / "in", "--out", out).exit_code == 2  # stops in its middle
    before = (tmp_path / "labels.csv.journal").read_bytes()

    def refused(*words: object, of: Path = bundle) -> str:
        done = run(of, *words, "--out", out)
        assert done.exit_code == 2 and "holds the results of another run, which differs in" in done.output
        assert "remove the file to start again" in done.output
        assert (tmp_path / "labels.csv.journal").read_bytes() == before and not out.exists()
        return done.output

    assert "top (there 1, now 2)" in refused(tmp_path / "in", "--top", "2")
    assert "decoder (there cpu, now cpu-exact)" in refused(tmp_path / "in", "--decoder", "cpu-exact")
    assert "images (there 60 (" in refused(*pictures[:59])
    classifier = Classifier.load(bundle)
    classifier.rename_class("~0", "another name", keep_text=True)
    classifier.save(tmp_path / "other")
    assert "classifier (there " in refused(tmp_path / "in", of=tmp_path / "other")
    pictures[40].write_bytes(good)  # an image of the list has changed
    assert "images (there 60 (" in refused(tmp_path / "in")

    (tmp_path / "labels.csv.journal").write_bytes(b"somebody's notes\n")
    foreign = run(bundle, tmp_path / "in", "--out", out)
    assert foreign.exit_code == 2 and "damaged or not a journal" in foreign.output
    assert (tmp_path / "labels.csv.journal").read_bytes() == b"somebody's notes\n"
    (tmp_path / "labels.csv.journal").unlink()
    out.write_text("somebody's labels")
    there = run(bundle, tmp_path / "in", "--out", out)
    assert there.exit_code == 2 and "exists already" in there.output
    assert out.read_text() == "somebody's labels"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--out", "labels.txt"), ".csv or .parquet, or a folder without a suffix, got labels.txt"),
        (("--out", "nowhere/labels.csv"), "expected a folder to write nowhere/labels.csv to"),
        (("--top", "0"), "'--top': "),
        (("--decoder", "abacus"), "'--decoder': "),
    ],
)
def test_what_can_not_be_is_refused(bundle: Path, pictures: list[Path], words: tuple[str, ...], told: str) -> None:
    refused = run(bundle, pictures[0], *words)
    assert refused.exit_code == 2 and told in refused.output and not refused.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_that_are_not_utf_8_are_refused(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd" / os.fsdecode(b"caf\xe9.png")
    odd.parent.mkdir()
    odd.write_bytes(pictures[0].read_bytes())
    refused = run(bundle, odd.parent, "--out", tmp_path / "labels.csv")
    assert refused.exit_code == 2 and "expected file names in UTF-8" in refused.output
    assert not list(tmp_path.glob("labels.csv*"))
    even = odd.rename(odd.parent / "caf\u00e9.png")
    written(bundle, tmp_path / "labels.csv", even.parent)
    assert_rows(bundle, tmp_path / "labels.csv", [even], top=1)


def test_a_journal_keeps_whole_lines_and_one_writer(tmp_path: Path) -> None:
    path, facts = tmp_path / "labels.csv.journal", {"top": 1}
    chunks = [[[["a", 0.1]], "no such file"], [[["\u00e4\n", 1 / 3]]], []]
    with open_journal(path, facts) as journal:
        for chunk in chunks:
            journal.append(chunk)
        with pytest.raises(FileExistsError, match="another run holds"), open_journal(path, facts):
            pass
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[0] + lines[1]), len(whole)):
        path.write_bytes(whole[:cut])
        with open_journal(path, facts) as journal:
            expected = 1 + (cut >= len(b"".join(lines[:3])))
            assert list(journal.read()) == chunks[:expected]
            for chunk in chunks[expected:]:
                journal.append(chunk)
        assert path.read_bytes() == whole
    for cut in range(len(lines[0])):  # killed before it began
        path.write_bytes(whole[:cut])
        with open_journal(path, facts) as journal:
            assert journal.chunks == 0
        assert path.read_bytes() == lines[0]
    path.write_bytes(whole.replace(b"0.1", b"0.2"))
    with open_journal(path, facts) as journal:
        assert journal.chunks == 0
    path.write_bytes(b"somebody's notes")
    with pytest.raises(ValueError, match="found another file"), open_journal(path, facts):
        pass
    assert path.read_bytes() == b"somebody's notes"
