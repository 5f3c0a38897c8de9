"""States: what they say after any run of changes, what they share, and that none is ever written to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.examples import absorb
from iosr_fast.head.head import SMALL, Head
from iosr_fast.head.predictions import predict
from iosr_fast.head.segmented import SegmentedPlan
from iosr_fast.methods import METHODS
from iosr_fast.scoring import reference
from iosr_fast.scoring.plan import ScoringPlan
from iosr_fast.store.head_files import fingerprint
from tests.store.live_parts import random_examples, random_queries, random_state, unit

# How far scores of narrow keys may be from the truth, of the largest logit.
NARROW = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2, "int8": 3e-2}


def change(head: Head, rng: np.random.Generator) -> Head:
    """One change drawn at random, that the head can take."""
    uids = list(head.uids)
    kind = rng.choice(["examples", "class", "drop", "drop class", "rename"])
    if kind == "examples":
        owner = int(rng.choice(uids))
        return head.adding(random_examples(rng, [owner] * int(rng.integers(1, 5)), head.next_example))
    if kind == "class":
        added = random_examples(rng, [head.next_class] * int(rng.integers(1, 4)), head.next_example)
        return head.adding_class(
            f"later {head.next_class}", unit(rng.standard_normal(added.embeddings.plain.shape[1])), added
        )
    if kind == "rename":
        return head.renaming(int(rng.choice(uids)), f"renamed {head.version}", unit(rng.standard_normal(24)))
    if kind == "drop class" and len(uids) > 3:
        return head.removing_class(int(rng.choice(uids)))
    crowded = [info for info in head.classes() if info.examples > 1]
    if not crowded:
        return head
    uid = int(rng.choice([int(info.class_id[1:]) for info in crowded]))
    ids = np.concatenate([part.ids[(part.class_ids == uid) & part.active] for part in head.segments])
    return head.removing([int(rng.choice(ids))])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize(("method", "reducer"), [("tip-adapter", "none"), ("tip-adapter++", "centre")])
def test_additive_methods_after_many_changes(method: str, reducer: str, precision: str, monkeypatch) -> None:
    monkeypatch.setattr("iosr_fast.head.head.SMALL", 8)  # several runs from the start
    rng = np.random.default_rng(3)
    head = random_state(rng, 6, 5, method, {"alpha": 1.5, "beta": 4.0}, reducer, precision)
    queries, kept = random_queries(rng, 7), []
    kinds = set()
    for _ in range(60):
        logits = head.score(queries)
        kept.append((head, logits))
        kinds.add(type(head.plan))
        truth = reference.score_reference(truth_plan(head), queries)
        assert np.abs(logits - truth).max() <= NARROW[precision] * np.abs(truth).max()
        head = change(head, rng)
    assert kinds == {ScoringPlan, SegmentedPlan}
    for old, logits in kept:  # nobody wrote to what they were made of
        np.testing.assert_array_equal(old.score(queries), logits)


def truth_plan(head: Head) -> ScoringPlan:
    """The head's plan made from nothing, in fp32."""
    return replace(head.config, key_precision="fp32").compile(head.support)


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("tip-adapter")])
def test_other_methods_are_fit_again(method: str) -> None:
    rng = np.random.default_rng(4)
    head = random_state(rng, 5, 4, method)
    queries = random_queries(rng, 5)
    for _ in range(15):
        truth = reference.score_reference(truth_plan(head), queries)
        np.testing.assert_allclose(head.score(queries), truth, atol=2e-5 * np.abs(truth).max())
        head = change(head, rng)


