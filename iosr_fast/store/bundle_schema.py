"""The manifest of a saved classifier, and the arrays beside it: fields, dtypes, shapes and the values allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from iosr_fast.clip.tokenizer import Clean
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.names import check_names
from iosr_fast.head.support_images import SupportViews
from iosr_fast.images.geometry import Interpolation, ResizeMode
from iosr_fast.scoring.plan import Feature
from iosr_fast.scoring.reducers import NAME
from iosr_fast.scoring.validation import check_finite, check_unit_rows
from iosr_fast.store.tuned_facts import TunedFacts
from iosr_fast.utils.schema import (
    Above0,
    Channels,
    Deviations,
    Entry,
    Fingerprint,
    Level,
    Natural,
    Positive,
    Sha256,
    Size,
    Strict,
)
from iosr_fast.utils.text import abbreviate

Template = Annotated[str, Meta(pattern=r"\{\}")]
KeyPrecision = Literal["fp32", "fp16", "bf16", "int8"]


class Preprocessing(Strict, frozen=True, kw_only=True):
    image_size: Size
    interpolation: Interpolation
    mean: Channels
    std: Deviations
    resize_mode: ResizeMode = "shortest"
    fill: Level = 0


class PlanConstants(Strict, frozen=True, kw_only=True):
    """The constants of a plan (state_files)."""

    tau: Above0
    alpha: float
    beta: Annotated[float, Meta(ge=0)]
    temperature: Above0
    query: Literal["plain", "adapted"]
    feature: Feature
    cache: Literal["none", "dense", "classes"]
    keys: Literal["none", "support", "stored"]


class TextFacts(Strict, frozen=True, kw_only=True):
    """A text encoder (export.export_text)."""

    context_length: Size
    width: Size
    precision: Literal["fp32", "fp16"]
    clean: Clean = "lower"
    eot: Natural | None
    templates: Annotated[list[Template], Meta(min_length=1)]
    clip_fingerprint: Fingerprint
    tokens_checked: Natural
    max_abs_error: float
    min_cosine: float
    sot: Natural | None = None  # written by older versions, as is pad
    pad: Natural | None = None


class HeadFacts(Strict, frozen=True, kw_only=True):
    """The part of a head that is not arrays (state_files)."""

    class_names: Annotated[list[str], Meta(min_length=1)]
    class_numbers: list[Natural]
    version: Positive
    next: tuple[Natural, Natural]
    method: str
    parameters: dict[str, float]
    reducer: Annotated[str, Meta(pattern=rf"^({NAME})\Z")]
    factor: Above0
    key_precision: KeyPrecision
    tau: Above0
    plan: PlanConstants
    tuned: TunedFacts | None = None


class ClassifierManifest(HeadFacts, frozen=True, kw_only=True):
    """The manifest of a bundle (bundle.save_bundle)."""

    schema: Literal[2]
    kind: str
    files: dict[str, Entry]
    checksum: Sha256
    views: dict[str, Any]
    preprocessing: Preprocessing
    clip_fingerprint: Fingerprint
    adapter_fingerprint: Fingerprint | None
    encoder_fingerprint: Fingerprint
    text: TextFacts | None
    integer_labels: bool = False
    engine_choice: EngineChoice | None = None

    def support_views(self) -> SupportViews:
        """The views; a field that an older version had not keeps its default. Raises ValueError."""
        known = {field.name for field in fields(SupportViews)}
        if unknown := sorted(set(self.views) - known):
            raise IosrFastError(f"expected views with the fields {sorted(known)}, got {abbreviate(unknown)}")
        return msgspec.convert(self.views, SupportViews)


def check_classes(names: list[str], numbers: list[int], next_number: int) -> None:
    """Raise ValueError for names and numbers of classes that no fit and no change gives."""
    check_names(names)
    if len(numbers) != len(names):
        raise IosrFastError(f"expected class_numbers for {len(names)} class_names, got {len(numbers)}")
    if any(later <= earlier for earlier, later in zip(numbers, [*numbers[1:], next_number], strict=True)):
        raise IosrFastError(
            f"expected class_numbers that rise and are below next[0], {next_number}, got {numbers[:5]}..."
        )


@dataclass(frozen=True)
class Form:
    """An array's dtypes; its shapes, of letters that stand for one number each in all arrays, or None for any number;
    whether it must be there, and have rows of unit norm."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    needed: bool = False
    unit: bool = False


def _form(dtype: str, *shape: str, needed: bool = False, unit: bool = False) -> Form:
    return Form((dtype,), (shape,), needed, unit)


