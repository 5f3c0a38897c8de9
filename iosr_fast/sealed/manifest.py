"""manifest.json: what a folder holds, with the size and the SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from iosr_fast.exceptions import DamagedFileError

MANIFEST = "manifest.json"
SCHEMA = 2
OWN_FIELDS = ("schema", "kind", "files", "checksum")  # those that write_manifest adds to the facts
LARGEST_MANIFEST = 64 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_REBUILD = {
    "engine": "iosr-fast build-engine builds it again",
    **dict.fromkeys(("classifier", "head"), "fit and save it again"),
}
_OPEN = {"classifier": "Classifier.load", "head": "FewShotHead.load", "engine": "Classifier(engine=...)"}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(facts: dict[str, Any]) -> bytes:
    """The bytes of manifest.json: `facts`, then "checksum", the SHA-256 of their JSON with sorted keys."""
    values = json.loads(json.dumps({name: value for name, value in facts.items() if name != "checksum"}))
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    sealed = {**values, "checksum": hashlib.sha256(canonical).hexdigest()}
    return (json.dumps(sealed, indent=2, ensure_ascii=False) + "\n").encode()


def write_manifest(
    folder: Path, kind: str, facts: dict[str, Any], known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write manifest.json with the facts and the size and SHA-256 of every other file in `folder` (recursively).

    `known`: SHA-256 by file name, of files that the writer has already hashed.
    """
    known = known or {}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {
        name: {"sha256": known.get(name) or sha256(path), "bytes": path.stat().st_size} for name, path in paths.items()
    }
    content = seal({"schema": SCHEMA, "kind": kind, **facts, "files": files})
    (folder / MANIFEST).write_bytes(content)
    manifest: dict[str, Any] = json.loads(content)
    return manifest


def read_manifest(folder: str | Path, kind: str, verify: bool = True) -> dict[str, Any]:
    """The manifest of `folder`, after checking its kind, its schema and every file.

    `verify=False` skips the files' hashes, never the manifest's own checksum. Use `verified_folder.open_verified` for a
    folder that may be replaced meanwhile. Raises FileNotFoundError without the folder, its manifest or one of its
    files, ValueError for any other defect.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise missing(folder, kind)
    with path.open("rb") as file:
        manifest = parse_manifest(file.read(LARGEST_MANIFEST + 1), folder, kind)
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name} is missing from {folder}; {advice(kind)}")
        if verify and (got := sha256(folder / name)) != entry["sha256"]:
            raise DamagedFileError(mismatch(name, folder, kind, entry["sha256"], got))
    return manifest


def parse_manifest(content: bytes, folder: Path, kind: str) -> dict[str, Any]:
    """Parse the bytes of `folder`'s manifest.json.

    Raises ValueError unless `seal` made them from facts of this kind and schema, with a size and a SHA-256 for each
    file, and no file lies outside the folder.
    """
    path = folder / MANIFEST
    if len(content) > LARGEST_MANIFEST:
        raise DamagedFileError(
            f"expected {path} of at most {LARGEST_MANIFEST >> 20} MiB, got a larger one; {advice(kind)}"
        )
    try:
        manifest: dict[str, Any] = json.loads(content.decode("utf-8"))
        schema, actual_kind, sealed = manifest["schema"], manifest["kind"], seal(manifest)
        for entry in manifest["files"].values():
            if not (_SHA256.fullmatch(entry["sha256"]) and type(entry["bytes"]) is int and entry["bytes"] >= 0):
                raise DamagedFileError(f"expected the SHA-256 and the size of each file, got {entry}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(
            f"{path} is damaged or not a manifest of iosr_fast ({error!r}); {advice(kind)}"
        ) from error
    if schema != SCHEMA:
        raise DamagedFileError(
            f"{path} has schema {schema}, this version of iosr_fast reads schema {SCHEMA}; {advice(kind)}"
        )
    if sealed != content:
        raise DamagedFileError(
            f"{path} is damaged or was changed by hand: it does not match its own checksum; {advice(kind)}"
        )
    if actual_kind != kind:
        opens = f": {_OPEN[actual_kind]} opens it" if actual_kind in _OPEN else ""
        raise DamagedFileError(f"expected {folder} to hold a {kind}, got a {actual_kind}{opens}")
    for name in manifest["files"]:
        if _is_outside(name):
            raise DamagedFileError(
                f"{path} names a file outside its folder, {name!r}: iosr_fast did not write that; {advice(kind)}"
            )
    return manifest


def missing(folder: Path, kind: str) -> FileNotFoundError:
    """The error for a folder without a manifest; it names what a killed save left of it."""
    left = sorted(map(str, folder.parent.glob(f".{folder.name}.*.tmp/old")))
    hint = f"; a killed save left it at {left[-1]}: rename that to {folder}" if left else ""
    return FileNotFoundError(f"expected a folder with a {MANIFEST} ({kind}), found none at {folder / MANIFEST}{hint}")


def advice(kind: str) -> str:
    """How to replace a damaged folder of this kind."""
    return _REBUILD.get(kind, f"create the {kind} again")


def mismatch(name: str, folder: Path, kind: str, expected: str, got: str) -> str:
    """The error message for a file whose SHA-256 differs from its manifest."""
    return (
        f"{name} in {folder} does not match its manifest (expected sha256 {expected[:12]}..., got {got[:12]}...): "
        f"it is damaged or was changed; {advice(kind)}"
    )


def _is_outside(name: str) -> bool:
    """Whether a file name in a manifest leads out of the folder, on any operating system."""
    return any(".." in path.parts or path.anchor for path in (PurePosixPath(name), PureWindowsPath(name)))
