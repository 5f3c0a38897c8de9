"""The manifest of a verified folder in its schema: every field has a type and a range, and no field is unknown."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from iosr_fast.utils.files import mend
from iosr_fast.utils.text import abbreviate
from iosr_fast.utils.verified_folder import Held

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Fingerprint = Annotated[str, Meta(pattern=r"^[!-~]{1,128}\Z")]  # printable, without spaces
Name = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,512}\Z")]  # nothing that steers a terminal
Natural = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=1 << 16)]
# JSON has no way to write what isn't finite, and msgspec takes no number that doesn't fit.
Above0 = Annotated[float, Meta(gt=0)]
Channels = Annotated[list[float], Meta(min_length=3, max_length=3)]
Deviations = Annotated[list[Above0], Meta(min_length=3, max_length=3)]
_T = TypeVar("_T", bound="Strict")


class Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object with these fields and no others."""


class Entry(Strict, frozen=True, kw_only=True):
    sha256: Sha256
    bytes: Natural


def read_facts(held: Held, form: type[_T]) -> _T:
    """The manifest of a held folder in its form. Raises ValueError naming manifest, field and what was expected."""
    try:
        return msgspec.json.decode(held.content, type=form)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise refused(held, f"manifest.json: {error}") from error


def refused(held: Held, reason: str) -> ValueError:
    """The error for what was read and can't be right."""
    return ValueError(f"{held.folder} is not a complete {held.kind}: {reason}; {mend(held.kind)}")


def check_files(held: Held, needed: set[str], allowed: set[str]) -> None:
    """Raise ValueError unless a manifest names the files that are needed, and none that nothing reads."""
    found = set(held.files)
    if missing := sorted(needed - found):
        raise refused(held, f"manifest.json: expected the files {abbreviate(missing)}, got none of that name")
    if others := sorted(found - needed - allowed):
        raise refused(held, f"manifest.json: expected no other files, got {abbreviate(others)}")
