"""`iosr-fast benchmark` from the source tree; make gpu-check runs it where nothing is installed."""

import sys

from iosr_fast.benchmarks import gpu_bundle
from tools.source_tree import ROOT, use_source_tree

if __name__ == "__main__":
    sys.path += gpu_bundle.import_path(ROOT)  # last: what is installed goes first
    from iosr_fast.cli import app

    use_source_tree()
    app(["benchmark", *sys.argv[1:]], prog_name="iosr-fast")
