"""What support images say of a head by being left out of it."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.methods import METHODS
from iosr_fast.methods.conformal import LeftOutLabels, of_logits
from iosr_fast.methods.out_of_fold import OutOfFold, out_of_fold
from iosr_fast.methods.support_audit import SupportAudit, audit_support
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.tuned import Tuned
from iosr_fast.methods.unknown import Unknown, fit_unknown


class Evidence:
    """The part of a Head that left-out support images answer, each at its first use."""

    support: SupportSet
    config: MethodConfig
    tuned: Tuned | None
    unknown_images: Embeddings | None

    @cached_property
    def unknown(self) -> Unknown:
        """How pictures of no class are recognised, by the embeddings that queries have."""
        return fit_unknown(self.support, self.config.which == "adapted", self.unknown_images)

    @cached_property
    def left_out_labels(self) -> LeftOutLabels:
        """What the method says of support images that are left out."""
        return of_logits(self.out_of_fold.logits, self.out_of_fold.labels)

    @cached_property
    def out_of_fold(self) -> OutOfFold:
        """The logits of support images that are left out, from which the rest follows; those of the search that chose
        the parameters, if it has seen these support images."""
        config, tuned = self.config, self.tuned
        if tuned is not None and not tuned.stale and tuned.out_of_fold is not None:
            return tuned.out_of_fold
        method = METHODS[config.method]
        return out_of_fold(method, self.support, config.reducer, config.parameters, config.factor)

    def audit(self, images: np.ndarray, classes: np.ndarray) -> SupportAudit:
        """What is wrong with the support images; `images` (N,) and `classes` (C,) are their names in the result."""
        return audit_support(
            self.support, self.out_of_fold, self.config.compile, which=self.config.which, images=images, classes=classes
        )
