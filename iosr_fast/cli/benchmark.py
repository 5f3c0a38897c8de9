"""The command `iosr-fast benchmark`: latency and throughput of a classifier, or an engine, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from iosr_fast.cli.options import Runtime
from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.command import ListCommand, new_app, new_file, note, say

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.encoders.encoder import Encoder

SECONDS, FEWEST, MOST = 4.0, 10, 300  # of one row: its time, and its calls at least and at most
# Each row of a batch against the same image alone: rounding differs by batch, other weights or images don't pass.
LEAST_COSINE = 0.999
SIDES = (500, 375)  # of the demo's pictures, as JPEGs

benchmark = new_app("iosr-fast")


class Part(NamedTuple):
    """`run` takes a batch of `items`, which are pixels or encoded files."""

    name: str
    items: Any
    run: Callable[[Any], object]


@benchmark.command(cls=ListCommand)
def main(
    folder: Annotated[Path, typer.Argument(metavar="CLASSIFIER|ENGINE", help="A saved classifier, or an engine.")],
    batch: Annotated[list[int], typer.Option(min=1, help="Images of a call.")] = [1, 8, 32],
    images: Annotated[
        Path | None, typer.Option(help="Folder of images like yours [default: JPEGs made from the demo's pictures].")
    ] = None,
    runtime: Runtime = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine [default: all].")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", callback=new_file, help="Write the rows here, as JSON.")
    ] = None,
) -> None:
    """Time a saved classifier or an engine on this machine: latency percentiles and images a second.

    engine: decoded pixels to embeddings. whole path: encoded files to labels (of an engine to embeddings), called by
    one caller. First the folder's files are compared with their hashes, and every image's embedding in a batch with
    its embedding alone (of a classifier also the labels).

    \b
    iosr-fast benchmark my-classifier --batch 1 8 32 --images photographs/
    """
    from iosr_fast.utils.progress import progress
    from iosr_fast.utils.provenance import write_rows

    files, source = read_files(images, max(batch))
    parts, facts = open_parts(folder, files, runtime, threads)
    facts |= {"images": source, "folder": str(folder)}
    say(f"{folder}: {facts['runtime']} {facts['precision']}, {facts['threads']} threads; {facts['device']}")
    say(f"{len(files)} images: {source}; verified: {facts['verified']}")
    say(f"{'part':12}{'batch':>6}{'calls':>7}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'images/s':>10}")
    rows: list[dict[str, Any]] = []
    with progress("benchmark", len(parts) * len(batch)) as advance:
        for part in parts:
            for size in batch:
                row = {"part": part.name, "batch": size, **time_calls(part, size), **facts}
                rows.append(row)
                milliseconds = "".join(f"{row[f'p{q}_ms']:10.2f}" for q in (50, 90, 99))
                say(f"{part.name:12}{size:6}{row['calls']:7}{milliseconds}{row['images_per_s']:10.1f}")
                if json_path is not None:
                    write_rows(json_path, rows)
                advance(1)
    if json_path is not None:
        note(f"wrote {json_path}")


def read_files(folder: Path | None, count: int) -> tuple[list[bytes], str]:
    """`count` encoded images, repeated where there are fewer, and where they are from."""
    if folder is None:
        from PIL import Image

        from iosr_fast.clip.demo.pictures import load_pictures

        pictures = load_pictures("held-out").images[:count]
        files = []
        for picture in pictures:
            file = BytesIO()
            Image.fromarray(picture).resize(SIDES, Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
            files.append(file.getvalue())
        source = f"the demo's pictures as JPEGs of {SIDES[0]} x {SIDES[1]}; --images takes your own"
    else:
        from iosr_fast.images.listing import list_images

        paths = list_images(folder).paths[:count]
        if not paths:
            raise IosrFastError(f"expected images in {folder}, found none; give a folder of images")
        files, source = [Path(path).read_bytes() for path in paths], str(folder)
    return [files[i % len(files)] for i in range(count)], source


def open_parts(
    folder: Path, files: list[bytes], runtime: str, threads: int | None
) -> tuple[list[Part], dict[str, Any]]:
    """What is timed, verified, and the facts of all rows. Raises ArithmeticError where a batch changes a result."""
    import numpy as np

    from iosr_fast.encoders.engine_folder import ENGINE_KIND
    from iosr_fast.encoders.runtimes import open_engine
    from iosr_fast.images.decode import CpuDecoder
    from iosr_fast.store.description import folder_kind

    decoder = CpuDecoder()
    encoder: Encoder

    def decode(files: list[bytes]) -> np.ndarray:
        decoded = decoder.decode(files, encoder.geometry)
        for error in decoded.errors:
            if error is not None:
                raise error
        return np.asarray(decoded.pixels)

    if folder_kind(folder) == ENGINE_KIND:
        encoder = open_engine(folder, runtime, threads=threads)
        parts = [Part("whole path", files, lambda files: encoder.encode(decode(files)))]
        verified = "hashes, embeddings in a batch and alone"
    else:
        from iosr_fast.classifier import Classifier

        classifier = Classifier.load(folder, runtime=runtime, threads=threads)
        encoder = classifier.encoder
        parts = [Part("whole path", files, classifier.predict)]
        verified = "hashes, embeddings and labels in a batch and alone"
        few = files[:8]
        alone = [str(classifier.predict([file])[0]) for file in few]
        if [str(label) for label in classifier.predict(few)] != alone:
            raise ArithmeticError("expected the same labels in a batch and alone, got others; nothing is timed")
    pixels = decode(files)
    check_batches(encoder, pixels[:8])
    return [Part("engine", pixels, encoder.encode), *parts], facts_of(encoder, verified)


def check_batches(encoder: Encoder, pixels: np.ndarray) -> None:
    """Raise ArithmeticError unless each image's embeddings are finite, and the same in a batch and alone."""
    import numpy as np

    together = encoder.encode(pixels).to_numpy()
    alone = [encoder.encode(pixels[i : i + 1]).to_numpy() for i in range(len(pixels))]
    for kind in ("plain", "adapted") if together.adapted is not None else ("plain",):
        rows, single = getattr(together, kind), np.concatenate([getattr(one, kind) for one in alone])
        cosine = float(((rows * single).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(single, axis=1)).min())
        if not cosine >= LEAST_COSINE:  # written so that a NaN is refused too
            raise ArithmeticError(
                f"expected {kind} embeddings in a batch with cosines of at least {LEAST_COSINE} with those of the "
                f"images alone, got {cosine:.4f}; nothing is timed"
            )


