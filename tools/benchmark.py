"""`iosr-fast benchmark` from the source tree; make gpu-check runs it where nothing is installed."""

import sys

from iosr_fast.benchmarks import gpu_bundle
from tools.source_tree import ROOT, use_source_tree

# At import, because processes that a bench spawns import this file too.
sys.path += gpu_bundle.import_path(ROOT)  # last: what is installed goes first
use_source_tree()

if __name__ == "__main__":
    from iosr_fast.cli import app

    app(["benchmark", *sys.argv[1:]], prog_name="iosr-fast")
