"""From a picture of any shape to the square that an encoder takes: its side, what is cropped or padded, the filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    from PIL.Image import Resampling

ResizeMode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes `size` x `size` pixels. The defaults are those of OpenAI's CLIP.

    A picture of W x H pixels is resized with antialiasing, by a "bicubic" or "bilinear" filter, as `resize_mode` says:

    shortest  to size * (W, H) / min(W, H), rounded down; then the centre is cropped
    longest   to size * (W, H) / max(W, H), rounded; then it is padded evenly with the grey level `fill`
    squash    to size x size, whatever its aspect ratio

    These are the modes of open_clip (open_clip.transform.image_transform). Raises ValueError for other values.

    >>> Geometry(224).resized(640, 480), Geometry(224, "longest").resized(640, 480)
    ((298, 224), (224, 168))
    >>> str(Geometry(224)), str(Geometry(378, "squash"))
    ('224', '378 squash')
    """

    size: int
    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: int = 0

    def __post_init__(self) -> None:
        if self.resize_mode not in RESIZE_MODES:
            raise IosrFastError(f"expected a resize_mode of {', '.join(RESIZE_MODES)}, got {self.resize_mode!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise IosrFastError(f"expected interpolation {' or '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if not isinstance(self.fill, int) or not 0 <= self.fill <= 255:
            raise IosrFastError(f"expected a fill of one level from 0 to 255, got {self.fill!r}")
        if self.fill and self.resize_mode != "longest":
            raise IosrFastError(f"expected a fill only with resize_mode longest, which pads, got {self.resize_mode}")

    def __str__(self) -> str:
        """The size, and what is not the default: in fingerprints that must not change for CLIP's geometry."""
        return " ".join([str(self.size), *(str(value) for value in self.changes().values())])

    def changes(self) -> dict[str, Any]:
        """The fields beside the size that are not the default."""
        fields = ("resize_mode", "interpolation", "fill")
        return {name: getattr(self, name) for name in fields if getattr(self, name) != getattr(Geometry, name)}

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a picture after it is resized, before it is cropped or padded."""
        if self.resize_mode == "squash":
            return self.size, self.size
        if self.resize_mode == "longest":  # open_clip rounds, and fails where a side becomes 0
            ratio = max(width, height) / self.size
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        # torchvision truncates the longer side; rounding instead would shift the crop by half a pixel.
        short = min(width, height)
        return int(self.size * width / short), int(self.size * height / short)

    @property
    def resampling(self) -> Resampling:
        """Pillow's filter."""
        from PIL.Image import Resampling

        return Resampling.BILINEAR if self.interpolation == "bilinear" else Resampling.BICUBIC

    def facts(self) -> dict[str, Any]:
        """The fields of a manifest. Newer ones are left out at their defaults, so that earlier versions read it."""
        return {"image_size": self.size, "interpolation": self.interpolation} | self.changes()

    @classmethod
    def from_facts(cls, manifest: Mapping[str, Any]) -> Geometry:
        """From the manifest of an engine; an older one has neither resize_mode nor fill."""
        facts = {name: manifest[name] for name in ("resize_mode", "interpolation", "fill") if name in manifest}
        return cls(manifest["image_size"], **facts)

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> Geometry:
        """From open_clip's preprocessing: `size`, `resize_mode`, `interpolation` and `fill_color` of a PreprocessCfg.

        Interpolation "random" is bicubic, as open_clip evaluates with it. Raises ValueError for sides that differ, and
        for a resize mode, an interpolation or a fill colour that open_clip does not know either.
        """
        sides = config["size"]
        if not isinstance(sides, int) and len(set(sides)) > 1:
            raise IosrFastError(f"expected a model of square pictures, got one of {'x'.join(map(str, sides))}")
        mode: Any = config.get("resize_mode") or "shortest"
        interpolation: Any = config.get("interpolation") or "bicubic"
        return cls(
            sides if isinstance(sides, int) else sides[0],
            mode,
            "bicubic" if interpolation == "random" else interpolation,
            config.get("fill_color") or 0 if mode == "longest" else 0,
        )
