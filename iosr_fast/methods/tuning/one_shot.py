"""Parameters where each class has one image: nothing can be left out, so how far texts are right has to tell."""

from __future__ import annotations

import numpy as np

from iosr_fast.methods import METHODS
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuning.held_out import logits_of, validation
from iosr_fast.methods.tuning.log_loss import MOST, spread
from iosr_fast.scoring.reducers import Reducer


def one_shot_parameters(method: str, support: SupportSet, reducer: Reducer | None) -> dict[str, float]:
    """The method's defaults, with alpha such that images weigh against texts as texts are wrong against right.

    With a the zero-shot accuracy on the support images (at least one, at most all but one counted right):

        alpha = (1 - a) / a * spread(zero-shot logits) / spread(the term that alpha multiplies)

    where spread is the mean over the images of the standard deviation over the other classes; where either is no more
    than rounding (with two classes there is one other) alpha stays the default. ProKeR's closed form has a weight of
    its own, so alpha stays 1 there and ridge = 3 a^2. A rule of thumb: nothing is fitted.
    """
    made = METHODS[method]
    parameters = dict(made.parameters)
    if support.text is None:
        return parameters
    n_images = len(support.embeddings)
    setting = {name: value for name, value in parameters.items() if name != "alpha"}
    held = validation(support, support.queries or support.embeddings, support.labels)
    right = int((logits_of(held, "zero-shot", None, {})[0].argmax(1) == support.labels).sum())
    share = min(max(right, 1), max(n_images - 1, 1)) / n_images
    if "ridge" in parameters:
        return {**parameters, "ridge": 3.0 * share**2}
    base, slope = logits_of(held, method, reducer, setting)
    # A query that is its own key would see itself: its own class is left out of both spreads.
    keep = np.arange(support.n_classes)[None, :] != support.labels[:, None]
    others = [part[keep].reshape(len(part), -1) for part in (base, slope)]
    if not all(spread(part) for part in others):
        return parameters
    spreads = [float(np.std(part, axis=1).mean()) for part in others]
    return {**parameters, "alpha": min((1 - share) / share * spreads[0] / spreads[1], MOST)}
