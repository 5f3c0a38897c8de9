"""A saved classifier as a folder: everything that opens it, and nothing that could run code.

    manifest.json         schema, class names and ids, method and parameters, constants of the plan, SHA-256 of every
                          file; of a Bundle preprocessing and fingerprints of CLIP and adapter
    support.safetensors   embeddings of the support images, class names, unknown and calibration images
    plan.safetensors      what the plan has beyond them: narrow keys, values, a linear term, a reducer
    left_out.safetensors  out-of-fold logits and the score for unknown pictures, where they were used
    pictures.safetensors  thumbnails of the support images, where they are kept
    paths.safetensors     paths of the support images that were files
    engine/               of a Bundle, the encoder (iosr_fast.export.build)
    text/                 of a Bundle, the text encoder, where the CLIP's can be exported

It is written beside its place and renamed: a crash at any byte leaves the old folder or the new one. It is opened once
and held open: what was verified is what is used and what is saved again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iosr_fast.delivery.engine_choice import EngineChoice
from iosr_fast.delivery.fitted import FittedClassifier, SavedEstimator
from iosr_fast.encoders.engine_folder import ENGINE_KIND, EngineManifest, check_engine
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.encoders.rows import Rows
from iosr_fast.encoders.text_encoder import FILE, TOKENIZER_FILE, WEIGHTS_FILE, TextEncoder, TextSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.head import Head
from iosr_fast.head.names import check_names
from iosr_fast.head.support_images import SupportSettings
from iosr_fast.sealed.files import open_regular
from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import LARGEST_MANIFEST, MANIFEST, write_manifest
from iosr_fast.sealed.schema import check_files, facts_to_json, read_facts, refused
from iosr_fast.sealed.verified_folder import VerifiedFolder, open_verified
from iosr_fast.store.bundle_arrays import SUPPORT, TABLE
from iosr_fast.store.bundle_schema import ClassifierManifest, HeadManifest
from iosr_fast.store.head_files import read_head, write_head

KIND, HEAD_KIND = "classifier", "head"
ENGINE, TEXT = "engine", "text"


@dataclass(frozen=True)
class Bundle:
    """A FittedClassifier without the encoder that runs.

    `engine` is the folder to open it from, `files` that folder held open. A head on rows of embeddings has neither; it
    has an `estimator`, what FewShotHead needs beside it.
    """

    head: Head
    settings: SupportSettings
    engine: Path
    encoder_fingerprint: str
    text: TextSource | None = None
    files: VerifiedFolder | None = None
    integer_labels: bool = False
    engine_choice: EngineChoice | None = None
    estimator: SavedEstimator | None = None

    @classmethod
    def of(cls, fit: FittedClassifier) -> Bundle:
        """What is saved of a fit."""
        clip = fit.clip
        beside = clip.text, clip.encoder.source, fit.integer_labels, fit.engine_choice, fit.estimator
        return cls(fit.head, fit.settings, clip.engine, clip.encoder.fingerprint, *beside)

    @property
    def kind(self) -> str:
        """What the folder says it is."""
        return KIND if self.estimator is None else HEAD_KIND

    @property
    def shares(self) -> object:
        """Equal in bundles whose fits can share an encoder and its batches; nothing says it of rows of embeddings."""
        if self.files is None:
            return object()
        settings = self.settings
        return self.encoder_fingerprint, check_engine(self.files).geometry, settings.exif_orientation, settings.margin

    def open(self, runtime: str, threads: int | None, runs: int, beside: Iterable[Bundle] = ()) -> FittedClassifier:
        """The fit of an opened bundle. "auto" is the runtime that was chosen by measuring on the same processor.

        The encoder is opened in the form that queries need, those of bundles `beside` it, too, whose fits will be
        `on` the model of this one; OpenedModel opens that of support images when some come.
        """
        from iosr_fast.encoders.runtimes import open_engine

        if self.estimator is not None:
            if runtime != "auto":
                raise IosrFastError(f"a head has no encoder, which a runtime would execute: leave out {runtime!r}")
            return self.on(OpenedModel(Rows.like(self.head.examples.embeddings), Path(), None, self.head.tau))
        choice = self.engine_choice
        forms = {self.head.needs_adapted, *(one.head.needs_adapted for one in beside)}
        name = choice.runtime if runtime == "auto" and choice is not None else runtime
        files = self.files or self.engine
        encoder = open_engine(files, name, verify=False, threads=threads, runs=runs, adapted=True in forms)
        reads_text = self.head.text is not None
        model = self.engine, self.text, self.head.tau, None, reads_text
        return self.on(OpenedModel(encoder, *model, one_form=len(forms) == 2))

    def on(self, clip: OpenedModel) -> FittedClassifier:
        """The fit on an opened model."""
        beside = self.integer_labels, self.engine_choice
        return FittedClassifier(clip, self.head, self.settings, (), *beside, estimator=self.estimator)

    def parameters(self) -> dict[str, Any]:
        """The parameters of Classifier that an opened bundle has: not `pretrained`, nor the file of an adapter.

        Method and parameters are the fitted ones, so that another fit searches nothing; a stack weighs its parts again.
        """
        if self.files is None:
            return {}
        engine = self.files.manifest
        config = self.head.config
        settings = asdict(self.settings)
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
            "thumbnails": settings.pop("thumbnail"),
            **settings,
        }

    def write(self, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
        """Write what is beside the head: its facts, and the SHA-256 of the engine's files."""
        if self.estimator is not None:
            check_names(self.head.class_names, saved=True)  # the others were checked at the fit
            return asdict(self.estimator), {}
        engine = self.files or open_verified(self.engine, ENGINE_KIND)
        facts = check_engine(engine)
        _check_encoder(engine, facts, self.encoder_fingerprint)
        hashes = {}
        for name in engine.files:  # and no others
            path = folder / ENGINE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            hashes[f"{ENGINE}/{name}"] = engine.copy(name, path)
        (folder / ENGINE / MANIFEST).write_bytes(engine.content)
        text = None
        if self.text is not None:
            (folder / TEXT).mkdir()
            text = self.text.write(folder / TEXT)
            if text is None:
                shutil.rmtree(folder / TEXT)
        written = {
            "views": self.settings.facts(),
            "preprocessing": {**facts.geometry.facts(), "mean": facts.mean, "std": facts.std},
            "clip_fingerprint": facts.clip_fingerprint,
            "adapter_fingerprint": facts.adapter_fingerprint,
            "encoder_fingerprint": self.encoder_fingerprint,
            "text": text,
            # Left out where they say nothing, so that earlier versions read the bundle.
            **({"integer_labels": True} if self.integer_labels else {}),
            **({} if self.engine_choice is None else {"engine_choice": facts_to_json(self.engine_choice)}),
        }
        return written, hashes

    @classmethod
    def read(cls, folder: VerifiedFolder, threads: int | None = None) -> Bundle:
        """What was saved, after checking that the manifest, the engine's and the head agree."""
        if folder.kind == HEAD_KIND:
            return cls._of_rows(folder)
        reducer = folder.manifest.get("reducer")
        if isinstance(reducer, str) and reducer.startswith("isoclip"):
            raise IosrFastError(
                f"{folder.folder} has the reducer {reducer!r}, which iosr_fast no longer has: fit again with 'none', "
                "'centre' or 'pca', or open it with version 0.2"
            )
        facts = read_facts(folder, ClassifierManifest)
        engine = folder.inner(ENGINE, ENGINE_KIND)
        needed = {SUPPORT, *(f"{ENGINE}/{name}" for name in (MANIFEST, *engine.files))}
        if facts.text is not None:
            needed |= {f"{TEXT}/{FILE}", f"{TEXT}/{TOKENIZER_FILE}"}
        check_files(folder, needed, {*TABLE, f"{TEXT}/{WEIGHTS_FILE}"})
        inner = check_engine(engine)
        _check_encoder(engine, inner, facts.encoder_fingerprint)
        repeated = {name: getattr(facts, name) for name in ("clip_fingerprint", "adapter_fingerprint")}
        for name, value in {**facts.preprocessing, **repeated}.items():
            if value != (expected := getattr(inner, name, None)):
                raise refused(folder, f"manifest.json: expected the engine's {name}, {expected}, got {value}")
        folder.check(but=(*TABLE, f"{ENGINE}/{MANIFEST}"))
        head = read_head(facts, folder)
        try:
            settings = facts.support_settings()
            _check_widths(facts, engine, head)
        except ValueError as error:
            raise refused(folder, str(error)) from error
        text = None if facts.text is None else TextEncoder(folder.part(TEXT), folder.manifest["text"], threads)
        beside = text, engine, facts.integer_labels, facts.engine_choice
        return cls(head, settings, engine.folder, facts.encoder_fingerprint, *beside)

    @classmethod
    def _of_rows(cls, folder: VerifiedFolder) -> Bundle:
        facts = read_facts(folder, HeadManifest)
        check_files(folder, {SUPPORT}, {*TABLE})
        estimator = SavedEstimator(facts.estimator, facts.labels, facts.indicator, facts.columns)
        try:
            if [str(label) for label in estimator.classes(facts.class_names).tolist()] != facts.class_names:
                raise IosrFastError(f"expected class_names that are {facts.labels}, got others")
        except (ValueError, OverflowError) as error:
            raise refused(folder, f"manifest.json: {error}") from error
        return cls(read_head(facts, folder), SupportSettings(), Path(), Rows.fingerprint, estimator=estimator)


