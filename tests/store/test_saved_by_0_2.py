"""Heads and logs that version 0.2 wrote, of rows drawn at random, answer as they did: saved_by_0_2.zip has the folders,
the logs of each, and in expected.json the answers of then."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast import Classifier, Embeddings, FewShotHead
from iosr_fast.head.verdict import Abstention, judge
from iosr_fast.store.head_files import fingerprint

ARCHIVE = Path(__file__).with_name("saved_by_0_2.zip")
EXPECTED: dict[str, Any] = json.loads(zipfile.ZipFile(ARCHIVE).read("expected.json"))
LOGS = [(name, number) for name, facts in EXPECTED.items() for number in facts["logs"]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    zipfile.ZipFile(ARCHIVE).extractall(folder)
    return folder


def close(found: Any, expected: Any) -> bool:  # processors round sums differently
    return np.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_head_of_before_answers_as_it_did(name: str, saved: Path) -> None:
    head, expected = FewShotHead.load(saved / name), EXPECTED[name]["answers"]
    queries = np.array(EXPECTED[name]["queries"])
    assert close(head.decision_function(queries), expected["logits"])
    assert close(head.predict_proba(queries), expected["probabilities"])
    labels = head.predict(queries)
    said = [sorted(one) for one in labels] if labels.dtype == object else labels.tolist()
    assert said == expected["labels"]
    if "accepted" in expected:  # one label a row
        assert head.predict(queries, max_error=0.3).tolist() == expected["accepted"]
        assert [one.tolist() for one in head.predict_sets(queries, 0.8)] == expected["sets"]
        assert close(head.unknown_score(queries), expected["unknown"])
        assert head.snapshot().summary() == expected["summary"]


@pytest.mark.parametrize(("name", "number"), LOGS)
def test_a_log_of_before_leads_to_the_same_head(name: str, number: str, saved: Path) -> None:
    expected = EXPECTED[name]["logs"][number]
    classifier = Classifier.load(saved / name)
    classifier.open_log(saved / f"{name} {number}.db")
    classifier.close_log()
    head = classifier.snapshot()
    assert head.version == expected["version"]
    assert fingerprint(head) == expected["fingerprint"] or head.reducer is not None  # which is fitted again
    assert [[one.class_id, one.name, one.examples] for one in head.classes()] == expected["classes"]
    rows = Embeddings.of_rows(np.array(EXPECTED[name]["queries"]), head.examples.embeddings.adapted is not None)
    logits = head.score(rows)
    assert close(logits, expected["logits"]) and head.summary() == expected["summary"]
    verdict = judge(head, rows, Abstention(max_error=0.4))
    assert verdict.accepted is not None
    assert (verdict.labels.tolist(), verdict.accepted.tolist()) == (expected["nodes"], expected["accepted"])
