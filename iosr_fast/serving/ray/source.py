"""Which bundle replicas are to serve, and loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iosr_fast.classifier import Classifier
from iosr_fast.serving.http.settings import Settings
from iosr_fast.state.bundle import KIND
from iosr_fast.utils.manifest import read_manifest
from iosr_fast.utils.verified_folder import open_verified


@dataclass(frozen=True)
class Source:
    """What a replica is to serve: `bundle`, a folder that every machine sees, and the `checksum` of its manifest (None:
    whatever is there), by which a folder with new content is told from the old one."""

    bundle: str
    checksum: str | None = None

    @classmethod
    def of(cls, bundle: str, verify: bool = False) -> Source:
        """The folder as it is now. Raises what read_manifest raises; with `verify` for a damaged file, too."""
        return cls(bundle, read_manifest(bundle, KIND, verify)["checksum"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Source:
        """Of a user_config of Ray Serve: {"bundle": folder} and, if it may not be another, "checksum"."""
        bundle, checksum = config.get("bundle"), config.get("checksum")
        if not isinstance(bundle, str) or not isinstance(checksum, str | None) or set(config) - {"bundle", "checksum"}:
            raise ValueError(f'expected a user_config {{"bundle": folder, "checksum": of its manifest}}, got {config}')
        return cls(bundle, checksum)

    def to_config(self) -> dict[str, Any]:
        return {"bundle": self.bundle, "checksum": self.checksum}

    def load(self, settings: Settings, threads: int) -> tuple[Source, Classifier]:
        """The classifier, and of what checksum it is. Raises ValueError where that is another than expected."""
        held = open_verified(self.bundle, KIND, settings.verify)
        found: str = held.manifest["checksum"]
        if self.checksum not in (None, found):
            raise ValueError(
                f"expected the bundle {self.bundle} with checksum {self.checksum:.12}, got {found:.12}: it was "
                "replaced, or this machine sees another folder there; roll it out again, or save to new folders"
            )
        # Without `threads` it would take all cores of the machine, which is shared with other replicas.
        return Source(self.bundle, found), Classifier.load(held, settings.runtime, settings.verify, threads)