def facts_of(encoder: Encoder, verified: str) -> dict[str, Any]:
    from iosr_fast.utils.machine import package_version, this_gpu, usable_threads
    from iosr_fast.utils.provenance import cpu_description

    manifest = {} if encoder.source is None else encoder.source.manifest
    gpu = None if encoder.buckets is None else this_gpu()
    device = cpu_description() if gpu is None else f"{gpu.name}, {cpu_description()}"
    return {
        "runtime": encoder.runtime,
        "model": manifest.get("model"),
        "precision": manifest.get("precision"),
        "threads": encoder.threads or usable_threads(),
        "device": device,
        "versions": {name: package_version(name) for name in ("iosr_fast", "numpy", encoder.runtime)},
        "verified": verified,
    }


def time_calls(part: Part, batch: int) -> dict[str, Any]:
    """Percentiles of single calls on the first `batch` items, after two untimed ones, and images a second."""
    import numpy as np

    items = part.items[:batch]
    for _ in range(2):
        part.run(items)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < FEWEST or (len(times) < MOST and time.perf_counter() - started < SECONDS):
        start = time.perf_counter()
        part.run(items)
        times.append(time.perf_counter() - start)
    milliseconds = {f"p{q}_ms": round(float(np.percentile(times, q)) * 1e3, 4) for q in (50, 90, 99)}
    return {"calls": len(times), **milliseconds, "images_per_s": round(batch * len(times) / sum(times), 2)}
