"""Support images: columns of pictures stay together, whatever labels these have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.examples import COLUMNS, Examples
from iosr_fast.methods.support_set import make_support_set

UIDS = [2, 5, 9]


def labelled(seed: int, first: int, n: int = 6, several: bool = True) -> Examples:
    """Images of random numbers, with any number of labels or one."""
    rng = np.random.default_rng(seed)
    plain, adapted, query = (rng.standard_normal((n, 4)).astype(np.float32) for _ in range(3))
    pictures, paths = (tuple(f"{name} {first + i}" for i in range(n)) for name in ("picture", "path"))
    rows = Embeddings(plain, adapted), np.sort(rng.choice(UIDS, n)), np.arange(first, first + n)
    made = Examples(*rows, tuple(map(str.encode, pictures)), Embeddings(query), rng.integers(0, 3, n), paths)
    return made.labelled(rng.random((n, 3)) < 0.5, UIDS) if several else made


def shown(examples: Examples) -> dict[int, tuple[object, ...]]:
    """What is kept of each image, by its number, and its labels."""
    classes = [{uid for uid in UIDS if i in examples.rows_of(uid)} for i in range(len(examples))]
    columns = examples.embeddings.plain, examples.embeddings.adapted, examples.queries.plain
    rows = zip(*(column.tolist() for column in columns), examples.pictures, examples.paths, classes, strict=True)
    return dict(zip(examples.ids.tolist(), rows, strict=True))


@pytest.mark.parametrize("several", [False, True])
def test_images_that_are_chosen_or_joined_keep_their_columns_and_labels(several: bool) -> None:
    first, added = labelled(0, 0, several=several), labelled(1, 20, several=several)
    for chosen in (np.array([4, 0, 3]), np.arange(6) % 2 == 0):
        kept = first.rows(chosen)
        assert shown(kept) == {number: shown(first)[number] for number in first.ids[chosen].tolist()}
    both = first.joined(added)
    assert shown(both) == shown(first) | shown(added) and both.class_ids.tolist() == sorted(both.class_ids)
    groups = dict(zip(both.ids.tolist(), both.groups.tolist(), strict=True))
    for one in (first, added):
        for a, b in np.ndindex(6, 6):
            assert (groups[one.ids[a]] == groups[one.ids[b]]) == (one.groups[a] == one.groups[b])
    assert not {groups[number] for number in first.ids} & {groups[number] for number in added.ids}
    assert {*COLUMNS} == vars(first).keys() - {"class_ids", "owners"}


def test_an_image_with_one_label_joins_images_with_several() -> None:
    first, added = labelled(0, 0), labelled(1, 20, several=False)
    both = first.joined(replace(added, queries=None, paths=()))
    assert both.paths == (*first.paths, *[None] * 6)
    assert (both.queries.plain == np.vstack([first.queries.plain, added.embeddings.plain])).all()
    of_added = both.rows(np.arange(6, 12))
    assert [of_added.rows_of(uid).tolist() for uid in UIDS] == [added.rows_of(uid).tolist() for uid in UIDS]


@pytest.mark.parametrize("make", [lambda n: np.zeros((n, 3), bool), lambda n: np.arange(3 * n).reshape(n, 3) % 4 < 2])
def test_a_support_set_has_the_labels_of_the_indicator(make: Callable[[int], np.ndarray]) -> None:
    examples = labelled(0, 0).labelled(make(6), UIDS)
    support = examples.as_support(UIDS, None, 20.0)
    expected = make_support_set(examples.embeddings, make(6), None, 20.0)
    assert (support.indicator == make(6)).all() and (support.class_offsets == expected.class_offsets).all()
    assert (support.owners == expected.owners).all() and support.counts.tolist() == make(6).sum(0).tolist()
