"""The images in a folder: one rule for every command, in an order that depends on names alone.

An image is recognised by its suffix, in upper or lower case. Links are followed: each folder and each image is listed
once, by its own path if that lies below the folder. Skipped files are counted by reason, and a warning reports them.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from iosr_fast.exceptions import IosrFastError, printable
from iosr_fast.sealed.outputs import check_utf8

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
    | frozenset({".ppm", ".pgm", ".pbm", ".pnm"})
    | frozenset({".avif", ".heic", ".heif"})
)
# Files that operating systems and stores create beside pictures; some have image suffixes.
_SYSTEM = (
    frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"})
    | frozenset({"$recycle.bin", "system volume information"})
    | frozenset({"@eadir", "lost+found"})
)
_BROKEN = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_SPLITS = frozenset(
    {"train", "training", "support", "test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev"}
)
# pathlib makes one slash of two.
_URL = re.compile(r"(?:https?|s3|gs|hdfs|ftp|file):/", re.IGNORECASE)
_MAX_SUFFIXES = 6  # listed in a summary


@dataclass
class Skipped:
    """Files and folders that a listing skipped: counts by reason, and by suffix for files that are not images."""

    reasons: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.reasons.total() + self.suffixes.total()

    def summary(self) -> str:
        """The counts as text, such as "12 not images (.txt, .xmp), 2 hidden"; "" if nothing was skipped."""
        counts = []
        if self.suffixes:
            names = [name for name, _ in sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))]
            more = ", ..." if len(names) > _MAX_SUFFIXES else ""
            counts.append(f"{self.suffixes.total()} not images ({', '.join(names[:_MAX_SUFFIXES])}{more})")
        return ", ".join([*counts, *(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))])

    def warn(self, folder: str | Path, kept: int) -> None:
        """Warn about skipped files, if any. `kept` is the number of listed images."""
        if self.total:
            text = "%s: skipped %d of %d files: %s"
            logger.warning(text, printable(str(folder)), self.total, self.total + kept, printable(self.summary()))


@dataclass(frozen=True)
class Listing:
    """The images of a folder, sorted name by name, and what was skipped."""

    paths: list[str]
    skipped: Skipped


def refuse_url(place: str | Path) -> None:
    """Raise IosrFastError for a URL where a path is expected."""
    if _URL.match(str(place)):
        url = re.sub(":/+", "://", str(place), count=1)
        raise IosrFastError(f"expected a path, got the URL {url}: download it first, and give the file")


def list_images(folder: str | Path, warn: bool = True) -> Listing:
    """The images in a folder and all below it; `warn` says what is skipped.

    Raises FileNotFoundError without the folder, PermissionError naming a folder that can't be read.
    """
    refuse_url(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"expected a folder of images, found no folder {folder}")
    skipped = Skipped()
    paths = sorted(walk(folder, skipped), key=_by_names)
    if warn:
        skipped.warn(folder, len(paths))
    return Listing(paths, skipped)


def list_folder(folder: str | Path, nested: bool = False) -> list[tuple[Path, str]]:
    """Images of a folder with one sub-folder a class: the path and the class name of each, sorted.

    `nested` takes each folder below that has no folder in it as a class, by its path, as "fruit/apple"; otherwise
    images of all folders below a sub-folder are of its class, and a warning says so where these may be classes.

    Raises FileNotFoundError without the folder, PermissionError naming a folder that can't be read, ValueError for
    fewer than two classes, a class without images, names that are not UTF-8, sub-folders that are splits with class
    folders inside, such as train/ and test/, and `nested` images beside class folders.
    """
    refuse_url(folder)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder with one sub-folder of images a class, found no folder {folder}")
    skipped = Skipped()
    tops = class_folders(folder, skipped)
    classes = [leaf for top in tops for leaf in _leaf_folders(folder, top, skipped)] if nested else tops
    listed: list[tuple[Path, str]] = []
    empty: dict[str, str] = {}
    for name in classes:
        own = Skipped()
        images = sorted(map(Path, walk(folder / name, own)))
        listed += [(path, name) for path in images]
        if not images:
            empty[name] = own.summary() or "it is empty"
        skipped.reasons += own.reasons
        skipped.suffixes += own.suffixes
    _check_below(folder, tops, [path.relative_to(folder).parts for path, _ in listed], nested)
    if not classes and (loose := skipped.reasons["not in a class folder"]):
        raise IosrFastError(
            f"expected one sub-folder of images a class in {folder}, found {loose} images in it and no sub-folder: "
            "move each into a folder named as its class, or list them in a CSV file of path and label"
        )
    if len(classes) < 2:
        raise IosrFastError(f"expected at least two class folders in {folder}, found {len(classes)}: {classes}")
    for name, reason in empty.items():
        raise IosrFastError(f"expected images in the class folder {folder / name}, found none ({reason})")
    skipped.warn(folder, len(listed))
    return listed


def class_folders(folder: str | Path, skipped: Skipped | None = None) -> list[str]:
    """Names of the sub-folders that may be classes, sorted. Raises ValueError for one that is not UTF-8."""
    skipped, names = Skipped() if skipped is None else skipped, []
    for entry, status in _wanted(str(folder), skipped):
        if not stat.S_ISDIR(status.st_mode):
            skipped.reasons["not in a class folder"] += 1
        elif entry.is_symlink() and _is_above(entry.path, status):
            skipped.reasons["links to a folder above"] += 1
        else:
            check_utf8([entry.name])
            names.append(entry.name)
    return names


def _leaf_folders(folder: Path, name: str, skipped: Skipped) -> list[str]:
    """The paths in `folder` of the folders below its sub-folder `name`, or of this, that hold no folder."""
    beside = Skipped()
    inner = class_folders(folder / name, beside)
    if not inner:
        return [name]
    if images := beside.reasons["not in a class folder"]:
        raise IosrFastError(
            f"expected images or class folders in {folder / name}, found both, {images} images and the folders "
            f"{', '.join(inner[:3])}: move these images into a folder of their own, or leave out --nested (nested=True)"
        )
    if len(inner) > 1 and all(map(_is_split, inner)):
        raise IosrFastError(
            f"expected class folders in {folder / name}, got the splits {', '.join(inner)}: give a folder of one "
            "split, or leave out --nested (nested=True)"
        )
    skipped.reasons += beside.reasons
    skipped.suffixes += beside.suffixes
    return [leaf for one in inner for leaf in _leaf_folders(folder, f"{name}/{one}", skipped)]


def walk(folder: str | Path, skipped: Skipped) -> Iterator[str]:
    """The path of every image below `folder`; what is not listed is counted.

    Raises PermissionError naming a folder that can't be read.
    """
    seen: set[tuple[int, int]] = set()
    folders, folder_links, file_links = [str(folder)], list[str](), list[tuple[str, os.stat_result]]()
    while folders or folder_links:
        # Real folders come first, so that a picture is listed by its own path and not by a link's.
        linked = not folders
        folder_links.sort(key=_by_names)
        place = folder_links.pop(0) if linked else folders.pop()
        own = os.stat(place)
        reason = "links to a folder above" if linked and _is_above(place, own) else "linked twice"
        if _identity(own) in seen or reason != "linked twice":
            skipped.reasons[reason] += 1
            continue
        seen.add(_identity(own))
        for entry, status in _wanted(place, skipped):
            if stat.S_ISDIR(status.st_mode):
                (folder_links if entry.is_symlink() else folders).append(entry.path)
            elif entry.is_symlink():
                file_links.append((entry.path, status))
            else:
                yield entry.path
    for path, status in sorted(file_links, key=lambda link: _by_names(link[0])):
        target = os.path.realpath(path)
        listed = _identity(os.stat(os.path.dirname(target))) in seen and _is_image(os.path.basename(target))
        if listed or _identity(status) in seen:
            skipped.reasons["linked twice"] += 1
        else:
            seen.add(_identity(status))
            yield path


def _wanted(place: str, skipped: Skipped) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    """The folders and images in a folder, sorted by name, with their status or that of their link's target."""
    try:
        with os.scandir(place) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(place, error) from error
    for entry in entries:
        if reason := _unwanted(entry.name):
            skipped.reasons[reason] += 1
            continue
        try:
            status = entry.stat()
        except OSError as error:
            if error.errno not in _BROKEN:
                raise _unreadable(entry.path, error) from error
            skipped.reasons["broken links"] += 1
            continue
        if not stat.S_ISDIR(status.st_mode) and _suffix(entry.name) not in IMAGE_SUFFIXES:
            skipped.suffixes[_suffix(entry.name) or "no suffix"] += 1
        elif not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            skipped.reasons["not regular files"] += 1
        else:
            yield entry, status


