"""From what stands behind --input to a Source, and the checks that need nothing but a look at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iosr_fast.images.listing import IMAGE_SUFFIXES, walk
from tools.embedding.items import Source, folder_source

KINDS = ("folder", "webdataset", "parquet")


def open_source(
    given: str,
    kind: str = "auto",
    *,
    path_column: str = "path",
    keep_columns: Sequence[str] = (),
    image_field: str | None = None,
) -> Source:
    """List the images of a folder, of WebDataset shards or of Parquet files.

    Raises FileNotFoundError where there is nothing, ValueError where what is there is doubtful or options don't fit it.
    """
    kind = kind_of(given) if kind == "auto" else kind
    if kind not in KINDS:
        raise ValueError(f"expected --kind auto or one of {list(KINDS)}, got {kind!r}")
    if kind != "parquet" and (keep_columns or path_column != "path"):
        raise ValueError(f"expected Parquet files with --path-column and --keep-columns, got a {kind} at {given}")
    if kind != "webdataset" and image_field is not None:
        raise ValueError(f"expected WebDataset shards with --image-field, got a {kind} at {given}")
    if kind == "webdataset":
        from tools.embedding.shards import shard_source

        return shard_source(given, image_field)
    path = Path(given).resolve()
    if not path.exists():
        raise FileNotFoundError(f"expected images at {given}, found nothing")
    if kind == "parquet":
        from tools.embedding.tables import table_source

        return table_source(path, path_column, keep_columns)
    if not path.is_dir():
        raise ValueError(f"expected a folder with --kind folder, got the file {given}")
    return folder_source(path)


def kind_of(given: str) -> str:
    """What `given` is by its name or, for a folder, by what lies in it; ValueError where it could be several things."""
    path = Path(given)
    if not path.is_dir():
        if given.endswith(".parquet"):
            return "parquet"
        if given.endswith(".tar"):
            return "webdataset"
        if path.exists():
            raise ValueError(f"expected a folder, a .tar or a .parquet, got the file {given}; give the folder it is in")
        raise FileNotFoundError(f"expected a folder, .tar shards or .parquet files at {given}, found nothing")
    by_suffix = {".tar": "webdataset", ".parquet": "parquet", **dict.fromkeys(IMAGE_SUFFIXES, "folder")}
    example: dict[str, str] = {}
    for name, _ in walk(path, by_suffix.keys()):
        example.setdefault(by_suffix[Path(name).suffix.lower()], name)
    if not example:
        raise ValueError(f"expected images, .tar shards or .parquet files in {given}, found none")
    if len(example) > 1:
        raise ValueError(
            f"expected one kind of input in {given}, found {' and '.join(example.values())}; say which with --kind "
            f"{' or '.join(sorted(example))}"
        )
    return next(iter(example))


def check_apart(given: str, out: Path) -> None:
    """Raise ValueError where the output would lie inside the input and be listed as a part of it."""
    path = Path(given).resolve()
    if path.is_dir() and (out.resolve() == path or path in out.resolve().parents):
        raise ValueError(f"expected --out outside the input, got {out} inside {given}; choose another folder")
