"""A random sample of accepted answers is kept, judged by a person, and the server says when a promise is broken."""

from __future__ import annotations

import functools
import hashlib
import logging
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.head.predictions import Prediction
from iosr_fast.serving import check_sample
from iosr_fast.serving.check_sample import CheckSample
from iosr_fast.serving.collector import Collector
from iosr_fast.serving.http.settings import Settings
from iosr_fast.serving.kept_folder import LABELS, SECRET, STATE, KeptFolder
from iosr_fast.serving.limits import Deadlines
from tests.pictures import encode
from tests.serving.http_client import Client, queries, serving
from tests.serving.test_collector import CHECKS, save_labels
from tests.serving.test_collector import table as kept_table
from tests.store.live_parts import small_classifier, with_tree

MAX_ERROR = 0.5
table = functools.partial(kept_table, name=CHECKS)
ANSWER = Prediction("pear", "~1", 0.9, 1.0, 1.0, 0.0, 0.0, (), (), version=4, accepted=True)


@pytest.fixture(autouse=True)
def labels_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadlines, "read_labels_s", 0.0)


@contextmanager
def sampling(
    folder: Path, max_error: float = MAX_ERROR, digest: str = "one", share: float = 1 - 2**-40, limit: int = 1_000
) -> Iterator[CheckSample]:
    kept = KeptFolder(folder)
    try:
        yield CheckSample(kept, share, limit, max_error, digest)
    finally:
        kept.close()


def offer(sample: CheckSample, *pictures: int, client: str = "") -> list[bool]:
    return [sample.offer(b"%d" % number, ANSWER, client) for number in pictures]


@functools.cache
def head(*paths: tuple[str, ...]) -> Head:
    return with_tree(small_classifier(), paths or [()] * 5).snapshot()  # type: ignore[return-value]


def read(sample: CheckSample, *paths: tuple[str, ...]) -> tuple[int, int]:
    """Checks and wrong ones after two readings."""
    sample.read_labels(head(*paths))
    sample.read_labels(head(*paths))
    return sample.result.checks, sample.result.wrong


def test_sampled_answers_are_judged_until_the_server_says_so_across_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def server() -> Iterator[tuple[Client, Collector]]:
        collector = Collector(tmp_path, 1_000, MAX_ERROR, check_share=1 - 2**-40, digest="one")
        with serving(collector=collector, max_error=MAX_ERROR, collect=tmp_path, check_share=1 - 2**-40) as client:
            yield client, collector
        collector.close()

    def metrics(client: Client, collector: Collector) -> dict[str, float]:
        for _ in range(3):
            client.get("/metrics")
            collector.settle()
        lines = [line.split() for line in client.get("/metrics").text.splitlines() if line.startswith("iosr_fast_")]
        return {line[0].removeprefix("iosr_fast_"): float(line[1]) for line in lines if len(line) == 2}

    files = queries()
    with server() as (client, collector):
        answers = [one for i in (0, 15) for one in client.predict(*files[i : i + 15]).json()["predictions"]]
        collector.settle()
        rows = table(tmp_path)
        accepted = [file for file, one in zip(files, answers, strict=True) if one["accepted"]]
        assert [(tmp_path / row["path"]).read_bytes() for row in rows] == accepted and len(rows) > 10
        assert [row["answered"] for row in rows] == [one["label"] for one in answers if one["accepted"]]
        promise = {"max_error": "0.5", "classifier": "one rule 2", "version": "1", "checked": ""}
        assert all(promise.items() <= row.items() for row in rows)
        labels = {row["path"]: "something else" for row in rows[:4]}
        save_labels(tmp_path, labels)
        found = metrics(client, collector)
        assert found["checks"] == found["checks_wrong"] == 4 and found["promise_refuted"] == 0
        assert found["accepted_share"] == pytest.approx(len(rows) / len(files)) and 0 < found["median_probability"] <= 1
    with server() as (client, collector):
        assert metrics(client, collector)["checks"] == 4
        labels |= {f"kept/{row['path']}": row["answered"] for row in rows[4:5]}
        save_labels(tmp_path, labels | {str(tmp_path / row["path"]): "something else" for row in rows[5:11]})
        assert not any("accepted labels" in record.message for record in caplog.records)
        found = metrics(client, collector)
        assert (found["checks"], found["checks_wrong"], found["promise_refuted"]) == (11, 10, 1)
        checked = client.get("/v1/classifier").json()["checked"]
        sentence = "of 11 accepted labels that you checked 10 were wrong: more than 50% are; calibrate on these"
        assert checked["refuted"] and checked["sentence"].startswith(sentence)
        assert [sentence in record.message for record in caplog.records if record.levelno == logging.WARNING] == [True]
    Collector(tmp_path, 1, MAX_ERROR).close()
    assert all((tmp_path / row["path"]).is_file() for row in rows)
    assert not {row["path"] for row in rows} & {row["path"] for row in kept_table(tmp_path)}


