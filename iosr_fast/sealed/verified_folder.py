"""A folder with a manifest whose files stay open: the bytes that were verified are the bytes that are read.

Each file is opened once, below the descriptor of its folder, and links below the folder are not followed. A writer that
replaces or removes the folder has no effect on the open files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from iosr_fast.exceptions import DamagedFileError, IosrFastError
from iosr_fast.sealed.files import open_regular
from iosr_fast.sealed.manifest import LARGEST_MANIFEST, MANIFEST, advice, mismatch, missing, parse_manifest

_MOST_FILES = 256  # all open at once; a common limit of a process is 1,024
_CHUNK = 1 << 20
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW
_FOLDER = _FLAGS | os.O_NONBLOCK  # else a pipe in its place would wait for its writer
_DESCRIPTORS = Path("/proc/self/fd")  # of Linux: links to this process's open files, also to removed ones
_WEIGHTS = ".weights"  # of a graph above 2 GB. ONNX Runtime and OpenVINO refuse a link to them.
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_T = TypeVar("_T")


class _OpenFile:
    """An open file of a verified folder. Threads may share it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.opened = self.state

    @property
    def size(self) -> int:
        """Bytes when it was opened."""
        return self.opened[0]

    @property
    def state(self) -> tuple[int, int, int]:
        """Size and times, which change when the file is written to, and when a name of it comes or goes."""
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def chunks(self, largest: int) -> Iterator[bytes]:
        """The first `largest` bytes, and one more if the file is longer."""
        at = 0
        while chunk := os.pread(self.descriptor, min(_CHUNK, largest + 1 - at), at):
            at += len(chunk)
            yield chunk

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True, eq=False)
class VerifiedFolder:
    """A folder of one kind: its manifest, and the files it lists, by name, all open."""

    folder: Path
    kind: str
    manifest: dict[str, Any]
    content: bytes
    files: Mapping[str, _OpenFile]
    verify: bool = True

    @property
    def digest(self) -> str:
        """ "sha256:" and the SHA-256 of manifest.json, which covers all files."""
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"

    def require(self, expected_digest: str) -> None:
        """Raise ValueError for another digest, for one of another form, and with verify=False, which would not compare
        the files with it."""
        if _DIGEST.fullmatch(expected_digest) is None:
            raise IosrFastError(
                f"expected a digest of the form sha256:<64 hexadecimal digits>, got {expected_digest!r}; "
                "`iosr-fast info FOLDER` prints it"
            )
        if not self.verify:
            raise IosrFastError(
                "expected verify=True with expected_digest, which says nothing about files that are not verified"
            )
        if expected_digest != self.digest:
            raise IosrFastError(
                f"expected {self.folder} with the digest {expected_digest}, got {self.digest}: it is another "
                f"{self.kind} than the pinned one, or it was changed"
            )

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
        return VerifiedFolder(self.folder / name, self.kind, {"files": entries}, b"", files, self.verify)

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
        return VerifiedFolder(part.folder, kind, manifest, content, files, self.verify)

    def open_with(self, opener: Callable[[Path], _T]) -> _T:
        """Call `opener` with a path of these files, for libraries that only take paths.

        It is a private folder: on Linux of links to the open files, elsewhere of copies. Files that were written to
        since they were opened are compared with the manifest; if they are while `opener` runs, it is called again.
        Raises what `opener` raises, about this folder, and ValueError.
        """
        with tempfile.TemporaryDirectory(prefix="iosr-fast-") as private:
            for name, file in self.files.items():
                path = Path(private, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if _DESCRIPTORS.exists() and not name.endswith(_WEIGHTS):
                    path.symlink_to(_DESCRIPTORS / str(file.descriptor))
                else:
                    self.copy(name, path)
            while True:
                before = [file.state for file in self.files.values()]
                if before != [file.opened for file in self.files.values()]:
                    self.check()
                try:
                    result = opener(Path(private))
                except IosrFastError as error:
                    raise type(error)(str(error).replace(private, str(self.folder))) from error
                if before == [file.state for file in self.files.values()]:
                    return result


def open_verified(
    folder: str | Path, kind: str, verify: bool = True, expected_digest: str | None = None
) -> VerifiedFolder:
    """Open a folder of this kind and all files that its manifest lists, all written by one writer.

    Only the manifest is read now: `read`, `copy` and `check` compare files with it (unless `verify` is False).
    `expected_digest` is compared with `digest` before anything is parsed. Raises FileNotFoundError without the folder,
    its manifest or one of its files, ValueError for a link, a special file, and as `manifest.parse_manifest` and
    `VerifiedFolder.require` do.
    """
    at = Path(folder)
    try:
        return read_below(at, lambda directory: open_below(directory, at, kind, verify, expected_digest))
    except (FileNotFoundError, NotADirectoryError) as error:
        if at.is_dir():
            raise
        raise missing(at, kind) from error


def read_below(folder: Path, read: Callable[[int], _T]) -> _T:
    """`read` with the descriptor of `folder`; again if it fails because a writer replaces and removes the folder."""
    while True:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return read(directory)
        except Exception:
            if os.path.samestat(os.stat(folder), os.fstat(directory)):
                raise
        finally:
            os.close(directory)


def open_below(
    directory: int, folder: Path, kind: str, verify: bool = True, expected_digest: str | None = None
) -> VerifiedFolder:
    """`open_verified` of the folder with this descriptor."""
    content = b"".join(_open_file(directory, MANIFEST, folder, kind).chunks(LARGEST_MANIFEST))
    if expected_digest is not None:
        VerifiedFolder(folder, kind, {}, content, {}, verify).require(expected_digest)
    manifest = parse_manifest(content, folder, kind)
    if len(manifest["files"]) > _MOST_FILES:
        raise IosrFastError(f"expected at most {_MOST_FILES} files in {folder}, got {len(manifest['files'])}")
    files = {name: _open_file(directory, name, folder, kind) for name in manifest["files"]}
    return VerifiedFolder(folder, kind, manifest, content, files, verify)


def _open_file(directory: int, name: str, folder: Path, kind: str) -> _OpenFile:
    """Open a file below `directory`, which is the descriptor of `folder`, part by part."""
    file, path = _OpenFile(os.dup(directory)), folder
    try:
        for part in PurePosixPath(name).parent.parts:
            path = path / part
            file = _OpenFile(os.open(part, _FOLDER, dir_fd=file.descriptor))
        path = folder / name
        return _OpenFile(open_regular(str(path), _FLAGS, file.descriptor))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise IosrFastError(
                f"{path} is a link, expected a file or folder of its own: copy it with `cp -rL` to resolve it"
            ) from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise
        if name == MANIFEST:
            raise missing(folder, kind) from error
        raise FileNotFoundError(f"{name} is missing from {folder}; {advice(kind)}") from error
