"""The methods of the literature, and the stack, as sums of terms: METHODS, by name.

"X++" compares adapted embeddings where X compares plain ones (Kravets & Namboodiri, BMVC 2024). Every method but
"stack" and "zero-shot" has logits of the form base + alpha * images: its last term is the one that alpha multiplies.
Each model has its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.log_loss import MAX_ALPHA
from iosr_fast.methods.models.gaussian import CentredGaussianModel, GaussianModel
from iosr_fast.methods.models.keys import DivergenceModel, KeyModel, RefinedKeyModel
from iosr_fast.methods.models.model import Model, Term, TextModel, join_terms
from iosr_fast.methods.models.ridge import CentredRidgeModel, RidgeModel
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.scoring.fields import RANGES
from iosr_fast.scoring.plan import ScoringPlan, Which
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.validation import check_number

# Within these ranges a plan's float32 logits are usable (scoring.fields.RANGES has those of a plan).
PARAMETER_RANGES = {
    **dict.fromkeys(
        ("alpha", "text", "discriminant", "discriminant_adapted", "regression", "text_regression"), (0.0, MAX_ALPHA)
    ),
    "beta": RANGES["beta"],
    "gamma": (0.0, 1000.0),
    "ridge": (1e-6, 1e6),
    "text_images": (0.0, 1000.0),
    "adapted_keys": (0.0, 1.0),
}
# The grid of the paper's public code, and larger values; an exact search over these is never worse than that grid.
_BETAS = (*np.linspace(0.0, 20.0, 20).tolist(), 27.0, 40.0, 60.0)
# The (N, N) system takes minutes beyond this number of support images.
MAX_KEYS = 8192
_STACK = {
    "text": 1.0,
    "discriminant": 0.03,
    "regression": 5.0,
    "text_regression": 5.0,
    "beta": 1.0,
    "ridge": 0.1,
    "text_images": 0.0,
}
_STACK_ADAPTED = {"discriminant_adapted": 0.03, "adapted_keys": 1.0}
DISCRIMINANTS: dict[Which, str] = {"plain": "discriminant", "adapted": "discriminant_adapted"}


@dataclass(frozen=True)
class Method:
    """A training-free method.

    formula      (support, which, reducer, parameters) -> its weighted terms: those beside tau <plain, text>, of a stack
                 all
    is_stack     whether its weights are fitted together, without an alpha and without a reducer
    which        the embeddings of images that it compares
    parameters   names and default values
    axes         for each parameter but alpha, the first values of a search, rising
    max_support  the largest number of support images, if there is a limit; of a stack that of its regressions
    """

    name: str
    formula: Callable[[SupportSet, Which, Reducer | None, Mapping[str, float]], list[Term]]
    parameters: Mapping[str, float] = field(default_factory=dict)
    axes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    which: Which = "plain"
    is_stack: bool = False
    needs_text: bool = False
    needs_support: bool = True
    needs_every_class: bool = False
    max_support: int | None = None

    @property
    def needs_adapter(self) -> bool:
        return self.which == "adapted"

    @property
    def takes_reducer(self) -> bool:
        """Whether a reducer may move what it compares."""
        return self.needs_support and not self.is_stack

    @property
    def takes_label_sets(self) -> bool:
        """Whether it learns from images with any number of labels; the other formulas have one label an image."""
        return self.is_stack or not self.needs_support

    def check(self, parameters: Mapping[str, float]) -> dict[str, float]:
        """The parameters, as floats. Raises IosrFastError for one that the method does not have, or out of range."""
        unknown = sorted(set(parameters) - set(self.parameters))
        if unknown:
            raise IosrFastError(f"{self.name} has the parameters {sorted(self.parameters)}, got {unknown}")
        fixes = {key: f"{self.parameters[key]:g} is the default" for key in parameters}
        return {
            key: check_number(f"{key} of {self.name}", value, *PARAMETER_RANGES[key], fixes[key])
            for key, value in parameters.items()
        }

    def terms(self, support: SupportSet, reducer: Reducer | None, parameters: Mapping[str, float]) -> list[Term]:
        """Its models and their weights, with all parameters."""
        terms = self.formula(support, self.which, reducer, parameters)
        return terms if self.is_stack else [(1.0, TextModel(support)), *terms]

    def compile(self, support: SupportSet, reducer: Reducer | None, parameters: Mapping[str, float]) -> ScoringPlan:
        """The plan of a support set, with all parameters."""
        terms = self.terms(support, reducer, parameters)
        return join_terms(support.n_classes, ((weight, model.fields()) for weight, model in terms))


def _tip_adapter(support: SupportSet, which: Which, reducer: Reducer | None, p: Mapping[str, float]) -> list[Term]:
    """tau <plain, text> + alpha * KeyModel, with the paper's alpha and beta for ImageNet as defaults."""
    return [(p["alpha"], KeyModel(support, which, reducer, p["beta"]))]


def _tip_x(support: SupportSet, which: Which, reducer: Reducer | None, p: Mapping[str, float]) -> list[Term]:
    """Tip-Adapter's + gamma * DivergenceModel."""
    return [(p["gamma"], DivergenceModel(support, which, reducer)), *_tip_adapter(support, which, reducer, p)]


