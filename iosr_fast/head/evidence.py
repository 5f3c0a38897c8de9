"""What support images say of a head by being left out of it."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.head.method_config import MethodConfig
from iosr_fast.methods.conformal import LeftOutLabels, leave_out_labels
from iosr_fast.methods.support_audit import SupportAudit, audit_support
from iosr_fast.methods.support_set import SupportSet
from iosr_fast.methods.unknown import Unknown, fit_unknown


class Evidence:
    """The part of a Head that left-out support images answer, each at its first use."""

    support: SupportSet
    config: MethodConfig
    unknown_images: Embeddings | None

    @cached_property
    def unknown(self) -> Unknown:
        """How pictures of no class are recognised, by the embeddings that queries have."""
        return fit_unknown(self.support, self.config.which == "adapted", self.unknown_images)

    @cached_property
    def left_out_labels(self) -> LeftOutLabels:
        """What the method says of support images that are left out."""
        return leave_out_labels(self.support, self.config.compile)

    def audit(self, images: np.ndarray, classes: np.ndarray) -> SupportAudit:
        """What is wrong with the support images; `images` (N,) and `classes` (C,) are their names in the result."""
        return audit_support(self.support, self.config.compile, which=self.config.which, images=images, classes=classes)
