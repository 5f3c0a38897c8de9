"""What a Head has learnt from left-out support images, as arrays of a bundle: a loaded one need not leave them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.head.multi_label_predictions import AnyHead
from iosr_fast.methods.conformal import LeftOutLabels
from iosr_fast.methods.known_scores import score_names
from iosr_fast.methods.unknown import Unknown
from iosr_fast.store.bundle_schema import LEFT_OUT_ARRAYS, parse_arrays

LEFT_OUT = "left_out.safetensors"
_LABELS = ("odds", "confidence", "right", "log_loss")
_BY_CLASS = ("labels", "class_odds")  # which earlier versions did not write


def left_out_arrays(head: AnyHead) -> dict[str, np.ndarray]:
    """The arrays of LEFT_OUT; none before the first use of them."""
    arrays: dict[str, np.ndarray] = {}
    if (fitted := head.computed("unknown")) is not None:
        auroc = [] if np.isnan(fitted.auroc) else [fitted.auroc]
        arrays |= {"weights": fitted.weights, "bias": np.array([fitted.bias]), "left_out": fitted.left_out}
        arrays |= {"auroc": np.array(auroc)}
    if (labels := head.computed("left_out_labels")) is not None:
        arrays |= {name: np.asarray(getattr(labels, name), np.float64) for name in _LABELS} | {
            name: getattr(labels, name) for name in _BY_CLASS
        }
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def with_left_out(head: AnyHead, read: Callable[[str], bytes | None]) -> AnyHead:
    """The head that knows what `left_out_arrays` took apart. Raises ValueError for a damaged file."""
    content = read(LEFT_OUT)
    if content is None:
        return head
    try:
        head = head.one_label(LEFT_OUT, "leave the file out")
        arrays = parse_arrays(content, LEFT_OUT_ARRAYS, {"K": len(_names(head))})
        labels = _labels(arrays, len(head.uids))
        return head.with_computed(unknown=_unknown(head, arrays), left_out_labels=labels)
    except ValueError as error:
        raise DamagedFileError(f"{LEFT_OUT}: {error}") from error


def _unknown(head: Head, arrays: Mapping[str, np.ndarray]) -> Unknown | None:
    if not _complete(arrays, ("weights", "bias", "left_out", "auroc")):
        return None
    if len(arrays["bias"]) != 1 or len(arrays["auroc"]) > 1:
        raise IosrFastError(f"expected one bias and auroc, got {len(arrays['bias'])} and {len(arrays['auroc'])}")
    auroc = float(arrays["auroc"][0]) if len(arrays["auroc"]) else float("nan")
    numbers = arrays["weights"], float(arrays["bias"][0]), arrays["left_out"], auroc
    return Unknown(head.support, _names(head), *numbers, head.unknown_images)


def _names(head: Head) -> tuple[str, ...]:
    return score_names(head.support, head.needs_adapted, head.unknown_images)


def _labels(arrays: Mapping[str, np.ndarray], n_classes: int) -> LeftOutLabels | None:
    if not _complete(arrays, _LABELS) or not _complete(arrays, _BY_CLASS):
        return None
    labels = LeftOutLabels(*(arrays[name] for name in (*_LABELS, *_BY_CLASS)))
    if len(labels.labels) and not 0 <= labels.labels.min() <= labels.labels.max() < n_classes:
        raise IosrFastError(f"expected labels in 0..{n_classes - 1}, got others")
    if ((labels.confidence < 0) | (labels.confidence > 1)).any() or not np.isin(labels.right, (0, 1)).all():
        raise IosrFastError("expected confidence in 0..1 and right of 0 and 1, got others")
    return replace(labels, right=labels.right > 0)


def _complete(arrays: Mapping[str, np.ndarray], names: tuple[str, ...]) -> bool:
    """Whether all of these arrays are there, or none."""
    missing = [name for name in names if name not in arrays]
    if missing and len(missing) < len(names):
        raise IosrFastError(f"expected the arrays {', '.join(names)} together, got none of {', '.join(missing)}")
    return not missing
