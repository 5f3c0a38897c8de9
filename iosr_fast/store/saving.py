"""Saving a fitted classifier, and loading it."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.head.fit import Fit
from iosr_fast.head.fitted import FittedAttributes
from iosr_fast.store.bundle import Bundle, load_bundle, save_bundle
from iosr_fast.utils.verified_folder import VerifiedFolder


class Saving(FittedAttributes):
    """The part of Classifier that writes and reads a bundle."""

    @classmethod
    @abstractmethod
    def _with_clip(cls, clip: OpenedClip, **parameters: Any) -> Self:
        """A classifier on an opened CLIP, whatever `parameters` name."""

    def save(self, folder: str | Path) -> None:
        """Write everything `load` needs to `folder`, engine and text encoder included.

        A crash at any moment leaves the earlier content or the complete new one. A CLIP whose text encoder can't
        be exported is saved without it: classes can then be added with `text=` only. Files are compared with the
        engine's manifest while they are copied: DamagedFileError for one that was changed, with nothing written.
        """
        fit = self._fitted()
        clip = fit.clip
        encoder = clip.encoder
        bundle = Bundle(
            fit.head,
            fit.views,
            clip.engine,
            encoder.fingerprint,
            clip.text,
            encoder.source,
            fit.integer_labels,
            fit.engine_choice,
        )
        save_bundle(bundle, folder)

    @classmethod
    def load(
        cls,
        folder: str | Path | VerifiedFolder,
        runtime: str = "auto",
        verify: bool = True,
        threads: int | None = None,
        expected_digest: str | None = None,
        runs: int = 1,
    ) -> Self:
        """A fitted classifier from `save`, whatever writers do to the folder meanwhile; needs no torch.

        Checks every field, every array and every file's hash (hashes not where `verify` is False). `expected_digest`,
        the "sha256:..." that `iosr-fast info FOLDER` prints, pins the content: nothing of another one is read.
        "auto" is the runtime that was chosen by measuring (`engine_choice_`) where this is the same processor.
        `threads` of the encoders on a CPU; None: one a core. `runs` threads may encode at once (open_engine). Raises
        FileNotFoundError or ValueError naming what is missing, damaged or foreign, and what open_engine raises.

        `get_params` gives what the bundle knows: no `pretrained`, no file of an adapter, and the fitted method with its
        parameters, so that a further fit searches nothing (a stack weighs its parts again). `fit` and clones use the
        bundle's own encoders, until `set_params` names another CLIP.
        """
        from iosr_fast.encoders.runtimes import open_engine

        bundle = load_bundle(folder, verify, threads, expected_digest)
        choice = bundle.engine_choice
        name = choice.runtime if runtime == "auto" and choice is not None else runtime
        # Support images that come later need both embeddings: OpenedClip opens that form then.
        adapted, files = bundle.head.needs_adapted, bundle.files or bundle.engine
        encoder = open_engine(files, name, verify=False, threads=threads, runs=runs, adapted=adapted)
        clip = OpenedClip(encoder, bundle.engine, bundle.text, bundle.head.tau)
        classifier = cls._with_clip(clip, **bundle.parameters(), runtime=runtime)
        classifier._fit = Fit(
            clip, bundle.head, bundle.views, integer_labels=bundle.integer_labels, engine_choice=choice
        )
        return classifier
