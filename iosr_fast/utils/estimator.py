"""scikit-learn's estimator protocol in plain Python: nothing imports scikit-learn until scikit-learn asks for tags.

Source: https://scikit-learn.org/stable/developers/develop.html
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any, ClassVar, Self

from iosr_fast.exceptions import IosrFastError, NotFittedError


class Estimator:
    """A classifier of scikit-learn: the arguments of `__init__` are its parameters, stored unchanged in attributes.

    `_stored_as` names the attribute of a parameter that is not stored under its own name. What a fit computes is one
    immutable object, `_fit`. A copy shares it and the other attributes in `_shared`, which are immutable, too.
    """

    _stored_as: ClassVar[dict[str, str]] = {}
    _shared: ClassVar[tuple[str, ...]] = ("_fit",)
    _fit: Any = None

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {name: one.default for name, one in inspect.signature(cls).parameters.items()}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by their names. `deep` changes nothing: no parameter is an estimator."""
        return {name: getattr(self, self._stored_as.get(name, name)) for name in self._defaults()}

    def set_params(self, **parameters: Any) -> Self:
        """Set parameters; the next fit uses them, and what is fitted stays as it is.

        Raises IosrFastError for an unknown name, with nothing set.
        """
        valid = self._defaults()
        if unknown := [name for name in parameters if name not in valid]:
            raise IosrFastError(
                f"{type(self).__name__} has no parameter {', '.join(map(repr, unknown))}; it has {', '.join(valid)}"
            )
        for name, value in parameters.items():
            setattr(self, self._stored_as.get(name, name), value)
        return self

    def __repr__(self) -> str:
        defaults = self._defaults()
        changed = {name: value for name, value in self.get_params().items() if repr(value) != repr(defaults[name])}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def __sklearn_is_fitted__(self) -> bool:
        return self._fit is not None

    def __sklearn_tags__(self) -> Any:
        """A classifier of pictures: paths, arrays or other objects in one dimension, and not a matrix of features."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        inputs = InputTags(one_d_array=True, two_d_array=False, string=True)
        return Tags("classifier", TargetTags(required=False), classifier_tags=ClassifierTags(), input_tags=inputs)

    def __copy__(self) -> Self:
        return self._copy(self.get_params())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._copy(copy.deepcopy(self.get_params(), memo))

    def __sklearn_clone__(self) -> Self:
        """A copy that is not fitted. It shares an opened CLIP that parameters cannot name, such as a loaded one."""
        other = copy.deepcopy(self)
        other._fit = None
        return other

    def _copy(self, parameters: dict[str, Any]) -> Self:
        other = type(self)(**parameters)
        for name in self._shared:
            setattr(other, name, getattr(self, name))
        return other

    def __getstate__(self) -> dict[str, Any]:
        if self._fit is not None:
            raise IosrFastError(
                f"a fitted {type(self).__name__} is never pickled, because a pickle can run code: save(folder) writes "
                "it and load(folder) opens it; one that is not fitted, such as sklearn.base.clone's, can be pickled"
            )
        return self.get_params()

    def __setstate__(self, parameters: dict[str, Any]) -> None:
        self.__init__(**parameters)  # type: ignore[misc]


def not_fitted(message: str) -> NotFittedError:
    """A NotFittedError. It is scikit-learn's, too, if a caller has imported scikit-learn."""
    theirs = sys.modules.get("sklearn.exceptions")
    return NotFittedError(message) if theirs is None else _both(theirs.NotFittedError)(message)


def _both(theirs: type[Exception]) -> type[NotFittedError]:
    fields = {
        "__doc__": NotFittedError.__doc__,
        "__module__": NotFittedError.__module__,
        "__reduce__": lambda error: (not_fitted, error.args),
    }
    return type("NotFittedError", (NotFittedError, theirs), fields)
