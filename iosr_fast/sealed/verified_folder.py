"""A folder with a manifest whose files stay open: the bytes that were verified are the bytes that are read.

Every file is opened once, and links below the folder are not followed. A writer that replaces or removes the folder has
no effect on the open files.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.sealed.manifest import LARGEST_MANIFEST, MANIFEST, advice, mismatch, missing, parse_manifest

_RETRY_S = 60.0  # how long to retry while the folder is replaced faster than its files are opened
_MOST_FILES = 256  # all open at once; a common limit of a process is 1,024
_CHUNK = 1 << 20
# Without O_NONBLOCK, opening a pipe in the place of a file would wait for its writer.
_FILE = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
_Signature = tuple[int, int, int, int, int]
_T = TypeVar("_T")


class _OpenFile:
    """An open file of a verified folder. Threads may share it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.signature = _signature(os.fstat(descriptor))

    def chunks(self, largest: int) -> Iterator[bytes]:
        """The first `largest` bytes, and one more if the file is longer."""
        at = 0
        while chunk := os.pread(self._descriptor, min(_CHUNK, largest + 1 - at), at):
            at += len(chunk)
            yield chunk

    @property
    def size(self) -> int:
        """Bytes when it was opened."""
        return self.signature[2]

    @property
    def in_place(self) -> bool:
        """Whether the path still names this file, and the file is unchanged since it was opened."""
        try:
            current = _signature(os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False
        return current == self.signature == _signature(os.fstat(self._descriptor))

    def __del__(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, eq=False)
class VerifiedFolder:
    """A folder of one kind: its manifest, and the files it lists, by name, all open."""

    folder: Path
    kind: str
    manifest: dict[str, Any]
    content: bytes
    files: Mapping[str, _OpenFile]
    folders: Mapping[Path, _Signature]
    verify: bool = True

    def require(self, expected_digest: str) -> None:
        """Raise ValueError for another digest, and as `check_digest` does."""
        check_digest(expected_digest, self.verify)
        _compare_digest(self.folder, self.kind, self.digest, expected_digest)

    @property
    def digest(self) -> str:
        """ "sha256:" and the SHA-256 of manifest.json, which covers all files."""
        return _digest_of(self.content)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises ValueError if they differ from the manifest (never with verify=False)."""
        if not self.verify:
            return b"".join(self.files[name].chunks(self.files[name].size))
        return b"".join(self._verified(name))

    def check(self, but: Collection[str] = ()) -> None:
        """Compare every file but those in `but` with the manifest. Raises ValueError."""
        for name in self.files:
            if self.verify and name not in but:
                for _ in self._verified(name):
                    pass

    def copy(self, name: str, target: Path) -> str:
        """Copy a file to `target`; returns its SHA-256. Raises ValueError if it differs from the manifest's."""
        with target.open("xb") as file:
            for chunk in self._verified(name):
                file.write(chunk)
        sha256: str = self.manifest["files"][name]["sha256"]
        return sha256

    def _verified(self, name: str) -> Iterator[bytes]:
        """A file's bytes. Raises ValueError at the end if they differ from the manifest."""
        entry, digest = self.manifest["files"][name], hashlib.sha256()
        for chunk in self.files[name].chunks(entry["bytes"]):
            digest.update(chunk)
            yield chunk
        if (got := digest.hexdigest()) != entry["sha256"]:
            raise DamagedFileError(mismatch(name, self.folder, self.kind, entry["sha256"], got))

    def part(self, name: str) -> VerifiedFolder:
        """The sub-folder `name`, as listed in this folder's manifest."""
        prefix = f"{name}/"
        entries = {n.removeprefix(prefix): e for n, e in self.manifest["files"].items() if n.startswith(prefix)}
        files = {n: self.files[f"{prefix}{n}"] for n in entries}
        return VerifiedFolder(self.folder / name, self.kind, {"files": entries}, b"", files, self.folders, self.verify)

    def inner(self, name: str, kind: str) -> VerifiedFolder:
        """The sub-folder `name`, which has its own manifest. Raises ValueError if the two manifests differ."""
        part = self.part(name)
        if MANIFEST not in part.files:
            raise DamagedFileError(f"expected {self.folder} to hold {name}/{MANIFEST}, got none; {advice(self.kind)}")
        content = self.read(f"{name}/{MANIFEST}")
        manifest = parse_manifest(content, part.folder, kind)
        own, outer = manifest["files"], {n: e for n, e in part.manifest["files"].items() if n != MANIFEST}
        if own != outer:
            differing = sorted(n for n in {*own, *outer} if own.get(n) != outer.get(n))
            raise DamagedFileError(
                f"expected {part.folder / MANIFEST} and {self.folder / MANIFEST} to agree on every file, got two "
                f"entries for {', '.join(differing)}; {advice(self.kind)}"
            )
        files = {n: part.files[n] for n in own}
        return VerifiedFolder(part.folder, kind, manifest, content, files, self.folders, self.verify)

    def open_with(self, opener: Callable[[Path], _T]) -> _T:
        """Call `opener` with a path of this folder, for libraries that only take paths.

        If the folder was changed since it was opened, before or while `opener` runs, `opener` is called again with a
        private copy, which is compared with the manifest. Raises what `opener` raises, and ValueError.
        """
        if self._in_place:
            try:
                result = opener(self.folder)
            except Exception:
                if self._in_place:
                    raise
            else:
                if self._in_place:
                    return result
        with tempfile.TemporaryDirectory(prefix="iosr-fast-copy-", ignore_cleanup_errors=True) as private:
            for name in self.files:
                (Path(private) / name).parent.mkdir(parents=True, exist_ok=True)
                self.copy(name, Path(private) / name)
            return opener(Path(private))

    @property
    def _in_place(self) -> bool:
        try:
            current = {path: _signature(path.stat()) for path in self.folders}
        except OSError:
            return False
        return current == self.folders and all(file.in_place for file in self.files.values())


def open_verified(
    folder: str | Path, kind: str, verify: bool = True, expected_digest: str | None = None
) -> VerifiedFolder:
    """Open a folder of this kind and all files that its manifest lists, all written by one writer.

    Only the manifest is read now: `read`, `copy` and `check` compare files with it (unless `verify` is False).
    `expected_digest` is compared with `digest` before anything is parsed. A folder that is replaced meanwhile is opened
    again. Raises FileNotFoundError without the folder, its manifest or one of its files, ValueError for a link, a
    special file, and as `manifest.parse_manifest` and `check_digest` do.
    """
    folder = Path(folder)
    if expected_digest is not None:
        check_digest(expected_digest, verify)
    deadline = time.monotonic() + _RETRY_S
    while True:
        before = folder_identity(folder)
        try:
            opened = _open(folder, kind, verify, expected_digest)
        except Exception:
            if folder_identity(folder) == before or time.monotonic() > deadline:
                raise
        else:
            if folder_identity(folder) == before:
                return opened


def folder_identity(folder: Path, follow_symlinks: bool = True) -> tuple[int, int, int] | None:
    """Distinguishes a folder from another one that replaces it; None where there is none."""
    try:
        status = folder.stat(follow_symlinks=follow_symlinks)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _compare_digest(folder: Path, kind: str, got: str, expected: str | None) -> None:
    if expected not in (None, got):
        raise IosrFastError(
            f"expected {folder} with the digest {expected}, got {got}: it is another {kind} than the pinned one, or it "
            "was changed"
        )


def check_digest(expected: str, verify: bool) -> None:
    """Raise ValueError for a malformed digest, and for verify=False, which would not compare the files with it."""
    digits = expected.removeprefix("sha256:")
    if digits == expected or len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise IosrFastError(
            f"expected a digest of the form sha256:<64 hexadecimal digits>, got {expected!r}; `iosr-fast info FOLDER` "
            "prints it"
        )
    if not verify:
        raise IosrFastError(
            "expected verify=True with expected_digest, which says nothing about files that are not verified"
        )


def _open(folder: Path, kind: str, verify: bool, expected_digest: str | None) -> VerifiedFolder:
    try:
        manifest_file = _open_file(folder, MANIFEST, kind)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(folder, kind) from error
    content = b"".join(manifest_file.chunks(LARGEST_MANIFEST))
    _compare_digest(folder, kind, _digest_of(content), expected_digest)
    manifest = parse_manifest(content, folder, kind)
    if len(manifest["files"]) > _MOST_FILES:
        raise IosrFastError(f"expected at most {_MOST_FILES} files in {folder}, got {len(manifest['files'])}")
    files = {}
    for name in manifest["files"]:
        try:
            files[name] = _open_file(folder, name, kind)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{name} is missing from {folder}; {advice(kind)}") from error
    paths = {parent for name in files for parent in (folder / name).parents if parent.is_relative_to(folder)}
    folders = {path: _signature(path.stat()) for path in {folder, *paths}}
    return VerifiedFolder(folder, kind, manifest, content, files, folders, verify)


def _open_file(folder: Path, name: str, kind: str) -> _OpenFile:
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise IosrFastError(
                f"{path} is a link, expected a file or folder of its own: copy it with `cp -rL` to resolve it"
            )
    descriptor = os.open(path, _FILE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(f"{name} in {folder} is not a regular file; {advice(kind)}")
    return _OpenFile(path, descriptor)


def _signature(status: os.stat_result) -> _Signature:
    """Changes when a file is replaced or written to, and when a folder is replaced or its names change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
