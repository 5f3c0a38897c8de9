"""A FewShotHead as a folder: a bundle without an encoder, for embeddings that somebody else makes.

manifest.json and the files of arrays are those of a classifier (bundle.py), with what FewShotHead needs beside its head
in the place of what an encoder needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.encoders.rows import Rows
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.fitted import Fit
from iosr_fast.head.names import check_names
from iosr_fast.head.predictions import AnyHead
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.store.bundle_arrays import SUPPORT, TABLE
from iosr_fast.store.bundle_schema import HeadFacts
from iosr_fast.store.head_files import read_head, write_head
from iosr_fast.utils.folders import new_folder
from iosr_fast.utils.manifest import write_manifest
from iosr_fast.utils.schema import Entry, Sha256, check_files, read_facts, refused
from iosr_fast.utils.verified_folder import VerifiedFolder, open_verified

HEAD_KIND = "head"
Dtype = Annotated[str, Meta(pattern=r"^(str|object|bool|u?int(8|16|32|64)|float(16|32|64))\Z")]


class HeadManifest(HeadFacts, frozen=True, kw_only=True):
    """The manifest of such a bundle; the last fields are those of SavedHead."""

    schema: Literal[2]
    kind: str
    files: dict[str, Entry]
    checksum: Sha256
    estimator: dict[str, bool | float | str | None]
    labels: Dtype
    indicator: Dtype | None
    columns: list[str] | None


@dataclass(frozen=True, eq=False)
class SavedHead:
    """A head, and what FewShotHead needs beside it.

    estimator   the parameters of its constructor but `text`, as they were given
    labels      the dtype of `classes_`, whose values are the class names: "str", "object" (texts) or one of numbers
    indicator   the dtype of the indicators that `predict` gives, where the fit was given one
    columns     the names that the columns of X had
    """

    head: AnyHead
    estimator: dict[str, Any]
    labels: str
    indicator: str | None
    columns: list[str] | None

    settings = SupportSettings()
    encoder_fingerprint = "none"

    def open(self, runtime: str, threads: int | None, runs: int) -> Fit:
        """As Bundle.open: a fit whose images are rows of embeddings (encoders.rows)."""
        if runtime != "auto":
            raise IosrFastError(f"a head has no encoder, which a runtime would execute: leave out {runtime!r}")
        return Fit(OpenedClip(Rows(self.width, self.adapted), Path(), None, self.head.tau), self.head, self.settings)

    def parameters(self) -> dict[str, Any]:
        """As Bundle.parameters."""
        return {}

    @property
    def adapted(self) -> bool:
        """Whether a row is a plain and an adapted embedding side by side."""
        return self.head.examples.embeddings.adapted is not None

    @property
    def width(self) -> int:
        """The numbers of a row: D, or 2 D."""
        return self.head.examples.width * (1 + self.adapted)

    @property
    def classes(self) -> np.ndarray:
        """`classes_`, (C,). Raises ValueError or OverflowError where a class name is no such label."""
        names = np.array(self.head.class_names)
        return names == "True" if self.labels == "bool" else names.astype(self.labels)


def save_head(saved: SavedHead, folder: str | Path) -> None:
    """Write `folder`; an interrupted call leaves what was there. Raises IosrFastError for labels and class names that
    JSON does not give back, or that no saved classifier may have."""
    check_names(saved.head.class_names)
    with new_folder(folder, HEAD_KIND) as temporary:
        facts = {name: value for name, value in vars(saved).items() if name != "head"}
        write_manifest(temporary, HEAD_KIND, {**write_head(saved.head, temporary), **facts})
        load_head(temporary, verify=False)  # what can't be loaded is not written


def load_head(folder: str | Path, verify: bool = True, expected_digest: str | None = None) -> SavedHead:
    """Read what `save_head` wrote. Checks and errors are those of `bundle.load_bundle`."""
    return head_of(open_verified(folder, HEAD_KIND, verify, expected_digest))


def head_of(folder: VerifiedFolder) -> SavedHead:
    """As load_head, of a folder that is open."""
    facts = read_facts(folder, HeadManifest)
    check_files(folder, {SUPPORT}, {*TABLE})
    head = read_head(facts, folder)
    saved = SavedHead(head, facts.estimator, facts.labels, facts.indicator, facts.columns)
    try:
        if [str(label) for label in saved.classes.tolist()] != facts.class_names:
            raise IosrFastError(f"expected class_names that are {saved.labels}, got others")
    except (ValueError, OverflowError) as error:
        raise refused(folder, f"manifest.json: {error}") from error
    return saved
