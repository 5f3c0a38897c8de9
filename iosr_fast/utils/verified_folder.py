"""A folder with a manifest, held open: what was verified is what is read, whatever becomes of its names meanwhile.

Every file is opened once, through the folder that was opened first, and links below that folder are not followed. A
writer that replaces the folder, or removes the old one, changes nothing of what is held.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from iosr_fast.utils.files import LARGEST_MANIFEST, MANIFEST, folder_identity, mend, mismatch, parse_manifest, recover

_PATIENCE_S = 60.0  # that a folder may be replaced faster than its files are opened
_MOST_FILES = 256  # all open at a time, of 1,024 that a process may often have
_CHUNK = 1 << 20
_AT_FOLDERS = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
# Without O_NONBLOCK, opening a pipe that somebody put there would wait for its writer.
_FILE = _READ | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_Signature = tuple[int, int, int, int, int]
_T = TypeVar("_T")


class HeldFile:
    """An open file of a held folder, and what its manifest says of it. Safe to share between threads."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.signature = _signature(os.fstat(descriptor))
        self._file = io.FileIO(descriptor, "rb")
        self._lock = threading.Lock()

    def chunks(self, largest: int) -> Iterator[bytes]:
        """Its first `largest` bytes, and one more where there are more; another thread waits for the last."""
        left = largest + 1
        with self._lock:
            self._file.seek(0)
            while left and (chunk := self._file.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk

    @property
    def size(self) -> int:
        """In bytes, when it was opened."""
        return self.signature[2]

    @property
    def in_place(self) -> bool:
        """Whether the path still leads to this file, and the file is unchanged since it was opened."""
        try:
            found = _signature(os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False
        return found == self.signature == _signature(os.fstat(self._file.fileno()))

    def __del__(self) -> None:
        self._file.close()


@dataclass(frozen=True, eq=False)
class Held:
    """A folder of one kind with its manifest and the files that it names, by their names, all open."""

    folder: Path
    kind: str
    manifest: dict[str, Any]
    content: bytes
    files: Mapping[str, HeldFile]
    folders: Mapping[Path, _Signature]
    verify: bool = True

    def require(self, expected_digest: str) -> None:
        """Raise ValueError for another digest, and where `check_digest` does."""
        check_digest(expected_digest, self.verify)
        _compare_digest(self.folder, self.kind, self.digest, expected_digest)

    @property
    def digest(self) -> str:
        """ "sha256:" and the SHA-256 of manifest.json, which has that of every other file: of all that is here."""
        return _digest_of(self.content)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises ValueError, unless this is held without `verify`, where the manifest has others."""
        if not self.verify:
            return b"".join(self.files[name].chunks(self.files[name].size))
        return b"".join(self._verified(name))

    def check(self, but: Collection[str] = ()) -> None:
        """Compare every file with the manifest, without those that are `read`. Raises ValueError."""
        for name in self.files:
            if self.verify and name not in but:
                for _ in self._verified(name):
                    pass

    def copy(self, name: str, target: Path) -> str:
        """Copy a file to `target`; its SHA-256, which is the manifest's. Raises ValueError where it is not."""
        with target.open("xb") as copied:
            for chunk in self._verified(name):
                copied.write(chunk)
        sha256: str = self.manifest["files"][name]["sha256"]
        return sha256

    def _verified(self, name: str) -> Iterator[bytes]:
        """A file's bytes; ValueError at their end where the manifest has others."""
        entry, digest = self.manifest["files"][name], hashlib.sha256()
        for chunk in self.files[name].chunks(entry["bytes"]):
            digest.update(chunk)
            yield chunk
        if (got := digest.hexdigest()) != entry["sha256"]:
            raise ValueError(mismatch(name, self.folder, self.kind, entry["sha256"], got))

    def part(self, name: str) -> Held:
        """The folder `name` in this one, as this one's manifest has it."""
        prefix = f"{name}/"
        entries = {n.removeprefix(prefix): e for n, e in self.manifest["files"].items() if n.startswith(prefix)}
        files = {n: self.files[f"{prefix}{n}"] for n in entries}
        return Held(self.folder / name, self.kind, {"files": entries}, b"", files, self.folders, self.verify)

    def inner(self, name: str, kind: str) -> Held:
        """The folder `name` in this one, which has a manifest of its own. Raises ValueError where the two differ."""
        part = self.part(name)
        if MANIFEST not in part.files:
            raise ValueError(f"expected {self.folder} to hold {name}/{MANIFEST}, got none; {mend(self.kind)}")
        content = self.read(f"{name}/{MANIFEST}")
        manifest = parse_manifest(content, part.folder, kind)
        own, outer = manifest["files"], {n: e for n, e in part.manifest["files"].items() if n != MANIFEST}
        if own != outer:
            differing = sorted(n for n in {*own, *outer} if own.get(n) != outer.get(n))
            raise ValueError(
                f"expected {part.folder / MANIFEST} and {self.folder / MANIFEST} to say the same of each file, got two "
                f"answers about {', '.join(differing)}; {mend(self.kind)}"
            )
        files = {n: part.files[n] for n in own}
        return Held(part.folder, kind, manifest, content, files, self.folders, self.verify)

    def open_with(self, opener: Callable[[Path], _T]) -> _T:
        """What `opener` makes of this folder, for libraries that take nothing but paths.

        Where the folder was replaced or touched since it was held, before or while `opener` runs, that is made again
        from a private copy, which is compared with the manifest. Raises what `opener` raises, and ValueError.
        """
        if self._in_place:
            try:
                made = opener(self.folder)
            except Exception:
                if self._in_place:
                    raise
            else:
                if self._in_place:
                    return made
        with tempfile.TemporaryDirectory(prefix="iosr-fast-held-", ignore_cleanup_errors=True) as private:
            for name in self.files:
                (Path(private) / name).parent.mkdir(parents=True, exist_ok=True)
                self.copy(name, Path(private) / name)
            return opener(Path(private))

    @property
    def _in_place(self) -> bool:
        try:
            found = {path: _signature(path.stat()) for path in self.folders}
        except OSError:
            return False
        return found == self.folders and all(file.in_place for file in self.files.values())


def hold(folder: str | Path, kind: str, verify: bool = True, expected_digest: str | None = None) -> Held:
    """Open a folder of this kind and all files that its manifest names, all of them of one writer.

    Nothing but the manifest is read yet: `Held.read` and `Held.check` compare files with it (unless `verify` is False).
    `expected_digest` is what `Held.digest` has to be, compared before anything is parsed. Where the folder is replaced
    meanwhile, it is opened again. Raises FileNotFoundError without the folder, its manifest or one of its files,
    ValueError for a link, a file of another kind and what `files.parse_manifest` and `check_digest` refuse.
    """
    folder = Path(folder)
    if expected_digest is not None:
        check_digest(expected_digest, verify)
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        before = folder_identity(folder)
        try:
            held = _open(folder, kind, verify, expected_digest)
        except Exception:
            standing = folder_identity(folder) == before and (before is not None or not recover(folder))
            if standing or time.monotonic() > deadline:
                raise
        else:
            if _AT_FOLDERS or folder_identity(folder) == before:
                return held


def _digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _compare_digest(folder: Path, kind: str, got: str, expected: str | None) -> None:
    if expected not in (None, got):
        raise ValueError(
            f"expected {folder} with the digest {expected}, got {got}: it is another {kind} than the one that was "
            "pinned, or was changed"
        )


def check_digest(expected: str, verify: bool) -> None:
    """Raise ValueError for what is no digest, and where files would not be compared with it."""
    letters = expected.removeprefix("sha256:")
    if letters == expected or len(letters) != 64 or set(letters) - set("0123456789abcdef"):
        raise ValueError(
            f"expected a digest of the form sha256:<64 hexadecimal digits>, got {expected!r}; `iosr-fast info FOLDER` "
            "prints it"
        )
    if not verify:
        raise ValueError("an expected digest says nothing of files that are not verified: leave verify=False out")


def _open(folder: Path, kind: str, verify: bool, expected_digest: str | None) -> Held:
    opened: dict[Path, int | None] = {}
    try:
        try:
            opened[folder] = os.open(folder, _READ | getattr(os, "O_DIRECTORY", 0)) if _AT_FOLDERS else None
            own = _open_file(opened, folder, MANIFEST, kind)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"expected a folder with a {MANIFEST} ({kind}), found none at {folder / MANIFEST}"
            ) from error
        content = b"".join(own.chunks(LARGEST_MANIFEST))
        _compare_digest(folder, kind, _digest_of(content), expected_digest)
        manifest = parse_manifest(content, folder, kind)
        if len(manifest["files"]) > _MOST_FILES:
            raise ValueError(f"expected at most {_MOST_FILES} files in {folder}, got {len(manifest['files'])}")
        files = {}
        for name in manifest["files"]:
            try:
                files[name] = _open_file(opened, folder, name, kind)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{name} is missing from {folder}; {mend(kind)}") from error
        facts = {path: path.stat() if fd is None else os.fstat(fd) for path, fd in opened.items()}
        return Held(folder, kind, manifest, content, files, {p: _signature(f) for p, f in facts.items()}, verify)
    finally:
        for descriptor in opened.values():
            if descriptor is not None:
                os.close(descriptor)


def _open_file(opened: dict[Path, int | None], folder: Path, name: str, kind: str) -> HeldFile:
    """Open a file through the folders above it, which stay in `opened`."""
    *above, last = PurePosixPath(name).parts or (".",)
    path, at = folder, opened[folder]
    try:
        for part in above:
            path = path / part
            if path not in opened:
                _refuse_link(path, at, part)
                opened[path] = os.open(part, _FILE | os.O_DIRECTORY, dir_fd=at) if _AT_FOLDERS else None
            at = opened[path]
        path = path / last
        _refuse_link(path, at, last)
        descriptor = os.open(last, _FILE, dir_fd=at) if _AT_FOLDERS else os.open(path, _FILE)
    except NotADirectoryError as error:
        raise FileNotFoundError(str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(f"{name} in {folder} is no file; {mend(kind)}")
    return HeldFile(path, descriptor)


def _refuse_link(path: Path, at: int | None, name: str) -> None:
    """With an error that says more than O_NOFOLLOW, which closes the gap between looking and opening."""
    facts = os.stat(path if at is None else name, dir_fd=at, follow_symlinks=False)
    if stat.S_ISLNK(facts.st_mode):
        raise ValueError(f"{path} is a link, expected a file or folder of its own: copy it with `cp -rL` to resolve it")


def _signature(facts: os.stat_result) -> _Signature:
    """What changes when a file is replaced or written to; a folder, when it is replaced or names in it change."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
