"""Schemas of manifests: every field has a type and a range, and unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from iosr_fast.exceptions import DamagedFileError
from iosr_fast.sealed.manifest import advice
from iosr_fast.sealed.verified_folder import VerifiedFolder
from iosr_fast.utils.text import abbreviate

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Fingerprint = Annotated[str, Meta(pattern=r"^[!-~]{1,128}\Z")]  # printable, without spaces


def text_of(most: int, least: int = 0) -> Meta:
    """Text of so many characters, without control characters, which steer terminals."""
    return Meta(pattern=rf"^[^\x00-\x1f\x7f-\x9f]{{{least},{most}}}\Z")


Name = Annotated[str, text_of(512, least=1)]
Natural = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=1 << 16)]
Share = Annotated[float, Meta(ge=0, le=1)]
Level = Annotated[int, Meta(ge=0, le=255)]  # of a pixel
# JSON can't express infinite numbers, and msgspec refuses overflowing ones.
Above0 = Annotated[float, Meta(gt=0)]
Channels = Annotated[list[float], Meta(min_length=3, max_length=3)]
Deviations = Annotated[list[Above0], Meta(min_length=3, max_length=3)]
_T = TypeVar("_T", bound="Strict")


class Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object with exactly these fields."""


def facts_to_json(facts: Any) -> dict[str, Any]:
    """JSON-ready; numbers of NumPy become Python's."""
    values: dict[str, Any] = msgspec.to_builtins(facts, enc_hook=float)
    return values


class Entry(Strict, frozen=True, kw_only=True):
    sha256: Sha256
    bytes: Natural


def read_facts(folder: VerifiedFolder, schema: type[_T]) -> _T:
    """Parse the manifest of a folder. Raises ValueError naming the manifest, the field and the expectation."""
    try:
        return msgspec.json.decode(folder.content, type=schema)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise refused(folder, f"manifest.json: {error}") from error


def refused(folder: VerifiedFolder, reason: str) -> DamagedFileError:
    """The error for invalid content."""
    return DamagedFileError(f"{folder.folder} is not a complete {folder.kind}: {reason}; {advice(folder.kind)}")


def check_files(folder: VerifiedFolder, needed: set[str], allowed: set[str]) -> None:
    """Raise ValueError unless the manifest lists all `needed` files, and others only if they are `allowed`."""
    listed = set(folder.files)
    if missing := sorted(needed - listed):
        raise refused(folder, f"manifest.json: expected the files {abbreviate(missing)}, got none of that name")
    if others := sorted(listed - needed - allowed):
        raise refused(folder, f"manifest.json: expected no other files, got {abbreviate(others)}")
