"""The support images of a classifier encoded again, by another engine, from the images themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from iosr_fast.encoders.encoder import Encoder
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.fit import Fit
from iosr_fast.head.head import Head
from iosr_fast.head.support_images import SupportViews, encode_images
from iosr_fast.utils.progress import progress as bar
from iosr_fast.utils.text import abbreviate

SAME = 0.999  # least cosine of a key with the key of the same image; fp32 differs by rounding, int8 between runtimes
_log = logging.getLogger("iosr_fast")


def reencode(
    head: Head,
    encoder: Encoder,
    images: Sequence[Any],
    views: SupportViews,
    version: int,
    shown: bool = False,
    unknown_images: Sequence[Any] = (),
) -> Head:
    """`head` as `version`, with keys and queries of `encoder`; `images` are those of `head.examples` in order, and
    `unknown_images` pictures of none of the classes.

    Classes, texts, the images' ids and thumbnails, method and parameters stay. The reducer is fitted again.
    """
    labels, views = np.searchsorted(np.array(head.uids), head.examples.class_ids), replace(views, thumbnail=0)
    with bar("encode with the chosen engine", len(images) + len(unknown_images), shown=shown) as step:
        encoded, unknown, _ = encode_images(encoder, images, labels, views, head.class_names, unknown_images, step=step)
    examples = replace(head.examples, embeddings=encoded.embeddings, queries=encoded.queries)
    config = head.config.fitted(examples.as_support(head.uids, head.text, head.tau))
    return replace(head, examples=examples, config=config, version=version, unknown_images=unknown).compiled()


def match_images(fit: Fit, images: Sequence[Any], labels: Any, shown: bool = False) -> list[Any]:
    """The images of `fit.head.examples` in their order, found by their embeddings among the `images` of their class.

    The views of an image depend on its pixels and the seed alone, so that the same engine gives the same key again, up
    to rounding. Images that match no example are left out with a warning.

    Raises ValueError where an example has no image, and as `class_ids` and `encode_images` do.
    """
    head, examples, total = fit.head, fit.head.examples, len(images)
    if len(labels) == total:
        present = set(fit.labels().tolist())
        known = [i for i, label in enumerate(labels) if label in present]
        images, labels = [images[i] for i in known], [labels[i] for i in known]
    classes = fit.read_labels(images, labels)
    stored, views = examples.embeddings, replace(fit.views, thumbnail=0)
    if examples.queries is not None:  # single views, which are cheaper than those of keys
        stored, views = examples.queries, replace(views, views=1, single=False)
    with bar("find the support images", len(images), shown=shown) as step:
        encoder = fit.clip.encoder_for(adapted=True)
        encoded = encode_images(encoder, images, classes, views, head.class_names, step=step).examples
    found = np.full(len(examples), -1)
    for position, uid in enumerate(head.uids):
        rows, candidates = np.flatnonzero(examples.class_ids == uid), np.flatnonzero(classes == position)
        found[rows] = _pairs(stored.plain[rows], encoded.embeddings.plain[candidates], candidates)
    if missing := [head.uids.index(uid) for uid in examples.class_ids[found < 0].tolist()]:
        counts = np.bincount(missing, minlength=len(head.uids))
        named = [f"{head.class_names[c]} ({counts[c]} of {head.counts[c]})" for c in np.flatnonzero(counts)]
        raise IosrFastError(
            f"expected the images of all {len(examples)} examples of this classifier, found none for {len(missing)} of "
            f"them: {abbreviate(named)}; give the images that it was fitted on, one folder for each class, or take "
            "these examples out (remove_examples)"
        )
    if total > len(found):
        _log.warning("left out %d of %d images, which are no examples of this classifier", total - len(found), total)
    return [images[i] for i in found.tolist()]


def _pairs(stored: np.ndarray, rows: np.ndarray, names: np.ndarray) -> np.ndarray:
    """For each stored row the name of its own row among `rows`, the most similar pairs first; -1 for none."""
    found = np.full(len(stored), -1)
    similar = stored @ rows.T if len(rows) else np.zeros((len(stored), 0), np.float32)
    at, to = np.nonzero(similar >= SAME)
    free = np.ones(len(rows), bool)
    for pair in np.argsort(-similar[at, to], kind="stable").tolist():
        if found[at[pair]] < 0 and free[to[pair]]:
            found[at[pair]], free[to[pair]] = names[to[pair]], False
    return found
