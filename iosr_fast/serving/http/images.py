"""Which images go to a decoder, by their bytes and by what their headers claim: nothing is decoded, little is read."""

from __future__ import annotations

from dataclasses import dataclass

from iosr_fast.images.decoder_process.headers import DAMAGED, beyond, claimed_size, image_kind


@dataclass(frozen=True)
class ImageLimits:
    """`max_bytes` encoded; `max_pixels`, as it is and once its shorter side has `side` pixels."""

    max_bytes: int
    max_pixels: int
    side: int


@dataclass(frozen=True)
class Refusal:
    """Why an image is not classified: one of the codes too_large, unsupported_type, bad_image, too_many_pixels."""

    code: str
    message: str


def check_image(data: bytes, limits: ImageLimits) -> Refusal | None:
    """None where `data` may go to a decoder's process, which looks at all of it, and may find it damaged."""
    if len(data) > limits.max_bytes:
        return too_large(len(data), limits.max_bytes)
    if not image_kind(data):
        got = f"{len(data)} bytes that begin with {data[:8]!r}" if data else "nothing"
        return Refusal("unsupported_type", f"expected a JPEG, PNG or WebP image, got {got}")
    size = claimed_size(data)
    if size is None:
        return Refusal("bad_image", DAMAGED)
    told = beyond(size, limits.side, limits.max_pixels)
    return Refusal("too_many_pixels", told) if told else None


def too_large(count: int, limit: int) -> Refusal:
    return Refusal("too_large", f"expected at most {limit} bytes an image, got {count}; send a smaller one")
