"""`max_error` on fits, not on drawn logits: of made-up embeddings with and without bursts, in many draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from iosr_fast import FewShotHead
from tests.conftest import unit_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*look like another one")]

CLASSES, WIDTH, IMAGES, BURST, TESTS, DRAWS, PROMISED = 8, 32, 24, 3, 100, 200, 0.1


def pictures(
    rng: np.random.Generator, means: np.ndarray, each: int, burst: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """`each` rows of each class: a mean, what the pictures of a burst share, and what is their own."""
    labels = np.repeat(np.arange(CLASSES), each)
    shared = np.repeat(rng.standard_normal((len(labels) // burst, WIDTH)), burst, axis=0)
    return means[labels] + (spread * shared + 0.6 * rng.standard_normal(shared.shape)) / WIDTH**0.5, labels


def promises(burst: int, draws: int, look_alikes: bool = True) -> tuple[int, float]:
    """Draws in which more than the promised share of accepted labels is wrong, of new pictures, each of a burst of its
    own; and the share of pictures whose label is accepted."""
    broken, shares, spread = 0, [], 1.7 if burst > 1 else 1.4
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        means = unit_rows(rng, CLASSES, WIDTH)
        head = FewShotHead(look_alikes=look_alikes).fit(*pictures(rng, means, IMAGES, burst, spread))
        rows, labels = pictures(rng, means, TESTS, 1, spread)
        given = head.predict(rows, max_error=PROMISED)
        accepted = given != np.array(None)
        wrong = int((given != labels)[accepted].sum())
        broken += wrong > 0 and binom.sf(wrong - 1, accepted.sum(), PROMISED) < 0.05
        shares.append(accepted.mean())
    return broken, float(np.mean(shares))


@pytest.mark.parametrize("burst", [1, BURST])
def test_a_promise_is_broken_in_no_more_draws_than_its_confidence_allows(burst: int) -> None:
    broken, share = promises(burst, DRAWS)
    assert broken <= binom.ppf(0.95, DRAWS, 0.05) and share > 0.07, (broken, share)


def test_bursts_break_promises_that_rest_on_single_pictures() -> None:
    broken, share = promises(BURST, DRAWS // 5, look_alikes=False)
    assert broken > DRAWS // 10 and share > 0.5, (broken, share)


def test_look_alikes_cost_independent_pictures_few_accepted_labels() -> None:
    together, alone = (promises(1, DRAWS // 5, look_alikes)[1] for look_alikes in (True, False))
    assert together > 0.85 * alone > 0.3, (together, alone)
