"""Manifests changed on purpose: a wrong fact under a right checksum, to see that the fact itself is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iosr_fast.sealed.manifest import MANIFEST, seal, sha256


def rewrite_manifest(folder: Path, remove: Sequence[str] = (), **facts: Any) -> dict[str, Any]:
    """Write `folder`'s manifest with these facts in place of its own, less those in `remove`; the checksum is right.

    Hashes of files stay as they are. Returns the manifest.
    """
    path = folder / MANIFEST
    manifest = {**json.loads(path.read_bytes()), **facts}
    path.write_bytes(seal({name: value for name, value in manifest.items() if name not in remove}))
    written: dict[str, Any] = json.loads(path.read_bytes())
    return written


def sign_again(folder: Path, **facts: Any) -> dict[str, Any]:
    """`rewrite_manifest` with the sizes and hashes of the files that are there now: nothing but their content tells."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    entries = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
        if name != MANIFEST
    }
    return rewrite_manifest(folder, **{"files": entries, **facts})
