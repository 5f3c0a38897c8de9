"""ScoringPlan: what every training-free method compiles to, and score(), which executes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from iosr_fast import dispatch
from iosr_fast.encoder import Embeddings

Which = Literal["plain", "adapted"]

UNIT_NORM_TOLERANCE = 1e-3
# The NumPy implementation holds one tile of affinities of this shape at a time: 16 MB.
_KEYS_PER_TILE = 4096
_QUERIES_PER_TILE = 1024


@dataclass(frozen=True, eq=False)
class ScoringPlan:
    """Arrays and constants of

        logits[b, c] = tau * <plain[b], text[c]>
                     + alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - <query[b], keys[j]>))
                     + <feature[b], linear[c]> + bias[c]

    with C classes, D channels and N keys. A term whose arrays are None is left out; text, keys or linear must be there.

    text           (C, D) float32, unit rows
    keys           (N, D) float32, unit rows, sorted by class; N >= 1
    class_offsets  (C + 1,) int64; class c owns keys[class_offsets[c]:class_offsets[c + 1]], which may be none
    weights        (N,) float32; None stands for all ones
    linear, bias   (C, D) and (C,) float32
    query, feature which embedding meets the keys, and which the linear term

    Arrays are converted to these dtypes, made C-contiguous and read-only (copied only where they aren't already).
    Raises ValueError where a shape, a norm, an offset or a constant is wrong or a value isn't finite.
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
    feature: Which = "plain"

    def __post_init__(self) -> None:
        if self.n_classes < 1:
            raise ValueError(f"expected n_classes >= 1, got {self.n_classes}")
        for name in ("text", "keys", "weights", "linear", "bias"):
            self._freeze(name, np.float32)
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
        self._check_shape("linear", (self.n_classes, width))
        self._check_shape("bias", (self.n_classes,))
        self._check_shape("weights", (n_keys,))
        self._check_shape("class_offsets", (self.n_classes + 1,))
        if width < 1:
            raise ValueError("expected a width of at least 1, got 0")
        self._check_cache(n_keys)
        for name in ("text", "keys"):
            array = getattr(self, name)
            if array is not None:
                check_unit_rows(name, array)
        for name in ("tau", "alpha", "beta"):
            value = float(getattr(self, name))
            if not np.isfinite(value) or (name == "beta" and value < 0):
                raise ValueError(f"expected {name} finite{' and >= 0' if name == 'beta' else ''}, got {value}")
            object.__setattr__(self, name, value)
        for name in ("query", "feature"):
            if getattr(self, name) not in ("plain", "adapted"):
                raise ValueError(f'expected {name} to be "plain" or "adapted", got {getattr(self, name)!r}')

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

    def _matrices(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("text", "keys", "linear") if getattr(self, name) is not None}

    def _freeze(self, name: str, dtype: type) -> None:
        given = getattr(self, name)
        if given is None:
            return
        if dtype is np.int64 and np.asarray(given).dtype.kind not in "iu":
            raise ValueError(f"expected {name} of integers, got {np.asarray(given).dtype}")
        array: np.ndarray = np.ascontiguousarray(given, dtype=dtype)
        if array.flags.writeable:
            # The caller may go on writing to what was passed in; a fresh conversion is nobody else's.
            array = array.copy() if np.shares_memory(array, given) else array
            array.flags.writeable = False
        if not np.isfinite(array).all():
            raise ValueError(
                f"expected {name} to be finite, got {np.count_nonzero(~np.isfinite(array))} NaN or infinite"
            )
        object.__setattr__(self, name, array)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        array = getattr(self, name)
        if array is not None and array.shape != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")

    def _check_cache(self, n_keys: int) -> None:
        offsets = self.class_offsets
        if (self.keys is None) != (offsets is None):
            raise ValueError("expected keys and class_offsets together, got one without the other")
        if offsets is None:
            if self.weights is not None:
                raise ValueError("expected keys where weights are given, got weights alone")
            return
        if n_keys < 1:
            raise ValueError("expected at least one key, got 0; leave keys and class_offsets out instead")
        falls = (np.diff(offsets) < 0).any()
        if offsets[0] != 0 or offsets[-1] != n_keys or falls:
            raise ValueError(
                f"expected class_offsets to rise from 0 to the number of keys, {n_keys}, "
                f"got {offsets[0]} to {offsets[-1]}{' with a fall between' if falls else ''}; sort keys by class first"
            )


def score(plan: ScoringPlan, embeddings: Embeddings, impl: str = "auto") -> np.ndarray:
    """Execute `plan` on a batch: logits of shape (B, C), float32. argmax over axis 1 gives the labels.

    Equals the formula of ScoringPlan (reference.py spells it out) without forming the (B, N) affinity or a one-hot
    matrix. `impl` names an implementation (`iosr-fast info` lists them); "auto" takes the best one here, or the one
    that the environment variable IOSR_FAST_IMPL names. Raises ValueError where the embeddings don't fit the plan or
    aren't finite and of unit norm, or where no such implementation exists; RuntimeError where it exists and can't run.
    """
    return score_with_path(plan, embeddings, impl)[0]


def score_with_path(plan: ScoringPlan, embeddings: Embeddings, impl: str = "auto") -> tuple[np.ndarray, str]:
    """score(), and the path that computed it: "numpy", "cpp/scalar", "reference"."""
    checked = _check_embeddings(plan, embeddings)
    run = dispatch.choose(impl)
    return run(plan, checked)


def check_unit_rows(name: str, rows: np.ndarray) -> None:
    """Raise ValueError unless each row of (M, D) is finite and has norm 1 to within UNIT_NORM_TOLERANCE."""
    norms = np.sqrt(np.einsum("md,md->m", rows, rows))
    off = np.abs(norms - 1.0)
    # Written so that NaN, which compares false with everything, counts as wrong.
    wrong = np.flatnonzero(~(off <= UNIT_NORM_TOLERANCE))
    if len(wrong):
        row = int(wrong[0])
        mend = (
            f"divide by np.linalg.norm({name}, axis=1, keepdims=True)"
            if np.isfinite(rows[wrong]).all()
            else "it holds NaN or infinite values"
        )
        raise ValueError(
            f"expected {name} rows of unit norm, got {len(wrong)} of {len(rows)} that aren't "
            f"(row {row} has norm {norms[row]:.6g}); {mend}"
        )


def _check_embeddings(plan: ScoringPlan, embeddings: Embeddings) -> Embeddings:
    if plan.needs_adapted and embeddings.adapted is None:
        raise ValueError(
            "expected adapted embeddings, which this plan reads, got None; encode with an encoder that has an adapter, "
            'or compile the plan for query="plain"'
        )

    def check(name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim != 2 or array.shape[1] != plan.width or len(array) != len(embeddings.plain):
            raise ValueError(
                f"expected {name} embeddings of shape ({len(embeddings.plain)}, {plan.width}), got {array.shape}; "
                "the plan and the embeddings must come from the same encoder"
            )
        array = np.ascontiguousarray(array, dtype=np.float32)
        check_unit_rows(name, array)
        return array

    adapted = embeddings.adapted
    return Embeddings(check("plain", embeddings.plain), None if adapted is None else check("adapted", adapted))


def _rows(embeddings: Embeddings, which: Which) -> np.ndarray:
    rows = embeddings.plain if which == "plain" else embeddings.adapted
    assert rows is not None  # _check_embeddings has seen to it
    return rows


def score_numpy(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """float32 NumPy: one GEMM, one exponential and one segment sum a tile of keys, in bounded memory."""
    logits = np.zeros((len(embeddings), plan.n_classes), dtype=np.float32)
    if plan.text is not None:
        np.matmul(embeddings.plain, plan.text.T, out=logits)
        logits *= np.float32(plan.tau)
    if plan.keys is not None:
        for first in range(0, len(logits), _QUERIES_PER_TILE):
            block = slice(first, first + _QUERIES_PER_TILE)
            _add_cache_term(plan, _rows(embeddings, plan.query)[block], logits[block])
    if plan.linear is not None:
        logits += _rows(embeddings, plan.feature) @ plan.linear.T
    if plan.bias is not None:
        logits += plan.bias
    return logits, "numpy"


def _add_cache_term(plan: ScoringPlan, query: np.ndarray, logits: np.ndarray) -> None:
    assert plan.keys is not None and plan.class_offsets is not None
    offsets = plan.class_offsets
    for begin in range(0, len(plan.keys), _KEYS_PER_TILE):
        end = min(begin + _KEYS_PER_TILE, len(plan.keys))
        affinity = plan.keys[begin:end] @ query.T
        affinity -= np.float32(1.0)
        affinity *= np.float32(plan.beta)
        np.exp(affinity, out=affinity)
        if plan.weights is not None:
            affinity *= plan.weights[begin:end, None]
        # reduceat gives a[i] for an empty segment rather than 0, so only classes with keys in this tile take part.
        starts = np.clip(offsets[:-1], begin, end)
        classes = np.flatnonzero(np.clip(offsets[1:], begin, end) > starts)
        sums = np.add.reduceat(affinity, starts[classes] - begin, axis=0)
        logits[:, classes] += np.float32(plan.alpha) * sums.T


def score_cpp(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """The C++ kernel of csrc/scoring; IOSR_FAST_SIMD forces one of its instruction sets."""
    from iosr_fast import _C

    logits, path = _C.score(
        n_classes=plan.n_classes,
        plain=embeddings.plain,
        query=None if plan.keys is None else _rows(embeddings, plan.query),
        feature=None if plan.linear is None else _rows(embeddings, plan.feature),
        text=plan.text,
        tau=plan.tau,
        keys=plan.keys,
        class_offsets=plan.class_offsets,
        weights=plan.weights,
        alpha=plan.alpha,
        beta=plan.beta,
        linear=plan.linear,
        bias=plan.bias,
    )
    return logits, f"cpp/{path}"


def score_reference(plan: ScoringPlan, embeddings: Embeddings) -> tuple[np.ndarray, str]:
    """reference.py, rounded to float32 at the end."""
    from iosr_fast import reference

    return reference.score_reference(plan, embeddings).astype(np.float32), "reference"
