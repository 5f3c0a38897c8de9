"""The arrays of a bundle: the file that each is in, where a Head has it, and its dtypes, shapes and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.methods.folds import MAX_FOLDS
from iosr_fast.scoring.fields import ARRAYS, ArrayField
from iosr_fast.scoring.validation import check_finite, check_unit_rows

Arrays = dict[str, np.ndarray]
SUPPORT, PLAN, PICTURES = "support.safetensors", "plan.safetensors", "pictures.safetensors"
PATHS, LEFT_OUT = "paths.safetensors", "left_out.safetensors"


@dataclass(frozen=True)
class Array:
    """Where it is (`value_at`); its dtypes and its shapes, alternatives separated by "|". A letter of a shape stands
    for one number in all files. `needed` files have it; the rows of `unit` ones have norm 1, other floats are finite.
    `limits` are the smallest and the largest value, each a number or what stands for one.
    """

    place: str
    dtypes: str
    shapes: str
    needed: bool = False
    unit: bool = False
    limits: tuple[str, str] | None = None


def _embeddings(place: str, rows: str, needed: bool = False) -> Array:
    return Array(place, "float32", f"{rows} D", needed, unit=True)


def _packed(part: str, size: str) -> dict[str, Array]:
    """Bytes of each image, one after the other, and where those of each end."""
    return {
        "data": Array(f"{part}.data", "uint8", size, needed=True),
        "ends": Array(f"{part}.ends", "int64", "N", needed=True),
    }


def _array_of_plan(field: ArrayField) -> Array:
    dtypes = "|".join(np.dtype(dtype).name for dtype in field.dtypes)
    return Array(f"plan.{field.name}", dtypes, " ".join(field.shape))


# The arrays of a ScoringPlan that are stored: text and class offsets are the support set's.
PLAN_ARRAYS = [field for field in ARRAYS if field.name not in ("text", "class_offsets") and field.term != "reducer"]

# C classes, N support images, D channels, M unknown images, L calibration images, F channels of a linear term, B bytes
# of pictures, P of paths; K scores of unknown pictures, U images left out for them; V images left out for labels. Those
# that come first say how many. "last id" is the number of the newest image, "last image" the position of the last one.
TABLE: dict[str, dict[str, Array]] = {
    SUPPORT: {
        "text": _embeddings("head.text", "C"),  # where the model reads texts
        "owners": Array("owners", "int64", "N", needed=True),  # head_files._parts
        "ids": Array("head.examples.ids", "int64", "N", needed=True, limits=("0", "last id")),
        "plain": _embeddings("head.examples.embeddings.plain", "N", needed=True),
        "adapted": _embeddings("head.examples.embeddings.adapted", "N"),
        "groups": Array("head.examples.groups", "int64", "N"),
        "query_plain": _embeddings("head.examples.queries.plain", "N"),
        "query_adapted": _embeddings("head.examples.queries.adapted", "N"),
        "unknown_plain": _embeddings("head.unknown_images.plain", "M"),
        "unknown_adapted": _embeddings("head.unknown_images.adapted", "M"),
        "calibration_owners": Array("calibration_owners", "int64", "L"),
        "calibration_plain": _embeddings("head.calibration_images.embeddings.plain", "L"),
        "calibration_adapted": _embeddings("head.calibration_images.embeddings.adapted", "L"),
        "calibration_groups": Array("head.calibration_images.groups", "int64", "L"),
        "labels": Array("labels", "uint8", "N C", limits=("0", "1")),
        "calibration_labels": Array("calibration_labels", "uint8", "L C", limits=("0", "1")),
        "thresholds": Array("thresholds", "float32", "C", limits=("0", "1")),
    },
    # ScoringPlan checks the norms of keys and the channels of a linear term.
    PLAN: {
        **{field.name: _array_of_plan(field) for field in PLAN_ARRAYS},
        "reducer.shift": Array("head.reducer.shift", "float32", "D"),
        "reducer.projection": Array("head.reducer.projection", "float32", "D D|D"),
        "plan_reducer.shift": Array("plan.reducer.shift", "float32", "D"),
        "plan_reducer.projection": Array("plan.reducer.projection", "float32", "D D|D"),
    },
    PICTURES: _packed("pictures", "B"),
    PATHS: _packed("paths", "P"),
    LEFT_OUT: {
        "weights": Array("unknown.weights", "float64", "K"),
        "bias": Array("unknown.bias", "float64", "1"),
        "auroc": Array("unknown.auroc", "float64", "0|1"),
        "left_out": Array("unknown.left_out", "float64", "U"),
        "counted": Array("unknown.counted", "float64", "U"),
        "fold": Array("folds.fold", "int64", "N", limits=("-1", str(MAX_FOLDS - 1))),
        "scored": Array("folds.scored", "uint8", "N", limits=("0", "1")),
        "distinct": Array("folds.distinct", "int64", "C", limits=("0", "N")),
        "units": Array("folds.units", "int64", "N", limits=("0", "last image")),
        "out_of_fold": Array("out_of_fold.logits", "float32", "V C"),
        "temperature": Array("temperature", "float64", "1"),
        # Of version 0.2, which are not read: they follow from the logits.
        **dict.fromkeys(("odds", "confidence", "right", "log_loss", "class_odds"), Array("former", "float64", "W")),
        "labels": Array("former", "int64", "W"),
    },
}


def arrays_of(parts: Mapping[str, Any]) -> dict[str, Arrays]:
    """The arrays of each file, of what is at their places in `parts`; an array is left out where that is None. A number
    is an array of one, or of none if it is NaN."""
    files: dict[str, Arrays] = {}
    for file, forms in TABLE.items():
        for name, form in forms.items():
            if (value := value_at(parts, form.place)) is not None:
                if isinstance(value, float):
                    value = np.array([] if np.isnan(value) else [value])
                dtype = None if "|" in form.dtypes else form.dtypes
                files.setdefault(file, {})[name] = np.ascontiguousarray(value, dtype)
    return files


def value_at(parts: Mapping[str, Any], place: str) -> Any:
    """The part that a place begins with, and attributes of it; None where one of these is None."""
    part, *attributes = place.split(".")
    value = parts.get(part)
    for attribute in attributes:
        value = None if value is None else getattr(value, attribute)
    return value


def parts_of(file: str, arrays: Arrays) -> dict[str, Any]:
    """The inverse of `arrays_of`: the arrays of a file at their places, a dict for each part with attributes, in which
    plain and adapted rows are Embeddings. Raises IosrFastError for adapted rows alone."""
    parts: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = TABLE[file][name].place.split(".")
        part = parts
        for attribute in above:
            part = part.setdefault(attribute, {})
        part[last] = array
    return _with_embeddings(parts)


def _with_embeddings(part: dict[str, Any]) -> Any:
    if part.keys() & {"plain", "adapted"}:
        if "plain" not in part:
            raise IosrFastError("expected plain embeddings beside adapted ones, got none")
        return Embeddings(**part)
    return {name: _with_embeddings(value) if isinstance(value, dict) else value for name, value in part.items()}


def read_arrays(file: str, read: Callable[[str], bytes | None], sizes: dict[str, int]) -> Arrays:
    """The arrays of a file, none without it; `read` gives its bytes or None. Raises DamagedFileError, naming file and
    array, where one is missing, unknown or of another form.

    `sizes` are the numbers that letters stand for; those that are new are added.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = read(file)
    forms = TABLE[file]
    sizes |= {"0": 0, "1": 1}
    if content is None and file != SUPPORT:
        return {}
    with naming(file):
        try:
            arrays: Arrays = {} if content is None else load(content)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise IosrFastError(f"expected a safetensors file, got {type(error).__name__}: {error}") from error
        if missing := sorted(name for name, form in forms.items() if form.needed and name not in arrays):
            raise IosrFastError(f"expected the arrays {', '.join(missing)}, got {', '.join(sorted(arrays)) or 'none'}")
        if unknown := sorted(set(arrays) - set(forms)):
            raise IosrFastError(f"expected no other arrays than {', '.join(forms)}, got {', '.join(unknown)}")
        for name, form in forms.items():
            if name in arrays:
                _check(name, arrays[name], form, sizes)
    return arrays


