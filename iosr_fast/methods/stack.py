"""The stack, the default method: a weighted sum of texts, Gaussian discriminants and kernel ridge regression."""

from __future__ import annotations

from collections.abc import Mapping

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.models.gaussian import GaussianModel
from iosr_fast.methods.models.model import Model, Term, TextModel
from iosr_fast.methods.models.ridge import RidgeModel
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.plan import Which
from iosr_fast.scoring.reducers import Reducer

# The (N, N) system takes minutes beyond this number of support images.
MAX_KEYS = 8192
PARAMETERS = {
    "text": 1.0,
    "discriminant": 0.03,
    "regression": 5.0,
    "text_regression": 5.0,
    "beta": 1.0,
    "ridge": 0.1,
    "text_images": 0.0,
}
ADAPTED_PARAMETERS = {"discriminant_adapted": 0.03, "adapted_keys": 1.0}
DISCRIMINANTS: dict[Which, str] = {"plain": "discriminant", "adapted": "discriminant_adapted"}


def stack_models(support: SupportSet, parameters: Mapping[str, float]) -> dict[str, Model]:
    """The models of a stack, by the parameter that weighs each:

        text                  tau <plain, text>
        discriminant          G of plain embeddings (models.gaussian), with `text_images` copies of each class's text
        discriminant_adapted  the same of adapted ones
        regression            kernel ridge regression (models.ridge, `beta`, `ridge`) of the one-hot labels, on the
                              plain embeddings, or with adapted_keys = 1 the adapted ones
        text_regression       the same of the zero-shot cosines, negated

    With regression = text_regression the last two are ProKeR's. Without text the text terms are left out.

    Sources: GDA (Wang et al., ICLR 2024), with texts as TIMO takes them (Li et al., AAAI 2025), and ProKeR (Bendou et
    al., CVPR 2025); the sum is stacked generalisation (Wolpert, 1992; Breiman, 1996).
    """
    has_text, copies = support.text is not None, parameters.get("text_images", 0.0)
    models: dict[str, Model] = {"text": TextModel(support)} if has_text else {}
    models |= {
        name: GaussianModel(support, which, copies=copies)
        for which, name in DISCRIMINANTS.items()
        if which == "plain" or support.embeddings.adapted is not None
    }
    keys: Which = "adapted" if parameters.get("adapted_keys") else "plain"
    regression = RidgeModel(support, keys, None, parameters["beta"], parameters["ridge"], labels=1.0, texts=0.0)
    models["regression"] = regression
    return {**models, "text_regression": regression.of(labels=0.0, texts=1.0)} if has_text else models


def stack_terms(support: SupportSet, _: Which, __: Reducer | None, parameters: Mapping[str, float]) -> list[Term]:
    """Method.terms of the stack: its models with weights above 0, which are its parameters. Raises IosrFastError if all
    are 0, and for too many support images."""
    models = stack_models(support, parameters)
    used = {name: weight for name in models if (weight := parameters.get(name, 0.0)) > 0}
    if not used:
        raise IosrFastError("expected at least one weight of the stack above 0, got none")
    if len(support.embeddings) > MAX_KEYS and {"regression", "text_regression"} & set(used):
        raise IosrFastError(
            f"the stack's regression: expected at most {MAX_KEYS} support images, got {len(support.embeddings)}; tune "
            "the classifier again, which leaves the regression out, or choose another method"
        )
    return [(weight, models[name]) for name, weight in used.items()]


def describe_shares(shares: Mapping[str, float]) -> str:
    """Choice.shares in words, without a part that a classifier does not have.

    >>> describe_shares({"text": 0.25, "pictures": 0.75, "adapter": 0.0})
    'texts 25%, pictures 75%'
    """
    words = {"text": "texts", "pictures": "pictures", "adapter": "adapter"}
    return ", ".join(f"{words[name]} {share:.0%}" for name, share in shares.items() if share > 0)
