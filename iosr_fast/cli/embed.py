"""The command `iosr-fast embed`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from iosr_fast.cli import parts
from iosr_fast.cli.options import Address, Runtime, SkipBad
from iosr_fast.utils.manifest import MANIFEST

if TYPE_CHECKING:
    from iosr_fast.files.run import RunOptions
    from iosr_fast.files.source import Source


def embed(
    engine: Annotated[str, typer.Option(help="Folder of `iosr-fast build-engine`, a saved classifier, or demo.")],
    location: Annotated[str, typer.Option("--input", help="Folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder to write. An interrupted run resumes.")],
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of the embeddings.")] = "float32",
    batch: Annotated[int, typer.Option(help="Images encoded at a time.")] = 64,
    runtime: Runtime = "auto",
    threads: parts.Threads = None,
    skip_bad: SkipBad = False,
    chunk: parts.Chunk = 1024,
    ray: parts.Ray = False,
    workers: parts.Workers = None,
    gpus: parts.Gpus = 0,
    address: Address = None,
) -> None:
    """Write the plain and adapted embeddings of a folder of images.

    OUT gets safetensors parts with the key of each image, and manifest.json when all parts exist; read_embeddings of
    iosr_fast.files.embedding_files reads them. A part is complete or absent, and the same options resume an
    interrupted run.

    With --ray the machines of a cluster need this package, the input, the engine and OUT at the same paths, and one
    version of Ray.
    """
    options = {**locals()}
    for name in ("engine", "dtype"):
        del options[name]
    from iosr_fast.files import run as runs

    def compute(source: Source, options: RunOptions) -> dict[str, Any]:
        return runs.embed(find_engine(engine), source, out, options, dtype)

    parts.write_parts(compute, **options)


def find_engine(engine: str) -> Path:
    """The engine's folder: the one inside a saved classifier; for "demo" that of the demo's, built once and cached."""
    if engine != "demo":
        from iosr_fast.store.bundle import ENGINE

        inner = Path(engine) / ENGINE
        return inner if (inner / MANIFEST).is_file() else Path(engine)
    from iosr_fast.export.pretrained import open_pretrained

    return open_pretrained("demo", None, "auto", "auto", "fp32", None).engine
