"""Files and folders that are written whole or not at all; folders with a manifest, which hashes every file in them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from iosr_fast.utils.exchange import exchange
from iosr_fast.utils.temporaries import MANIFEST, claimed, remove, remove_leftovers

SCHEMA = 2
LARGEST_MANIFEST = 64 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_MEND = {"engine": "tools/build_engine.py builds it again", "classifier": "fit and save it again"}
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # what rename says of a name that stands for something
_LOOKS = 3  # for a folder that is missing
_RENAMING_S = 0.05  # much longer than a writer that lives takes from one rename to the next
log = logging.getLogger(__name__)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A temporary file beside `target` to write to: it takes its place when the block ends well, and goes otherwise.

    The bytes reach the disk before the name does, and whoever can read the folder can read the file. What killed
    writers left of it goes.
    """
    target = Path(target)
    remove_leftovers(target.parent, of=re.escape(target.name))
    with claimed(target) as free:
        temporary = free.with_name(f"{free.name}.tmp")
        try:
            temporary.touch(0o600, exist_ok=False)
            yield temporary
            _sync_file(temporary)
            os.replace(temporary, target)
            sync_folder(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well; a failure leaves it alone.

    Where Linux can exchange two names, `target` is the old folder or the new one at every moment. Elsewhere there are
    two renames, and `recover` mends what a kill between them leaves. An existing `target` is replaced only if it is a
    folder with a manifest (or empty), never somebody's other files. What killed writers left of it goes. Writers of
    one target don't hinder each other: the last one's folder stays.
    """
    given, target = target, Path(os.path.abspath(target))
    if not _replaceable(target):
        raise FileExistsError(f"{given} exists and holds other things than iosr_fast writes; choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, of=re.escape(target.name))
    with claimed(target) as temporary:
        try:
            temporary.mkdir(0o755)
            temporary.chmod(0o755)  # whatever the umask says
            yield temporary
            _sync(temporary)
            superseded = _set_aside(target)
            superseded += _put(temporary, target)
            sync_folder(target.parent)
        except BaseException:
            remove(temporary)
            recover(target)  # an interrupt may have come between two renames
            raise
        for old in superseded:
            remove(old.parent)  # `target` is whole, so none of them is the only copy


def _replaceable(target: Path) -> bool:
    """Whether nothing has the name, or an empty folder or one with a manifest."""
    while os.path.lexists(target):
        before = folder_identity(target)
        try:
            names = os.listdir(target)
        except OSError:
            names = None
        if names == [] or (names and MANIFEST in names):
            return True
        if before is None and not os.path.islink(target):
            continue  # another writer renames it
        if before == folder_identity(target):
            return False
    return True


def folder_identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from another one that takes its place; None where there is none."""
    try:
        facts = folder.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_ctime_ns


def _put(made: Path, target: Path) -> list[Path]:
    """Give `made` the name `target`. What had the name before is gone, or is returned where it was set aside."""
    asides: list[Path] = []
    while True:  # where other writers rename, the name comes and goes
        try:
            os.rename(made, target)  # where nothing has the name, or an empty folder
            return asides
        except OSError as error:
            if error.errno not in _TAKEN and not os.path.lexists(target):
                raise
        if exchange(made, target):
            remove(made)
            return asides
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        try:
            os.rename(target, aside / "old")
        except FileNotFoundError:
            aside.rmdir()
        except OSError:
            aside.rmdir()
            raise
        else:
            asides.append(aside / "old")


def recover(folder: str | Path) -> bool:
    """Put the missing `folder` back from where a kill between two renames left it. Returns whether it is there now.

    Only systems on which `new_folder` can't exchange names leave such a thing: the old folder, whole, beside it.
    """
    folder = Path(os.path.abspath(folder))
    for _ in range(_LOOKS):  # writers that live rename it meanwhile
        if os.path.lexists(folder):
            return True
        if not _set_aside(folder):
            continue
        time.sleep(_RENAMING_S)
        found = _set_aside(folder)
        if not os.path.lexists(folder) and found:
            try:
                os.rename(found[-1], folder)
            except OSError as error:
                log.warning("%s is missing; its last state is %s and can't be renamed: %s", folder, found[-1], error)
                continue
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


def _sync(folder: Path) -> None:
    """Have all that lies in `folder` reach the disk before the folder gets its name: a power cut leaves no half."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _sync_file(path: Path) -> None:
    path.chmod(0o644)  # tempfile and safetensors write for the owner's eyes only
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    if os.name == "posix":  # elsewhere a folder can't be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def seal(facts: dict[str, Any]) -> bytes:
    """The bytes of manifest.json: `facts` and, last, "checksum", the SHA-256 of their JSON with sorted keys."""
    held = json.loads(json.dumps({name: value for name, value in facts.items() if name != "checksum"}))
    canonical = json.dumps(held, sort_keys=True, separators=(",", ":")).encode()
    whole = {**held, "checksum": hashlib.sha256(canonical).hexdigest()}
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()


def write_manifest(
    folder: Path, kind: str, facts: dict[str, Any], known: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write manifest.json with the facts and the size and SHA-256 of every other file in `folder` (recursively).

    `known`: SHA-256 of files that are not read again, since the writer saw their bytes.
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
    """The manifest of `folder`, after checking that it is of this kind and schema and that every file is as written.

    Without `verify` the files' hashes are left out, never the manifest's own checksum. `held.hold` reads a folder that
    may be replaced meanwhile. Raises FileNotFoundError without the folder, its manifest or one of its files, ValueError
    for anything else amiss.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file() and not (recover(folder) and path.is_file()):
        raise FileNotFoundError(f"expected a folder with a {MANIFEST} ({kind}), found none at {path}")
    with path.open("rb") as opened:
        manifest = parse_manifest(opened.read(LARGEST_MANIFEST + 1), folder, kind)
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{name} is missing from {folder}; {mend(kind)}")
        if verify and (got := sha256(file)) != entry["sha256"]:
            raise ValueError(mismatch(name, folder, kind, entry["sha256"], got))
    return manifest


def parse_manifest(content: bytes, folder: Path, kind: str) -> dict[str, Any]:
    """The facts in the bytes of `folder`'s manifest.json. Raises ValueError unless they are what `seal` made of facts
    of this kind and schema, with a size and a SHA-256 for each file, none of them outside the folder."""
    path = folder / MANIFEST
    if len(content) > LARGEST_MANIFEST:
        raise ValueError(f"expected {path} of at most {LARGEST_MANIFEST >> 20} MiB, got a larger one; {mend(kind)}")
    try:
        manifest: dict[str, Any] = json.loads(content.decode("utf-8"))
        schema, found, sealed = manifest["schema"], manifest["kind"], seal(manifest)
        for entry in manifest["files"].values():
            if not (_SHA256.fullmatch(entry["sha256"]) and type(entry["bytes"]) is int and entry["bytes"] >= 0):
                raise ValueError(f"expected the SHA-256 and the size of each file, got {entry}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no manifest of iosr_fast ({error!r}); {mend(kind)}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version of iosr_fast reads schema {SCHEMA}; {mend(kind)}")
    if sealed != content:
        raise ValueError(f"{path} is damaged or was changed by hand: it does not match its own checksum; {mend(kind)}")
    if found != kind:
        raise ValueError(f"expected {folder} to hold a {kind}, got a {found}")
    for name in manifest["files"]:
        if _leaves(name):
            raise ValueError(
                f"{path} names a file outside its folder, {name!r}: nothing of iosr_fast wrote that; {mend(kind)}"
            )
    return manifest


def mend(kind: str) -> str:
    """How to get another folder of this kind."""
    return _MEND.get(kind, f"make the {kind} again")


def mismatch(name: str, folder: Path, kind: str, expected: str, got: str) -> str:
    """What to say of a file with another SHA-256 than its manifest has."""
    return (
        f"{name} in {folder} does not match its manifest (expected sha256 {expected[:12]}..., got {got[:12]}...): "
        f"it is damaged or was changed; {mend(kind)}"
    )


def _leaves(name: str) -> bool:
    """Whether a file's name in a manifest leads out of the folder, on any system."""
    return any(".." in path.parts or path.anchor for path in (PurePosixPath(name), PureWindowsPath(name)))
