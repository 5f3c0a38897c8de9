"""A fitted classifier to a bundle and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iosr_fast.encoders.opened_clip import OpenedClip
from iosr_fast.head.fitted import Fit
from iosr_fast.store.bundle import Bundle, load_bundle, save_bundle
from iosr_fast.utils.verified_folder import VerifiedFolder


def save_fit(fit: Fit, folder: str | Path) -> None:
    """As Classifier.save."""
    clip, encoder = fit.clip, fit.clip.encoder
    known = fit.integer_labels, fit.engine_choice
    bundle = Bundle(fit.head, fit.views, clip.engine, encoder.fingerprint, clip.text, encoder.source, *known)
    save_bundle(bundle, folder)


def load_fit(
    folder: str | Path | VerifiedFolder,
    runtime: str,
    verify: bool,
    threads: int | None,
    expected_digest: str | None,
    runs: int,
) -> tuple[Fit, dict[str, Any]]:
    """As Classifier.load: the fit, and the parameters of Classifier that the bundle knows.

    "auto" is the runtime that was chosen by measuring where this is the same processor. The encoder is opened in the
    form that queries need: support images that come later need both embeddings, and OpenedClip opens that form then.
    """
    from iosr_fast.encoders.runtimes import open_engine

    bundle = load_bundle(folder, verify, threads, expected_digest)
    head, choice = bundle.head, bundle.engine_choice
    name = choice.runtime if runtime == "auto" and choice is not None else runtime
    files, adapted = bundle.files or bundle.engine, head.needs_adapted
    encoder = open_engine(files, name, verify=False, threads=threads, runs=runs, adapted=adapted)
    clip = OpenedClip(encoder, bundle.engine, bundle.text, head.tau)
    fit = Fit(clip, head, bundle.views, integer_labels=bundle.integer_labels, engine_choice=choice)
    return fit, {**bundle.parameters(), "runtime": runtime}
