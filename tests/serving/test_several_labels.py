"""A classifier of several labels a picture is served: answers, changes, promises, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.classifier import Classifier
from iosr_fast.methods.links import Sigmoid
from iosr_fast.serving.batching import BatchingClassifier
from iosr_fast.serving.collector import Collector
from iosr_fast.serving.limits import Deadlines
from tests.pictures import GREY
from tests.serving import http_client
from tests.serving.http_client import AUTHORISED, Client, error_of, fields, form, load, queries, serving, tagged
from tests.serving.test_collector import save_labels, table

MAX_ERROR = 0.5
PICTURES = tagged()[2]


def several() -> Classifier:
    """A new classifier, which the test may change."""
    return Classifier.load(http_client.several_bundle(), verify=False)


def ids(classifier: Classifier, *names: str) -> list[str]:
    of = {one.name: one.class_id for one in classifier.classes()}
    return [of[name] for name in names]


def ask(client: Client, method: str, path: str, class_ids: list[str], *images: bytes) -> Any:
    return client.ask(method, path, files=fields(class_id=class_ids) + form(*images), headers=AUTHORISED)


def test_answers_are_those_of_the_library() -> None:
    classifier = several()
    with serving(classifier, max_error=MAX_ERROR) as client:
        for options in ({}, {"max_error": 0.3}):
            query = "".join(f"&{name}={value}" for name, value in options.items())
            body = client.predict(*PICTURES, query=f"?top=1&nearest=2{query}").json()
            expected = classifier.explain(PICTURES, nearest=2, max_error=options.get("max_error", MAX_ERROR))
            with BatchingClassifier(classifier, max_error=MAX_ERROR) as batching:
                alike = [one.result(20) for one in batching.submit_many(PICTURES, nearest=2, **options)]
            for answer, other, one in zip(body["predictions"], alike, expected, strict=True):
                assert answer["label"] == other.label == one.label and answer["accepted"] == [*one.accepted]
                for tops in (answer["top"], [vars(each) for each in other.top]):
                    assert [(each["label"], each["class_id"]) for each in tops] == [
                        (each.label, each.class_id) for each in one.top
                    ]
                    np.testing.assert_allclose([each["logit"] for each in tops], [x.logit for x in one.top], atol=1e-3)
                assert [each["label"] for each in answer["nearest"]] == [each.label for each in one.nearest]
        assert {len(one.top) for one in expected} == {0, 1, 2} and any(any(one.accepted) for one in expected)
        labels = [label for one in expected for label, _ in one.pairs]
        text, times = client.get("/metrics").text, 2.0
        for name in set(labels):
            (class_id,) = ids(classifier, name)
            line = f'iosr_fast_predictions_total{{class_id="{class_id}",name="{name}"}} {times * labels.count(name)}'
            assert line in text
        assert f"iosr_fast_unknown_total {times * sum(not one.top for one in expected)}\n" in text
        recent = client.served.recent
        probabilities = [p for one in expected for _, p in one.pairs]
        assert recent.median_probability == pytest.approx(np.median(probabilities), abs=1e-4)
        judged = [classifier.explain(PICTURES, max_error=share) for share in (MAX_ERROR, 0.3)]
        accepted = [ok for answers in judged for one in answers for ok in one.accepted]
        assert recent.accepted_share == pytest.approx(np.mean(accepted))


def test_facts_say_that_there_are_several(tmp_path: Path) -> None:
    classifier = several()
    with serving(classifier) as client:
        facts, known = client.get("/v1/classifier").json(), classifier.calibration()
        assert facts["several_labels"] is True and facts["examples"] == len(tagged()[0])
        assert not facts["unknown"]["promised"] and "none of the classes" in facts["unknown"]["sentence"]
        assert facts["measured"]["accuracy"] == pytest.approx(known.accuracy)
        refused = client.predict(PICTURES[0], query="?unknown=reject")
        assert error_of(refused, 422) == "no_promise" and "none of the classes gets no label" in refused.text
    with serving() as client:
        assert "several_labels" not in client.get("/v1/classifier").json()
    for name, made in (("one", load()), ("tags", classifier)):  # whose left-out images were asked before
        made.save(tmp_path / name)
    with http_client.serving_several(tmp_path, max_error=MAX_ERROR) as client:
        query = "?classifier=one&classifier=tags"
        answers = client.predict(PICTURES[0], query=query).json()["classifiers"]
        accepted = [answers[name]["predictions"][0]["accepted"] for name in ("one", "tags")]
        assert [type(each) for each in accepted] == [bool, list]
        answers = client.predict(PICTURES[0], query=f"{query}&unknown=reject&keep=0.5").json()["classifiers"]
        assert answers["one"]["predictions"] and answers["tags"]["error"]["code"] == "no_promise"


def test_examples_are_listed_added_and_relabelled() -> None:
    with serving(several()) as client:
        classifier = client.served.classifier
        heart, green = ids(classifier, "heart", "green")
        listed = client.get("/v1/examples?limit=50").json()
        last = client.get(f"/v1/examples?after={listed['next']}").json()
        names = {one.class_id: one.name for one in classifier.classes()}
        found = [{names[one] for one in each["class_ids"]} for each in listed["examples"] + last["examples"]]
        assert found == tagged()[1] and listed["total"] == len(found) and last["next"] is None
        both = client.get(f"/v1/examples?class_id={heart}").json()["examples"]
        assert [one["example_id"] for one in both] == classifier.examples("heart")
        without = client.get("/v1/examples?class_id=").json()
        assert without["total"] == found.count(set()) and not any(one["class_ids"] for one in without["examples"])

        def labels_of(example_id: str) -> list[str]:
            every = client.get("/v1/examples").json()["examples"]
            return next(one["class_ids"] for one in every if one["example_id"] == example_id)

        made = ask(client, "POST", "/v1/examples", [heart, green], *PICTURES[:2]).json()
        first, second = made["example_ids"]
        assert labels_of(first) == labels_of(second) == sorted([heart, green]) and made["class_id"] == ""
        assert ask(client, "POST", "/v1/examples", [heart, green], PICTURES[0]).status_code == 200, "once more"
        again = ask(client, "POST", "/v1/examples", [heart], PICTURES[0])
        assert error_of(again, 422) == "refused" and "(relabel)" in again.json()["error"]["message"]
        (none,) = ask(client, "POST", "/v1/examples", [""], PICTURES[-1]).json()["example_ids"]
        assert labels_of(none) == []
        for given in ([green], []):
            changed = ask(client, "PATCH", f"/v1/examples/{first}", given or [""]).json()
            assert changed["class_id"] == "".join(given) and labels_of(first) == given
        total = client.get("/v1/examples").json()["total"]
        assert client.ask("DELETE", f"/v1/classes/{heart}", headers=AUTHORISED).status_code == 200
        assert client.get("/v1/examples").json()["total"] == total and labels_of(second) == [green]

        version = classifier.version
        for method, path, class_ids, images, status, code in (
            ("POST", "", [], [GREY], 422, "invalid_parameters"),
            *(("POST", "", wrong, [GREY], 404, "no_class") for wrong in ([green, ""], ["~99"], ["green"])),
            ("POST", "", [green], [], 400, "no_image"),
            ("PATCH", "/e999", [green], [], 404, "no_example"),
            ("PATCH", f"/{first}", [green], [GREY], 400, "unexpected_field"),
            ("GET", "?class_id=~99", [], [], 404, "no_class"),
        ):
            assert error_of(ask(client, method, f"/v1/examples{path}", class_ids, *images), status) == code
        assert classifier.version == version


def test_an_example_of_one_label_gets_another_one() -> None:
    with serving() as client:
        classifier = client.served.classifier
        moved, *_ = classifier.examples("~0")
        changed = ask(client, "PATCH", f"/v1/examples/{moved}", ["~1"])
        assert changed.json() == {"version": 2, "class_id": "~1", "example_ids": [moved]}
        assert moved in classifier.examples("~1") and moved not in classifier.examples("~0")
        listed = client.get("/v1/examples?class_id=~1").json()["examples"]
        assert {"example_id": moved, "class_ids": ["~1"]} in listed
        assert client.get("/v1/examples?class_id=").json()["total"] == 0
        assert ask(client, "POST", "/v1/examples", ["~1"], queries()[0]).json()["class_id"] == "~1"
        for class_ids in ([""], ["~0", "~1"]):
            refused = ask(client, "PATCH", f"/v1/examples/{moved}", class_ids)
            assert error_of(refused, 422) == "invalid_parameters" and "one label a picture" in refused.text


# --- what is kept ---


def test_what_needs_a_look_is_kept_and_checked_labels_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadlines, "read_labels_s", 0.0)
    classifier, outcomes = several(), list[str]()
    collector = Collector(tmp_path, 100, MAX_ERROR, outcomes.append, 0.9999, "one", several=True)
    with serving(
        classifier, collector=collector, max_error=MAX_ERROR, collect=tmp_path, check_share=1 - 2**-40
    ) as client:
        client.predict(*PICTURES)
        collector.settle()
        answers = dict(zip(PICTURES, classifier.explain(PICTURES, max_error=MAX_ERROR), strict=True))
        kept, drawn = table(tmp_path), table(tmp_path, name="checks.csv")
        for row in drawn:
            answer = answers.pop((tmp_path / row["path"]).read_bytes())
            assert row["answered"] == ";".join(answer.accepted_labels) != ""
        for row in kept:
            answer = answers.pop((tmp_path / row["path"]).read_bytes())
            assert not any(answer.accepted) and row["guess"] == ";".join(label for label, _ in answer.pairs)
            assert row["reason"] == ("needs a look" if answer.top else "unknown")
            assert float(row["probability"]) == pytest.approx(answer.probability, abs=1e-3)
        near = [one for one in answers.values() if not any(one.accepted)]
        assert len(near) == len(answers) == outcomes.count("near duplicate") and len(drawn) > 3 and kept

        right = {row["path"]: row["answered"] for row in drawn}
        two = next(path for path, answered in right.items() if ";" in answered)
        others = [path for path in right if path != two][:2]
        given = {two: f"face; {right[two].split(';')[0]}", others[0]: "", others[1]: right[others[1]] + ";face"}
        save_labels(tmp_path, given, column="labels")
        for _ in range(3):
            collector.read_labels(classifier.snapshot())
            collector.settle()
        counts = [len(right[path].split(";")) for path in given]
        checked = client.get("/v1/classifier").json()["checked"]
        assert (checked["checks"], checked["wrong"]) == (sum(counts), counts[0] - 1 + counts[1])
    collector.close()
    again = Collector(tmp_path, 100, MAX_ERROR, check_share=1 - 2**-40, digest="one", several=True)
    assert again.checks is not None
    assert (again.checks.result.checks, again.checks.result.wrong) == (checked["checks"], checked["wrong"])
    again.close()


def test_a_picture_is_strange_by_the_label_that_its_answer_shows() -> None:
    """Of left-out images, too: the most likely class may stay below its threshold, while another one is shown."""
    classifier = several()
    always_book = Sigmoid(np.array([1, 0, 1, 1, 1], np.float32))
    for head in (classifier.snapshot(), replace(classifier.snapshot()).with_computed(link=always_book)):
        logits = head.calibrated_out_of_fold.logits
        decided, shares = head.link.decide(logits), head.link.probabilities(logits.astype(np.float64))
        shown = np.where(decided | ~decided.any(1, keepdims=True), shares, 0).max(1)
        odds = np.log(shown / (1 - shown))
        assert 0 < np.mean(odds <= head.strange_odds + 1e-6) <= 0.1
        assert np.isclose(odds, head.strange_odds, atol=1e-5).any()
    assert (shown < shares.max(1)).any()
    head = classifier.snapshot()
    with serving(classifier, max_error=MAX_ERROR) as client:
        noise = classifier.explain([GREY], max_error=MAX_ERROR)[0]
        client.served.recent.add(noise)
        p = noise.probability
        assert client.served.recent.strangers.share == (math.log(p / (1 - p)) <= head.strange_odds)