def _ape(support: SupportSet, which: Which, reducer: Reducer | None, p: Mapping[str, float]) -> list[Term]:
    """tau <plain, text> + alpha * RefinedKeyModel."""
    return [(p["alpha"], RefinedKeyModel(support, which, reducer, p["beta"], gamma=p["gamma"]))]


def _gda(support: SupportSet, which: Which, reducer: Reducer | None, p: Mapping[str, float]) -> list[Term]:
    """tau <plain, text> + alpha * GaussianModel, but for log(1 / C), which all classes share."""
    return [(p["alpha"], GaussianModel(support, which, reducer, p.get("gamma", 0.0), paper=True))]


def _proker(support: SupportSet, which: Which, reducer: Reducer | None, p: Mapping[str, float]) -> list[Term]:
    """tau (<plain, text> + alpha * RidgeModel). alpha = 1 is the paper's closed form; the public code's solution is
    `ridge` times that, which alpha can express."""
    return [(p["alpha"] * support.tau, RidgeModel(support, which, reducer, p["beta"], p["ridge"]))]


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
    if support.owners is not None:
        return _label_set_models(support, parameters)
    has_text = support.text is not None
    copies = parameters.get("text_images", 0.0)
    models: dict[str, Model] = {"text": TextModel(support)} if has_text else {}
    models |= {
        name: GaussianModel(support, which, copies=copies)
        for which, name in DISCRIMINANTS.items()
        if which == "plain" or support.embeddings.adapted is not None
    }
    keys: Which = "adapted" if parameters.get("adapted_keys") else "plain"
    regression = RidgeModel(support, keys, None, parameters["beta"], parameters["ridge"], text_weight=0.0)
    system = regression.factorised
    models["regression"] = replace(regression, system=system)
    if has_text:
        models["text_regression"] = replace(regression, label_weight=0.0, text_weight=1.0, system=system)
    return models


def _label_set_models(support: SupportSet, parameters: Mapping[str, float]) -> dict[str, Model]:
    """Of images that may have several labels: each model compares the images of a class with all others."""
    models: dict[str, Model] = {} if support.text is None else {"text": TextModel(support)}
    for which, name in DISCRIMINANTS.items():
        if which == "plain" or support.embeddings.adapted is not None:
            models[name] = CentredGaussianModel(support, which)
    keys: Which = "adapted" if parameters.get("adapted_keys") else "plain"
    return models | {"regression": CentredRidgeModel(support, keys, None, parameters["beta"], parameters["ridge"])}


def _stack(support: SupportSet, _: Which, __: Reducer | None, parameters: Mapping[str, float]) -> list[Term]:
    """Its models with weights above 0, which are its parameters. Raises IosrFastError if all are 0."""
    models = stack_models(support, parameters)
    used = {name: weight for name in models if (weight := parameters.get(name, 0.0)) > 0}
    if not used:
        raise IosrFastError("expected at least one weight of the stack above 0, got none")
    return [(weight, models[name]) for name, weight in used.items()]


_SINGLE = (
    Method("zero-shot", lambda *_: [], needs_text=True, needs_support=False),  # TextModel alone
    Method("tip-adapter", _tip_adapter, parameters={"alpha": 1.0, "beta": 5.5}, axes={"beta": _BETAS}),
    Method(
        "tip-x",
        _tip_x,
        parameters={"alpha": 1.0, "beta": 5.5, "gamma": 1.0},
        axes={"beta": _BETAS, "gamma": np.linspace(0.0, 30.0, 50).tolist()},
        needs_text=True,
    ),
    # TIMO (Li et al., AAAI 2025) is GDA with `gamma` copies of each class's text among its images. The paper takes many
    # texts a class from a language model, weights them by matches (IGT), and adds the gamma best (TGI). With one text a
    # class IGT changes nothing, and gamma, a real number here, repeats this text.
    Method(
        "timo",
        _gda,
        parameters={"alpha": 0.1, "gamma": 1.0},
        axes={"gamma": (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)},
        needs_text=True,
        needs_every_class=True,
    ),
    Method(
        "ape",
        _ape,
        parameters={"alpha": 1.0, "beta": 5.5, "gamma": 0.1},
        axes={"beta": _BETAS, "gamma": (0.0, 0.1, 0.25, 0.5, 1.0)},
        needs_text=True,
    ),
    Method("gda", _gda, parameters={"alpha": 0.1}, needs_every_class=True),
    Method(
        "proker",
        _proker,
        parameters={"alpha": 1.0, "beta": 1.0, "ridge": 3.0},
        axes={"beta": (0.3, 1.0, 3.0, 10.0), "ridge": (0.003, 0.03, 0.3, 3.0)},
        max_support=MAX_KEYS,
    ),
    Method("stack", _stack, parameters=_STACK, is_stack=True, max_support=MAX_KEYS),
)


def _adapted(method: Method) -> Method:
    """The "++" form."""
    parameters = {**method.parameters, **(_STACK_ADAPTED if method.is_stack else {})}
    return replace(method, name=f"{method.name}++", which="adapted", parameters=parameters)


METHODS: dict[str, Method] = {
    form.name: form for method in _SINGLE for form in ([method, _adapted(method)] if method.needs_support else [method])
}
