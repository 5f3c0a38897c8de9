"""The classifiers of a server: which folders they are, and how they are opened, those on one encoder together."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from iosr_fast.encoders.engine_folder import ENGINE_KIND
from iosr_fast.encoders.rows import Rows
from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.manifest import MANIFEST
from iosr_fast.serving.http.settings import Settings
from iosr_fast.store.bundle import Saved, SavedHead, kind_of, load_saved
from iosr_fast.utils.machine import usable_threads

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def named_folders(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The folders to serve by their names; of one classifier the name is "". A folder that is none, with classifiers
    in it, stands for these. Raises IosrFastError for names that no path can have, or of two."""
    folders = [folder for path in map(Path, paths) for folder in _inside(path) or [path]]
    if folders == [*map(Path, paths)] and len(folders) == 1:
        return {"": folders[0]}
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    for name, count in Counter(names).items():
        if count > 1 or not _NAME.fullmatch(name):
            got = f"{name!r} of {count} folders" if count > 1 else repr(name)
            expected = "folders with different names of letters, digits, '.', '_' and '-', which name the classifiers"
            raise IosrFastError(f"expected {expected}, got {got}; rename it")
    return dict(zip(names, folders, strict=True))


def _inside(path: Path) -> list[Path]:
    """The classifiers in a folder; none where the folder is one. What a writer has not finished is hidden."""
    if (path / MANIFEST).exists():
        return []
    found = sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))
    return [one for one in found if not one.name.startswith(".") and kind_of(one) != ENGINE_KIND]


@contextmanager
def alone(names: Collection[str], folders: Mapping[str, str | Path], refused: dict[str, str]) -> Iterator[None]:
    """An error in the block is why these classifiers are `refused`, in words without the paths of their folders, which
    are not for clients; that of a single one, with the name "", is raised."""
    try:
        yield
    except Exception as error:
        if "" in names:
            raise
        why = str(error)
        for name in names:
            why = why.replace(str(folders[name]), name)
        refused.update(dict.fromkeys(names, why))


def open_served(folder: str | Path, settings: Settings, cores: int | None = None) -> Classifier:
    """What is served of a folder, on so many cores; None: all. Raises IosrFastError for what can't be."""
    ((served,),) = (group.values() for group in open_groups({"": folder}, settings, {}, cores))
    if isinstance(served.encoder, Rows) and (settings.log or settings.collect) is not None:
        raise IosrFastError("a head takes no changes and gets no pictures: leave out --log and --collect")
    return served


def open_groups(
    folders: Mapping[str, str | Path], settings: Settings, refused: dict[str, str], cores: int | None = None
) -> list[dict[str, Classifier]]:
    """What is served of several folders: together those that can share an encoder, which is opened once. `refused` gets
    why others can't be served (alone).

    On a CPU the encoder has about as many runs as threads. Each run has batches of its own, so a core that a decoder
    or a request takes delays one run. One run on all cores would wait at every layer for the core that is taken. One
    thread a run would be slow for a lone image.
    """
    from iosr_fast.classifier import open_together

    cores = cores or usable_threads()
    runs = math.ceil(math.sqrt(cores))
    groups: dict[object, dict[str, Saved]] = {}
    for name, folder in folders.items():
        with alone([name], folders, refused):
            saved = load_saved(folder, cores // runs, settings.expected_digest)
            saved.head.require_single_label("the HTTP API", "serve one fitted with one label, or use predict")
            groups.setdefault(saved.shares, {})[name] = saved
    opened = []
    for group in groups.values():
        with alone(group, folders, refused):
            heads = "" not in group and isinstance(next(iter(group.values())), SavedHead)
            runtime = "auto" if heads else settings.runtime
            classifiers = open_together([*group.values()], runtime, cores // runs, runs)
            opened.append(dict(zip(group, classifiers, strict=True)))
    return opened
