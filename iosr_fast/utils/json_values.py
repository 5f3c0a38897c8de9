"""Results as JSON."""

from __future__ import annotations

from typing import Any

import msgspec


def json_values(value: Any) -> Any:
    """What JSON has for dataclasses, mappings, sequences, arrays and text: null for NaN and infinity, and text for all
    other objects, such as paths.

    >>> import numpy as np
    >>> from pathlib import Path
    >>> json_values({"file": Path("a.png"), "counts": np.arange(2), "share": float("nan")})
    {'file': 'a.png', 'counts': [0, 1], 'share': None}
    """
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