def are_complete(arrays: Arrays, names: tuple[str, ...]) -> bool:
    """Whether all of these arrays are there, or none. Raises IosrFastError where some are."""
    missing = [name for name in names if name not in arrays]
    if missing and len(missing) < len(names):
        raise IosrFastError(f"expected the arrays {', '.join(names)} together, got none of {', '.join(missing)}")
    return not missing


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Raises ValueErrors as DamagedFileErrors that name the file."""
    try:
        yield
    except ValueError as error:
        raise DamagedFileError(f"{file}: {error}") from error


def _check(name: str, array: np.ndarray, form: Array, sizes: dict[str, int]) -> None:
    if array.dtype.name not in form.dtypes.split("|"):
        raise IosrFastError(f"expected {name} of {form.dtypes.replace('|', ' or ')}, got {array.dtype.name}")
    shapes = [shape.split() for shape in form.shapes.split("|")]
    for shape in shapes:
        if len(shape) == array.ndim:
            bound = dict(zip(shape, array.shape, strict=True)) | sizes
            if array.shape == tuple(bound[letter] for letter in shape):
                sizes.update(bound)
                break
    else:
        expected = " or ".join(f"({', '.join(str(sizes.get(s, s)) for s in shape)})" for shape in shapes)
        raise IosrFastError(f"expected {name} of shape {expected}, got {array.shape}")
    if form.limits is not None and array.size:
        least, most = (sizes[limit] if limit in sizes else int(limit) for limit in form.limits)
        if not least <= array.min() <= array.max() <= most:
            raise IosrFastError(f"expected {name} from {least} to {most}, got {array.min()} to {array.max()}")
    if form.unit:
        check_unit_rows(name, array)
    elif array.dtype.kind == "f":
        check_finite(name, array)
