"""The classifiers of a BatchingClassifier: their names, and the encoder that they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.encoders.encoder import Encoder
    from iosr_fast.head.fitted import Fit
    from iosr_fast.head.head import Head
    from iosr_fast.head.support_images import SupportSettings
    from iosr_fast.images.geometry import Geometry

_CALL = "BatchingClassifier", "use predict"


class Embedding(NamedTuple):
    """How a classifier makes embeddings of pictures. Those with equal ones can share an encoder and its batches."""

    fingerprint: str
    width: int
    rows: str  # what a head without an encoder takes: "plain" or "adapted" embeddings; else ""
    geometry: Geometry
    exif_orientation: bool
    margin: float

    @classmethod
    def of(cls, fit: Fit) -> Embedding:
        encoder, settings = fit.clip.encoder, fit.settings
        rows = "" if encoder.fingerprint != "none" else "adapted" if encoder.adapted else "plain"
        model = encoder.fingerprint, encoder.width, rows
        return cls(*model, encoder.geometry, settings.exif_orientation, settings.margin)

    def check(self, other: Embedding, name: str, first: str) -> None:
        """Raise IosrFastError where the classifier `name` embeds otherwise than `first`."""
        for field, expected, got in zip(self._fields, self, other, strict=True):
            if expected != got:
                raise IosrFastError(
                    f"expected classifiers on one encoder, got {name!r} with {field} {got}, and {first!r} with "
                    f"{expected}: give each of them its own BatchingClassifier"
                )


class Asked(NamedTuple):
    """Read at once: the heads that a request asks, by name, and the encoder and settings of all classifiers."""

    heads: dict[str, Head]
    encoder: Encoder
    settings: SupportSettings


class Classifiers:
    """One classifier, with the name "", or several by their names.

    The encoder is that of the first one whose head compares adapted embeddings, else of the first one, whichever is
    asked, so that the images of a batch share it. A single one may be fitted again on any encoder; of several, one that
    is fitted again on another encoder can't be asked any more.
    """

    def __init__(self, given: Classifier | Mapping[str, Classifier]) -> None:
        """Raises NotFittedError, and IosrFastError for classifiers that can't share an encoder."""
        self.named: Mapping[str, Classifier] = dict(given) if isinstance(given, Mapping) else {"": given}
        if not self.named or not all(isinstance(name, str) for name in self.named):
            raise IosrFastError(f"expected a classifier, or classifiers by their names, got {given!r}")
        for name, one in self.named.items():
            with naming(name):
                one.snapshot().require_single_label(*_CALL)  # raises if it is not fitted
        self._common: Embedding | None = None  # of several
        if len(self.named) > 1:
            first = next(iter(self.named))
            self._common = Embedding.of(self.named[first]._fitted())
            for name, one in self.named.items():
                self._common.check(Embedding.of(one._fitted()), name, first)
        self._last: tuple[tuple[Fit, ...], dict[str, Fit], Fit] | None = None
        for one in self.named.values():
            one.serve_promises()

    def ask(self, names: str | Iterable[str]) -> Asked:
        """The newest heads of these classifiers; "" is the only one. Raises IosrFastError for unknown names, and for
        one that was fitted again on another encoder."""
        fits, encoding = self._read()
        if names == "" and len(self.named) == 1:
            names = tuple(self.named)
        heads = {}
        for name in (names,) if isinstance(names, str) else names:
            if name not in self.named:
                named = ", ".join(map(repr, self.named))
                raise IosrFastError(f"expected the name of a classifier ({named}), or a tuple of names, got {name!r}")
            if name not in fits:
                raise IosrFastError(
                    f"the classifier {name!r} was fitted again on another encoder: create a new BatchingClassifier"
                )
            heads[name] = fits[name].head.require_single_label(*_CALL)
        return Asked(heads, encoding.encoder, encoding.settings)

    def only(self) -> Classifier:
        """The only classifier."""
        if len(self.named) > 1:
            raise IosrFastError(f"expected a BatchingClassifier of one classifier, got {len(self.named)}: name one")
        return next(iter(self.named.values()))

    def by_name(self, what: str, given: Any) -> dict[str, Any]:
        """A setting of each classifier: what is given by name, else that of all. IosrFastError for other names."""
        if not isinstance(given, Mapping):
            return dict.fromkeys(self.named, given)
        if unknown := given.keys() - self.named.keys():
            raise IosrFastError(f"expected {what} for {', '.join(map(repr, self.named))}, got {sorted(unknown)}")
        return dict(given)

    def _read(self) -> tuple[dict[str, Fit], Fit]:
        """The fits that share the encoder, by name, and the one whose encoder it is."""
        every = tuple(one._fitted() for one in self.named.values())
        if self._common is None:
            return dict(zip(self.named, every, strict=True)), every[0]
        last = self._last
        if last is None or last[0] != every:  # fits are equal only to themselves
            fits = {name: fit for name, fit in zip(self.named, every, strict=True) if Embedding.of(fit) == self._common}
            adapted = (fit for fit in fits.values() if fit.head.needs_adapted)
            self._last = last = every, fits, next(adapted, next(iter(fits.values()), every[0]))
        return last[1:]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin the message of an IosrFastError with the name of a classifier, if it has one."""
    try:
        yield
    except IosrFastError as error:
        if not name:
            raise
        raise type(error)(f"classifier {name!r}: {error}") from error