def save(bundle: Bundle, folder: str | Path) -> None:
    """Write `folder`; an interrupted call leaves what was there.

    Raises ValueError, with nothing written, for what can't be loaded: labels and class names that JSON does not give
    back or that no saved classifier may have; an engine or a text encoder that is not as its manifest says, or another
    than the one that encoded the support images.
    """
    with new_folder(folder, bundle.kind) as temporary:
        facts, hashes = bundle.write(temporary)
        write_manifest(temporary, bundle.kind, {**write_head(bundle.head, temporary), **facts}, hashes)
        Bundle.read(open_verified(temporary, bundle.kind, verify=False))  # what can't be loaded is not written


def load(
    folder: str | Path | VerifiedFolder,
    verify: bool = True,
    threads: int | None = None,
    expected_digest: str | None = None,
    kind: str | None = None,
) -> Bundle:
    """Read what `save` wrote, a folder or a verified one. Every file is opened now and read once.

    `threads` of the text encoder; `kind` is KIND or HEAD_KIND where the other is refused. Raises FileNotFoundError or
    ValueError, naming the file and what is wrong, and what `verified_folder.open_verified` raises for another digest
    than the expected one.
    """
    if not isinstance(folder, VerifiedFolder):
        found = kind_of(folder)
        folder = open_verified(folder, kind or (HEAD_KIND if found == HEAD_KIND else KIND), verify, expected_digest)
    elif expected_digest is not None:
        folder.require(expected_digest)
    return Bundle.read(folder, threads)


def kind_of(folder: str | Path) -> str:
    """What the folder says it is, a classifier if nothing; `open_verified` says what is wrong with it."""
    try:
        with open(Path(folder, MANIFEST), "rb", opener=open_regular) as file:
            kind = json.loads(file.read(LARGEST_MANIFEST))["kind"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return KIND
    return kind if kind in (ENGINE_KIND, HEAD_KIND) else KIND


def _check_encoder(engine: VerifiedFolder, facts: EngineManifest, expected: str) -> None:
    if facts.fingerprint != expected:
        raise IosrFastError(
            f"the engine in {engine.folder} is of another export: the support set was encoded with "
            f"{expected[:12]}, the engine is {facts.fingerprint[:12]}; fit and save again"
        )


def _check_widths(facts: ClassifierManifest, engine: VerifiedFolder, head: Head) -> None:
    """That embeddings are such as the engine makes, and the text encoder."""
    width = engine.manifest["width"]
    adapted = engine.manifest["first_adapted_block"] is not None
    text = facts.text
    reads_text = engine.manifest["logit_scale"] is not None
    if (head.text is None) == reads_text or (text is not None and not reads_text):
        raise IosrFastError("expected texts of classes and a text encoder of a CLIP alone, which reads them")
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
