"""Training of an adapter, and measurement of the overlap that it reduces. Needs torch."""

from iosr_fast.utils.require import require_installed

require_installed("torch", "train")