def test_adding_shares_what_is_there() -> None:
    """The cost of a change is of what it adds, and a weight for each image: no row and no key of the others is copied
    or looked at."""
    rng = np.random.default_rng(0)
    head = random_state(rng, 10, SMALL // 5)
    base, part = head.segments[0], head.parts[0]
    after = head.adding(random_examples(rng, [3, 3], head.next_example))
    after = after.adding_class("new", unit(rng.standard_normal(24)), random_examples(rng, [10], after.next_example))
    assert after.segments[0] is base and after.parts[0].keys is part.keys and len(after.segments) == 2
    assert len(after.segments[1]) == 3 and after.class_names[-1] == "new"
    fewer = after.removing([int(base.ids[0])])
    assert np.shares_memory(fewer.segments[0].embeddings.plain, base.embeddings.plain)
    assert np.shares_memory(fewer.parts[0].keys, part.keys) and fewer.parts[0].weights[0] == 0
    assert fewer.parts[1].keys is after.parts[1].keys
    gone = fewer.removing_class(3)
    assert np.shares_memory(gone.segments[0].embeddings.plain, base.embeddings.plain)
    assert gone.score(random_queries(rng, 2)).shape == (2, 10)


def test_a_run_is_copied_once_half_of_it_is_gone() -> None:
    rng = np.random.default_rng(0)
    head = random_state(rng, 4, SMALL)
    for uid in (0, 1):
        head = head.removing_class(uid)
        rows = len(head.segments[0])
    assert rows == 2 * SMALL and head.segments[0].removed is None
    truth = reference.score_reference(truth_plan(head), queries := random_queries(rng, 3))
    np.testing.assert_allclose(head.score(queries), truth, atol=1e-4)


def test_runs_stay_few_and_each_row_is_copied_few_times() -> None:
    rng = np.random.default_rng(0)
    segments, copied = (random_examples(rng, [0] * 64, 0),), 0
    for i in range(2000):
        before = {id(part.ids) for part in segments}
        segments = absorb((*segments, random_examples(rng, [0], 64 + i)), small=16)
        copied += sum(len(part) for part in segments if id(part.ids) not in before)
    assert sum(map(len, segments)) == 2064 and len(segments) <= 2 + np.log2(2064 / 16)
    # Up to `small` rows a change, and log2 of the number of runs for each row above that.
    assert copied <= 2000 * (16 + np.log2(2064))


def test_what_is_near_is_what_the_method_compares() -> None:
    rng = np.random.default_rng(1)
    head = random_state(rng, 5, SMALL // 4, reducer="centre")
    head = head.adding(random_examples(rng, [2] * 5, head.next_example)).removing([0, 1, 2])
    queries = random_queries(rng, 4)
    rows = head.config.reducer(np.asarray(head.support.embeddings.adapted))
    cosines = head.config.reducer(queries.adapted) @ rows.T
    ids, class_ids = head.examples.ids, head.examples.class_ids
    for made, row in zip(predict(head, queries, nearest=6), cosines, strict=True):
        best = np.argsort(-row, kind="stable")[:6]
        assert [n.example_id for n in made.nearest] == [f"e{ids[j]}" for j in best]
        assert [n.class_id for n in made.nearest] == [f"~{class_ids[j]}" for j in best]
        np.testing.assert_allclose([n.similarity for n in made.nearest], row[best], atol=1e-6)


@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("method", ["zero-shot", "tip-adapter", "gda++", "tip-x", "proker++", "stack++"])
def test_predictions_add_up(method: str, classes: int) -> None:
    rng = np.random.default_rng(2)
    head = random_state(rng, classes, 2, method)
    queries = random_queries(rng, 9)
    logits = head.score(queries)
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    zero_shot = 0.7 * 20.0 * queries.plain.astype(np.float64) @ head.text.T
    for b, made in enumerate(predict(head, queries, top=4)):
        order = np.argsort(-logits[b], kind="stable")[: min(4, classes)]
        assert [one.label for one in made.top] == [f"class {c}" for c in order]
        assert made.top[0].label == made.label == f"class {logits[b].argmax()}" and made.version == head.version
        assert (made.logit, made.cache, made.nearest) == (made.top[0].logit, made.top[0].cache, ())
        for one, c in zip(made.top, order, strict=True):
            assert one.probability == pytest.approx(probabilities[b, c], abs=1e-5)
            assert one.zero_shot == pytest.approx(zero_shot[b, c], abs=1e-4)
            assert one.zero_shot + one.cache == pytest.approx(one.logit, abs=1e-4) == logits[b, c]
            assert method in MIXED or one.adapter == (one.cache if method.endswith("++") else 0.0)
    if method == "zero-shot":
        assert max(abs(one.cache) for made in predict(head, queries) for one in made.top) < 1e-5
    with pytest.raises(ValueError, match="expected top of at least 1, got 0"):
        predict(head, queries, top=0)


MIXED = ("tip-x++", "stack++")  # methods that read both embeddings of support images
PLAIN_KEYS = {"adapted_keys": 0.0}
ONE_HALF = {"adapted_keys": 0.0, "discriminant": 0.0}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("tip-x++", {}), ("stack++", {}), ("stack++", PLAIN_KEYS), ("stack++", ONE_HALF), ("stack", {}), ("ape++", {})],
)
def test_the_adapter_contributes_what_another_adapted_embedding_changes(
    method: str, parameters: dict[str, float]
) -> None:
    rng = np.random.default_rng(5)
    head = random_state(rng, 5, 4, method, parameters)
    queries, others = random_queries(rng, 6), random_queries(rng, 6)
    changed = Embeddings(queries.plain, others.adapted)
    logits = head.score(queries) - head.score(changed)
    parts = [
        {(b, s.label): s for b, one in enumerate(predict(head, x, top=5)) for s in one.top} for x in (queries, changed)
    ]
    for (b, label), score in parts[0].items():
        change = score.adapter - parts[1][b, label].adapter
        assert change == pytest.approx(logits[b, head.class_names.index(label)], abs=1e-4)
    assert (max(abs(score.adapter) for score in parts[0].values()) > 0.01) is method.endswith("++")


