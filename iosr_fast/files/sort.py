"""Sorting the images of a run: accepted ones below folders of their classes, those of a node of a tree below GROUP in
the folder of its classes, the rest below LOOK. They are hard links, or copies on another file system; nothing is moved
or replaced, and LIST names each file before it is made."""

from __future__ import annotations

import csv
import filecmp
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from iosr_fast.exceptions import IosrFastError
from iosr_fast.files.tables import Labelled
from iosr_fast.head.head import Head
from iosr_fast.images.crop import picture_of
from iosr_fast.sealed.files import new_file
from iosr_fast.sealed.outputs import check_writable
from iosr_fast.utils.csv_text import line_writer

LOOK = "look"
GROUP = "(group)"
LIST = "sorted.csv"
_LONGEST = 255  # bytes of a file's name
_UNSAFE = re.compile(r'[%/\\:*?"<>|]|^[.=+@-]|[. ]\Z')  # on some system, or first in a cell of a spreadsheet


def check_sort(folder: Path, places: Sequence[str], paths: Iterable[str]) -> None:
    """Raise OSError or IosrFastError, before any work, where the images of `places` can't be sorted into the folder."""
    check_writable(folder if folder.exists() else folder.absolute().parent, folder)
    listed = folder / LIST
    if os.path.lexists(listed):
        with listed.open("rb") as file:
            if file.readline() not in (b"", b"source,target\n"):
                raise IosrFastError(f"expected nothing or the list of --sort at {listed}: take another folder")
    within = any(folder.resolve().is_relative_to(Path(place).resolve()) for place in places)
    if within or any(picture_of(path) != path for path in paths):
        raise IosrFastError(f"expected whole images, no boxes, and a --sort outside of their folders, got {folder}")


def class_folders(head: Head) -> dict[str, str]:
    """The folder of each class, below those of the nodes above it: its name, percent-encoded where no folder can have
    it or another one differs in case alone. urllib.parse.unquote gives the name. That of a node is GROUP in such a
    folder, beside those of its classes. Raises IosrFastError for a name too long."""
    paths = [(*head.tree.path_of(node), name) for node, name in enumerate(head.node_names)]
    folders = dict[str, str]()
    taken = {LOOK, LIST, GROUP}
    for name in dict.fromkeys(chain.from_iterable(paths)):
        folder = _encoded(_UNSAFE, name)
        if folder.casefold() in taken:
            folder = _encoded(".", name)
        if len(folder.encode()) > _LONGEST:
            raise IosrFastError(f"expected class names that make folders of at most {_LONGEST} bytes, got {name!r:.80}")
        folders[name] = folder
        taken.add(folder.casefold())
    return {
        path[-1]: os.path.join(*map(folders.__getitem__, path), *[GROUP] * (node >= len(head.class_names)))
        for node, path in enumerate(paths)
    }


def _encoded(characters: str | re.Pattern[str], text: str) -> str:
    return re.sub(characters, lambda one: "".join(f"%{byte:02X}" for byte in one[0].encode()), text)


def sort_images(rows: Iterable[Labelled], folder: Path, places: Sequence[str], folders: Mapping[str, str]) -> str:
    """Sort the images of a table into `class_folders`, each at its path below the one folder of `places` or below what
    all have in common; returns what was done. Raises IosrFastError, with nothing made, where another file has the place
    of one, and where an earlier run has put one in another place."""
    images = {os.path.abspath(row.path): row for row in rows if os.path.isfile(row.path)}
    one = len(places) == 1 and os.path.isdir(places[0])
    base = os.path.abspath(places[0]) if one else os.path.commonpath([*map(os.path.dirname, images)])
    targets = dict[str, Path]()
    for path, row in images.items():
        target = targets[path] = folder / (folders[row.label] if row.accepted else LOOK) / os.path.relpath(path, base)
        if os.path.lexists(target) and not filecmp.cmp(path, target, shallow=False):
            raise IosrFastError(f"expected no other image at {target}, got one, and sorted none: take another folder")
    for path, target in _listed(folder):
        if targets.get(path, target) != target and os.path.lexists(target):
            raise IosrFastError(
                f"expected {path} at {targets[path]}, an earlier run has it at {target}, and sorted none: an answer of "
                "another classifier or promise takes another folder"
            )
    new = {path: target for path, target in targets.items() if not os.path.lexists(target)}
    for target in (folder / LIST, *new.values()):
        target.parent.mkdir(parents=True, exist_ok=True)
    with (folder / LIST).open("a", encoding="utf-8", newline="") as file:
        writer = line_writer(file)
        if not file.tell():
            writer.writerow(["source", "target"])
        for path, target in new.items():
            writer.writerow([path, target.relative_to(folder)])
            file.flush()
            try:
                os.link(os.path.realpath(path), target)
            except OSError as error:  # another file system, one without links, or a file of somebody else
                if isinstance(error, FileExistsError):
                    raise
                with new_file(target) as copy:
                    shutil.copyfile(path, copy)
    return f"sorted {len(new):,} images into {folder}; {len(targets) - len(new):,} were there; {LIST} lists them"


def _listed(folder: Path) -> Iterator[tuple[str, Path]]:
    """The source and the target of each image that earlier runs have sorted into the folder."""
    if (folder / LIST).exists():
        with (folder / LIST).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, restval=""):
                yield row["source"], folder / row["target"]
