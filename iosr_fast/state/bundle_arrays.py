"""Arrays of a bundle: which there may be, of what dtype and shape, and what their values may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from iosr_fast.scoring.validation import check_finite, check_unit_rows


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


# C classes, N support images, D channels, C1 = C + 1, B bytes of pictures.
SUPPORT_ARRAYS = {
    "text": _form("float32", "C", "D", needed=True, unit=True),
    "owners": _form("int64", "N", needed=True),
    "ids": _form("int64", "N", needed=True),
    "plain": _form("float32", "N", "D", needed=True, unit=True),
    "adapted": _form("float32", "N", "D", unit=True),
    "query_plain": _form("float32", "N", "D", unit=True),
    "query_adapted": _form("float32", "N", "D", unit=True),
}
_PROJECTION = Form(("float32",), (("D", "D"), ("D",)))
# ScoringPlan checks the norms of keys, which depend on their scales and transform.
PLAN_ARRAYS = {
    "keys": Form(("float32", "float16", "uint16", "int8"), (("N", "D"),)),
    "key_scales": _form("float32", "N"),
    "query_transform": _form("float32", "D", "D"),
    "weights": _form("float32", "N"),
    "values": _form("float32", "N", "C"),
    "linear": Form(("float32",), (("C", "D"), ("C", "C1"))),
    "bias": _form("float32", "C"),
    "reducer.shift": _form("float32", "D"),
    "reducer.projection": _PROJECTION,
    "plan_reducer.shift": _form("float32", "D"),
    "plan_reducer.projection": _PROJECTION,
}
PICTURE_ARRAYS = {"data": _form("uint8", "B", needed=True), "ends": _form("int64", "N", needed=True)}


def parse_arrays(content: bytes, forms: Mapping[str, Form], sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file. Raises ValueError where one is missing, unknown or of another form.

    `sizes` are the numbers that letters stand for; those that are new are added.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: dict[str, np.ndarray] = load(content)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected a safetensors file, got {type(error).__name__}: {error}") from error
    if missing := sorted(name for name, form in forms.items() if form.needed and name not in arrays):
        raise ValueError(f"expected the arrays {', '.join(missing)}, got {', '.join(sorted(arrays)) or 'none'}")
    if unknown := sorted(set(arrays) - set(forms)):
        raise ValueError(f"expected no other arrays than {', '.join(forms)}, got {', '.join(unknown)}")
    for name, form in forms.items():  # in the order of the table: the first say how many classes and channels there are
        if name in arrays:
            _check(name, arrays[name], form, sizes)
    return arrays


def _check(name: str, array: np.ndarray, form: Form, sizes: dict[str, int]) -> None:
    if array.dtype.name not in form.dtypes:
        raise ValueError(f"expected {name} of {' or '.join(form.dtypes)}, got {array.dtype.name}")
    for shape in form.shapes:
        if len(shape) == array.ndim:
            bound = dict(zip(shape, array.shape, strict=True)) | sizes
            if array.shape == tuple(bound[letter] for letter in shape):
                sizes.update(bound)
                break
    else:
        expected = " or ".join(f"({', '.join(str(sizes.get(s, s)) for s in shape)})" for shape in form.shapes)
        raise ValueError(f"expected {name} of shape {expected}, got {array.shape}")
    if form.unit:
        check_unit_rows(name, array)
    elif array.dtype.kind == "f":
        check_finite(name, array)


def check_examples(owners: np.ndarray, ids: np.ndarray, class_numbers: list[int], next_id: int) -> None:
    """Raise ValueError unless support images are sorted by class, of classes that are there, with ids that differ."""
    if (owners[1:] < owners[:-1]).any():
        raise ValueError("expected owners that don't fall, got images that are not sorted by class")
    if strange := sorted(set(owners.tolist()) - set(class_numbers)):
        raise ValueError(f"expected owners among the class_numbers, got {strange[:5]}")
    if len(np.unique(ids)) < len(ids):
        raise ValueError(f"expected ids to differ, got {len(ids) - len(np.unique(ids))} more than once")
    if len(ids) and not 0 <= ids.min() <= ids.max() < next_id:
        raise ValueError(f"expected ids from 0 to below next[1], {next_id}, got {ids.min()} to {ids.max()}")


def check_ends(ends: np.ndarray, size: int) -> None:
    """Raise ValueError unless `ends` cuts `size` bytes of pictures into pieces."""
    starts = np.concatenate([[0], ends])
    if (starts[1:] < starts[:-1]).any() or starts[-1] != size:
        raise ValueError(f"expected ends that rise from 0 to the {size} bytes of data, got others")
