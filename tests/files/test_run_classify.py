"""iosr-fast classify into parts: its rows are the answers of Classifier, and an interrupted run resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from iosr_fast.classifier import Classifier
from iosr_fast.files.prediction_files import COLUMNS, SCORES, read_predictions, write_predictions
from iosr_fast.store.head_files import fingerprint
from iosr_fast.utils.manifest import read_manifest
from tests.files.runs import (
    assert_answers,
    classified,
    kill_in_the_middle,
    logged,
    part_bytes,
    read_all,
    run,
    write_pictures,
)

pytestmark = pytest.mark.slow

CLASSES = 8


def test_rows_are_what_the_classifier_says(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = classified(bundle, tmp_path / "in", out, "--chunk", "8", "--batch", "3", "--top", "4")
    assert table.column_names == list(COLUMNS)
    assert table["key"].to_pylist() == [path.relative_to(tmp_path / "in").as_posix() for path in pictures]
    assert_answers(bundle, table, pictures, top=4)
    manifest = read_manifest(out, "classifications")
    assert (manifest["images"], manifest["classified"], manifest["errors"], manifest["top"]) == (30, 30, 0, 4)
    classifier = Classifier.load(bundle)
    assert manifest["bundle"] == fingerprint(classifier.snapshot()) and manifest["classes"] == CLASSES
    assert manifest["method"] == classifier.method_ and manifest["engine"] == classifier.encoder.fingerprint


def test_a_killed_run_resumes_and_classifies_every_image_once(bundle: Path, tmp_path: Path) -> None:
    given, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    paths = write_pictures(given, 150)
    options = ("--chunk", "5", "--batch", "5")
    classified(bundle, given, whole, *options)
    kill_in_the_middle("classify", bundle, given, out, 30, *options)
    written = {name: (out / name).stat().st_mtime_ns for name in part_bytes(out)}
    assert_answers(bundle, classified(bundle, given, out, *options), paths)
    assert part_bytes(out) == part_bytes(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written, "finished parts were to be kept"
    again = run("classify", bundle, given, out, *options)
    assert again.exit_code == 0 and "all 30 parts exist" in again.output


def test_parts_of_two_classifiers_never_mix(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    classified(bundle, tmp_path / "in", out, "--chunk", "10")
    before = part_bytes(out)
    same = Path(shutil.copytree(bundle, tmp_path / "same"))
    assert "all 3 parts exist" in run("classify", same, tmp_path / "in", out, "--chunk", "10").output
    classifier = Classifier.load(bundle)
    classifier.rename_class("~0", "another name", keep_text=True)
    classifier.save(tmp_path / "other")
    refused = run("classify", tmp_path / "other", tmp_path / "in", out, "--chunk", "10")
    told = [fingerprint(Classifier.load(folder).snapshot()) for folder in (bundle, tmp_path / "other")]
    assert refused.exit_code == 2 and f"bundle (there {told[0]}, now {told[1]})" in refused.output
    assert part_bytes(out) == before
    # A part of the other classifier's run, under this one's name.
    classified(tmp_path / "other", tmp_path / "in", tmp_path / "out2", "--chunk", "10")
    shutil.copy(tmp_path / "out2" / "part-00001.parquet", out / "part-00001.parquet")
    again = run("classify", bundle, tmp_path / "in", out, "--chunk", "10")
    assert again.exit_code == 0 and "part-00001.parquet is computed again: it is of another plan" in again.output
    assert part_bytes(out) == before


def test_missing_and_damaged_parts_are_computed_again(bundle: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    classified(bundle, tmp_path / "in", out, "--chunk", "4")
    whole = part_bytes(out)
    parts = [out / name for name in whole]
    parts[0].unlink()
    parts[1].write_bytes(whole[parts[1].name][:-100])  # cut off
    table = pq.read_table(parts[2])
    wrong = table.set_column(1, "label", pa.array(["wrong"] * 4))  # whole, and not what was written
    pq.write_table(wrong.replace_schema_metadata(table.schema.metadata), parts[2])
    pq.write_table(pa.table({"key": ["a"]}), parts[3])  # somebody else's
    shutil.copy(pictures[20], pictures[17])  # part 4's image has changed
    before = len(logged(out))
    again = run("classify", bundle, tmp_path / "in", out, "--chunk", "4")
    assert again.exit_code == 0, again.output
    assert [entry["part"] for entry in logged(out)[before:]] == [path.name for path in parts[:5]]
    for path in parts[1:5]:
        assert f"{path.name} is computed again: " in again.output
    assert {name: part for name, part in part_bytes(out).items() if name != parts[4].name} == {
        name: part for name, part in whole.items() if name != parts[4].name
    }
    assert_answers(bundle, read_all(out), pictures)


def test_a_bad_image_stops_the_run_or_is_a_row_with_its_error(
    bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out, options = tmp_path / "out", ("--chunk", "5", "--batch", "2")
    bad = {3: b"no picture", 17: pictures[17].read_bytes()[:40]}
    for i, content in bad.items():
        pictures[i].write_bytes(content)
    stopped = run("classify", bundle, tmp_path / "in", out, *options)
    assert stopped.exit_code == 2
    assert f"can't read image {pictures[3]}: " in stopped.output and "--skip-bad" in stopped.output
    assert not (out / "manifest.json").exists()
    done = run("classify", bundle, tmp_path / "in", out, *options, "--skip-bad")
    assert done.exit_code == 0 and "28 of 30 images" in done.output and "2 unread" in done.output
    table = read_all(out)
    errors = table["error"].to_pylist()
    assert [i for i, error in enumerate(errors) if error is not None] == list(bad)
    assert "not an image of a known format" in errors[3]
    for name in (*SCORES, "top"):
        assert [i for i, value in enumerate(table[name].to_pylist()) if value is None] == list(bad)
    good = [i for i in range(30) if i not in bad]
    assert_answers(bundle, table.take(good), [pictures[i] for i in good])
    # What could not be read is tried again where errors are not accepted any more.
    again = run("classify", bundle, tmp_path / "in", out, *options)
    assert again.exit_code == 2 and "part-00000.parquet is computed again: 1 of its images" in again.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--top", "0"), "'--top': "),
        (("--chunk", "0"), "expected --chunk from 1 to 65536, got 0"),
        (("--threads", "0"), "expected --threads of at least 1, got 0"),
        (("--gpus", "1"), "expected --workers, --gpus and --address only with --ray"),
        (("--runtime", "abacus"), "expected runtime 'auto' or one of"),
    ],
)
def test_what_can_not_be_is_refused_before_any_work(
    bundle: Path, pictures: list[Path], tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    refused = run("classify", bundle, tmp_path / "in", tmp_path / "out", *options)
    assert refused.exit_code == 2 and told in refused.output
    assert not (tmp_path / "out").exists()


def test_a_part_notices_changed_facts(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    write_predictions(path, ["a"], [None], ["no such file"], {"part": 0})
    held = read_predictions(path)
    assert (held.keys, held.errors, held.facts) == (["a"], ["no such file"], {"part": 0})
    table = pq.read_table(path)
    facts: dict[str, Any] = json.loads(table.schema.metadata[b"iosr_fast"])
    pq.write_table(table.replace_schema_metadata({"iosr_fast": json.dumps(facts | {"part": 1})}), path)
    with pytest.raises(ValueError, match="its content differs from what was written"):
        read_predictions(path)
