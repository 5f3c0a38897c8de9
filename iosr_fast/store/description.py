"""A bundle, a head, an engine folder or a log of changes in words: the lines of `iosr-fast info`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from iosr_fast.encoders.engine_folder import ENGINE_KIND, EngineManifest, check_engine
from iosr_fast.encoders.rows import Rows
from iosr_fast.head.head import Head
from iosr_fast.methods.config import describe_shares
from iosr_fast.sealed.verified_folder import open_verified
from iosr_fast.store.bundle import Bundle, kind_of
from iosr_fast.store.log_reader import Base, LoggedChange, reading
from iosr_fast.utils.text import abbreviate


def describe(folder: str | Path) -> str:
    """Lines to read of a bundle, a head or an engine folder, the last with its digest. Every file is verified first.

    Raises FileNotFoundError and ValueError as `Classifier.load` does.
    """
    verified = open_verified(folder, kind_of(folder))
    size = sum(file.size for file in verified.files.values())
    lines = [f"{folder}: {verified.kind}, {len(verified.files) + 1} files, {size / 1e6:,.1f} MB"]
    if verified.kind == ENGINE_KIND:
        lines += _engine_lines(check_engine(verified))
        verified.check()
    else:
        bundle = Bundle.read(verified)
        lines += [*_head_lines(bundle.head), *_beside_lines(bundle)]
    return "\n".join([*lines, f"digest {verified.digest}"])


def describe_log(path: str | Path) -> Iterator[str]:
    """Lines to read of a log: what it begins with, each change, and what it leads to. Raises as `read_log`, after the
    changes that can be read."""
    with reading(path) as reader:
        base = reader.base
        last = cast(Base | LoggedChange, reader.base)
        yield f"{path}: log of changes of the classifier {base.fingerprint}, version {base.version}"
        for row in reader.rows():
            last = row.logged()
            name = f" {last.name!r}" if last.name else ""
            below = f" below {' > '.join(last.path)!r}" if last.path else ""
            images = f", images {abbreviate(last.example_ids)}" if last.example_ids else ""
            yield f"{last.time} version {last.version}: {last.op} {last.class_id}".rstrip() + name + below + images
    yield f"leads to version {last.version}, {last.classes:,} classes, {last.images:,} images"


def _head_lines(head: Head) -> list[str]:
    config, examples = head.config, head.examples
    parameters = "".join(f", {name} {value:.6g}" for name, value in sorted(config.parameters.items()))
    shares = {} if head.evidence is None else head.evidence.shares
    return [
        f"classes {len(head.uids):,}, images {len(examples):,}, "
        f"thumbnails {sum(picture is not None for picture in examples.pictures):,}, version {head.version}"
        + ("" if head.unknown_images is None else f", unknown images {len(head.unknown_images):,}")
        + ("" if examples.groups is None else f", groups {len(set(examples.groups.tolist())):,}"),
        f"method {config.method}, reducer {config.reducer}{parameters}, keys in {config.key_precision or 'fp32'}",
        *head.summary().split("\n"),
        *([f"shares of the logits: {describe_shares(shares)}"] if shares else []),
    ]


def _beside_lines(bundle: Bundle) -> list[str]:
    """What is beside the head."""
    if bundle.files is None:
        assert bundle.estimator is not None
        rows = Rows.like(bundle.head.examples.embeddings)
        numbers = f"{rows.width} numbers" + (", plain and adapted side by side" if rows.adapted else "")
        return [f"takes embeddings of {numbers}; labels are {bundle.estimator.labels}"]
    lines = _engine_lines(check_engine(bundle.files))
    without = "none" if bundle.head.text is not None else "none: this model reads no texts"
    lines.append(f"text encoder {without if bundle.text is None else 'included'}")
    lines += [f"margin {margin:g} of boxes"] if (margin := bundle.settings.margin) else []
    return lines + ([] if bundle.engine_choice is None else bundle.engine_choice.lines())


def _engine_lines(engine: EngineManifest) -> list[str]:
    plans = f", plans {', '.join(sorted(engine.plans))}" if engine.plans else ""
    changes = engine.geometry.changes()
    resized = f" ({', '.join(f'{name} {value}' for name, value in changes.items())})" if changes else ""
    adapter = "none" if engine.adapter is None else f"{engine.adapter} {(engine.adapter_fingerprint or '')[:12]}"
    model = "image encoder" if engine.logit_scale is None else "CLIP"
    return [
        f"engine {engine.model}, {engine.image_size} pixels{resized}, {engine.width} channels, {engine.precision}, "
        f"built for {engine.runtime}{plans}",
        f"{model} {engine.clip_fingerprint[:12]}, adapter {adapter}, engine {engine.fingerprint[:12]}",
    ]