def test_a_picture_is_drawn_and_counts_once(tmp_path: Path) -> None:
    """By its first label that two readings agree on, and after a restart, too."""
    with sampling(tmp_path) as sample:
        assert offer(sample, *range(6), 3) == [True] * 6 + [False]
        paths = [row["path"] for row in table(tmp_path)]
        for text in ("pe", "pea", "pear"):
            save_labels(tmp_path, {paths[0]: text})
            sample.read_labels(head())
            assert sample.result.checks == 0
        save_labels(tmp_path, {paths[1]: "fig", paths[0]: "pear", "mine.png": "fig", paths[2]: ""})
        assert read(sample) == (2, 1) and sample.beside == 1
        save_labels(tmp_path, {paths[1]: "pear"})
        assert read(sample) == (2, 1)
    (tmp_path / LABELS).unlink()
    with sampling(tmp_path) as sample:
        assert (sample.result.checks, sample.result.wrong) == (2, 1) and offer(sample, 0, 4) == [False, False]
        save_labels(tmp_path, {paths[2]: "fig", paths[0]: "fig"})
        assert read(sample) == (3, 2)


def test_an_answer_above_the_label_is_right_wherever_its_class_moves_later(tmp_path: Path) -> None:
    """And is wrong for another node, or for no class; a name between is right, too."""
    before = ("fruit", "apple"), ("fruit",), ("fruit", "apple"), (), ()
    given = {0: "motif 0", 1: "motif 1", 2: "motif 3", 3: "apple", 4: "nonsense"}
    with sampling(tmp_path) as sample:
        assert all(sample.offer(b"%d" % i, replace(ANSWER, label="fruit", class_id=None), "") for i in given)
        paths = [row["path"] for row in table(tmp_path)]
        save_labels(tmp_path, {path: given[i] for i, path in enumerate(paths)})
        assert read(sample, *before) == (5, 2)
    with sampling(tmp_path) as sample:
        assert offer(sample, 5) and read(sample, (), (), (), ("fruit",), ()) == (5, 2)
    rows = {row["path"]: (row["answered"], row["checked"]) for row in table(tmp_path)}
    assert [rows[path] for path in paths[:3]] == [("fruit", "fruit"), ("fruit", "fruit"), ("fruit", "motif 3")]


def test_another_promise_starts_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sampling(tmp_path) as sample:
        offer(sample, *range(12))
        save_labels(tmp_path, {row["path"]: "fig" for row in table(tmp_path)[:10]})
        assert read(sample) == (10, 10) and sample.result.refuted
    caplog.clear()
    with sampling(tmp_path) as sample:
        assert sample.result.refuted and [record.message for record in caplog.records] == [str(sample.result)]
    for rule, changed in (
        ("rule 2", {"max_error": 0.2}),
        ("rule 2", {"max_error": 0.2, "digest": "two"}),
        ("rule 3", {"max_error": 0.2, "digest": "two"}),
    ):
        caplog.clear()
        monkeypatch.setattr(check_sample, "_RULE", rule)
        with sampling(tmp_path, **changed) as sample:
            assert "start anew" in caplog.text and read(sample) == (0, 0) and sample.beside == 10
            assert len(table(tmp_path)) in (10, 11)  # unchecked pictures leave the sample
            assert offer(sample, 12, 3) == [True, True] and read(sample) == (1, 1)  # 3 has a label already


