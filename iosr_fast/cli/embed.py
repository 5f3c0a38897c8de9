"""The command `iosr-fast embed`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from iosr_fast.cli import options as shared
from iosr_fast.cli.options import note_counts, option, ray_pool, resumable
from iosr_fast.exceptions import IosrFastError
from iosr_fast.images.detector_files import Selection, is_detector_file
from iosr_fast.sealed.manifest import MANIFEST


def embed(
    engine: Annotated[str, option("Folder of `iosr-fast build-engine`, a saved classifier, or demo.")],
    location: Annotated[str, option("Folder of images, CSV file of path (and a box), or detector file.", "--input")],
    out: Annotated[Path, option("Folder to write. An interrupted run resumes.")],
    dtype: Annotated[Literal["float32", "float16"], option("Type of the embeddings.")] = "float32",
    margin: shared.Margin = 0.0,
    batch: shared.Batch = None,
    runtime: shared.Runtime = "auto",
    threads: shared.Threads = None,
    skip_bad: shared.SkipBad = False,
    root: shared.Root = None,
    min_confidence: shared.MinConfidence = None,
    category: shared.Category = None,
    chunk: shared.Chunk = None,
    ray: shared.Ray = False,
    workers: shared.Workers = None,
    gpus: shared.Gpus = 0,
    address: shared.Address = None,
) -> None:
    """Write the plain and adapted embeddings of a folder of images.

    OUT gets safetensors parts with the key of each image, and manifest.json when all parts exist; read_embeddings of
    iosr_fast.files.embedding_files reads them. A part is complete or absent, and the same options resume an
    interrupted run.

    With --ray the machines of a cluster need this package, the input and the engine at the same paths, and one version
    of Ray.
    """
    from iosr_fast.files.run import check_out, run
    from iosr_fast.files.source import read_source
    from iosr_fast.files.stream import ReadOptions
    from iosr_fast.files.work import UPRIGHT, Embed

    pool = ray_pool(ray, workers, gpus, address)
    if out.suffix:
        raise IosrFastError(f"expected a folder for --out, a name without a suffix, got {out}")
    check_out(out)
    with resumable(out):
        work = Embed(str(find_engine(engine)), dtype, replace(UPRIGHT, margin=margin))
        boxes = Selection(root, min_confidence, tuple(category or ()))
        source = read_source([location], True, skip_bad, boxes)
        counts = run(work, source, out, ReadOptions(batch, runtime, threads, skip_bad), chunk, pool)
    note_counts(out, counts, "boxes" if is_detector_file(location) else "images")


def find_engine(engine: str) -> Path:
    """The engine's folder: the one inside a saved classifier; for "demo" that of the demo's, built once and cached."""
    if engine != "demo":
        from iosr_fast.store.bundle import ENGINE

        inner = Path(engine) / ENGINE
        return inner if (inner / MANIFEST).is_file() else Path(engine)
    from iosr_fast.export.pretrained import open_pretrained

    return open_pretrained("demo", None, "auto", "auto", "fp32", None).engine