# C classes, N support images, D channels, M unknown images, C1 = C + 1, D2 = 2 D, B bytes of pictures.
SUPPORT_ARRAYS = {
    "text": _form("float32", "C", "D", needed=True, unit=True),
    "owners": _form("int64", "N", needed=True),
    "ids": _form("int64", "N", needed=True),
    "plain": _form("float32", "N", "D", needed=True, unit=True),
    "adapted": _form("float32", "N", "D", unit=True),
    "query_plain": _form("float32", "N", "D", unit=True),
    "query_adapted": _form("float32", "N", "D", unit=True),
    "unknown_plain": _form("float32", "M", "D", unit=True),
    "unknown_adapted": _form("float32", "M", "D", unit=True),
    "labels": _form("uint8", "N", "C"),  # of pictures with several, as are thresholds
    "thresholds": _form("float32", "C"),
}
_PROJECTION = Form(("float32",), (("D", "D"), ("D",)))
# ScoringPlan checks the norms of keys, which depend on their scales and transform.
PLAN_ARRAYS = {
    "keys": Form(("float32", "float16", "uint16", "int8"), (("N", "D"),)),
    "key_scales": _form("float32", "N"),
    "query_transform": _form("float32", "D", "D"),
    "weights": _form("float32", "N"),
    "values": _form("float32", "N", "C"),
    "linear": Form(("float32",), (("C", "D"), ("C", "D2"), ("C", "C1"))),
    "bias": _form("float32", "C"),
    "reducer.shift": _form("float32", "D"),
    "reducer.projection": _PROJECTION,
    "plan_reducer.shift": _form("float32", "D"),
    "plan_reducer.projection": _PROJECTION,
}
PICTURE_ARRAYS = {"data": _form("uint8", "B", needed=True), "ends": _form("int64", "N", needed=True)}

# K scores of unknown pictures, U images left out for them; V images left out for labels (left_out_files).
LEFT_OUT_ARRAYS = {
    "weights": _form("float64", "K"),
    "bias": _form("float64", "one"),
    "auroc": _form("float64", "none or one"),
    "left_out": _form("float64", "U"),
    "odds": _form("float64", "V"),
    "confidence": _form("float64", "V"),
    "right": _form("float64", "V"),
    "log_loss": _form("float64", "V"),
    "labels": _form("int64", "V"),
    "class_odds": _form("float64", "V"),
}


def parse_arrays(content: bytes, forms: Mapping[str, Form], sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file. Raises ValueError where one is missing, unknown or of another form.

    `sizes` are the numbers that letters stand for; those that are new are added.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: dict[str, np.ndarray] = load(content)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise IosrFastError(f"expected a safetensors file, got {type(error).__name__}: {error}") from error
    if missing := sorted(name for name, form in forms.items() if form.needed and name not in arrays):
        raise IosrFastError(f"expected the arrays {', '.join(missing)}, got {', '.join(sorted(arrays)) or 'none'}")
    if unknown := sorted(set(arrays) - set(forms)):
        raise IosrFastError(f"expected no other arrays than {', '.join(forms)}, got {', '.join(unknown)}")
    for name, form in forms.items():  # in the order of the table: the first say how many classes and channels there are
        if name in arrays:
            _check(name, arrays[name], form, sizes)
    return arrays


def _check(name: str, array: np.ndarray, form: Form, sizes: dict[str, int]) -> None:
    if array.dtype.name not in form.dtypes:
        raise IosrFastError(f"expected {name} of {' or '.join(form.dtypes)}, got {array.dtype.name}")
    for shape in form.shapes:
        if len(shape) == array.ndim:
            bound = dict(zip(shape, array.shape, strict=True)) | sizes
            if array.shape == tuple(bound[letter] for letter in shape):
                sizes.update(bound)
                break
    else:
        expected = " or ".join(f"({', '.join(str(sizes.get(s, s)) for s in shape)})" for shape in form.shapes)
        raise IosrFastError(f"expected {name} of shape {expected}, got {array.shape}")
    if form.unit:
        check_unit_rows(name, array)
    elif array.dtype.kind == "f":
        check_finite(name, array)


def check_examples(owners: np.ndarray, ids: np.ndarray, class_numbers: list[int], next_id: int) -> None:
    """Raise ValueError unless support images are sorted by class, of classes that are there, with ids that differ."""
    if (owners[1:] < owners[:-1]).any():
        raise IosrFastError("expected owners that don't fall, got images that are not sorted by class")
    if strange := sorted(set(owners.tolist()) - set(class_numbers)):
        raise IosrFastError(f"expected owners among the class_numbers, got {strange[:5]}")
    if len(np.unique(ids)) < len(ids):
        raise IosrFastError(f"expected ids to differ, got {len(ids) - len(np.unique(ids))} more than once")
    if len(ids) and not 0 <= ids.min() <= ids.max() < next_id:
        raise IosrFastError(f"expected ids from 0 to below next[1], {next_id}, got {ids.min()} to {ids.max()}")


def check_ends(ends: np.ndarray, size: int) -> None:
    """Raise ValueError unless `ends` cuts `size` bytes of pictures into pieces."""
    starts = np.concatenate([[0], ends])
    if (starts[1:] < starts[:-1]).any() or starts[-1] != size:
        raise IosrFastError(f"expected ends that rise from 0 to the {size} bytes of data, got others")
