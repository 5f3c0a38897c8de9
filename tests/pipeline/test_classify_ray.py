"""tools/classify.py on Ray: the same files as in one process, whoever dies on the way."""

# ruff: noqa: F811 (the fixture imported from tests.pipeline.test_classify is named again where it is asked for)

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from iosr_fast.classifier import Classifier
from iosr_fast.state.bundle import load_bundle
from iosr_fast.utils.manifest import read_manifest
from tests.pipeline.test_classify import assert_answers, bundle, classified, read_all  # noqa: F401 (bundle is a fixture)
from tests.pipeline.test_embed import ROOT, logged, part_bytes, write_pictures
from tests.pipeline.test_embed_ray import kill_in_the_middle, row_of
from tools.classification.plan import ClassifyPlan, classify_plan
from tools.classification.worker import ClassifyWorker
from tools.embedding import plan as plans
from tools.embedding.inputs import open_source
from tools.embedding.items import Chunk

Bundle = Path
OPTIONS = ("--chunk", "5", "--batch", "5")


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_nothing(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    given, out = tmp_path / "in", tmp_path / "out"
    paths = write_pictures(given, 300)
    paths[140].write_bytes(b"no image")
    classified(bundle, given, tmp_path / "local", *OPTIONS, "--skip-bad")
    words = ["--bundle", str(bundle), "--input", str(given), "--out", str(out), *OPTIONS, "--skip-bad"]
    command = [sys.executable, str(ROOT / "tools" / "classify.py"), *words, "--ray", "--workers", "2", "--threads", "1"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            killed, unfinished = kill_in_the_middle(out, lambda: process.poll() is None)
            there = part_bytes(out)
            assert process.wait(timeout=180) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
    assert 2 <= len(there) < 60 and killed != process.pid
    by = {entry["part"].split(".")[0]: entry["pid"] for entry in logged(out)}
    assert by[unfinished] != killed
    assert sorted(entry["part"] for entry in logged(out)) == sorted(part_bytes(out)), "each part is told of once"
    assert part_bytes(out) == part_bytes(tmp_path / "local")
    table = read_all(out)
    assert [i for i, error in enumerate(table["error"].to_pylist()) if error is not None] == [140]
    good = [i for i in range(300) if i != 140]
    assert_answers(bundle, table.take(good), [paths[i] for i in good])
    assert not list(out.glob(".*"))


# A worker by itself, without Ray


@pytest.fixture
def prepared(bundle: Bundle, tmp_path: Path) -> tuple[ClassifyPlan, list[Chunk], Path]:
    """A folder with a plan in which nothing is computed yet."""
    write_pictures(tmp_path / "in", 12)
    source, out = open_source(str(tmp_path / "in")), tmp_path / "out"
    chunks, held = source.cut(6), load_bundle(bundle)
    engine = read_manifest(held.engine, "engine", verify=False)
    plan = classify_plan(source, chunks, held, engine, "onnxruntime", chunk=6, batch=4, top=3)
    with plans.locked(out):
        plans.enter_plan(out, plan)
    return plan, chunks, out


def test_a_worker_finds_done_what_one_that_died_had_finished(
    bundle: Bundle, prepared: tuple[ClassifyPlan, list[Chunk], Path]
) -> None:
    plan, chunks, out = prepared
    worker = ClassifyWorker(str(bundle), plan.to_json(), str(out), 1, False)
    assert worker(row_of(chunks[1]))["part"] == "part-00001.parquet"
    written = (out / "part-00001.parquet").stat().st_mtime_ns
    assert worker(row_of(chunks[1]))["images"] == 6
    assert (out / "part-00001.parquet").stat().st_mtime_ns == written
    assert plans.missing_parts(out, plan, chunks, False, print) == (chunks[:1], 0)


def test_a_worker_refuses_another_classifier(
    bundle: Bundle, prepared: tuple[ClassifyPlan, list[Chunk], Path], tmp_path: Path
) -> None:
    plan, _, out = prepared
    classifier = Classifier.load(bundle)
    classifier.rename_class("~0", "another name", keep_text=True)
    classifier.save(tmp_path / "other")
    with pytest.raises(RuntimeError, match="expected one classifier on all machines"):
        ClassifyWorker(str(tmp_path / "other"), plan.to_json(), str(out), 1, False)
    with pytest.raises(RuntimeError, match="has none; put it on the share"):
        ClassifyWorker(str(tmp_path / "nowhere"), plan.to_json(), str(out), 1, False)
