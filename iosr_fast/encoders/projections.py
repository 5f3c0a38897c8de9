"""The projections of a CLIP into its shared space, a file of the engine folder: the reducer "isoclip" needs them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from iosr_fast.utils.schema import refused
from iosr_fast.utils.verified_folder import VerifiedFolder

FILE = "projections.safetensors"


class Projections(NamedTuple):
    """The last linear layers of both encoders: an embedding is unit(projection @ features).

    image (D, d_i) float32 and text (D, d_t) float32, of features of widths d_i and d_t.

    >>> import numpy as np
    >>> Projections(image=np.eye(2, 3), text=np.eye(2)).image.shape
    (2, 3)
    """

    image: np.ndarray
    text: np.ndarray


def read_projections(source: VerifiedFolder | None) -> Projections | None:
    """Those of an engine folder, or None if it has none. Raises DamagedFileError for other content."""
    if source is None or FILE not in source.files:
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load

    width = source.manifest["width"]
    try:
        arrays = load(source.read(FILE))
        projections = Projections(arrays["image"], arrays["text"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise refused(source, f"{FILE}: expected the arrays image and text, got {error!r}") from error
    for name, array in zip(Projections._fields, projections, strict=True):
        if array.dtype != np.float32 or array.ndim != 2 or len(array) != width or not np.isfinite(array).all():
            form = f"{array.dtype} {array.shape}"
            raise refused(source, f"{FILE}: expected {name} finite, float32, of shape ({width}, any), got {form}")
    return projections
