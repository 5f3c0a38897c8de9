"""Messages between ingress, replicas and rollout: which bundle to serve, and what a replica answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.predictions import Prediction
from iosr_fast.images.geometry import Geometry
from iosr_fast.serving.http.settings import Settings
from iosr_fast.utils.manifest import read_manifest
from iosr_fast.utils.verified_folder import open_verified

if TYPE_CHECKING:
    from iosr_fast.classifier import Classifier


@dataclass(frozen=True)
class Source:
    """The bundle that a replica serves: `bundle`, a folder that all machines see, and the `checksum` of its manifest,
    which distinguishes new content in the same folder (None: any content)."""

    bundle: str
    checksum: str | None = None

    @classmethod
    def of(cls, bundle: str, verify: bool = False) -> Source:
        """The folder with its current checksum. `verify` checks all files. Raises as read_manifest does."""
        from iosr_fast.store.bundle import KIND

        return cls(bundle, read_manifest(bundle, KIND, verify)["checksum"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Source:
        """From a user_config of Ray Serve: {"bundle": folder}, optionally with "checksum"."""
        bundle, checksum = config.get("bundle"), config.get("checksum")
        if not isinstance(bundle, str) or not isinstance(checksum, str | None) or set(config) - {"bundle", "checksum"}:
            raise IosrFastError(
                f'expected a user_config {{"bundle": folder, "checksum": of its manifest}}, got {config}'
            )
        return cls(bundle, checksum)

    def load(self, settings: Settings, threads: int) -> tuple[Source, Classifier]:
        """The classifier, and the source with the checksum that was loaded. Raises ValueError for another checksum."""
        from iosr_fast.classifier import Classifier
        from iosr_fast.store.bundle import KIND

        folder = open_verified(self.bundle, KIND)
        checksum: str = folder.manifest["checksum"]
        if self.checksum not in (None, checksum):
            raise IosrFastError(
                f"expected the bundle {self.bundle} with checksum {self.checksum:.12}, got {checksum:.12}: it was "
                "replaced, or this machine sees another folder there; deploy it again, or save to new folders"
            )
        # `threads` is always set, because the default takes all cores of a machine that other replicas share.
        return Source(self.bundle, checksum), Classifier.load(folder, settings.runtime, threads=threads)


@dataclass(frozen=True)
class Facts:
    """A replica's description of itself."""

    replica: str
    pid: int
    host: str
    source: Source
    version: int  # of the classifier's head
    geometry: Geometry
    classes: int
    pending: int = 0  # images accepted and not yet answered
    refused: str = ""  # why the last update failed; "" if it did not


@dataclass(frozen=True)
class Reply:
    """`status` is "ok" (`results` has a prediction or an error for each image), "full", "closed", "failed" (the
    engine) or "refused" (the query). After the middle three another replica may succeed."""

    status: str
    facts: Facts
    results: list[Prediction | Exception] = field(default_factory=list)
    message: str = ""
    retry_after_s: float = 0.0
