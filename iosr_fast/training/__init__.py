"""Train an adapter, and measure the overlap that it reduces; data/ has the sources of pictures. Needs torch."""

from iosr_fast.utils.require import require_installed

require_installed("torch", "train")