@pytest.mark.parametrize(("adapted_keys", "text_images"), [(0.0, 0.0), (1.0, 0.0), (0.0, 2.0)])
def test_the_bias_of_a_stack_is_divided_between_its_halves(adapted_keys: float, text_images: float) -> None:
    rng = np.random.default_rng(6)
    head = random_state(rng, 4, 3, "stack++", {"adapted_keys": adapted_keys, "text_images": text_images})
    head = head.removing([0, 1, 2])  # a class without images
    plain_parts = {"text": 0.0, "discriminant": 0.0} | (
        {} if adapted_keys else {"regression": 0.0, "text_regression": 0.0}
    )
    alone = replace(head.config, parameters={**head.config.parameters, **plain_parts}).compile(head.support)
    expected = reference.score_reference(alone, queries := random_queries(rng, 5))
    for b, one in enumerate(predict(head, queries, top=4)):
        for score in one.top:
            assert score.adapter == pytest.approx(expected[b, head.class_names.index(score.label)], abs=1e-4)


@pytest.mark.parametrize("method", ["gda", "gda++"])
def test_gda_looks_at_no_image_twice(method: str, monkeypatch) -> None:
    rng = np.random.default_rng(7)
    head = random_state(rng, 5, 30, method, reducer="centre").adding(random_examples(rng, [2], 150))
    monkeypatch.setattr(Head, "support", property(lambda _: pytest.fail("all images were gathered")))
    looked = []
    rows = Head._rows
    monkeypatch.setattr(Head, "_rows", lambda self, examples: looked.append(len(examples)) or rows(self, examples))
    head = head.adding(random_examples(rng, [1, 1], 151)).removing([0, 40])
    head = head.adding_class("new", unit(rng.standard_normal(24)), random_examples(rng, [5] * 3, 153))
    head.removing_class(5)
    assert looked == [2, 2, 3, 3]
    monkeypatch.undo()
    truth = reference.score_reference(truth_plan(head), queries := random_queries(rng, 5))
    np.testing.assert_allclose(head.score(queries), truth, atol=1e-5 * np.abs(truth).max())


def test_changes_that_a_method_can_not_take(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    head = random_state(rng, 3, 1, "gda")
    with pytest.raises(ValueError, match="gda needs an image of each class, 1 have none"):
        head.removing([0])
    head = random_state(rng, 3, 1)
    with pytest.raises(ValueError, match="expected to keep at least one, got none left"):
        head.removing([0, 1, 2])
    assert head.removing([0, 1]).classes()[0].examples == 0
    monkeypatch.setitem(METHODS, "proker", replace(METHODS["proker"], max_support=4))
    head = random_state(rng, 2, 2, "proker")
    with pytest.raises(ValueError, match="at most 4 support images, got 5"):
        head.adding(random_examples(rng, [1], 4))


def test_the_fingerprint_says_whether_two_states_answer_alike() -> None:
    def made() -> Head:
        return random_state(np.random.default_rng(0), 4, 2)

    head, same = made(), made()
    assert fingerprint(head) == fingerprint(same)
    rng = np.random.default_rng(1)
    added = random_examples(rng, [1], 8)
    others = [
        head.adding(added),
        head.renaming(1, "other", None),
        head.removing([3]),
        head.removing_class(2),
        random_state(np.random.default_rng(0), 4, 2, parameters={"alpha": 1.01}),
        random_state(np.random.default_rng(0), 4, 2, reducer="centre"),
        random_state(np.random.default_rng(1), 4, 2),
    ]
    assert len({fingerprint(head), *(fingerprint(other) for other in others)}) == 1 + len(others)
