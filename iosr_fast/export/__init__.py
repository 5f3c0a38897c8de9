"""Everything that happens before deployment: needs torch and open_clip, which the runtime never imports."""

from iosr_fast.utils.require import require_installed

require_installed("torch", "train")
