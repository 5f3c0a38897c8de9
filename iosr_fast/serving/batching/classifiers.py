"""The classifiers of a BatchingClassifier: their names, their newest heads, and the encoder that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.support_images import SupportSettings

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier
    from iosr_fast.delivery.fitted import FittedClassifier
    from iosr_fast.encoders.text_encoder import TextEncoder
    from iosr_fast.head.head import Head


def embedding(fit: FittedClassifier) -> dict[str, Any]:
    """How a classifier embeds pictures. Those that do it alike can share an encoder and its batches."""
    encoder, settings = fit.clip.encoder, fit.settings
    rows = {"adapted": encoder.adapted} if encoder.fingerprint == "none" else {}  # of a head without an encoder
    model = {"fingerprint": encoder.fingerprint, "width": encoder.width, "geometry": encoder.geometry}
    return {**model, **rows, "exif_orientation": settings.exif_orientation, "margin": settings.margin}


class EncoderAlone(NamedTuple):
    """What pictures are embedded with where there is no classifier."""

    encoder: Encoder
    settings: SupportSettings = SupportSettings(exif_orientation=True)
    text: None = None


class Classifiers:
    """One classifier with the name "", or several by their names, whose encoder is the same whichever is asked, so that
    the images of a batch share it (BatchingClassifier). A single one may be fitted again on any encoder. Of an encoder
    alone there are none."""

    def __init__(self, given: Classifier | Mapping[str, Classifier] | EncoderAlone) -> None:
        """Raises NotFittedError, and IosrFastError for classifiers that can't share an encoder."""
        self._alone = given if isinstance(given, EncoderAlone) else None
        self.named: Mapping[str, Classifier] = {}
        if not isinstance(given, EncoderAlone):
            self.named = dict(given) if isinstance(given, Mapping) else {"": given}
        if not (self.named or self._alone) or not all(isinstance(name, str) for name in self.named):
            raise IosrFastError(f"expected a classifier, or classifiers by their names, got {given!r}")
        for name, one in self.named.items():
            with naming(name):
                one.snapshot()  # raises if it is not fitted
        self._alike: dict[str, Any] = {}  # of several
        for name, one in self.named.items() if len(self.named) > 1 else ():
            own = embedding(one._fitted())
            self._alike = self._alike or own
            if differs := next((key for key in own if own[key] != self._alike.get(key)), None):
                raise IosrFastError(
                    f"expected classifiers on one encoder, got {name!r} with {differs} {own[differs]}, and others with "
                    f"{self._alike.get(differs)}: give it a BatchingClassifier of its own"
                )
        for one in self.named.values():
            one.serve_promises()

    def ask(self, names: str | Iterable[str]) -> tuple[dict[str, Head], FittedClassifier | EncoderAlone]:
        """The newest heads of these classifiers ("" is the only one), and the fit whose encoder all share, read at
        once. Raises IosrFastError for unknown names, and for one that was fitted again on another encoder."""
        if names == "" and len(self.named) == 1:
            names = next(iter(self.named))
        fits, encoding = self._read()
        heads = {}
        for name in (names,) if isinstance(names, str) else names:
            if name not in self.named:
                raise IosrFastError(f"expected classifiers of {', '.join(map(repr, self.named))}, got {name!r}")
            if name not in fits:
                again = "create a new BatchingClassifier"
                raise IosrFastError(f"the classifier {name!r} was fitted again on another encoder: {again}")
            heads[name] = fits[name].head
        return heads, encoding

    @property
    def encoder(self) -> Encoder:
        """The one that all share now."""
        return self._read()[1].encoder

    @property
    def text(self) -> TextEncoder | None:
        """The text encoder of the model; None if it reads no texts, or they can't be embedded here."""
        text = next((one._fitted().clip.text for one in self.named.values()), None)
        return text if hasattr(text, "embed") else None  # type: ignore[return-value]

    def _read(self) -> tuple[dict[str, FittedClassifier], FittedClassifier | EncoderAlone]:
        """The fits that embed alike, by name, and the one whose encoder all share."""
        if self._alone is not None:
            return {}, self._alone
        every = {name: one._fitted() for name, one in self.named.items()}
        fits = {name: fit for name, fit in every.items() if len(every) == 1 or embedding(fit) == self._alike}
        adapted = (fit for fit in fits.values() if fit.head.needs_adapted)
        return fits, next(adapted, next(iter((fits or every).values())))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin the message of an IosrFastError with the name of a classifier, if it has one."""
    try:
        yield
    except IosrFastError as error:
        if not name:
            raise
        raise type(error)(f"classifier {name!r}: {error}") from error
