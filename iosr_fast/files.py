"""Files and folders that are written whole or not at all; folders with a manifest, which hashes every file in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SCHEMA = 1


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A temporary file beside `target` to write to: it takes its place when the block ends well, and goes otherwise.

    The bytes reach the disk before the name does, and whoever can read the folder can read the file.
    """
    target = Path(target)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync_file(temporary)
        os.replace(temporary, target)
        _sync_entry(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well; a failure leaves it alone.

    An existing `target` is replaced only if it is a folder with a manifest (or empty), never somebody's other files.
    """
    target = Path(target)
    if target.exists() and not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists and holds other things than iosr_fast writes; choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        _sync(temporary)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / "old")
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
        _sync_entry(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(folder: Path, older_than_s: float = 3600.0, of: str = ".+") -> list[Path]:
    """Remove what killed processes left half written in `folder`: hidden temporary files and folders, and not new ones.

    Those younger than `older_than_s` may be in work and stay, as does a folder that `new_folder` was about to replace:
    it may be the only copy. `of` is a regular expression of the names that they were to get: where the folder may be
    somebody's, it keeps their hidden files out of this. Returns what was removed.
    """
    removed = []
    temporary = re.compile(rf"\.(?:{of})\.[a-z0-9_]{{8}}(?:\.tmp)?")  # tempfile's names for what is to become `of`
    for path in folder.glob(".*") if folder.is_dir() else ():
        with suppress(OSError):  # another process may have removed it, or renamed it into its place
            old = time.time() - path.stat().st_mtime > older_than_s
            if old and temporary.fullmatch(path.name) and ".old." not in path.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


def _sync(folder: Path) -> None:
    """Have all that lies in `folder` reach the disk before the folder gets its name: a power cut leaves no half."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)
    _sync_entry(folder)


def _sync_file(path: Path) -> None:
    path.chmod(0o644)  # tempfile and safetensors write for the owner's eyes only
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_entry(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder can't be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_manifest(folder: Path, kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Write manifest.json with the facts and the size and SHA-256 of every other file in `folder` (recursively)."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"schema": SCHEMA, "kind": kind, **facts, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: str | Path, kind: str, verify: bool = True) -> dict[str, Any]:
    """The manifest of `folder`, after checking that it is of this kind and schema and that every file is as written.

    Raises FileNotFoundError without the folder, its manifest or one of its files, ValueError for anything else amiss.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"expected a folder with a {MANIFEST} ({kind}), found none at {path}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema, found, files = manifest["schema"], manifest["kind"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no manifest of iosr_fast ({error})") from error
    if found != kind:
        raise ValueError(f"expected {folder} to hold a {kind}, got a {found}")
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version of iosr_fast reads schema {SCHEMA}; make it again")
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{name} is missing from {folder}; make the {kind} again")
        if verify and sha256(file) != entry["sha256"]:
            raise ValueError(
                f"{name} in {folder} does not match its manifest (expected sha256 {entry['sha256'][:12]}..., "
                f"got {sha256(file)[:12]}...): it is damaged or was changed; make the {kind} again"
            )
    return manifest
