"""ScoringPlan: the arrays and constants that every training-free method compiles to."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from iosr_fast.exceptions import IosrFastError
from iosr_fast.scoring.fields import ARRAYS, CONSTANTS, EMBEDDINGS, LARGEST, RANGES, Embedding, PlanTerms
from iosr_fast.scoring.key_precision import (
    KeyPrecision,
    check_precision,
    convert_keys,
    half_values,
    int8_keys,
    key_rows,
    precision_of,
)
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.validation import check_number, check_size, check_unit_rows, frozen
from iosr_fast.utils.short_repr import short_repr

Which = Embedding
Feature = Literal["plain", "adapted", "both", "text-distribution"]

_RESCALE = "scale tau, alpha, linear and bias down together: labels stay the same"


@dataclass(frozen=True, eq=False)
class ScoringPlan(PlanTerms):
    """Arrays and constants of

        logits[b, c] = tau * <plain[b], text[c]>
                     + alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - <query[b], keys[j]>))
                     + <feature[b], linear[c]> + bias[c]

    with C classes, D channels and N keys. A term whose arrays are None is left out; text, keys or linear is required.
    With `values` the cache term is alpha * sum over all keys j: weights[j] * exp(...) * values[j, c] instead.
    fields.py lists every field with its shape, dtype and limits.

    text           (C, D) float32, unit rows
    keys           (N, D), unit rows (or zero, where a reducer maps a row to zero), sorted by class; N >= 1. float32,
                   float16, uint16 (the bits of bfloat16) or int8
    key_scales     (N,) float32, positive, with int8 keys only: key j is key_scales[j] * keys[j]
    class_offsets  (C + 1,) int64; class c owns keys[class_offsets[c]:class_offsets[c + 1]], possibly none
    weights        (N,) float32; None means all ones
    values         (N, C) float32 or float16, in place of class_offsets: a row of class values for each key
    linear, bias   (C, D), with another number of channels for some features, and (C,) float32
    query, feature the embedding that is compared with the keys, and the one that the linear term reads
    reducer        applied to both of these embeddings before they are read; the keys are stored reduced
    feature        may also be "both": [plain, adapted], each reduced, so that linear is (C, 2 D); or
                   "text-distribution": [s, H] with s = softmax(<plain, text> / temperature) and H = sum of
                   s * log(C s), C + 1 channels, so that linear is (C, C + 1)
    query_transform (D, D) float32; query_transform @ query[b] is compared with the keys in place of query[b], and
                   keys[j] @ query_transform are the unit rows

    half_on_gpu    whether a GPU holds float32 keys and values in float16, where that keeps the labels
                   (half_plan)

    Arrays are converted to these dtypes (keys of any other to float32), made C-contiguous and read-only, and copied
    only if necessary. `with_key_precision` stores the keys in fewer bits.

    Raises IosrFastError if a shape, a norm or an offset is wrong, a value isn't finite, a constant is outside RANGES or
    a term may exceed LARGEST.

    Two classes with one key each, and no texts:

    >>> import numpy as np
    >>> from iosr_fast import Embeddings, ScoringPlan, score
    >>> plan = ScoringPlan(2, keys=np.eye(2, 4), class_offsets=[0, 1, 2], alpha=2.0, beta=1.0)
    >>> score(plan, Embeddings(np.eye(2, 4, dtype=np.float32))).round(3)
    array([[2.   , 0.736],
           [0.736, 2.   ]], dtype=float32)
    >>> plan.with_key_precision("int8").keys.dtype
    dtype('int8')
    """

    n_classes: int
    text: np.ndarray | None = None
    tau: float = 100.0
    keys: np.ndarray | None = None
    class_offsets: np.ndarray | None = None
    weights: np.ndarray | None = None
    query: Which = "plain"
    alpha: float = 1.0
    beta: float = 1.0
    linear: np.ndarray | None = None
    bias: np.ndarray | None = None
    feature: Feature = "plain"
    key_scales: np.ndarray | None = None
    query_transform: np.ndarray | None = None
    values: np.ndarray | None = None
    reducer: Reducer | None = None
    temperature: float = 0.5
    half_on_gpu: bool = True
    __repr__ = short_repr

    def __post_init__(self) -> None:
        if self.n_classes < 1:
            raise IosrFastError(f"expected n_classes >= 1, got {self.n_classes}")
        for constant in CONSTANTS:
            if constant.choices and (value := getattr(self, constant.name)) not in constant.choices:
                *others, last = (f'"{choice}"' for choice in constant.choices)
                raise IosrFastError(f"expected {constant.name} to be {', '.join(others)} or {last}, got {value!r}")
        if self.linear is not None and self.feature == "text-distribution" and self.text is None:
            raise IosrFastError('expected text with feature "text-distribution", got none')
        self._freeze_arrays()
        self._check_shapes()
        self._check_cache()
        self._check_scales()
        for name in ("weights", "linear", "bias", "values"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name), LARGEST, _RESCALE)
        if self.query_transform is not None:  # transformed queries may be stored in float16
            check_size("query_transform", self.query_transform, 1e3, "let with_key_precision compute it")
        if self.text is not None:
            check_unit_rows("text", self.text)
        if self.keys is not None and self.key_precision is not None:
            parts = (self.keys, self.key_scales, self.key_precision, self.query_transform)
            check_unit_rows("keys", *parts, or_zero=self.reducer is not None)
        for name, (least, most) in RANGES.items():
            object.__setattr__(self, name, check_number(name, getattr(self, name), least, most))
        if self.keys is not None:
            size = max(abs(self.alpha), 1.0) * self._largest_cache_term()
            check_number("alpha times all weights and values of keys", size, 0.0, LARGEST, _RESCALE)

    @cached_property
    def width(self) -> int:
        """D, the number of channels of an embedding."""
        return next(iter(self._widths().values()))

    @cached_property
    def reducer_shift(self) -> np.ndarray | None:
        """The reducer's shift (D,), None without one."""
        return None if self.reducer is None else self.reducer.shift

    @cached_property
    def reducer_projection(self) -> np.ndarray | None:
        """The reducer's projection, (D, D) or (D,), None without one."""
        return None if self.reducer is None else self.reducer.projection

    @property
    def key_precision(self) -> KeyPrecision | None:
        """The precision of the keys: "fp32", "fp16", "bf16" or "int8"; None without keys."""
        return None if self.keys is None else precision_of(self.keys.dtype)

    def dequantize(self) -> np.ndarray:
        """The float32 keys (N, D) that the stored keys represent, with query_transform undone.

        <query @ query_transform', stored> = <query, stored @ query_transform>. Raises ValueError without keys.
        """
        if self.keys is None:
            raise IosrFastError("expected a plan with keys, got one without a cache term")
        keys = key_rows(self.keys, self.key_scales, slice(None))
        return keys if self.query_transform is None else keys @ self.query_transform

    def with_key_precision(self, precision: KeyPrecision) -> ScoringPlan:
        """The same plan with its keys stored in `precision`: "fp32", on a GPU too, "fp16", "bf16" or "int8".

        Keys that were rounded before are normalised first. int8 keys get a query_transform
        (key_precision.int8_keys). Values of fp16 and int8 keys are stored in float16 (half_values), divided by their
        largest magnitude, which alpha is multiplied by. Raises IosrFastError without keys or for an unknown precision.
        """
        if self.keys is None:
            raise IosrFastError(f"expected a plan with keys to store in {precision}, got one without a cache term")
        if check_precision(precision) == self.key_precision:
            return replace(self, half_on_gpu=False) if self.half_on_gpu else self
        keys = self.keys
        if self.key_precision != "fp32" or self.query_transform is not None:
            keys = self.dequantize()
            keys = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        if precision == "int8":
            codes, scales, rotation = int8_keys(keys)
            narrow = replace(self, keys=codes, key_scales=scales, query_transform=rotation)
        else:
            converted = convert_keys(keys, precision)
            narrow = replace(self, keys=converted, key_scales=None, query_transform=None, half_on_gpu=False)
        if self.values is None or precision not in ("fp16", "int8"):
            return narrow
        largest = float(np.abs(self.values).max()) or 1.0
        return replace(narrow, values=half_values(self.values / np.float32(largest)), alpha=self.alpha * largest)

    def scaled(self, factor: float) -> ScoringPlan:
        """The plan whose logits are `factor` times these: the same labels, softer or harder probabilities.

        Raises ValueError unless factor is above 0 and the scaled plan is within RANGES.
        """
        if not 0 < factor <= LARGEST:
            raise IosrFastError(f"expected a factor above 0 and up to {LARGEST:g}, got {factor}")
        return replace(
            self,
            tau=factor * self.tau,
            alpha=factor * self.alpha,
            linear=None if self.linear is None else np.float32(factor) * self.linear,
            bias=None if self.bias is None else np.float32(factor) * self.bias,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: a copy with other arrays must not take those on a device."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _largest_cache_term(self) -> float:
        """An upper bound of the cache term at alpha 1."""
        n_keys = 0 if self.keys is None else len(self.keys)
        weights = float(n_keys if self.weights is None else np.abs(self.weights).sum(dtype=np.float64))
        return weights * (1.0 if self.values is None else float(np.abs(self.values).max()))

    def _widths(self) -> dict[str, int]:
        """D by each array that is as wide as an embedding; by a linear term over two if there is no other."""
        names = ("text", "keys", "linear") if self.feature in EMBEDDINGS else ("text", "keys")
        arrays = {name: getattr(self, name) for name in names}
        widths = {name: array.shape[1] for name, array in arrays.items() if array is not None and array.ndim == 2}
        if not widths and self.feature == "both" and self.linear is not None and self.linear.ndim == 2:
            return {"linear": self.linear.shape[1] // 2}
        return widths

    def _freeze_arrays(self) -> None:
        for field in ARRAYS:
            value = getattr(self, field.name)
            if value is None or field.term == "reducer":  # Reducer freezes its own arrays
                continue
            stored = np.asarray(value).dtype.type
            dtype = stored if stored in field.dtypes else field.dtypes[0]
            object.__setattr__(self, field.name, frozen(field.name, value, dtype))

    def _check_shapes(self) -> None:
        if self.text is None and self.keys is None and self.linear is None:
            raise IosrFastError("expected at least one term: give text, keys (with class_offsets) or linear; got none")
        widths = self._widths()
        if len(set(widths.values())) > 1:
            raise IosrFastError(
                f"expected text, keys and linear of one width, got {widths}; take them from one encoder"
            )
        width = next(iter(widths.values()), 0)
        sizes = {"C": self.n_classes, "C + 1": self.n_classes + 1, "D": width}
        sizes["N"] = 0 if self.keys is None else len(self.keys)
        sizes["F"] = {"both": 2 * width, "text-distribution": self.n_classes + 1}.get(self.feature, width)
        for field in ARRAYS:
            array, shape = getattr(self, field.name), tuple(sizes[axis] for axis in field.shape)
            if array is not None and field.term != "reducer" and array.shape != shape:
                raise IosrFastError(f"expected {field.name} of shape {shape}, got {array.shape}")
        if self.reducer is not None and self.reducer.width != width:
            raise IosrFastError(f"expected a reducer of {width} channels, got one of {self.reducer.width}")
        if width < 1:
            raise IosrFastError("expected a width of at least 1, got 0")

    def _check_cache(self) -> None:
        offsets = self.class_offsets
        if self.keys is not None and self.values is not None and offsets is not None:
            raise IosrFastError("expected keys with class_offsets or with values, got both")
        if (self.keys is None) != (offsets is None and self.values is None):
            raise IosrFastError("expected keys together with class_offsets or values, got one without the other")
        if self.keys is None:
            for name in ("query_transform", "weights"):
                if getattr(self, name) is not None:
                    raise IosrFastError(f"expected keys together with {name}, got {name} alone")
            return
        n_keys = len(self.keys)
        if n_keys < 1:
            raise IosrFastError("expected at least one key, got 0; leave keys and class_offsets out instead")
        if offsets is None:
            return
        falls = (np.diff(offsets) < 0).any()
        if offsets[0] != 0 or offsets[-1] != n_keys or falls:
            raise IosrFastError(
                f"expected class_offsets to rise from 0 to the number of keys, {n_keys}, "
                f"got {offsets[0]} to {offsets[-1]}{' with a fall between' if falls else ''}; sort keys by class first"
            )

    def _check_scales(self) -> None:
        quantized = self.key_precision == "int8"
        if quantized and self.key_scales is None:
            raise IosrFastError(
                "expected key_scales with int8 keys, got none; plan.with_key_precision('int8') makes both"
            )
        if self.key_scales is None:
            return
        if not quantized:
            raise IosrFastError(f"expected key_scales with int8 keys only, got {self.key_precision or 'no'} keys")
        check_size("key_scales", self.key_scales, 1e3, "let with_key_precision compute them")
        if not (self.key_scales > 0).all():
            raise IosrFastError(f"expected key_scales > 0, got {self.key_scales.min():.6g}")