def test_a_secret_of_the_folder_draws_so_that_no_client_can_choose(tmp_path: Path) -> None:
    """Pictures of which a bare SHA-256 would draw all are drawn like others."""
    bare = [i for i in range(4_000) if int.from_bytes(hashlib.sha256(b"%d" % i).digest()[-8:], "big") < 0.1 * 2.0**64]
    drawn = []
    for folder in ("one", "one", "another"):
        (tmp_path / folder / STATE).unlink(missing_ok=True)
        (tmp_path / folder / CHECKS).unlink(missing_ok=True)
        with sampling(tmp_path / folder, share=0.1) as sample:
            drawn.append(offer(sample, *bare))
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(bare) > 300 and all(0.04 < np.mean(of_folder) < 0.18 for of_folder in drawn)
    secret = tmp_path / "one" / SECRET
    assert len(secret.read_bytes()) == 32 and stat.S_IMODE(secret.stat().st_mode) == 0o600
    secret.write_bytes(bytes(31))
    with pytest.raises(IosrFastError, match=r"expected 32 bytes in .*one/secret, got 31: restore or remove it"):
        KeptFolder(tmp_path / "one")


def test_no_client_fills_the_places_of_the_sample(tmp_path: Path) -> None:
    with sampling(tmp_path, limit=8) as sample:
        assert offer(sample, *range(6), client="a") == [True] * 4 + [False] * 2
    with sampling(tmp_path, limit=8) as sample:
        assert offer(sample, 6, client="a") == [False] and offer(sample, 7, 8, 9, client="b") == [True, True, False]
        assert offer(sample, 10, 11, 12) == [True, True, False], "the program may fill it"
        paths = [row["path"] for row in table(tmp_path)]
        save_labels(tmp_path, {path: "pear" for path in paths[:4]})
        read(sample)
        (tmp_path / paths[4]).unlink()  # it waits no longer
        assert offer(sample, 13, client="a") == [True] and offer(sample, *range(14, 20)) == [True] * 4 + [False] * 2


def test_labels_that_cannot_be_read_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collector = Collector(tmp_path, 10, MAX_ERROR, check_share=1 - 2**-40)
    (tmp_path / LABELS).write_text("name,label\nx,y\n", encoding="utf-8")
    for _ in range(3):
        collector.read_labels(head())
    collector.close()
    assert [record.message for record in caplog.records] == [
        f"labels can't be read: expected the columns path and label in {tmp_path / LABELS}, got name, label; add path, "
        "or remove the table"
    ]
    with pytest.raises(IosrFastError, match="expected --collect with --check-share"):
        Settings(max_error=MAX_ERROR, check_share=0.01)


def test_pictures_stranger_than_the_examples_are_noted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # With 24 left-out images no picture is strange; these log odds tell pictures like these.
    monkeypatch.setattr(
        "iosr_fast.head.head.strange_odds", lambda left_out: -1.2 if len(left_out.labels) == 24 else None
    )
    rng = np.random.default_rng(0)
    noise = [encode(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(60)]
    with serving(max_error=MAX_ERROR) as client:
        assert client.get("/v1/classifier").json()["note"] == ""
        for i in range(0, 60, 20):
            client.predict(*noise[i : i + 20])
        note = "100% of the last 60 pictures are stranger than 90% of your examples"
        assert client.get("/v1/classifier").json()["note"] == note
        text = client.get("/metrics").text
        assert "iosr_fast_strangers 1.0" in text and "iosr_fast_strange_share 1.0" in text
    assert [record.message for record in caplog.records if "strang" in record.message] == ["strangers"]
