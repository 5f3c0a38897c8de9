"""The command `iosr-fast benchmark`: latency and throughput of a classifier, or an engine, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from iosr_fast.cli.command import ListCommand, command_app, note, say
from iosr_fast.cli.options import Json, Runtime, argument, option
from iosr_fast.exceptions import IosrFastError

if TYPE_CHECKING:
    import numpy as np

    from iosr_fast.classifier import Classifier
    from iosr_fast.encoders.encoder import Encoder

SECONDS, FEWEST, MOST = 4.0, 10, 300  # of one row: its time, and its calls at least and at most
# Each row of a batch against the same image alone: rounding differs by batch, other weights or images don't pass.
LEAST_COSINE = 0.999
SIDES = (500, 375)  # of the demo's pictures, as JPEGs
Call = Callable[[Any], object]


def main(
    folder: Annotated[Path, argument("CLASSIFIER|ENGINE", "A saved classifier, or an engine.")],
    batch: Annotated[list[int], option("Images of a call.", min=1)] = [1, 8, 32],
    images: Annotated[Path | None, option("Folder of images like yours [default: the demo's, as JPEGs].")] = None,
    runtime: Runtime = "auto",
    threads: Annotated[int | None, option("CPU threads of the engine [default: all].", min=1)] = None,
    json_path: Json = None,
) -> None:
    """Time a saved classifier or an engine on this machine: latency percentiles and images a second.

    engine: decoded pixels to embeddings. engine, then kernels: to probabilities, by this package. one file (TensorRT:
    one plan): the same by the graph of `iosr-fast export --pixels`. whole path: encoded files to labels (of an engine
    to embeddings). There is one caller. First the folder's files are compared with their hashes, every image's
    embedding in a batch with its embedding alone (of a classifier also the labels), and answers of the one file with
    the classifier's.

    \b
    iosr-fast benchmark my-classifier --batch 1 8 32 --images photographs/
    """
    from iosr_fast.evaluation.provenance import write_rows
    from iosr_fast.utils.progress import progress

    files, source = read_files(images, max(batch))
    parts, facts = open_parts(folder, files, runtime, threads)
    facts |= {"images": source, "folder": str(folder)}
    say(f"{folder}: {facts['runtime']} {facts['precision']}, {facts['threads']} threads; {facts['device']}")
    say(f"{len(files)} images: {source}; verified: {facts['verified']}")
    say(f"{'part':21}{'batch':>6}{'calls':>7}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'images/s':>10}")
    rows: list[dict[str, Any]] = []
    with progress("benchmark", len(parts) * len(batch)) as advance:
        for part, (run, items) in parts.items():
            for size in batch:
                row = {"part": part, "batch": size, **time_calls(run, items[:size]), **facts}
                rows.append(row)
                milliseconds = "".join(f"{row[f'p{q}_ms']:10.2f}" for q in (50, 90, 99))
                say(f"{part:21}{size:6}{row['calls']:7}{milliseconds}{row['images_per_s']:10.1f}")
                if json_path is not None:
                    write_rows(json_path, rows)
                advance(1)
    if json_path is not None:
        note(f"wrote {json_path}")


benchmark = command_app(main, ListCommand)


def read_files(folder: Path | None, count: int) -> tuple[list[bytes], str]:
    """`count` encoded images, repeated where there are fewer, and where they are from."""
    files, source = [], f"the demo's pictures as JPEGs of {SIDES[0]} x {SIDES[1]}; --images takes your own"
    if folder is not None:
        from iosr_fast.images.listing import list_images

        files, source = [Path(path).read_bytes() for path in list_images(folder).paths[:count]], str(folder)
        if not files:
            raise IosrFastError(f"expected images in {folder}, found none; give a folder of images")
    else:
        from PIL import Image

        from iosr_fast.backbones.demo.pictures import load_pictures

        for picture in load_pictures("held-out").images[:count]:
            file = BytesIO()
            Image.fromarray(picture).resize(SIDES, Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
            files.append(file.getvalue())
    return [files[i % len(files)] for i in range(count)], source


def open_parts(
    folder: Path, files: list[bytes], runtime: str, threads: int | None
) -> tuple[dict[str, tuple[Call, Any]], dict[str, Any]]:
    """What is timed, verified, each with its items; and the facts of all rows. Raises ArithmeticError where a batch
    changes a result."""
    from iosr_fast.delivery.one_file import TOLERANCE
    from iosr_fast.encoders.engine_folder import ENGINE_KIND, EXTRAS
    from iosr_fast.encoders.runtimes import open_engine
    from iosr_fast.images.preprocess import to_pixels
    from iosr_fast.store.bundle import kind_of

    encoder: Encoder

    def decode(files: list[bytes]) -> np.ndarray:
        return to_pixels(files, encoder.geometry)

    def embed(files: list[bytes]) -> object:
        return encoder.encode(decode(files))

    whole: Call = embed
    verified = "hashes, embeddings in a batch and alone"
    if kind_of(folder) == ENGINE_KIND:
        encoder = open_engine(folder, runtime, threads=threads)
        on_pixels: dict[str, Call] = {"engine": encoder.encode}
    else:
        from iosr_fast.classifier import Classifier

        classifier = Classifier.load(folder, runtime=runtime, threads=threads)
        encoder, whole = classifier.encoder, classifier.predict
        verified = "hashes, embeddings and labels in a batch and alone"
        few = files[:8]
        if classifier.predict(few).tolist() != [classifier.predict([file]).tolist()[0] for file in few]:
            raise ArithmeticError("expected the same labels in a batch and alone, got others; nothing is timed")
        on_pixels = {"engine": encoder.encode, "engine, then kernels": classifier.predict_proba}
        name = "one plan" if encoder.runtime in EXTRAS else "one file"
        try:
            on_pixels[name] = open_one_file(classifier, decode(few))
            verified += f"; {name}: labels, probabilities to {TOLERANCE}"
        except IosrFastError as error:
            note(f"not timed as {name}: {error}")
    pixels = decode(files)
    check_batches(encoder, pixels[:8])
    parts = {name: (run, pixels) for name, run in on_pixels.items()} | {"whole path": (whole, files)}
    return parts, facts_of(encoder, verified)


def open_one_file(classifier: Classifier, pixels: np.ndarray) -> Call:
    """Pixels to probabilities and labels by one graph, in the runtime of the classifier's encoder. Raises IosrFastError
    where the classifier can't be exported, ArithmeticError where the graph answers `pixels`, or one of them alone,
    otherwise than the classifier."""
    from iosr_fast.delivery.one_file import check_answers, one_file
    from iosr_fast.encoders.runtimes.graph import open_graph
    from iosr_fast.head.verdict import NONE_WITHHELD

    fit = classifier._fitted()
    model = one_file(fit, NONE_WITHHELD, "pixels")
    with TemporaryDirectory() as folder:
        file = Path(folder, "classifier.onnx")
        file.write_bytes(model.SerializeToString())
        run = open_graph(file, [output.name for output in model.graph.output], fit.encoder)
    for few in (pixels, pixels[:1]):
        check_answers(run(few), fit, fit.encoder, few, NONE_WITHHELD)
    return run


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
    from iosr_fast.evaluation.provenance import cpu_description
    from iosr_fast.utils.machine import package_version, this_gpu, usable_threads

    manifest = {} if encoder.source is None else encoder.source.manifest
    gpu = None if encoder.buckets is None else this_gpu()
    return {
        "runtime": encoder.runtime,
        "model": manifest.get("model"),
        "precision": manifest.get("precision"),
        "threads": encoder.threads or usable_threads(),
        "device": cpu_description() if gpu is None else f"{gpu.name}, {cpu_description()}",
        "versions": {name: package_version(name) for name in ("iosr_fast", "numpy", encoder.runtime)},
        "verified": verified,
    }


def time_calls(run: Call, items: Any) -> dict[str, Any]:
    """Percentiles of single calls on the items, after two untimed ones, and images a second."""
    import numpy as np

    times: list[float] = []
    run(items)
    run(items)
    started = time.perf_counter()
    while len(times) < FEWEST or (len(times) < MOST and time.perf_counter() - started < SECONDS):
        start = time.perf_counter()
        run(items)
        times.append(time.perf_counter() - start)
    milliseconds = {f"p{q}_ms": round(float(np.percentile(times, q)) * 1e3, 4) for q in (50, 90, 99)}
    return {"calls": len(times), **milliseconds, "images_per_s": round(len(items) * len(times) / sum(times), 2)}
