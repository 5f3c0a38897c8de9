"""Open an input: a folder, WebDataset shards or Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.listing import IMAGE_SUFFIXES, Skipped, walk
from iosr_fast.pipeline.parquet_source import table_source
from iosr_fast.pipeline.source import Item, Source, check_keys, stamp_of
from iosr_fast.pipeline.webdataset_source import shard_source

KINDS = ("folder", "webdataset", "parquet")


def open_source(
    location: str,
    kind: str = "auto",
    *,
    path_column: str = "path",
    keep_columns: Sequence[str] = (),
    image_field: str | None = None,
) -> Source:
    """List the images of a folder, of WebDataset shards or of Parquet files.

    Raises FileNotFoundError for a missing input, ValueError for an ambiguous one or for options that don't fit it.
    """
    kind = kind_of(location) if kind == "auto" else kind
    if kind not in KINDS:
        raise IosrFastError(f"expected --kind auto or one of {list(KINDS)}, got {kind!r}")
    if kind != "parquet" and (keep_columns or path_column != "path"):
        raise IosrFastError(
            f"expected --path-column and --keep-columns only with Parquet files, got a {kind} at {location}"
        )
    if kind != "webdataset" and image_field is not None:
        raise IosrFastError(f"expected --image-field only with WebDataset shards, got a {kind} at {location}")
    if kind == "webdataset":
        return shard_source(location, image_field)
    path = Path(location).resolve()
    if not path.exists():
        raise FileNotFoundError(f"expected images at {location}, found nothing")
    if kind == "parquet":
        return table_source(path, path_column, keep_columns)
    if not path.is_dir():
        raise IosrFastError(f"expected a folder with --kind folder, got the file {location}")
    return folder_source(path)


def kind_of(location: str) -> str:
    """The kind of an input, by its name or by the files in the folder. Raises ValueError for several kinds."""
    path = Path(location)
    if not path.is_dir():
        if location.endswith(".parquet"):
            return "parquet"
        if location.endswith(".tar"):
            return "webdataset"
        if path.exists():
            raise IosrFastError(
                f"expected a folder, a .tar or a .parquet, got the file {location}; give the folder it is in"
            )
        raise FileNotFoundError(f"expected a folder, .tar shards or .parquet files at {location}, found nothing")
    by_suffix = {".tar": "webdataset", ".parquet": "parquet", **dict.fromkeys(IMAGE_SUFFIXES, "folder")}
    example: dict[str, str] = {}
    for name, _ in walk(path, by_suffix.keys()):
        example.setdefault(by_suffix[Path(name).suffix.lower()], name)
    if not example:
        raise IosrFastError(f"expected images, .tar shards or .parquet files in {location}, found none")
    if len(example) > 1:
        raise IosrFastError(
            f"expected one kind of input in {location}, found {' and '.join(example.values())}; choose one with --kind "
            f"{' or '.join(sorted(example))}"
        )
    return next(iter(example))


def folder_source(folder: Path) -> Source:
    """The images of a folder and all below it (images.listing); a warning reports what was skipped."""
    skipped = Skipped()
    items = [
        Item(Path(path).relative_to(folder).as_posix(), path, stamp_of(status))
        for path, status in walk(folder, skipped=skipped)
    ]
    if not items:
        others = f"; skipped {skipped.summary()}" if skipped.total else ""
        raise IosrFastError(f"expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}, found none{others}")
    skipped.warn(folder, len(items))
    items.sort(key=lambda item: item.key)
    check_keys(items, str(folder))
    return Source({"kind": "folder", "path": str(folder)}, items)
