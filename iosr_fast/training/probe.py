"""What a training's held-out pictures say after each epoch: overlap of the cosines, and a linear probe (scikit-learn).

Both measure embeddings before any few-shot method.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from iosr_fast.backbones.adapter import Adapter
from iosr_fast.backbones.load import LoadedModel
from iosr_fast.encoders.encoder import unit
from iosr_fast.exceptions import IosrFastError
from iosr_fast.training.adapted_encoder import AdaptedEncoder
from iosr_fast.training.batches import Normalise, open_cache, read_stems
from iosr_fast.training.config import TrainConfig
from iosr_fast.training.objectives import Stem
from iosr_fast.training.overlap import overlap_area, pair_cosines
from iosr_fast.training.pictures import PictureSource, SubsetPictures
from iosr_fast.utils.ranking import auroc
from iosr_fast.utils.require import require, require_installed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BATCH = 128

MOST_PICTURES = 2000  # limits the cosines of all pairs to 16 MB
RIDGE = 3e-5


@dataclass(frozen=True)
class Probe:
    """The result of `probe` on a number of `pictures` of a number of `classes`.

    `overlap_area` is in [0, 1], less is better; `auroc` 1 at best, 0.5 by chance (see `iosr_fast.training.overlap`).
    `linear_probe` is the share of test pictures labelled correctly; 1 / classes by chance.
    """

    overlap_area: float
    auroc: float
    linear_probe: float
    pictures: int
    classes: int

    def measures(self, kind: str) -> dict[str, float]:
        """The three measures, named KIND_overlap_area and so on, for a log."""
        return {f"{kind}_{name}": getattr(self, name) for name in ("overlap_area", "auroc", "linear_probe")}


def probe(embeddings: np.ndarray, labels: np.ndarray) -> Probe:
    """Overlap, AUROC and linear-probe accuracy of `embeddings` (N, D) with integer `labels` (N,).

    Rows are L2-normalised first. Classes with a single picture are left out. At most 2,000 pictures, about equally many
    of each class, and at most 1,000 classes are used. The choice depends on `labels` only, so encoders are compared on
    the same pictures. The linear probe is fitted on half of each class (the larger half of an odd number)
    and tested on the rest: multinomial logistic regression, at the minimum of

        mean over i of -log softmax(rows[i] @ weight + bias)[labels[i]]  +  ridge / 2 * sum of weight^2

    The ridge of 3e-5 lies where accuracy is flat, on unit rows of the demo's CLIP and of CLIP ViT-B/32.

    Raises ValueError for embeddings that are zero or not finite, or fewer than two classes of two pictures.
    """
    units = _normalised(embeddings)
    rows = _choose(labels)
    names, sizes = np.unique(labels[rows], return_counts=True)
    if len(names) < 2:
        raise IosrFastError(
            f"expected at least two classes with two pictures or more, got {len(names)} among "
            f"{len(np.unique(labels))} classes of {len(labels)} pictures; hold out more pictures"
        )
    units, labels = units[rows], labels[rows]
    paired, unpaired = pair_cosines(units, labels)
    fitted = _position(sizes) < np.repeat(-(-sizes // 2), sizes)
    model = require("sklearn.linear_model", "train").LogisticRegression(
        C=1 / (RIDGE * np.count_nonzero(fitted)), tol=1e-5, max_iter=1000
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes")  # few pictures of each are usual here
        model.fit(units[fitted], labels[fitted])
    return Probe(
        overlap_area=overlap_area(paired, unpaired),
        auroc=auroc(paired, unpaired),
        linear_probe=float((model.predict(units[~fitted]) == labels[~fitted]).mean()),
        pictures=len(units),
        classes=len(names),
    )


def probed_rows(labels: np.ndarray) -> np.ndarray:
    """The rows that `probe` uses, ascending: only these must be encoded. A probe of these rows uses all of them."""
    return np.sort(_choose(labels))


def _normalised(embeddings: np.ndarray) -> np.ndarray:
    bad = np.flatnonzero(~(np.isfinite(embeddings).all(axis=1) & embeddings.any(axis=1)))
    if len(bad):
        raise IosrFastError(
            f"expected finite embeddings other than zero, got {len(bad)} others, the first in row {bad[0]}"
        )
    return unit(embeddings)


def _choose(labels: np.ndarray) -> np.ndarray:
    """The rows to use, class by class, in random order within each."""
    rng = np.random.default_rng(0)
    order = np.lexsort((rng.random(len(labels)), labels))
    sizes = np.unique(labels, return_counts=True)[1]
    shares = np.where(sizes < 2, 0, sizes)
    usable = np.flatnonzero(shares)
    if len(usable) > MOST_PICTURES // 2:
        shares[rng.permutation(usable)[MOST_PICTURES // 2 :]] = 0
    limit = min(int(shares.max(initial=0)), MOST_PICTURES)
    while np.minimum(shares, limit).sum() > MOST_PICTURES:
        limit -= 1
    return order[_position(sizes) < np.repeat(np.minimum(shares, limit), sizes)]


def _position(sizes: np.ndarray) -> np.ndarray:
    """The position of each row in its class, from 0, for rows sorted by class."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


class HeldOutEvaluator:
    """Measures held-out pictures (of `source`, which training must not see) under the adapter at any step.

    Only the pictures that `probe` uses are encoded. The frozen stem runs once for both embeddings; with a `folder` its
    outputs are cached and later epochs run the adapted blocks only. The plain embeddings are measured once.
    """

    def __init__(
        self,
        clip: LoadedModel,
        encoder: AdaptedEncoder,
        source: PictureSource,
        config: TrainConfig,
        fabric: Fabric,
        folder: Path | None,
    ) -> None:
        require_installed("sklearn", "train")  # now, not after the first epoch
        self.encoder, self.fabric = encoder, fabric
        self.normalise = Normalise(clip, True, fabric.device)  # as at inference
        classes = int((source.labels.bincount() >= 2).sum())
        if classes < 2:
            raise IosrFastError(
                f"expected held-out pictures of at least two classes, two of each, to measure overlap and a linear "
                f"probe on; got {len(source.labels)} pictures, {classes} classes with two: hold out more, or none"
            )
        self.source = SubsetPictures(source, torch.from_numpy(probed_rows(source.labels.numpy())))
        self.plain: Probe | None = None
        plainly = replace(config, normalise=True, augment=False)
        self.cache = open_cache(folder, clip, encoder, self.source, plainly, 1) if folder is not None else None

    @torch.no_grad()
    def measure(self, adapter: Adapter) -> tuple[Probe, Probe]:
        """(plain, adapted); the adapter keeps its mode."""
        mode = adapter.training
        adapter.eval()
        plain, adapted = [], []
        parts = torch.arange(len(self.source.labels)).split(BATCH)
        for (stem,) in read_stems(self.source, parts, self._stem, self.cache, 0, self.fabric.device):
            with self.fabric.autocast():
                adapted.append(self.encoder.tail(adapter, *stem).float().cpu().numpy())
                if self.plain is None:
                    plain.append(self.encoder.tail(None, *stem).float().cpu().numpy())
        adapter.train(mode)
        labels = self.source.labels.numpy()
        if self.plain is None:
            self.plain = probe(np.concatenate(plain), labels)
        return self.plain, probe(np.concatenate(adapted), labels)

    def _stem(self, rows: torch.Tensor, pixels: torch.Tensor) -> list[Stem]:
        with self.fabric.autocast():
            return [self.encoder.stem(self.normalise(pixels.to(self.fabric.device).float() / 255))]