def _unwanted(name: str) -> str:
    """Why a file or folder of this name is skipped; "" if it is not."""
    if name.startswith("."):
        return "hidden"
    return "of the operating system" if name.casefold() in _SYSTEM else ""


def _is_image(name: str) -> bool:
    return not _unwanted(name) and _suffix(name) in IMAGE_SUFFIXES


def _unreadable(place: str, error: OSError) -> OSError:
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    reason = "permission denied" if kind is PermissionError else error.strerror or str(error)
    return kind(f"can't read {place}: {reason}")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _by_names(path: str) -> list[str]:
    return path.split(os.sep)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_above(link: str, status: os.stat_result) -> bool:
    """Whether a link leads to a folder (with this status) above the link; listing that would never end."""
    above = Path(os.path.abspath(link)).parents
    return any(os.path.samestat(os.stat(place), status) for place in above)


def _is_split(name: str) -> bool:
    return not _SPLITS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _check_below(folder: Path, tops: list[str], parts: list[tuple[str, ...]], nested: bool) -> None:
    """Raise ValueError if the sub-folders are splits (train, test, ...) that hold class folders themselves; warn of
    others that may hold some, unless these are listed. `parts` are the images' paths in `folder`."""
    direct = {names[0] for names in parts if len(names) == 2}  # a class may have sub-folders too
    inner = dict[str, set[str]]()
    for first, second, *_ in parts:
        if first not in direct:
            inner.setdefault(first, set()).add(second)
    named = [name for name in tops if _is_split(name)]
    shaped = [name for name in named if name in inner]
    alike = any(inner[a] & inner[b] for a in shaped for b in shaped if a < b)
    if shaped and (alike or len(named) == len(tops)):
        chosen = next((name for name in shaped if "train" in name.lower()), shaped[0])
        raise IosrFastError(
            f"expected class folders in {folder}, got {', '.join(shaped)}, which hold class folders themselves "
            f"({', '.join(sorted(inner[chosen])[:3])}, ...): give {folder / chosen}"
        )
    if nested:
        return
    if len(tops) == 1 and len(inner.get(tops[0], ())) > 1:
        raise IosrFastError(
            f"expected at least two class folders in {folder}, found 1: {tops}; it holds "
            f"{len(inner[tops[0]])} folders of images itself: give {folder / tops[0]}"
        )
    below = {names[:-1] for names in parts if len(names) > 2}
    if max(Counter(names[0] for names in below).values(), default=0) > 1:
        text = "%s: %d classes, the folders in it; %d folders of images below these are not told apart: --nested "
        logger.warning(text + "(nested=True) makes each a class", printable(str(folder)), len(tops), len(below))
