"""A fitted classifier as a folder: everything that `Classifier.load` needs, and nothing that could run code.

    manifest.json         schema, class names and ids, method and parameters, plan constants, preprocessing,
                          fingerprints of CLIP and adapter, SHA-256 of every file
    support.safetensors   embeddings of the support images, class names, unknown and calibration images
    plan.safetensors      what the plan has beyond them: narrow keys, values, a linear term, a reducer
    left_out.safetensors  out-of-fold logits and the score for unknown pictures, where they were used
    pictures.safetensors  thumbnails of the support images, where they are kept
    paths.safetensors     paths of the support images that were files
    engine/               the encoder (iosr_fast.export.build)
    text/                 the text encoder, where the CLIP's can be exported

It is written beside its place and renamed: a crash at any byte leaves the old folder or the new one. It is opened once
and held open: what was verified is what is used and what is saved again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iosr_fast.encoders.engine_folder import ENGINE_KIND, EngineManifest, check_engine
from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.encoders.text_encoder import FILE, TOKENIZER_FILE, WEIGHTS_FILE, TextEncoder, TextSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.engine_choice import EngineChoice
from iosr_fast.head.fitted import Fit
from iosr_fast.head.predictions import AnyHead
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.store.bundle_arrays import SUPPORT, TABLE
from iosr_fast.store.bundle_schema import ClassifierManifest
from iosr_fast.store.head_files import read_head, write_head
from iosr_fast.utils.folders import new_folder
from iosr_fast.utils.manifest import MANIFEST, write_manifest
from iosr_fast.utils.schema import check_files, facts_to_json, read_facts, refused
from iosr_fast.utils.verified_folder import VerifiedFolder, open_verified

KIND = "classifier"
ENGINE, TEXT = "engine", "text"


@dataclass(frozen=True)
class Bundle:
    """A Fit without the encoder that runs: `engine` is the folder to open it from, `files` that folder held open."""

    head: AnyHead
    settings: SupportSettings
    engine: Path
    encoder_fingerprint: str
    text: TextSource | None
    files: VerifiedFolder | None = None
    integer_labels: bool = False
    engine_choice: EngineChoice | None = None

    @classmethod
    def of(cls, fit: Fit) -> Bundle:
        """What is saved of a fit."""
        clip, source, known = fit.clip, fit.clip.encoder.source, (fit.integer_labels, fit.engine_choice)
        return cls(fit.head, fit.settings, clip.engine, clip.encoder.fingerprint, clip.text, source, *known)

    def open(self, runtime: str, threads: int | None, runs: int) -> Fit:
        """The fit of an opened bundle. "auto" is the runtime that was chosen by measuring on the same processor.

        The encoder is opened in the form that queries need; OpenedClip opens that of support images when some come.
        """
        from iosr_fast.encoders.runtimes import open_engine

        choice, adapted = self.engine_choice, self.head.needs_adapted
        name = choice.runtime if runtime == "auto" and choice is not None else runtime
        files = self.files or self.engine
        encoder = open_engine(files, name, verify=False, threads=threads, runs=runs, adapted=adapted)
        clip = OpenedClip(encoder, self.engine, self.text, self.head.tau)
        return Fit(clip, self.head, self.settings, integer_labels=self.integer_labels, engine_choice=choice)

    def parameters(self) -> dict[str, Any]:
        """The parameters of Classifier that an opened bundle knows: not `pretrained`, nor the file of an adapter.

        Method and parameters are the fitted ones, so that another fit searches nothing; a stack weighs its parts again.
        """
        assert self.files is not None
        engine, config, views = self.files.manifest, self.head.config, asdict(self.settings)
        return {
            "model": engine["model"],
            "adapter": None if engine["adapter"] is None else "auto",
            "precision": engine["precision"],
            "engine": self.engine,
            "method": config.method,
            "reducer": config.reducer,
            **({} if config.method in ("stack", "stack++") else config.parameters),
            "key_precision": config.key_precision,
            "look_alikes": config.look_alikes,
            "thumbnails": views.pop("thumbnail"),
            **{name: value for name, value in views.items() if name != "single"},
        }


def save_bundle(bundle: Bundle, folder: str | Path) -> dict[str, Any]:
    """Write `folder`, engine included, and return its manifest; an interrupted call leaves what was there.

    Raises ValueError, with nothing written, where the engine or the text encoder is not as its manifest says, or
    another than the one that encoded the support images.
    """
    engine = bundle.files or open_verified(bundle.engine, ENGINE_KIND)
    facts = check_engine(engine)
    _check_encoder(engine, facts, bundle.encoder_fingerprint)
    with new_folder(folder, KIND) as temporary:
        known = _copy_engine(engine, temporary / ENGINE)
        written = {
            **write_head(bundle.head, temporary),
            "views": asdict(bundle.settings),
            "preprocessing": {**facts.geometry.facts(), "mean": facts.mean, "std": facts.std},
            "clip_fingerprint": facts.clip_fingerprint,
            "adapter_fingerprint": facts.adapter_fingerprint,
            "encoder_fingerprint": bundle.encoder_fingerprint,
            "text": _write_text(bundle.text, temporary / TEXT),
            # Left out where they say nothing, so that earlier versions read the bundle.
            **({"integer_labels": True} if bundle.integer_labels else {}),
            **({} if bundle.engine_choice is None else {"engine_choice": facts_to_json(bundle.engine_choice)}),
        }
        manifest = write_manifest(temporary, KIND, written, known)
        _read(open_verified(temporary, KIND, verify=False))  # what can't be loaded is not written
        return manifest


def load_bundle(
    folder: str | Path | VerifiedFolder,
    verify: bool = True,
    threads: int | None = None,
    expected_digest: str | None = None,
) -> Bundle:
    """Read what `save_bundle` wrote, a folder or a verified one. Every file is opened now and read once.

    `threads` of the text encoder. Raises FileNotFoundError or ValueError, naming the file and what is wrong, and what
    `verified_folder.open_verified` raises for another digest than the expected one.
    """
    if not isinstance(folder, VerifiedFolder):
        folder = open_verified(folder, KIND, verify, expected_digest)
    elif expected_digest is not None:
        folder.require(expected_digest)
    facts, engine = _read(folder)
    folder.check(but=(*TABLE, f"{ENGINE}/{MANIFEST}"))
    head = read_head(facts, folder)
    try:
        settings = facts.support_settings()
        _check_widths(facts, engine.manifest, head)
    except ValueError as error:
        raise refused(folder, str(error)) from error
    text = None
    if facts.text is not None:
        text = TextEncoder(folder.part(TEXT), folder.manifest["text"], threads)
    known = facts.integer_labels, facts.engine_choice
    return Bundle(head, settings, engine.folder, facts.encoder_fingerprint, text, engine, *known)


def _read(folder: VerifiedFolder) -> tuple[ClassifierManifest, VerifiedFolder]:
    """The facts of a bundle, and its engine, after checking that their manifests agree."""
    reducer = folder.manifest.get("reducer")
    if isinstance(reducer, str) and reducer.startswith("isoclip"):
        raise IosrFastError(
            f"{folder.folder} has the reducer {reducer!r}, which iosr_fast no longer has: fit again with 'none', "
            "'centre' or 'pca', or open it with version 0.2"
        )
    facts = read_facts(folder, ClassifierManifest)
    engine = folder.inner(ENGINE, ENGINE_KIND)
    own = {f"{ENGINE}/{name}" for name in (MANIFEST, *engine.files)}
    texts = set() if facts.text is None else {f"{TEXT}/{FILE}", f"{TEXT}/{TOKENIZER_FILE}"}
    check_files(folder, {SUPPORT} | own | texts, {*TABLE, f"{TEXT}/{WEIGHTS_FILE}"})
    inner = check_engine(engine)
    _check_encoder(engine, inner, facts.encoder_fingerprint)
    repeated = {name: getattr(facts, name) for name in ("clip_fingerprint", "adapter_fingerprint")}
    for name, value in {**facts.preprocessing, **repeated}.items():
        if value != (expected := getattr(inner, name, None)):
            raise refused(folder, f"manifest.json: expected the engine's {name}, {expected}, got {value}")
    return facts, engine


def _check_encoder(engine: VerifiedFolder, facts: EngineManifest, expected: str) -> None:
    if facts.fingerprint != expected:
        raise IosrFastError(
            f"the engine in {engine.folder} is of another export: the support set was encoded with "
            f"{expected[:12]}, the engine is {facts.fingerprint[:12]}; fit and save again"
        )


def _check_widths(facts: ClassifierManifest, engine: Mapping[str, Any], head: AnyHead) -> None:
    """That embeddings are such as the engine makes, and the text encoder."""
    width, text = engine["width"], facts.text
    adapted = engine["first_adapted_block"] is not None
    if head.text is None:
        raise IosrFastError(f"{SUPPORT}: expected the embeddings of class names, text, got none")
    if head.examples.width != width:
        raise IosrFastError(f"{SUPPORT}: expected embeddings of {width} channels, got {head.examples.width}")
    calibration = None if head.calibration_images is None else head.calibration_images.embeddings
    for rows in (head.examples.embeddings, head.unknown_images, calibration):
        if rows is not None and len(rows) and (rows.adapted is not None) != adapted:
            no = "" if adapted else "no "
            raise IosrFastError(f"{SUPPORT}: expected {no}adapted embeddings, as the engine makes them")
    if text is not None and (text.width, text.clip_fingerprint) != (width, facts.clip_fingerprint):
        clip = facts.clip_fingerprint[:12]
        raise IosrFastError(f"manifest.json: expected a text encoder of the engine's CLIP, {clip}")


def _copy_engine(engine: VerifiedFolder, target: Path) -> dict[str, str]:
    """The files that the engine's manifest names, and no others; their SHA-256 by their names in a bundle."""
    copied = {}
    for name in engine.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copied[f"{ENGINE}/{name}"] = engine.copy(name, target / name)
    (target / MANIFEST).write_bytes(engine.content)
    return copied


def _write_text(text: TextSource | None, folder: Path) -> dict[str, Any] | None:
    if text is None:
        return None
    folder.mkdir()
    facts = text.write(folder)
    if facts is None:
        shutil.rmtree(folder)
    return facts
