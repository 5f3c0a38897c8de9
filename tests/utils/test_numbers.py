"""Whole numbers and masked arrays of callers: each is checked before any work, with an error of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from iosr_fast import Classifier, FewShotHead, IosrFastError
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.head.verdict import check_abstention
from iosr_fast.images.geometry import Geometry
from iosr_fast.images.preprocess import as_image_list, to_pixels
from iosr_fast.methods.suggest import suggest
from iosr_fast.serving.batching.item import Query
from iosr_fast.utils.numbers import check_integer

PIXELS = np.zeros((8, 8, 3), np.uint8)
ROWS = np.eye(4)
LABELS = ["a", "a", "b", "b"]


def fitted_head() -> FewShotHead:
    return FewShotHead("gda").fit(ROWS, LABELS)


CALLS: dict[str, Callable[[Any], Any]] = {
    "thumbnails": lambda value: Classifier("demo", thumbnails=value).fit([PIXELS, PIXELS], ["a", "b"]),
    "n": lambda value: Classifier("demo").suggest("nowhere", value),
    "n of a head": lambda value: fitted_head().suggest(ROWS, value),
    "n of rows": lambda value: suggest(ROWS, value),
    "top": lambda value: Classifier("demo").explain(PIXELS, top=value),
    "nearest": lambda value: Classifier("demo").explain(PIXELS, nearest=value),
    "top of a request": lambda value: Query(top=value),
    "nearest of a request": lambda value: Query(nearest=value),
    "threads": lambda value: open_engine("nowhere", threads=value),
    "runs": lambda value: open_engine("nowhere", runs=value),
}


@pytest.mark.parametrize("wrong", [2.5, "2", True, np.float64(2), -1, 2**70])
@pytest.mark.parametrize("name", [*CALLS])
def test_what_is_no_whole_number_in_range_is_refused_by_name(name: str, wrong: Any) -> None:
    with pytest.raises(IosrFastError, match=f"expected {name.split()[0]} (to be a whole number|of at least|from)"):
        CALLS[name](wrong)


def test_integers_of_all_types_are_taken() -> None:
    assert [check_integer("n", value, 1, 9) for value in (3, np.uint8(3), np.int64(3), np.array(3))] == [3] * 4


@pytest.mark.parametrize("name", ["tune_seconds", "alpha"])
@pytest.mark.parametrize("wrong", ["much", [1], pytest.param(10**400, id="huge")])
def test_what_is_no_number_is_refused_by_name(name: str, wrong: Any) -> None:
    head = FewShotHead("tip-adapter", **{name: wrong})
    with pytest.raises(IosrFastError, match=f"expected {name}( of tip-adapter)? to be a number, got"):
        head.fit(ROWS, LABELS)


MASKED = np.ma.masked_array(ROWS, mask=[[False] * 4] * 3 + [[True] * 4])
MASKED_PIXELS = np.ma.masked_array(PIXELS, mask=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: FewShotHead("gda").fit(MASKED, LABELS),
        lambda: FewShotHead("gda").fit(np.ma.masked_all((4, 4)), LABELS),
        lambda: FewShotHead("gda").fit(ROWS, np.ma.masked_array([0, 0, 1, 1], mask=[1, 0, 0, 0])),
        lambda: FewShotHead().fit(ROWS, np.ma.masked_array([[0, 1]] * 4, mask=True)),
        lambda: FewShotHead("tip-adapter", text=np.ma.masked_all((2, 4))).fit(ROWS, LABELS),
        lambda: fitted_head().predict(MASKED),
        lambda: to_pixels(MASKED_PIXELS, Geometry(8)),
        lambda: to_pixels(MASKED_PIXELS[None], Geometry(8)),
        lambda: to_pixels([PIXELS, MASKED_PIXELS], Geometry(8)),
        lambda: as_image_list(MASKED_PIXELS[None]),
    ],
)
def test_masked_values_are_not_taken_for_numbers(call: Callable[[], Any]) -> None:
    with pytest.raises(IosrFastError, match="without masked values, got"):
        call()


def test_a_mask_that_hides_nothing_is_taken() -> None:
    head = FewShotHead("gda").fit(np.ma.masked_array(ROWS), LABELS)
    assert head.predict(np.ma.masked_array(ROWS)).tolist() == LABELS
    assert to_pixels(np.ma.masked_array(PIXELS), Geometry(8)).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("label", ["", "  ", "a\x1b[31mb", "a\nb", "~7"])
def test_a_label_of_unknown_pictures_is_a_name(label: str) -> None:
    with pytest.raises(IosrFastError, match="expected a label for unknown pictures, got"):
        check_abstention("reject", label, 0.95)
