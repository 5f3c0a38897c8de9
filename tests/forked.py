"""Processes that are forked from a server which has imported PyTorch once: each starts in milliseconds."""

from __future__ import annotations

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["iosr_fast.training.train", "torch.distributed", "torchvision.transforms.v2", "open_clip"]
)
