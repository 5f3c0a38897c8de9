"""CLIP and adapter to an engine folder. Needs torch and open_clip; saved classifiers don't."""

from iosr_fast.utils.require import require_installed

require_installed("torch", "cpu")
