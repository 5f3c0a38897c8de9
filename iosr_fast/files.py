"""Files and folders that are written whole or not at all; folders with a manifest, which hashes every file in them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from iosr_fast.exchange import exchange

MANIFEST = "manifest.json"
SCHEMA = 2
_MEND = {"engine": "tools/build_engine.py builds it again", "classifier": "fit and save it again"}
_ATTEMPTS = 3
_RENAMING_S = 0.05  # much longer than a writer that lives takes from one rename to the next
_T = TypeVar("_T")
log = logging.getLogger(__name__)


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

    Where Linux can exchange two names, `target` is the old folder or the new one at every moment. Elsewhere there are
    two renames, and `recover` mends what a kill between them leaves. An existing `target` is replaced only if it is a
    folder with a manifest (or empty), never somebody's other files. What killed writers left of it goes when it is an
    hour old.
    """
    given, target = target, Path(os.path.abspath(target))
    empty = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not (target / MANIFEST).is_file() and not empty:
        raise FileExistsError(f"{given} exists and holds other things than iosr_fast writes; choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, of=re.escape(target.name))
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        _sync(temporary)
        superseded = _set_aside(target)
        superseded += _put(temporary, target)
        _sync_entry(target.parent)
    except BaseException:
        _remove(temporary)
        recover(target)  # an interrupt may have come between two renames
        raise
    for old in superseded:
        _remove(old.parent)  # `target` is whole, so none of them is the only copy


def _put(made: Path, target: Path) -> list[Path]:
    """Give `made` the name `target`. What had the name before is gone, or is returned where it was set aside."""
    asides: list[Path] = []
    for attempt in range(_ATTEMPTS):
        try:
            os.rename(made, target)  # where nothing has the name, or an empty folder
            break
        except OSError:
            if not os.path.lexists(target) or attempt == _ATTEMPTS - 1:
                raise
        if exchange(made, target):
            _remove(made)
            break
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        try:
            os.rename(target, aside / "old")
        except OSError:
            aside.rmdir()
            raise
        asides.append(aside / "old")
    return asides


def recover(folder: str | Path) -> bool:
    """Put the missing `folder` back from where a kill between two renames left it. Returns whether it is there now.

    Only systems on which `new_folder` can't exchange names leave such a thing: the old folder, whole, beside it.
    """
    folder = Path(os.path.abspath(folder))
    if os.path.lexists(folder):
        return True
    if not _set_aside(folder):
        return False
    time.sleep(_RENAMING_S)
    found = _set_aside(folder)
    if not os.path.lexists(folder) and found:
        try:
            os.rename(found[-1], folder)
        except OSError as error:
            log.warning("%s is missing; its last state is %s and can't be renamed: %s", folder, found[-1], error)
            return os.path.lexists(folder)
        log.warning("%s was missing: a save was killed, and what it was about to replace is back", folder)
        with suppress(OSError):
            found[-1].parent.rmdir()
    return os.path.lexists(folder)


def _set_aside(folder: Path) -> list[Path]:
    """Folders with a manifest that were to be replaced when a writer of `folder` was killed; the newest is last."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.old\.[a-z0-9_]{{8}}")
    found = []
    for aside in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if name.fullmatch(aside.name):
            with suppress(OSError):  # another process may be at it
                found.append(((aside / "old" / MANIFEST).stat().st_mtime_ns, aside / "old"))
    return [path for _, path in sorted(found)]


def remove_leftovers(folder: Path, older_than_s: float = 3600.0, of: str = ".+") -> list[Path]:
    """Remove what killed processes left in `folder`: hidden temporary files and folders, and not new ones.

    Those younger than `older_than_s` may be in work and stay, as does a folder that `new_folder` was about to replace:
    it may be the only copy. `of` is a regular expression of the names that they were to get: where the folder may be
    somebody's, it keeps their hidden files out of this. Returns what was removed.
    """
    removed = []
    temporary = re.compile(rf"\.(?:{of})(?:\.old)?\.[a-z0-9_]{{8}}(?:\.tmp)?")  # tempfile's names beside `of`
    aside = re.compile(r"\..+\.old\.[a-z0-9_]{8}")
    for path in folder.glob(".*") if folder.is_dir() else ():
        with suppress(OSError):  # another process may have removed it, or renamed it into its place
            old = time.time() - path.lstat().st_mtime > older_than_s
            only_copy = aside.fullmatch(path.name) and ((path / "old" / MANIFEST).exists() or not path.is_dir())
            if old and temporary.fullmatch(path.name) and not only_copy:
                _remove(path)
                if not os.path.lexists(path):
                    removed.append(path)
    return removed


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link. What can't be removed is a leftover for later, no reason to fail."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(folder: Path) -> None:
    """Have all that lies in `folder` reach the disk before the folder gets its name: a power cut leaves no half."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)
        elif path.is_dir():
            _sync_entry(path)
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


def stable_read(folder: str | Path, read: Callable[[], _T]) -> _T:
    """What `read` returns of `folder`, all of it from before or all of it from after a writer replaced the folder.

    `read` opens every file by its path, and the folder may be another one between two of them. So it is called again,
    three times in all, where manifest.json changed meanwhile, whether it failed or not. Raises what `read` raises while
    the folder stands still, and RuntimeError where it never did.
    """
    folder, failed = Path(folder), None
    for _ in range(_ATTEMPTS):
        before = _identity(folder)
        try:
            result = read()
        except Exception as error:  # which one, depends on the file that was replaced under it
            if _identity(folder) == before:
                raise
            failed = error
        else:
            if _identity(folder) == before:
                return result
    raise RuntimeError(f"{folder} was replaced each of the {_ATTEMPTS} times it was read; try again") from failed


def _identity(folder: Path) -> tuple[int, int, bytes] | None:
    try:
        with (folder / MANIFEST).open("rb") as file:
            facts = os.fstat(file.fileno())
            return facts.st_ino, facts.st_mtime_ns, file.read()
    except OSError:
        return None


def seal(facts: dict[str, Any]) -> bytes:
    """The bytes of manifest.json: `facts` and, last, "checksum", the SHA-256 of their JSON with sorted keys."""
    held = json.loads(json.dumps({name: value for name, value in facts.items() if name != "checksum"}))
    canonical = json.dumps(held, sort_keys=True, separators=(",", ":")).encode()
    whole = {**held, "checksum": hashlib.sha256(canonical).hexdigest()}
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()


def write_manifest(folder: Path, kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Write manifest.json with the facts and the size and SHA-256 of every other file in `folder` (recursively)."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = seal({"schema": SCHEMA, "kind": kind, **facts, "files": files})
    (folder / MANIFEST).write_bytes(content)
    manifest: dict[str, Any] = json.loads(content)
    return manifest


def read_manifest(folder: str | Path, kind: str, verify: bool = True) -> dict[str, Any]:
    """The manifest of `folder`, after checking that it is of this kind and schema and that every file is as written.

    Without `verify` the files' hashes are left out, never the manifest's own checksum. Raises FileNotFoundError without
    the folder, its manifest or one of its files, ValueError for anything else amiss.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file() and not (recover(folder) and path.is_file()):
        raise FileNotFoundError(f"expected a folder with a {MANIFEST} ({kind}), found none at {path}")
    content = path.read_bytes()
    mend = _MEND.get(kind, f"make the {kind} again")
    try:
        manifest: dict[str, Any] = json.loads(content.decode("utf-8"))
        schema, found, sealed = manifest["schema"], manifest["kind"], seal(manifest)
        files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no manifest of iosr_fast ({error!r}); {mend}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version of iosr_fast reads schema {SCHEMA}; {mend}")
    if sealed != content:
        raise ValueError(f"{path} is damaged or was changed by hand: it does not match its own checksum; {mend}")
    if found != kind:
        raise ValueError(f"expected {folder} to hold a {kind}, got a {found}")
    for name, expected in files.items():
        if _leaves(name):
            raise ValueError(
                f"{path} names a file outside its folder, {name!r}: nothing of iosr_fast wrote that; {mend}"
            )
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{name} is missing from {folder}; {mend}")
        if verify and (got := sha256(file)) != expected:
            raise ValueError(
                f"{name} in {folder} does not match its manifest (expected sha256 {expected[:12]}..., "
                f"got {got[:12]}...): it is damaged or was changed; {mend}"
            )
    return manifest


def _leaves(name: str) -> bool:
    """Whether a file's name in a manifest leads out of the folder, on any system."""
    return any(".." in path.parts or path.anchor for path in (PurePosixPath(name), PureWindowsPath(name)))
