"""Manifests changed on purpose: a wrong fact under a right checksum, to see that the fact itself is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iosr_fast.files import MANIFEST, seal


def rewrite_manifest(folder: Path, remove: Sequence[str] = (), **facts: Any) -> dict[str, Any]:
    """Write `folder`'s manifest with these facts in place of its own, less those in `remove`; the checksum is right.

    Hashes of files stay as they are. Returns the manifest.
    """
    path = folder / MANIFEST
    manifest = {**json.loads(path.read_bytes()), **facts}
    path.write_bytes(seal({name: value for name, value in manifest.items() if name not in remove}))
    written: dict[str, Any] = json.loads(path.read_bytes())
    return written
