"""Heads: what they answer after any run of changes, how predictions add up, and which changes are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs

from iosr_fast.head.head import Head
from iosr_fast.head.predictions import predict
from iosr_fast.methods import METHODS
from iosr_fast.scoring.reference import score_reference, softmax
from iosr_fast.store.changes import AddClass, AddExamples, RemoveClass, RemoveExamples, RenameClass, Retune
from tests.store.live_parts import random_examples, random_head, random_queries, unit


def without(head: Head, *numbers: int) -> Head:
    """The head without these support images."""
    return RemoveExamples(numbers).apply(head)


def change(head: Head, rng: np.random.Generator) -> Head:
    """One change drawn at random, that the head can take."""
    uid = int(rng.choice(head.uids))
    kind = rng.choice(["examples", "class", "drop", "drop class", "rename"])
    if kind == "examples":
        added = random_examples(rng, [uid] * int(rng.integers(1, 5)), head.next_example)
        return AddExamples.of(uid, added).apply(head)
    if kind == "class":
        added = random_examples(rng, [head.next_class] * int(rng.integers(1, 4)), head.next_example)
        text = unit(rng.standard_normal(24))
        return AddClass.of(head.next_class, added, text, name=f"later {head.next_class}").apply(head)
    if kind == "rename":
        return RenameClass.of(uid, f"renamed {head.version}", unit(rng.standard_normal(24))).apply(head)
    if kind == "drop class" and len(head.uids) > 3:
        return RemoveClass(uid).apply(head)
    numbers = head.examples_of(uid)
    return without(head, *numbers[:1]) if len(numbers) > 1 else head


@pytest.mark.parametrize("method", list(METHODS))
def test_a_head_after_many_changes_equals_one_made_of_its_data(method: str) -> None:
    rng = np.random.default_rng(4)
    head, queries, kept = random_head(rng, 5, 4, method), random_queries(rng, 5), []
    for _ in range(12):
        logits = head.score(queries)
        kept.append((head, logits))
        again = Head.first(head.class_names, head.text, head.tau, head.examples, head.config)
        np.testing.assert_array_equal(replace(again, uids=head.uids).score(queries), logits)
        assert head.examples.class_ids.tolist() == sorted(head.examples.class_ids)
        assert [len(head.examples_of(uid)) for uid in head.uids] == head.counts.tolist()
        head = change(head, rng)
    for old, logits in kept:  # changes write to no head
        np.testing.assert_array_equal(old.score(queries), logits)


def test_a_change_compiles_no_plan_and_a_new_name_alone_keeps_it() -> None:
    rng = np.random.default_rng(0)
    head = random_head(rng, 3, 2).compiled()
    assert RenameClass.of(1, "other").apply(head).computed("plan") is head.plan
    renamed, retuned = RenameClass.of(1, "other", head.text[1]), Retune.of(head.config)
    for after in (renamed.apply(head), retuned.apply(head), without(head, 0)):
        assert after.computed("plan") is None and after.version == head.version + 1


def test_the_nearest_are_found_by_what_the_method_compares() -> None:
    rng = np.random.default_rng(1)
    head = random_head(rng, 5, 20, reducer="centre")
    added = random_examples(rng, [2] * 5, head.next_example)
    head = without(AddExamples.of(2, added).apply(head), 0, 1, 2)
    queries = random_queries(rng, 4)
    cosines = head.reducer(queries.adapted) @ head.reducer(head.support.embeddings.adapted).T
    ids, class_ids = head.examples.ids, head.examples.class_ids
    for made, row in zip(predict(head, queries, nearest=6), cosines, strict=True):
        best = np.argsort(-row, kind="stable")[:6]
        assert [n.example_id for n in made.nearest] == [f"e{ids[j]}" for j in best]
        assert [n.class_id for n in made.nearest] == [f"~{class_ids[j]}" for j in best]
        np.testing.assert_allclose([n.similarity for n in made.nearest], row[best], atol=1e-6)
    assert len(predict(head, queries, nearest=200)[0].nearest) == 102


@pytest.mark.parametrize(("method", "classes"), [("zero-shot", 3), ("gda++", 300), ("tip-x", 3), ("stack++", 300)])
def test_predictions_add_up(method: str, classes: int) -> None:
    rng = np.random.default_rng(2)
    head, queries = random_head(rng, classes, 2, method), random_queries(rng, 9)
    logits = head.score(queries)
    probabilities = softmax(logits.astype(np.float64) / head.temperature)
    zero_shot = 0.7 * 20.0 * queries.plain.astype(np.float64) @ head.text.T
    for b, made in enumerate(predict(head, queries, top=4)):
        order = np.argsort(-logits[b], kind="stable")[: min(4, classes)]
        assert [one.label for one in made.top] == [f"class {c}" for c in order]
        assert made.label == made.top[0].label and made.version == head.version
        assert (made.logit, made.cache, made.nearest) == (made.top[0].logit, made.top[0].cache, ())
        for one, c in zip(made.top, order, strict=True):
            assert one.probability == pytest.approx(probabilities[b, c], abs=1e-5)
            assert one.zero_shot == pytest.approx(zero_shot[b, c], abs=1e-4)
            assert one.zero_shot + one.cache == pytest.approx(one.logit, abs=1e-4) == logits[b, c]
            assert method == "stack++" or one.adapter == (one.cache if method.endswith("++") else 0.0)
    with pytest.raises(ValueError, match="expected top of at least 1, got 0"):
        predict(head, queries, top=0)


@pytest.mark.parametrize("parameters", [{}, {"adapted_keys": 0.0}, {"adapted_keys": 0.0, "text_images": 2.0}])
def test_the_adapter_contributes_what_the_adapted_parts_alone_would(parameters: dict[str, float]) -> None:
    rng = np.random.default_rng(6)
    head = without(random_head(rng, 4, 3, "stack++", parameters), 0, 1, 2)  # a class without images
    plain = ["text", "discriminant", *(["regression", "text_regression"] if parameters else [])]
    given = {**head.config.parameters, **dict.fromkeys(plain, 0.0)}
    alone = structs.replace(head.config, parameters=given).compile(head.support)
    expected = score_reference(alone, queries := random_queries(rng, 5))
    for b, one in enumerate(predict(head, queries, top=4)):
        for score in one.top:
            assert score.adapter == pytest.approx(expected[b, head.class_names.index(score.label)], abs=1e-4)
