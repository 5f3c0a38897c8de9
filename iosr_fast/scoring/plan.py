"""ScoringPlan: what every training-free method compiles to, and score(), which executes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from iosr_fast.scoring.int8_keys import compact_int8
from iosr_fast.scoring.precision import Precision, convert_keys, dequantize, precision_of
from iosr_fast.scoring.reducers import Reducer
from iosr_fast.scoring.validation import check_number, check_size, check_unit_rows, frozen

Which = Literal["plain", "adapted"]
Feature = Literal["plain", "adapted", "text-distribution"]


_EMBEDDED = ("plain", "adapted")
# The largest size of a term, and the ranges of constants, in which all implementations agree: far from float32's end,
# also where embeddings are as far from unit norm as they may be, and beta and 1 / temperature multiply the rounding of
# a cosine.
LARGEST = 1e15
RANGES = {
    "tau": (0.0, LARGEST),
    "alpha": (-LARGEST, LARGEST),
    "beta": (0.0, 1000.0),
    "temperature": (0.01, 100.0),
}
_RESCALE = "scale tau, alpha, linear and bias down together: labels stay the same"


@dataclass(frozen=True, eq=False)
class ScoringPlan:
    """Arrays and constants of

        logits[b, c] = tau * <plain[b], text[c]>
                     + alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - <query[b], keys[j]>))
                     + <feature[b], linear[c]> + bias[c]

    with C classes, D channels and N keys. A term whose arrays are None is left out; text, keys or linear must be there.
    With `values` the cache term is instead alpha * sum over all keys j: weights[j] * exp(...) * values[j, c].

    text           (C, D) float32, unit rows
    keys           (N, D), unit rows, or zero where the reducer leaves nothing, sorted by class; N >= 1. float32,
                   float16, uint16 (the bits of bfloat16) or int8
    key_scales     (N,) float32, positive, with int8 keys and only there: key j is key_scales[j] * keys[j]
    class_offsets  (C + 1,) int64; class c owns keys[class_offsets[c]:class_offsets[c + 1]], which may be none
    weights        (N,) float32; None stands for all ones
    values         (N, C) float32, in place of class_offsets: what each key says of each class
    linear, bias   (C, D) and (C,) float32
    query, feature which embedding meets the keys, and which the linear term
    reducer        where given, it moves both of these embeddings before they are read (and the keys are in its space)
    feature        may also be "text-distribution": [s, H] with s = softmax(<plain, text> / temperature) and H = sum of
                   s * log(C s), C + 1 channels, so that linear is (C, C + 1)
    query_transform (D, D) float32; where given, query_transform @ query[b] meets the keys in place of query[b], and
                   keys[j] @ query_transform are the unit rows

    Arrays are converted to these dtypes (keys of any other to float32), made C-contiguous and read-only (copied only
    where they aren't already). `with_key_precision` stores the keys in fewer bits.
    Raises ValueError where a shape, a norm or an offset is wrong, a value isn't finite, a constant is out of RANGES or
    a term larger than LARGEST.
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

    def __post_init__(self) -> None:
        if self.n_classes < 1:
            raise ValueError(f"expected n_classes >= 1, got {self.n_classes}")
        if self.query not in _EMBEDDED:
            raise ValueError(f'expected query to be "plain" or "adapted", got {self.query!r}')
        if self.feature not in (*_EMBEDDED, "text-distribution"):
            raise ValueError(f'expected feature to be "plain", "adapted" or "text-distribution", got {self.feature!r}')
        if self.linear is not None and self.feature == "text-distribution" and self.text is None:
            raise ValueError('expected text where the feature is "text-distribution", got none')
        given_keys = None if self.keys is None else np.asarray(self.keys).dtype
        key_dtype = np.float32 if given_keys is None or precision_of(given_keys) is None else given_keys.type
        for name in ("text", "weights", "linear", "bias", "key_scales", "query_transform", "values"):
            self._freeze(name, np.float32)
        self._freeze("keys", key_dtype)
        self._freeze("class_offsets", np.int64)
        widths = {name: array.shape[1] for name, array in self._matrices().items() if array.ndim == 2}
        if not self._matrices():
            raise ValueError("expected at least one term: give text, keys (with class_offsets) or linear; got none")
        if len(set(widths.values())) > 1:
            raise ValueError(f"expected text, keys and linear of one width, got {widths}; one encoder makes them all")
        width = next(iter(widths.values()), 0)
        n_keys = len(self.keys) if self.keys is not None else 0
        self._check_shape("text", (self.n_classes, width))
        self._check_shape("keys", (n_keys, width))
        self._check_shape("linear", (self.n_classes, width if self.feature in _EMBEDDED else self.n_classes + 1))
        self._check_shape("bias", (self.n_classes,))
        self._check_shape("weights", (n_keys,))
        self._check_shape("key_scales", (n_keys,))
        self._check_shape("query_transform", (width, width))
        self._check_shape("values", (n_keys, self.n_classes))
        if self.reducer is not None and self.reducer.width != width:
            raise ValueError(f"expected a reducer of {width} channels, got one of {self.reducer.width}")
        self._check_shape("class_offsets", (self.n_classes + 1,))
        if width < 1:
            raise ValueError("expected a width of at least 1, got 0")
        self._check_cache(n_keys)
        self._check_scales()
        for name in ("weights", "linear", "bias", "values"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name), LARGEST, _RESCALE)
        if self.query_transform is not None:  # moved queries may be kept in float16
            check_size("query_transform", self.query_transform, 1e3, "let with_key_precision make it")
        if self.text is not None:
            check_unit_rows("text", self.text)
        if self.keys is not None and self.key_precision is not None:
            parts = (self.keys, self.key_scales, self.key_precision, self.query_transform)
            check_unit_rows("keys", *parts, or_zero=self.reducer is not None)
        for name, (least, most) in RANGES.items():
            object.__setattr__(self, name, check_number(name, getattr(self, name), least, most))
        if self.keys is not None:
            size = max(abs(self.alpha), 1.0) * self._cache_size(n_keys)
            check_number("alpha times all weights and values of keys", size, 0.0, LARGEST, _RESCALE)

    @property
    def width(self) -> int:
        """D, the number of channels of an embedding."""
        return int(next(iter(self._matrices().values())).shape[1])

    @property
    def needs_adapted(self) -> bool:
        """Whether a term reads the adapted embedding."""
        return (self.keys is not None and self.query == "adapted") or (
            self.linear is not None and self.feature == "adapted"
        )

    @property
    def key_precision(self) -> Precision | None:
        """What the keys are stored in: "fp32", "fp16", "bf16" or "int8"; None without keys."""
        return None if self.keys is None else precision_of(self.keys.dtype)

    def with_key_precision(self, precision: Precision, *, compensate: bool = True) -> ScoringPlan:
        """The same plan with its keys stored in `precision`: "fp32", "fp16", "bf16" or "int8".

        On the way to a finer precision a key is brought to unit norm again (precision.dequantize leaves it as it is).
        int8 keys come with a query_transform where that lowers their error (int8_keys.compact_int8);
        `compensate=False` takes the nearest codes, many times sooner. Raises ValueError where the plan has no keys or
        the precision is unknown.
        """
        if self.keys is None:
            raise ValueError(f"expected a plan with keys to store in {precision}, got one without a cache term")
        if precision == self.key_precision:
            return self
        if self.query_transform is not None:
            keys = dequantize(self)
            keys /= np.linalg.norm(keys, axis=1, keepdims=True)
            plain = replace(self, keys=keys, key_scales=None, query_transform=None)
            return plain.with_key_precision(precision, compensate=compensate)
        if precision == "int8" and compensate:
            codes, code_scales, transform = compact_int8(self.keys, self.key_scales)
            return replace(self, keys=codes, key_scales=code_scales, query_transform=transform)
        converted, scales = convert_keys(self.keys, self.key_scales, precision, compensate=False, unit=True)
        return replace(self, keys=converted, key_scales=scales)

    def scaled(self, factor: float) -> ScoringPlan:
        """The plan whose logits are `factor` times these: the same labels, softer or harder probabilities.

        Raises ValueError unless factor is above 0, and the scaled plan in the ranges of a plan.
        """
        if not 0 < factor <= LARGEST:
            raise ValueError(f"expected a factor above 0 and up to {LARGEST:g}, got {factor}")
        return replace(
            self,
            tau=factor * self.tau,
            alpha=factor * self.alpha,
            linear=None if self.linear is None else np.float32(factor) * self.linear,
            bias=None if self.bias is None else np.float32(factor) * self.bias,
        )

    def _cache_size(self, n_keys: int) -> float:
        """What the cache term can't exceed at alpha 1."""
        weights = float(n_keys if self.weights is None else np.abs(self.weights).sum(dtype=np.float64))
        return weights * (1.0 if self.values is None else float(np.abs(self.values).max()))

    def _matrices(self) -> dict[str, np.ndarray]:
        """The arrays that are as wide as an embedding."""
        names = ("text", "keys", "linear") if self.feature in _EMBEDDED else ("text", "keys")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _freeze(self, name: str, dtype: type) -> None:
        given = getattr(self, name)
        if given is not None:
            object.__setattr__(self, name, frozen(name, given, dtype))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        array = getattr(self, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")

    def _check_cache(self, n_keys: int) -> None:
        offsets = self.class_offsets
        if self.keys is not None and self.values is not None and offsets is not None:
            raise ValueError("expected keys with class_offsets or with values, got both")
        if (self.keys is None) != (offsets is None and self.values is None):
            raise ValueError("expected keys together with class_offsets or values, got one without the other")
        if self.keys is None:
            if self.query_transform is not None:
                raise ValueError("expected keys where a query_transform is given, got it alone")
            if self.weights is not None:
                raise ValueError("expected keys where weights are given, got weights alone")
            return
        if n_keys < 1:
            raise ValueError("expected at least one key, got 0; leave keys and class_offsets out instead")
        if offsets is None:
            return
        falls = (np.diff(offsets) < 0).any()
        if offsets[0] != 0 or offsets[-1] != n_keys or falls:
            raise ValueError(
                f"expected class_offsets to rise from 0 to the number of keys, {n_keys}, "
                f"got {offsets[0]} to {offsets[-1]}{' with a fall between' if falls else ''}; sort keys by class first"
            )

    def _check_scales(self) -> None:
        quantized = self.key_precision == "int8"
        if quantized and self.key_scales is None:
            raise ValueError("expected key_scales with int8 keys, got none; plan.with_key_precision('int8') makes both")
        if self.key_scales is None:
            return
        if not quantized:
            raise ValueError(
                f"expected key_scales with int8 keys only, got them with {self.key_precision or 'no'} keys"
            )
        check_size("key_scales", self.key_scales, 1e3, "let with_key_precision make them")
        if not (self.key_scales > 0).all():
            raise ValueError(f"expected key_scales > 0, got {self.key_scales.min():.6g}")
